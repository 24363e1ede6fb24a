//! How a draft model grows a tree of a given shape: a pass over each level ranks the continuations of its nodes, and the
//! nodes of the next level take the best of them.
//!
//! Where the device drafts, it makes the next level up by itself, and the host waits once: for the whole tree. Elsewhere
//! it waits for every level. Both run the same passes over the same rows, so the trees are equal.

use treespark_kernel_gen::TreeShape;

use super::{Kind, Network};
use crate::backend::{Backend, Extent};
use crate::batch::Batch;
use crate::error::Result;
use crate::kv::KvCache;
use crate::sampling::Sampling;
use crate::tree::TokenTree;

impl Network {
    /// Children that a node of a grown tree may have.
    pub fn top_k(&self) -> usize {
        self.dims.top_k
    }

    /// The tree below `root` whose nodes hold the most likely tokens, among siblings the likeliest first. The shape must
    /// come level by level, with no more than [`top_k`](Network::top_k) children a node. All nodes but those of the last
    /// level then have cache rows. Waits.
    pub fn grow(
        &mut self,
        backend: &mut dyn Backend,
        kv: &mut KvCache,
        root: u32,
        shape: &TreeShape,
    ) -> Result<TokenTree> {
        kv.reserve(&mut self.pool, shape.len())?;
        if backend.drafts() && shape.len() > 1 {
            self.grow_on_device(backend, kv, root, shape)
        } else {
            self.grow_by_host(backend, kv, root, shape)
        }
    }

    fn grow_on_device(
        &mut self,
        backend: &mut dyn Backend,
        kv: &KvCache,
        root: u32,
        shape: &TreeShape,
    ) -> Result<TokenTree> {
        let mut passes = Vec::new();
        for depth in 0..shape.max_depth() {
            let (level, grown) = (shape.level(depth), shape.prefix(shape.level(depth + 1).end));
            let extent = Extent { rows: level.len(), requests: 1, keys: kv.len() + depth + 1 };
            passes.push((self.pass(backend, Kind::Draft, level.len())?, extent));
            passes.push((self.pass(backend, Kind::Grow(grown), 1)?, extent));
        }
        let mut tree = TokenTree::root(root);
        self.write(backend, &self.level(kv, &tree, 0))?;
        passes.into_iter().try_for_each(|(pass, extent)| backend.run(pass, extent))?;
        let tokens = backend.read(self.memory.get("grown"), 0, shape.len())?; // the only wait
        for (node, &token) in tokens.iter().enumerate().skip(1) {
            tree.push(shape.parent(node), token)?;
        }
        Ok(tree)
    }

    fn grow_by_host(
        &mut self,
        backend: &mut dyn Backend,
        kv: &KvCache,
        root: u32,
        shape: &TreeShape,
    ) -> Result<TokenTree> {
        let (mut tree, ranks, top_k) = (TokenTree::root(root), shape.ranks(), self.dims.top_k);
        for depth in 0..shape.max_depth() {
            let above = shape.level(depth);
            self.run(backend, Kind::Draft, &self.level(kv, &tree, depth))?;
            let ids = backend.read(self.memory.get("top_ids"), 0, above.len() * top_k)?;
            for node in shape.level(depth + 1) {
                let parent = shape.parent(node);
                tree.push(parent, ids[(parent - above.start) * top_k + ranks[node]])?;
            }
        }
        Ok(tree)
    }

    /// The rows of one level.
    fn level(&self, kv: &KvCache, tree: &TokenTree, depth: usize) -> Batch {
        let mut batch = Batch::new(self.dims.pages_per_request);
        let nodes: Vec<usize> = tree.shape().level(depth).collect();
        batch.add(kv, tree, &nodes, &Sampling::default());
        batch
    }
}

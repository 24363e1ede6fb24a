//! A standalone draft model: any model with the target's tokenizer. Its top-k growth gives the tree, level by level.
//!
//! The draft's own cache mirrors the committed text. Before a round it may lack the last few tokens (the bonus token,
//! and an accepted leaf, which the draft never ran); they are run first.

use treespark_kernel_gen::TreeShape;
use treespark_models::Model;

use super::{Draft, Drafter, HitRates, Plan};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::kv::KvCache;
use crate::memory::MemoryUse;
use crate::network::{Limits, Network};
use crate::tree::Accepted;

/// Children of a node that a draft pass offers; a shape with more takes these.
pub const MAX_CHILDREN: usize = 16;
/// The tree when none is asked for, where rows are dear (a CPU) and where they are nearly free.
const DEFAULT_SHAPE_DEAR: &str = "chain:4";
const DEFAULT_SHAPE_CHEAP: &str = "3x2x2x1";
/// Rows are dear where a pass of this many costs more than so many passes of one.
const DEAR: (usize, f32) = (16, 1.6);
/// Hit rates of the first, second, ... child before anything is measured.
const PRIORS: [f32; MAX_CHILDREN] =
    [0.6, 0.15, 0.07, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01];

pub struct ModelDrafter {
    network: Network,
    kv: KvCache,
    rates: HitRates,
    /// Rank among its siblings of every node of the last proposal.
    ranks: Vec<usize>,
    /// Nodes of the last proposal that have cache rows: all but the deepest level.
    has_rows: Vec<bool>,
    default_shape: TreeShape,
}

impl ModelDrafter {
    /// Refuses a model whose vocabulary is not the target's.
    pub fn load(
        backend: &mut dyn Backend,
        model: &Model,
        target_vocab: usize,
        limits: Limits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ModelDrafter> {
        let vocab = model.config().vocab_size;
        if vocab != target_vocab {
            return Err(Error::Vocabulary { draft: vocab, target: target_vocab });
        }
        let dear = backend.info().cost.of(DEAR.0) > DEAR.1;
        let limits = Limits { top_k: MAX_CHILDREN.min(vocab), ..limits };
        Ok(ModelDrafter {
            network: Network::load(backend, model, limits, progress)?,
            kv: KvCache::default(),
            rates: HitRates::new(&PRIORS),
            ranks: Vec::new(),
            has_rows: Vec::new(),
            default_shape: if dear { DEFAULT_SHAPE_DEAR } else { DEFAULT_SHAPE_CHEAP }.parse().map_err(Error::Shape)?,
        })
    }

    /// Grows the tree over the shape's levels. Node ids of the draft follow the shape's order, breadth first.
    fn grow(&mut self, backend: &mut dyn Backend, draft: &mut Draft, shape: &TreeShape, plan: &Plan) -> Result<()> {
        let mut level = vec![(0, 0)]; // (node of the shape, node of the draft)
        for depth in 0..shape.max_depth().min(plan.max_depth) {
            let parents: Vec<usize> = level.iter().map(|&(_, drafted)| drafted).collect();
            let offers = self.network.draft(backend, &mut self.kv, &draft.tree, &parents)?;
            parents.iter().for_each(|&node| self.has_rows[node] = true);
            let mut next = Vec::new();
            for ((at, parent), offer) in level.into_iter().zip(&offers) {
                for (rank, (child, &(token, _))) in shape.children(at).zip(offer).enumerate() {
                    if draft.tree.len() == plan.max_nodes {
                        return Ok(());
                    }
                    let node = draft.tree.push(parent, token)?;
                    draft.survival.push(draft.survival[parent] * self.rates.rate(rank));
                    self.ranks.push(rank);
                    self.has_rows.push(false);
                    debug_assert_eq!(shape.depth(child), depth + 1);
                    next.push((child, node));
                }
            }
            level = next;
            if level.is_empty() {
                break;
            }
        }
        Ok(())
    }
}

impl Drafter for ModelDrafter {
    fn name(&self) -> &'static str {
        "model"
    }

    fn propose(&mut self, backend: &mut dyn Backend, context: &[u32], plan: &Plan) -> Result<Draft> {
        let last = context.len() - 1;
        let missing = &context[self.kv.len()..last];
        self.network.extend(backend, &mut self.kv, missing, &mut |_| {})?;
        let mut draft = Draft::root(context[last]);
        (self.ranks, self.has_rows) = (vec![0], vec![false]);
        let shape = plan.shape.clone().unwrap_or_else(|| self.default_shape.clone());
        self.grow(backend, &mut draft, &shape, plan)?;
        Ok(draft)
    }

    fn observe(&mut self, backend: &mut dyn Backend, draft: &Draft, accepted: &Accepted) -> Result<()> {
        self.rates.learn(&draft.tree, &self.ranks, &accepted.tokens);
        let path: Vec<usize> = accepted.path.iter().copied().take_while(|&node| self.has_rows[node]).collect();
        if path.is_empty() { Ok(()) } else { self.network.commit(backend, &mut self.kv, &path) }
    }

    fn reset(&mut self) {
        self.network.release(&mut self.kv);
    }

    fn memory_use(&self) -> MemoryUse {
        self.network.memory_use()
    }
}

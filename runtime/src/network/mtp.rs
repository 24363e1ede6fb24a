//! How an MTP module follows its target and drafts: it takes in what was accepted, and guesses level by level.
//!
//! Its cache has, at slot p, the pair of the target's state at position p and the token behind it. So of a sequence with L tokens
//! in the cache and one more, the last pair is at slot L - 1: the root of the tree that it guesses. The states of accepted rows are
//! on the device until the target's next pass; what was not drafted from is taken in before that.

use treespark_kernel_gen::{MAX_NODES, TreeShape};
use treespark_models::SpeculatorConfig;

use super::{Kind, Network};
use crate::backend::Backend;
use crate::batch::{Batch, Entry};
use crate::error::Result;
use crate::kv::KvCache;
use crate::sequence::{Fresh, Sequence};
use crate::tree::TokenTree;

const SOURCES: &str = "mtp.sources";

impl Network {
    pub(super) fn has_mtp(&self) -> bool {
        matches!(self.speculator, Some(SpeculatorConfig::Mtp(_)))
    }

    /// Compiles what guesses a tree of this shape, behind any that was accepted of it.
    pub fn prepare_guesses(&mut self, backend: &mut dyn Backend, shape: &TreeShape) -> Result<()> {
        let accepted = (1..=shape.max_depth() + 1).map(|rows| (Kind::Guess { is_first: true }, rows));
        let levels = (1..shape.max_depth()).map(|depth| (Kind::Guess { is_first: false }, shape.level(depth).len()));
        self.prepare(backend, accepted.chain(levels).collect())
    }

    /// The tree of this shape behind a sequence's last token, if the state that it is guessed from is there. See
    /// [`grow`](Network::grow).
    pub fn grow_pairs(
        &mut self,
        backend: &mut dyn Backend,
        seq: &mut Sequence,
        shape: &TreeShape,
    ) -> Result<Option<TokenTree>> {
        let Some(fresh) = self.take_fresh(seq) else { return Ok(None) };
        seq.kv.reserve(&mut self.pool, shape.len())?;
        let (mut tree, ranks, top_k) = (TokenTree::root(seq.last()), shape.ranks(), self.dims.top_k);
        let first_slot = seq.kv.len() - fresh.len();
        let pairs = self.pairs(&seq.kv, first_slot, &seq.tokens()[first_slot + 1..=seq.kv.len()])?;
        self.run_pairs(backend, Kind::Guess { is_first: true }, &pairs, &fresh)?;
        // Row of the root's pair, then of the first node of the level above.
        let mut first = fresh.len() - 1;
        for depth in 1..=shape.max_depth() {
            let above = shape.level(depth - 1);
            let ids = backend.read(self.memory.get("top_ids"), first * top_k, above.len() * top_k)?;
            let mut sources = Vec::new();
            for node in shape.level(depth) {
                let parent = shape.parent(node) - above.start;
                tree.push(shape.parent(node), ids[parent * top_k + ranks[node]])?;
                sources.push((first + parent) as u32);
            }
            if depth < shape.max_depth() {
                let nodes: Vec<usize> = shape.level(depth).collect();
                let mut batch = Batch::new(self.dims.pages_per_request);
                batch.add_behind(&seq.kv, seq.kv.len() - 1, &tree, &nodes);
                self.run_pairs(backend, Kind::Guess { is_first: false }, &batch, &sources)?;
                first = 0;
            }
        }
        Ok(Some(tree))
    }

    /// Behind the target's pass over a chunk of a prompt, which is not committed yet: `following` are the tokens behind its tokens,
    /// as far as they are known.
    pub(super) fn keep_chunk(&mut self, backend: &mut dyn Backend, kv: &KvCache, following: &[u32]) -> Result<()> {
        if !self.has_mtp() || following.is_empty() {
            return Ok(());
        }
        let pairs = self.pairs(kv, kv.len(), following)?;
        let rows: Vec<u32> = (0..following.len() as u32).collect();
        self.run_pairs(backend, Kind::Keep, &pairs, &rows)
    }

    /// Before the target's next pass: what the sequences in it had accepted in the last.
    pub(super) fn keep_accepted(&mut self, backend: &mut dyn Backend, entries: &mut [Entry<'_>]) -> Result<()> {
        if !self.has_mtp() {
            return Ok(());
        }
        let mut batch = Batch::new(self.dims.pages_per_request);
        let mut sources = Vec::new();
        for Entry { seq, .. } in entries {
            let Some(fresh) = self.take_fresh(seq) else { continue };
            let first_slot = seq.kv.len() - fresh.len();
            let chain = TokenTree::chain(&seq.tokens()[first_slot + 1..=seq.kv.len()])?;
            batch.add_behind(&seq.kv, first_slot, &chain, &(0..chain.len()).collect::<Vec<_>>());
            sources.extend(fresh);
        }
        if sources.is_empty() {
            return Ok(());
        }
        self.run_pairs(backend, Kind::Keep, &batch, &sources)
    }

    /// Of a prompt that was run by itself, the row of its last token: the first tree is guessed from there.
    pub fn note_prompt(&self, seq: &mut Sequence, run: usize) {
        if self.has_mtp() && run > 0 {
            let row = ((run - 1) % MAX_NODES) as u32;
            seq.fresh = Fresh { rows: vec![row], pass: self.target_passes };
        }
    }

    /// The rows of what was accepted last, if their states are still there.
    fn take_fresh(&self, seq: &mut Sequence) -> Option<Vec<u32>> {
        let Fresh { rows, pass } = std::mem::take(&mut seq.fresh);
        (pass == self.target_passes && !rows.is_empty() && rows.len() <= seq.kv.len()).then_some(rows)
    }

    /// Pairs from a slot on, with these tokens.
    fn pairs(&self, kv: &KvCache, first: usize, tokens: &[u32]) -> Result<Batch> {
        let chain = TokenTree::chain(tokens)?;
        let mut batch = Batch::new(self.dims.pages_per_request);
        batch.add_behind(kv, first, &chain, &(0..tokens.len()).collect::<Vec<_>>());
        Ok(batch)
    }

    fn run_pairs(&mut self, backend: &mut dyn Backend, kind: Kind, batch: &Batch, sources: &[u32]) -> Result<()> {
        let pass = self.pass(backend, kind, batch.n_rows())?;
        backend.write(self.memory.get(SOURCES), 0, sources)?;
        self.write_and_run(backend, pass, batch)
    }
}

//! What follows the logits: mask, perturb, draw, top-k, accept, commit.

use super::{Access, Axis, Grid, KernelCall, LowerError, Lowering};
use crate::op::Op;
use crate::spec::KernelSpec;

impl Lowering<'_> {
    pub(super) fn mask(&self) -> Result<Vec<KernelCall>, LowerError> {
        const THREADS: usize = 256;
        let &Op::Mask { allowed, logits, .. } = self.op else { unreachable!("lowering another op") };
        let vocab = self.desc(logits).shape[1];
        Ok(vec![KernelCall {
            spec: KernelSpec::new("mask").size("VOCAB", "v", vocab),
            bindings: vec![
                self.read(self.batch.requests),
                self.rows(allowed, Access::Read),
                self.rows(logits, Access::Write),
            ],
            grid: Grid([Axis::Fixed(vocab.div_ceil(THREADS)), Axis::Rows(1), Axis::Fixed(1)]),
        }])
    }

    pub(super) fn draw(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Draw { seen, logits, draws, .. } = self.op else { unreachable!("lowering another op") };
        Ok(vec![KernelCall {
            spec: KernelSpec::new("draw").size("VOCAB", "v", self.desc(logits).shape[1]),
            bindings: vec![
                self.read(self.batch.rows),
                self.read(self.batch.requests),
                self.read(seen),
                self.rows(logits, Access::Read),
                self.rows(draws, Access::Write),
            ],
            grid: Grid([Axis::Rows(1), Axis::Fixed(1), Axis::Fixed(1)]),
        }])
    }

    pub(super) fn perturb(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Perturb { logits, .. } = self.op else { unreachable!("lowering another op") };
        let vocab = self.desc(logits).shape[1];
        Ok(vec![KernelCall {
            spec: KernelSpec::new("perturb").size("VOCAB", "v", vocab),
            bindings: vec![
                self.read(self.batch.rows),
                self.read(self.batch.requests),
                self.rows(logits, Access::Write),
            ],
            grid: Grid([Axis::Fixed(vocab.div_ceil(4 * 64)), Axis::Rows(1), Axis::Fixed(1)]),
        }])
    }

    pub(super) fn top_k(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::TopK { logits, ids, values, .. } = self.op else { unreachable!("lowering another op") };
        Ok(vec![KernelCall {
            spec: KernelSpec::new("top_k").size("VOCAB", "v", self.desc(logits).shape[1]).size(
                "K",
                "k",
                self.desc(ids).shape[1],
            ),
            bindings: vec![
                self.read(self.batch.requests),
                self.rows(logits, Access::Read),
                self.rows(ids, Access::Write),
                self.rows(values, Access::Write),
            ],
            grid: Grid([Axis::Rows(1), Axis::Fixed(1), Axis::Fixed(1)]),
        }])
    }

    /// The rows carry the tree: one kernel serves every shape.
    pub(super) fn accept(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Accept { draws, accepted, .. } = self.op else { unreachable!("lowering another op") };
        Ok(vec![KernelCall {
            spec: KernelSpec::new("accept"),
            bindings: vec![
                self.read(self.batch.rows),
                self.read(self.batch.requests),
                self.rows(draws, Access::Read),
                self.whole(accepted, Access::Write),
            ],
            grid: Grid([Axis::Requests, Axis::Fixed(1), Axis::Fixed(1)]),
        }])
    }

    pub(super) fn gather(&self) -> Result<Vec<KernelCall>, LowerError> {
        const THREADS: usize = 64;
        let &Op::Gather { states, sources, out, .. } = self.op else { unreachable!("lowering another op") };
        let columns = self.desc(states).shape[1];
        Ok(vec![KernelCall {
            spec: KernelSpec::new("gather").size("COLUMNS", "k", columns),
            bindings: vec![
                self.read(self.batch.requests),
                self.read(sources),
                self.read(states),
                self.rows(out, Access::Write),
            ],
            grid: Grid([Axis::Fixed(columns.div_ceil(THREADS)), Axis::Rows(1), Axis::Fixed(1)]),
        }])
    }

    /// One call for each bank of each cache.
    pub(super) fn commit(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Commit { accepted, k_cache, v_cache, .. } = self.op else { unreachable!("lowering another op") };
        let cache = self.pass.cache_shape(k_cache);
        let desc = self.desc(k_cache);
        let layer_bytes = desc.bytes() / cache.layers;
        let banks = self.limits.banks(desc);
        let calls = [Some(k_cache), v_cache].into_iter().flatten().flat_map(|buf| {
            banks.iter().enumerate().map(move |(index, bytes)| KernelCall {
                spec: KernelSpec::new("commit")
                    .size("HEAD_WORDS", "w", cache.head_dim * desc.dtype.size() / 4)
                    .size("KV_HEADS", "kv", cache.kv_heads)
                    .size("PAGE_SIZE", "p", cache.page_size)
                    .with("PAGES_PER_REQUEST", self.pages_per_request())
                    .with("CACHE_BASE", 0_usize)
                    .with("LAYER_WORDS", layer_bytes / 4),
                bindings: vec![
                    self.read(self.batch.requests),
                    self.read(self.batch.pages),
                    self.read(accepted),
                    self.bank(buf, index, bytes.clone(), Access::Write),
                ],
                grid: Grid([Axis::Fixed(cache.kv_heads), Axis::Fixed(bytes.len() / layer_bytes), Axis::Requests]),
            })
        });
        Ok(calls.collect())
    }
}

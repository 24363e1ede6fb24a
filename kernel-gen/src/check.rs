//! [`Op::check`]: an op's buffers, shapes, dtypes and parameters, against its pass. Done once; backends assume it.

use crate::op::{BlockShape, CacheShape, MAX_OPENED, Op, TreeSpec};
use crate::pass::{Buf, DType, Pass, PassError, Role};
use crate::{ANCESTOR_WORDS, MAX_NODES, Request, Row, layout};

/// Ancestors of a drafted node are one 64-bit word.
const MAX_DEVICE_NODES: usize = 64;
/// What a row sees is one 64-bit word.
const MAX_BLOCK_ROWS: usize = 64;
/// A lane of a warp has two.
const MAX_CANDIDATES: usize = 64;
/// Elements of a key.
const MAX_HEAD_DIM: usize = 256;

mod experts;
mod latent;

impl Op {
    /// Validates buffers, shapes, dtypes and parameters against the pass. Backends assume that it passed.
    pub fn check(&self, pass: &Pass) -> Result<(), PassError> {
        let c = Check { op: self, pass };
        for (field, buf) in self.operands() {
            if buf.0 >= pass.buffers.len() {
                return Err(c.error(field, format!("names buffer {} of {}", buf.0, pass.buffers.len())));
            }
        }
        let batch = self.batch();
        let max_rows = c.dims(batch.rows)[0];
        c.shape("rows", batch.rows, DType::U32, &[max_rows, Row::WORDS])?;
        if pass.rows == 0 || pass.rows > max_rows {
            return Err(c.error("rows", format!("the pass is for {} rows, the buffer holds {max_rows}", pass.rows)));
        }
        let words = pass.buffer(batch.requests).len();
        if words < layout::HEADER_WORDS + Request::WORDS
            || !(words - layout::HEADER_WORDS).is_multiple_of(Request::WORDS)
        {
            return Err(c.error("requests", format!("{words} words hold no whole number of requests")));
        }
        let max_requests = (words - layout::HEADER_WORDS) / Request::WORDS;
        c.shape("requests", batch.requests, DType::U32, &[words])?;
        let pages = c.dims(batch.pages).to_vec();
        c.rank("pages", batch.pages, 2)?;
        c.shape("pages", batch.pages, DType::U32, &[max_requests, pages[1]])?;

        match self {
            Op::Embed { table, out, .. } => {
                c.weight("table", *table)?;
                c.shape("out", *out, DType::F32, &[max_rows, c.dims(*table)[1]])
            }
            Op::Qkv {
                layer,
                heads,
                kv_heads,
                x,
                norm,
                weight,
                bias,
                q_norm,
                k_norm,
                rope,
                q,
                k_cache,
                v_cache,
                ..
            } => {
                let cache = c.cache(*k_cache, *v_cache, *layer)?;
                c.heads(*heads, *kv_heads, &cache)?;
                let (dim, n) = (cache.head_dim, (heads + 2 * kv_heads) * cache.head_dim);
                let hidden = c.normed("x", *x, *norm, max_rows)?;
                c.weight_shape("weight", *weight, &[n, hidden])?;
                if let Some(bias) = bias {
                    c.shape("bias", *bias, DType::F32, &[n])?;
                }
                for (field, buf) in [("q_norm", q_norm), ("k_norm", k_norm)] {
                    if let Some(buf) = buf {
                        c.shape(field, *buf, DType::F32, &[dim])?;
                    }
                }
                c.rank("rope", *rope, 3)?;
                c.shape("rope", *rope, DType::F32, &[c.dims(*rope)[0], dim / 2, 2])?;
                if *heads == 0 {
                    return c.dtype("q", *q, DType::F32);
                }
                c.shape("q", *q, DType::F32, &[max_rows, *heads, dim])
            }
            Op::TreeAttention { layer, heads, kv_heads, tree, q, k_cache, v_cache, out, .. } => {
                let cache = c.cache(*k_cache, *v_cache, *layer)?;
                c.heads(*heads, *kv_heads, &cache)?;
                c.tree(tree)?;
                for (field, buf) in [("q", *q), ("out", *out)] {
                    c.shape(field, buf, DType::F32, &[max_rows, *heads, cache.head_dim])?;
                }
                Ok(())
            }
            Op::Project { x, weight, residual, .. } => {
                let k = pass.buffer(*x).len() / max_rows;
                c.dtype("x", *x, DType::F32)?;
                c.weight("weight", *weight)?;
                let hidden = c.dims(*weight)[0];
                c.weight_shape("weight", *weight, &[hidden, k])?;
                let rows = c.dims(*residual)[0];
                if rows < pass.rows {
                    return Err(c.error("residual", format!("holds {rows} rows, the pass has {}", pass.rows)));
                }
                c.shape("residual", *residual, DType::F32, &[rows, hidden])
            }
            Op::GateUp { x, norm, weight, out, .. } => {
                let hidden = c.normed("x", *x, *norm, max_rows)?;
                c.rank("out", *out, 2)?;
                let ffn = c.dims(*out)[1];
                c.weight_shape("weight", *weight, &[2 * ffn, hidden])?;
                c.shape("out", *out, DType::F32, &[max_rows, ffn])
            }
            Op::Latent { .. } | Op::LatentQueries { .. } | Op::PerHead { .. } | Op::LatentAttention { .. } => {
                c.latent(max_rows)
            }
            Op::Route { .. }
            | Op::GroupRows { .. }
            | Op::ExpertGateUp { .. }
            | Op::ExpertDown { .. }
            | Op::Combine { .. } => c.experts(max_rows),
            Op::ResBlock { states, weight, bias, out, .. } => {
                c.weight("weight", *weight)?;
                let (rows, hidden) = (c.dims(*weight)[0], c.dims(*weight)[1]);
                if rows % hidden != 0 {
                    return Err(c.error("weight", format!("has {rows} rows, expected a multiple of {hidden}")));
                }
                c.shape("bias", *bias, DType::F32, &[rows])?;
                c.shape("states", *states, DType::F32, &[max_rows, hidden])?;
                c.shape("out", *out, DType::F32, &[max_rows, hidden])
            }
            Op::Norm { x, norm, out, .. } => {
                let hidden = c.normed("x", *x, *norm, max_rows)?;
                c.shape("out", *out, DType::F32, &[max_rows, hidden])
            }
            Op::Gather { states, sources, out, .. } => {
                c.rank("states", *states, 2)?;
                let width = c.dims(*states)[1];
                c.shape("states", *states, DType::F32, &[max_rows, width])?;
                c.shape("sources", *sources, DType::U32, &[max_rows])?;
                c.shape("out", *out, DType::F32, &[max_rows, width])
            }
            Op::Head { x, norm, weight, logits, .. } => {
                let hidden = c.normed("x", *x, *norm, max_rows)?;
                c.rank("logits", *logits, 2)?;
                let vocab = c.dims(*logits)[1];
                c.weight_shape("weight", *weight, &[vocab, hidden])?;
                c.logits(*logits)
            }
            Op::Mask { allowed, logits, .. } => {
                c.logits(*logits)?;
                let (rows, vocab) = (c.dims(*logits)[0], c.dims(*logits)[1]);
                c.shape("allowed", *allowed, DType::U32, &[rows, vocab.div_ceil(32)])
            }
            Op::Draw { seen, logits, draws, .. } => {
                c.logits(*logits)?;
                c.shape("seen", *seen, DType::U32, &[max_requests, c.dims(*logits)[1].div_ceil(32)])?;
                c.shape("draws", *draws, DType::U32, &[max_rows])
            }
            Op::Perturb { logits, .. } => c.logits(*logits),
            Op::TopK { logits, ids, values, .. } => {
                c.logits(*logits)?;
                c.rank("ids", *ids, 2)?;
                let k = c.dims(*ids)[1];
                if k == 0 || k > c.dims(*logits)[1] {
                    return Err(c.error("ids", format!("k = {k} of a vocabulary of {}", c.dims(*logits)[1])));
                }
                let ranked = c.dims(*ids)[0];
                if ranked < pass.rows {
                    return Err(c.error("ids", format!("holds {ranked} rows, the pass has {}", pass.rows)));
                }
                c.shape("ids", *ids, DType::U32, &[ranked, k])?;
                c.shape("values", *values, DType::F32, &[ranked, k])
            }
            Op::Accept { tree, draws, accepted, .. } => {
                c.tree(tree)?;
                c.shape("draws", *draws, DType::U32, &[max_rows])?;
                c.accepted(*accepted, max_requests)
            }
            Op::Commit { accepted, k_cache, v_cache, .. } => {
                match v_cache {
                    Some(v_cache) => c.cache(*k_cache, *v_cache, 0)?,
                    None => c.latent_cache(*k_cache, 0)?,
                };
                c.accepted(*accepted, max_requests)
            }
            Op::DraftNgram { accepted, history, state, row_cost, .. } => {
                c.accepted(*accepted, max_requests)?;
                c.rank("history", *history, 2)?;
                let tokens = c.dims(*history)[1];
                if !tokens.is_multiple_of(4) {
                    return Err(c.error("history", format!("of {tokens} tokens, expected a multiple of 4")));
                }
                c.shape("history", *history, DType::U32, &[max_requests, tokens])?;
                c.rank("state", *state, 2)?;
                let nodes = layout::ngram_nodes(c.dims(*state)[1]);
                c.shape("state", *state, DType::U32, &[max_requests, layout::ngram_state_words(nodes)])?;
                if nodes == 0 || nodes > MAX_DEVICE_NODES || max_requests * nodes > max_rows {
                    let problem =
                        format!("for {max_requests} trees of {nodes} nodes, expected 1 to {MAX_DEVICE_NODES}");
                    return Err(c.error("state", format!("{problem}, and {max_rows} rows for all")));
                }
                if !row_cost.is_finite() || *row_cost < 0.0 {
                    return Err(c.error("row_cost", format!("is {row_cost}, expected at least 0")));
                }
                Ok(())
            }
            Op::Grow { shape, ids, tokens, .. } => {
                if shape.len() == 1 || !shape.is_level_by_level() {
                    return Err(
                        c.error("shape", format!("is {shape}, expected two levels or more, one after the other"))
                    );
                }
                let depth = shape.max_depth();
                let [above, level] = [depth - 1, depth].map(|depth| shape.level(depth));
                if max_requests * level.len() > max_rows {
                    let nodes = level.len();
                    let problem = format!("grows {max_requests} times {nodes} nodes, the buffer holds {max_rows} rows");
                    return Err(c.error("shape", problem));
                }
                c.rank("ids", *ids, 2)?;
                let (ranked, k) = (c.dims(*ids)[0], c.dims(*ids)[1]);
                let (parents, children) =
                    (max_requests * above.len(), 1 + shape.ranks()[level].iter().max().unwrap_or(&0));
                if ranked < parents || k < children {
                    let problem = format!("holds the best {k} of {ranked} rows, expected {children} of {parents}");
                    return Err(c.error("ids", problem));
                }
                c.shape("ids", *ids, DType::U32, &[ranked, k])?;
                c.shape("tokens", *tokens, DType::U32, &[max_requests, MAX_NODES])
            }
            Op::OpenBlock { accepted, state, block, .. } => {
                c.block(block, max_requests)?;
                if max_requests > MAX_OPENED {
                    return Err(c.error("requests", format!("are up to {max_requests}, expected up to {MAX_OPENED}")));
                }
                c.accepted(*accepted, max_requests)?;
                c.report(*state, max_requests).map(drop)
            }
            Op::Trellis { block, ids, scores, hidden, markov, confidence, trellis, order, .. } => {
                c.block(block, max_requests)?;
                let k = c.trellis(block, *ids, [*trellis, *order], max_requests)?;
                c.shape("scores", *scores, DType::F32, &[max_rows, k])?;
                c.rank("hidden", *hidden, 2)?;
                let width = c.dims(*hidden)[1];
                c.shape("hidden", *hidden, DType::F32, &[max_rows, width])?;
                let mut rank = 0;
                if let Some((w1, w2)) = *markov {
                    c.weight("w1", w1)?;
                    rank = c.dims(w1)[1];
                    c.shape("w2", w2, pass.buffer(w1).dtype, c.dims(w1))?;
                }
                match confidence {
                    None => Ok(()),
                    Some(buf) => {
                        c.rank("confidence", *buf, 1)?;
                        let numbers = (width + rank + 1 + 2 * block.depth()).max(c.dims(*buf)[0]);
                        c.shape("confidence", *buf, DType::F32, &[numbers])
                    }
                }
            }
            Op::GrowTrellis { block, ids, trellis, order, state, costs, .. } => {
                c.block(block, max_requests)?;
                c.trellis(block, *ids, [*trellis, *order], max_requests)?;
                let nodes = c.report(*state, max_requests)?;
                // The nodes of several requests get rows from the host.
                let made = if max_requests == 1 { nodes } else { 0 };
                if !(2..=MAX_DEVICE_NODES).contains(&nodes) || made > max_rows {
                    let problem = format!("for trees of {nodes} nodes, expected 2 to {MAX_DEVICE_NODES}");
                    return Err(c.error("state", format!("{problem}, and {max_rows} rows for one")));
                }
                if costs.len() != nodes || !costs.iter().all(|cost| cost.is_finite() && *cost > 0.0) {
                    return Err(c.error("costs", format!("are {costs:?}, expected {nodes} positive numbers")));
                }
                Ok(())
            }
        }
    }
}

/// One op being checked: the helpers all report op, field, expected and got.
struct Check<'a> {
    op: &'a Op,
    pass: &'a Pass,
}

impl Check<'_> {
    fn error(&self, field: &'static str, problem: String) -> PassError {
        PassError { op: self.op.name(), field, problem }
    }

    fn dims(&self, buf: Buf) -> &[usize] {
        &self.pass.buffer(buf).shape
    }

    fn rank(&self, field: &'static str, buf: Buf, rank: usize) -> Result<(), PassError> {
        let dims = self.dims(buf);
        if dims.len() == rank {
            Ok(())
        } else {
            Err(self.error(field, format!("has shape {dims:?}, not {rank} dimensions")))
        }
    }

    fn dtype(&self, field: &'static str, buf: Buf, dtype: DType) -> Result<(), PassError> {
        let got = self.pass.buffer(buf).dtype;
        if got == dtype { Ok(()) } else { Err(self.error(field, format!("is {got:?}, expected {dtype:?}"))) }
    }

    fn shape(&self, field: &'static str, buf: Buf, dtype: DType, dims: &[usize]) -> Result<(), PassError> {
        self.dtype(field, buf, dtype)?;
        if self.dims(buf) == dims {
            Ok(())
        } else {
            Err(self.error(field, format!("has shape {:?}, expected {dims:?}", self.dims(buf))))
        }
    }

    fn weight(&self, field: &'static str, buf: Buf) -> Result<(), PassError> {
        self.rank(field, buf, 2)?;
        let desc = self.pass.buffer(buf);
        if desc.role != Role::Weight || desc.dtype == DType::U32 {
            return Err(self.error(field, format!("is {:?} of {:?}, expected a weight", desc.role, desc.dtype)));
        }
        if !desc.shape[1].is_multiple_of(8) {
            return Err(self.error(field, format!("has {} columns, kernels need a multiple of 8", desc.shape[1])));
        }
        Ok(())
    }

    fn weight_shape(&self, field: &'static str, buf: Buf, dims: &[usize]) -> Result<(), PassError> {
        self.weight(field, buf)?;
        self.shape(field, buf, self.pass.buffer(buf).dtype, dims)
    }

    /// A normalised input: `x [R, H]`, `norm [H]`. Returns H.
    fn normed(&self, field: &'static str, x: Buf, norm: Buf, max_rows: usize) -> Result<usize, PassError> {
        self.rank(field, x, 2)?;
        let hidden = self.dims(x)[1];
        self.shape(field, x, DType::F32, &[max_rows, hidden])?;
        self.shape("norm", norm, DType::F32, &[hidden])?;
        Ok(hidden)
    }

    fn logits(&self, logits: Buf) -> Result<(), PassError> {
        self.rank("logits", logits, 2)?;
        self.dtype("logits", logits, DType::F32)?;
        let rows = self.dims(logits)[0];
        if rows < self.pass.rows {
            return Err(self.error("logits", format!("holds {rows} rows, the pass has {}", self.pass.rows)));
        }
        Ok(())
    }

    fn cache(&self, k: Buf, v: Buf, layer: usize) -> Result<CacheShape, PassError> {
        let cache = self.one_cache("k_cache", k, layer, MAX_HEAD_DIM)?;
        let desc = self.pass.buffer(k);
        self.shape("v_cache", v, desc.dtype, &desc.shape)?;
        Ok(cache)
    }

    fn one_cache(&self, field: &'static str, buf: Buf, layer: usize, most: usize) -> Result<CacheShape, PassError> {
        self.rank(field, buf, 5)?;
        let desc = self.pass.buffer(buf);
        let cache = self.pass.cache_shape(buf);
        if desc.dtype == DType::U32 || desc.role != Role::Cache {
            return Err(self.error(field, format!("is {:?} of {:?}, expected a cache", desc.role, desc.dtype)));
        }
        if layer >= cache.layers {
            return Err(self.error(field, format!("has {} layers, layer {layer} was asked for", cache.layers)));
        }
        if !cache.page_size.is_power_of_two() {
            return Err(self.error(field, format!("has pages of {}, not a power of two", cache.page_size)));
        }
        if !cache.head_dim.is_multiple_of(8) || cache.head_dim > most {
            return Err(
                self.error(field, format!("has head_dim {}, expected a multiple of 8 up to {most}", cache.head_dim))
            );
        }
        Ok(cache)
    }

    fn heads(&self, heads: usize, kv_heads: usize, cache: &CacheShape) -> Result<(), PassError> {
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || kv_heads != cache.kv_heads {
            return Err(self.error(
                "heads",
                format!("{heads} query heads over {kv_heads} kv heads, the cache has {}", cache.kv_heads),
            ));
        }
        Ok(())
    }

    fn tree(&self, tree: &TreeSpec) -> Result<(), PassError> {
        let n = tree.max_nodes();
        if (1..=MAX_NODES).contains(&n) && n <= ANCESTOR_WORDS * 32 {
            Ok(())
        } else {
            Err(self.error("tree", format!("of {n} nodes, expected 1 to {MAX_NODES}")))
        }
    }

    fn block(&self, block: &BlockShape, max_requests: usize) -> Result<(), PassError> {
        let max_rows = self.dims(self.op.batch().rows)[0];
        if block.first >= block.rows || block.rows > MAX_BLOCK_ROWS || max_requests * block.rows > max_rows {
            let problem =
                format!("of {} rows, the first {} dropped, for {max_requests} requests", block.rows, block.first);
            return Err(self.error("block", format!("{problem}: expected up to {MAX_BLOCK_ROWS}, {max_rows} in all")));
        }
        Ok(())
    }

    /// Candidates of a row, and the trellis of them. Returns how many there are.
    fn trellis(
        &self,
        block: &BlockShape,
        ids: Buf,
        [trellis, order]: [Buf; 2],
        max_requests: usize,
    ) -> Result<usize, PassError> {
        self.rank("ids", ids, 2)?;
        let (rows, k) = (self.dims(ids)[0], self.dims(ids)[1]);
        if k > MAX_CANDIDATES || rows < max_requests * block.rows {
            let problem = format!("holds {k} candidates of {rows} rows, expected up to {MAX_CANDIDATES}");
            return Err(self.error("ids", format!("{problem} of {}", max_requests * block.rows)));
        }
        self.shape("ids", ids, DType::U32, &[rows, k])?;
        // Longer blocks may share the buffers.
        self.rank("trellis", trellis, 3)?;
        let places = (max_requests * block.depth()).max(self.dims(trellis)[0]);
        self.shape("trellis", trellis, DType::F32, &[places, k, k])?;
        self.shape("order", order, DType::U32, &[places, k, k])?;
        Ok(k)
    }

    /// A report for trees of how many nodes.
    fn report(&self, state: Buf, max_requests: usize) -> Result<usize, PassError> {
        self.rank("state", state, 2)?;
        let nodes = layout::report_nodes(self.dims(state)[1]);
        self.shape("state", state, DType::U32, &[max_requests, layout::report_words(nodes)])?;
        Ok(nodes)
    }

    fn accepted(&self, accepted: Buf, max_requests: usize) -> Result<(), PassError> {
        self.shape("accepted", accepted, DType::U32, &[max_requests, layout::accepted_words(MAX_NODES)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::Batch;

    /// A pass that holds one projection of 3 rows, 16 columns to 8.
    fn projection() -> (Pass, Op) {
        let mut pass = Pass::new("test", 3);
        let batch = Batch {
            rows: pass.add("rows", Role::Input, DType::U32, &[4, Row::WORDS]),
            requests: pass.add("requests", Role::Input, DType::U32, &[layout::HEADER_WORDS + 2 * Request::WORDS]),
            pages: pass.add("pages", Role::Input, DType::U32, &[2, 5]),
        };
        let x = pass.add("x", Role::Scratch, DType::F32, &[4, 16]);
        let weight = pass.add("weight", Role::Weight, DType::BF16, &[8, 16]);
        let residual = pass.add("residual", Role::Scratch, DType::F32, &[4, 8]);
        (pass, Op::Project { batch, add: true, x, weight, residual })
    }

    /// What is said when a buffer is described otherwise.
    fn problem(buffer: usize, change: impl FnOnce(&mut crate::BufferDesc)) -> String {
        let (mut pass, op) = projection();
        change(&mut pass.buffers[buffer]);
        op.check(&pass).unwrap_err().to_string()
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (mut pass, op) = projection();
        op.check(&pass).unwrap();
        assert_eq!(problem(5, |b| b.shape[1] = 9), "op project: residual has shape [4, 9], expected [4, 8]");
        assert_eq!(problem(4, |b| b.shape[1] = 24), "op project: weight has shape [8, 24], expected [8, 16]");
        assert_eq!(problem(4, |b| b.role = Role::Scratch), "op project: weight is Scratch of BF16, expected a weight");
        assert_eq!(problem(3, |b| b.dtype = DType::U32), "op project: x is U32, expected F32");
        assert_eq!(problem(1, |b| b.shape[0] -= 1), "op project: requests 27 words hold no whole number of requests");
        assert_eq!(problem(2, |b| b.shape[0] = 3), "op project: pages has shape [3, 5], expected [2, 5]");
        pass.rows = 5;
        assert_eq!(
            op.check(&pass).unwrap_err().to_string(),
            "op project: rows the pass is for 5 rows, the buffer holds 4"
        );
    }
}

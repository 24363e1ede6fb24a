//! The closed list of operations. An op is what one good kernel does.
//!
//! Every buffer an op names is a [`Buf`] of its [`Pass`]; shapes and dtypes come from the pass's buffer table.
//! `R` = max rows, `H` = hidden, `D` = head dim, `V` = vocabulary, `B` = max requests. [`Op::check`] validates all
//! of it once; backends assume it.
//!
//! Numerics that every backend keeps: sums are accumulated in f32; a row's arithmetic does not depend on which other
//! rows share the pass; weights are BF16, F16 or F32, everything else F32, except the cache, which has its own dtype.

use crate::pass::{Buf, DType, Pass, PassError, Role};
use crate::{ANCESTOR_WORDS, MAX_NODES, Request, Row, TreeShape, layout};

/// Which trees a kernel is compiled for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TreeSpec {
    /// Any tree of up to this many nodes; ancestor words are read from the rows.
    Any(usize),
    /// Exactly this tree (or a prefix of its nodes); ancestor words are constants of the kernel.
    Static(TreeShape),
}

impl TreeSpec {
    pub fn max_nodes(&self) -> usize {
        match self {
            TreeSpec::Any(n) => *n,
            TreeSpec::Static(shape) => shape.len(),
        }
    }
}

/// Sizes of a paged cache buffer, `[layers, pages, kv_heads, page_size, head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheShape {
    pub layers: usize,
    pub pages: usize,
    pub kv_heads: usize,
    pub page_size: usize,
    pub head_dim: usize,
}

impl CacheShape {
    pub fn dims(&self) -> Vec<usize> {
        vec![self.layers, self.pages, self.kv_heads, self.page_size, self.head_dim]
    }

    /// Element index of `[layer, page, head, place, 0]`.
    pub fn index(&self, layer: usize, page: usize, head: usize, place: usize) -> usize {
        (((layer * self.pages + page) * self.kv_heads + head) * self.page_size + place) * self.head_dim
    }
}

/// The batch buffers that most ops read (see [`layout`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// U32 `[R, Row::WORDS]`
    pub rows: Buf,
    /// U32 `[HEADER_WORDS + B * Request::WORDS]`
    pub requests: Buf,
    /// U32 `[B, pages_per_request]`
    pub pages: Buf,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// `out[r] = table[token(r)]`; widened to f32.
    Embed {
        batch: Batch,
        /// Weight `[V, H]`
        table: Buf,
        /// F32 `[R, H]`
        out: Buf,
    },
    /// Normalised input times the fused projection, plus bias, per-head norm, rope; queries go to `q`, keys and
    /// values into the cache at the row's slot (rounded to the cache's dtype).
    ///
    /// `y = rms_norm(x, norm, eps) · weightᵀ + bias`, rows of `weight`: all q heads, then k heads, then v heads.
    /// q and k heads: `rms_norm` over the head if `q_norm`/`k_norm`, then rope: for i < D/2,
    /// `(a, b) = (y[i], y[i + D/2])` becomes `(a cos - b sin, b cos + a sin)`.
    Qkv {
        batch: Batch,
        layer: usize,
        heads: usize,
        kv_heads: usize,
        eps: f32,
        /// F32 `[R, H]`
        x: Buf,
        /// F32 `[H]`
        norm: Buf,
        /// Weight `[(heads + 2 * kv_heads) * D, H]`
        weight: Buf,
        /// F32 `[(heads + 2 * kv_heads) * D]`
        bias: Option<Buf>,
        /// F32 `[D]`
        q_norm: Option<Buf>,
        /// F32 `[D]`
        k_norm: Option<Buf>,
        /// F32 `[max_positions, D/2, 2]`: cos, sin
        rope: Buf,
        /// F32 `[R, heads, D]`
        q: Buf,
        /// Cache, [`CacheShape`]
        k_cache: Buf,
        /// Cache, [`CacheShape`]
        v_cache: Buf,
    },
    /// `out[r, h] = softmax(q[r, h] · K * scale) · V` over the prefix's slots `0..L` and the slots of the row's
    /// ancestors, read in position order: key i of a row is slot i while i < L, then slot `L + path[i - L]`.
    TreeAttention {
        batch: Batch,
        layer: usize,
        heads: usize,
        kv_heads: usize,
        /// Usually `1 / sqrt(D)`.
        scale: f32,
        tree: TreeSpec,
        /// F32 `[R, heads, D]`
        q: Buf,
        k_cache: Buf,
        v_cache: Buf,
        /// F32 `[R, heads, D]`
        out: Buf,
    },
    /// `residual[r] += x[r] · weightᵀ`
    Project {
        batch: Batch,
        /// F32 `[R, ..]` with K elements a row
        x: Buf,
        /// Weight `[H, K]`
        weight: Buf,
        /// F32 `[R, H]`
        residual: Buf,
    },
    /// `out[r, i] = silu(g[i]) * u[i]` with `g, u` = halves of `rms_norm(x, norm, eps) · weightᵀ`.
    GateUp {
        batch: Batch,
        eps: f32,
        /// F32 `[R, H]`
        x: Buf,
        /// F32 `[H]`
        norm: Buf,
        /// Weight `[2 * F, H]`: gate rows, then up rows
        weight: Buf,
        /// F32 `[R, F]`
        out: Buf,
    },
    /// `logits[r] = rms_norm(x[r], norm, eps) · weightᵀ`
    Head {
        batch: Batch,
        eps: f32,
        /// F32 `[R, H]`
        x: Buf,
        /// F32 `[H]`
        norm: Buf,
        /// Weight `[V, H]`
        weight: Buf,
        /// F32 `[R, V]`
        logits: Buf,
    },
    /// The target's own token at every row, by the request's sampling parameters and position-keyed noise.
    ///
    /// Order: repetition penalty (tokens in `seen` and on the row's path), temperature, top-k, top-p, min-p; then the
    /// argmax of `logit * (1 / temperature) + gumbel` over the kept tokens, ties to the lowest id. All three filters keep
    /// a token by its value alone, so ties at a threshold are all kept: top-k keeps x if fewer than k tokens are larger;
    /// top-p keeps x if the larger tokens' mass (renormalised over top-k's set) is below p; min-p keeps x if
    /// `p(x) >= min_p * p(max)`. The most likely token is always kept, also by top-p 0. Temperature 0: argmax of the
    /// penalised logits. A NaN among the row's logits: `NO_TOKEN`.
    ///
    /// Noise: Philox4x32-10 with key `seed` and counter `[token / 4, position, sample, 0]`, word `token % 4`;
    /// `u = ((word >> 9) + 0.5) * 2^-23`, `gumbel = -ln(-ln u)`.
    Draw {
        batch: Batch,
        /// U32 `[B, ceil(V / 32)]`
        seen: Buf,
        /// F32 `[R, V]`
        logits: Buf,
        /// U32 `[R]`
        draws: Buf,
    },
    /// The k largest logits of each row, descending, ties to the lowest id.
    TopK {
        batch: Batch,
        /// F32 `[R, V]`
        logits: Buf,
        /// U32 `[R, k]`
        ids: Buf,
        /// F32 `[R, k]`
        values: Buf,
    },
    /// The deepest path whose tokens equal the draws at their parents (ties to the lowest node id), and the draws
    /// along it. Node n is accepted iff every node of its path but the root has `token == draw(parent)`.
    /// All nodes of a request's tree are rows of this pass.
    Accept {
        batch: Batch,
        tree: TreeSpec,
        /// U32 `[R]`
        draws: Buf,
        /// U32 `[B, accepted_words(max_nodes)]`
        accepted: Buf,
    },
    /// Moves the accepted rows next to the prefix, in every layer: slot `L + path[i]` to slot `L + i`.
    /// Path ids ascend and `path[i] >= i`, so ascending order never overwrites an unread source.
    Commit {
        batch: Batch,
        /// U32 `[B, accepted_words(max_nodes)]`
        accepted: Buf,
        k_cache: Buf,
        v_cache: Buf,
    },
}

impl Op {
    /// The op's name, as printed and as the kernel's file stem.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::Qkv { .. } => "qkv",
            Op::TreeAttention { .. } => "tree_attention",
            Op::Project { .. } => "project",
            Op::GateUp { .. } => "gate_up",
            Op::Head { .. } => "head",
            Op::Draw { .. } => "draw",
            Op::TopK { .. } => "top_k",
            Op::Accept { .. } => "accept",
            Op::Commit { .. } => "commit",
        }
    }

    pub fn batch(&self) -> &Batch {
        match self {
            Op::Embed { batch, .. }
            | Op::Qkv { batch, .. }
            | Op::TreeAttention { batch, .. }
            | Op::Project { batch, .. }
            | Op::GateUp { batch, .. }
            | Op::Head { batch, .. }
            | Op::Draw { batch, .. }
            | Op::TopK { batch, .. }
            | Op::Accept { batch, .. }
            | Op::Commit { batch, .. } => batch,
        }
    }

    /// The buffers the op names, with the name of the field, in field order (batch first).
    pub fn operands(&self) -> Vec<(&'static str, Buf)> {
        let batch = self.batch();
        let mut list = vec![("rows", batch.rows), ("requests", batch.requests), ("pages", batch.pages)];
        match *self {
            Op::Embed { table, out, .. } => list.extend([("table", table), ("out", out)]),
            Op::Qkv { x, norm, weight, bias, q_norm, k_norm, rope, q, k_cache, v_cache, .. } => {
                list.extend([("x", x), ("norm", norm), ("weight", weight)]);
                list.extend(bias.map(|b| ("bias", b)));
                list.extend(q_norm.map(|b| ("q_norm", b)));
                list.extend(k_norm.map(|b| ("k_norm", b)));
                list.extend([("rope", rope), ("q", q), ("k_cache", k_cache), ("v_cache", v_cache)]);
            }
            Op::TreeAttention { q, k_cache, v_cache, out, .. } => {
                list.extend([("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("out", out)]);
            }
            Op::Project { x, weight, residual, .. } => {
                list.extend([("x", x), ("weight", weight), ("residual", residual)]);
            }
            Op::GateUp { x, norm, weight, out, .. } => {
                list.extend([("x", x), ("norm", norm), ("weight", weight), ("out", out)]);
            }
            Op::Head { x, norm, weight, logits, .. } => {
                list.extend([("x", x), ("norm", norm), ("weight", weight), ("logits", logits)]);
            }
            Op::Draw { seen, logits, draws, .. } => {
                list.extend([("seen", seen), ("logits", logits), ("draws", draws)]);
            }
            Op::TopK { logits, ids, values, .. } => {
                list.extend([("logits", logits), ("ids", ids), ("values", values)]);
            }
            Op::Accept { draws, accepted, .. } => list.extend([("draws", draws), ("accepted", accepted)]),
            Op::Commit { accepted, k_cache, v_cache, .. } => {
                list.extend([("accepted", accepted), ("k_cache", k_cache), ("v_cache", v_cache)]);
            }
        }
        list
    }

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
                c.shape("residual", *residual, DType::F32, &[max_rows, hidden])
            }
            Op::GateUp { x, norm, weight, out, .. } => {
                let hidden = c.normed("x", *x, *norm, max_rows)?;
                c.rank("out", *out, 2)?;
                let ffn = c.dims(*out)[1];
                c.weight_shape("weight", *weight, &[2 * ffn, hidden])?;
                c.shape("out", *out, DType::F32, &[max_rows, ffn])
            }
            Op::Head { x, norm, weight, logits, .. } => {
                let hidden = c.normed("x", *x, *norm, max_rows)?;
                c.rank("logits", *logits, 2)?;
                let vocab = c.dims(*logits)[1];
                c.weight_shape("weight", *weight, &[vocab, hidden])?;
                c.logits(*logits)
            }
            Op::Draw { seen, logits, draws, .. } => {
                c.logits(*logits)?;
                c.shape("seen", *seen, DType::U32, &[max_requests, c.dims(*logits)[1].div_ceil(32)])?;
                c.shape("draws", *draws, DType::U32, &[max_rows])
            }
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
                c.cache(*k_cache, *v_cache, 0)?;
                c.accepted(*accepted, max_requests)
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
        self.rank("k_cache", k, 5)?;
        let desc = self.pass.buffer(k);
        self.shape("v_cache", v, desc.dtype, &desc.shape)?;
        let cache = self.pass.cache_shape(k);
        if desc.dtype == DType::U32 || desc.role != Role::Cache {
            return Err(self.error("k_cache", format!("is {:?} of {:?}, expected a cache", desc.role, desc.dtype)));
        }
        if layer >= cache.layers {
            return Err(self.error("k_cache", format!("has {} layers, layer {layer} was asked for", cache.layers)));
        }
        if !cache.page_size.is_power_of_two() {
            return Err(self.error("k_cache", format!("has pages of {}, not a power of two", cache.page_size)));
        }
        if !cache.head_dim.is_multiple_of(8) || cache.head_dim > 256 {
            return Err(
                self.error("k_cache", format!("has head_dim {}, expected a multiple of 8 up to 256", cache.head_dim))
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

    fn accepted(&self, accepted: Buf, max_requests: usize) -> Result<(), PassError> {
        self.shape("accepted", accepted, DType::U32, &[max_requests, layout::accepted_words(MAX_NODES)])
    }
}

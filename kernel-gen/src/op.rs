//! The closed list of operations. An op is what one good kernel does.
//!
//! Every buffer an op names is a [`Buf`] of its [`Pass`](crate::Pass); shapes and dtypes come from the pass's buffer table.
//! `R` = max rows, `H` = hidden, `D` = head dim, `V` = vocabulary, `B` = max requests. [`Op::check`] validates all
//! of it once; backends assume it.
//!
//! Numerics that every backend keeps: sums are accumulated in f32; a row's arithmetic does not depend on which other
//! rows share the pass; weights are BF16, F16 or F32, everything else F32, except the cache, which has its own dtype.

use crate::TreeShape;
use crate::pass::Buf;

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

/// The batch buffers that most ops read (see [`layout`](crate::layout)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// U32 `[R, Row::WORDS]`
    pub rows: Buf,
    /// U32 `[HEADER_WORDS + B * Request::WORDS]`
    pub requests: Buf,
    /// U32 `[B, pages_per_request]`
    pub pages: Buf,
}

/// The rows of a block that a parallel drafter fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockShape {
    pub rows: usize,
    /// The row that predicts depth 1: 0, or 1 where the first is dropped.
    pub first: usize,
    /// What the rows hold.
    pub fill: Fill,
}

/// What the rows of a block hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// The last token, then this one, each row seeing all (DSpark).
    Mask(u32),
    /// The last token; their node is the last accepted one's row in the round before, whose hidden state they read (Medusa).
    State,
}

impl BlockShape {
    /// Tokens that a block predicts.
    pub fn depth(&self) -> usize {
        self.rows - self.first
    }

    /// As many of its rows as predict so many tokens, if it has more.
    pub fn shortened(&self, depth: usize) -> BlockShape {
        BlockShape { rows: self.rows.min(self.first + depth.max(1)), ..*self }
    }
}

/// Most requests whose blocks are opened together: one thread looks at each.
pub const MAX_OPENED: usize = 1024;

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
        /// 0: keys and values alone; `q` is not written.
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
    /// `residual[r] += x[r] · weightᵀ`, or without `add` just `=`.
    Project {
        batch: Batch,
        add: bool,
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
    /// `out[r] = s + silu(weight[h] · s + bias[h])` with `s = states[node(r)]` and `h = position(r) - prefix`: the residual
    /// block of Medusa head h. A row's node names the row whose state is read.
    ResBlock {
        batch: Batch,
        /// F32 `[R, H]`
        states: Buf,
        /// Weight `[heads * H, H]`
        weight: Buf,
        /// F32 `[heads * H]`
        bias: Buf,
        /// F32 `[R, H]`
        out: Buf,
    },
    /// `out[r] = rms_norm(x[r], norm, eps)`
    Norm {
        batch: Batch,
        eps: f32,
        /// F32 `[R, H]`
        x: Buf,
        /// F32 `[H]`
        norm: Buf,
        /// F32 `[R, H]`
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
    /// `logits[r][t]` becomes minus infinity unless bit t of `allowed[r]` is set: token t cannot be drawn at row r. What a
    /// grammar says of the text behind each row. A row that allows no token draws token 0.
    Mask {
        batch: Batch,
        /// U32 `[R, ceil(V / 32)]`, as many rows as the logits have
        allowed: Buf,
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
    /// Logits become what a draw ranks: `logit * (1 / temperature) + gumbel`, the noise being that of [`Op::Draw`] at the
    /// row's position. Rows of temperature 0 are left as they are. A drafter that ranks these guesses the target's very
    /// draw, noise and all.
    Perturb {
        batch: Batch,
        /// F32 `[R, V]`
        logits: Buf,
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
    /// The deepest path whose tokens equal the draws at their parents (ties to the lowest node id), and what follows each of
    /// its nodes: the next one's token, behind the last the draw. Node n is accepted iff every node of its path but the root
    /// has `token == draw(parent)` or is given: one of the first [`Request::given`](crate::Request::given) nodes, a chain from
    /// which the others descend. All nodes of a request's tree are rows of this pass; a request without rows accepts nothing.
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
    /// Observes what the last round accepted (it is appended to the history, the prefix grows by it, hit rates learn of
    /// it), and drafts the next: writes `rows` and `requests` with trees of what followed the end of the history where it
    /// occurred before. A request whose history has reached its limit gets no rows. What is drafted changes the speed,
    /// never the tokens: see `shaders/cuda/draft_ngram.cu`.
    DraftNgram {
        batch: Batch,
        /// U32 `[B, accepted_words(max_nodes)]` of the last round
        accepted: Buf,
        /// U32 `[B, T]`, T a multiple of 4
        history: Buf,
        /// U32 `[B, ngram_state_words(nodes)]`: trees of up to so many nodes, at most 64
        state: Buf,
        /// Of a further row, relative to a pass of one.
        row_cost: f32,
    },
    /// Grows the trees of all requests, which have one shape, by the shape's last level: each of its nodes takes the best
    /// token after its parent that its elder siblings have not taken. The pass before ran the level above, `W` nodes of
    /// each request, and ranked their continuations: node n of it was row `request * W + n - first`. Writes the tokens,
    /// and into `rows` and `requests` what a pass over the new level needs.
    Grow {
        batch: Batch,
        /// At least two levels, nodes in order of their depth.
        shape: TreeShape,
        /// U32 `[at least B * W, k]`, k at least the most children of a node
        ids: Buf,
        /// U32 `[B, MAX_NODES]`, by node; those of the levels above are left as they are
        tokens: Buf,
    },
    /// Begins a block for a parallel drafter: the prefix of every request grows by what the last round accepted, the
    /// report in `state` is told of it, and `rows` and `requests` become those of blocks, the last token and masks that all
    /// see each other. A request that has reached its limit gets no rows; those of the others follow each other, request by
    /// request. Rows that read a state ([`Fill::State`]) need to know where the last round's were: `first_row` in `requests`.
    OpenBlock {
        batch: Batch,
        /// U32 `[B, accepted_words(max_nodes)]` of the last round
        accepted: Buf,
        /// U32 `[B, report_words(nodes)]`
        state: Buf,
        block: BlockShape,
    },
    /// How likely each candidate of a depth is accepted behind each candidate of the depth before, in a block whose rows
    /// ranked `K` candidates: `score(i, j) = scores[depth, j] + (W2 · W1[token i])[token j] / temperature`, softmax over
    /// j; with a confidence head the best j has its confidence instead, and the others share the rest as they would, times a
    /// factor of the depth. The children of each parent are sorted, the likeliest first. Behind the root there is one parent.
    Trellis {
        batch: Batch,
        block: BlockShape,
        /// U32 `[R, K]`
        ids: Buf,
        /// F32 `[R, K]`
        scores: Buf,
        /// F32 `[R, H]`: what a confidence head reads
        hidden: Buf,
        /// Weights `[V, rank]`: W1 and W2
        markov: Option<(Buf, Buf)>,
        /// F32 `[H + rank + 1 + 2 * depth]` or more: weights, bias, for each depth one over its temperature and its factor
        confidence: Option<Buf>,
        /// F32 `[B * depth, K, K]` or more: probabilities of each parent's children, descending
        trellis: Buf,
        /// U32, the same shape: the candidates j that they are of
        order: Buf,
    },
    /// Grows a tree through the trellis of every request that has a block: of all paths the likeliest, as many as a tree has
    /// nodes. Writes it into `state`.
    ///
    /// With one request of room, as many of its nodes as pay also go into `rows` and `requests`, and the tree may end once no
    /// further nodes could pay. With room for several it leaves `rows` and `requests` alone, for the host chooses among the
    /// nodes of all trees; costs change nothing, and a tree ends before a node whose survival is below `least`.
    GrowTrellis {
        batch: Batch,
        block: BlockShape,
        /// U32 `[R, K]`
        ids: Buf,
        /// F32 and U32 `[B * depth, K, K]`, as [`Op::Trellis`] leaves them
        trellis: Buf,
        order: Buf,
        /// U32 `[B, report_words(nodes)]`: trees of up to so many nodes, at most 64
        state: Buf,
        /// Of a pass of 1, 2, .. rows, as many as a tree may have nodes; counts with one request of room.
        costs: Vec<f32>,
        least: f32,
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
            Op::ResBlock { .. } => "res_block",
            Op::Norm { .. } => "rms_norm",
            Op::Head { .. } => "head",
            Op::Mask { .. } => "mask",
            Op::Draw { .. } => "draw",
            Op::Perturb { .. } => "perturb",
            Op::TopK { .. } => "top_k",
            Op::Accept { .. } => "accept",
            Op::Commit { .. } => "commit",
            Op::DraftNgram { .. } => "draft_ngram",
            Op::Grow { .. } => "grow",
            Op::OpenBlock { .. } => "open_block",
            Op::Trellis { .. } => "trellis",
            Op::GrowTrellis { .. } => "grow_trellis",
        }
    }

    pub fn batch(&self) -> &Batch {
        match self {
            Op::Embed { batch, .. }
            | Op::Qkv { batch, .. }
            | Op::TreeAttention { batch, .. }
            | Op::Project { batch, .. }
            | Op::GateUp { batch, .. }
            | Op::ResBlock { batch, .. }
            | Op::Norm { batch, .. }
            | Op::Head { batch, .. }
            | Op::Mask { batch, .. }
            | Op::Draw { batch, .. }
            | Op::Perturb { batch, .. }
            | Op::TopK { batch, .. }
            | Op::Accept { batch, .. }
            | Op::Commit { batch, .. }
            | Op::DraftNgram { batch, .. }
            | Op::Grow { batch, .. }
            | Op::OpenBlock { batch, .. }
            | Op::Trellis { batch, .. }
            | Op::GrowTrellis { batch, .. } => batch,
        }
    }

    /// Whether it makes up the batch of the next pass, which some backends leave to the host.
    pub fn drafts(&self) -> bool {
        matches!(
            self,
            Op::DraftNgram { .. }
                | Op::Grow { .. }
                | Op::OpenBlock { .. }
                | Op::Trellis { .. }
                | Op::GrowTrellis { .. }
        )
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
            Op::ResBlock { states, weight, bias, out, .. } => {
                list.extend([("states", states), ("weight", weight), ("bias", bias), ("out", out)]);
            }
            Op::Norm { x, norm, out, .. } => list.extend([("x", x), ("norm", norm), ("out", out)]),
            Op::Head { x, norm, weight, logits, .. } => {
                list.extend([("x", x), ("norm", norm), ("weight", weight), ("logits", logits)]);
            }
            Op::Mask { allowed, logits, .. } => list.extend([("allowed", allowed), ("logits", logits)]),
            Op::Draw { seen, logits, draws, .. } => {
                list.extend([("seen", seen), ("logits", logits), ("draws", draws)]);
            }
            Op::Perturb { logits, .. } => list.push(("logits", logits)),
            Op::TopK { logits, ids, values, .. } => {
                list.extend([("logits", logits), ("ids", ids), ("values", values)]);
            }
            Op::Accept { draws, accepted, .. } => list.extend([("draws", draws), ("accepted", accepted)]),
            Op::Commit { accepted, k_cache, v_cache, .. } => {
                list.extend([("accepted", accepted), ("k_cache", k_cache), ("v_cache", v_cache)]);
            }
            Op::DraftNgram { accepted, history, state, .. } => {
                list.extend([("accepted", accepted), ("history", history), ("state", state)]);
            }
            Op::Grow { ids, tokens, .. } => list.extend([("ids", ids), ("tokens", tokens)]),
            Op::OpenBlock { accepted, state, .. } => list.extend([("accepted", accepted), ("state", state)]),
            Op::Trellis { ids, scores, hidden, markov, confidence, trellis, order, .. } => {
                list.extend([("ids", ids), ("scores", scores), ("hidden", hidden)]);
                list.extend(markov.into_iter().flat_map(|(w1, w2)| [("w1", w1), ("w2", w2)]));
                list.extend(confidence.map(|buf| ("confidence", buf)));
                list.extend([("trellis", trellis), ("order", order)]);
            }
            Op::GrowTrellis { ids, trellis, order, state, .. } => {
                list.extend([("ids", ids), ("trellis", trellis), ("order", order), ("state", state)]);
            }
        }
        list
    }
}

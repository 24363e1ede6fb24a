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

mod operands;
mod parameters;

pub use parameters::*;

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
    /// What latent attention (MLA, DeepSeek-V2) keeps of a row, and what its queries start from. Of
    /// `y = rms_norm(x, norm, eps) · weightᵀ`, the first elements are the compressed query, the next `C` a latent, the last `D`
    /// a key. `rms_norm(latent, latent_norm, latent_eps)` and behind it the key, rotated as in [`Op::Qkv`], go into the cache at the
    /// row's slot.
    Latent {
        batch: Batch,
        layer: usize,
        eps: f32,
        latent_eps: f32,
        /// F32 `[R, H]`
        x: Buf,
        /// F32 `[H]`
        norm: Buf,
        /// Weight `[Q + C + D, H]`
        weight: Buf,
        /// F32 `[C]`
        latent_norm: Buf,
        /// F32 `[max_positions, D/2, 2]`: cos, sin
        rope: Buf,
        /// F32 `[R, Q]`, not normalised; without, Q is 0.
        compressed: Option<Buf>,
        /// Cache, [`CacheShape`] with one head of C + D
        cache: Buf,
    },
    /// Queries of latent attention: of each head of `rms_norm(x, norm, eps) · weightᵀ`, the first `N` elements go to `nope`, and
    /// the last `D`, rotated, to the end of the head's `q`.
    LatentQueries {
        batch: Batch,
        heads: usize,
        eps: f32,
        /// F32 `[R, K]`: the residual stream, or a compressed query
        x: Buf,
        /// F32 `[K]`
        norm: Buf,
        /// Weight `[heads * (N + D), K]`
        weight: Buf,
        /// F32 `[max_positions, D/2, 2]`
        rope: Buf,
        /// F32 `[R, heads, N]`
        nope: Buf,
        /// F32 `[R, heads, C + D]`
        q: Buf,
    },
    /// `out[r, h, ..N] = weight[h] · x[r, h]`: each head has a matrix of its own. What is behind the first N elements of a head of
    /// `out` is left as it is.
    PerHead {
        batch: Batch,
        heads: usize,
        /// F32 `[R, heads, K]`
        x: Buf,
        /// Weight `[heads * N, K]`
        weight: Buf,
        /// F32 `[R, heads, N]`, or with longer heads
        out: Buf,
    },
    /// Attention in the space of latents: `out[r, h] = softmax(q[r, h] · K * scale) · K[..C]` over the keys of
    /// [`Op::TreeAttention`], in the same order. All heads read the same keys, which are their own values.
    LatentAttention {
        batch: Batch,
        layer: usize,
        heads: usize,
        scale: f32,
        tree: TreeSpec,
        /// F32 `[R, heads, C + D]`
        q: Buf,
        cache: Buf,
        /// F32 `[R, heads, C]`
        out: Buf,
    },
    /// The experts of every row, by falling score, and what each counts for. With logits `rms_norm(x, norm, eps) · weightᵀ`, a
    /// score is made of each; experts are chosen by score plus bias, ties to the lowest, from the groups worth most; a weight is
    /// made of the score alone. See [`Routing`].
    Route {
        batch: Batch,
        eps: f32,
        routing: Routing,
        /// F32 `[R, H]`
        x: Buf,
        /// F32 `[H]`
        norm: Buf,
        /// Weight `[E, H]`
        weight: Buf,
        /// F32 `[E]`
        bias: Option<Buf>,
        /// U32 `[R, k]`
        experts: Buf,
        /// F32 `[R, k]`
        weights: Buf,
    },
    /// Which rows each expert has, so that its weights are read once for all of them: `groups` begins with where each expert's
    /// entries begin, E + 1 numbers; then come the entries, `row * k + j` where `experts[row, j]` is the expert, ascending.
    GroupRows {
        batch: Batch,
        /// U32 `[R, k]`
        experts: Buf,
        /// U32 `[E + 1 + R * k]`
        groups: Buf,
    },
    /// [`Op::GateUp`] of each chosen expert: `out[r, j]`, with the halves of the weight of expert `experts[r, j]`.
    ExpertGateUp {
        batch: Batch,
        eps: f32,
        /// F32 `[R, H]`
        x: Buf,
        /// F32 `[H]`
        norm: Buf,
        /// Weight `[E * 2 * F, H]`: of each expert, gate rows, then up rows
        weight: Buf,
        /// U32 `[E + 1 + R * k]`
        groups: Buf,
        /// F32 `[R, k, F]`
        out: Buf,
    },
    /// `out[r, j] = x[r, j] · weight[experts[r, j]]ᵀ`
    ExpertDown {
        batch: Batch,
        /// F32 `[R, k, F]`
        x: Buf,
        /// Weight `[E * H, F]`
        weight: Buf,
        /// U32 `[E + 1 + R * k]`
        groups: Buf,
        /// F32 `[R, k, H]`
        out: Buf,
    },
    /// `residual[r] += Σ weights[r, j] * x[r, j]`, by ascending j.
    Combine {
        batch: Batch,
        /// F32 `[R, k, H]`
        x: Buf,
        /// F32 `[R, k]`
        weights: Buf,
        /// F32 `[R, H]`
        residual: Buf,
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
    /// `out[r] = states[sources[r]]`
    Gather {
        batch: Batch,
        /// F32 `[R, H]`
        states: Buf,
        /// U32 `[R]`, rows of `states`
        sources: Buf,
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
        /// None where the keys are their own values.
        v_cache: Option<Buf>,
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

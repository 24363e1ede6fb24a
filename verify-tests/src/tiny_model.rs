//! A model small enough to compute by hand: every size is free, every weight random. It builds the passes that the models
//! of the Llama family and DeepSeek's build, so all ops and all their options are reached.

use half::{bf16, f16};
use treespark_kernel_gen::layout::{HEADER_WORDS, accepted_words, report_words};
use treespark_kernel_gen::op::Batch as BatchBuffers;
use treespark_kernel_gen::{
    BlockShape, Buf, BufferDesc, DType, MAX_NODES, Op, Pass, Request, Role, Row, TreeShape, TreeSpec,
};
use treespark_models::{Bytes, Tensor};

use crate::rng::Rng;

mod deepseek;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sizes {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub kv_heads: usize,
    /// Query heads per key head.
    pub group: usize,
    pub head_dim: usize,
    pub ffn: usize,
    /// Qwen2 has biases, Qwen3 norms on queries and keys.
    pub bias: bool,
    pub qk_norm: bool,
    /// Instead of grouped queries: then there is one key head, of a latent and a rotated key.
    pub latent: Option<LatentSizes>,
    /// Instead of an MLP, in all layers but the first.
    pub experts: Option<ExpertSizes>,
    pub weights: DType,
    pub cache: DType,
    pub page_size: usize,
}

/// Requests and rows that every batch buffer has room for.
pub const MAX_REQUESTS: usize = 3;
pub const MAX_ROWS: usize = 320;
/// Slots of one request, and positions of the rope table: a prefix of about 150 and a tree of 256.
pub const MAX_SLOTS: usize = 416;
/// Rows that a pass is compiled for which has this many to run, as the runtime chooses them.
pub fn compiled_rows(rows: usize) -> usize {
    [1, 4, 16, 64, 256].into_iter().find(|&n| n >= rows).unwrap_or(MAX_ROWS)
}

const EPS: f32 = 1e-5;

/// Tokens a row that `TopK` ranks.
pub const TOP_K: usize = 5;

impl Sizes {
    /// A dense model without options, for whoever names the others.
    pub const PLAIN: Sizes = Sizes {
        vocab: 64,
        hidden: 64,
        layers: 2,
        kv_heads: 1,
        group: 1,
        head_dim: 64,
        ffn: 64,
        bias: false,
        qk_norm: false,
        latent: None,
        experts: None,
        weights: DType::BF16,
        cache: DType::BF16,
        page_size: 16,
    };

    pub fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// Elements that attention leaves of each head.
    pub fn value_dim(&self) -> usize {
        self.latent.map_or(self.head_dim, |latent| latent.value_dim)
    }

    /// What is kept of a token is in so many buffers.
    pub fn caches(&self) -> &'static [&'static str] {
        if self.latent.is_some() { &["cache"] } else { &["k_cache", "v_cache"] }
    }

    pub fn pages_per_request(&self) -> usize {
        MAX_SLOTS.div_ceil(self.page_size)
    }

    /// One page more than the requests can own: what unused entries of the page table point at.
    pub fn pages(&self) -> usize {
        MAX_REQUESTS * self.pages_per_request() + 1
    }
}

/// Latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LatentSizes {
    /// Of a compressed query; 0: there is none.
    pub compressed: usize,
    pub nope_dim: usize,
    pub rotated: usize,
    pub value_dim: usize,
}

/// A mixture of experts; each has the inner size of the model's MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExpertSizes {
    pub count: usize,
    pub chosen: usize,
    pub groups: usize,
    pub top_groups: usize,
    /// Sigmoids, a bias, weights of sum one: DeepSeek-V3's router. Else V2's.
    pub is_v3: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct TinyModel {
    pub sizes: Sizes,
    pub seed: u64,
}

/// What a pass does with the hidden states of its last layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// Logits, draws and top-k of every row.
    Draw,
    /// Also acceptance and commit: a whole round.
    Commit,
}

impl TinyModel {
    /// The forward pass, compiled for `rows` rows.
    pub fn pass(&self, rows: usize, tree: &TreeSpec, tail: Tail) -> Pass {
        let mut pass = Pass::new(format!("{tail:?} {rows}"), rows);
        let batch = self.batch_buffers(&mut pass);
        let s = self.sizes;
        let eps = EPS;
        let f32s = |pass: &mut Pass, name: &str, role, shape: &[usize]| pass.add(name, role, DType::F32, shape);
        let x = f32s(&mut pass, "x", Role::Scratch, &[MAX_ROWS, s.hidden]);
        let ffn = f32s(&mut pass, "ffn", Role::Scratch, &[MAX_ROWS, s.ffn]);
        let table = pass.add("embed", Role::Weight, s.weights, &[s.vocab, s.hidden]);
        pass.ops.push(Op::Embed { batch, table, out: x });
        for layer in 0..s.layers {
            let name = |part: &str| format!("layers.{layer}.{part}");
            let attention = match &s.latent {
                Some(latent) => self.push_latent_attention(&mut pass, latent, layer, tree, x),
                None => self.push_attention(&mut pass, layer, tree, x),
            };
            let o = pass.add(name("o"), Role::Weight, s.weights, &[s.hidden, s.heads() * s.value_dim()]);
            pass.ops.push(Op::Project { batch, add: true, x: attention, weight: o, residual: x });
            if let Some(experts) = s.experts.as_ref().filter(|_| layer > 0) {
                self.push_experts(&mut pass, experts, layer, x);
                continue;
            }
            let norm = f32s(&mut pass, &name("ffn_norm"), Role::Weight, &[s.hidden]);
            let gate_up = pass.add(name("gate_up"), Role::Weight, s.weights, &[2 * s.ffn, s.hidden]);
            pass.ops.push(Op::GateUp { batch, eps, x, norm, weight: gate_up, out: ffn });
            let down = pass.add(name("down"), Role::Weight, s.weights, &[s.hidden, s.ffn]);
            pass.ops.push(Op::Project { batch, add: true, x: ffn, weight: down, residual: x });
        }
        self.push_injection(&mut pass, x);
        let norm = f32s(&mut pass, "norm", Role::Weight, &[s.hidden]);
        let weight = pass.add("head", Role::Weight, s.weights, &[s.vocab, s.hidden]);
        let logits = f32s(&mut pass, "logits", Role::Output, &[MAX_ROWS, s.vocab]);
        pass.ops.push(Op::Head { batch, eps, x, norm, weight, logits });
        self.push_draw(&mut pass);
        if tail == Tail::Commit {
            self.push_accept(&mut pass, tree);
            self.push_commit(&mut pass);
        }
        pass.check().expect("the pass of a tiny model is well formed");
        pass
    }

    /// Grouped queries. Returns what attention leaves.
    fn push_attention(&self, pass: &mut Pass, layer: usize, tree: &TreeSpec, x: Buf) -> Buf {
        let (batch, s, eps) = (self.batch_buffers(pass), self.sizes, EPS);
        let (k_cache, v_cache) = self.caches(pass);
        let rope = self.rope(pass, s.head_dim);
        let name = |part: &str| format!("layers.{layer}.{part}");
        let f32s = |pass: &mut Pass, name: &str, role, shape: &[usize]| pass.add(name, role, DType::F32, shape);
        let q = f32s(pass, "q", Role::Scratch, &[MAX_ROWS, s.heads(), s.head_dim]);
        let attention = f32s(pass, "attention", Role::Scratch, &[MAX_ROWS, s.heads(), s.head_dim]);
        let n = (s.heads() + 2 * s.kv_heads) * s.head_dim;
        let norm = f32s(pass, &name("attn_norm"), Role::Weight, &[s.hidden]);
        let weight = pass.add(name("qkv"), Role::Weight, s.weights, &[n, s.hidden]);
        let bias = s.bias.then(|| f32s(pass, &name("qkv_bias"), Role::Weight, &[n]));
        let q_norm = s.qk_norm.then(|| f32s(pass, &name("q_norm"), Role::Weight, &[s.head_dim]));
        let k_norm = s.qk_norm.then(|| f32s(pass, &name("k_norm"), Role::Weight, &[s.head_dim]));
        #[rustfmt::skip]
        pass.ops.push(Op::Qkv {
            batch, layer, heads: s.heads(), kv_heads: s.kv_heads, eps, x, norm, weight, bias, q_norm, k_norm, rope, q,
            k_cache, v_cache,
        });
        #[rustfmt::skip]
        pass.ops.push(Op::TreeAttention {
            batch, layer, heads: s.heads(), kv_heads: s.kv_heads, scale: 1.0 / (s.head_dim as f32).sqrt(),
            tree: tree.clone(), q, k_cache, v_cache, out: attention,
        });
        attention
    }

    /// The table that rotates so many elements.
    fn rope(&self, pass: &mut Pass, rotated: usize) -> Buf {
        pass.add("rope", Role::Weight, DType::F32, &[MAX_SLOTS, rotated / 2, 2])
    }

    /// What a drafter takes from hidden states: normalised ones, and keys and values in a cache of its own.
    fn push_injection(&self, pass: &mut Pass, x: Buf) {
        // The drafter of a model with latents has keys and values.
        let s = match self.sizes.latent {
            Some(latent) => Sizes { head_dim: 2 * latent.rotated, latent: None, ..self.sizes },
            None => self.sizes,
        };
        let (batch, eps) = (self.batch_buffers(pass), EPS);
        let rope = pass.add("draft.rope", Role::Weight, DType::F32, &[MAX_SLOTS, s.head_dim / 2, 2]);
        let mut f32s = |name: &str, role, shape: &[usize]| pass.add(name, role, DType::F32, shape);
        let norm = f32s("draft.norm", Role::Weight, &[s.hidden]);
        let k_norm = s.qk_norm.then(|| f32s("draft.k_norm", Role::Weight, &[s.head_dim]));
        let hidden = f32s("draft.hidden", Role::Scratch, &[MAX_ROWS, s.hidden]);
        let fused = f32s("draft.fused", Role::Scratch, &[MAX_ROWS, s.hidden]);
        let q = f32s("draft.q", Role::Scratch, &[MAX_ROWS, s.heads(), s.head_dim]);
        let fc = pass.add("draft.fc", Role::Weight, s.weights, &[s.hidden, s.hidden]);
        let weight = pass.add("draft.kv", Role::Weight, s.weights, &[2 * s.kv_heads * s.head_dim, s.hidden]);
        let shape = [1, s.pages(), s.kv_heads, s.page_size, s.head_dim];
        let [k_cache, v_cache] = ["draft.k", "draft.v"].map(|name| pass.add(name, Role::Cache, s.cache, &shape));
        pass.ops.push(Op::Norm { batch, eps, x, norm, out: hidden });
        pass.ops.push(Op::Project { batch, add: false, x: hidden, weight: fc, residual: fused });
        #[rustfmt::skip]
        pass.ops.push(Op::Qkv {
            batch, layer: 0, heads: 0, kv_heads: s.kv_heads, eps, x: fused, norm, weight, bias: None, q_norm: None, k_norm,
            rope, q, k_cache, v_cache,
        });
    }

    /// Residual blocks alone, of as many heads as a tree may be deep, on states that the host wrote.
    pub fn res_block_pass(&self, rows: usize, heads: usize) -> Pass {
        let mut pass = Pass::new("res_block", rows);
        let (batch, s) = (self.batch_buffers(&mut pass), self.sizes);
        let [states, out] =
            ["states", "out"].map(|name| pass.add(name, Role::Output, DType::F32, &[MAX_ROWS, s.hidden]));
        let weight = pass.add("blocks", Role::Weight, s.weights, &[heads * s.hidden, s.hidden]);
        let bias = pass.add("block_bias", Role::Weight, DType::F32, &[heads * s.hidden]);
        pass.ops.push(Op::ResBlock { batch, states, weight, bias, out });
        pass.check().expect("the pass of residual blocks is well formed");
        pass
    }

    /// What a draw ranks, in the place of logits that the host wrote.
    pub fn perturb_pass(&self, rows: usize) -> Pass {
        let mut pass = Pass::new("perturb", rows);
        let batch = self.batch_buffers(&mut pass);
        let logits = pass.add("logits", Role::Output, DType::F32, &[MAX_ROWS, self.sizes.vocab]);
        pass.ops.push(Op::Perturb { batch, logits });
        pass.check().expect("the perturb pass is well formed");
        pass
    }

    /// A mask alone, on logits that the host wrote.
    pub fn mask_pass(&self, rows: usize) -> Pass {
        let mut pass = Pass::new("mask", rows);
        self.push_mask(&mut pass);
        pass.check().expect("the mask pass is well formed");
        pass
    }

    /// The head on states that the host wrote, a mask and a draw: how a verify pass under a grammar ends.
    pub fn masked_draw_pass(&self, rows: usize) -> Pass {
        let mut pass = Pass::new("masked draw", rows);
        let (batch, s) = (self.batch_buffers(&mut pass), self.sizes);
        let [x, logits] = [("x", s.hidden), ("logits", s.vocab)]
            .map(|(name, width)| pass.add(name, Role::Output, DType::F32, &[MAX_ROWS, width]));
        let norm = pass.add("norm", Role::Weight, DType::F32, &[s.hidden]);
        let weight = pass.add("head", Role::Weight, s.weights, &[s.vocab, s.hidden]);
        pass.ops.push(Op::Head { batch, eps: EPS, x, norm, weight, logits });
        self.push_mask(&mut pass);
        self.push_draw(&mut pass);
        pass.check().expect("the masked pass is well formed");
        pass
    }

    /// The head on states that the host wrote, and its best `k` tokens, perturbed or not: backends may do these at once.
    pub fn rank_pass(&self, rows: usize, k: usize, perturb: bool) -> Pass {
        let mut pass = Pass::new("rank", rows);
        let (batch, s) = (self.batch_buffers(&mut pass), self.sizes);
        let [x, logits, values] = [("x", s.hidden), ("logits", s.vocab), ("values", k)]
            .map(|(name, width)| pass.add(name, Role::Output, DType::F32, &[MAX_ROWS, width]));
        let norm = pass.add("norm", Role::Weight, DType::F32, &[s.hidden]);
        let weight = pass.add("head", Role::Weight, s.weights, &[s.vocab, s.hidden]);
        let ids = pass.add("ids", Role::Output, DType::U32, &[MAX_ROWS, k]);
        pass.ops.push(Op::Head { batch, eps: EPS, x, norm, weight, logits });
        if perturb {
            pass.ops.push(Op::Perturb { batch, logits });
        }
        pass.ops.push(Op::TopK { batch, logits, ids, values });
        pass.check().expect("the ranking pass is well formed");
        pass
    }

    /// Draw and top-k alone, on logits that the host wrote.
    pub fn draw_pass(&self, rows: usize) -> Pass {
        let mut pass = Pass::new("draw", rows);
        self.push_draw(&mut pass);
        pass.check().expect("the draw pass is well formed");
        pass
    }

    /// Acceptance alone, on draws that the host wrote.
    pub fn accept_pass(&self, rows: usize, tree: &TreeSpec) -> Pass {
        let mut pass = Pass::new("accept", rows);
        self.push_accept(&mut pass, tree);
        pass.check().expect("the accept pass is well formed");
        pass
    }

    /// Acceptance and commit, on draws that the host wrote.
    pub fn commit_pass(&self, rows: usize, tree: &TreeSpec) -> Pass {
        let mut pass = self.accept_pass(rows, tree);
        self.push_commit(&mut pass);
        pass.check().expect("the commit pass is well formed");
        pass
    }

    /// Growth alone, from the best `k` of each row that the host wrote.
    pub fn grow_pass(&self, shape: &TreeShape, k: usize) -> Pass {
        let mut pass = Pass::new("grow", MAX_ROWS);
        let batch = self.batch_buffers(&mut pass);
        let ids = pass.add("ids", Role::Input, DType::U32, &[MAX_ROWS, k]);
        let tokens = pass.add("tokens", Role::Output, DType::U32, &[MAX_REQUESTS, MAX_NODES]);
        pass.ops.push(Op::Grow { batch, shape: shape.clone(), ids, tokens });
        pass.check().expect("the grow pass is well formed");
        pass
    }

    /// Drafting from blocks of up to so many requests, on what the host wrote for their parallel stage.
    pub fn trellis_pass(
        &self,
        block: BlockShape,
        requests: usize,
        costs: &[f32],
        [k, rank, hidden]: [usize; 3],
        confident: bool,
    ) -> Pass {
        let rows = block.rows * requests;
        let mut pass = Pass::new("trellis", rows);
        let batch = self.batch_buffers_for(requests, &mut pass);
        let mut add = |name: &str, dtype, shape: &[usize]| pass.add(name, Role::Output, dtype, shape);
        let accepted = add("accepted", DType::U32, &[requests, accepted_words(MAX_NODES)]);
        let state = add("state", DType::U32, &[requests, report_words(costs.len())]);
        let ids = add("ids", DType::U32, &[rows, k]);
        let scores = add("scores", DType::F32, &[MAX_ROWS, k]);
        let states = add("hidden", DType::F32, &[MAX_ROWS, hidden]);
        // Some buffers are those of longer blocks.
        let depth = block.depth() + requests % 2;
        let shape = [requests * depth, k, k];
        let (trellis, order) = (add("trellis", DType::F32, &shape), add("order", DType::U32, &shape));
        let words = [hidden + rank + 1 + 2 * depth];
        let confidence = confident.then(|| add("confidence", DType::F32, &words));
        let shape = [self.sizes.vocab, rank];
        let mut weight = |name: &str| pass.add(name, Role::Weight, self.sizes.weights, &shape);
        let markov = (rank > 0).then(|| (weight("w1"), weight("w2")));
        pass.ops.push(Op::OpenBlock { batch, accepted, state, block });
        pass.ops.push(Op::Trellis { batch, block, ids, scores, hidden: states, markov, confidence, trellis, order });
        pass.ops.push(Op::GrowTrellis { batch, block, ids, trellis, order, state, costs: costs.to_vec(), least: 0.02 });
        pass.check().expect("the trellis pass is well formed");
        pass
    }

    fn push_mask(&self, pass: &mut Pass) {
        let (batch, vocab) = (self.batch_buffers(pass), self.sizes.vocab);
        let logits = pass.add("logits", Role::Output, DType::F32, &[MAX_ROWS, vocab]);
        let allowed = pass.add("allowed", Role::Input, DType::U32, &[MAX_ROWS, vocab.div_ceil(32)]);
        pass.ops.push(Op::Mask { batch, allowed, logits });
    }

    fn push_draw(&self, pass: &mut Pass) {
        let batch = self.batch_buffers(pass);
        let vocab = self.sizes.vocab;
        let logits = pass.add("logits", Role::Output, DType::F32, &[MAX_ROWS, vocab]);
        let seen = pass.add("seen", Role::Input, DType::U32, &[MAX_REQUESTS, vocab.div_ceil(32)]);
        let draws = pass.add("draws", Role::Output, DType::U32, &[MAX_ROWS]);
        let ids = pass.add("top_ids", Role::Output, DType::U32, &[MAX_ROWS, TOP_K]);
        let values = pass.add("top_values", Role::Output, DType::F32, &[MAX_ROWS, TOP_K]);
        pass.ops.push(Op::Draw { batch, seen, logits, draws });
        pass.ops.push(Op::TopK { batch, logits, ids, values });
    }

    fn push_accept(&self, pass: &mut Pass, tree: &TreeSpec) {
        let batch = self.batch_buffers(pass);
        let draws = pass.add("draws", Role::Output, DType::U32, &[MAX_ROWS]);
        let accepted = self.accepted(pass);
        pass.ops.push(Op::Accept { batch, tree: tree.clone(), draws, accepted });
    }

    fn push_commit(&self, pass: &mut Pass) {
        let batch = self.batch_buffers(pass);
        let accepted = self.accepted(pass);
        let (k_cache, v_cache) = match self.sizes.latent {
            Some(_) => (self.latents(pass), None),
            None => (self.caches(pass).0, Some(self.caches(pass).1)),
        };
        pass.ops.push(Op::Commit { batch, accepted, k_cache, v_cache });
    }

    fn batch_buffers(&self, pass: &mut Pass) -> BatchBuffers {
        self.batch_buffers_for(MAX_REQUESTS, pass)
    }

    fn batch_buffers_for(&self, requests: usize, pass: &mut Pass) -> BatchBuffers {
        let request_words = HEADER_WORDS + requests * Request::WORDS;
        BatchBuffers {
            rows: pass.add("rows", Role::Input, DType::U32, &[MAX_ROWS, Row::WORDS]),
            requests: pass.add("requests", Role::Input, DType::U32, &[request_words]),
            pages: pass.add("pages", Role::Input, DType::U32, &[requests, self.sizes.pages_per_request()]),
        }
    }

    fn caches(&self, pass: &mut Pass) -> (Buf, Buf) {
        let s = self.sizes;
        let shape = [s.layers, s.pages(), s.kv_heads, s.page_size, s.head_dim];
        (pass.add("k_cache", Role::Cache, s.cache, &shape), pass.add("v_cache", Role::Cache, s.cache, &shape))
    }

    fn accepted(&self, pass: &mut Pass) -> Buf {
        pass.add("accepted", Role::Output, DType::U32, &[MAX_REQUESTS, accepted_words(MAX_NODES)])
    }

    /// The weight that a buffer of a pass holds; a function of the seed and the buffer's name.
    pub fn weight(&self, desc: &BufferDesc) -> Tensor {
        let mut rng = Rng::new(desc.name.bytes().fold(self.seed, |h, b| Rng::new(h ^ u64::from(b)).word()));
        let values: Vec<f64> = match desc.name.as_str() {
            "rope" | "draft.rope" => rope_table(desc.shape[0], desc.shape[1]),
            name if name.ends_with("router_bias") => (0..desc.len()).map(|_| 0.2 * rng.normal()).collect(),
            name if name.ends_with("norm") => (0..desc.len()).map(|_| 1.0 + 0.2 * rng.normal()).collect(),
            "embed" => (0..desc.len()).map(|_| rng.normal()).collect(),
            // Logits with a spread of about 3, so that draws are neither uniform nor certain.
            "head" => (0..desc.len()).map(|_| 3.0 * rng.normal() / (desc.shape[1] as f64).sqrt()).collect(),
            _ => {
                let fan_in = *desc.shape.last().expect("a weight has dimensions") as f64;
                (0..desc.len()).map(|_| rng.normal() / fan_in.sqrt()).collect()
            }
        };
        tensor(desc.dtype, &desc.shape, &values)
    }
}

fn rope_table(positions: usize, half: usize) -> Vec<f64> {
    let mut table = Vec::new();
    for position in 0..positions {
        for i in 0..half {
            let angle = position as f64 * 10000f64.powf(-(i as f64) / half as f64);
            table.extend([angle.cos(), angle.sin()]);
        }
    }
    table
}

/// A tensor of these values, rounded to the dtype.
pub fn tensor(dtype: DType, shape: &[usize], values: &[f64]) -> Tensor {
    let encode = |&v: &f64| match dtype {
        DType::F32 => (v as f32).to_le_bytes().to_vec(),
        DType::F16 => f16::from_f64(v).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f64(v).to_le_bytes().to_vec(),
        DType::U32 => panic!("a weight is no words"),
    };
    Tensor { dtype, shape: shape.to_vec(), bytes: Bytes::from_vec(values.iter().flat_map(encode).collect()) }
}

//! The kernels that a release promises: generated, validated and translated when the project is built.
//!
//! Any other spec comes from the same code when it is first needed; this table is what a build proves. It holds the
//! sizes of real models, so that each combination that kernels treat differently occurs: head dims, odd and even query
//! groups, biases, norms over heads, formats.

use crate::cuda::{self, Device, Launch};
use crate::emit::{Lang, emit};
use crate::layout::{HEADER_WORDS, accepted_words};
use crate::lower::{KernelCall, Limits, LowerError, lower};
use crate::op::{Batch, CacheShape, Op, TreeSpec};
use crate::pass::{DType, Pass, Role};
use crate::{MAX_NODES, Request, Row};

pub mod deepseek;

/// One model's sizes, as its kernels see them.
pub struct Sizes {
    pub name: &'static str,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    pub vocab: usize,
    pub bias: bool,
    pub head_norm: bool,
    pub weight: DType,
}

const fn sizes(
    name: &'static str,
    [hidden, heads, kv_heads, head_dim, ffn, vocab]: [usize; 6],
    weight: DType,
) -> Sizes {
    Sizes { name, hidden, heads, kv_heads, head_dim, ffn, vocab, bias: false, head_norm: false, weight }
}

/// name: hidden, heads, kv heads, head dim, ffn, vocabulary.
pub const MODELS: &[Sizes] = &[
    sizes("SmolLM2-135M", [576, 9, 3, 64, 1536, 49152], DType::BF16), // group 3
    sizes("SmolLM2-360M", [960, 15, 5, 64, 2560, 49152], DType::BF16),
    sizes("SmolLM2-1.7B", [2048, 32, 32, 64, 8192, 49152], DType::BF16), // group 1
    sizes("Llama-3.2-1B", [2048, 32, 8, 64, 8192, 128256], DType::F16),  // group 4
    sizes("Llama-3.1-8B", [4096, 32, 8, 128, 14336, 128256], DType::BF16),
    sizes("TinyLlama-f32", [2048, 32, 4, 64, 5632, 32000], DType::F32), // group 8
    Sizes { bias: true, ..sizes("Qwen2.5-0.5B", [896, 14, 2, 64, 4864, 151936], DType::BF16) }, // group 7
    Sizes { bias: true, ..sizes("Qwen2.5-14B", [5120, 40, 8, 128, 13824, 152064], DType::BF16) }, // group 5
    Sizes { head_norm: true, ..sizes("Qwen3-0.6B", [1024, 16, 8, 128, 3072, 151936], DType::BF16) }, // group 2
    sizes("Gemma-sized", [2048, 8, 1, 256, 16384, 256000], DType::BF16),
];

/// Rows of the passes in the table: plain decoding, a small tree, a large tree or a chunk of a prompt.
pub const ROWS: &[usize] = &[1, 16, 256];

/// What every device has.
pub const PORTABLE: Limits = Limits { binding_bytes: 128 << 20, offset_alignment: 256 };

/// Of the largest pass with so many rows.
fn tree_of(rows: usize) -> TreeSpec {
    TreeSpec::Any(rows.clamp(64, MAX_NODES))
}

/// Calls of one pass of every model in the table and of DeepSeek's, first come first, each kernel once.
pub fn calls() -> Result<Vec<KernelCall>, LowerError> {
    let mut calls: Vec<KernelCall> = Vec::new();
    let models = MODELS.iter().flat_map(|model| ROWS.iter().map(move |&rows| model.pass(rows, tree_of(rows))));
    for pass in models.chain(ROWS.iter().map(|&rows| deepseek::pass(rows))) {
        for op in &pass.ops {
            for call in lower(op, &pass, &PORTABLE)? {
                if calls.iter().all(|known| known.spec != call.spec) {
                    calls.push(call);
                }
            }
        }
    }
    Ok(calls)
}

/// Launches on an NVIDIA GPU of one pass of every model in the table, first come first, each kernel once.
pub fn cuda_launches(device: &Device) -> Result<Vec<Launch>, cuda::LowerError> {
    let mut launches: Vec<Launch> = Vec::new();
    for model in MODELS {
        for &rows in ROWS {
            let pass = model.pass(rows, TreeSpec::Any(rows.clamp(64, MAX_NODES)));
            add_new(&mut launches, cuda::lower_pass(&pass, device)?);
        }
        // A server's: many requests with small trees.
        let mut pass = model.pass_of(128, MAX_NODES, TreeSpec::Any((16 * model.kv_heads / model.heads).max(1)));
        pass.ops.retain(|op| op.name() == "tree_attention");
        add_new(&mut launches, cuda::lower_pass(&pass, device)?);
    }
    for &rows in ROWS {
        add_new(&mut launches, cuda::lower_pass(&deepseek::pass(rows), device)?);
    }
    Ok(launches)
}

fn add_new(launches: &mut Vec<Launch>, of_pass: Vec<Launch>) {
    for launch in of_pass {
        if launches.iter().all(|known| known.spec != launch.spec) {
            launches.push(launch);
        }
    }
}

/// Kernels whose whole source is committed, in `kernel-gen/golden/`, so that a change to what is generated shows in a
/// review: file name and source.
pub fn goldens() -> Vec<(String, String)> {
    let model = &MODELS[0];
    let static_tree = |text: &str| TreeSpec::Static(text.parse().expect("a tree"));
    let kernels = [
        (Lang::Wgsl, "qkv", TreeSpec::Any(64)),
        (Lang::Wgsl, "tree_attention", TreeSpec::Any(64)),
        (Lang::Wgsl, "tree_attention", static_tree("chain:8")),
        (Lang::Wgsl, "tree_attention", static_tree("4x2x2x1")),
        (Lang::Cuda, "qkv", TreeSpec::Any(64)),
        (Lang::Cuda, "tree_attention", TreeSpec::Any(64)),
    ];
    let golden = |(lang, stem, tree): (Lang, &str, TreeSpec)| {
        const FITS: &str = "the release's sizes fit every device";
        let pass = model.pass(16, tree);
        let op = pass.ops.iter().find(|op| op.name() == stem).expect("a pass has each op");
        let spec = match lang {
            Lang::Wgsl => lower(op, &pass, &PORTABLE).expect(FITS).swap_remove(0).spec,
            Lang::Cuda => cuda::lower(op, &pass, &Device::H100).expect(FITS).swap_remove(0).spec,
        };
        let source = emit(&spec, lang).expect("the release's kernels exist");
        (format!("{}.{}", spec.name(), lang.extension()), source)
    };
    kernels.into_iter().map(golden).collect()
}

impl Sizes {
    /// A pass with each op once: one layer, then the head, the draw, acceptance and commit.
    pub fn pass(&self, rows: usize, tree: TreeSpec) -> Pass {
        self.pass_of(4, rows, tree)
    }

    /// The same, with room for so many requests.
    fn pass_of(&self, max_requests: usize, rows: usize, tree: TreeSpec) -> Pass {
        const CONTEXT: usize = 2048;
        let cache = CacheShape {
            layers: 2,
            pages: max_requests * CONTEXT / 16,
            kv_heads: self.kv_heads,
            page_size: 16,
            head_dim: self.head_dim,
        };
        let mut pass = Pass::new(self.name, rows);
        let p = &mut pass;
        let words = HEADER_WORDS + max_requests * Request::WORDS;
        let batch = Batch {
            rows: p.add("rows", Role::Input, DType::U32, &[rows, Row::WORDS]),
            requests: p.add("requests", Role::Input, DType::U32, &[words]),
            pages: p.add("pages", Role::Input, DType::U32, &[max_requests, CONTEXT / cache.page_size]),
        };
        let bits = self.vocab.div_ceil(32);
        let seen = p.add("seen", Role::Input, DType::U32, &[max_requests, bits]);
        let allowed = p.add("allowed", Role::Input, DType::U32, &[rows.min(64), bits]);
        let heads = self.heads + 2 * self.kv_heads;
        let weight = |p: &mut Pass, name: &str, shape: [usize; 2]| p.add(name, Role::Weight, self.weight, &shape);
        let small = |p: &mut Pass, name: &str, len: usize| p.add(name, Role::Weight, DType::F32, &[len]);
        let scratch = |p: &mut Pass, name: &str, shape: &[usize]| p.add(name, Role::Scratch, DType::F32, shape);
        let output = |p: &mut Pass, name: &str, shape: &[usize]| p.add(name, Role::Output, DType::U32, shape);

        let table = weight(p, "embed", [self.vocab, self.hidden]);
        let x = scratch(p, "x", &[rows, self.hidden]);
        let normed = scratch(p, "normed", &[rows, self.hidden]);
        let norm = small(p, "norm", self.hidden);
        let rope = p.add("rope", Role::Weight, DType::F32, &[CONTEXT, self.head_dim / 2, 2]);
        let q = scratch(p, "q", &[rows, self.heads, self.head_dim]);
        let attended = scratch(p, "attended", &[rows, self.heads, self.head_dim]);
        let hidden = scratch(p, "hidden", &[rows, self.ffn]);
        let logits = scratch(p, "logits", &[rows.min(64), self.vocab]);
        let k_cache = p.add("k_cache", Role::Cache, DType::BF16, &cache.dims());
        let v_cache = p.add("v_cache", Role::Cache, DType::BF16, &cache.dims());
        let ids = output(p, "ids", &[rows, 8]);
        let values = scratch(p, "values", &[rows, 8]);
        let draws = output(p, "draws", &[rows]);
        let accepted = output(p, "accepted", &[max_requests, accepted_words(MAX_NODES)]);
        let (kv_heads, eps, layer) = (self.kv_heads, 1e-5, 1);

        let qkv = Op::Qkv {
            batch,
            layer,
            heads: self.heads,
            kv_heads,
            eps,
            x,
            norm,
            weight: weight(p, "qkv", [heads * self.head_dim, self.hidden]),
            bias: self.bias.then(|| small(p, "bias", heads * self.head_dim)),
            q_norm: self.head_norm.then(|| small(p, "q_norm", self.head_dim)),
            k_norm: self.head_norm.then(|| small(p, "k_norm", self.head_dim)),
            rope,
            q,
            k_cache,
            v_cache,
        };
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let attention = Op::TreeAttention {
            batch,
            layer,
            heads: self.heads,
            kv_heads,
            scale,
            tree: tree.clone(),
            q,
            k_cache,
            v_cache,
            out: attended,
        };
        let o_proj = weight(p, "o_proj", [self.hidden, self.heads * self.head_dim]);
        let gate_up = weight(p, "gate_up", [2 * self.ffn, self.hidden]);
        let down = weight(p, "down", [self.hidden, self.ffn]);
        let blocks = weight(p, "blocks", [5 * self.hidden, self.hidden]);
        let bias = small(p, "block_bias", 5 * self.hidden);
        pass.ops = vec![
            Op::Embed { batch, table, out: x },
            qkv,
            attention,
            Op::Project { batch, add: true, x: attended, weight: o_proj, residual: x },
            Op::GateUp { batch, eps, x, norm, weight: gate_up, out: hidden },
            Op::Project { batch, add: true, x: hidden, weight: down, residual: x },
        ];
        if rows <= 64 {
            pass.ops.extend([
                Op::Norm { batch, eps, x, norm, out: normed },
                Op::Head { batch, eps, x, norm, weight: table, logits },
                Op::TopK { batch, logits, ids, values },
                Op::Draw { batch, seen, logits, draws },
                Op::Accept { batch, tree, draws, accepted },
                Op::Commit { batch, accepted, k_cache, v_cache: Some(v_cache) },
                Op::Perturb { batch, logits },
                Op::Mask { batch, allowed, logits },
                Op::ResBlock { batch, states: x, weight: blocks, bias, out: normed },
            ]);
        }
        pass
    }
}

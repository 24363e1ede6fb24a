//! The matrices of a model, and passes that multiply with them: one op many times, over several copies of its weight.

use anyhow::Result;
use treespark_kernel_gen::layout::HEADER_WORDS;
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{CacheShape, DType, Op, Pass, Request, Role, Row};
use treespark_models::Config;

pub const PAGE_SIZE: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    Qkv,
    O,
    GateUp,
    Down,
    Head,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Qkv => "qkv",
            Kind::O => "o",
            Kind::GateUp => "gate_up",
            Kind::Down => "down",
            Kind::Head => "head",
        }
    }

    /// Rows and columns of the weight.
    pub fn size(self, config: &Config) -> [usize; 2] {
        match self {
            Kind::Qkv => [config.q_dim() + 2 * config.kv_dim(), config.hidden],
            Kind::O => [config.hidden, config.q_dim()],
            Kind::GateUp => [2 * config.ffn, config.hidden],
            Kind::Down => [config.hidden, config.ffn],
            Kind::Head => [config.vocab_size, config.hidden],
        }
    }

    /// Elements of a row of the buffer `out`.
    pub fn outputs(self, config: &Config) -> usize {
        match self {
            Kind::Qkv => config.q_dim(),
            Kind::O | Kind::Down => config.hidden,
            Kind::GateUp => config.ffn,
            Kind::Head => config.vocab_size,
        }
    }
}

/// A pass of `calls` products of `rows` rows, taking turns on `copies` weights. The buffers a measurement fills are called
/// rows, requests, pages, x, norm, q_norm, k_norm, rope, out and weight.0 to weight.{copies - 1}.
pub fn pass(config: &Config, kind: Kind, rows: usize, copies: usize, calls: usize) -> Result<Pass> {
    let Config { heads, kv_heads, head_dim, rms_eps: eps, .. } = *config;
    let [n, k] = kind.size(config);
    let pages = rows.div_ceil(PAGE_SIZE);
    let mut pass = Pass::new(kind.name(), rows);
    let batch = Batch {
        rows: pass.add("rows", Role::Input, DType::U32, &[rows, Row::WORDS]),
        requests: pass.add("requests", Role::Input, DType::U32, &[HEADER_WORDS + Request::WORDS]),
        pages: pass.add("pages", Role::Input, DType::U32, &[1, pages]),
    };
    let x = pass.add("x", Role::Scratch, DType::F32, &[rows, k]);
    let out_shape = if kind == Kind::Qkv { vec![rows, heads, head_dim] } else { vec![rows, kind.outputs(config)] };
    let out = pass.add("out", Role::Output, DType::F32, &out_shape);
    for call in 0..calls {
        let weight = pass.add(format!("weight.{}", call % copies), Role::Weight, config.weight_dtype, &[n, k]);
        let mut vector = |name: &str, len| pass.add(name, Role::Weight, DType::F32, &[len]);
        let op = match kind {
            Kind::O | Kind::Down => Op::Project { batch, add: true, x, weight, residual: out },
            Kind::GateUp => Op::GateUp { batch, eps, x, norm: vector("norm", k), weight, out },
            Kind::Head => Op::Head { batch, eps, x, norm: vector("norm", k), weight, logits: out },
            Kind::Qkv => {
                let norm = vector("norm", k);
                let mut head_norm = |name| config.qk_norm.then(|| vector(name, head_dim));
                let (q_norm, k_norm) = (head_norm("q_norm"), head_norm("k_norm"));
                let rope = pass.add("rope", Role::Weight, DType::F32, &[rows, head_dim / 2, 2]);
                let cache = CacheShape { layers: 1, pages, kv_heads, page_size: PAGE_SIZE, head_dim }.dims();
                let mut cache = |name: &str| pass.add(name, Role::Cache, DType::BF16, &cache);
                let (k_cache, v_cache) = (cache("k_cache"), cache("v_cache"));
                let (layer, bias, q) = (0, None, out);
                Op::Qkv {
                    batch,
                    layer,
                    heads,
                    kv_heads,
                    eps,
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
                }
            }
        };
        pass.ops.push(op);
    }
    pass.check()?;
    Ok(pass)
}

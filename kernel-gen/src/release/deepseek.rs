//! A layer of DeepSeek-V2-Lite: latent attention and experts.

use crate::layout::HEADER_WORDS;
use crate::op::{Batch, GroupScore, Op, Routing, Scoring, TreeSpec};
use crate::pass::{DType, Pass, Role};
use crate::{Request, Row};

const HIDDEN: usize = 2048;
const HEADS: usize = 16;
const LATENT: usize = 512;
const ROTATED: usize = 64;
/// Of a head, beside what is rotated, and of its values.
const DIM: usize = 128;
const EXPERTS: usize = 64;
const CHOSEN: usize = 6;
const FFN: usize = 1408;

/// A pass with each op of a layer once.
pub fn pass(rows: usize) -> Pass {
    const MAX_REQUESTS: usize = 4;
    const CONTEXT: usize = 2048;
    const PAGE: usize = 16;
    let mut pass = Pass::new("DeepSeek-V2-Lite", rows);
    let p = &mut pass;
    let batch = Batch {
        rows: p.add("rows", Role::Input, DType::U32, &[rows, Row::WORDS]),
        requests: p.add("requests", Role::Input, DType::U32, &[HEADER_WORDS + MAX_REQUESTS * Request::WORDS]),
        pages: p.add("pages", Role::Input, DType::U32, &[MAX_REQUESTS, CONTEXT / PAGE]),
    };
    let cache =
        p.add("cache", Role::Cache, DType::BF16, &[2, MAX_REQUESTS * CONTEXT / PAGE, 1, PAGE, LATENT + ROTATED]);
    let rope = p.add("rope", Role::Weight, DType::F32, &[CONTEXT, ROTATED / 2, 2]);
    let norm = p.add("norm", Role::Weight, DType::F32, &[HIDDEN]);
    let latent_norm = p.add("latent_norm", Role::Weight, DType::F32, &[LATENT]);
    let mut weight = |name: &str, shape: [usize; 2]| p.add(name, Role::Weight, DType::BF16, &shape);
    let down = weight("latent", [LATENT + ROTATED, HIDDEN]);
    let up = weight("q_proj", [HEADS * (DIM + ROTATED), HIDDEN]);
    let absorb = weight("absorb", [HEADS * LATENT, DIM]);
    let values = weight("values", [HEADS * DIM, LATENT]);
    let router = weight("router", [EXPERTS, HIDDEN]);
    let expert_gate_up = weight("expert_gate_up", [EXPERTS * 2 * FFN, HIDDEN]);
    let expert_down = weight("expert_down", [EXPERTS * HIDDEN, FFN]);
    let mut scratch = |name: &str, shape: &[usize]| p.add(name, Role::Scratch, DType::F32, shape);
    let x = scratch("x", &[rows, HIDDEN]);
    let nope = scratch("nope", &[rows, HEADS, DIM]);
    let q = scratch("q", &[rows, HEADS, LATENT + ROTATED]);
    let latents = scratch("latents", &[rows, HEADS, LATENT]);
    let attention = scratch("attention", &[rows, HEADS, DIM]);
    let weights = scratch("expert_weights", &[rows, CHOSEN]);
    let inner = scratch("expert_ffn", &[rows, CHOSEN, FFN]);
    let out = scratch("expert_out", &[rows, CHOSEN, HIDDEN]);
    let experts = p.add("experts", Role::Scratch, DType::U32, &[rows, CHOSEN]);
    let groups = p.add("expert_groups", Role::Scratch, DType::U32, &[EXPERTS + 1 + rows * CHOSEN]);
    let (layer, heads, eps, tree) = (1, HEADS, 1e-6, TreeSpec::Any(64));
    let scale = 1.0 / ((DIM + ROTATED) as f32).sqrt();
    let routing = Routing {
        scoring: Scoring::Softmax,
        groups: 1,
        top_groups: 1,
        group_score: GroupScore::Largest,
        normalise: false,
        scale: 1.0,
    };
    #[rustfmt::skip]
    let ops = [
        Op::Latent {
            batch, layer, eps, latent_eps: eps, x, norm, weight: down, latent_norm, rope, compressed: None, cache,
        },
        Op::LatentQueries { batch, heads, eps, x, norm, weight: up, rope, nope, q },
        Op::PerHead { batch, heads, x: nope, weight: absorb, out: q },
        Op::LatentAttention { batch, layer, heads, scale, tree, q, cache, out: latents },
        Op::PerHead { batch, heads, x: latents, weight: values, out: attention },
        Op::Route { batch, eps, routing, x, norm, weight: router, bias: None, experts, weights },
        Op::GroupRows { batch, experts, groups },
        Op::ExpertGateUp { batch, eps, x, norm, weight: expert_gate_up, groups, out: inner },
        Op::ExpertDown { batch, x: inner, weight: expert_down, groups, out },
        Op::Combine { batch, x: out, weights, residual: x },
    ];
    pass.ops.extend(ops);
    pass
}

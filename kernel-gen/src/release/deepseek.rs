//! A layer of DeepSeek-V2-Lite, with the parts that only its larger siblings have: compressed queries, a biased router.

use crate::layout::HEADER_WORDS;
use crate::op::{Batch, CacheShape, GroupScore, Op, Routing, Scoring};
use crate::pass::{Buf, DType, Pass, Role};
use crate::{Request, Row};

const HIDDEN: usize = 2048;
const HEADS: usize = 16;
const NOPE: usize = 128;
const ROTATED: usize = 64;
const LATENT: usize = 512;
const VALUE: usize = 128;
const COMPRESSED: usize = 1536;
const EXPERTS: usize = 64;
const CHOSEN: usize = 6;
const FFN: usize = 1408;

const CONTEXT: usize = 2048;
const MAX_REQUESTS: usize = 4;

/// A pass with each op that DeepSeek's models have and others lack.
pub fn pass(rows: usize) -> Pass {
    let tree = super::tree_of(rows);
    let head_dim = LATENT + ROTATED;
    let shape = CacheShape { layers: 2, pages: MAX_REQUESTS * CONTEXT / 16, kv_heads: 1, page_size: 16, head_dim };
    let mut pass = Pass::new("DeepSeek-V2-Lite", rows);
    let p = &mut pass;
    let words = HEADER_WORDS + MAX_REQUESTS * Request::WORDS;
    let batch = Batch {
        rows: p.add("rows", Role::Input, DType::U32, &[rows, Row::WORDS]),
        requests: p.add("requests", Role::Input, DType::U32, &[words]),
        pages: p.add("pages", Role::Input, DType::U32, &[MAX_REQUESTS, CONTEXT / shape.page_size]),
    };
    let cache = p.add("cache", Role::Cache, DType::BF16, &shape.dims());
    let rope = p.add("rope", Role::Weight, DType::F32, &[CONTEXT, ROTATED / 2, 2]);
    let (layer, eps) = (1, 1e-6);
    let weight = |p: &mut Pass, name: &str, shape: [usize; 2]| p.add(name, Role::Weight, DType::BF16, &shape);
    let small = |p: &mut Pass, name: &str, len: usize| p.add(name, Role::Weight, DType::F32, &[len]);
    let scratch = |p: &mut Pass, name: &str, of_row: &[usize]| {
        p.add(name, Role::Scratch, DType::F32, &[&[rows], of_row].concat())
    };
    let x = scratch(p, "x", &[HIDDEN]);
    let norm = small(p, "norm", HIDDEN);
    let compressed = scratch(p, "compressed", &[COMPRESSED]);
    let query_norm = small(p, "query_norm", COMPRESSED);
    let latent_norm = small(p, "latent_norm", LATENT);
    let nope = scratch(p, "nope", &[HEADS, NOPE]);
    let q = scratch(p, "q", &[HEADS, head_dim]);
    let latents = scratch(p, "latents", &[HEADS, LATENT]);
    let values = scratch(p, "values", &[HEADS, VALUE]);

    for compressed in [None, Some(compressed)] {
        let (columns, tag) = compressed.map_or((0, "alone"), |_| (COMPRESSED, "with_query"));
        let down = weight(p, &format!("latent_{tag}"), [columns + head_dim, HIDDEN]);
        let (from, from_norm, columns) = compressed.map_or((x, norm, HIDDEN), |buf| (buf, query_norm, COMPRESSED));
        let up = weight(p, &format!("q_{tag}"), [HEADS * (NOPE + ROTATED), columns]);
        #[rustfmt::skip]
        p.ops.extend([
            Op::Latent { batch, layer, eps, latent_eps: eps, x, norm, weight: down, latent_norm, rope, compressed, cache },
            Op::LatentQueries { batch, heads: HEADS, eps, x: from, norm: from_norm, weight: up, rope, nope, q },
        ]);
    }
    let absorb = weight(p, "absorb", [HEADS * LATENT, NOPE]);
    let of_latent = weight(p, "of_latent", [HEADS * VALUE, LATENT]);
    let scale = 1.0 / ((NOPE + ROTATED) as f32).sqrt();
    p.ops.extend([
        Op::PerHead { batch, heads: HEADS, x: nope, weight: absorb, out: q },
        Op::LatentAttention { batch, layer, heads: HEADS, scale, tree, q, cache, out: latents },
        Op::PerHead { batch, heads: HEADS, x: latents, weight: of_latent, out: values },
    ]);
    push_experts(p, batch, rows, x, norm);
    // An MTP module reads states of other rows.
    let [states, gathered] = ["states", "gathered"].map(|name| scratch(p, name, &[HIDDEN]));
    let sources = p.add("sources", Role::Input, DType::U32, &[rows]);
    p.ops.push(Op::Gather { batch, states, sources, out: gathered });
    pass
}

fn push_experts(p: &mut Pass, batch: Batch, rows: usize, x: Buf, norm: Buf) {
    let eps = 1e-6;
    let router = p.add("router", Role::Weight, DType::F32, &[EXPERTS, HIDDEN]);
    let bias = p.add("router_bias", Role::Weight, DType::F32, &[EXPERTS]);
    let experts = p.add("experts", Role::Scratch, DType::U32, &[rows, CHOSEN]);
    let weights = p.add("weights", Role::Scratch, DType::F32, &[rows, CHOSEN]);
    let groups = p.add("groups", Role::Scratch, DType::U32, &[EXPERTS + 1 + rows * CHOSEN]);
    let inner = p.add("expert_ffn", Role::Scratch, DType::F32, &[rows, CHOSEN, FFN]);
    let out = p.add("expert_out", Role::Scratch, DType::F32, &[rows, CHOSEN, HIDDEN]);
    // Both lie in several banks, which cut experts.
    let gate_up = p.add("expert_gate_up", Role::Weight, DType::BF16, &[EXPERTS * 2 * FFN, HIDDEN]);
    let down = p.add("expert_down", Role::Weight, DType::BF16, &[EXPERTS * HIDDEN, FFN]);
    let v2 = Routing {
        scoring: Scoring::Softmax,
        groups: 1,
        top_groups: 1,
        group_score: GroupScore::Largest,
        normalise: false,
        scale: 1.0,
    };
    let v3 = Routing {
        scoring: Scoring::Sigmoid,
        groups: 8,
        top_groups: 4,
        group_score: GroupScore::TwoLargest,
        normalise: true,
        scale: 2.5,
    };
    p.ops.extend([(v2, None), (v3, Some(bias))].map(|(routing, bias)| Op::Route {
        batch,
        eps,
        routing,
        x,
        norm,
        weight: router,
        bias,
        experts,
        weights,
    }));
    p.ops.extend([
        Op::GroupRows { batch, experts, groups },
        Op::ExpertGateUp { batch, eps, x, norm, weight: gate_up, groups, out: inner },
        Op::ExpertDown { batch, x: inner, weight: down, groups, out },
        Op::Combine { batch, x: out, weights, residual: x },
    ]);
}

//! Latent attention and experts of a tiny model.

use treespark_kernel_gen::op::{GroupScore, Routing, Scoring};
use treespark_kernel_gen::{Buf, DType, Op, Pass, Role, TreeSpec};

use super::{EPS, ExpertSizes, LatentSizes, MAX_ROWS, TinyModel};

impl TinyModel {
    /// Returns what attention leaves.
    pub(super) fn push_latent_attention(
        &self,
        pass: &mut Pass,
        latent: &LatentSizes,
        layer: usize,
        tree: &TreeSpec,
        x: Buf,
    ) -> Buf {
        let (batch, s, eps) = (self.batch_buffers(pass), self.sizes, EPS);
        let &LatentSizes { compressed, nope_dim, rotated, value_dim } = latent;
        let (heads, rank) = (s.heads(), s.head_dim - rotated);
        let cache = self.latents(pass);
        let rope = self.rope(pass, rotated);
        let name = |part: &str| format!("layers.{layer}.{part}");
        let mut scratch =
            |name: &str, shape: &[usize]| pass.add(name, Role::Scratch, DType::F32, &[&[MAX_ROWS], shape].concat());
        let nope = scratch("nope", &[heads, nope_dim]);
        let q = scratch("q", &[heads, s.head_dim]);
        let latents = scratch("latents", &[heads, rank]);
        let attention = scratch("attention", &[heads, value_dim]);
        let query = (compressed > 0).then(|| scratch("compressed", &[compressed]));
        let mut norm = |part: &str, len| pass.add(name(part), Role::Weight, DType::F32, &[len]);
        let attn_norm = norm("attn_norm", s.hidden);
        let latent_norm = norm("latent_norm", rank);
        let q_norm = query.map(|_| norm("q_norm", compressed));
        let mut matrix = |part: &str, shape: [usize; 2]| pass.add(name(part), Role::Weight, s.weights, &shape);
        let down = matrix("latent", [compressed + s.head_dim, s.hidden]);
        let (from, columns) = query.map_or((x, s.hidden), |query| (query, compressed));
        let up = matrix("q", [heads * (nope_dim + rotated), columns]);
        let absorb = matrix("absorb", [heads * rank, nope_dim]);
        let values = matrix("values", [heads * value_dim, rank]);
        let scale = 1.0 / ((nope_dim + rotated) as f32).sqrt();
        #[rustfmt::skip]
        pass.ops.extend([
            Op::Latent {
                batch, layer, eps, latent_eps: 1e-6, x, norm: attn_norm, weight: down, latent_norm, rope, compressed: query, cache,
            },
            Op::LatentQueries { batch, heads, eps, x: from, norm: q_norm.unwrap_or(attn_norm), weight: up, rope, nope, q },
            Op::PerHead { batch, heads, x: nope, weight: absorb, out: q },
            Op::LatentAttention { batch, layer, heads, scale, tree: tree.clone(), q, cache, out: latents },
            Op::PerHead { batch, heads, x: latents, weight: values, out: attention },
        ]);
        attention
    }

    pub(super) fn latents(&self, pass: &mut Pass) -> Buf {
        let s = self.sizes;
        pass.add("cache", Role::Cache, s.cache, &[s.layers, s.pages(), 1, s.page_size, s.head_dim])
    }

    pub(super) fn push_experts(&self, pass: &mut Pass, of: &ExpertSizes, layer: usize, x: Buf) {
        let (batch, s, eps) = (self.batch_buffers(pass), self.sizes, EPS);
        let &ExpertSizes { count, chosen, groups, top_groups, is_v3 } = of;
        let name = |part: &str| format!("layers.{layer}.{part}");
        let routing = Routing {
            scoring: if is_v3 { Scoring::Sigmoid } else { Scoring::Softmax },
            groups,
            top_groups,
            group_score: if is_v3 { GroupScore::TwoLargest } else { GroupScore::Largest },
            normalise: is_v3,
            scale: 1.5,
        };
        let norm = pass.add(name("ffn_norm"), Role::Weight, DType::F32, &[s.hidden]);
        let bias = is_v3.then(|| pass.add(name("router_bias"), Role::Weight, DType::F32, &[count]));
        let mut scratch = |name: &str, dtype, shape: &[usize]| pass.add(name, Role::Scratch, dtype, shape);
        let experts = scratch("experts", DType::U32, &[MAX_ROWS, chosen]);
        let weights = scratch("expert_weights", DType::F32, &[MAX_ROWS, chosen]);
        let groups = scratch("expert_groups", DType::U32, &[count + 1 + MAX_ROWS * chosen]);
        let inner = scratch("expert_ffn", DType::F32, &[MAX_ROWS, chosen, s.ffn]);
        let out = scratch("expert_out", DType::F32, &[MAX_ROWS, chosen, s.hidden]);
        let mut matrix = |part: &str, shape: [usize; 2]| pass.add(name(part), Role::Weight, s.weights, &shape);
        let router = matrix("router", [count, s.hidden]);
        let gate_up = matrix("expert_gate_up", [count * 2 * s.ffn, s.hidden]);
        let down = matrix("expert_down", [count * s.hidden, s.ffn]);
        pass.ops.extend([
            Op::Route { batch, eps, routing, x, norm, weight: router, bias, experts, weights },
            Op::GroupRows { batch, experts, groups },
            Op::ExpertGateUp { batch, eps, x, norm, weight: gate_up, groups, out: inner },
            Op::ExpertDown { batch, x: inner, weight: down, groups, out },
            Op::Combine { batch, x: out, weights, residual: x },
        ]);
    }
}

//! A mixture of experts (DeepSeek-V2 and V3) in place of an MLP:
//!
//! ```text
//! experts, weights = route(x)               norm, projection, choice
//! groups = group_rows(experts)
//! expert_ffn = expert_gate_up(x, groups)    the weights of an expert are read once for all of its rows
//! x += shared experts                       gate_up and project, as an MLP
//! expert_out = expert_down(expert_ffn, groups)
//! x += weights · expert_out                 combine
//! ```

use treespark_kernel_gen::Op;

use super::Decoder;
use crate::builder::{Builder, WeightList};
use crate::config::Experts;

impl Decoder<'_> {
    pub(super) fn expert_weights(&self, list: &mut WeightList, experts: &Experts, tensors: &str, layer: usize) {
        let hidden = self.config.hidden;
        let ours = |name: &str| self.layer_buffer(layer, name);
        let theirs = |name: &str, rows: usize| (format!("{tensors}layers.{}.mlp.{name}", self.first + layer), rows);
        list.matrix(ours("router"), hidden, vec![theirs("gate.weight", experts.count)]);
        if experts.biased {
            list.vector(ours("router_bias"), vec![theirs("gate.e_score_correction_bias", experts.count)]);
        }
        let of = |name: &str, rows: usize| {
            (0..experts.count)
                .map(|expert| theirs(&format!("experts.{expert}.{name}.weight"), rows))
                .collect::<Vec<_>>()
        };
        let gates_and_ups = of("gate_proj", experts.ffn).into_iter().zip(of("up_proj", experts.ffn));
        list.matrix(ours("expert_gate_up"), hidden, gates_and_ups.flat_map(|(gate, up)| [gate, up]).collect());
        list.matrix(ours("expert_down"), experts.ffn, of("down_proj", hidden));
        if experts.shared_ffn > 0 {
            let shared = |name: &str, rows: usize| theirs(&format!("shared_experts.{name}.weight"), rows);
            let gate_up = ["gate_proj", "up_proj"].map(|name| shared(name, experts.shared_ffn));
            list.matrix(ours("shared_gate_up"), hidden, gate_up.to_vec());
            list.matrix(ours("shared_down"), experts.shared_ffn, vec![shared("down_proj", hidden)]);
        }
    }

    pub(super) fn mixture(&self, builder: &mut Builder, of: &Experts, layer: usize) {
        let (batch, eps, x, chosen) = (builder.batch, self.config.rms_eps, self.x(builder), of.chosen);
        let norm = self.layer_weight(builder, layer, "ffn_norm");
        let experts = builder.scratch_words(&self.buffer("experts"), &[chosen]);
        let weights = builder.scratch(&self.buffer("expert_weights"), &[chosen]);
        let weight = self.layer_weight(builder, layer, "router");
        let bias = builder.optional_weight(&self.layer_buffer(layer, "router_bias"));
        builder.push(Op::Route { batch, eps, routing: of.routing, x, norm, weight, bias, experts, weights });

        let groups = builder.expert_groups(&self.buffer("expert_groups"), of.count, chosen);
        builder.push(Op::GroupRows { batch, experts, groups });

        let inner = builder.scratch(&self.buffer("expert_ffn"), &[chosen, of.ffn]);
        let weight = self.layer_weight(builder, layer, "expert_gate_up");
        builder.push(Op::ExpertGateUp { batch, eps, x, norm, weight, groups, out: inner });

        // Whoever reads x has done so.
        if of.shared_ffn > 0 {
            self.mlp(builder, ["shared_gate_up", "shared_down"], of.shared_ffn, layer);
        }
        let out = builder.scratch(&self.buffer("expert_out"), &[chosen, self.config.hidden]);
        let weight = self.layer_weight(builder, layer, "expert_down");
        builder.push(Op::ExpertDown { batch, x: inner, weight, groups, out });
        builder.push(Op::Combine { batch, x: out, weights, residual: x });
    }
}

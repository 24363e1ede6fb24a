//! DeepSeek's keys: latent attention and experts.

use treespark_kernel_gen::op::{GroupScore, MAX_CHOSEN, MAX_EXPERTS, Routing, Scoring};

use super::{Keys, Rope, RopeScaling};
use crate::error::Result;

/// Latent attention (MLA): keys and values of all heads are made of one latent of a token.
#[derive(Debug, Clone, PartialEq)]
pub struct Latent {
    /// Queries are made of a compressed one of this size.
    pub compressed: Option<usize>,
    /// Elements of a latent.
    pub rank: usize,
    /// Elements of a query head that meet the latent.
    pub nope_dim: usize,
    /// Elements of a query head that meet the rotated key, which all heads share.
    pub rotated: usize,
    /// Elements of a value of a head.
    pub value_dim: usize,
    /// The checkpoint has elements that are rotated together side by side.
    pub interleaved: bool,
}

/// A mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Experts {
    pub count: usize,
    /// Of each row.
    pub chosen: usize,
    /// Inner size of one.
    pub ffn: usize,
    /// Inner size of those together that every row has; 0: none.
    pub shared_ffn: usize,
    /// Layers before this one have an MLP.
    pub first_layer: usize,
    pub routing: Routing,
    /// A bias of each expert takes part in choosing.
    pub biased: bool,
}

impl Latent {
    /// Elements of the cache for a token, in a layer.
    pub fn cached(&self) -> usize {
        self.rank + self.rotated
    }

    /// What scores are multiplied with.
    pub fn scale(&self, rope: &Rope) -> f32 {
        let plain = 1.0 / ((self.nope_dim + self.rotated) as f32).sqrt();
        match rope.scaling {
            RopeScaling::Yarn { score_factor, .. } => plain * score_factor * score_factor,
            _ => plain,
        }
    }
}

impl Keys<'_> {
    pub(super) fn latent(&self) -> Result<Latent> {
        let compressed = if self.json["q_lora_rank"].is_null() { None } else { Some(self.size("q_lora_rank")?) };
        Ok(Latent {
            compressed,
            rank: self.size("kv_lora_rank")?,
            nope_dim: self.size("qk_nope_head_dim")?,
            rotated: self.size("qk_rope_head_dim")?,
            value_dim: self.size("v_head_dim")?,
            interleaved: self.flag_or("rope_interleave", true)?,
        })
    }

    pub(super) fn check_latent(&self, latent: &Latent) -> Result<()> {
        let sizes = [
            ("q_lora_rank", latent.compressed.unwrap_or(8)),
            ("kv_lora_rank", latent.rank),
            ("qk_nope_head_dim", latent.nope_dim),
            ("qk_rope_head_dim", latent.rotated),
        ];
        for (key, size) in sizes {
            if !size.is_multiple_of(8) {
                return Err(self.error(format!("{key} is {size}, kernels need a multiple of 8")));
            }
        }
        Ok(())
    }

    pub(super) fn experts(&self, architecture: &str) -> Result<Option<Experts>> {
        if self.json["n_routed_experts"].is_null() {
            return Ok(None);
        }
        let is_v3 = architecture == "DeepseekV3ForCausalLM";
        let (count, chosen) = (self.size("n_routed_experts")?, self.size("num_experts_per_tok")?);
        let ffn = self.size("moe_intermediate_size")?;
        if !ffn.is_multiple_of(8) {
            return Err(self.error(format!("moe_intermediate_size is {ffn}, kernels need a multiple of 8")));
        }
        if count > MAX_EXPERTS || chosen > MAX_CHOSEN.min(count) {
            let problem = format!("{chosen} of {count} experts a token, expected up to {MAX_CHOSEN} of {MAX_EXPERTS}");
            return Err(self.error(problem));
        }
        if self.size_or("moe_layer_freq", 1)? != 1 {
            return Err(self.error("moe_layer_freq is not 1, which is not supported".to_string()));
        }
        let shared = self.json["n_shared_experts"].as_u64().unwrap_or(0) as usize;
        Ok(Some(Experts {
            count,
            chosen,
            ffn,
            shared_ffn: shared.min(count) * ffn,
            first_layer: self.json["first_k_dense_replace"].as_u64().unwrap_or(if is_v3 { 3 } else { 0 }) as usize,
            routing: self.routing(architecture, count, chosen)?,
            biased: is_v3,
        }))
    }

    fn routing(&self, architecture: &str, count: usize, chosen: usize) -> Result<Routing> {
        let is_v3 = architecture == "DeepseekV3ForCausalLM";
        let method = self.json["topk_method"].as_str().unwrap_or(if is_v3 { "noaux_tc" } else { "greedy" });
        let scoring = self.json["scoring_func"].as_str().unwrap_or(if is_v3 { "sigmoid" } else { "softmax" });
        let expected: (&[&str], &str) =
            if is_v3 { (&["noaux_tc"], "sigmoid") } else { (&["greedy", "group_limited_greedy"], "softmax") };
        if !expected.0.contains(&method) || scoring != expected.1 {
            let known = format!("{architecture} has {} and {}", expected.0.join(" or "), expected.1);
            return Err(self.error(format!("topk_method is {method}, scoring_func {scoring}; {known}")));
        }
        let (groups, top_groups) =
            if method == "greedy" { (1, 1) } else { (self.size_or("n_group", 1)?, self.size_or("topk_group", 1)?) };
        let of_group = count / groups;
        if !count.is_multiple_of(groups) || top_groups > groups || top_groups * of_group < chosen || of_group < 2 {
            let problem =
                format!("{chosen} experts are chosen from {top_groups} of {groups} groups (topk_group, n_group)");
            return Err(self.error(format!("{problem} of {count} experts (n_routed_experts)")));
        }
        let scale = self.json["routed_scaling_factor"].as_f64().unwrap_or(if is_v3 { 2.5 } else { 1.0 }) as f32;
        let (scoring, group_score) = match is_v3 {
            true => (Scoring::Sigmoid, GroupScore::TwoLargest),
            false => (Scoring::Softmax, GroupScore::Largest),
        };
        let normalise = self.flag_or("norm_topk_prob", is_v3)?;
        if normalise && !is_v3 {
            // Two implementations differ in what that means, and no checkpoint has it.
            return Err(self.error(format!("norm_topk_prob is true, which is not supported for {architecture}")));
        }
        Ok(Routing { scoring, groups, top_groups, group_score, normalise, scale })
    }
}

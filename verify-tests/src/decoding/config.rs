//! The random model of a decoding. What its sizes do not say follows from the seed.

use treespark_kernel_gen::op::{GroupScore, Routing, Scoring};
use treespark_models::config::{Rope, RopeScaling};
use treespark_models::{Config, Experts, Latent};

use super::{Decoding, Guesser};
use crate::rng::Rng;
use crate::tiny_model::{ExpertSizes, LatentSizes};

impl Decoding {
    pub(super) fn config(&self) -> Config {
        let s = self.sizes;
        let mut rng = Rng::new(self.seed ^ 4);
        Config {
            architecture: if s.latent.is_some() { "DeepseekV3ForCausalLM" } else { "LlamaForCausalLM" },
            hidden: s.hidden,
            ffn: s.ffn,
            layers: s.layers,
            heads: s.heads(),
            kv_heads: s.kv_heads,
            head_dim: s.head_dim,
            latent: s.latent.map(|latent| latent_of(latent, s.head_dim, &mut rng)),
            experts: s.experts.map(|experts| experts_of(experts, s.ffn, &mut rng)),
            next_token_layers: usize::from(self.guesser == Guesser::Mtp),
            vocab_size: s.vocab,
            max_position_embeddings: self.context,
            rms_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: if s.latent.is_some() { scaling(&mut rng) } else { RopeScaling::None } },
            qkv_bias: s.bias,
            qk_norm: s.qk_norm,
            tied: self.seed.is_multiple_of(2),
            weight_dtype: s.weights,
            eos: Vec::new(),
        }
    }
}

fn latent_of(sizes: LatentSizes, head_dim: usize, rng: &mut Rng) -> Latent {
    let LatentSizes { compressed, nope_dim, rotated, value_dim } = sizes;
    Latent {
        compressed: (compressed > 0).then_some(compressed),
        rank: head_dim - rotated,
        nope_dim,
        rotated,
        value_dim,
        interleaved: rng.below(2) == 0,
    }
}

/// With up to two shared experts, and behind up to one layer without any.
fn experts_of(sizes: ExpertSizes, ffn: usize, rng: &mut Rng) -> Experts {
    let ExpertSizes { count, chosen, groups, top_groups, is_v3 } = sizes;
    let (scoring, group_score) = match is_v3 {
        true => (Scoring::Sigmoid, GroupScore::TwoLargest),
        false => (Scoring::Softmax, GroupScore::Largest),
    };
    Experts {
        count,
        chosen,
        ffn,
        shared_ffn: rng.below(3) * ffn,
        first_layer: rng.below(2),
        routing: Routing { scoring, groups, top_groups, group_score, normalise: is_v3, scale: 1.5 },
        biased: is_v3,
    }
}

/// None, or YaRN from a context shorter than any that is tried.
fn scaling(rng: &mut Rng) -> RopeScaling {
    match rng.below(2) {
        0 => RopeScaling::None,
        _ => RopeScaling::Yarn {
            factor: 4.0,
            original_max_positions: 12.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.1,
            score_factor: 1.2,
        },
    }
}

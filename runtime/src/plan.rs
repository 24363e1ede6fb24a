//! The memory plan: what a service will hold on its device, and so how many tokens its cache may have. Made before anything is
//! loaded, so that what cannot fit is refused at once and nothing is found missing under load.

use std::fmt;

use treespark_kernel_gen::DType;
use treespark_models::{Config, Model, Speculator, SpeculatorConfig};

use crate::error::{Error, Result};
use crate::network::Limits;

/// Of the memory that is free at the start, the part that a service may take.
const SHARE: f64 = 0.9;
/// Tokens of the cache where nobody knows how much memory there is.
const CAUTIOUS_TOKENS: usize = 32 * 1024;

/// Bytes on the device, by what they are for.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryPlan {
    pub weights: usize,
    /// Weights of the drafter.
    pub drafter: usize,
    /// Between the ops of a pass: mostly logits.
    pub scratch: usize,
    /// Keys and values of a token, the drafter's included.
    pub per_token: usize,
    /// Tokens that fit, of all sequences together.
    pub tokens: usize,
    /// What was free, if the backend knows.
    pub free: Option<usize>,
}

impl MemoryPlan {
    /// For a target with its drafter, if that has weights: a speculator, or a model of its own. `limits` says how many tokens
    /// there may be at most, and at least: those of one sequence.
    pub fn new(
        model: &Model,
        speculator: Option<&Speculator>,
        draft: Option<&Model>,
        limits: &Limits,
        free: Option<usize>,
    ) -> Result<MemoryPlan> {
        let (config, context) = (model.config(), limits.context);
        let beside = speculator.map(Speculator::config);
        let of_draft = draft.map_or(0, |draft| draft.weight_bytes(context));
        let backbones = [beside.and_then(backbone), draft.map(Model::config)];
        let wide = model.dtype() == DType::F32;
        let mut plan = MemoryPlan {
            weights: model.weight_bytes(context),
            drafter: beside.map_or(0, |config| config.weight_bytes(context)) + of_draft,
            scratch: scratch(config, limits) + draft.map_or(0, |draft| scratch(draft.config(), limits)),
            per_token: backbones.into_iter().flatten().chain([config]).map(|config| per_token(config, wide)).sum(),
            tokens: 0,
            free,
        };
        let [least, most] = limits.token_range();
        let wanted = limits.cache_tokens.unwrap_or(most).clamp(least, most);
        plan.tokens = match free {
            None => wanted.min(CAUTIOUS_TOKENS.max(limits.cache_tokens.unwrap_or(0))).max(least),
            Some(free) => {
                let room = (free as f64 * SHARE) as usize;
                let fit = room.saturating_sub(plan.fixed()) / plan.per_token.max(1);
                if fit < least {
                    let needed = (plan.fixed() + least * plan.per_token) as u64;
                    let what = format!("weights and a cache of {least} tokens (lower --context or --max-requests)");
                    let device = format!("a device with {} MB free", free / 1_000_000);
                    return Err(Error::OutOfMemory { needed, what, device });
                }
                wanted.min(fit)
            }
        };
        Ok(plan)
    }

    fn fixed(&self) -> usize {
        self.weights + self.drafter + self.scratch
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: usize| format!("{:.0} MB", bytes as f64 / 1e6);
        let MemoryPlan { weights, drafter, scratch, per_token, tokens, free } = *self;
        let [weights, drafter, scratch] = [weights, drafter, scratch].map(mb);
        let (cache, kb) = (mb(tokens * per_token), per_token as f64 / 1e3);
        write!(
            f,
            "weights {weights}, drafter {drafter}, scratch {scratch}, cache {cache}: {tokens} tokens of {kb:.1} kB"
        )?;
        free.map_or(Ok(()), |free| write!(f, "; {} were free", mb(free)))
    }
}

/// The layers of a speculator that have a cache.
fn backbone(config: &SpeculatorConfig) -> Option<&Config> {
    match config {
        SpeculatorConfig::Dspark(dspark) => Some(&dspark.backbone),
        SpeculatorConfig::Mtp(mtp) => Some(mtp.layer()),
        SpeculatorConfig::Medusa(_) => None,
    }
}

fn per_token(config: &Config, wide: bool) -> usize {
    config.cached() * if wide { 4 } else { 2 }
}

/// What a pass of all rows has between its ops, in f32.
fn scratch(config: &Config, limits: &Limits) -> usize {
    let logits = config.vocab_size + config.vocab_size.div_ceil(32); // and which of them a grammar allows
    let latent = config
        .latent
        .as_ref()
        .map_or(0, |latent| config.heads * (latent.nope_dim + latent.rank) + latent.compressed.unwrap_or(0));
    let experts = config.experts.as_ref().map_or(0, |of| of.chosen * (of.ffn + config.hidden + 3) + of.shared_ffn);
    let attention = config.heads * config.head_dim + config.q_dim() + latent;
    let per_row = logits + 3 * config.hidden + attention + config.ffn + experts;
    4 * limits.max_rows * per_row
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn model() -> Model {
        let json = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100,
            "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        });
        let config = Config::from_json(&json, DType::BF16, std::path::Path::new("config.json")).unwrap();
        Model::random(config, 1)
    }

    fn limits() -> Limits {
        Limits { max_requests: 8, ..Limits::new(256, 16) }
    }

    #[test]
    fn the_cache_takes_what_is_left_up_to_what_is_needed() {
        let plan = |free, limits: &Limits| MemoryPlan::new(&model(), None, None, limits, free);
        let plenty = plan(Some(1 << 30), &limits()).unwrap();
        assert_eq!(plenty.tokens, 8 * 512, "eight sequences of 256 tokens and a tree of 256");
        assert_eq!(plenty.per_token, 2 * 2 * 2 * 16 * 2);
        let fixed = plenty.weights + plenty.scratch;
        let tight = plan(Some(((fixed + 1000 * plenty.per_token) as f64 / SHARE) as usize + 1), &limits()).unwrap();
        assert_eq!(tight.tokens, 1000);
        assert!(matches!(plan(Some(fixed), &limits()), Err(Error::OutOfMemory { .. })));
        let asked = Limits { cache_tokens: Some(600), ..limits() };
        assert_eq!(plan(Some(1 << 30), &asked).unwrap().tokens, 600);
        assert_eq!(plan(None, &Limits { max_requests: 1000, ..limits() }).unwrap().tokens, CAUTIOUS_TOKENS);
    }
}

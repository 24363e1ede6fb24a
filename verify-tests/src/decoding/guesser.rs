//! Who drafts for a random model: drafters of random weights, and one that knows the answer.

use treespark_models::dspark::MarkovKind;
use treespark_models::medusa::MedusaConfig;
use treespark_models::{Config, DsparkConfig, MtpConfig, SpeculatorConfig};

/// Who drafts.
#[derive(Debug, Clone, PartialEq)]
pub enum Guesser {
    Ngram,
    /// Knows the answer and tells it in part.
    HalfRight,
    /// A draft model: the target itself, or another one of its sizes.
    Model {
        itself: bool,
    },
    Dspark {
        layers: usize,
        block: usize,
        /// Row 0 is dropped: z-lab's dialect.
        first: usize,
        markov: Option<(MarkovKind, usize)>,
        confidence: Option<bool>,
        /// An embedding table and a head of its own.
        own: bool,
    },
    Medusa {
        heads: usize,
        /// Matrices of its own.
        own: bool,
    },
    /// The target's own module: the target has one.
    Mtp,
}

/// Names of drafters.
pub const GUESSERS: [&str; 7] = ["ngram", "half right", "model", "medusa", "dflash", "dspark", "mtp"];

impl Guesser {
    /// One of the [`GUESSERS`].
    pub fn name(&self) -> &'static str {
        match self {
            Guesser::Ngram => "ngram",
            Guesser::HalfRight => "half right",
            Guesser::Model { .. } => "model",
            Guesser::Dspark { markov: None, .. } => "dflash",
            Guesser::Dspark { .. } => "dspark",
            Guesser::Medusa { .. } => "medusa",
            Guesser::Mtp => "mtp",
        }
    }

    /// Its configuration for a target, if it is a speculator.
    pub fn speculator(&self, target: &Config) -> Option<SpeculatorConfig> {
        match *self {
            Guesser::Dspark { layers, block, first, markov, confidence, own } => {
                let config = DsparkConfig {
                    backbone: backbone(target, layers),
                    block,
                    first,
                    mask_token: target.vocab_size as u32 - 1,
                    taps: (0..target.layers).collect(),
                    markov,
                    confidence,
                    has_embedding: own,
                    has_head: own,
                    heads_on_device: false,
                };
                Some(SpeculatorConfig::Dspark(config))
            }
            Guesser::Medusa { heads, own } => {
                Some(SpeculatorConfig::Medusa(MedusaConfig::of_target(target, heads, own)))
            }
            Guesser::Mtp => {
                let config = MtpConfig::of_target(target).expect("the target has a module");
                Some(SpeculatorConfig::Mtp(config))
            }
            Guesser::Ngram | Guesser::HalfRight | Guesser::Model { .. } => None,
        }
    }
}

/// Draft layers of the target's sizes. They have keys and values, also where the target has latents, and MLPs.
pub fn backbone(target: &Config, layers: usize) -> Config {
    let head_dim = if target.latent.is_some() { 2 * target.rotated() } else { target.head_dim };
    Config { layers, head_dim, latent: None, experts: None, next_token_layers: 0, tied: false, ..target.clone() }
}

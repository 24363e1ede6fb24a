//! Who drafts for a random model: drafters of random weights, and one that knows the answer.

use treespark_models::dspark::MarkovKind;
use treespark_models::medusa::MedusaConfig;
use treespark_models::{Config, DsparkConfig, SpeculatorConfig};

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
}

/// Names of drafters.
pub const GUESSERS: [&str; 6] = ["ngram", "half right", "model", "medusa", "dflash", "dspark"];

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
        }
    }

    /// Its configuration for a target, if it is a speculator.
    pub fn speculator(&self, target: &Config) -> Option<SpeculatorConfig> {
        match *self {
            Guesser::Dspark { layers, block, first, markov, confidence, own } => {
                let config = DsparkConfig {
                    backbone: Config { layers, tied: false, ..target.clone() },
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
            _ => None,
        }
    }
}

//! The `config.json` of a DSpark or DFlash drafter, in the dialects that are published.
//!
//! | dialect | known by | taps and mask | row 0 of a block |
//! |---|---|---|---|
//! | DeepSpec | `architectures: [..DSparkModel]` | at the top | predicts the token behind the anchor |
//! | z-lab's DFlash | `architectures: [DFlashDraftModel]` | in `dflash_config` | is dropped: row i predicts its own token |

use std::path::Path;

use serde_json::Value;
use treespark_kernel_gen::{BlockShape, Fill};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::{Checkpoint, checkpoint};

#[derive(Debug, Clone, PartialEq)]
pub struct DsparkConfig {
    /// The draft layers.
    pub backbone: Config,
    /// Rows of a block, the anchor's included.
    pub block: usize,
    /// The row that predicts the first token: 0, or 1 where the anchor's row is dropped.
    pub first: usize,
    /// Fills the rows behind the anchor.
    pub mask_token: u32,
    /// Hidden states of the target that are read, ascending: 0 is the embedding, l + 1 what layer l leaves.
    pub taps: Vec<usize>,
    pub markov: Option<(MarkovKind, usize)>,
    /// Whether there is a confidence head, and whether it reads the Markov head's embedding too.
    pub confidence: Option<bool>,
    /// The checkpoint holds an embedding table and a head of its own; else the target's are used.
    pub has_embedding: bool,
    pub has_head: bool,
    /// The sequential heads run on the device too.
    pub heads_on_device: bool,
}

/// How a Markov head makes a bias of the token before. Ranks are beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkovKind {
    Vanilla,
    Gated,
    Rnn,
}

impl DsparkConfig {
    /// Whether a config is one of these drafters', of any dialect.
    pub fn is_described_by(json: &Value) -> bool {
        let named = |suffix: &str| json["architectures"][0].as_str().is_some_and(|name| name.ends_with(suffix));
        named("DSparkModel")
            || named("DSparkDraftModel")
            || named("DFlashDraftModel")
            || json["dflash_config"].is_object()
    }

    pub(crate) fn from_checkpoint(checkpoint: &Checkpoint, target: &Config) -> Result<DsparkConfig> {
        let (json, path) = (checkpoint.config(), checkpoint.path());
        let keys = Keys { json, nested: &json["dflash_config"], path };
        keys.refuse_what_is_not_supported()?;
        let backbone = Config::from_json(&backbone_json(json), checkpoint.dtype(), path)?;
        let markov = match keys.size_or("markov_rank", 0)? {
            0 => None,
            rank => Some((keys.markov_kind()?, rank)),
        };
        let has_confidence = keys.flag("enable_confidence_head")?;
        let config = DsparkConfig {
            block: keys.size("block_size")?,
            first: usize::from(keys.nested.is_object()),
            mask_token: keys.size("mask_token_id")? as u32,
            taps: keys.taps()?,
            confidence: has_confidence.then_some(markov.is_some() && keys.flag("confidence_head_with_markov")?),
            markov,
            has_embedding: checkpoint.has("embed_tokens.weight"),
            has_head: checkpoint.has("lm_head.weight"),
            heads_on_device: false,
            backbone,
        };
        keys.check(&config, target)?;
        Ok(config)
    }

    /// Tokens that a block predicts.
    pub fn depth(&self) -> usize {
        self.block - self.first
    }

    pub fn block_shape(&self) -> BlockShape {
        BlockShape { rows: self.block, first: self.first, fill: Fill::Mask(self.mask_token) }
    }

    /// Whether devices that draft can run the sequential heads: what follows a token must depend on nothing else.
    pub fn fits_devices(&self) -> bool {
        self.markov.is_none_or(|(kind, rank)| kind == MarkovKind::Vanilla && rank.is_multiple_of(8))
    }
}

/// The config as one of a plain model with the same layers.
fn backbone_json(json: &Value) -> Value {
    let mut plain = json.clone();
    let model_type = json["model_type"].as_str().unwrap_or("qwen3");
    let architecture = match model_type {
        "llama" => "LlamaForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        other => other,
    };
    plain["architectures"] = serde_json::json!([architecture]);
    plain
}

struct Keys<'a> {
    json: &'a Value,
    /// `dflash_config`, or null.
    nested: &'a Value,
    path: &'a Path,
}

impl Keys<'_> {
    fn error(&self, problem: String) -> Error {
        Error::Malformed { path: self.path.to_path_buf(), problem: format!("config: {problem}") }
    }

    fn get(&self, key: &str) -> &Value {
        if self.nested[key].is_null() { &self.json[key] } else { &self.nested[key] }
    }

    fn size(&self, key: &str) -> Result<usize> {
        let value = self.get(key);
        value.as_u64().map(|n| n as usize).ok_or_else(|| self.error(format!("{key} is {value}, expected a number")))
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.get(key).is_null() { Ok(default) } else { self.size(key) }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(*flag),
            other => Err(self.error(format!("{key} is {other}, expected true or false"))),
        }
    }

    fn markov_kind(&self) -> Result<MarkovKind> {
        match self.get("markov_head_type").as_str().unwrap_or("vanilla") {
            "vanilla" => Ok(MarkovKind::Vanilla),
            "gated" => Ok(MarkovKind::Gated),
            "rnn" => Ok(MarkovKind::Rnn),
            other => Err(self.error(format!("markov_head_type is {other}; there are: vanilla, gated, rnn"))),
        }
    }

    fn taps(&self) -> Result<Vec<usize>> {
        let value = self.get("target_layer_ids");
        let tap = |id: &Value| id.as_i64().and_then(|id| usize::try_from(id + 1).ok());
        let taps = value.as_array().and_then(|ids| ids.iter().map(tap).collect::<Option<Vec<usize>>>());
        match taps {
            Some(taps) if !taps.is_empty() && taps.is_sorted_by(|a, b| a < b) => Ok(taps),
            _ => Err(self.error(format!("target_layer_ids is {value}, expected ascending layers, -1 the embedding"))),
        }
    }

    fn refuse_what_is_not_supported(&self) -> Result<()> {
        for (key, what) in [
            ("draft_vocab_size", "a reduced vocabulary"),
            ("hc_mult", "hyper-connections (DeepSeek-V4)"),
            ("final_logit_softcapping", "softcapped logits (Gemma)"),
        ] {
            if !self.get(key).is_null() {
                return Err(self.error(format!("{key} is {}: drafters with {what} are not supported", self.get(key))));
            }
        }
        Ok(())
    }

    fn check(&self, config: &DsparkConfig, target: &Config) -> Result<()> {
        let mismatch = |what: &str, drafter: usize, target: usize| Error::Mismatch {
            path: self.path.to_path_buf(),
            what: what.to_string(),
            drafter: drafter.to_string(),
            target: target.to_string(),
        };
        let backbone = &config.backbone;
        for (what, drafter, target) in [
            ("hidden_size", backbone.hidden, target.hidden),
            ("vocab_size", backbone.vocab_size, target.vocab_size),
            ("number of target layers", self.size_or("num_target_layers", target.layers)?, target.layers),
        ] {
            if drafter != target {
                return Err(mismatch(what, drafter, target));
            }
        }
        let last = config.taps[config.taps.len() - 1];
        if last >= target.layers {
            let what = format!("target_layer_ids names layer {}, and", last - 1);
            let problem = format!("{what} the target's last layer that can be read is {}", target.layers - 2);
            return Err(self.error(problem));
        }
        if config.mask_token as usize >= target.vocab_size {
            return Err(mismatch("mask_token_id", config.mask_token as usize, target.vocab_size - 1));
        }
        if !(1 + config.first..=MAX_BLOCK).contains(&config.block) {
            return Err(self.error(format!("block_size is {}, expected up to {MAX_BLOCK}", config.block)));
        }
        Ok(())
    }
}

/// Rows of a block at most.
pub const MAX_BLOCK: usize = 64;

/// A table `calibration.json` beside a checkpoint; see [`super::SequentialHeads`].
pub(super) fn calibration(checkpoint: &Checkpoint) -> Result<Option<Value>> {
    let path = checkpoint.path().join("calibration.json");
    if path.is_file() { checkpoint::read_json(&path).map(Some) } else { Ok(None) }
}

//! The `config.json` of a DSpark or DFlash drafter, in the dialects that are published.
//!
//! | dialect | known by | taps and mask | row 0 of a block |
//! |---|---|---|---|
//! | DeepSpec | `architectures: [..DSparkModel]` | at the top | predicts the token behind the anchor |
//! | z-lab's DFlash | `architectures: [DFlashDraftModel]` | in `dflash_config` | is dropped: row i predicts its own token |

use std::path::Path;

use serde_json::Value;
use treespark_kernel_gen::{BlockShape, Fill};

use crate::config::{Config, LARGEST_SIZE};
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
        match value.as_u64() {
            Some(n) if n <= LARGEST_SIZE => Ok(n as usize),
            _ => Err(self.error(format!("{key} is {value}, expected 0 to {LARGEST_SIZE}"))),
        }
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
        let tap = |id: &Value| usize::try_from(id.as_i64()?.checked_add(1)?).ok();
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
            // Of a target of one layer, the embedding alone: -1.
            let problem = format!("{what} the target's last layer that can be read is {}", target.layers as i64 - 2);
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

#[cfg(test)]
mod tests {
    use serde_json::json;
    use treespark_kernel_gen::DType;

    use super::*;

    fn backbone() -> Value {
        json!({
            "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        })
    }

    /// What a config with these keys besides says to a target of six layers.
    fn read(keys: &[(&str, Value)]) -> Result<DsparkConfig> {
        read_for(6, keys)
    }

    fn read_for(target_layers: usize, keys: &[(&str, Value)]) -> Result<DsparkConfig> {
        let mut json = backbone();
        keys.iter().for_each(|(key, value)| json[*key] = value.clone());
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
        let zeros = [0u8; 16];
        let tensor = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 2], &zeros).unwrap();
        let file = folder.path().join("model.safetensors");
        safetensors::serialize_to_file([("fc.weight", tensor)], None, &file).unwrap();
        let mut target = backbone();
        target["architectures"] = json!(["Qwen3ForCausalLM"]);
        target["num_hidden_layers"] = json!(target_layers);
        let target = Config::from_json(&target, DType::F32, Path::new("config.json")).unwrap();
        assert!(DsparkConfig::is_described_by(&json));
        DsparkConfig::from_checkpoint(&Checkpoint::open(folder.path()).unwrap(), &target)
    }

    /// A config in DeepSpec's dialect, with one key changed or added.
    fn deepspec(change: &str, value: Value) -> Result<DsparkConfig> {
        let mut keys = vec![
            ("architectures", json!(["Qwen3DSparkModel"])),
            ("block_size", json!(7)),
            ("mask_token_id", json!(99)),
            ("target_layer_ids", json!([-1, 1, 4])),
            ("markov_rank", json!(8)),
            ("num_target_layers", json!(6)),
        ];
        keys.push((change, value));
        read(&keys)
    }

    #[test]
    fn both_dialects_are_read() {
        let config = deepspec("enable_confidence_head", json!(true)).unwrap();
        assert_eq!((config.block, config.first, config.depth()), (7, 0, 7));
        assert_eq!(config.taps, [0, 2, 5], "hidden states: 0 is the embedding");
        assert_eq!(config.markov, Some((MarkovKind::Vanilla, 8)));
        assert_eq!(config.confidence, Some(false));
        let config = read(&[
            ("architectures", json!(["DFlashDraftModel"])),
            ("block_size", json!(16)),
            ("dflash_config", json!({ "mask_token_id": 98, "target_layer_ids": [1, 3] })),
        ])
        .unwrap();
        assert_eq!((config.block, config.first, config.depth()), (16, 1, 15));
        assert_eq!((config.mask_token, config.markov, config.confidence), (98, None, None));
    }

    #[test]
    fn what_does_not_fit_the_target_is_refused_with_both_values() {
        let refused = |key: &str, value: Value| deepspec(key, value).unwrap_err().to_string();
        let says = |key: &str, value: Value, what: &str| {
            let text = refused(key, value);
            assert!(text.contains(what), "{key}: {text}");
        };
        says("num_target_layers", json!(8), "number of target layers is 8, the target's 6");
        says("vocab_size", json!(104), "vocab_size is 104, the target's 100");
        says("hidden_size", json!(40), "hidden_size is 40, the target's 32");
        says("mask_token_id", json!(100), "mask_token_id is 100, the target's 99");
        says("target_layer_ids", json!([1, 5]), "names layer 5, and the target's last layer that can be read is 4");
        says("target_layer_ids", json!([4, 1]), "expected ascending layers");
        says("markov_head_type", json!("lstm"), "lstm; there are: vanilla, gated, rnn");
        says("draft_vocab_size", json!(50), "a reduced vocabulary");
        says("hc_mult", json!(4), "hyper-connections");
    }

    /// One more than the largest i64, a token only in its low 32 bits, a sum that wraps, a layer before the first.
    #[test]
    fn numbers_that_no_drafter_has_are_refused() {
        let refused = |key: &str, value: Value| deepspec(key, value).unwrap_err().to_string();
        assert!(refused("target_layer_ids", json!([1, i64::MAX])).contains("expected ascending layers"));
        assert!(refused("mask_token_id", json!((1u64 << 32) + 7)).contains("is 4294967303, expected 0 to"));
        assert!(refused("markov_rank", json!(u64::MAX)).contains("is 18446744073709551615, expected 0 to"));
        let keys = [
            ("architectures", json!(["Qwen3DSparkModel"])),
            ("block_size", json!(7)),
            ("mask_token_id", json!(99)),
            ("target_layer_ids", json!([-1, 0])),
        ];
        let text = read_for(1, &keys).unwrap_err().to_string();
        assert!(text.contains("names layer 0, and the target's last layer that can be read is -1"), "{text}");
    }
}

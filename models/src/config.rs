//! What a model is made of: the sizes and switches of a `config.json`, validated.
//!
//! Both dialects of Hugging Face are read: `rope_theta` and `rope_scaling` at the top, or newer `rope_parameters`. A
//! GGUF file's metadata arrives translated to the same keys. What a config asks for and the passes cannot do is
//! refused here, by the name of its key, so that nothing is silently computed differently.

use std::path::Path;

use serde_json::Value;
use treespark_kernel_gen::DType;

use crate::error::{Error, Result};

mod deepseek;
mod rope;

pub use deepseek::{Experts, Latent};
pub use rope::{Rope, RopeScaling};

/// The `architectures` that can be loaded. All are pre-norm decoders with rope and SwiGLU; DeepSeek's have latent attention
/// and experts, the others grouped-query attention.
pub const SUPPORTED: [&str; 5] =
    ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"];

/// Keeps the bytes of every buffer that a config describes within a `usize`.
pub(crate) const LARGEST_SIZE: u64 = 1 << 24;
/// Opening a model lists the tensors of all its layers: no line of text may ask for gigabytes of names.
const MOST_LAYERS: u64 = 1 << 10;

#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// One of [`SUPPORTED`].
    pub architecture: &'static str,
    pub hidden: usize,
    /// Inner size of the MLP, of layers without experts.
    pub ffn: usize,
    pub layers: usize,
    pub heads: usize,
    /// Of the cache; 1 with latents.
    pub kv_heads: usize,
    /// Elements of a key in the cache; with latents, a latent and its rotated key.
    pub head_dim: usize,
    /// Latent attention, instead of grouped queries.
    pub latent: Option<Latent>,
    /// Most layers have experts instead of one MLP.
    pub experts: Option<Experts>,
    /// Layers behind the last that a checkpoint has for drafts (MTP).
    pub next_token_layers: usize,
    /// Rows of the embedding table and of the head; may exceed the tokenizer's vocabulary (padding).
    pub vocab_size: usize,
    /// Longest sequence the model was made for, in tokens.
    pub max_position_embeddings: usize,
    pub rms_eps: f32,
    pub rope: Rope,
    /// The q, k and v projections have biases.
    pub qkv_bias: bool,
    /// q and k are normalised over each head.
    pub qk_norm: bool,
    /// The head is the embedding table.
    pub tied: bool,
    /// Of the matrices in memory; norms and biases are F32.
    pub weight_dtype: DType,
    /// Tokens that end a text, as far as the config knows.
    pub eos: Vec<u32>,
}

impl Config {
    /// Reads and validates a `config.json`; `path` is named in errors. What the matrices are in memory is known by the
    /// tensors, not by the config.
    pub fn from_json(json: &Value, weight_dtype: DType, path: &Path) -> Result<Config> {
        let architecture = architecture(json)?;
        let keys = Keys { json, path };
        keys.refuse_what_passes_cannot_do(architecture)?;
        let (hidden, heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
        let is_deepseek = architecture.starts_with("Deepseek");
        let latent = if is_deepseek { Some(keys.latent()?) } else { None };
        let experts = if is_deepseek { keys.experts(architecture)? } else { None };
        let (kv_heads, head_dim) = match &latent {
            Some(latent) => (1, latent.cached()),
            None => (keys.size_or("num_key_value_heads", heads)?, keys.size_or("head_dim", hidden / heads)?),
        };
        let config = Config {
            architecture,
            hidden,
            ffn: keys.size("intermediate_size")?,
            layers: keys.size_up_to("num_hidden_layers", MOST_LAYERS)?,
            heads,
            kv_heads,
            head_dim,
            latent,
            experts,
            next_token_layers: json["num_nextn_predict_layers"].as_u64().unwrap_or(0) as usize,
            vocab_size: keys.size("vocab_size")?,
            max_position_embeddings: keys.size("max_position_embeddings")?,
            rms_eps: keys.number("rms_norm_eps")?,
            rope: keys.rope()?,
            qkv_bias: architecture == "Qwen2ForCausalLM" || (!is_deepseek && keys.flag("attention_bias")?),
            qk_norm: architecture == "Qwen3ForCausalLM",
            tied: keys.flag("tie_word_embeddings")?,
            weight_dtype,
            eos: token_ids(&json["eos_token_id"]),
        };
        keys.check_sizes(&config)?;
        Ok(config)
    }

    /// Elements of a row of all query heads, side by side: what attention leaves.
    pub fn q_dim(&self) -> usize {
        self.heads * self.latent.as_ref().map_or(self.head_dim, |latent| latent.value_dim)
    }

    /// Elements of a head that are rotated.
    pub fn rotated(&self) -> usize {
        self.latent.as_ref().map_or(self.head_dim, |latent| latent.rotated)
    }

    /// What scores are multiplied with.
    pub fn softmax_scale(&self) -> f32 {
        match &self.latent {
            Some(latent) => latent.scale(&self.rope),
            None => 1.0 / (self.head_dim as f32).sqrt(),
        }
    }

    /// Elements of the cache for a token, in all layers.
    pub fn cached(&self) -> usize {
        let of_layer = self.kv_heads * self.head_dim;
        self.layers * if self.latent.is_some() { of_layer } else { 2 * of_layer }
    }

    /// The experts of a layer, if it has any.
    pub fn experts_of(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| layer >= experts.first_layer)
    }

    /// Whether a tensor belongs to the layers that a checkpoint has for drafts alone.
    pub fn is_of_next_tokens(&self, tensor: &str) -> bool {
        let layer = tensor.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        layer.is_some_and(|layer| (self.layers..self.layers + self.next_token_layers).contains(&layer))
    }

    /// Elements of a row of all key heads (or all value heads).
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Token ids of a key that holds one, a list, or null.
pub fn token_ids(value: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        other => id(other).into_iter().collect(),
    }
}

fn architecture(json: &Value) -> Result<&'static str> {
    let got = json["architectures"][0].as_str().or(json["model_type"].as_str()).unwrap_or("(none named)");
    // DeepSeek-V4: to load what is known of it would give another model.
    let has = |beginning: &str| json.as_object().is_some_and(|keys| keys.keys().any(|key| key.starts_with(beginning)));
    let parts =
        [("hc_", "hyper-connections (hc_mult)"), ("dspark_", "a DSpark drafter of its own (dspark_block_size)")];
    let parts: Vec<&str> = parts.into_iter().filter(|(key, _)| has(key)).map(|(_, what)| what).collect();
    if !parts.is_empty() {
        let got = format!("{got} with {}", parts.join(" and "));
        return Err(Error::Architecture { got, supported: SUPPORTED.join(", ") });
    }
    SUPPORTED
        .into_iter()
        .find(|&name| name == got)
        .ok_or_else(|| Error::Architecture { got: got.to_string(), supported: SUPPORTED.join(", ") })
}

/// Typed access to a config's keys. A key that is null counts as absent, as in Python.
struct Keys<'a> {
    json: &'a Value,
    path: &'a Path,
}

impl Keys<'_> {
    fn error(&self, problem: String) -> Error {
        Error::Malformed { path: self.path.to_path_buf(), problem: format!("config: {problem}") }
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.size_up_to(key, LARGEST_SIZE)
    }

    fn size_up_to(&self, key: &str, largest: u64) -> Result<usize> {
        match self.json[key].as_u64() {
            Some(n) if (1..=largest).contains(&n) => Ok(n as usize),
            _ => Err(self.error(format!("{key} is {}, expected 1 to {largest}", self.json[key]))),
        }
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.json[key].is_null() { Ok(default) } else { self.size(key) }
    }

    fn number(&self, key: &str) -> Result<f32> {
        self.number_in(self.json, key)
    }

    fn number_in(&self, object: &Value, key: &str) -> Result<f32> {
        // As an f32, a number may have become zero or infinite.
        match object[key].as_f64().map(|x| x as f32) {
            Some(x) if x > 0.0 && x.is_finite() => Ok(x),
            _ => Err(self.error(format!("{key} is {}, expected a positive number", object[key]))),
        }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        self.flag_or(key, false)
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match &self.json[key] {
            Value::Null => Ok(default),
            Value::Bool(flag) => Ok(*flag),
            other => Err(self.error(format!("{key} is {other}, expected true or false"))),
        }
    }

    fn refuse_what_passes_cannot_do(&self, architecture: &str) -> Result<()> {
        let activation = self.json["hidden_act"].as_str().unwrap_or("silu");
        if activation != "silu" {
            return Err(self.error(format!("hidden_act is {activation}, only silu is supported")));
        }
        let biased = if architecture.starts_with("Deepseek") { "attention_bias" } else { "mlp_bias" };
        for key in ["mlp_bias", "use_sliding_window", biased] {
            if self.flag(key)? {
                return Err(self.error(format!("{key} is true, which is not supported for {architecture}")));
            }
        }
        let layer_types = self.json["layer_types"].as_array().into_iter().flatten();
        if let Some(other) = layer_types.into_iter().find(|kind| *kind != "full_attention") {
            return Err(self.error(format!("layer_types has {other}, only full_attention is supported")));
        }
        Ok(())
    }

    fn check_sizes(&self, config: &Config) -> Result<()> {
        let &Config { heads, kv_heads, head_dim, .. } = config;
        if let Some(latent) = &config.latent {
            self.check_latent(latent)?;
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(self
                .error(format!("num_attention_heads is {heads}, not a multiple of num_key_value_heads, {kv_heads}")));
        }
        if config.latent.is_none() && (head_dim == 0 || head_dim > 256) {
            return Err(self.error(format!("head_dim is {head_dim}, expected 8 to 256")));
        }
        let sizes = [
            ("hidden_size", config.hidden),
            ("intermediate_size", config.ffn),
            ("head_dim", head_dim),
            ("heads times their values", config.q_dim()),
        ];
        for (key, size) in sizes {
            if !size.is_multiple_of(8) {
                return Err(self.error(format!("{key} is {size}, kernels need a multiple of 8")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 96, "intermediate_size": 136,
            "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 100,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        })
    }

    fn with(key: &str, value: Value) -> Value {
        let mut json = llama();
        json[key] = value;
        json
    }

    fn read(json: &Value) -> Result<Config> {
        Config::from_json(json, DType::F32, Path::new("config.json"))
    }

    #[test]
    fn defaults_of_absent_keys() {
        let config = read(&llama()).unwrap();
        assert_eq!((config.head_dim, config.kv_heads, config.q_dim(), config.kv_dim()), (16, 2, 96, 32));
        assert!(!config.qkv_bias && !config.qk_norm && !config.tied && config.eos.is_empty());
        let mut json = llama();
        json.as_object_mut().unwrap().remove("num_key_value_heads");
        assert_eq!(read(&json).unwrap().kv_heads, 6);
        assert_eq!(read(&with("head_dim", Value::Null)).unwrap().head_dim, 16);
        assert_eq!(read(&with("rope_theta", Value::Null)).unwrap().rope.theta, 10000.0);
        assert_eq!(read(&with("head_dim", json!(32))).unwrap().q_dim(), 192);
    }

    #[test]
    fn architectures_differ_in_biases_and_norms() {
        let switches = |name| {
            let config = read(&with("architectures", json!([name]))).unwrap();
            (config.qkv_bias, config.qk_norm)
        };
        assert_eq!(switches("LlamaForCausalLM"), (false, false));
        assert_eq!(switches("Qwen2ForCausalLM"), (true, false));
        assert_eq!(switches("Qwen3ForCausalLM"), (false, true));
        assert!(read(&with("attention_bias", json!(true))).unwrap().qkv_bias);
    }

    #[test]
    fn both_rope_dialects_read_the_same() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let older = read(&with("rope_scaling", scaling.clone())).unwrap().rope;
        let mut newer = with("rope_parameters", scaling);
        newer["rope_parameters"]["rope_theta"] = json!(10000.0);
        newer.as_object_mut().unwrap().remove("rope_theta");
        assert_eq!(read(&newer).unwrap().rope, older);
        assert_eq!(older.theta, 10000.0);
        assert!(matches!(older.scaling, RopeScaling::Llama3 { original_max_positions: 8192.0, .. }));
        let oldest = read(&with("rope_scaling", json!({"type": "linear", "factor": 2.0}))).unwrap().rope;
        assert_eq!(oldest.scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn eos_is_one_token_or_several() {
        assert_eq!(read(&with("eos_token_id", json!(2))).unwrap().eos, [2]);
        assert_eq!(read(&with("eos_token_id", json!([2, 7]))).unwrap().eos, [2, 7]);
        assert!(read(&with("eos_token_id", Value::Null)).unwrap().eos.is_empty());
    }

    #[test]
    fn refusals_name_the_key_and_the_value() {
        let cases = [
            ("architectures", json!(["MambaForCausalLM"]), "MambaForCausalLM is not supported; supported: Llama"),
            ("hc_mult", json!(4), "LlamaForCausalLM with hyper-connections (hc_mult) is not supported"),
            ("dspark_block_size", json!(5), "with a DSpark drafter of its own (dspark_block_size) is not supported"),
            ("hidden_size", json!(0), "hidden_size is 0"),
            ("hidden_size", json!(-8), "hidden_size is -8"),
            ("hidden_size", json!(100), "hidden_size is 100, kernels need a multiple of 8"),
            ("intermediate_size", Value::Null, "intermediate_size is null"),
            ("num_attention_heads", json!(5), "num_attention_heads is 5, not a multiple of"),
            ("head_dim", json!(12), "head_dim is 12"),
            ("head_dim", json!(512), "head_dim is 512"),
            ("num_attention_heads", json!(1000), "head_dim is 0"),
            ("hidden_act", json!("gelu"), "hidden_act is gelu"),
            ("mlp_bias", json!(true), "mlp_bias is true"),
            ("use_sliding_window", json!(true), "use_sliding_window is true"),
            ("layer_types", json!(["full_attention", "sliding_attention"]), "layer_types has \"sliding_attention\""),
            ("rope_theta", json!(-1.0), "rope_theta is -1"),
            ("vocab_size", json!(1u64 << 40), "vocab_size is 1099511627776, expected 1 to"),
            ("num_hidden_layers", json!(1025), "num_hidden_layers is 1025, expected 1 to 1024"),
            ("rms_norm_eps", json!("tiny"), "rms_norm_eps is \"tiny\""),
            ("rms_norm_eps", json!(1e-60), "rms_norm_eps is 1e-60, expected a positive number"),
            ("rope_theta", json!(1e60), "rope_theta is 1e+60, expected a positive number"),
            ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), "rope_type is dynamic; supported"),
            ("rope_scaling", json!({"rope_type": "linear"}), "factor is null"),
            ("rope_parameters", json!({"rope_type": "longrope", "rope_theta": 1e4}), "rope_type is longrope"),
            ("rope_scaling", json!({"type": "yarn", "factor": 0}), "factor is 0"),
            ("rope_scaling", json!({"type": "yarn", "factor": 2, "truncate": false}), "truncate = false"),
            ("partial_rotary_factor", json!(0.5), "partial_rotary_factor is not 1"),
        ];
        for (key, value, expected) in cases {
            let message = read(&with(key, value)).unwrap_err().to_string();
            assert!(message.contains(expected), "{key}: {message}");
        }
    }
}

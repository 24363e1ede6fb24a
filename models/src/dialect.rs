//! GGUF's names for things, turned into those of the Hugging Face layout: configuration, tensors, vocabulary.

use serde_json::{Map, Value, json};

use crate::gguf::Gguf;
use crate::stored::RowOrder;
use crate::{Error, Result};

/// `general.architecture`, and what the Hugging Face library calls its class.
const ARCHITECTURES: [(&str, &str); 3] =
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")];

const MODEL_TENSORS: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// `blk.N.` and `model.layers.N.` before them.
const LAYER_TENSORS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The rope tensor of Llama 3: what each frequency is divided by.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// A vocabulary as GGUF metadata hold it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocabulary {
    /// The algorithm: `gpt2` is byte-level BPE, `llama` is SentencePiece BPE.
    pub model: String,
    /// Name of the pre-tokenizer of a `gpt2` vocabulary, e.g. `smollm`, `llama-bpe`, `qwen2`.
    pub pre: Option<String>,
    /// By token id.
    pub tokens: Vec<String>,
    /// By token id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Empty if the file has none.
    pub token_types: Vec<i64>,
    /// By token id, for `llama` vocabularies. Empty if the file has none.
    pub scores: Vec<f64>,
    /// `"left right"`, best first.
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unknown: Option<u32>,
    pub padding: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
}

/// The parts of `config.json` that a supported model needs.
pub fn config(gguf: &Gguf) -> Result<Value> {
    let keys = Keys(gguf);
    let (arch, class) = architecture(gguf)?;
    let key = |suffix: &str| format!("{arch}.{suffix}");
    if let Some(experts) = keys.integer(&key("expert_count"))?.filter(|&experts| experts > 0) {
        return Err(Error::Architecture { got: format!("{arch} with {experts} experts"), supported: supported() });
    }
    let hidden = keys.required(&key("embedding_length"))?;
    let heads = keys.required(&key("attention.head_count"))?;
    let head_dim = match keys.integer(&key("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None => hidden.checked_div(heads).ok_or_else(|| gguf.file.malformed("has 0 attention heads"))?,
    };
    let vocab = match gguf.tensors.get("token_embd.weight") {
        Some(embedding) => embedding.shape[0],
        None => return Err(missing("token_embd.weight", gguf)),
    };
    let mut config = json!({
        "architectures": [class],
        "model_type": arch,
        "hidden_size": hidden,
        "intermediate_size": keys.required(&key("feed_forward_length"))?,
        "num_hidden_layers": keys.required(&key("block_count"))?,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer(&key("attention.head_count_kv"))?.unwrap_or(heads),
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": keys.required(&key("context_length"))?,
        "rms_norm_eps": keys.number(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-6),
        "rope_theta": keys.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        "tie_word_embeddings": !gguf.tensors.contains_key("output.weight"),
        "attention_bias": gguf.tensors.contains_key("blk.0.attn_q.bias"),
        "bos_token_id": keys.integer("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": end_tokens(&keys)?,
    });
    if let Some(rotated) = keys.integer(&key("rope.dimension_count"))?.filter(|&rotated| rotated != head_dim) {
        config["partial_rotary_factor"] = (rotated as f64 / head_dim as f64).into();
    }
    if let Some(scaling) = rope_scaling(&keys, arch)? {
        config["rope_scaling"] = scaling;
    }
    Ok(config)
}

fn architecture(gguf: &Gguf) -> Result<(&'static str, &'static str)> {
    let keys = Keys(gguf);
    let got = keys.string("general.architecture")?.unwrap_or("(none)");
    let known = ARCHITECTURES.into_iter().find(|(arch, _)| *arch == got);
    known.ok_or_else(|| Error::Architecture { got: got.into(), supported: supported() })
}

fn supported() -> String {
    ARCHITECTURES.map(|(arch, _)| arch).join(", ")
}

/// The tokens that end a text: of a document, and of a turn where that is another one.
fn end_tokens(keys: &Keys) -> Result<Value> {
    let mut ends = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ends.extend(keys.integer(key)?.filter(|end| !ends.contains(end)));
    }
    Ok(match ends[..] {
        [] => Value::Null,
        [end] => end.into(),
        _ => ends.into(),
    })
}

fn rope_scaling(keys: &Keys, arch: &str) -> Result<Option<Value>> {
    let key = |suffix: &str| format!("{arch}.rope.{suffix}");
    let kind = keys.string(&key("scaling.type"))?;
    let factor = match keys.number(&key("scaling.factor"))? {
        Some(factor) => Some(factor),
        None => keys.number(&key("scale_linear"))?,
    };
    let (Some(factor), false) = (factor, kind == Some("none")) else { return Ok(None) };
    let mut scaling = json!({ "rope_type": kind.unwrap_or("linear"), "factor": factor });
    if let Some(original) = keys.integer(&key("scaling.original_context_length"))? {
        scaling["original_max_position_embeddings"] = original.into();
    }
    Ok(Some(scaling))
}

/// Gives tensors their Hugging Face names, and marks those with interleaved rows: the converter of llama.cpp reorders
/// the query and key rows (weight and bias) of the architecture it calls `llama`, and of no other one here.
///
/// A tensor that is not in the tables keeps its own name.
pub fn rename_tensors(gguf: &mut Gguf, config: &Value) {
    let heads = |key: &str| config[key].as_u64().unwrap_or(0) as usize;
    let interleaved = config["model_type"] == "llama";
    let tensors = std::mem::take(&mut gguf.tensors);
    for (name, mut stored) in tensors {
        let (stem, suffix) = name.rsplit_once('.').unwrap_or((&name, ""));
        let part = stem.rsplit('.').next();
        if interleaved && part == Some("attn_q") {
            stored.rows = RowOrder::Interleaved { heads: heads("num_attention_heads") };
        } else if interleaved && part == Some("attn_k") {
            stored.rows = RowOrder::Interleaved { heads: heads("num_key_value_heads") };
        }
        let renamed = rename(stem).map(|stem| format!("{stem}.{suffix}"));
        gguf.tensors.insert(renamed.unwrap_or(name), stored);
    }
}

fn rename(stem: &str) -> Option<String> {
    let look_up = |table: &[(&str, &'static str)], wanted: &str| {
        table.iter().find(|(gguf, _)| *gguf == wanted).map(|(_, renamed)| *renamed)
    };
    match stem.strip_prefix("blk.") {
        None => look_up(&MODEL_TENSORS, stem).map(str::to_owned),
        Some(rest) => {
            let (layer, part) = rest.split_once('.')?;
            look_up(&LAYER_TENSORS, part).map(|part| format!("model.layers.{layer}.{part}"))
        }
    }
}

/// Takes the vocabulary out of the metadata.
pub fn take_vocabulary(gguf: &mut Gguf) -> Result<GgufVocabulary> {
    let take = |gguf: &mut Gguf, key: &str| match gguf.metadata.remove(&format!("tokenizer.ggml.{key}")) {
        Some(Value::Array(values)) => values,
        _ => Vec::new(),
    };
    let strings = |key: &str, values: Vec<Value>, gguf: &Gguf| {
        let string = |value| match value {
            Value::String(string) => Ok(string),
            other => Err(gguf.file.malformed(format!("metadata tokenizer.ggml.{key} holds {other}, not a string"))),
        };
        values.into_iter().map(string).collect::<Result<Vec<_>>>()
    };
    let (tokens, merges) = (take(gguf, "tokens"), take(gguf, "merges"));
    let token_types = take(gguf, "token_type").iter().filter_map(Value::as_i64).collect();
    let scores = take(gguf, "scores").iter().filter_map(Value::as_f64).collect();
    let keys = Keys(gguf);
    let id = |key: &str| -> Result<Option<u32>> {
        let id = keys.integer(&format!("tokenizer.ggml.{key}_token_id"))?;
        Ok(id.and_then(|id| u32::try_from(id).ok()))
    };
    let flag = |key: &str| gguf.metadata.get(&format!("tokenizer.ggml.{key}")).and_then(Value::as_bool);
    Ok(GgufVocabulary {
        model: keys.string("tokenizer.ggml.model")?.unwrap_or_default().to_owned(),
        pre: keys.string("tokenizer.ggml.pre")?.map(str::to_owned),
        tokens: strings("tokens", tokens, gguf)?,
        token_types,
        scores,
        merges: strings("merges", merges, gguf)?,
        bos: id("bos")?,
        eos: id("eos")?,
        unknown: id("unknown")?,
        padding: id("padding")?,
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
    })
}

/// The parts of `tokenizer_config.json` that prompting needs.
pub fn tokenizer_config(vocabulary: &GgufVocabulary, metadata: &Map<String, Value>) -> Value {
    let text = |id: Option<u32>| id.and_then(|id| vocabulary.tokens.get(id as usize));
    json!({
        "chat_template": metadata.get("tokenizer.chat_template"),
        "bos_token": text(vocabulary.bos),
        "eos_token": text(vocabulary.eos),
        "unk_token": text(vocabulary.unknown),
        "pad_token": text(vocabulary.padding),
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
    })
}

fn missing(name: &str, gguf: &Gguf) -> Error {
    Error::MissingTensor { name: name.into(), context: format!("{} does not hold it", gguf.file.path.display()) }
}

/// Typed access to metadata; a value of another type is an error that names the key.
struct Keys<'a>(&'a Gguf);

impl Keys<'_> {
    fn get<'a, T>(&'a self, key: &str, expected: &str, convert: fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.0.metadata.get(key) else { return Ok(None) };
        let converted = convert(value);
        if converted.is_none() {
            return Err(self.0.file.malformed(format!("metadata {key} is {}, expected {expected}", shortened(value))));
        }
        Ok(converted)
    }

    fn string(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a string", Value::as_str)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", Value::as_f64)
    }

    fn integer(&self, key: &str) -> Result<Option<u64>> {
        self.get(key, "an integer of at least 0", Value::as_u64)
    }

    fn required(&self, key: &str) -> Result<u64> {
        self.integer(key)?.ok_or_else(|| self.0.file.malformed(format!("metadata {key} is missing")))
    }
}

fn shortened(value: &Value) -> String {
    match value {
        Value::Array(values) => format!("an array of {}", values.len()),
        other => other.to_string().chars().take(60).collect(),
    }
}

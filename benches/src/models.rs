//! The model that is measured: a checkpoint, or one of real sizes with random weights and no files.

use anyhow::{Context, Result};
use treespark_kernel_gen::DType;
use treespark_models::config::{Rope, RopeScaling};
use treespark_models::{Config, Model, hub};

const RANDOM: &str = "random:";

/// A name or path as everywhere, or `random:NAME`.
pub fn open(name: &str) -> Result<Model> {
    match name.strip_prefix(RANDOM) {
        None => Ok(Model::open(&hub::resolve(name, &mut |_| {})?)?),
        Some(sizes) => Ok(Model::random(config(sizes)?, 0)),
    }
}

pub fn config(name: &str) -> Result<Config> {
    let (_, config) = known().into_iter().find(|(known, _)| *known == name).with_context(|| {
        let names: Vec<&str> = known().into_iter().map(|(name, _)| name).collect();
        format!("no sizes are known by the name '{name}'; there are: {}", names.join(", "))
    })?;
    Ok(config)
}

/// Sizes as their makers published them. Rope is not scaled: a table of other numbers takes no longer to read.
fn known() -> [(&'static str, Config); 4] {
    let llama = Config {
        architecture: "LlamaForCausalLM",
        hidden: 576,
        ffn: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab_size: 49152,
        max_position_embeddings: 8192,
        rms_eps: 1e-5,
        rope: Rope { theta: 1e5, scaling: RopeScaling::None },
        qkv_bias: false,
        qk_norm: false,
        tied: true,
        weight_dtype: DType::BF16,
        eos: Vec::new(),
    };
    let large = Config {
        hidden: 4096,
        ffn: 14336,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab_size: 128256,
        max_position_embeddings: 131072,
        rope: Rope { theta: 5e5, scaling: RopeScaling::None },
        tied: false,
        ..llama.clone()
    };
    let qwen = Config {
        architecture: "Qwen3ForCausalLM",
        ffn: 12288,
        layers: 36,
        vocab_size: 151936,
        max_position_embeddings: 40960,
        rms_eps: 1e-6,
        rope: Rope { theta: 1e6, scaling: RopeScaling::None },
        qk_norm: true,
        ..large.clone()
    };
    let small_qwen = Config { hidden: 1024, ffn: 3072, layers: 28, heads: 16, tied: true, ..qwen.clone() };
    [("smollm2-135m", llama), ("qwen3-0.6b", small_qwen), ("qwen3-8b", qwen), ("llama-3.1-8b", large)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_as_many_as_published() {
        for (name, millions) in
            [("smollm2-135m", 134.5), ("qwen3-0.6b", 596.0), ("qwen3-8b", 8190.7), ("llama-3.1-8b", 8030.3)]
        {
            let weights = treespark_models::llama::weights(&config(name).unwrap(), 1);
            let count: usize = weights.iter().filter(|w| w.desc.name != "rope").map(|w| w.desc.len()).sum();
            assert!((count as f64 / 1e6 - millions).abs() < 0.1, "{name} has {count} parameters");
        }
        assert!(config("gpt-5").unwrap_err().to_string().contains("qwen3-8b"));
    }

    #[test]
    fn random_models_have_all_tensors() {
        let model = open("random:smollm2-135m").unwrap();
        let config = Config { layers: 2, ..model.config().clone() };
        let model = Model::random(config, 3);
        for weight in model.weights(8) {
            let (desc, parts) = weight.unwrap();
            assert!(parts.iter().all(|part| part.dtype == desc.dtype), "{}", desc.name);
            let bytes: usize = parts.iter().map(|part| part.bytes.as_slice().len()).sum();
            assert_eq!(bytes, desc.bytes(), "{}", desc.name);
        }
    }
}

//! The model that is measured: a checkpoint, or one of real sizes with random weights and no files.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use treespark_kernel_gen::DType;
use treespark_models::config::{Rope, RopeScaling};
use treespark_models::dspark::MarkovKind;
use treespark_models::{Config, DsparkConfig, Model, Speculator, SpeculatorConfig, hub};

pub const RANDOM: &str = "random:";

/// A name or path as everywhere, `random:NAME`, or `random:PATH` of a config.json.
pub fn open(name: &str) -> Result<Model> {
    match name.strip_prefix(RANDOM) {
        None => Ok(Model::open(&hub::resolve(name, &mut |_| {})?)?),
        Some(path) if Path::new(path).exists() => Ok(Model::random_like(Path::new(path), 0)?),
        Some(sizes) => Ok(Model::random(config(sizes)?, 0)),
    }
}

/// The folder of a drafter, or `random:dspark`.
pub fn open_speculator(name: &str, target: &Config) -> Result<Speculator> {
    match name.strip_prefix(RANDOM) {
        None => Ok(Speculator::open(Path::new(name), target)?),
        Some("dspark") => {
            ensure!(
                target.layers >= 8,
                "{name} reads five layers of a target of eight at least, not {}",
                target.layers
            );
            Ok(Speculator::random(SpeculatorConfig::Dspark(dspark(target)), target, 1))
        }
        Some(other) => bail!("no drafter's sizes are known by the name '{other}'; there is: dspark"),
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
        latent: None,
        experts: None,
        next_token_layers: 0,
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

/// A DSpark drafter as those that its authors published for Qwen3: five layers like the target's, and taps spread evenly
/// over it. Embedding and head are the target's.
fn dspark(target: &Config) -> DsparkConfig {
    const LAYERS: usize = 5;
    DsparkConfig {
        backbone: Config { layers: LAYERS, tied: false, ..target.clone() },
        block: 7,
        first: 0,
        mask_token: target.vocab_size as u32 - 1,
        // Hidden state 2 is what layer 1 leaves.
        taps: (0..LAYERS).map(|i| 2 + i * (target.layers - 4) / (LAYERS - 1)).collect(),
        markov: Some((MarkovKind::Vanilla, 256)),
        confidence: Some(true),
        has_embedding: false,
        has_head: false,
        heads_on_device: false,
    }
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

    /// As the config.json of the published drafter for Qwen3-8B has it, and its file but for embedding and head.
    #[test]
    fn the_drafter_of_qwen3_8b_is_as_large_as_published() {
        let target = config("qwen3-8b").unwrap();
        let config = DsparkConfig { heads_on_device: true, ..dspark(&target) };
        assert_eq!(config.taps, [2, 10, 18, 26, 34]);
        // The keys and values of what is injected have a buffer of their own, with the same weights.
        let twice = 2 * config.backbone.layers * 2 * target.kv_dim() * target.hidden;
        let bytes = SpeculatorConfig::Dspark(config).weight_bytes(1) - twice;
        let published = 4_742_170_330 - 2 * 2 * target.vocab_size * target.hidden;
        assert!(bytes.abs_diff(published) < 1 << 20, "{bytes} bytes, published {published}");
    }

    #[test]
    fn random_drafters_have_all_tensors() {
        let target = Config { vocab_size: 1000, ..config("smollm2-135m").unwrap() };
        let speculator = Speculator::random(SpeculatorConfig::Dspark(dspark(&target)), &target, 3);
        let config = speculator.config_on_device();
        for weight in speculator.weights(&config, 8) {
            let (desc, parts) = weight.unwrap();
            let bytes: usize = parts.iter().map(|part| part.bytes.as_slice().len()).sum();
            assert_eq!(bytes, desc.bytes(), "{}", desc.name);
        }
        let numbers = speculator.confidence_numbers(&config).unwrap().unwrap();
        assert_eq!(numbers.len(), target.hidden + 256 + 1 + 2 * 7);
        assert!(numbers.iter().all(|number| number.is_finite()));
    }
}

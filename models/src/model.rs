//! A model: a checkpoint whose configuration and tensors have been found to fit each other, or for measurements a
//! configuration with random weights.
//!
//! Opening reads no weights, but proves that every tensor which the passes need is there in the right shape, and that
//! no tensor is there which they would ignore: a bias that is silently left out is a wrong model, not a smaller one.

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;
use treespark_kernel_gen::{BufferDesc, DType};

use crate::builder::{Part, Source, Weight};
use crate::chat::ChatTemplate;
use crate::checkpoint::{TokenizerSource, read_json};
use crate::config::{self, Config};
use crate::error::{Error, Result};
use crate::origin::Origin;
use crate::random::RandomTensors;
use crate::tokenizer::Tokenizer;
use crate::{Bytes, Checkpoint, Tensor, llama, rope};

/// Of a model that was not trained.
const PLAIN_CHAT: &str = "{% for message in messages %}{{ message.content }}\n{% endfor %}";

pub struct Model {
    config: Config,
    origin: Origin,
}

impl Model {
    /// Opens a folder in the Hugging Face layout, or a GGUF file.
    pub fn open(path: &Path) -> Result<Model> {
        let checkpoint = Checkpoint::open(path)?;
        let config = Config::from_json(checkpoint.config(), checkpoint.dtype(), path)?;
        check_tensors(&config, &checkpoint)?;
        check_rope_factors(&config, &checkpoint)?;
        Ok(Model { config, origin: Origin::Checkpoint(Box::new(checkpoint)) })
    }

    /// A model of the sizes in a `config.json`, or in that of a folder, with random weights. It says nothing, and is for
    /// whoever measures speed. A `tokenizer.json` beside the config is used; else each byte is a token.
    pub fn random_like(path: &Path, seed: u64) -> Result<Model> {
        if path.extension().is_some_and(|extension| extension == "gguf") {
            let problem = "sizes for random weights come from a config.json or a folder with one, not from a GGUF file";
            return Err(Error::Malformed { path: path.into(), problem: problem.into() });
        }
        let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
        let config = Config::from_json(&read_json(&file)?, DType::BF16, &file)?;
        let tokenizer = Some(file.with_file_name("tokenizer.json")).filter(|file| file.is_file());
        let mut model = Model::random(config, seed);
        if let Origin::Random(_, of_model) = &mut model.origin {
            *of_model = tokenizer;
        }
        Ok(model)
    }

    /// The same of sizes that are known already.
    pub fn random(config: Config, seed: u64) -> Model {
        let weights = llama::weights(&config, 1);
        let shapes = weights.iter().flat_map(|weight| weight.source.parts()).map(|part| &part.shape[..]);
        let tensors = RandomTensors::new(shapes, &config, seed);
        Model { config, origin: Origin::Random(tensors, None) }
    }

    /// The file or folder it came from, if it came from one.
    pub fn path(&self) -> Option<&Path> {
        self.checkpoint().map(Checkpoint::path)
    }

    fn checkpoint(&self) -> Option<&Checkpoint> {
        self.origin.checkpoint()
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the matrices are in memory.
    pub fn dtype(&self) -> DType {
        self.config.weight_dtype
    }

    /// Every weight buffer of the model's passes with the tensors that, stacked, make it. Tensors are read when the
    /// iterator reaches them, so that a caller who drops them as it goes never holds the model twice. `context` is the
    /// number of positions of the rope table.
    pub fn weights(&self, context: usize) -> impl Iterator<Item = Result<(BufferDesc, Vec<Tensor>)>> + '_ {
        self.weight_list(context).into_iter().map(move |Weight { desc, source }| {
            let parts = match source {
                Source::Stack(parts) => parts.iter().map(|part| self.origin.part(part)).collect::<Result<Vec<_>>>()?,
                Source::RopeTable => vec![self.rope_table(&desc.shape)],
            };
            Ok((desc, parts))
        })
    }

    /// Bytes of all weight buffers together.
    pub fn weight_bytes(&self, context: usize) -> usize {
        self.weight_list(context).iter().map(|weight| weight.desc.bytes()).sum()
    }

    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.origin {
            Origin::Checkpoint(checkpoint) => Tokenizer::open(&checkpoint.tokenizer_source()?),
            Origin::Random(_, Some(path)) => Tokenizer::open(&TokenizerSource::Json(path.clone())),
            Origin::Random(_, None) => Tokenizer::of_bytes(self.config.vocab_size),
        }
    }

    /// None for a model that was not trained to chat.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        let Some(checkpoint) = self.checkpoint() else { return ChatTemplate::new(PLAIN_CHAT, None, None).map(Some) };
        let Some(source) = checkpoint.chat_template() else { return Ok(None) };
        let token = |key| special_token(&checkpoint.tokenizer_config()[key]);
        ChatTemplate::new(&source, token("bos_token"), token("eos_token")).map(Some)
    }

    /// The tokens that end an answer: what the configurations name, and what the tokenizer marks as an end.
    pub fn stop_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let mut ends = self.config.eos.clone();
        if let Some(checkpoint) = self.checkpoint() {
            ends.extend(
                checkpoint.generation_config().map(|c| config::token_ids(&c["eos_token_id"])).unwrap_or_default(),
            );
            let token = special_token(&checkpoint.tokenizer_config()["eos_token"]);
            ends.extend(token.and_then(|token| tokenizer.token_id(token)));
        }
        ends.extend(tokenizer.end_tokens());
        ends.sort_unstable();
        ends.dedup();
        ends
    }

    fn weight_list(&self, context: usize) -> Vec<Weight> {
        llama::weights(&self.config, context)
    }

    fn rope_table(&self, shape: &[usize]) -> Tensor {
        let factors = self.checkpoint().and_then(Checkpoint::rope_factors);
        let frequencies = rope::inverse_frequencies(&self.config.rope, self.config.rotated(), factors.as_deref());
        let table = rope::table(&frequencies, shape[0], self.config.rope.attention_factor());
        let bytes = table.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor { dtype: DType::F32, shape: shape.to_vec(), bytes: Bytes::from_vec(bytes) }
    }
}

fn check_tensors(config: &Config, checkpoint: &Checkpoint) -> Result<()> {
    let mut used = HashSet::new();
    for weight in llama::weights(config, 1) {
        let Source::Stack(parts) = weight.source else { continue };
        for Part { tensor: name, shape: expected, .. } in parts {
            match checkpoint.shape(&name) {
                Some(got) if got == expected => used.insert(name),
                Some(got) => return Err(Error::TensorShape { name, expected, got: got.to_vec() }),
                None => {
                    let (model, path) = (config.architecture, checkpoint.path().display());
                    let context = format!("{model} as configured in {path} needs it");
                    return Err(Error::MissingTensor { name, context });
                }
            };
        }
    }
    let is_left = |name: &String| !used.contains(name) && !is_redundant(name) && !config.is_of_next_tokens(name);
    match checkpoint.names().find(is_left) {
        Some(name) => Err(malformed(
            checkpoint,
            format!(
                "tensor {name} is not part of {} as it is configured: leaving it out would give a different model",
                config.architecture
            ),
        )),
        None => Ok(()),
    }
}

fn check_rope_factors(config: &Config, checkpoint: &Checkpoint) -> Result<()> {
    let (frequencies, factors) = (config.rotated() / 2, checkpoint.rope_factors());
    match factors.map(|factors| factors.len()).filter(|&len| len != frequencies) {
        Some(len) => {
            let problem = format!("holds {len} rope factors, the heads have {frequencies} frequencies");
            Err(malformed(checkpoint, problem))
        }
        None => Ok(()),
    }
}

fn malformed(checkpoint: &Checkpoint, problem: String) -> Error {
    Error::Malformed { path: checkpoint.path().to_path_buf(), problem }
}

/// Tensors that repeat what is known without them: a tied head, and frequencies that old checkpoints store.
fn is_redundant(name: &str) -> bool {
    name == "lm_head.weight" || name.ends_with(".rotary_emb.inv_freq")
}

/// A special token in a `tokenizer_config.json`: a string, or an object with its content.
fn special_token(value: &Value) -> Option<&str> {
    value.as_str().or(value["content"].as_str())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use ::safetensors::tensor::{Dtype, TensorView};
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify-tests/fixtures/parity").join(name)
    }

    /// A copy of the tiny Llama with a changed config, and tensors added, reshaped (same name) or removed (no rows).
    fn changed(config: &[(&str, Value)], tensors: &[(&str, &[usize])]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let text = std::fs::read(fixture("tiny-llama").join("config.json")).unwrap();
        let mut json: Value = serde_json::from_slice(&text).unwrap();
        for (key, value) in config {
            json[*key] = value.clone();
        }
        std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();

        let bytes = std::fs::read(fixture("tiny-llama").join("model.safetensors")).unwrap();
        let file = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all: BTreeMap<String, TensorView> = file.tensors().into_iter().collect();
        let zeros = vec![0; 1 << 20];
        for (name, shape) in tensors {
            all.remove(*name);
            if !shape.is_empty() {
                let len = shape.iter().product::<usize>() * 4;
                let view = TensorView::new(Dtype::F32, shape.to_vec(), &zeros[..len]).unwrap();
                all.insert(name.to_string(), view);
            }
        }
        ::safetensors::serialize_to_file(&all, None, &folder.path().join("model.safetensors")).unwrap();
        folder
    }

    fn problem(config: &[(&str, Value)], tensors: &[(&str, &[usize])]) -> String {
        match Model::open(changed(config, tensors).path()) {
            Ok(_) => panic!("was accepted"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn parts_stack_up_to_their_buffers() {
        for name in
            ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-deepseek-v2-lite", "tiny-deepseek-v2", "tiny-deepseek-v3"]
        {
            let model = Model::open(&fixture(name)).unwrap();
            let mut loaded = 0;
            for item in model.weights(64) {
                let (desc, parts) = item.unwrap();
                assert!(parts.iter().all(|part| part.dtype == desc.dtype), "{}", desc.name);
                assert!(parts.iter().all(|part| part.shape[1..] == desc.shape[1..]), "{}", desc.name);
                assert_eq!(parts.iter().map(|part| part.shape[0]).sum::<usize>(), desc.shape[0], "{}", desc.name);
                assert_eq!(parts.iter().map(|part| part.bytes.as_slice().len()).sum::<usize>(), desc.bytes());
                loaded += 1;
            }
            assert_eq!(loaded, model.weight_list(64).len());
        }
    }

    #[test]
    fn the_fused_projection_is_q_then_k_then_v() {
        let model = Model::open(&fixture("tiny-qwen2")).unwrap();
        let part = |letter| {
            model.checkpoint().unwrap().tensor(&format!("model.layers.1.self_attn.{letter}_proj.weight")).unwrap()
        };
        let (_, parts) = model.weights(8).map(Result::unwrap).find(|(desc, _)| desc.name == "layers.1.qkv").unwrap();
        let expected = ["q", "k", "v"].map(part);
        assert_eq!(parts.len(), 3);
        for (got, expected) in parts.iter().zip(&expected) {
            assert_eq!(got.bytes.as_slice(), expected.bytes.as_slice());
        }
    }

    #[test]
    fn the_rope_table_has_the_asked_context() {
        let model = Model::open(&fixture("tiny-llama")).unwrap();
        let (desc, parts) = model.weights(5).map(Result::unwrap).find(|(desc, _)| desc.name == "rope").unwrap();
        assert_eq!(desc.shape, [5, 8, 2]);
        // Cosine and sine of position 0, first frequency.
        assert_eq!(parts[0].bytes.as_slice()[..8], [0, 0, 0x80, 0x3f, 0, 0, 0, 0]);
    }

    #[test]
    fn biases_are_loaded_where_the_config_says_so_and_refused_elsewhere() {
        let bias: Vec<(String, Vec<usize>)> = (0..3)
            .flat_map(|layer| ["q", "k", "v"].map(|letter| (layer, letter)))
            .map(|(layer, letter)| {
                (
                    format!("model.layers.{layer}.self_attn.{letter}_proj.bias"),
                    vec![if letter == "q" { 96 } else { 32 }],
                )
            })
            .collect();
        let mut biases: Vec<(&str, &[usize])> = bias.iter().map(|(name, shape)| (&name[..], &shape[..])).collect();
        let with_bias = [("attention_bias", json!(true))];
        assert!(Model::open(changed(&with_bias, &biases).path()).unwrap().config().qkv_bias);
        assert!(problem(&[], &biases).contains("model.layers.0.self_attn.k_proj.bias is not part of LlamaForCausalLM"));
        assert!(problem(&with_bias, &[]).contains("model.layers.0.self_attn.q_proj.bias is missing"));
        biases.push(("model.layers.2.self_attn.o_proj.bias", &[96]));
        assert!(problem(&with_bias, &biases).contains("model.layers.2.self_attn.o_proj.bias is not part of"));
    }

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let wrong = problem(&[], &[("model.layers.1.mlp.down_proj.weight", &[96, 128])]);
        assert_eq!(wrong, "tensor model.layers.1.mlp.down_proj.weight has shape [96, 128], expected [96, 136]");
        assert!(problem(&[], &[("model.norm.weight", &[])]).contains("tensor model.norm.weight is missing"));
        assert!(problem(&[("vocab_size", json!(176))], &[]).contains("expected [176, 96]"));
        assert!(problem(&[("num_hidden_layers", json!(2))], &[]).contains("model.layers.2.input_layernorm.weight"));
        let tied = changed(&[("tie_word_embeddings", json!(true))], &[]);
        assert!(Model::open(tied.path()).unwrap().weights(8).all(|item| item.unwrap().0.name != "head"));
    }

    #[test]
    fn a_config_alone_is_enough_for_random_weights() {
        for name in ["tiny-llama", "tiny-deepseek-v2-lite", "tiny-deepseek-v3"] {
            let real = Model::open(&fixture(name)).unwrap();
            let random = Model::random_like(&fixture(name).join("config.json"), 1).unwrap();
            let described =
                |model: &Model| model.weight_list(8).into_iter().map(|weight| weight.source).collect::<Vec<_>>();
            assert_eq!(described(&random), described(&real));
            for item in random.weights(8) {
                let (desc, parts) = item.unwrap();
                assert_eq!(
                    parts.iter().map(|part| part.bytes.as_slice().len()).sum::<usize>(),
                    desc.bytes(),
                    "{}",
                    desc.name
                );
            }
        }
    }

    #[test]
    fn random_weights_of_a_gguf_file_are_refused_with_what_is_wanted() {
        let message = Model::random_like(Path::new("some/model.gguf"), 1).map(|_| ()).unwrap_err().to_string();
        assert!(
            message.contains("some/model.gguf") && message.contains("a config.json or a folder with one"),
            "{message}"
        );
    }

    #[test]
    fn ends_come_from_every_file_that_names_them() {
        let folder = changed(&[("eos_token_id", json!(7))], &[]);
        std::fs::write(folder.path().join("generation_config.json"), json!({"eos_token_id": [9, 7]}).to_string())
            .unwrap();
        let json = json!({"eos_token": {"content": "c"}, "chat_template": "{{ bos_token }}|{{ eos_token }}"});
        std::fs::write(folder.path().join("tokenizer_config.json"), json.to_string()).unwrap();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "truncation": null, "padding": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []},
        });
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let model = Model::open(folder.path()).unwrap();
        assert_eq!(model.stop_tokens(&model.tokenizer().unwrap()), [2, 7, 9]);
        assert_eq!(model.chat_template().unwrap().unwrap().render(&[], false).unwrap(), "|c");
    }
}

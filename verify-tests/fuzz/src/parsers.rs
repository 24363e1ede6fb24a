//! One function for each parser: takes the bytes of a hostile file, and does with them what the program would do.
//!
//! Whatever the bytes are, a function returns; it asserts only what holds of everything that was accepted. The fuzz
//! targets call these functions, and so does a test of the stable build (`models/tests/hostile_files.rs`), which
//! includes this very file.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use treespark_kernel_gen::{DType, TreeShape, draw::draw};
use treespark_models::checkpoint::TokenizerSource;
use treespark_models::{ChatTemplate, Checkpoint, Config, Message, Model, Speculator, Tokenizer};

/// A parser: its name, which is that of its folder of the corpus, its function, and how much it may allocate.
pub struct Parser {
    pub name: &'static str,
    pub run: fn(&Files, &[u8]),
    /// Bytes allocated at any time for a byte of input, besides [`Parser::fixed`].
    pub multiple: usize,
    /// Bytes allocated at any time that the input has nothing to do with.
    pub fixed: usize,
}

const MIB: usize = 1 << 20;

/// A `serde_json::Value` is 72 bytes, and an array of digits has one for two bytes of text (GGUF: one for a byte, in a
/// vector that may be twice as long as it is full): hence 256. A tokenizer builds automata of its tokens and expressions. A
/// template has fuel for 4 million steps, each worth 64 bytes.
pub const PARSERS: [Parser; 9] = [
    Parser { name: "safetensors", run: safetensors, multiple: 256, fixed: MIB },
    Parser { name: "shards", run: shards, multiple: 256, fixed: MIB },
    Parser { name: "gguf", run: gguf, multiple: 256, fixed: 16 * MIB },
    Parser { name: "gguf_vocabulary", run: gguf_vocabulary, multiple: 1024, fixed: 64 * MIB },
    Parser { name: "target_config", run: target_config, multiple: 256, fixed: 4 * MIB },
    Parser { name: "drafter_config", run: drafter_config, multiple: 256, fixed: 4 * MIB },
    Parser { name: "tokenizer", run: tokenizer, multiple: 1024, fixed: 64 * MIB },
    Parser { name: "tree", run: tree, multiple: 64, fixed: MIB },
    Parser { name: "chat_template", run: chat_template, multiple: 1024, fixed: 512 * MIB },
];

/// Folders in which everything is sound but for the one file that is under test.
pub struct Files {
    root: PathBuf,
    target: Config,
    small_target: Config,
}

impl Files {
    /// `root` is an empty folder, best one in memory.
    pub fn new(root: &Path) -> Files {
        let write = |name: &str, bytes: &[u8]| {
            let path = root.join(name);
            fs::create_dir_all(path.parent().expect("below the root")).expect("a folder that can be written to");
            fs::write(path, bytes).expect("a folder that can be written to");
        };
        write("safetensors/config.json", b"{}");
        write("shards/config.json", b"{}");
        for shard in ["a.safetensors", "b.safetensors"] {
            write(&format!("shards/{shard}"), &tensors(&[(shard, &[2, 8]), ("both", &[8])]));
        }
        write("target/model.safetensors", &tensors(&target_tensors()));
        write("tokenizer/tokenizer.json", b"");
        write("gguf/model.gguf", b"");
        write("dspark/model.safetensors", &tensors(&dspark_tensors()));
        write("medusa/medusa_lm_head.safetensors", &tensors(&MEDUSA_TENSORS));
        let target = |layers| {
            let mut json = target_config_json();
            json["num_hidden_layers"] = layers;
            Config::from_json(&json, DType::F32, Path::new("config.json")).expect("a sound config")
        };
        Files { root: root.into(), target: target(json!(6)), small_target: target(json!(1)) }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.root.join(name);
        fs::write(&path, bytes).expect("a folder that can be written to");
        path
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

/// A whole `model.safetensors`.
pub fn safetensors(files: &Files, bytes: &[u8]) {
    files.write("safetensors/model.safetensors", bytes);
    read_all(&files.folder("safetensors"));
}

/// A `model.safetensors.index.json` beside two shards.
pub fn shards(files: &Files, bytes: &[u8]) {
    files.write("shards/model.safetensors.index.json", bytes);
    read_all(&files.folder("shards"));
}

/// A whole GGUF file: header, tensors, configuration.
pub fn gguf(files: &Files, bytes: &[u8]) {
    let path = files.write("gguf/model.gguf", bytes);
    read_all(&path);
    if let Ok(model) = Model::open(&path) {
        model.weights(8).for_each(drop);
    }
}

/// The same for its vocabulary and its template. Apart, since making a tokenizer takes a hundred times as long.
pub fn gguf_vocabulary(files: &Files, bytes: &[u8]) {
    let path = files.write("gguf/vocabulary.gguf", bytes);
    let Ok(checkpoint) = Checkpoint::open(&path) else { return };
    checkpoint.chat_template();
    if let Ok(tokenizer) = checkpoint.tokenizer_source().and_then(|source| Tokenizer::open(&source)) {
        use_tokenizer(&tokenizer);
    }
}

/// A model's `config.json`, `generation_config.json` and `tokenizer_config.json`, all three the same.
pub fn target_config(files: &Files, bytes: &[u8]) {
    for name in ["config.json", "generation_config.json", "tokenizer_config.json"] {
        files.write(&format!("target/{name}"), bytes);
    }
    if let Ok(model) = Model::open(&files.folder("target")) {
        use_model(&model);
    }
}

/// A drafter's `config.json`, and behind a zero byte its `calibration.json`: DSpark and DFlash in both dialects, Medusa.
pub fn drafter_config(files: &Files, bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |&byte| byte == 0);
    let (config, calibration) = (parts.next().unwrap_or_default(), parts.next().unwrap_or(b"{}"));
    for folder in ["dspark", "medusa"] {
        files.write(&format!("{folder}/config.json"), config);
        files.write(&format!("{folder}/calibration.json"), calibration);
        let folder = files.folder(folder);
        if !Speculator::is_at(&folder) {
            return;
        }
        for target in [&files.target, &files.small_target] {
            let Ok(speculator) = Speculator::open(&folder, target) else { continue };
            for config in [speculator.config().clone(), speculator.config_on_device()] {
                speculator.weights(&config, 8).for_each(drop);
                speculator.confidence_numbers(&config).ok();
                assert!(config.block().rows <= 64, "a block of {} rows", config.block().rows);
            }
            speculator.sequential_heads().ok();
        }
    }
}

/// A `tokenizer.json`.
pub fn tokenizer(files: &Files, bytes: &[u8]) {
    let path = files.write("tokenizer/tokenizer.json", bytes);
    if let Ok(tokenizer) = Tokenizer::open(&TokenizerSource::Json(path)) {
        use_tokenizer(&tokenizer);
    }
}

/// The text of a tree, or of a file that holds one.
pub fn tree(_: &Files, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Ok(shape) = text.parse::<TreeShape>() else { return };
    let parents = shape.parents();
    assert!((1..=treespark_kernel_gen::MAX_NODES).contains(&shape.len()));
    assert!(parents.iter().enumerate().all(|(node, &parent)| node == 0 && parent == 0 || (parent as usize) < node));
    assert_eq!(shape.to_string().parse().as_ref(), Ok(&shape), "{shape}");
    draw(&shape, |node| node.to_string());
}

/// A chat template, rendered for two messages.
pub fn chat_template(_: &Files, bytes: &[u8]) {
    let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(bytes), Some("<s>"), None) else { return };
    let messages = [Message::system("Be brief."), Message::user("Hi <there>")];
    template.render(&messages, true).ok();
}

/// Opens a checkpoint and reads every tensor that can be read.
fn read_all(path: &Path) {
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    for name in checkpoint.names() {
        let Ok(tensor) = checkpoint.tensor(&name) else { continue };
        let elements = tensor.shape.iter().product::<usize>();
        assert_eq!(elements * tensor.dtype.size(), tensor.bytes.as_slice().len(), "{name} of shape {:?}", tensor.shape);
        // Every byte is there to be read.
        std::hint::black_box(tensor.bytes.as_slice().iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)));
    }
}

fn use_model(model: &Model) {
    model.weights(8).for_each(drop);
    if let Ok(tokenizer) = model.tokenizer() {
        model.stop_tokens(&tokenizer);
    }
    model.chat_template().ok();
}

fn use_tokenizer(tokenizer: &Tokenizer) {
    let mut stream = tokenizer.stream();
    for (text, add_special) in [("a b<s>ab 12\n", true), ("é▁<unk>", false), ("", true)] {
        let Ok(tokens) = tokenizer.encode(text, add_special) else { continue };
        tokenizer.decode(&tokens);
        tokens.iter().for_each(|&token| drop(stream.push(token)));
    }
    (0..8).chain([u32::MAX]).for_each(|token| drop(stream.push(token)));
    stream.finish();
    tokenizer.end_tokens().count();
    tokenizer.vocab_size();
}

const TARGET: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5}"#;

fn target_config_json() -> Value {
    serde_json::from_str(TARGET).expect("JSON")
}

type Shaped = (&'static str, &'static [usize]);

const LAYER_TENSORS: [Shaped; 9] = [
    ("layers.0.input_layernorm.weight", &[8]),
    ("layers.0.self_attn.q_proj.weight", &[8, 8]),
    ("layers.0.self_attn.k_proj.weight", &[8, 8]),
    ("layers.0.self_attn.v_proj.weight", &[8, 8]),
    ("layers.0.self_attn.o_proj.weight", &[8, 8]),
    ("layers.0.post_attention_layernorm.weight", &[8]),
    ("layers.0.mlp.gate_proj.weight", &[8, 8]),
    ("layers.0.mlp.up_proj.weight", &[8, 8]),
    ("layers.0.mlp.down_proj.weight", &[8, 8]),
];

/// Of a model of one layer.
fn target_tensors() -> Vec<(String, &'static [usize])> {
    let layer = LAYER_TENSORS.iter().map(|&(name, shape)| (format!("model.{name}"), shape));
    let others: [Shaped; 3] =
        [("model.embed_tokens.weight", &[8, 8]), ("model.norm.weight", &[8]), ("lm_head.weight", &[8, 8])];
    layer.chain(others.map(|(name, shape)| (name.to_string(), shape))).collect()
}

/// Of a drafter of one layer with two taps, a Markov head and a confidence head.
fn dspark_tensors() -> Vec<(String, &'static [usize])> {
    let others: [Shaped; 9] = [
        ("layers.0.self_attn.q_norm.weight", &[8]),
        ("layers.0.self_attn.k_norm.weight", &[8]),
        ("fc.weight", &[8, 16]),
        ("hidden_norm.weight", &[8]),
        ("norm.weight", &[8]),
        ("markov_head.markov_w1.weight", &[8, 8]),
        ("markov_head.markov_w2.weight", &[8, 8]),
        ("confidence_head.proj.weight", &[1, 16]),
        ("confidence_head.proj.bias", &[1]),
    ];
    LAYER_TENSORS.iter().chain(&others).map(|&(name, shape)| (name.to_string(), shape)).collect()
}

const MEDUSA_TENSORS: [Shaped; 4] = [
    ("0.0.linear.weight", &[8, 8]),
    ("0.0.linear.bias", &[8]),
    ("1.0.linear.weight", &[8, 8]),
    ("1.0.linear.bias", &[8]),
];

/// A safetensors file of zeros in F32.
fn tensors<N: AsRef<str> + Ord>(shaped: &[(N, &'static [usize])]) -> Vec<u8> {
    let zeros = [0; 8 * 16 * 4];
    let views = shaped.iter().map(|(name, shape)| {
        let bytes = shape.iter().product::<usize>() * 4;
        (name.as_ref().to_string(), TensorView::new(Dtype::F32, shape.to_vec(), &zeros[..bytes]).expect("zeros"))
    });
    safetensors::serialize(views, None).expect("sound tensors")
}

//! GGUF files of tiny models.

use proptest::prelude::*;
use treespark_kernel_gen::DType;
use treespark_models::checkpoint::{Checkpoint, GgufVocabulary, TokenizerSource};

use crate::gguf_writer::{F16, F32, GgufParts, Meta, Q8_0, TensorPart, write_bytes};
use crate::{assert_error, f32_bytes, read_all, to_f32};

const HIDDEN: u64 = 16;
const HEADS: u64 = 4;
const KV_HEADS: u64 = 2;
const HEAD_DIM: u64 = 4;
const VOCAB: u64 = 6;

/// The element of a matrix names its place: 100 * row + column.
fn f32_matrix(name: &str, rows: u64, columns: u64) -> TensorPart {
    let data = f32_bytes((0..rows).flat_map(|row| (0..columns).map(move |column| (100 * row + column) as f32)));
    TensorPart { name: name.into(), dims: vec![columns, rows], kind: F32, data }
}

fn f32_vector(name: &str, values: &[f32]) -> TensorPart {
    TensorPart {
        name: name.into(),
        dims: vec![values.len() as u64],
        kind: F32,
        data: f32_bytes(values.iter().copied()),
    }
}

/// A model of one layer in F32.
fn tiny(arch: &'static str) -> GgufParts {
    let key = |suffix: &str| format!("{arch}.{suffix}");
    let norm = [1.0; HIDDEN as usize];
    let metadata = vec![
        ("general.architecture".into(), Meta::String(arch)),
        (key("embedding_length"), Meta::U32(HIDDEN as u32)),
        (key("feed_forward_length"), Meta::U32(24)),
        (key("block_count"), Meta::U32(1)),
        (key("context_length"), Meta::U32(64)),
        (key("attention.head_count"), Meta::U32(HEADS as u32)),
        (key("attention.head_count_kv"), Meta::U32(KV_HEADS as u32)),
        (key("attention.layer_norm_rms_epsilon"), Meta::F32(1e-5)),
        (key("rope.freq_base"), Meta::F32(500000.0)),
        ("tokenizer.ggml.model".into(), Meta::String("gpt2")),
        ("tokenizer.ggml.pre".into(), Meta::String("smollm")),
        ("tokenizer.ggml.tokens".into(), Meta::Strings(["<s>", "</s>", "a", "b", "ab", "Ġ"].map(Into::into).into())),
        ("tokenizer.ggml.token_type".into(), Meta::I32s(vec![3, 3, 1, 1, 1, 1])),
        ("tokenizer.ggml.merges".into(), Meta::Strings(vec!["a b".into()])),
        ("tokenizer.ggml.bos_token_id".into(), Meta::U32(0)),
        ("tokenizer.ggml.eos_token_id".into(), Meta::U32(1)),
        ("tokenizer.ggml.add_bos_token".into(), Meta::Bool(false)),
        ("tokenizer.chat_template".into(), Meta::String("{{ messages }}")),
    ];
    let tensors = vec![
        f32_matrix("token_embd.weight", VOCAB, HIDDEN),
        f32_vector("output_norm.weight", &norm),
        f32_vector("blk.0.attn_norm.weight", &norm),
        f32_matrix("blk.0.attn_q.weight", HEADS * HEAD_DIM, HIDDEN),
        f32_matrix("blk.0.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN),
        f32_matrix("blk.0.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN),
        f32_matrix("blk.0.attn_output.weight", HIDDEN, HIDDEN),
        f32_vector("blk.0.ffn_norm.weight", &norm),
        f32_matrix("blk.0.ffn_gate.weight", 24, HIDDEN),
        f32_matrix("blk.0.ffn_up.weight", 24, HIDDEN),
        f32_matrix("blk.0.ffn_down.weight", HIDDEN, 24),
    ];
    GgufParts { version: 3, alignment: 32, metadata, tensors }
}

/// Which stored row each row of a matrix of [`f32_matrix`] is.
fn rows_of(checkpoint: &Checkpoint, name: &str) -> Vec<u32> {
    let tensor = checkpoint.tensor(name).unwrap();
    let (rows, columns) = (tensor.shape[0], tensor.shape[1..].iter().product::<usize>());
    let values = to_f32(&tensor);
    assert_eq!(values.len(), rows * columns);
    for row in values.chunks_exact(columns) {
        assert!(row.iter().enumerate().all(|(column, x)| *x == row[0] + column as f32), "{name}: a row is torn");
    }
    values.iter().step_by(columns).map(|x| (x / 100.0) as u32).collect()
}

#[test]
fn a_llama_in_the_hugging_face_dialect() {
    let checkpoint = tiny("llama").open();
    let expected = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 6,
        "max_position_embeddings": 64, "rms_norm_eps": f64::from(1e-5f32), "rope_theta": 500000.0,
        "tie_word_embeddings": true, "attention_bias": false, "bos_token_id": 0, "eos_token_id": 1,
    });
    assert_eq!(*checkpoint.config(), expected);
    let layer = [
        "input_layernorm",
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "post_attention_layernorm",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ];
    let mut names = vec!["model.embed_tokens.weight".to_string()];
    names.extend(layer.map(|part| format!("model.layers.0.{part}.weight")));
    names.push("model.norm.weight".into());
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), names);
    assert!(checkpoint.has("model.norm.weight") && !checkpoint.has("lm_head.weight"));
    assert_eq!(checkpoint.shape("model.layers.0.mlp.down_proj.weight"), Some(&[16, 24][..]));
    assert_eq!(rows_of(&checkpoint, "model.embed_tokens.weight"), [0, 1, 2, 3, 4, 5]);
    assert_eq!(checkpoint.dtype(), DType::F32);
    let missing = checkpoint.tensor("lm_head.weight").unwrap_err().to_string();
    assert!(missing.contains("lm_head.weight") && missing.contains("11 tensors"), "{missing}");
}

#[test]
fn the_vocabulary_and_the_template() {
    let checkpoint = tiny("llama").open();
    let expected = GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("smollm".into()),
        tokens: ["<s>", "</s>", "a", "b", "ab", "Ġ"].map(Into::into).into(),
        token_types: vec![3, 3, 1, 1, 1, 1],
        merges: vec!["a b".into()],
        bos: Some(0),
        eos: Some(1),
        add_bos: Some(false),
        ..GgufVocabulary::default()
    };
    assert_eq!(checkpoint.tokenizer_source().unwrap(), TokenizerSource::Gguf(expected));
    assert_eq!(checkpoint.chat_template().as_deref(), Some("{{ messages }}"));
    assert_eq!(checkpoint.tokenizer_config()["bos_token"], "<s>");
    assert_eq!(checkpoint.tokenizer_config()["eos_token"], "</s>");
    assert!(checkpoint.generation_config().is_none());
}

#[test]
fn interleaved_rows_of_llama_are_put_back() {
    let mut parts = tiny("llama");
    parts.tensors.push(f32_vector("blk.0.attn_k.bias", &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]));
    let checkpoint = parts.open();
    // A head of 4 is stored as dimensions 0, 2, 1, 3: rotated pairs (0, 2) and (1, 3) side by side.
    let expected = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15];
    assert_eq!(rows_of(&checkpoint, "model.layers.0.self_attn.q_proj.weight"), expected);
    assert_eq!(rows_of(&checkpoint, "model.layers.0.self_attn.k_proj.weight"), expected[..8]);
    assert_eq!(rows_of(&checkpoint, "model.layers.0.self_attn.v_proj.weight"), [0, 1, 2, 3, 4, 5, 6, 7]);
    let bias = to_f32(&checkpoint.tensor("model.layers.0.self_attn.k_proj.bias").unwrap());
    assert_eq!(bias, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
}

#[test]
fn qwen_keeps_its_rows_and_has_biases_or_head_norms() {
    for (arch, class) in [("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")] {
        let mut parts = tiny(arch);
        parts.tensors.push(f32_matrix("output.weight", VOCAB, HIDDEN));
        parts.tensors.push(f32_vector("blk.0.attn_q.bias", &[1.0; 16]));
        parts.tensors.push(f32_vector("blk.0.attn_q_norm.weight", &[2.0; 4]));
        parts.tensors.push(f32_vector("blk.0.attn_k_norm.weight", &[3.0; 4]));
        parts.set(&format!("{arch}.attention.key_length"), Meta::U32(4));
        let checkpoint = parts.open();
        assert_eq!(checkpoint.config()["architectures"][0], class);
        assert_eq!(checkpoint.config()["tie_word_embeddings"], false);
        assert_eq!(checkpoint.config()["attention_bias"], true);
        assert_eq!(rows_of(&checkpoint, "model.layers.0.self_attn.q_proj.weight"), (0..16).collect::<Vec<_>>());
        let value = |name: &str| to_f32(&checkpoint.tensor(name).unwrap())[0];
        assert_eq!(value("model.layers.0.self_attn.q_proj.bias"), 1.0);
        assert_eq!(value("model.layers.0.self_attn.q_norm.weight"), 2.0);
        assert_eq!(value("model.layers.0.self_attn.k_norm.weight"), 3.0);
        assert!(checkpoint.has("lm_head.weight"));
    }
}

#[test]
fn rope_and_end_tokens_in_their_variants() {
    let mut parts = tiny("llama");
    parts.tensors.push(f32_vector("rope_freqs.weight", &[1.0, 8.0]));
    parts.set("llama.rope.scaling.type", Meta::String("yarn"));
    parts.set("llama.rope.scaling.factor", Meta::F32(4.0));
    parts.set("llama.rope.scaling.original_context_length", Meta::U32(32));
    parts.set("llama.rope.dimension_count", Meta::U32(2));
    parts.set("tokenizer.ggml.eot_token_id", Meta::U32(4));
    parts.set("tokenizer.ggml.eom_token_id", Meta::U32(1));
    let checkpoint = parts.open();
    assert_eq!(checkpoint.rope_factors(), Some(vec![1.0, 8.0]));
    assert!(!checkpoint.has("rope_freqs.weight"));
    let scaling = serde_json::json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    assert_eq!(checkpoint.config()["rope_scaling"], scaling);
    assert_eq!(checkpoint.config()["partial_rotary_factor"], 0.5);
    assert_eq!(checkpoint.config()["eos_token_id"], serde_json::json!([1, 4]));
    assert_eq!(tiny("llama").open().rope_factors(), None);
}

/// Q8_0 blocks of scale 1 whose integers count up, as bytes.
fn q8_0(name: &str, rows: u64, columns: u64) -> TensorPart {
    let blocks = rows * columns / 32;
    let block = |_| [vec![0x00, 0x3c], (0..32).collect()].concat();
    TensorPart { name: name.into(), dims: vec![columns, rows], kind: Q8_0, data: (0..blocks).flat_map(block).collect() }
}

#[test]
fn matrices_share_one_dtype_and_vectors_are_f32() {
    let mut parts = tiny("llama");
    *parts.tensor("blk.0.ffn_down.weight") = q8_0("blk.0.ffn_down.weight", HIDDEN, 32);
    let checkpoint = parts.open();
    assert_eq!(checkpoint.dtype(), DType::BF16);
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(&name).unwrap();
        assert_eq!(tensor.dtype, if tensor.shape.len() == 1 { DType::F32 } else { DType::BF16 }, "{name}");
        let elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.bytes.as_slice().len(), elements * tensor.dtype.size(), "{name}");
    }
    let down = to_f32(&checkpoint.tensor("model.layers.0.mlp.down_proj.weight").unwrap());
    assert!(down.chunks_exact(32).all(|block| block.iter().enumerate().all(|(i, x)| *x == i as f32)));

    let mut halves = tiny("llama");
    for tensor in halves.tensors.iter_mut().filter(|tensor| tensor.dims.len() == 2) {
        tensor.kind = F16;
        let values = tensor.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        tensor.data = values.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect();
    }
    let checkpoint = halves.open();
    assert_eq!(checkpoint.dtype(), DType::F16);
    assert_eq!(rows_of(&checkpoint, "model.layers.0.self_attn.q_proj.weight")[..4], [0, 2, 1, 3]);
}

#[test]
fn every_metadata_type_in_both_versions() {
    for version in [2, 3] {
        let mut parts = tiny("llama");
        parts.version = version;
        parts.alignment = 64;
        parts.set("general.alignment", Meta::U32(64));
        for (kind, bytes) in [1, 1, 2, 2, 4, 4, 4, 1].into_iter().enumerate() {
            parts.set(&format!("scalar.{kind}"), Meta::Raw(kind as u32, vec![1; bytes]));
        }
        for kind in 10..=12 {
            parts.set(&format!("scalar.{kind}"), Meta::Raw(kind, vec![1; 8]));
        }
        // An array of one array of three bytes.
        let nested =
            [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &0u32.to_le_bytes(), &3u64.to_le_bytes(), &[1, 2, 3]];
        parts.set("nested", Meta::Raw(9, nested.concat()));
        parts.set("llama.context_length", Meta::U32(77));
        let checkpoint = parts.open();
        assert_eq!(checkpoint.config()["max_position_embeddings"], 77);
        assert_eq!(rows_of(&checkpoint, "model.embed_tokens.weight"), [0, 1, 2, 3, 4, 5]);
    }
}

/// Applies a change to a good file and names what the error must say.
fn refused(change: impl FnOnce(&mut GgufParts), expected: &str) {
    let mut parts = tiny("llama");
    change(&mut parts);
    let path = parts.write();
    assert_error(&path, expected);
}

#[test]
fn refusals_name_the_culprit() {
    refused(|p| p.version = 1, "GGUF version 1; supported: 2, 3");
    refused(|p| p.version = 3u32.swap_bytes(), "big-endian");
    refused(
        |p| p.set("general.architecture", Meta::String("mamba")),
        "mamba is not supported; supported: llama, qwen2",
    );
    refused(|p| p.set("llama.expert_count", Meta::U32(8)), "llama with 8 experts is not supported");
    refused(|p| p.set("llama.block_count", Meta::String("one")), "llama.block_count is \"one\", expected an integer");
    refused(|p| p.metadata.retain(|(key, _)| key != "llama.block_count"), "llama.block_count is missing");
    refused(|p| p.set("llama.attention.head_count", Meta::I32s(vec![4, 4])), "head_count is an array of 2");
    refused(|p| p.set("llama.attention.head_count", Meta::U32(0)), "0 attention heads");
    refused(
        |p| p.set("llama.attention.head_count", Meta::U32(u32::MAX)),
        "16 rows, which do not make 4294967295 heads",
    );
    refused(|p| p.set("llama.attention.head_count", Meta::U32(16)), "q_proj.weight has 16 rows, which do not make 16");
    refused(|p| p.tensors.retain(|tensor| !tensor.name.starts_with("token_embd")), "token_embd.weight is missing");
    refused(|p| p.set("split.count", Meta::U32(3)), "part 1 of a model split into 3 files: join them");
    refused(|p| p.set("general.alignment", Meta::U32(48)), "general.alignment is 48, expected a power of two");
    refused(|p| p.set("odd", Meta::Raw(13, vec![])), "metadata odd: value type 13 is unknown");
    refused(|p| p.set("long", Meta::Raw(8, vec![0xff; 8])), "metadata long: the file ends early");
    refused(|p| p.set("latin", Meta::Raw(8, [&1u64.to_le_bytes()[..], &[0xe9]].concat())), "is not UTF-8");
    let nest = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    refused(|p| p.set("deep", Meta::Raw(9, nest.repeat(100_000))), "nested deeper than 4");
    refused(|p| p.set("tokenizer.ggml.tokens", Meta::I32s(vec![1])), "tokenizer.ggml.tokens holds 1, not a string");
    refused(|p| p.set("tokenizer.ggml.tokens", Meta::Strings(vec![])), "holds no vocabulary");
    refused(|p| p.tensor("blk.0.ffn_up.weight").kind = 13, "mlp.up_proj.weight is of type Q5_K; supported: F32");
    refused(|p| p.tensor("blk.0.ffn_up.weight").kind = 99, "mlp.up_proj.weight is of type number 99");
    refused(
        |p| p.tensor("blk.0.ffn_up.weight").kind = Q8_0,
        "rows of 16 elements, which do not fill Q8_0 blocks of 32",
    );
    refused(|p| p.tensor("blk.0.ffn_up.weight").dims = vec![16, 1 << 40], "reaches past the end of the file");
    refused(|p| p.tensor("blk.0.ffn_up.weight").dims = vec![1 << 40, 1 << 40], "reaches past the end of the file");
    refused(|p| p.tensor("blk.0.ffn_up.weight").dims = vec![16, 0], "ffn_up.weight has an impossible dimension");
    refused(|p| p.tensor("blk.0.ffn_up.weight").dims = vec![1; 5], "ffn_up.weight has 5 dimensions, expected 1 to 4");
    refused(|p| p.tensor("blk.0.ffn_up.weight").name = "blk.0.ffn_gate.weight".into(), "two tensors of the name blk.0");
    refused(
        |p| p.tensors.push(TensorPart { name: "blk.0.attn_q.bias".into(), dims: vec![32], ..q8_0("", 1, 32) }),
        "q_proj.bias has its rows inside Q8_0 blocks",
    );
    let text = write_bytes(b"PK\x03\x04 something else");
    assert_error(&text, "is not a GGUF file");
}

#[test]
fn a_file_cut_short_anywhere_is_an_error() {
    let bytes = tiny("llama").bytes();
    let whole = write_bytes(&bytes);
    read_all(&whole).unwrap();
    for len in (0..bytes.len()).step_by(7).chain(0..64).chain(bytes.len() - 64..bytes.len()) {
        let cut = write_bytes(&bytes[..len]);
        assert!(read_all(&cut).is_err(), "{len} of {} bytes were accepted", bytes.len());
    }
}

proptest! {
    #[test]
    fn damage_never_panics(damage in prop::collection::vec((0usize..4000, any::<u8>()), 1..6), quantised: bool) {
        let mut parts = tiny("llama");
        if quantised {
            *parts.tensor("blk.0.ffn_down.weight") = q8_0("blk.0.ffn_down.weight", HIDDEN, 32);
        }
        let mut bytes = parts.bytes();
        for (at, byte) in damage {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        read_all(&write_bytes(&bytes)).ok();
    }
}

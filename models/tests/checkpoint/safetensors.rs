//! Folders in the Hugging Face layout.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use treespark_kernel_gen::DType;
use treespark_models::checkpoint::{Checkpoint, TokenizerSource};

use crate::{assert_error, f32_bytes, read_all, to_f32};

/// A safetensors file of `(name, dtype, shape, data)`.
fn file(tensors: &[(&str, &str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let mut header = json!({ "__metadata__": { "format": "pt" } });
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend(bytes);
        header[*name] = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, data.len()] });
    }
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
}

/// A folder with these files beside a `config.json` and a `tokenizer.json`.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), r#"{"hidden_size": 2}"#).unwrap();
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn small() -> Vec<u8> {
    file(&[("a.weight", "F32", &[2, 2], f32_bytes([1.0, 2.0, 3.0, 4.0])), ("b.bias", "F32", &[3], f32_bytes([5.0; 3]))])
}

#[test]
fn one_file() {
    let folder = folder(&[("model.safetensors", &small()), ("generation_config.json", br#"{"temperature": 0.5}"#)]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a.weight", "b.bias"]);
    assert_eq!(checkpoint.config()["hidden_size"], 2);
    assert_eq!(checkpoint.generation_config().unwrap()["temperature"], 0.5);
    assert_eq!(checkpoint.dtype(), DType::F32);
    let tensor = checkpoint.tensor("a.weight").unwrap();
    assert_eq!((tensor.dtype, &tensor.shape[..]), (DType::F32, &[2, 2][..]));
    assert_eq!(to_f32(&tensor), [1.0, 2.0, 3.0, 4.0]);
    let again = checkpoint.tensor("a.weight").unwrap();
    assert_eq!(tensor.bytes.as_slice().as_ptr(), again.bytes.as_slice().as_ptr(), "a view copies nothing");
    drop(checkpoint);
    assert_eq!(to_f32(&tensor), [1.0, 2.0, 3.0, 4.0], "a tensor outlives its checkpoint");
    let tokenizer = TokenizerSource::Json(folder.path().join("tokenizer.json"));
    assert_eq!(Checkpoint::open(folder.path()).unwrap().tokenizer_source().unwrap(), tokenizer);
}

#[test]
fn half_precision_matrices_stay_and_vectors_widen() {
    let values = [1.0, -2.0, 0.5, 0.25];
    for (dtype, expected, bytes) in [
        ("BF16", DType::BF16, bf16_bytes(&values)),
        ("F16", DType::F16, values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect()),
    ] {
        let file = file(&[("w", dtype, &[2, 2], bytes.clone()), ("norm", dtype, &[4], bytes)]);
        let folder = folder(&[("model.safetensors", &file)]);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.dtype(), expected);
        let (matrix, norm) = (checkpoint.tensor("w").unwrap(), checkpoint.tensor("norm").unwrap());
        assert_eq!((matrix.dtype, norm.dtype), (expected, DType::F32));
        assert_eq!((to_f32(&matrix), to_f32(&norm)), (values.to_vec(), values.to_vec()));
    }
}

#[test]
fn matrices_of_several_dtypes_become_bf16() {
    let file = file(&[
        ("a", "F32", &[1, 2], f32_bytes([1.5, 3.0])),
        ("b", "BF16", &[2, 1], bf16_bytes(&[0.5, -8.0])),
        ("empty", "F32", &[0, 4], vec![]),
    ]);
    let folder = folder(&[("model.safetensors", &file)]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.dtype(), DType::BF16);
    for (name, values) in [("a", &[1.5, 3.0][..]), ("b", &[0.5, -8.0]), ("empty", &[])] {
        let tensor = checkpoint.tensor(name).unwrap();
        assert_eq!((tensor.dtype, &to_f32(&tensor)[..]), (DType::BF16, values), "{name}");
    }
}

fn index(weight_map: Value) -> Vec<u8> {
    json!({ "metadata": { "total_size": 1 }, "weight_map": weight_map }).to_string().into_bytes()
}

#[test]
fn shards() {
    let first = file(&[("a", "F32", &[1, 1], f32_bytes([1.0])), ("extra", "F32", &[1], f32_bytes([0.0]))]);
    let second = file(&[("b", "F32", &[1, 1], f32_bytes([2.0]))]);
    let files: [(&str, &[u8]); 2] = [("s1.safetensors", &first), ("s2.safetensors", &second)];
    let with_index = |index: &[u8]| folder(&[files[0], files[1], ("model.safetensors.index.json", index)]);

    let whole = with_index(&index(json!({ "a": "s1.safetensors", "b": "s2.safetensors" })));
    let checkpoint = Checkpoint::open(whole.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(to_f32(&checkpoint.tensor("b").unwrap()), [2.0]);

    for (index, expected) in [
        (index(json!({ "a": "s3.safetensors" })), "shard s3.safetensors is missing from this folder"),
        (index(json!({ "a": "s2.safetensors" })), "says that tensor a is in s2.safetensors, which does not hold it"),
        (
            index(json!({ "a": "../s1.safetensors" })),
            "tensor a is in \"../s1.safetensors\", expected the name of a file",
        ),
        (index(json!({ "a": 1 })), "tensor a is in 1, expected the name of a file"),
        (b"{}".to_vec(), "has no object \"weight_map\""),
        (b"{".to_vec(), "model.safetensors.index.json: not JSON"),
    ] {
        assert_error(with_index(&index).path(), expected);
    }
}

#[test]
fn refusals_name_the_culprit() {
    let refused = |files: &[(&str, &[u8])], expected: &str| assert_error(folder(files).path(), expected);
    refused(&[], "holds neither model.safetensors, nor model.safetensors.index.json, nor a .gguf file");
    refused(&[("a.gguf", b""), ("b.GGUF", b"")], "holds 2 .gguf files: give the path of one");
    refused(&[("a.gguf", b"")], "a.gguf: the file ends early");
    refused(&[("model.safetensors", b"")], "model.safetensors: not a whole safetensors file");
    refused(&[("model.safetensors", &[0xff; 64])], "not a whole safetensors file: header too large");
    refused(&[("model.safetensors", &small()), ("config.json", b"[")], "config.json: not JSON");
    refused(&[("model.safetensors", &small()), ("tokenizer_config.json", b"no")], "tokenizer_config.json: not JSON");
    let integers = file(&[("ids", "I64", &[1], vec![0; 8])]);
    refused(&[("model.safetensors", &integers)], "tensor ids is of type I64; supported: F32, F16, BF16");

    let bare = folder(&[("model.safetensors", &small())]);
    fs::remove_file(bare.path().join("tokenizer.json")).unwrap();
    assert_error(bare.path(), "tokenizer.json does not exist");
    fs::remove_file(bare.path().join("config.json")).unwrap();
    assert_error(bare.path(), "config.json: ");
    assert_error(Path::new("/nonexistent/model"), "/nonexistent/model: ");
}

#[test]
fn the_chat_template_in_its_places() {
    let named =
        json!({ "chat_template": [{ "name": "tools", "template": "T" }, { "name": "default", "template": "D" }] });
    let template = |tokenizer_config: Value, file: Option<&[u8]>| {
        let (weights, config) = (small(), tokenizer_config.to_string());
        let mut files = vec![("model.safetensors", &weights[..]), ("tokenizer_config.json", config.as_bytes())];
        files.extend(file.map(|bytes| ("chat_template.jinja", bytes)));
        Checkpoint::open(folder(&files).path()).unwrap().chat_template()
    };
    assert_eq!(template(json!({}), None), None);
    assert_eq!(template(json!({ "chat_template": "S" }), None).as_deref(), Some("S"));
    assert_eq!(template(named.clone(), None).as_deref(), Some("D"));
    assert_eq!(template(named, Some(b"F")).as_deref(), Some("F"));
    let untitled = json!({ "chat_template": [{ "name": "tools", "template": "T" }] });
    assert_eq!(template(untitled, None), None);
}

#[test]
fn a_file_cut_short_anywhere_is_an_error() {
    let bytes = small();
    for len in 0..bytes.len() {
        let folder = folder(&[("model.safetensors", &bytes[..len])]);
        assert!(read_all(folder.path()).is_err(), "{len} of {} bytes were accepted", bytes.len());
    }
}

proptest! {
    #[test]
    fn damage_never_panics(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = small();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        read_all(folder(&[("model.safetensors", &bytes)]).path()).ok();
    }
}

/// DeepSeek-V3's: 8-bit floats, a scale for each block of 128 rows and columns.
#[test]
fn blocks_of_8_bit_floats_have_their_scales() {
    let (shape, scales) = ([130, 136], [1.0, 0.5, 2.0, 4.0]);
    // 0x38 is one, 0xC0 minus two.
    let bytes: Vec<u8> = (0..130 * 136).map(|i| if i % 3 == 0 { 0xC0 } else { 0x38 }).collect();
    let matrix = ("a.weight", "F8_E4M3", &shape[..], bytes);
    let of_matrix = ("a.weight_scale_inv", "F32", &[2, 2][..], f32_bytes(scales));
    let whole = folder(&[("model.safetensors", &file(&[matrix.clone(), of_matrix]))]);
    let checkpoint = Checkpoint::open(whole.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a.weight"]);
    let tensor = checkpoint.tensor("a.weight").unwrap();
    assert_eq!(tensor.dtype, DType::BF16);
    for (i, value) in to_f32(&tensor).into_iter().enumerate() {
        let scale = scales[i / 136 / 128 * 2 + i % 136 / 128];
        assert_eq!(value, if i % 3 == 0 { -2.0 * scale } else { scale }, "element {i}");
    }

    let without = folder(&[("model.safetensors", &file(std::slice::from_ref(&matrix)))]);
    assert_error(without.path(), "tensor a.weight_scale_inv is missing");
    let few = ("a.weight_scale_inv", "F32", &[2, 1][..], f32_bytes([1.0, 2.0]));
    let few = folder(&[("model.safetensors", &file(&[matrix, few]))]);
    assert_error(few.path(), "tensor a.weight_scale_inv has shape [2, 1], expected [2, 2]");
}

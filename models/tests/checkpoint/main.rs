//! Checkpoints written to a temporary folder and opened again: whole, cut short, and damaged.

mod gguf;
mod gguf_writer;
mod safetensors;

use treespark_models::{Checkpoint, Result};

/// Opens a checkpoint and reads all of it.
fn read_all(path: &std::path::Path) -> Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    for name in checkpoint.names() {
        checkpoint.tensor(&name)?;
    }
    checkpoint.chat_template();
    checkpoint.tokenizer_source().map(|_| ())
}

/// The message of the error that opening and reading must end in.
fn error(path: &std::path::Path) -> String {
    read_all(path).expect_err("a malformed checkpoint was read").to_string()
}

fn assert_error(path: &std::path::Path, expected: &str) {
    let message = error(path);
    assert!(message.contains(expected), "{expected:?} is not in: {message}");
}

fn f32_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

fn to_f32(tensor: &treespark_models::Tensor) -> Vec<f32> {
    use treespark_kernel_gen::DType;
    let bytes = tensor.bytes.as_slice();
    match tensor.dtype {
        DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        DType::BF16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::U32 => panic!("a weight of integers"),
    }
}

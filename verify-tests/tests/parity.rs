//! Logits against the Hugging Face implementation, on fixtures that it made (see `fixtures/parity/README.md`).
//!
//! The oracle takes the tests too: this is where its reading of the architectures is itself checked.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;
use treespark::backend::Backend;
use treespark::cpu::CpuBackend;
use treespark_kernel_gen::DType;
use treespark_models::Model;
use treespark_verify_tests::cases;
use treespark_verify_tests::logits::logits;
use treespark_verify_tests::oracle::Oracle;

/// Errors are relative to the largest logit of a row.
const F32_TOLERANCE: f32 = 1e-4;
const BF16_TOLERANCE: f32 = 2e-2;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/parity").join(name)
}

/// Words of a tensor of 32-bit elements.
fn words(file: &SafeTensors, name: &str) -> Vec<u32> {
    let bytes = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data().to_vec();
    bytes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    words(file, name).into_iter().map(f32::from_bits).collect()
}

/// The largest difference between two rows of logits, relative to the largest logit.
fn error(got: &[f32], want: &[f32]) -> f32 {
    let scale = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    got.iter().zip(want).map(|(g, w)| (g - w).abs() / scale).fold(0.0, |a, b| if b.is_nan() { b } else { a.max(b) })
}

const LLAMAS: [&str; 3] = ["tiny-llama", "tiny-qwen2", "tiny-qwen3"];
/// Latent attention with and without compressed queries, layers with and without experts, YaRN.
const DEEPSEEKS: [&str; 3] = ["tiny-deepseek-v2-lite", "tiny-deepseek-v2", "tiny-deepseek-v3"];

fn tiny_models_agree(backend: &mut dyn Backend, names: &[&str]) {
    for name in names {
        let model = Model::open(&fixture(name)).unwrap();
        let bytes = std::fs::read(fixture(name).join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let sequences = [0, 1].map(|i| words(&file, &format!("tokens.{i}")));
        let got = logits(backend, &model, DType::F32, &sequences);
        for (i, got) in got.iter().enumerate() {
            let want = floats(&file, &format!("logits.{i}"));
            for (position, (got, want)) in got.iter().zip(want.chunks(model.config().vocab_size)).enumerate() {
                let error = error(got, want);
                assert!(error < F32_TOLERANCE, "{name}, sequence {i}, position {position}: relative error {error}");
            }
        }
    }
}

#[test]
fn tiny_models_on_the_oracle() {
    tiny_models_agree(&mut Oracle::new(), &LLAMAS);
    tiny_models_agree(&mut Oracle::new(), &DEEPSEEKS);
}

#[test]
fn tiny_models_on_the_cpu() {
    tiny_models_agree(&mut CpuBackend::new(None), &LLAMAS);
    tiny_models_agree(&mut CpuBackend::new(None), &DEEPSEEKS);
}

#[cfg(feature = "wgpu")]
#[test]
fn tiny_models_on_wgpu() {
    if let Some(mut backend) = cases::gpu() {
        tiny_models_agree(&mut *backend, &LLAMAS);
        tiny_models_agree(&mut *backend, &DEEPSEEKS);
    }
}

/// A real model, its weights rounded to bf16: the 64 largest logits of the last positions of each prompt, and how much
/// mass the others have.
fn smollm2_agrees(backend: &mut dyn Backend, model: &Model) {
    let folder = fixture("smollm2-135m-instruct");
    let prompts: Vec<Value> = serde_json::from_slice(&std::fs::read(folder.join("prompts.json")).unwrap()).unwrap();
    let token = |t: &Value| t.as_u64().unwrap() as u32;
    let sequences: Vec<Vec<u32>> =
        prompts.iter().map(|p| p["tokens"].as_array().unwrap().iter().map(token).collect()).collect();
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let got = logits(backend, model, DType::BF16, &sequences);
    for (i, rows) in got.iter().enumerate() {
        let ids = words(&file, &format!("bf16.ids.{i}"));
        let values = floats(&file, &format!("bf16.values.{i}"));
        let sums = floats(&file, &format!("bf16.logsumexp.{i}"));
        for (at, row) in rows[rows.len() - sums.len()..].iter().enumerate() {
            let want = &values[at * 64..(at + 1) * 64];
            let got: Vec<f32> = ids[at * 64..(at + 1) * 64].iter().map(|&id| row[id as usize]).collect();
            let error = error(&got, want);
            assert!(error < BF16_TOLERANCE, "prompt {i}, position {at} of the last: relative error {error}");
            let sum: f64 = row.iter().map(|&x| f64::from(x - want[0]).exp()).sum();
            let logsumexp = sum.ln() + f64::from(want[0]);
            let off = (logsumexp - f64::from(sums[at])).abs() as f32 / want[0].abs();
            assert!(off < BF16_TOLERANCE, "prompt {i}, position {at}: log-sum-exp {logsumexp}, expected {}", sums[at]);
        }
    }
}

#[test]
fn smollm2_on_the_cpu() {
    if let Some(path) = cases::default_model() {
        smollm2_agrees(&mut CpuBackend::new(None), &Model::open(&path).unwrap());
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn smollm2_on_wgpu() {
    if let (Some(path), Some(mut backend)) = (cases::default_model(), cases::gpu()) {
        smollm2_agrees(&mut *backend, &Model::open(&path).unwrap());
    }
}

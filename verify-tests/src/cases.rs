//! What the losslessness tests run over: tree shapes, samplings, devices and the real model.

use std::fmt::Display;
use std::path::PathBuf;

use treespark::Sampling;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use treespark::backend::Backend;
use treespark::backend::DeviceInfo;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use treespark::devices::{self, BackendChoice};
use treespark_models::hub;

/// Ten shapes: plain, chains, wide, deep, uneven, and more nodes than a mask word has bits.
pub const SHAPES: [&str; 10] = [
    "root",
    "chain:1",
    "chain:7",
    "4x2x2x1",
    "3x3x3",
    "parents:0,0,1,2,3,0,5,1,2,8",
    "16",
    "2x2x2x2x2",
    "paths:0;1;2;0.0;0.1;1.0;0.0.0;0.0.1;0.0.0.0",
    "parents:0,0,0,0,0,4,4,3,3,2,1,10,11,12",
];

/// The committed models of random weights, one of each architecture.
pub fn tiny_models() -> Vec<PathBuf> {
    ["tiny-llama", "tiny-qwen2", "tiny-qwen3"].map(parity_fixture).to_vec()
}

/// The same with latent attention and experts.
pub fn tiny_deepseeks() -> Vec<PathBuf> {
    ["tiny-deepseek-v2-lite", "tiny-deepseek-v2", "tiny-deepseek-v3"].map(parity_fixture).to_vec()
}

fn parity_fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/parity").join(name)
}

/// Greedy, and temperatures with every filter.
pub fn samplings() -> Vec<(&'static str, Sampling)> {
    let sampled = |temperature, seed| Sampling { temperature, seed, ..Sampling::default() };
    vec![
        ("greedy", Sampling::default()),
        ("greedy, penalty 1.3", Sampling { repetition_penalty: 1.3, ..Sampling::default() }),
        ("temperature 0.2", sampled(0.2, 1)),
        ("temperature 0.7, top-k 8, penalty 1.1", Sampling { top_k: 8, repetition_penalty: 1.1, ..sampled(0.7, 2) }),
        ("temperature 1.0, top-p 0.9", Sampling { top_p: 0.9, ..sampled(1.0, u64::MAX) }),
        (
            "temperature 1.5, top-k 40, top-p 0.95, min-p 0.05",
            Sampling { top_k: 40, top_p: 0.95, min_p: 0.05, sample: 3, ..sampled(1.5, 4) },
        ),
    ]
}

/// Whether a GPU is one in software, where rows cost what they compute and kernels run for seconds: tests on it are shorter.
pub fn is_software(gpu: &DeviceInfo) -> bool {
    gpu.backend != "cpu" && (gpu.name.starts_with("CUDA on the CPU") || gpu.cost.of(16) > 3.0)
}

/// The first GPU, a software rasteriser if there is no other. `None`, with a printed reason, where there is none; a
/// failure where `TREESPARK_REQUIRE_GPU` is set.
#[cfg(feature = "wgpu")]
pub fn gpu() -> Option<Box<dyn Backend>> {
    needed("TREESPARK_REQUIRE_GPU", devices::open(&BackendChoice::Wgpu(None)))
}

/// The first NVIDIA GPU. `None`, with a printed reason, where there is none; a failure where `TREESPARK_REQUIRE_CUDA`
/// is set.
#[cfg(feature = "cuda")]
pub fn nvidia() -> Option<Box<dyn Backend>> {
    needed("TREESPARK_REQUIRE_CUDA", devices::open(&BackendChoice::Cuda(None)))
}

/// The CUDA backend on a make-believe GPU: 0 is like an H100, 1 like an A100. The make-believe driver must be the first
/// that this process loads. `None`, with a printed reason, where no compiler is; a failure where `TREESPARK_REQUIRE_GPU` is
/// set.
#[cfg(feature = "cuda")]
pub fn cuda_on_cpu(gpu: usize) -> Option<Box<dyn Backend>> {
    let open = || devices::open(&BackendChoice::Cuda(Some(gpu))).map_err(|error| error.to_string());
    needed("TREESPARK_REQUIRE_GPU", crate::cuda_on_cpu::set_up().and_then(|()| open()))
}

/// What a test needs, or `None` with a printed reason; a failure where the environment says that it must be there.
pub fn needed<T>(variable: &str, found: Result<T, impl Display>) -> Option<T> {
    found
        .map_err(|why| {
            assert!(std::env::var_os(variable).is_none(), "{why}");
            eprintln!("skipped: {why}");
        })
        .ok()
}

/// The default model's file, fetched if need be. `None`, with a printed reason, where it cannot be had; a failure
/// where `TREESPARK_REQUIRE_MODEL` is set.
pub fn default_model() -> Option<PathBuf> {
    needed("TREESPARK_REQUIRE_MODEL", hub::resolve(hub::DEFAULT_MODEL, &mut |_| {}))
}

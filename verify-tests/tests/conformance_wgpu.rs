//! The conformance suite on the wgpu backend: on the first GPU, or a software rasteriser.

#![cfg(feature = "wgpu")]

use treespark_verify_tests::{cases, conformance};

conformance!(wgpu, cases::gpu);
conformance!(deepseek_on_wgpu, cases::gpu, deepseek::latents_and_experts_keep_every_property);

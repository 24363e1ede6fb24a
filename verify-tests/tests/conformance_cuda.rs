//! The conformance suite on the CUDA backend, on the first NVIDIA GPU.

#![cfg(feature = "cuda")]

use treespark_verify_tests::{cases, conformance};

conformance!(cuda, cases::nvidia);
conformance!(deepseek_on_cuda, cases::nvidia, deepseek::latents_and_experts_keep_every_property);

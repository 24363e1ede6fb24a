//! The conformance suite on the wgpu backend: on the first GPU, or a software rasteriser.

#![cfg(feature = "wgpu")]

use treespark_verify_tests::{cases, conformance};

conformance!(wgpu, cases::gpu);

//! The conformance suite on the CUDA backend without a GPU: its kernels run on the CPU.

#![cfg(feature = "cuda")]

use treespark_verify_tests::{cases, conformance};

conformance!(cuda_on_cpu, cases::cuda_on_cpu);

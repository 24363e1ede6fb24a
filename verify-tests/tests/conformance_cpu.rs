//! The conformance suite on the CPU backend.

use treespark::cpu::CpuBackend;
use treespark_verify_tests::conformance;

conformance!(cpu, || Some(Box::new(CpuBackend::new(None))));

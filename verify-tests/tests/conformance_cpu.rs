//! The conformance suite on the CPU backend.

use treespark::cpu::CpuBackend;
use treespark_verify_tests::conformance;

conformance!(cpu, || Some(Box::new(CpuBackend::new(None))));
conformance!(
    deepseek_on_cpu,
    || Some(Box::new(CpuBackend::new(None))),
    deepseek::latents_and_experts_keep_every_property
);

//! The emulation of CUDA does what it is for: right kernels give right results, and each planted fault is found.

use std::path::PathBuf;
use std::process::{Command, Output};

use treespark_verify_tests::{cases, cuda_on_cpu};

/// `None`, with a printed reason, where there is no compiler; a failure where `TREESPARK_REQUIRE_GPU` is set.
fn self_test(name: &str, flags: &[&str]) -> Option<PathBuf> {
    cases::needed("TREESPARK_REQUIRE_GPU", cuda_on_cpu::build("selftest/main.cpp", name, flags))
}

fn run(program: &PathBuf, seed: u64, kernel: Option<&str>) -> Output {
    Command::new(program).args(kernel).env("EMU_SEED", seed.to_string()).output().expect("it runs")
}

#[test]
fn right_kernels_give_right_results() {
    // On stacks switched by our own few instructions, and by the system's.
    for (name, flags) in [("selftest", &[][..]), ("selftest-portable", &["-DEMU_PORTABLE_SWITCH"])] {
        let Some(program) = self_test(name, flags) else { return };
        for seed in 0..12 {
            let output = run(&program, seed, None);
            assert!(output.status.success(), "{name}, seed {seed}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

#[test]
fn races_give_wrong_results_under_some_order() {
    let Some(program) = self_test("selftest", &[]) else { return };
    for kernel in ["missing_barrier", "barrier_too_few", "missing_copy_wait"] {
        let printed = |seed| String::from_utf8_lossy(&run(&program, seed, Some(kernel)).stdout).into_owned();
        let found: Vec<String> = (0..4).map(printed).collect();
        assert!(found.iter().any(|text| text == "wrong\n"), "{kernel}: {found:?}");
    }
}

#[test]
fn what_a_gpu_would_hang_on_or_leave_undefined_ends_the_process() {
    let Some(program) = self_test("selftest", &[]) else { return };
    for (kernel, message) in [
        ("divergent_shuffle", "divergent: at __shfl_xor_sync"),
        ("out_of_bounds", "thread (1023, 0, 0), seed 0: bad address"),
        ("behind_shared", "wrote behind its dynamic shared memory"),
        ("barrier_for_some", "deadlock: of 32 threads"),
        ("misaligned_copy", "is not aligned to 16 bytes"),
        ("barrier_never_ends", "32 waiting for an mbarrier"),
    ] {
        let output = run(&program, 0, Some(kernel));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(message), "{kernel}: {errors}");
    }
}

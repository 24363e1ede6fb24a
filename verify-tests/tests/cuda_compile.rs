//! Every CUDA kernel of the release, and of the models that the conformance suite uses, compiles with NVRTC for the
//! architectures that kernels differ by, and keeps its numbers in registers.
//!
//! Needs no GPU: NVRTC comes as a library of its own (`pip install nvidia-cuda-nvrtc`).

#![cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use treespark::cuda::{DriverVersion, Nvrtc};
use treespark_kernel_gen::cuda::{Device, Launch, lower_pass};
use treespark_kernel_gen::emit::{Lang, emit};
use treespark_kernel_gen::{BlockShape, Fill, MAX_NODES, TreeSpec, release};
use treespark_verify_tests::arb::{DEEPSEEK_MODELS, HOUSE_MODELS};
use treespark_verify_tests::cases;
use treespark_verify_tests::tiny_model::{Tail, TinyModel};

/// What kernels are compiled for.
const TARGETS: [(&str, Device); 3] = [("sm_80", Device::A100), ("sm_89", Device::RTX_4090), ("sm_90a", Device::H100)];

/// Kernels that may spill, by the beginning of their name, and why.
const MAY_SPILL: [(&str, &str); 0] = [];

/// The newest CUDA there is a driver for: what is compiled here is not run.
const ANY_DRIVER: DriverVersion = DriverVersion { major: i32::MAX, minor: 0 };

#[test]
fn every_kernel_compiles_and_spills_no_register() {
    let Some(nvrtc) = cases::needed("TREESPARK_REQUIRE_NVRTC", Nvrtc::find(ANY_DRIVER)) else { return };
    let work = work();
    let (next, problems) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((target, name, source)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(problem) = compile(nvrtc, target, name, source) {
                        problems.lock().expect("no thread panics").push(format!("{target}: {problem}"));
                    }
                }
            });
        }
    });
    let problems = problems.into_inner().expect("no thread panics");
    assert!(problems.is_empty(), "of {} kernels, with NVRTC {}:\n{}", work.len(), nvrtc.version, problems.join("\n"));
}

/// Target, name and source of each kernel. What several targets have by one name is compiled for one of them, in turn, except
/// that Hopper's have instructions of their own: most kernels come in many sizes, which between them meet all.
fn work() -> Vec<(&'static str, String, String)> {
    let mut by_name: BTreeMap<(String, bool), Vec<(&'static str, String)>> = BTreeMap::new();
    for (target, device) in &TARGETS {
        for Launch { spec, .. } in launches(device) {
            let source = emit(&spec, Lang::Cuda).unwrap_or_else(|error| panic!("{}: {error}", spec.name()));
            let name = spec.name().to_string();
            let others = by_name.get(&(name.clone(), false));
            let is_apart = device.has_wgmma() && others.is_some_and(|others| others[0].1 != source);
            by_name.entry((name, is_apart)).or_default().push((target, source));
        }
    }
    let mut work = Vec::new();
    for (i, ((name, _), mut of_targets)) in by_name.into_iter().enumerate() {
        let (target, source) = of_targets.swap_remove(i % of_targets.len());
        work.push((target, name, source));
    }
    work
}

/// Each kernel once.
fn launches(device: &Device) -> Vec<Launch> {
    let mut launches = release::cuda_launches(device).expect("the release's sizes fit this GPU");
    for sizes in HOUSE_MODELS {
        let model = TinyModel { sizes, seed: 0 };
        let shape = "4x2x2x1".parse().expect("a shape");
        launches.extend(lower_pass(&model.grow_pass(&shape, 16), device).expect("a shape fits any GPU"));
        for (requests, rank, confident) in [(1, 0, false), (3, 64, true), (45, 64, true)] {
            let block = BlockShape { rows: 7, first: 0, fill: Fill::Mask(1) };
            let pass = model.trellis_pass(block, requests, &[1.0; 64], [sizes.vocab.min(64), rank, 576], confident);
            launches.extend(lower_pass(&pass, device).expect("a block fits any GPU"));
        }
        launches.extend(lower_pass(&model.masked_draw_pass(16), device).expect("small sizes fit any GPU"));
    }
    let house = HOUSE_MODELS.iter().map(|&sizes| (sizes, &[1, 16, 256][..]));
    // Those of a real size are in the release.
    let deepseek = DEEPSEEK_MODELS.iter().map(|&sizes| (sizes, &[16][..]));
    for (sizes, rows) in house.chain(deepseek) {
        let model = TinyModel { sizes, seed: 0 };
        for &rows in rows {
            let pass = model.pass(rows, &TreeSpec::Any(MAX_NODES), Tail::Commit);
            launches.extend(lower_pass(&pass, device).expect("small sizes fit any GPU"));
        }
    }
    let named = launches.into_iter().map(|launch| (launch.spec.name().to_string(), launch));
    named.collect::<BTreeMap<String, Launch>>().into_values().collect()
}

fn compile(nvrtc: &Nvrtc, target: &str, name: &str, source: &str) -> Result<(), String> {
    let log = nvrtc.compile(name, source, target).map_err(|e| e.to_string())?.log;
    let may_spill = MAY_SPILL.iter().any(|(beginning, _)| name.starts_with(beginning));
    let mut lines = log.lines().filter(|line| line.contains("spill stores")).peekable();
    if lines.peek().is_none() {
        return Err(format!("{name}: the log says nothing of spills: {log}"));
    }
    match lines.find(|line| !line.contains(", 0 bytes spill stores, 0 bytes spill loads")) {
        Some(line) if !may_spill => Err(format!("{name}: {}", line.trim())),
        _ => Ok(()),
    }
}

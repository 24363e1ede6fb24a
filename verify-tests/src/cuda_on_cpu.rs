//! Builds what `cuda-on-cpu/` holds: a make-believe CUDA driver and NVRTC, on which the CUDA backend runs without a GPU.
//!
//! The driver is loaded once a process, so tests on it are in a binary of their own. What was built, kernels included, is
//! kept beside the test's own binary and found again by a hash of what it was built from; several processes may build at
//! once, since a file appears whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda-on-cpu");
const KERNELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shaders/cuda");

/// The text of the kernels that a process is to run with a mistake in it, and the mistake: environment variables.
pub const REPLACE: &str = "TREESPARK_EMULATION_REPLACE";
pub const BY: &str = "TREESPARK_EMULATION_BY";

/// What every file of the emulation is compiled with. Rounding is that of the source: no product and sum is fused.
const FLAGS: [&str; 5] = ["-O2", "-std=c++17", "-w", "-ffp-contract=off", "-fvisibility=hidden"];

/// Points the CUDA backend of this process at the make-believe driver and NVRTC. Call before anything that looks for a
/// driver. The error says why there can be none. Blocks, warps and lanes run in an order that `EMU_SEED` chooses.
#[allow(unsafe_code)]
pub fn set_up() -> Result<(), String> {
    static DONE: OnceLock<Result<(), String>> = OnceLock::new();
    let set_up = || {
        let folder = folder()?;
        let machine = build("machine.cpp", "machine.o", &["-c", "-fPIC"])?;
        let machine = machine.to_str().ok_or("the target folder's path is not UTF-8")?;
        let driver = build("driver.cpp", "libcuda.so.1", &["-shared", "-fPIC", machine])?;
        let [headers, machine] = [format!("-DEMU_HEADERS=\"{SOURCES}\""), format!("-DEMU_MACHINE=\"{machine}\"")];
        let nvrtc = build("nvrtc.cpp", "libnvrtc.so.13", &["-shared", "-fPIC", &headers, &machine])?;
        let seed = std::env::var_os("EMU_SEED").unwrap_or("1".into());
        let variables = [
            ("TREESPARK_CUDA_DRIVER", driver.into()),
            ("TREESPARK_NVRTC", nvrtc.into()),
            ("TREESPARK_CACHE", folder.join(cache()).into()),
            ("TREESPARK_EMULATION_DIR", folder.into()),
            ("EMU_SEED", seed),
        ];
        for (name, value) in variables {
            // SAFETY: Rust's own readers of the environment and this writer take turns by a lock of the standard library;
            // the only others in this process are the two libraries, which are loaded after this.
            unsafe { std::env::set_var(name, value) };
        }
        Ok(())
    };
    DONE.get_or_init(set_up).clone()
}

/// Kernels with a mistake are kept apart: what is kept is found again by the source without it.
fn cache() -> String {
    let set = |name| std::env::var(name).unwrap_or_default();
    match [set(REPLACE), set(BY)] {
        [text, _] if text.is_empty() => "cache".into(),
        change => format!("cache-{:016x}", fnv(FNV_START, &change.join("\0"))),
    }
}

/// How often the sources of CUDA's kernels have this text.
pub fn places_in_kernels(text: &str) -> Result<usize, String> {
    let files = sources(Path::new(KERNELS))?;
    let read = |file: &PathBuf| fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()));
    files.iter().map(|file| Ok(read(file)?.matches(text).count())).sum()
}

/// Compiles a file of `cuda-on-cpu/`; the product's path.
pub fn build(source: &str, product: &str, flags: &[&str]) -> Result<PathBuf, String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock();
    let mut hash = fnv(FNV_START, &format!("{FLAGS:?}{flags:?}{}", machine_flags().concat()));
    for file in sources(Path::new(SOURCES))? {
        hash = fnv(hash, &fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?);
    }
    let folder = folder()?.join(format!("{hash:016x}"));
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let (path, mine) = (folder.join(product), folder.join(format!("{product}.{}", std::process::id())));
    if path.exists() {
        return Ok(path);
    }
    let mut command = Command::new("g++");
    command.args(FLAGS).args(machine_flags()).args(flags).arg(Path::new(SOURCES).join(source)).arg("-o").arg(&mine);
    let output = command.output().map_err(|e| format!("CUDA on the CPU needs g++ (12 or newer): {e}"))?;
    if !output.status.success() {
        return Err(format!("g++ does not compile {source}:\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    fs::rename(&mine, &path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}

/// Beside the folder of this test's binary: `target/release/cuda-on-cpu`.
fn folder() -> Result<PathBuf, String> {
    let binary = std::env::current_exe().map_err(|e| format!("where is this test? {e}"))?;
    let profile = binary.parent().and_then(Path::parent).ok_or("this test lies in no folder")?;
    Ok(profile.join("cuda-on-cpu"))
}

/// Instructions that make the emulation faster where they are there.
fn machine_flags() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        return vec!["-mavx2", "-mfma", "-mf16c"];
    }
    Vec::new()
}

/// All files below a folder, sorted.
fn sources(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))? {
        let path = entry.map_err(|e| e.to_string())?.path();
        if path.is_dir() { files.extend(sources(&path)?) } else { files.push(path) }
    }
    files.sort();
    Ok(files)
}

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv(hash: u64, text: &str) -> u64 {
    text.bytes().fold(hash, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

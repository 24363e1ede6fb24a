//! What is attacked.

use anyhow::{Result, bail};
use treespark::backend::Backend;
use treespark::cpu::CpuBackend;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use treespark_verify_tests::cases;
use treespark_verify_tests::shared::Shared;

/// The names that `--backend` takes, beside `all`.
pub const NAMES: [&str; 4] = ["cpu", "wgpu", "cuda", "emulated"];

/// Opens one. The reason why there is none has been printed.
pub fn open(name: &str) -> Result<Shared> {
    let backend: Option<Box<dyn Backend>> = match name {
        "cpu" => Some(Box::new(CpuBackend::new(Some(1)))),
        #[cfg(feature = "wgpu")]
        "wgpu" => cases::gpu(),
        #[cfg(feature = "cuda")]
        "cuda" => cases::nvidia(),
        #[cfg(feature = "cuda")]
        "emulated" => cases::cuda_on_cpu(0),
        _ => bail!("no backend `{name}`: {} or all, as far as they were built in", NAMES.join(", ")),
    };
    match backend {
        Some(backend) => Ok(Shared::new(backend)),
        None => bail!("{name} cannot be attacked here"),
    }
}

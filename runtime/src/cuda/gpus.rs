//! Which NVIDIA GPUs there are, and what the driver says of them.

use std::fmt;

use cust::context::Context;
use cust::device::Device;
use treespark_kernel_gen::cuda;

use super::Nvrtc;
use super::driver::{self, check, check_cust};
use crate::error::{Error, Result};

/// The oldest compute capability, times ten, that kernels are written for: the first with asynchronous copies and bf16.
pub const OLDEST_ARCH: usize = 80;
/// Shared memory that a block must be able to have, in bytes: kernels are cut for no less. Where blocks form clusters they
/// take more, and what such GPUs of less (consumer cards since Blackwell) can do has not been tried.
pub fn least_shared_bytes(device: &cuda::Device) -> usize {
    if device.has_clusters() { 163 << 10 } else { cuda::Device::RTX_4090.shared_bytes }
}

#[derive(Debug, Clone)]
pub struct Gpu {
    /// What the driver calls it, e.g. `NVIDIA H100 80GB HBM3`.
    pub model: String,
    /// What kernels are chosen by.
    pub device: cuda::Device,
    pub memory_bytes: usize,
    pub driver: DriverVersion,
    pub(super) index: u32,
}

/// The newest CUDA that the driver serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverVersion {
    pub major: i32,
    pub minor: i32,
}

impl fmt::Display for DriverVersion {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// All GPUs; the place in this list is the number that `--backend cuda:N` takes. The error says why there can be none.
pub fn gpus() -> Result<Vec<Gpu>> {
    let no_device = |why: String| Error::NoDevice { wanted: "cuda".into(), why };
    treespark_cuda_driver::load().map_err(|why| no_device(format!("no NVIDIA driver: {why}")))?;
    // SAFETY: flags must be 0.
    check("NVIDIA driver found, but it does not start", unsafe { driver::cuInit(0) })
        .map_err(|error| no_device(error.to_string()))?;
    let driver = driver_version()?;
    let count = check_cust("counting GPUs", Device::num_devices())?;
    (0..count).map(|index| Gpu::new(index, driver)).collect()
}

fn driver_version() -> Result<DriverVersion> {
    let mut version = 0;
    // SAFETY: the driver writes one number to `version`.
    check("asking for the driver's version", unsafe { driver::cuDriverGetVersion(&mut version) })?;
    Ok(DriverVersion { major: version / 1000, minor: version % 1000 / 10 })
}

impl Gpu {
    fn new(index: u32, driver: DriverVersion) -> Result<Gpu> {
        let device = check_cust("finding a GPU", Device::get_device(index))?;
        let attribute = |id: i32| {
            let mut value = 0;
            // SAFETY: the driver writes one number to `value`; `device` is one that it named.
            let code = unsafe { driver::cuDeviceGetAttribute(&mut value, id, device.as_raw()) };
            check("asking for a GPU's attributes", code).map(|()| usize::try_from(value).unwrap_or(0))
        };
        let (major, minor) = (attribute(driver::DEVICE_CAPABILITY_MAJOR)?, attribute(driver::DEVICE_CAPABILITY_MINOR)?);
        Ok(Gpu {
            model: check_cust("asking for a GPU's name", device.name())?,
            device: cuda::Device {
                arch: 10 * major + minor,
                multiprocessors: attribute(driver::DEVICE_MULTIPROCESSORS)?,
                shared_bytes: attribute(driver::DEVICE_SHARED_BYTES)?,
            },
            memory_bytes: check_cust("asking for a GPU's memory", device.total_memory())?,
            driver,
            index,
        })
    }

    /// As a person would name it, with the API, e.g. `NVIDIA H100 80GB HBM3 (CUDA)`.
    pub fn name(&self) -> String {
        format!("{} (CUDA)", self.model)
    }

    /// API, architecture, memory, driver and compiler in one line.
    pub fn details(&self) -> String {
        let cuda::Device { arch, multiprocessors, .. } = self.device;
        let (capability, gib) = (arch as f64 / 10.0, self.memory_bytes as f64 / (1 << 30) as f64);
        let compiler = match Nvrtc::find(self.driver) {
            Ok(nvrtc) => format!(", NVRTC {} ({})", nvrtc.version, nvrtc.path.display()),
            Err(_) => String::new(),
        };
        format!(
            "compute capability {capability:.1}, {multiprocessors} multiprocessors, {gib:.1} GiB, driver for CUDA {}{compiler}",
            self.driver
        )
    }

    /// What its kernels are compiled for.
    pub fn target(&self) -> String {
        // 9.0 has instructions that no later architecture keeps; the letter asks for them.
        let features = if self.device.arch == 90 { "a" } else { "" };
        format!("sm_{}{features}", self.device.arch)
    }

    /// Bytes that nobody uses at the moment. Opens the GPU, which takes a while.
    pub fn free_bytes(&self) -> Result<usize> {
        let device = check_cust("finding a GPU", Device::get_device(self.index))?;
        let _context = check_cust("opening a GPU", Context::new(device))?;
        free_bytes()
    }
}

/// Bytes that nobody uses of the GPU whose context is current.
pub(super) fn free_bytes() -> Result<usize> {
    check_cust("asking for free memory", cust::memory::mem_get_info()).map(|(free, _)| free)
}

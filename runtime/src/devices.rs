//! Which devices there are, and which one is taken.

use std::str::FromStr;

use crate::backend::Backend;
use crate::cpu::CpuBackend;
use crate::error::{Error, Result};
#[cfg(feature = "wgpu")]
use crate::wgpu::{self, WgpuBackend};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackendChoice {
    /// The first GPU that is not a software rasteriser, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// A GPU by its number in `treespark devices`; without one, the first that is not a software rasteriser, else the
    /// first.
    Wgpu(Option<usize>),
}

impl FromStr for BackendChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<BackendChoice, String> {
        match text {
            "auto" => Ok(BackendChoice::Auto),
            "cpu" => Ok(BackendChoice::Cpu),
            "wgpu" => Ok(BackendChoice::Wgpu(None)),
            _ => match text.strip_prefix("wgpu:").and_then(|index| index.parse().ok()) {
                Some(index) => Ok(BackendChoice::Wgpu(Some(index))),
                None => {
                    Err(format!("'{text}' is no backend; there are: auto, cpu, wgpu, wgpu:N (see treespark devices)"))
                }
            },
        }
    }
}

/// A device as a person sees it.
#[derive(Debug, Clone)]
pub struct Device {
    /// What `--backend` takes.
    pub choice: String,
    pub name: String,
    /// API, type, driver, limits.
    pub details: String,
    /// A software rasteriser is a CPU in disguise, slower than the CPU backend.
    pub software: bool,
}

/// All devices, GPUs first, and the CPU last.
pub fn list() -> Vec<Device> {
    let cpu = CpuBackend::describe();
    let mut devices = gpus();
    devices.push(Device { choice: "cpu".into(), name: cpu, details: "always there".into(), software: false });
    devices
}

#[cfg(feature = "wgpu")]
fn gpus() -> Vec<Device> {
    let list = wgpu::adapters().into_iter().enumerate();
    list.map(|(i, gpu)| Device {
        choice: format!("wgpu:{i}"),
        details: gpu.details(),
        software: gpu.software,
        name: gpu.name,
    })
    .collect()
}

#[cfg(not(feature = "wgpu"))]
fn gpus() -> Vec<Device> {
    Vec::new()
}

/// The device that a choice means, as its place in [`list`], with the reason.
pub fn choose(devices: &[Device], choice: &BackendChoice) -> Result<(usize, &'static str)> {
    let cpu = devices.len() - 1;
    let hardware = devices[..cpu].iter().position(|device| !device.software);
    let none = |why: String| Error::NoDevice { wanted: format!("{choice:?}").to_lowercase(), why };
    match *choice {
        BackendChoice::Cpu => Ok((cpu, "asked for")),
        BackendChoice::Auto => Ok(match hardware {
            Some(gpu) => (gpu, "the first GPU that is not a software rasteriser"),
            None => (cpu, "no GPU but software rasterisers, if any, was found"),
        }),
        BackendChoice::Wgpu(None) => match hardware {
            Some(gpu) => Ok((gpu, "the first GPU that is not a software rasteriser")),
            None if cpu > 0 => Ok((0, "a software rasteriser: no other GPU was found")),
            None => Err(none(NO_GPU.into())),
        },
        BackendChoice::Wgpu(Some(index)) if index < cpu => Ok((index, "asked for")),
        BackendChoice::Wgpu(Some(index)) => Err(none(format!("there is no GPU {index}: {cpu} found. {NO_GPU}"))),
    }
}

#[cfg(feature = "wgpu")]
const NO_GPU: &str = "no Vulkan, Metal or DirectX 12 device was found; install the GPU's driver (on Linux also a Vulkan \
                      loader, libvulkan1), or use --backend cpu";
#[cfg(not(feature = "wgpu"))]
const NO_GPU: &str = "this build has no GPU backend (feature wgpu); use --backend cpu";

/// Opens the device that a choice means.
pub fn open(choice: &BackendChoice) -> Result<Box<dyn Backend>> {
    if *choice == BackendChoice::Cpu {
        return Ok(Box::new(CpuBackend::new(None)));
    }
    let devices = list();
    let (at, _) = choose(&devices, choice)?;
    if at == devices.len() - 1 {
        return Ok(Box::new(CpuBackend::new(None)));
    }
    open_gpu(at)
}

#[cfg(feature = "wgpu")]
fn open_gpu(index: usize) -> Result<Box<dyn Backend>> {
    Ok(Box::new(WgpuBackend::new(index)?))
}

#[cfg(not(feature = "wgpu"))]
fn open_gpu(_: usize) -> Result<Box<dyn Backend>> {
    unreachable!("no GPU is listed without the wgpu feature")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(choice: &str, software: bool) -> Device {
        Device { choice: choice.into(), name: String::new(), details: String::new(), software }
    }

    #[test]
    fn auto_takes_hardware_and_never_a_rasteriser() {
        let (soft, hard, cpu) = (device("wgpu:0", true), device("wgpu:1", false), device("cpu", false));
        let all = [soft.clone(), hard, cpu.clone()];
        assert_eq!(choose(&all, &BackendChoice::Auto).unwrap().0, 1);
        assert_eq!(choose(&[soft.clone(), cpu.clone()], &BackendChoice::Auto).unwrap().0, 1);
        assert_eq!(choose(&[soft, cpu.clone()], &BackendChoice::Wgpu(None)).unwrap().0, 0);
        assert_eq!(choose(std::slice::from_ref(&cpu), &BackendChoice::Auto).unwrap().0, 0);
        assert!(choose(&[cpu], &BackendChoice::Wgpu(None)).is_err());
        assert!(choose(&all, &BackendChoice::Wgpu(Some(2))).is_err());
    }
}

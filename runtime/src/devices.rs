//! Which devices there are, and which one is taken.

use std::fmt;
use std::mem::discriminant;
use std::str::FromStr;

use crate::backend::Backend;
use crate::cpu::CpuBackend;
#[cfg(cuda)]
use crate::cuda::{self, CudaBackend};
use crate::error::{Error, Result};
#[cfg(feature = "wgpu")]
use crate::wgpu::{self, WgpuBackend};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackendChoice {
    /// The first device without a drawback.
    #[default]
    Auto,
    Cpu,
    /// An NVIDIA GPU by its number in `treespark devices`; without one, the first without a drawback.
    Cuda(Option<usize>),
    /// A GPU by its number in `treespark devices`; without one, the first without a drawback, else the first.
    Wgpu(Option<usize>),
}

impl FromStr for BackendChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<BackendChoice, String> {
        let (api, index) = match text.split_once(':') {
            None => (text, None),
            Some((api, index)) => (api, Some(index.parse().map_err(|_| unknown(text))?)),
        };
        match (api, index) {
            ("auto", None) => Ok(BackendChoice::Auto),
            ("cpu", None) => Ok(BackendChoice::Cpu),
            ("cuda", index) => Ok(BackendChoice::Cuda(index)),
            ("wgpu", index) => Ok(BackendChoice::Wgpu(index)),
            _ => Err(unknown(text)),
        }
    }
}

fn unknown(text: &str) -> String {
    format!("'{text}' is no backend; there are: auto, cpu, cuda, cuda:N, wgpu, wgpu:N (see treespark devices)")
}

impl fmt::Display for BackendChoice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            BackendChoice::Auto => f.write_str("auto"),
            BackendChoice::Cpu => f.write_str("cpu"),
            BackendChoice::Cuda(None) => f.write_str("cuda"),
            BackendChoice::Cuda(Some(index)) => write!(f, "cuda:{index}"),
            BackendChoice::Wgpu(None) => f.write_str("wgpu"),
            BackendChoice::Wgpu(Some(index)) => write!(f, "wgpu:{index}"),
        }
    }
}

/// A device as a person sees it.
#[derive(Debug, Clone)]
pub struct Device {
    /// What opens it: never `Auto`, and a GPU has its number.
    pub choice: BackendChoice,
    pub name: String,
    /// API, type, driver, limits.
    pub details: String,
    /// Why `auto` passes over it: it does not work, or the CPU is faster.
    pub drawback: Option<String>,
}

/// What was found.
#[derive(Debug, Clone)]
pub struct Devices {
    /// NVIDIA GPUs through CUDA, then all GPUs through Vulkan, Metal or DirectX 12, and the CPU last.
    pub list: Vec<Device>,
    /// Why there is no CUDA device, if there is none.
    pub no_cuda: Option<String>,
}

impl Devices {
    pub fn find() -> Devices {
        let mut found = Devices { list: Vec::new(), no_cuda: None };
        found.add_cuda();
        found.list.extend(wgpu_devices());
        found.list.push(cpu_device());
        found
    }

    /// No more than a choice needs: finding the devices of an API takes a while.
    fn find_for(choice: BackendChoice) -> Devices {
        let mut found = Devices { list: Vec::new(), no_cuda: None };
        if matches!(choice, BackendChoice::Auto | BackendChoice::Cuda(_)) {
            found.add_cuda();
        }
        let settled = found.list.iter().any(|gpu| gpu.drawback.is_none());
        if matches!(choice, BackendChoice::Auto | BackendChoice::Wgpu(_)) && !settled {
            found.list.extend(wgpu_devices());
        }
        found.list.push(cpu_device());
        found
    }

    fn add_cuda(&mut self) {
        match cuda_devices() {
            Ok(gpus) => self.list.extend(gpus),
            Err(why) => self.no_cuda = Some(why),
        }
    }

    /// The device that a choice means, as its place in the list, with the reason.
    pub fn choose(&self, choice: BackendChoice) -> Result<(usize, &'static str)> {
        let usable = |device: &Device| device.drawback.is_none();
        let same_api = |device: &Device| discriminant(&device.choice) == discriminant(&choice);
        let first = |fits: &dyn Fn(&Device) -> bool| self.list.iter().position(fits);
        let found = match choice {
            BackendChoice::Auto => first(&usable),
            BackendChoice::Cuda(None) | BackendChoice::Wgpu(None) => {
                first(&|device| same_api(device) && usable(device)).or_else(|| first(&same_api))
            }
            exact => first(&|device| device.choice == exact),
        };
        let none = || Error::NoDevice { wanted: choice.to_string(), why: self.why_none(choice) };
        let at = found.ok_or_else(none)?;
        let device = &self.list[at];
        let why = match device.choice {
            taken if taken == choice => "asked for",
            _ if !usable(device) => "no other was found",
            BackendChoice::Cuda(_) => "the first NVIDIA GPU that CUDA can use",
            BackendChoice::Wgpu(_) => "the first GPU that is not a software rasteriser",
            _ => "no usable GPU was found",
        };
        Ok((at, why))
    }

    /// What to tell someone whose choice is not in the list.
    fn why_none(&self, choice: BackendChoice) -> String {
        let same_api = |device: &&Device| discriminant(&device.choice) == discriminant(&choice);
        let found = match self.list.iter().filter(same_api).count() {
            0 => String::new(),
            n => format!("{n} were found (see treespark devices); "),
        };
        match (choice, &self.no_cuda) {
            (BackendChoice::Cuda(_), Some(why)) => format!("{why}; use --backend wgpu or --backend cpu"),
            (BackendChoice::Cuda(_), None) => format!("{found}use --backend wgpu or --backend cpu"),
            _ => format!("{found}{NO_GPU}"),
        }
    }
}

impl Device {
    /// Bytes of its own memory that nobody uses at the moment, where that is known. Opens the device.
    pub fn free_bytes(&self) -> Option<usize> {
        #[cfg(cuda)]
        if let BackendChoice::Cuda(Some(index)) = self.choice {
            return cuda::gpus().ok()?.get(index)?.free_bytes().ok();
        }
        None
    }
}

fn cpu_device() -> Device {
    let (name, details) = (CpuBackend::describe(), "always there".into());
    Device { choice: BackendChoice::Cpu, name, details, drawback: None }
}

#[cfg(cuda)]
fn cuda_devices() -> Result<Vec<Device>, String> {
    let gpus = cuda::gpus().map_err(|error| match error {
        Error::NoDevice { why, .. } => why,
        other => other.to_string(),
    })?;
    if gpus.is_empty() {
        return Err("the NVIDIA driver knows no GPU".into());
    }
    let device = |(index, gpu): (usize, cuda::Gpu)| Device {
        choice: BackendChoice::Cuda(Some(index)),
        name: gpu.name(),
        details: gpu.details(),
        drawback: cuda::drawback(&gpu),
    };
    Ok(gpus.into_iter().enumerate().map(device).collect())
}

#[cfg(not(cuda))]
fn cuda_devices() -> Result<Vec<Device>, String> {
    let why = if cfg!(feature = "cuda") {
        "CUDA is reached on Linux (x86_64, aarch64) only"
    } else {
        "this build has no CUDA backend (feature cuda)"
    };
    Err(why.into())
}

#[cfg(feature = "wgpu")]
fn wgpu_devices() -> Vec<Device> {
    let device = |(index, gpu): (usize, wgpu::Gpu)| Device {
        choice: BackendChoice::Wgpu(Some(index)),
        details: gpu.details(),
        drawback: gpu.software.then(|| "a CPU in disguise, slower than the CPU backend".into()),
        name: gpu.name,
    };
    wgpu::adapters().into_iter().enumerate().map(device).collect()
}

#[cfg(not(feature = "wgpu"))]
fn wgpu_devices() -> Vec<Device> {
    Vec::new()
}

#[cfg(feature = "wgpu")]
const NO_GPU: &str = "no other Vulkan, Metal or DirectX 12 device was found; install the GPU's driver (on Linux also a \
                      Vulkan loader, libvulkan1), or use --backend cpu";
#[cfg(not(feature = "wgpu"))]
const NO_GPU: &str = "this build has no Vulkan, Metal or DirectX 12 backend (feature wgpu); use --backend cpu";

/// Opens the device that a choice means.
pub fn open(choice: &BackendChoice) -> Result<Box<dyn Backend>> {
    let devices = Devices::find_for(*choice);
    let (at, _) = devices.choose(*choice)?;
    match devices.list[at].choice {
        #[cfg(cuda)]
        BackendChoice::Cuda(Some(index)) => Ok(Box::new(CudaBackend::new(index)?)),
        #[cfg(feature = "wgpu")]
        BackendChoice::Wgpu(Some(index)) => Ok(Box::new(WgpuBackend::new(index)?)),
        _ => Ok(Box::new(CpuBackend::new(None))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Devices by their choice, `!` behind those with a drawback.
    fn devices(list: &[&str]) -> Devices {
        let device = |text: &&str| Device {
            choice: text.trim_end_matches('!').parse().unwrap(),
            name: String::new(),
            details: String::new(),
            drawback: text.ends_with('!').then(|| "slow".into()),
        };
        Devices { list: list.iter().map(device).collect(), no_cuda: Some("no driver".into()) }
    }

    #[test]
    fn the_first_without_a_drawback_is_taken() {
        for (list, choice, taken) in [
            (&["cuda:0", "wgpu:0", "cpu"][..], "auto", Some("cuda:0")),
            (&["cuda:0!", "cuda:1", "wgpu:0", "cpu"], "auto", Some("cuda:1")),
            (&["cuda:0!", "wgpu:0!", "wgpu:1", "cpu"], "auto", Some("wgpu:1")),
            (&["cuda:0!", "wgpu:0!", "cpu"], "auto", Some("cpu")),
            (&["cuda:0", "wgpu:0!", "cpu"], "wgpu", Some("wgpu:0")),
            (&["cuda:0!", "cuda:1", "cpu"], "cuda", Some("cuda:1")),
            (&["cuda:0!", "cuda:1", "cpu"], "cuda:0", Some("cuda:0")),
            (&["cuda:0!", "wgpu:0", "cpu"], "cuda", Some("cuda:0")),
            (&["cuda:0", "cpu"], "cuda:1", None),
            (&["wgpu:0", "cpu"], "cuda", None),
            (&["cuda:0", "cpu"], "wgpu", None),
            (&["cuda:0", "cpu"], "cpu", Some("cpu")),
        ] {
            let devices = devices(list);
            let found = devices.choose(choice.parse().unwrap()).ok();
            let found = found.map(|(at, _)| devices.list[at].choice.to_string());
            assert_eq!(found.as_deref(), taken, "{choice} of {list:?}");
        }
    }

    #[test]
    fn choices_are_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda", "cuda:3", "wgpu", "wgpu:0"] {
            assert_eq!(text.parse::<BackendChoice>().unwrap().to_string(), text);
        }
        for text in ["", "gpu", "cpu:0", "auto:1", "cuda:", "cuda:x", "wgpu:-1"] {
            assert!(text.parse::<BackendChoice>().unwrap_err().contains("cuda:N"), "{text}");
        }
    }

    #[test]
    fn who_asks_for_cuda_in_vain_is_told_why() {
        let error = devices(&["wgpu:0", "cpu"]).choose(BackendChoice::Cuda(None)).unwrap_err();
        assert!(error.to_string().contains("--backend cuda: no driver; use"), "{error}");
    }
}

//! The device that is measured: any backend, and what only CUDA's can tell (its own clock, its memory's speed).

use anyhow::{Result, bail};
use treespark::backend::{Backend, PassId};
#[cfg(cuda)]
use treespark::cuda::CudaBackend;
use treespark::devices::{self, BackendChoice, Devices};
use treespark_kernel_gen::Pass;
#[cfg(cuda)]
use treespark_kernel_gen::cuda::lower_pass;

pub enum Device {
    #[cfg(cuda)]
    Cuda(Box<CudaBackend>),
    Other(Box<dyn Backend>),
}

impl Device {
    /// Opens the device that a choice means.
    pub fn open(choice: BackendChoice) -> Result<Device> {
        let devices = match choice {
            #[cfg(cuda)]
            BackendChoice::Cuda(Some(index)) => return Ok(Device::Cuda(Box::new(CudaBackend::new(index)?))),
            BackendChoice::Cuda(None) | BackendChoice::Auto => Devices::find(),
            other => return Ok(Device::Other(devices::open(&other)?)),
        };
        let (at, _) = devices.choose(choice)?;
        match devices.list[at].choice {
            // What was chosen of the first has its number.
            exact if exact != choice => Device::open(exact),
            exact => Ok(Device::Other(devices::open(&exact)?)),
        }
    }

    /// Opens an NVIDIA GPU, the only kind of device that has a clock of its own.
    pub fn open_with_clock(choice: BackendChoice) -> Result<Device> {
        match choice {
            BackendChoice::Auto => Device::open(BackendChoice::Cuda(None)),
            BackendChoice::Cuda(_) => Device::open(choice),
            other => bail!("this benchmark measures by the GPU's own clock: it needs --backend cuda, not {other}"),
        }
    }

    pub fn backend(&mut self) -> &mut dyn Backend {
        match self {
            #[cfg(cuda)]
            Device::Cuda(cuda) => cuda.as_mut(),
            Device::Other(backend) => backend.as_mut(),
        }
    }

    pub fn name(&mut self) -> String {
        self.backend().info().name.clone()
    }

    pub fn has_clock(&self) -> bool {
        !matches!(self, Device::Other(_))
    }

    /// The newest CUDA that the driver serves.
    pub fn driver(&self) -> Option<String> {
        match self {
            #[cfg(cuda)]
            Device::Cuda(cuda) => Some(format!("CUDA {}", cuda.gpu().driver)),
            Device::Other(_) => None,
        }
    }

    /// Microseconds, by the device's clock, of each of `repeats` runs of these passes one after the other.
    #[cfg_attr(not(cuda), allow(unused_variables))]
    pub fn time(&mut self, passes: &[PassId], repeats: usize) -> Result<Vec<f64>> {
        match self {
            #[cfg(cuda)]
            Device::Cuda(cuda) => Ok(cuda.time(passes, repeats)?),
            Device::Other(_) => bail!("only CUDA's backend has a clock of its own"),
        }
    }

    /// Bytes read and written a second by a large copy within the device's memory.
    pub fn copy_bandwidth(&mut self) -> Result<f64> {
        match self {
            #[cfg(cuda)]
            Device::Cuda(cuda) => Ok(cuda.copy_bandwidth()?),
            Device::Other(_) => bail!("only CUDA's backend has a clock of its own"),
        }
    }

    /// The names of the kernels that a pass becomes, in their order.
    #[cfg_attr(not(cuda), allow(unused_variables))]
    pub fn kernels(&self, pass: &Pass) -> Result<Vec<String>> {
        match self {
            #[cfg(cuda)]
            Device::Cuda(cuda) => {
                let launches = lower_pass(pass, &cuda.gpu().device)?;
                Ok(launches.iter().map(|launch| launch.spec.name().to_string()).collect())
            }
            Device::Other(_) => bail!("only CUDA's kernels are known by name"),
        }
    }
}

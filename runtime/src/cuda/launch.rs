//! One kernel launch with all that the driver wants: function, grid, and the addresses of its arguments.

use std::ffi::c_void;
use std::ptr;

use treespark_kernel_gen::cuda::Launch;

use super::device::OpenDevice;
use super::driver::{self, FunctionHandle, LaunchAttribute, LaunchConfig, check};
use crate::error::Result;

#[derive(Clone)]
pub(super) struct ReadyLaunch {
    function: FunctionHandle,
    /// For messages.
    kernel: String,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    /// Blocks of a cluster; 1 is none.
    cluster: u32,
    /// Device addresses, in the order of the kernel's parameters.
    arguments: Vec<u64>,
}

impl ReadyLaunch {
    pub fn new(launch: &Launch, function: FunctionHandle, arguments: Vec<u64>) -> ReadyLaunch {
        ReadyLaunch {
            function,
            kernel: launch.spec.name().to_string(),
            grid: launch.grid.map(|blocks| blocks as u32),
            threads: launch.threads as u32,
            shared_bytes: launch.shared_bytes as u32,
            cluster: launch.cluster as u32,
            arguments,
        }
    }

    /// Enqueues it. With `overlap` the kernel may start before the one before it has ended, and waits for it by itself
    /// (`wait_for_previous` in `shaders/cuda/lib/ptx.cuh`); only devices that form clusters can do that.
    pub fn enqueue(&self, device: &OpenDevice, overlap: bool) -> Result<()> {
        let mut attributes = Vec::with_capacity(2);
        if self.cluster > 1 {
            attributes.push(LaunchAttribute::cluster(self.cluster));
        }
        if overlap {
            attributes.push(LaunchAttribute::overlap());
        }
        let ([x, y, z], shared) = (self.grid, self.shared_bytes);
        let mut parameters: Vec<*mut c_void> =
            self.arguments.iter().map(|address| ptr::from_ref(address) as *mut c_void).collect();
        let parameters = parameters.as_mut_ptr();
        let (function, none) = (self.function, ptr::null_mut());
        let code = if attributes.is_empty() {
            // SAFETY: `function` is of a module that is loaded; `parameters` points to one address for each parameter,
            // as `kernel_gen::cuda::lower` lists them, and the driver copies them before it returns. The memory they
            // name is owned by the backend, which drops it after the stream's last work.
            unsafe {
                driver::cuLaunchKernel(function, x, y, z, self.threads, 1, 1, shared, device.stream, parameters, none)
            }
        } else {
            let config = LaunchConfig {
                grid: self.grid,
                block: [self.threads, 1, 1],
                shared_bytes: shared,
                stream: device.stream,
                attributes: attributes.as_ptr(),
                n_attributes: attributes.len() as u32,
            };
            // SAFETY: as above; `config` and its attributes live until the driver returns, and are laid out as it reads
            // them (asserted in `driver`).
            unsafe { driver::cuLaunchKernelEx(&config, function, parameters, none) }
        };
        check(&format!("launching {}", self.kernel), code)
    }
}

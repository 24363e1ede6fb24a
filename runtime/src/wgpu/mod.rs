//! Any GPU, through Vulkan, Metal or DirectX 12: generated WGSL kernels, one command buffer a pass.
//!
//! Reading order: `adapters` (which GPUs there are), `device` (the open one), `buffers`, `pipelines`, `passes`.

mod adapters;
mod buffers;
mod device;
mod passes;
mod pipeline_cache;
mod pipelines;
mod trusted;

use std::path::Path;

use ::wgpu::Buffer;
use treespark_kernel_gen::lower::Limits;
use treespark_kernel_gen::{BufferDesc, Pass};
use treespark_models::Tensor;

pub use adapters::{Gpu, adapters};
use buffers::Banked;
use device::OpenDevice;
use passes::CompiledPass;
use pipeline_cache::PipelineCacheFile;
use pipelines::Pipelines;

use crate::backend::{Backend, BufferId, DeviceInfo, Extent, PassCost, PassId};
use crate::cache_folder::cache_folder;
use crate::error::{Error, Result};

/// SmolLM2-135M on an H100 through Vulkan: a pass waits for launches more than for arithmetic, so rows are nearly free
/// but for the steps between the sizes that passes are compiled for.
const GPU_COST: PassCost =
    PassCost::new(&[(1, 1.0), (2, 1.11), (4, 1.13), (8, 1.25), (16, 1.33), (17, 1.6), (64, 2.4)]);
/// The same on two CPU cores through lavapipe: rows are computed one after the other.
const SOFTWARE_COST: PassCost = PassCost::new(&[(1, 1.0), (4, 1.75), (16, 4.6)]);

pub struct WgpuBackend {
    device: OpenDevice,
    info: DeviceInfo,
    limits: Limits,
    /// None: given back.
    buffers: Vec<Option<Banked>>,
    pipelines: Pipelines,
    passes: Vec<CompiledPass>,
    /// Partial results of attention, shared by all passes: no two calls that use them overlap.
    partials: Option<Buffer>,
}

impl WgpuBackend {
    /// Opens the GPU at this place in [`adapters`].
    pub fn new(index: usize) -> Result<WgpuBackend> {
        WgpuBackend::open(index, usize::MAX, cache_folder("pipelines").as_deref())
    }

    /// The same as on a device that binds at most so many bytes: large weights and caches are kept in more banks.
    /// Touches no files.
    pub fn with_binding_bytes(index: usize, binding_bytes: usize) -> Result<WgpuBackend> {
        WgpuBackend::open(index, binding_bytes, None)
    }

    fn open(index: usize, binding_bytes: usize, cache_folder: Option<&Path>) -> Result<WgpuBackend> {
        let mut adapters = adapters::enumerate();
        if index >= adapters.len() {
            let why = format!("{} GPUs were found (see treespark devices)", adapters.len());
            return Err(Error::NoDevice { wanted: format!("wgpu:{index}"), why });
        }
        let adapter = adapters.swap_remove(index);
        let device = OpenDevice::new(&adapter)?;
        let real = device.device.limits();
        let allowed = real.max_storage_buffer_binding_size.min(real.max_buffer_size);
        let limits = Limits {
            // A multiple of four words, so that a bank's size can be rounded up to one.
            binding_bytes: usize::try_from(allowed).unwrap_or(usize::MAX).min(binding_bytes) / 16 * 16,
            offset_alignment: real.min_storage_buffer_offset_alignment.max(16) as usize,
        };
        let info = DeviceInfo {
            backend: "wgpu",
            name: device.name.clone(),
            cost: if device.software { SOFTWARE_COST } else { GPU_COST },
            layer_bytes: 0,
        };
        let cache = cache_folder.and_then(|f| PipelineCacheFile::open(&device.device, &adapter.get_info(), f));
        let pipelines = Pipelines::new(cache);
        Ok(WgpuBackend { device, info, limits, buffers: Vec::new(), pipelines, passes: Vec::new(), partials: None })
    }

    fn buffer(&self, id: BufferId) -> &Banked {
        self.buffers[id.0].as_ref().expect("a buffer that was not freed")
    }

    fn add(&mut self, buffer: Banked) -> BufferId {
        self.buffers.push(Some(buffer));
        BufferId(self.buffers.len() - 1)
    }

    /// Memory for so many bytes of partial results. Passes compiled earlier keep what they have.
    fn partials(&mut self, bytes: usize) -> Result<Buffer> {
        match &self.partials {
            Some(buffer) if buffer.size() >= bytes as u64 => Ok(buffer.clone()),
            _ => {
                let buffer = self.device.buffer("partial results of attention", bytes as u64)?;
                self.partials = Some(buffer.clone());
                Ok(buffer)
            }
        }
    }
}

impl Backend for WgpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn load(&mut self, desc: &BufferDesc, parts: &[Tensor]) -> Result<BufferId> {
        let buffer = Banked::new(&self.device, desc, &self.limits)?;
        buffer.upload(&self.device, parts)?;
        Ok(self.add(buffer))
    }

    fn alloc(&mut self, desc: &BufferDesc) -> Result<BufferId> {
        let buffer = Banked::new(&self.device, desc, &self.limits)?;
        Ok(self.add(buffer))
    }

    fn free(&mut self, buffer: BufferId) {
        // Passes that name it hold on to the buffers, but not to their memory.
        if let Some(banked) = self.buffers[buffer.0].take() {
            banked.banks.iter().for_each(Buffer::destroy);
        }
    }

    fn write(&mut self, buffer: BufferId, offset: usize, words: &[u32]) -> Result<()> {
        self.buffer(buffer).write(&self.device, offset * 4, bytemuck::cast_slice(words));
        self.device.check()
    }

    fn read(&mut self, buffer: BufferId, offset: usize, len: usize) -> Result<Vec<u32>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        self.buffer(buffer).read(&self.device, offset * 4..(offset + len) * 4)
    }

    fn compile(&mut self, pass: &Pass, buffers: &[BufferId]) -> Result<PassId> {
        let calls = passes::lower_pass(pass, &self.limits)?;
        let partials = self.partials(passes::partial_bytes(&calls))?;
        let buffers: Vec<&Banked> =
            buffers.iter().map(|id| self.buffers[id.0].as_ref().expect("a buffer that was not freed")).collect();
        let compiled = CompiledPass::new(&self.device, &mut self.pipelines, &calls, &buffers, &partials)?;
        self.pipelines.save();
        self.passes.push(compiled);
        Ok(PassId(self.passes.len() - 1))
    }

    fn run(&mut self, pass: PassId, extent: Extent) -> Result<()> {
        self.passes[pass.0].run(&self.device, extent)
    }
}

#[cfg(test)]
mod tests;

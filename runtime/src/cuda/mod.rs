//! NVIDIA GPUs: kernels generated as CUDA, compiled by NVRTC when they are first needed; a pass is a CUDA graph.
//!
//! Nothing of CUDA is needed to build this, nor to start a program that has it: the driver and NVRTC are looked for at
//! run time. All `unsafe` calls of them are in this folder.
//!
//! Reading order: `gpus` (which there are), `device` (the open one), `copies` and `tiles` (what goes in and out), `nvrtc`,
//! `cubin_cache` and `kernels` (from a spec to a function), `launch`, `graph` (a pass), `timing`; `driver` is the
//! interface to the driver, beside `cust`.
#![allow(unsafe_code)]

mod gpus;
mod device;
mod copies;
mod tiles;
mod nvrtc;
mod cubin_cache;
mod kernels;
mod launch;
mod graph;
mod timing;
mod driver;

use cust::memory::DeviceBuffer;
use treespark_kernel_gen::cuda::{Argument, Launch, Source, lower_pass};
use treespark_kernel_gen::{BufferDesc, Pass};
use treespark_models::Tensor;

use copies::{Downloads, Uploads};
use cubin_cache::CubinCache;
use device::OpenDevice;
pub use gpus::{DriverVersion, Gpu, OLDEST_ARCH, gpus, least_shared_bytes};
use graph::Graph;
use kernels::Kernels;
use launch::ReadyLaunch;
pub use nvrtc::{Compiled, Nvrtc, Version};
use tiles::Tiles;

use crate::backend::{Backend, BufferId, DeviceInfo, Extent, PassCost, PassId};
use crate::cache_folder::cache_folder;
use crate::error::{Error, Result};

/// SmolLM2-135M on an H200, behind 512 tokens: what a row costs there is the work around the products more than the
/// products, since a pass waits for its kernels one after the other.
const COST: PassCost = PassCost::new(&[(1, 1.0), (4, 1.05), (8, 1.11), (16, 1.27), (32, 1.7), (64, 1.95)]);
/// DeepSeek-V2-Lite's sizes on an H200: a pass of one row reads 4.9 GB in 2.55 ms, where a copy would take half as long.
const LAYER_BYTES: usize = 130 << 20;
#[cfg(test)]
pub(crate) const COSTS: (PassCost, usize) = (COST, LAYER_BYTES);

pub struct CudaBackend {
    info: DeviceInfo,
    passes: Vec<CompiledPass>,
    kernels: Kernels,
    uploads: Uploads,
    downloads: Downloads,
    /// None: given back.
    buffers: Vec<Option<Buffer>>,
    workspace: Shared,
    counters: Shared,
    /// Last: what the others hold is given back while it is open.
    device: OpenDevice,
}

struct Buffer {
    memory: DeviceBuffer<u8>,
    tiles: Option<Tiles>,
}

struct CompiledPass {
    graph: Graph,
    launches: Vec<ReadyLaunch>,
}

impl CudaBackend {
    /// Opens the GPU at this place in [`gpus`].
    pub fn new(index: usize) -> Result<CudaBackend> {
        let device = OpenDevice::new(index)?;
        let no_device = |why: String| Error::NoDevice { wanted: format!("cuda:{index}"), why };
        if let Some(why) = drawback(&device.gpu) {
            return Err(no_device(why));
        }
        let nvrtc = Nvrtc::find(device.gpu.driver).map_err(|why| no_device(why.into()))?;
        let cache = CubinCache::new(cache_folder("cubins"));
        Ok(CudaBackend {
            info: DeviceInfo { backend: "cuda", name: device.gpu.name(), cost: COST, layer_bytes: LAYER_BYTES },
            passes: Vec::new(),
            kernels: Kernels::new(nvrtc, cache, device.gpu.target()),
            uploads: Uploads::new()?,
            downloads: Downloads::new()?,
            buffers: Vec::new(),
            workspace: Shared::new("partial results"),
            counters: Shared::new("counters"),
            device,
        })
    }

    /// What the driver says of the GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.device.gpu
    }

    /// What compiles the kernels.
    pub fn nvrtc(&self) -> &Nvrtc {
        self.kernels.nvrtc()
    }

    /// Bytes of the GPU's memory that nobody uses at the moment.
    pub fn free_bytes(&self) -> Result<usize> {
        self.device.enter()?;
        gpus::free_bytes()
    }

    fn buffer(&self, id: BufferId) -> &Buffer {
        self.buffers[id.0].as_ref().expect("a buffer that was not freed")
    }

    /// The words as they lie on the device.
    fn read_raw(&mut self, id: BufferId, offset: usize, len: usize) -> Result<Vec<u32>> {
        let from = self.buffer(id).address() + 4 * offset as u64;
        self.downloads.words(&self.device, from, len)
    }

    fn write_raw(&mut self, id: BufferId, offset: usize, words: &[u32]) -> Result<()> {
        let to = self.buffer(id).address() + 4 * offset as u64;
        self.uploads.enqueue(&self.device, to, bytemuck::cast_slice(words))
    }

    /// Makes launches ready to run as a pass; `buffers[i]` is the pass's buffer i.
    fn bound(&mut self, launches: &[Launch], buffers: &[BufferId]) -> Result<PassId> {
        let functions = self.kernels.functions(launches)?;
        let mut ready = Vec::with_capacity(launches.len());
        for (launch, function) in launches.iter().zip(functions) {
            let arguments = self.addresses(launch, buffers)?;
            ready.push(ReadyLaunch::new(launch, function, arguments));
        }
        self.add_pass(ready)
    }

    fn add_pass(&mut self, launches: Vec<ReadyLaunch>) -> Result<PassId> {
        let graph = Graph::capture(&self.device, &launches.iter().collect::<Vec<_>>())?;
        self.passes.push(CompiledPass { graph, launches });
        Ok(PassId(self.passes.len() - 1))
    }

    /// Device addresses of a launch's arguments.
    fn addresses(&mut self, launch: &Launch, buffers: &[BufferId]) -> Result<Vec<u64>> {
        let address = |&Argument { source, offset }: &Argument| {
            let base = match source {
                Source::Buffer(buf) => self.buffer(buffers[buf.0]).address(),
                Source::Workspace(bytes) => self.workspace.at_least(&self.device, offset + bytes)?,
                Source::Counters(words) => self.counters.at_least(&self.device, offset + 4 * words)?,
                Source::Null => return Ok(0),
            };
            Ok(base + offset as u64)
        };
        launch.arguments.iter().map(address).collect()
    }
}

/// Why no kernels are written for this GPU, or cannot be compiled for it.
pub fn drawback(gpu: &Gpu) -> Option<String> {
    let (arch, oldest) = (gpu.device.arch, OLDEST_ARCH);
    if arch < oldest {
        let capability = |arch: usize| format!("{}.{}", arch / 10, arch % 10);
        return Some(format!("compute capability {}: {} is needed", capability(arch), capability(oldest)));
    }
    let (has, needed) = (gpu.device.shared_bytes >> 10, least_shared_bytes(&gpu.device) >> 10);
    if has < needed {
        return Some(format!("a block has {has} KiB of shared memory, kernels need {needed} KiB: use Vulkan"));
    }
    Nvrtc::find(gpu.driver).err().map(String::from)
}

fn lowered(pass: &Pass, device: &OpenDevice) -> Result<Vec<Launch>> {
    lower_pass(pass, &device.gpu.device).map_err(|e| Error::Device(format!("pass {}: {e}", pass.name)))
}

impl Buffer {
    fn address(&self) -> u64 {
        self.memory.as_device_ptr().as_raw()
    }
}

/// Memory that all launches share, one after the other.
struct Shared {
    what: &'static str,
    /// The last is the largest. Graphs captured earlier name the others.
    kept: Vec<DeviceBuffer<u8>>,
}

impl Shared {
    fn new(what: &'static str) -> Shared {
        Shared { what, kept: Vec::new() }
    }

    /// The address of at least so many bytes, zero at first.
    fn at_least(&mut self, device: &OpenDevice, bytes: usize) -> Result<u64> {
        if self.kept.last().is_none_or(|memory| memory.len() < bytes) {
            self.kept.push(device.zeroed(self.what, bytes)?);
        }
        Ok(self.kept.last().expect("just added").as_device_ptr().as_raw())
    }
}

impl Backend for CudaBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Option<usize> {
        CudaBackend::free_bytes(self).ok()
    }

    fn drafts(&self) -> bool {
        true
    }

    fn load(&mut self, desc: &BufferDesc, parts: &[Tensor]) -> Result<BufferId> {
        let id = self.alloc(desc)?;
        let mut to = self.buffer(id).address();
        for part in parts {
            let bytes = part.bytes.as_slice();
            self.uploads.enqueue(&self.device, to, bytes)?;
            to += bytes.len() as u64;
        }
        Ok(id)
    }

    fn alloc(&mut self, desc: &BufferDesc) -> Result<BufferId> {
        self.device.enter()?;
        let memory = self.device.zeroed(&desc.name, desc.bytes())?;
        self.buffers.push(Some(Buffer { memory, tiles: Tiles::of(desc) }));
        Ok(BufferId(self.buffers.len() - 1))
    }

    fn free(&mut self, buffer: BufferId) {
        // Work that is under way may use it. If the device is lost, so is the memory.
        let idle = self.device.enter().and_then(|()| self.device.wait());
        let memory = self.buffers[buffer.0].take();
        if idle.is_err() {
            std::mem::forget(memory);
        }
    }

    fn write(&mut self, buffer: BufferId, offset: usize, words: &[u32]) -> Result<()> {
        self.device.enter()?;
        let Some(tiles) = self.buffer(buffer).tiles else { return self.write_raw(buffer, offset, words) };
        let blocks = tiles.blocks(offset..offset + words.len());
        let mut plain = tiles.plain(&self.read_raw(buffer, blocks.start, blocks.len())?);
        plain[offset - blocks.start..][..words.len()].copy_from_slice(words);
        self.write_raw(buffer, blocks.start, &tiles.tiled(&plain))
    }

    fn read(&mut self, buffer: BufferId, offset: usize, len: usize) -> Result<Vec<u32>> {
        self.device.enter()?;
        let Some(tiles) = self.buffer(buffer).tiles else { return self.read_raw(buffer, offset, len) };
        let blocks = tiles.blocks(offset..offset + len);
        let plain = tiles.plain(&self.read_raw(buffer, blocks.start, blocks.len())?);
        Ok(plain[offset - blocks.start..][..len].to_vec())
    }

    fn compile(&mut self, pass: &Pass, buffers: &[BufferId]) -> Result<PassId> {
        self.device.enter()?;
        let launches = lowered(pass, &self.device)?;
        self.bound(&launches, buffers)
    }

    fn prepare(&mut self, passes: &[Pass]) -> Result<()> {
        self.device.enter()?;
        let lowered = passes.iter().map(|pass| lowered(pass, &self.device)).collect::<Result<Vec<_>>>()?;
        self.kernels.functions(&lowered.concat()).map(drop)
    }

    /// One graph of all launches.
    fn join(&mut self, passes: &[PassId]) -> Result<PassId> {
        self.device.enter()?;
        let launches = passes.iter().flat_map(|pass| self.passes[pass.0].launches.clone()).collect();
        self.add_pass(launches)
    }

    /// The graph is for all rows that the pass is compiled for: blocks without work return.
    fn run(&mut self, pass: PassId, _: Extent) -> Result<()> {
        self.device.enter()?;
        self.passes[pass.0].graph.launch(&self.device)
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // What the fields hold is given back next; work that is under way may use it. There is nobody to tell of errors.
        drop(self.device.enter().and_then(|()| self.device.wait()));
    }
}

#[cfg(test)]
mod tests;

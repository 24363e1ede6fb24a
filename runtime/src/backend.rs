//! What a device must do: hold buffers, compile passes, run them.
//!
//! Buffers and passes are named by handles, so a backend is an object (`dyn Backend`) and nothing above it is generic.
//! [`Op::check`](treespark_kernel_gen::Op::check) has validated every pass before `compile` sees it; backends do not
//! check again. Only [`Backend::read`] waits for the device.

use treespark_kernel_gen::{BufferDesc, Pass};
use treespark_models::Tensor;

use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferId(pub usize);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PassId(pub usize);

/// How much of a pass a run needs. Trims the launch; kernels read the exact values from the batch buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Active rows, at most `Pass::rows`.
    pub rows: usize,
    /// Active requests.
    pub requests: usize,
    /// Keys of the longest row: largest position + 1.
    pub keys: usize,
}

#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// `cpu` or `wgpu`.
    pub backend: &'static str,
    /// As a person would name it, e.g. `AMD EPYC 9B14, 2 threads, AVX2` or `NVIDIA H100 (Vulkan)`.
    pub name: String,
    /// Cost of one more row in a pass, as a fraction of a pass of one row: what a tree node must be worth.
    pub row_cost: f32,
}

pub trait Backend {
    fn info(&self) -> &DeviceInfo;

    /// A weight: the parts, stacked along the first dimension, are the buffer. Parts have the buffer's dtype.
    fn load(&mut self, desc: &BufferDesc, parts: &[Tensor]) -> Result<BufferId>;

    /// A zeroed buffer.
    fn alloc(&mut self, desc: &BufferDesc) -> Result<BufferId>;

    /// Gives the memory back. Passes that name the buffer must not run again.
    fn free(&mut self, buffer: BufferId);

    /// Overwrites words (4 bytes each) from `offset` words on. Not for weights.
    fn write(&mut self, buffer: BufferId, offset: usize, words: &[u32]) -> Result<()>;

    /// Reads `len` words from `offset` words on, after all enqueued work. The only call that waits.
    fn read(&mut self, buffer: BufferId, offset: usize, len: usize) -> Result<Vec<u32>>;

    /// Makes a checked pass ready to run; `buffers[i]` is the pass's buffer i.
    fn compile(&mut self, pass: &Pass, buffers: &[BufferId]) -> Result<PassId>;

    /// Enqueues a pass.
    fn run(&mut self, pass: PassId, extent: Extent) -> Result<()>;
}

//! CUDA: from an op to kernel launches: which kernels, on which buffers, over which grid.
//!
//! Every argument of a kernel is a pointer; sizes are constants of its source, counts are read from the batch buffers. So
//! a grid is made for all rows and requests that a pass is compiled for, blocks that find nothing to do return, and a
//! captured graph serves any lengths.

use crate::Request;
use crate::layout::HEADER_WORDS;
use crate::op::{Batch, CacheShape, Op};
use crate::pass::{Buf, BufferDesc, DType, Pass};
use crate::spec::KernelSpec;

mod acceptance;
mod attention;
mod drafting;
mod experts;
mod latent;
mod plain_attention;
mod tiling;
mod weights;

/// What kernels are chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device {
    /// Compute capability times ten: 80, 86, 89, 90.
    pub arch: usize,
    pub multiprocessors: usize,
    /// Shared memory that one block may have, in bytes.
    pub shared_bytes: usize,
}

impl Device {
    pub const H100: Device = Device { arch: 90, multiprocessors: 132, shared_bytes: 227 << 10 };
    pub const A100: Device = Device { arch: 80, multiprocessors: 108, shared_bytes: 163 << 10 };
    /// Has the least shared memory of all that kernels are cut for.
    pub const RTX_4090: Device = Device { arch: 89, multiprocessors: 128, shared_bytes: 99 << 10 };

    /// Blocks can form clusters that read each other's shared memory.
    pub fn has_clusters(&self) -> bool {
        self.arch >= 90
    }

    /// Warps of a group can multiply together: Hopper's own instructions, not even its successors'.
    pub fn has_wgmma(&self) -> bool {
        self.arch == 90
    }

    /// Clusters of this size that run at once, a block a multiprocessor. Large ones leave some multiprocessors over: on
    /// an H100 66 clusters of 2 fit, 30 of 4, 15 of 8 (asked of the driver).
    pub fn clusters(&self, size: usize) -> usize {
        if size <= 2 { self.multiprocessors / size } else { self.multiprocessors * 10 / 11 / size }
    }
}

/// One launch of one kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    pub spec: KernelSpec,
    /// In the order of the kernel's parameters.
    pub arguments: Vec<Argument>,
    /// Blocks along x, y and z.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub threads: usize,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: usize,
    /// Blocks of a cluster, along x; 1 is none.
    pub cluster: usize,
}

/// A pointer that a kernel gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Argument {
    pub source: Source,
    /// Bytes from its beginning.
    pub offset: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Buffer(Buf),
    /// This many bytes for a kernel's partial results. All launches may share them, one after the other.
    Workspace(usize),
    /// This many words that are zero when a kernel starts and that it leaves zero. All launches may share them.
    Counters(usize),
    /// No pointer: the op lacks this operand, and the kernel knows.
    Null,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    #[error("{op}: needs {needed} bytes of shared memory in a block, the GPU has {available}")]
    SharedMemory { op: &'static str, needed: usize, available: usize },
}

/// Whether a cache lies in the order that tensor cores read it in; see `shaders/cuda/lib/paged.cuh`.
pub fn is_tiled(cache: &CacheShape, dtype: DType) -> bool {
    dtype.size() == 2 && matches!(cache.head_dim, 64 | 128 | LATENT_DIM) && matches!(cache.page_size, 16 | 32 | 64)
}

/// Of a latent and its key, in every model of DeepSeek's.
const LATENT_DIM: usize = 576;

/// Where element `d` of the vector at `slot` of a page lies in the `[page_size, head_dim]` block of the page and head.
pub fn cache_place(cache: &CacheShape, dtype: DType, slot: usize, d: usize) -> usize {
    if is_tiled(cache, dtype) {
        (d / 64 * cache.page_size + slot) * 64 + ((d % 64 / 8) ^ (slot % 8)) * 8 + d % 8
    } else {
        slot * cache.head_dim + d
    }
}

/// The launches that carry out a pass whose ops [`Op::check`] accepted.
pub fn lower_pass(pass: &Pass, device: &Device) -> Result<Vec<Launch>, LowerError> {
    let mut launches = Vec::new();
    for op in &pass.ops {
        launches.extend(lower(op, pass, device)?);
    }
    Ok(launches)
}

/// The launches that carry out `op`, an op of `pass` that [`Op::check`] accepted.
pub fn lower(op: &Op, pass: &Pass, device: &Device) -> Result<Vec<Launch>, LowerError> {
    let lowering = Lowering { op, pass, device, batch: op.batch() };
    let launches = match op {
        Op::Embed { .. } => lowering.embed(),
        Op::Qkv { .. } => lowering.qkv(),
        Op::Project { .. } => lowering.project(),
        Op::GateUp { .. } => lowering.gate_up(),
        Op::ResBlock { .. } => lowering.res_block(),
        Op::Norm { .. } => lowering.norm(),
        Op::Gather { .. } => lowering.gather(),
        Op::Head { .. } => lowering.head(),
        Op::TreeAttention { .. } => lowering.tree_attention(),
        Op::Mask { .. } => lowering.mask(),
        Op::Draw { .. } => lowering.draw(),
        Op::Perturb { .. } => lowering.perturb(),
        Op::TopK { .. } => lowering.top_k(),
        Op::Accept { .. } => lowering.accept(),
        Op::Commit { .. } => lowering.commit(),
        Op::DraftNgram { .. } => lowering.draft_ngram(),
        Op::Grow { .. } => lowering.grow(),
        Op::OpenBlock { .. } => lowering.open_block(),
        Op::Trellis { .. } => lowering.trellis(),
        Op::GrowTrellis { .. } => lowering.grow_trellis(),
        Op::Latent { .. } => lowering.latent(),
        Op::LatentQueries { .. } => lowering.latent_queries(),
        Op::PerHead { .. } => lowering.per_head(),
        Op::LatentAttention { .. } => lowering.latent_attention(),
        Op::Route { .. } => lowering.route(),
        Op::GroupRows { .. } => lowering.group_rows(),
        Op::ExpertGateUp { .. } => lowering.expert_gate_up(),
        Op::ExpertDown { .. } => lowering.expert_down(),
        Op::Combine { .. } => lowering.combine(),
    };
    for launch in &launches {
        if launch.shared_bytes > device.shared_bytes {
            let (needed, available) = (launch.shared_bytes, device.shared_bytes);
            return Err(LowerError::SharedMemory { op: op.name(), needed, available });
        }
    }
    Ok(launches)
}

/// One op being lowered.
struct Lowering<'a> {
    op: &'a Op,
    pass: &'a Pass,
    device: &'a Device,
    batch: &'a Batch,
}

impl Lowering<'_> {
    fn desc(&self, buf: Buf) -> &BufferDesc {
        self.pass.buffer(buf)
    }

    fn max_requests(&self) -> usize {
        (self.desc(self.batch.requests).len() - HEADER_WORDS) / Request::WORDS
    }

    fn pages_per_request(&self) -> usize {
        self.desc(self.batch.pages).shape[1]
    }

    /// One layer of a cache.
    fn layer(&self, cache: Buf, layer: usize) -> Argument {
        let desc = self.desc(cache);
        Argument { source: Source::Buffer(cache), offset: layer * desc.bytes() / desc.shape[0] }
    }

    /// The constants of `lib/paged.cuh`, `CACHE` (the format) among them.
    fn paged(&self, spec: KernelSpec, cache: Buf) -> KernelSpec {
        let (shape, dtype) = (self.pass.cache_shape(cache), self.desc(cache).dtype);
        spec.size("HEAD_DIM", "hd", shape.head_dim)
            .size("KV_HEADS", "kv", shape.kv_heads)
            .size("PAGE_SIZE", "p", shape.page_size)
            .format("CACHE", dtype)
            .with("PAGES_PER_REQUEST", self.pages_per_request())
            .with("TILED", is_tiled(&shape, dtype))
    }
}

impl From<Buf> for Argument {
    fn from(buf: Buf) -> Argument {
        Argument { source: Source::Buffer(buf), offset: 0 }
    }
}

impl From<Option<Buf>> for Argument {
    fn from(buf: Option<Buf>) -> Argument {
        let null = Argument { source: Source::Null, offset: 0 };
        buf.map_or(null, Argument::from)
    }
}

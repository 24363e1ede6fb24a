//! The CPU backend: plain loops over threads, at the speed of the memory.
//!
//! Weights stay as they are stored, bf16, f16 or f32, and are widened in registers. A row's result is the same, bit for
//! bit, whatever other rows share the pass and however many threads run it: every sum has an order that the model's
//! sizes or the keys' positions fix (`matmul`, `attention`). So speculative and plain decoding are equal here, not
//! merely close.
//!
//! `simd` holds the instruction sets and all of the `unsafe`; `linear` the ops that multiply with weights; `run`
//! goes through a pass op by op.

mod accept;
mod attention;
mod buffer;
mod host;
mod linear;
mod math;
mod matmul;
mod routing;
mod run;
mod simd;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use rayon::{ThreadPool, ThreadPoolBuilder};
use treespark_kernel_gen::{BufferDesc, Op, Pass};
use treespark_models::Tensor;

use crate::backend::{Backend, BufferId, DeviceInfo, Extent, PassCost, PassId};
use crate::error::{Error, Result};
use buffer::Buffer;
use simd::Isa;

/// Measured with SmolLM2-135M in bf16 behind 512 tokens, on two cores of an AMD EPYC, with AVX-512 and with AVX2. The
/// first rows are almost free, while the weights arrive from memory; then each costs what it computes.
const WIDE_COST: PassCost = PassCost::new(&[(1, 1.0), (4, 1.05), (8, 1.25), (16, 2.0), (32, 3.9)]);
const NARROW_COST: PassCost = PassCost::new(&[(1, 1.0), (4, 1.15), (8, 1.9), (16, 3.6), (32, 7.3)]);

pub struct CpuBackend {
    info: DeviceInfo,
    isa: Isa,
    pool: ThreadPool,
    buffers: Vec<Buffer>,
    passes: Vec<Compiled>,
}

struct Compiled {
    pass: Pass,
    /// Where the pass's buffers are.
    buffers: Vec<BufferId>,
}

impl CpuBackend {
    /// As many threads as asked for; by default `RAYON_NUM_THREADS` or one per physical core.
    pub fn new(threads: Option<usize>) -> CpuBackend {
        let threads = threads.unwrap_or_else(host::threads);
        let isa = Isa::best();
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("treespark-{i}"))
            .build()
            .expect("the system starts threads");
        let cost = if isa.is_wide() { WIDE_COST } else { NARROW_COST };
        let info = DeviceInfo { backend: "cpu", name: name(threads, isa), cost, layer_bytes: 0 };
        CpuBackend { info, isa, pool, buffers: Vec::new(), passes: Vec::new() }
    }

    /// The name of the device that [`CpuBackend::new`] makes by default, without making it.
    pub fn describe() -> String {
        name(host::threads(), Isa::best())
    }

    fn add(&mut self, buffer: Buffer) -> BufferId {
        self.buffers.push(buffer);
        BufferId(self.buffers.len() - 1)
    }

    fn words(&mut self, buffer: BufferId) -> &mut Vec<u32> {
        match &mut self.buffers[buffer.0] {
            Buffer::Words(words) => words,
            Buffer::Matrix(_) => panic!("buffer {} is a matrix, which is neither read nor written", buffer.0),
        }
    }
}

fn name(threads: usize, isa: Isa) -> String {
    let plural = if threads == 1 { "" } else { "s" };
    format!("{}, {threads} thread{plural}, {}", host::name(), isa.name())
}

impl Backend for CpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Option<usize> {
        host::free_bytes()
    }

    fn load(&mut self, desc: &BufferDesc, parts: &[Tensor]) -> Result<BufferId> {
        Ok(self.add(Buffer::load(desc, parts)))
    }

    fn alloc(&mut self, desc: &BufferDesc) -> Result<BufferId> {
        // Asks for the memory without touching it, so that a refusal is an error and not an abort.
        let refused = Vec::<u8>::new().try_reserve_exact(desc.bytes()).is_err();
        if refused {
            let device = self.info.name.clone();
            return Err(Error::OutOfMemory { needed: desc.bytes() as u64, what: desc.name.clone(), device });
        }
        Ok(self.add(Buffer::Words(buffer::zeroed(desc))))
    }

    fn free(&mut self, buffer: BufferId) {
        self.buffers[buffer.0] = Buffer::Words(Vec::new());
    }

    fn write(&mut self, buffer: BufferId, offset: usize, words: &[u32]) -> Result<()> {
        self.words(buffer)[offset..offset + words.len()].copy_from_slice(words);
        Ok(())
    }

    fn read(&mut self, buffer: BufferId, offset: usize, len: usize) -> Result<Vec<u32>> {
        Ok(self.words(buffer)[offset..offset + len].to_vec())
    }

    fn compile(&mut self, pass: &Pass, buffers: &[BufferId]) -> Result<PassId> {
        assert_eq!(pass.buffers.len(), buffers.len(), "one buffer for each that the pass names");
        if pass.ops.iter().any(Op::drafts) {
            return Err(Error::Device(format!("pass {} drafts, which the CPU backend leaves to the host", pass.name)));
        }
        self.passes.push(Compiled { pass: pass.clone(), buffers: buffers.to_vec() });
        Ok(PassId(self.passes.len() - 1))
    }

    fn run(&mut self, pass: PassId, extent: Extent) -> Result<()> {
        let CpuBackend { isa, pool, buffers, passes, .. } = self;
        let Compiled { pass, buffers: ids } = &passes[pass.0];
        // One entry into the pool for the whole pass: what the ops split up stays among its threads.
        pool.install(|| run::Run::new(*isa, pass, ids, buffers, extent).all());
        Ok(())
    }
}

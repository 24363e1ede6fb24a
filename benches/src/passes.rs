//! Passes that are timed by themselves, without a network: behind a prefix whose cache rows are zeros.

use anyhow::Result;
use treespark::backend::{Extent, PassId};
use treespark::batch::Batch;
use treespark::kv::{KvCache, PagePool};
use treespark::memory::Memory;
use treespark::sampling::Sampling;
use treespark_benches::Samples;
use treespark_kernel_gen::layout::{accepted_words, report_words};
use treespark_kernel_gen::{BlockShape, DType, Fill, MAX_NODES, Pass, TreeSpec};
use treespark_models::{Dims, Model, Speculator, SpeculatorConfig, block};

use crate::device::Device;

const PAGE_SIZE: usize = 16;

/// Candidates of a row in a draft.
pub const CANDIDATES: usize = 64;

/// Adds rows to a batch, behind a prefix.
pub type AddRows<'a> = dyn Fn(&mut Batch, &KvCache) + 'a;

/// The rows of a speculator's block.
pub fn add_block(block: BlockShape, sampling: &Sampling) -> impl Fn(&mut Batch, &KvCache) {
    move |batch, kv| match block.fill {
        Fill::Mask(mask) => batch.add_block(kv, &vec![mask; block.rows], sampling),
        Fill::State => batch.add_readers(kv, block.rows, 0, 0, sampling),
    }
}

pub struct Bench {
    pub device: Device,
    pub dims: Dims,
    memory: Memory,
    /// Numbers of a confidence head, for a device that grows trees.
    confidence: Option<Vec<u32>>,
    timing: Timing,
}

#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Sequences of a pass.
    pub requests: usize,
    /// Committed tokens of each.
    pub depth: usize,
    /// Nodes of a tree that is drafted.
    pub nodes: usize,
    pub repeats: usize,
}

impl Bench {
    /// Puts weights on a device, for passes of up to so many rows of each sequence that have a head.
    pub fn load(
        mut device: Device,
        model: &Model,
        speculator: Option<(&Speculator, &SpeculatorConfig)>,
        rows: usize,
        timing: Timing,
    ) -> Result<Bench> {
        let context = timing.depth + MAX_NODES;
        let (pages_per_request, requests) = (context.div_ceil(PAGE_SIZE), timing.requests);
        let head_rows = requests * rows;
        let dims = Dims {
            max_rows: head_rows.max(MAX_NODES),
            head_rows,
            max_requests: requests,
            context,
            page_size: PAGE_SIZE,
            pages: requests * pages_per_request,
            pages_per_request,
            top_k: 1,
            cache_dtype: if model.dtype() == DType::F32 { DType::F32 } else { DType::BF16 },
            tree: TreeSpec::Any(if requests > 1 { rows } else { MAX_NODES }),
        };
        let mut memory = Memory::default();
        let beside = speculator.into_iter().flat_map(|(speculator, config)| speculator.weights(config, context));
        for weight in model.weights(context).chain(beside) {
            let (desc, parts) = weight?;
            memory.load(device.backend(), desc, &parts)?;
        }
        let confidence = match speculator {
            Some((speculator, config)) => speculator.confidence_numbers(config)?,
            None => None,
        };
        let confidence = confidence.map(|numbers| numbers.into_iter().map(f32::to_bits).collect());
        Ok(Bench { device, dims, memory, confidence, timing })
    }

    pub fn compile(&mut self, pass: &Pass) -> Result<PassId> {
        let buffers = self.memory.bind(self.device.backend(), pass)?;
        Ok(self.device.backend().compile(pass, &buffers)?)
    }

    /// Median milliseconds of passes one after the other: by the device's clock where it has one, else with the wait for
    /// a word of their result.
    pub fn time(&mut self, passes: &[PassId], add: &AddRows) -> Result<f64> {
        let extent = self.write_batch(add)?;
        if self.device.has_clock() {
            return Ok(Samples::of(self.device.time(passes, self.timing.repeats)?).median() / 1e3);
        }
        let (backend, result) = (self.device.backend(), self.memory.get("rows"));
        let samples = Samples::take(self.timing.repeats, || {
            passes.iter().try_for_each(|&pass| backend.run(pass, extent))?;
            backend.read(result, 0, 1).map(drop)
        })?;
        Ok(samples.median())
    }

    /// Words of a buffer after a pass.
    pub fn read_after(&mut self, pass: PassId, add: &AddRows, buffer: &str, words: usize) -> Result<Vec<u32>> {
        let extent = self.write_batch(add)?;
        let (backend, buffer) = (self.device.backend(), self.memory.get(buffer));
        backend.run(pass, extent)?;
        Ok(backend.read(buffer, 0, words)?)
    }

    fn write_batch(&mut self, add: &AddRows) -> Result<Extent> {
        let report = report_words(self.timing.nodes);
        let mut pool = PagePool::new(self.dims.pages, PAGE_SIZE);
        let mut batch = Batch::new(self.dims.pages_per_request);
        for _ in 0..self.timing.requests {
            let mut kv = KvCache::default();
            kv.reserve(&mut pool, self.dims.context)?;
            kv.commit(self.timing.depth);
            add(&mut batch, &kv);
        }
        let backend = self.device.backend();
        for (name, words) in batch.words() {
            backend.write(self.memory.get(name), 0, words)?;
        }
        // Of a round before, nothing was accepted; the limit is far.
        for request in 0..self.timing.requests {
            for (name, word, words) in
                [("accepted", 0, accepted_words(MAX_NODES)), (block::STATE, self.dims.context, report)]
            {
                if let Some(buffer) = self.memory.find(name) {
                    backend.write(buffer, request * words, &[word as u32])?;
                }
            }
        }
        if let (Some(buffer), Some(numbers)) = (self.memory.find(block::CONFIDENCE), &self.confidence) {
            backend.write(buffer, 0, numbers)?;
        }
        Ok(batch.extent())
    }
}

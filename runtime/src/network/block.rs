//! How a speculator fills a block: one pass over a row for each depth, behind the committed prefix.

use treespark_kernel_gen::{BlockShape, Fill, Pass, PassError};
use treespark_models::{SpeculatorConfig, block};

use super::{Kind, Network};
use crate::backend::{Backend, BufferId};
use crate::batch::Batch;
use crate::error::Result;
use crate::sequence::Sequence;

/// Tokens of each row that are ranked. What the sequential heads choose must be among them.
pub const CANDIDATES: usize = 64;

/// What the parallel stage says of each depth below the root: entry d - 1 of depth d.
#[derive(Debug, Clone)]
pub struct Block {
    /// The hidden states that the sequential heads read, `[hidden]` each; empty where there are no such heads.
    pub hidden: Vec<Vec<f32>>,
    /// The best tokens and their scores, descending: logits, or at a temperature what a draw ranks.
    pub candidates: Vec<Vec<(u32, f32)>>,
}

impl Network {
    /// Drafts a block behind the last token of every sequence, for at least so many tokens if it has as many. Waits.
    pub fn draft_blocks(
        &mut self,
        backend: &mut dyn Backend,
        seqs: &mut [&mut Sequence],
        depth: usize,
    ) -> Result<Vec<Block>> {
        let shape = self.shortened(depth);
        let of_a_pass = (self.dims.head_rows / shape.rows).max(1);
        let mut blocks = Vec::with_capacity(seqs.len());
        for seqs in seqs.chunks_mut(of_a_pass.min(self.dims.max_requests)) {
            self.fill_blocks(backend, seqs, shape)?;
            blocks.extend(self.read_blocks(backend, seqs.len(), shape)?);
        }
        Ok(blocks)
    }

    fn fill_blocks(&mut self, backend: &mut dyn Backend, seqs: &mut [&mut Sequence], shape: BlockShape) -> Result<()> {
        let BlockShape { rows, fill, .. } = shape;
        let mut batch = Batch::new(self.dims.pages_per_request);
        for seq in seqs.iter_mut() {
            seq.kv.reserve(&mut self.pool, rows)?;
            match fill {
                Fill::Mask(mask) => {
                    let mut tokens = vec![mask; rows];
                    tokens[0] = seq.last();
                    batch.add_block(&seq.kv, &tokens, &seq.sampling);
                }
                Fill::State => batch.add_readers(&seq.kv, rows, seq.last(), seq.last_row, &seq.sampling),
            }
        }
        let blocks = seqs.len().next_power_of_two().min(self.dims.head_rows / rows);
        let pass = self.pass(backend, Kind::Block { depth: shape.depth() }, blocks * rows)?;
        self.write_and_run(backend, pass, &batch)
    }

    /// So many blocks that were filled last.
    fn read_blocks(&self, backend: &mut dyn Backend, blocks: usize, shape: BlockShape) -> Result<Vec<Block>> {
        let BlockShape { rows, first, .. } = shape;
        let ids = self.ranked(backend, "draft.ids", blocks, shape)?;
        let scores = self.ranked(backend, "draft.scores", blocks, shape)?;
        let candidates = |row: usize| {
            let of_row = row * self.candidates()..(row + 1) * self.candidates();
            let scores = scores[of_row.clone()].iter().map(|&bits| f32::from_bits(bits));
            ids[of_row].iter().copied().zip(scores).collect()
        };
        let (mut hidden, mut width) = (Vec::new(), 0);
        if let Some(SpeculatorConfig::Dspark(dspark)) = &self.speculator {
            width = dspark.backbone.hidden;
            hidden = floats(backend, self.memory.get("draft.hidden"), 0, blocks * rows * width)?;
        }
        let states = |row: usize| hidden[row * width..(row + 1) * width].to_vec();
        let block = |block: usize| {
            let rows = block * rows + first..(block + 1) * rows;
            let hidden = if width > 0 { rows.clone().map(states).collect() } else { Vec::new() };
            Block { hidden, candidates: rows.map(candidates).collect() }
        };
        Ok((0..blocks).map(block).collect())
    }

    /// What was ranked of each row of so many blocks. Heads with matrices of their own have ranked each in a buffer of its own.
    fn ranked(&self, backend: &mut dyn Backend, name: &str, blocks: usize, shape: BlockShape) -> Result<Vec<u32>> {
        let (BlockShape { rows, first, .. }, width) = (shape, self.candidates());
        if let Some(shared) = self.memory.find(name) {
            return backend.read(shared, 0, blocks * rows * width);
        }
        let mut words = vec![0; blocks * rows * width];
        for row in first..rows {
            let own = backend.read(self.memory.get(&format!("{name}.{row}")), 0, words.len())?;
            for at in (0..blocks).map(|block| (block * rows + row) * width) {
                words[at..at + width].copy_from_slice(&own[at..at + width]);
            }
        }
        Ok(words)
    }

    /// The pass that fills blocks, of a request each, with so many rows in all.
    pub(super) fn block_pass(&self, block: BlockShape, rows: usize, costs: Option<&[f32]>) -> Result<Pass, PassError> {
        let dims = self.dims_for(block.rows);
        self.speculator().draft_pass(&self.llama(&dims), block, rows / block.rows, self.candidates(), costs)
    }

    /// What filling so many blocks for so many tokens costs, relative to a pass of one row: as measured, or as many weights as
    /// it reads, of those that the pass reads.
    pub fn draft_cost(&self, blocks: usize, depth: usize) -> f32 {
        if self.speculator.is_none() {
            return 0.0;
        }
        let block = self.shortened(depth);
        match self.block_costs.iter().find(|(depth, _)| *depth == block.depth()) {
            Some((_, cost)) => cost.of(blocks),
            None => self.draft_share * self.cost.of(block.rows * blocks.max(1)),
        }
    }

    /// Whether drafts come in blocks: an MTP module goes token by token.
    pub(super) fn fills_blocks(&self) -> bool {
        self.speculator.is_some() && !self.has_mtp()
    }

    /// Tokens that a block may be for, the most first: many sequences cannot afford whole ones. What a shorter block foretells is
    /// hardly worse (SmolLM2's DSpark drafter, one token a round: 51.9 accepted tokens a request with blocks for two, 53.2 with blocks
    /// for seven).
    pub fn draft_depths(&self) -> Vec<usize> {
        if !self.fills_blocks() {
            return vec![usize::MAX];
        }
        let whole = self.block().depth();
        let mut depths = vec![whole, whole.div_ceil(2), whole.div_ceil(4)];
        depths.dedup();
        depths
    }

    /// The shortest block for at least so many tokens.
    pub(super) fn shortened(&self, depth: usize) -> BlockShape {
        let depths = self.draft_depths();
        let enough = depths.iter().rev().find(|&&enough| enough >= depth).unwrap_or(&depths[0]);
        self.block().shortened(*enough)
    }

    pub(super) fn measure_draft(&self) -> Result<f32> {
        if self.speculator.is_none() {
            return Ok(0.0);
        }
        let block = self.block();
        let passes = [self.block_pass(block, block.rows, None)?, self.llama(&self.dims).verify_pass(1)?];
        let [draft, plain] = passes.map(|pass| pass.weight_bytes() as f32);
        Ok(draft / plain)
    }

    /// Whether the device grows trees from blocks by itself.
    pub fn grows_blocks(&self) -> bool {
        self.speculator.as_ref().is_some_and(|speculator| self.drafts_on_device && speculator.fits_devices())
    }

    /// Gives the device a confidence head's numbers. Some pass has bound their buffer.
    pub(super) fn write_confidence(&self, backend: &mut dyn Backend) -> Result<()> {
        match &self.confidence {
            Some(numbers) => backend.write(self.memory.get(block::CONFIDENCE), 0, numbers),
            None => Ok(()),
        }
    }

    /// Rows of a block, if there is a speculator.
    pub fn block_rows(&self) -> usize {
        self.speculator.as_ref().map_or(0, |speculator| speculator.block().rows)
    }

    /// The rows that the speculator fills.
    pub(super) fn block(&self) -> BlockShape {
        self.speculator().block()
    }

    fn candidates(&self) -> usize {
        CANDIDATES.min(self.config.vocab_size)
    }

    fn speculator(&self) -> &SpeculatorConfig {
        self.speculator.as_ref().expect("a speculator is loaded")
    }
}

pub(super) fn floats(backend: &mut dyn Backend, buffer: BufferId, first: usize, len: usize) -> Result<Vec<f32>> {
    Ok(backend.read(buffer, first, len)?.into_iter().map(f32::from_bits).collect())
}

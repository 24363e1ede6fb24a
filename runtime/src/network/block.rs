//! How a speculator fills a block: one pass over a row for each depth, behind the committed prefix.

use treespark_kernel_gen::{BlockShape, Fill, Pass, PassError};
use treespark_models::{SpeculatorConfig, block};

use super::{Kind, Network};
use crate::backend::{Backend, BufferId, PassCost};
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
    /// Drafts a block behind the sequence's last token, which the target drew behind `last_node` of the tree that it
    /// verified last. Waits.
    pub fn draft_block(&mut self, backend: &mut dyn Backend, seq: &mut Sequence, last_node: usize) -> Result<Block> {
        let BlockShape { rows, first, fill } = self.block();
        seq.kv.reserve(&mut self.pool, rows)?;
        let mut batch = Batch::new(self.dims.pages_per_request);
        match fill {
            Fill::Mask(mask) => {
                let mut tokens = vec![mask; rows];
                tokens[0] = seq.last();
                batch.add_block(&seq.kv, &tokens, &seq.sampling);
            }
            Fill::State => batch.add_readers(&seq.kv, rows, seq.last(), last_node, &seq.sampling),
        }
        let pass = self.pass(backend, Kind::Block, rows)?;
        self.write_and_run(backend, pass, &batch)?;
        let width = self.candidates();
        let mut candidates = Vec::new();
        for row in first..rows {
            // Heads with matrices of their own have ranked each in its own buffer.
            let of_row = |name: &str| {
                let own = self.memory.find(&format!("{name}.{row}"));
                own.unwrap_or_else(|| self.memory.get(name))
            };
            let ids = backend.read(of_row("draft.ids"), row * width, width)?;
            let scores = floats(backend, of_row("draft.scores"), row * width, width)?;
            candidates.push(ids.into_iter().zip(scores).collect());
        }
        let mut hidden = Vec::new();
        if let Some(SpeculatorConfig::Dspark(dspark)) = &self.speculator {
            let width = dspark.backbone.hidden;
            let all = floats(backend, self.memory.get("draft.hidden"), first * width, (rows - first) * width)?;
            hidden = all.chunks_exact(width).map(<[f32]>::to_vec).collect();
        }
        Ok(Block { hidden, candidates })
    }

    /// The pass that fills up to so many blocks, of a request each.
    pub(super) fn block_pass(&self, blocks: usize, costs: Option<&[f32]>) -> Result<Pass, PassError> {
        self.speculator().draft_pass(&self.llama(), blocks, self.candidates(), costs)
    }

    /// What filling a block costs, relative to a pass of one row: as many weights as it reads, of those that the pass reads.
    pub fn draft_cost(&self, cost: PassCost) -> f32 {
        self.speculator.as_ref().map_or(0.0, |speculator| self.draft_share * cost.of(speculator.block().rows))
    }

    pub(super) fn measure_draft(&self) -> Result<f32> {
        if self.speculator.is_none() {
            return Ok(0.0);
        }
        let passes = [self.block_pass(1, None)?, self.llama().verify_pass(1)?];
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

fn floats(backend: &mut dyn Backend, buffer: BufferId, first: usize, len: usize) -> Result<Vec<f32>> {
    Ok(backend.read(buffer, first, len)?.into_iter().map(f32::from_bits).collect())
}

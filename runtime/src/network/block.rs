//! How a DSpark drafter fills a block: one pass over rows that all see each other, behind the committed prefix.

use treespark_kernel_gen::{Pass, PassError};
use treespark_models::{DsparkConfig, SpeculatorConfig, dspark};

use super::{Kind, Network};
use crate::backend::{Backend, Extent, PassId};
use crate::batch::Batch;
use crate::error::Result;
use crate::sequence::Sequence;

/// Tokens of each row that are ranked. What the sequential heads choose must be among them.
pub const CANDIDATES: usize = 64;

/// What the parallel stage says of each depth below the root: entry d - 1 of depth d.
#[derive(Debug, Clone)]
pub struct Block {
    /// The hidden states that the sequential heads read, `[hidden]` each.
    pub hidden: Vec<Vec<f32>>,
    /// The best tokens and their scores, descending: logits, or at a temperature what a draw ranks.
    pub candidates: Vec<Vec<(u32, f32)>>,
}

impl Network {
    /// Drafts a block behind the sequence's last token. Waits.
    pub fn draft_block(&mut self, backend: &mut dyn Backend, seq: &mut Sequence) -> Result<Block> {
        let dspark = self.dspark().clone();
        let (hidden, candidates) = (dspark.backbone.hidden, self.candidates());
        seq.kv.reserve(&mut self.pool, dspark.block)?;
        let mut tokens = vec![dspark.mask_token; dspark.block];
        tokens[0] = seq.last();
        let mut batch = Batch::new(self.dims.pages_per_request);
        batch.add_block(&seq.kv, &tokens, &seq.sampling);
        let pass = self.pass(backend, Kind::Block, dspark.block)?;
        self.write_and_run(backend, pass, &batch)?;

        let mut rows = |name: &str, width: usize| -> Result<Vec<Vec<u32>>> {
            let words = backend.read(self.memory.get(name), dspark.first * width, dspark.depth() * width)?;
            Ok(words.chunks_exact(width).map(<[u32]>::to_vec).collect())
        };
        let floats = |words: &[u32]| words.iter().map(|&word| f32::from_bits(word)).collect::<Vec<f32>>();
        let (hidden, ids) = (rows("draft.hidden", hidden)?, rows("draft.ids", candidates)?);
        let scored = ids.into_iter().zip(rows("draft.scores", candidates)?);
        Ok(Block {
            hidden: hidden.iter().map(|words| floats(words)).collect(),
            candidates: scored.map(|(ids, scores)| ids.into_iter().zip(floats(&scores)).collect()).collect(),
        })
    }

    pub(super) fn block_pass(&self, costs: Option<&[f32]>) -> Result<Pass, PassError> {
        self.dspark().draft_pass(&self.llama(), self.candidates(), costs)
    }

    /// Whether the device grows trees from blocks by itself.
    pub fn grows_blocks(&self) -> bool {
        matches!(&self.speculator, Some(SpeculatorConfig::Dspark(dspark)) if dspark.heads_on_device)
    }

    /// The pass that drafts a round's trees on the device, and what it needs of a run.
    pub(super) fn grow_block_pass(&mut self, backend: &mut dyn Backend, nodes: usize) -> Result<(PassId, Extent)> {
        let rows = self.dspark().block;
        let pass = self.pass(backend, Kind::GrowBlock { nodes }, rows)?;
        Ok((pass, Extent { rows, requests: 1, keys: self.dims.context }))
    }

    /// Gives the device a confidence head's numbers. Some pass has bound their buffer.
    pub(super) fn write_confidence(&self, backend: &mut dyn Backend) -> Result<()> {
        match &self.confidence {
            Some(numbers) => backend.write(self.memory.get(dspark::CONFIDENCE), 0, numbers),
            None => Ok(()),
        }
    }

    fn candidates(&self) -> usize {
        CANDIDATES.min(self.config.vocab_size)
    }

    pub(super) fn dspark(&self) -> &DsparkConfig {
        let Some(SpeculatorConfig::Dspark(dspark)) = &self.speculator else { panic!("no DSpark drafter is loaded") };
        dspark
    }
}

//! A language model on a device: its weights, its cache pool and its compiled passes. Target and draft model alike; a
//! speculator's weights lie beside its target's. `growth` has a model draft a tree, `block` a speculator a block; `rounds`
//! holds what a round needs where the device drafts for itself.

mod block;
mod growth;
mod many;
mod measure;
mod mtp;
mod rounds;

pub use block::Block;
pub use many::Outcome;

use std::collections::HashMap;

use rounds::Drafted;
use treespark_kernel_gen::{DType, MAX_NODES, Pass, TreeShape, TreeSpec};
use treespark_models::{Config, Dims, Llama, Model, NgramDims, Speculator, SpeculatorConfig};

use crate::backend::{Backend, PassCost, PassId};
use crate::batch::{Batch, Entry, masks};
use crate::error::{Error, Result};
use crate::kv::{KvCache, PagePool};
use crate::memory::{Memory, MemoryUse};
use crate::sampling::Sampling;
use crate::sequence::Sequence;
use crate::tree::TokenTree;

/// What a pass computes beside the layers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Kind {
    /// Only cache rows: prompts.
    Extend,
    /// The target's draw at every row, and the accepted path, of trees of up to so many nodes.
    Verify { largest: usize },
    /// The same, each row drawing from what a grammar allows.
    VerifyMasked { largest: usize },
    /// The most likely tokens at every row.
    Draft,
    /// From these, a tree's next level: the last of the shape.
    Grow(TreeShape),
    /// What an MTP module keeps of what was accepted.
    Keep,
    /// Its guesses: behind states of the target (the first level of a tree), or of its own.
    Guess { is_first: bool },
    /// A speculator's parallel stage, in blocks for so many tokens, for the host to grow trees from. Its rows are those of whole
    /// blocks.
    Block { depth: usize },
    /// The same, and the device grows trees of up to so many nodes: the end of the three below, with a speculator.
    GrowBlock { depth: usize, nodes: usize },
    /// Begins the blocks of many sequences, from which trees of up to so many nodes are grown.
    OpenBlocks { depth: usize, nodes: usize },
    /// All of a round, then a draft of the next on the device, of up to so many nodes.
    Round { nodes: usize },
    /// The device's draft of the first round.
    First { nodes: usize },
}

/// Sizes that a user chooses.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Tokens of a sequence, prompt included.
    pub context: usize,
    /// Largest tree, root included.
    pub max_nodes: usize,
    /// Children that a draft pass proposes a node.
    pub top_k: usize,
    /// Slots of a cache page: 4, 16 or 64.
    pub page_size: usize,
    /// Sequences of a pass.
    pub max_requests: usize,
    /// Rows of a pass.
    pub max_rows: usize,
    /// Tokens that the cache holds, of all sequences together; `None`: what they need if all are as long as can be.
    pub cache_tokens: Option<usize>,
}

impl Limits {
    /// For one sequence at a time.
    pub const fn new(context: usize, max_nodes: usize) -> Limits {
        Limits { context, max_nodes, top_k: 1, page_size: 16, max_requests: 1, max_rows: MAX_NODES, cache_tokens: None }
    }

    /// The same for so many at a time; on a device that drafts by itself, with room for trees of all and for their blocks of so
    /// many rows.
    pub fn for_many(self, max_requests: usize, block_rows: usize, drafts: bool) -> Result<Limits> {
        let most = if drafts { 512 } else { MAX_NODES / 2 };
        if !(2..=most).contains(&max_requests) {
            let (value, expected) = (max_requests.to_string(), "2 to 128, on a GPU that drafts to 512");
            return Err(Error::Parameter { parameter: "max_requests", value, expected });
        }
        let rows =
            if drafts { (max_requests * block_rows.max(8)).next_power_of_two().max(MAX_NODES) } else { MAX_NODES };
        Ok(Limits { max_requests, max_rows: rows, ..self })
    }

    /// Pages of a sequence that is as long as can be, with room for one more tree: its rows are written before the end is
    /// known.
    fn pages_per_request(&self) -> usize {
        (self.context + MAX_NODES).div_ceil(self.page_size)
    }

    /// Tokens that the cache should have room for, and that it may need: those of one sequence, and of all.
    pub fn token_range(&self) -> [usize; 2] {
        let one = self.pages_per_request() * self.page_size;
        [one, self.max_requests * one]
    }

    fn pages(&self) -> usize {
        let [_, most] = self.token_range();
        self.cache_tokens.unwrap_or(most).clamp(1, most).div_ceil(self.page_size)
    }

    /// The sizes of a model's buffers, whose speculator fills so many rows.
    fn dims(&self, speculator_rows: usize, cache_dtype: DType) -> Dims {
        // A pass of many requests runs parts of prompts with its trees, and its logits are of all rows.
        let head_rows = match self.max_requests {
            1 => compiled_rows(self.max_nodes.max(speculator_rows)),
            _ => self.max_rows,
        };
        Dims {
            max_rows: self.max_rows,
            head_rows,
            max_requests: self.max_requests,
            context: self.context + MAX_NODES,
            page_size: self.page_size,
            pages: self.pages(),
            pages_per_request: self.pages_per_request(),
            top_k: self.top_k,
            cache_dtype,
            tree: TreeSpec::Any(MAX_NODES),
        }
    }
}

pub struct Network {
    config: Config,
    speculator: Option<SpeculatorConfig>,
    /// Of its passes, by rows: what trees that the device grows are cut by.
    cost: PassCost,
    /// Of blocks for so many tokens, by how many are filled, where it was measured.
    block_costs: Vec<(usize, PassCost)>,
    /// Weights that filling a block reads, against those that a pass of the target reads.
    draft_share: f32,
    /// The backend runs passes that draft.
    drafts_on_device: bool,
    /// A confidence head's numbers, for a device that grows trees.
    confidence: Option<Vec<u32>>,
    dims: Dims,
    memory: Memory,
    passes: HashMap<(Kind, usize), PassId>,
    pool: PagePool,
    pass_weight_bytes: usize,
    /// What the device has left in the batch buffers, if it is a tree.
    drafted: Option<Drafted>,
    /// Passes of the target so far: an MTP module reads the states of the last.
    target_passes: u64,
}

impl Network {
    /// Puts a model's weights on the device. `progress` gets bytes loaded so far and in all.
    pub fn load(
        backend: &mut dyn Backend,
        model: &Model,
        limits: Limits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Network> {
        Network::load_with_speculator(backend, model, None, limits, progress)
    }

    /// The same, with a speculator's beside them.
    pub fn load_with_speculator(
        backend: &mut dyn Backend,
        model: &Model,
        speculator: Option<&Speculator>,
        limits: Limits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Network> {
        let config = model.config().clone();
        let speculator_config = speculator.map(|speculator| match backend.drafts() {
            true => speculator.config_on_device(),
            false => speculator.config().clone(),
        });
        let speculator_rows = speculator_config.as_ref().map_or(0, |config| config.block().rows);
        let cache_dtype = if model.dtype() == DType::F32 { DType::F32 } else { DType::BF16 };
        let dims = limits.dims(speculator_rows, cache_dtype);
        let mut memory = Memory::default();
        let of_speculator = speculator_config.as_ref().map_or(0, |config| config.weight_bytes(dims.context));
        let total = model.weight_bytes(dims.context) + of_speculator;
        let mut done = 0;
        let beside = speculator.zip(speculator_config.as_ref());
        let speculators = beside.into_iter().flat_map(|(speculator, config)| speculator.weights(config, dims.context));
        for weight in model.weights(dims.context).chain(speculators) {
            let (desc, parts) = weight?;
            done += desc.bytes();
            memory.load(backend, desc, &parts)?;
            progress(done, total);
        }
        let confidence = match beside {
            Some((speculator, config)) => {
                speculator.confidence_numbers(config)?.map(|numbers| numbers.into_iter().map(f32::to_bits).collect())
            }
            None => None,
        };
        let mut network = Network {
            config,
            speculator: speculator_config,
            drafts_on_device: backend.drafts(),
            confidence,
            memory,
            passes: HashMap::new(),
            pool: PagePool::new(dims.pages, dims.page_size),
            pass_weight_bytes: 0,
            drafted: None,
            target_passes: 0,
            cost: backend.info().cost.clone(),
            block_costs: Vec::new(),
            draft_share: 0.0,
            dims,
        };
        network.draft_share = network.measure_draft()?;
        Ok(network)
    }

    /// Has trees cut by another cost than the backend's. Before anything is compiled.
    pub fn set_cost(&mut self, cost: PassCost) {
        self.cost = cost;
    }

    fn llama<'a>(&'a self, dims: &'a Dims) -> Llama<'a> {
        Llama { config: &self.config, dims, speculator: self.speculator.as_ref() }
    }

    /// For passes over trees of up to so many nodes.
    fn dims_for(&self, largest: usize) -> Dims {
        Dims { tree: TreeSpec::Any(largest), ..self.dims.clone() }
    }

    /// Devices that draft are quick enough for the size of a pass to matter, if there are many sequences.
    fn is_quick_with_many(&self) -> bool {
        self.drafts_on_device && self.dims.max_requests > 1
    }

    /// Nodes of trees that a pass of many is compiled for, ascending: attention takes 16, 64 or 128 query rows at once, and
    /// many small trees would leave most of 128 idle.
    fn tree_sizes(&self) -> Vec<usize> {
        let group = self.config.heads / self.config.kv_heads;
        let few = [16, 64].map(|rows| rows / group).into_iter().filter(|&nodes| self.is_quick_with_many() && nodes > 0);
        few.chain([MAX_NODES]).collect()
    }

    /// The least of these for a tree of so many nodes.
    fn largest(&self, nodes: usize) -> usize {
        self.tree_sizes().into_iter().find(|&size| size >= nodes).unwrap_or(MAX_NODES)
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of weights that a verify pass reads, however many rows it has.
    pub fn pass_weight_bytes(&self) -> usize {
        self.pass_weight_bytes
    }

    pub fn memory_use(&self) -> MemoryUse {
        self.memory.usage()
    }

    /// Runs a chain of tokens that nobody doubts, in chunks, and commits them. `progress` gets tokens done.
    pub fn extend(
        &mut self,
        backend: &mut dyn Backend,
        kv: &mut KvCache,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize),
    ) -> Result<()> {
        let mut done = 0;
        for chunk in tokens.chunks(MAX_NODES) {
            let chain = TokenTree::chain(chunk)?;
            let mut batch = Batch::new(self.dims.pages_per_request);
            kv.reserve(&mut self.pool, chunk.len())?;
            batch.add_tree(kv, &chain, &Sampling::default());
            self.run(backend, Kind::Extend, &batch)?;
            self.target_passes += 1;
            done += chunk.len();
            // What follows the last token is not known here.
            let following = &tokens[done + 1 - chunk.len()..tokens.len().min(done + 1)];
            self.keep_chunk(backend, kv, following)?;
            kv.commit(chunk.len());
            progress(done);
        }
        Ok(())
    }

    /// Compiles what prompts of any length need.
    pub fn prepare_prompts(&mut self, backend: &mut dyn Backend) -> Result<()> {
        let sizes = (1..=MAX_NODES).filter(|&rows| rows == compiled_rows(rows));
        let kept = self.has_mtp().then_some(Kind::Keep);
        let kinds = [Kind::Extend].into_iter().chain(kept);
        let wanted = kinds.flat_map(|kind| sizes.clone().map(move |rows| (kind.clone(), rows))).collect();
        self.prepare(backend, wanted)
    }

    /// Waits for all that was enqueued.
    pub fn wait(&self, backend: &mut dyn Backend) -> Result<()> {
        self.memory.find("rows").map_or(Ok(()), |rows| backend.read(rows, 0, 1).map(drop))
    }

    /// One target pass over a tree of each sequence; a node sees the committed prefix and its own ancestors. The accepted
    /// rows are moved next to the prefix, and rejected ones left alone: nothing reads past the prefix, and the next tree
    /// overwrites them. Enqueues, does not wait.
    pub fn verify(&mut self, backend: &mut dyn Backend, entries: &mut [Entry<'_>]) -> Result<()> {
        self.keep_accepted(backend, entries)?;
        let masks = masks(entries);
        let mut batch = Batch::new(self.dims.pages_per_request);
        let block_rows = self.block_rows();
        for Entry { seq, tree, given, draft_depth } in entries.iter_mut() {
            // A block may follow before anyone knows how much of the tree is accepted.
            seq.kv.reserve(&mut self.pool, tree.len() + if *draft_depth > 0 { block_rows } else { 0 })?;
            seq.last_row = batch.n_rows();
            batch.add_given(&seq.kv, tree, *given, &seq.sampling);
        }
        self.target_passes += 1;
        if entries.iter().all(Entry::is_part) {
            return self.run(backend, Kind::Extend, &batch);
        }
        let largest = self.largest(entries.iter().map(|entry| entry.tree.len()).max().unwrap_or(1));
        let kind = if masks.is_some() { Kind::VerifyMasked { largest } } else { Kind::Verify { largest } };
        let pass = self.pass(backend, kind, batch.n_rows())?;
        if let Some(masks) = masks {
            backend.write(self.memory.get("allowed"), 0, &masks)?;
        }
        for (i, Entry { seq, .. }) in entries.iter().enumerate() {
            if let Some(seen) = seq.seen() {
                backend.write(self.memory.get("seen"), i * seen.len(), seen)?;
            }
        }
        self.write_and_run(backend, pass, &batch)
    }

    /// The pass that [`verify`](Network::verify) runs for a tree of so many nodes, to be looked at or timed by itself.
    pub fn verify_pass(&mut self, backend: &mut dyn Backend, nodes: usize) -> Result<(Pass, PassId)> {
        let pass = self.llama(&self.dims).verify_pass(compiled_rows(nodes))?;
        Ok((pass, self.pass(backend, Kind::Verify { largest: self.largest(nodes) }, nodes)?))
    }

    /// The pages of the cache.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// Gives a new sequence what the cache already holds of its text, and returns how many tokens that are.
    pub fn share(&mut self, seq: &mut Sequence) -> usize {
        seq.kv = self.pool.share(&seq.tokens()[..seq.tokens().len() - 1]);
        seq.kv.len()
    }

    /// Lets others share what a sequence has in the cache.
    pub fn publish(&mut self, seq: &mut Sequence) {
        let mut kv = std::mem::take(&mut seq.kv);
        self.pool.publish(&mut kv, seq.tokens());
        seq.kv = kv;
    }

    /// Sequences of a pass.
    pub fn max_requests(&self) -> usize {
        self.dims.max_requests
    }

    /// Rows of the largest pass.
    pub fn max_rows(&self) -> usize {
        self.dims.max_rows
    }

    /// Gives a finished sequence's pages back.
    pub fn release(&mut self, kv: &mut KvCache) {
        self.drafted = None;
        kv.release(&mut self.pool);
    }

    fn run(&mut self, backend: &mut dyn Backend, kind: Kind, batch: &Batch) -> Result<()> {
        let pass = self.pass(backend, kind, batch.n_rows())?;
        self.write_and_run(backend, pass, batch)
    }

    fn write_and_run(&mut self, backend: &mut dyn Backend, pass: PassId, batch: &Batch) -> Result<()> {
        self.write(backend, batch)?;
        backend.run(pass, batch.extent())
    }

    /// Writes the batch buffers, which some pass has bound.
    fn write(&mut self, backend: &mut dyn Backend, batch: &Batch) -> Result<()> {
        self.drafted = None;
        batch.words().into_iter().try_for_each(|(name, words)| backend.write(self.memory.get(name), 0, words))
    }

    /// Compiles passes of so many rows, all at once where the backend can.
    fn prepare(&mut self, backend: &mut dyn Backend, wanted: Vec<(Kind, usize)>) -> Result<()> {
        let sized = wanted.into_iter().map(|(kind, rows)| (self.rows_of(&kind, rows), kind));
        let missing: Vec<(usize, Kind)> =
            sized.filter(|(rows, kind)| !self.passes.contains_key(&(kind.clone(), *rows))).collect();
        let passes = missing.iter().map(|(rows, kind)| self.described(kind, *rows)).collect::<Result<Vec<Pass>>>()?;
        backend.prepare(&passes)?;
        missing.into_iter().try_for_each(|(rows, kind)| self.pass(backend, kind, rows).map(drop))
    }

    /// Rows of the pass that runs so many.
    fn rows_of(&self, kind: &Kind, rows: usize) -> usize {
        let rows = match kind {
            Kind::Block { .. } | Kind::GrowBlock { .. } => rows,
            Kind::Round { .. } => round_rows(rows),
            Kind::Verify { .. } | Kind::VerifyMasked { .. } if self.is_quick_with_many() => round_rows(rows),
            _ => compiled_rows(rows),
        };
        rows.min(self.dims.max_rows)
    }

    /// The pass for this many rows, or a few more; compiled when first needed.
    fn pass(&mut self, backend: &mut dyn Backend, kind: Kind, rows: usize) -> Result<PassId> {
        let rows = self.rows_of(&kind, rows);
        let key = (kind, rows);
        if let Some(&pass) = self.passes.get(&key) {
            return Ok(pass);
        }
        let pass = self.described(&key.0, key.1)?;
        if matches!(key.0, Kind::Verify { .. } | Kind::VerifyMasked { .. } | Kind::Round { .. }) {
            self.pass_weight_bytes = pass.weight_bytes();
        }
        let buffers = self.memory.bind(backend, &pass)?;
        let mut id = backend.compile(&pass, &buffers)?;
        if matches!(key.0, Kind::GrowBlock { .. }) {
            self.write_confidence(backend)?;
        }
        if let (Kind::Round { nodes } | Kind::First { nodes }, true) = (&key.0, self.grows_blocks()) {
            let (whole, rows) = self.whole_block(*nodes);
            let fill = self.pass(backend, whole, rows)?;
            id = backend.join(&[id, fill])?;
        }
        self.passes.insert(key, id);
        Ok(id)
    }

    fn described(&self, kind: &Kind, rows: usize) -> Result<Pass> {
        let drafter = |nodes: usize| NgramDims { nodes, row_cost: self.cost.of_a_row() };
        // A tree runs in the next larger pass, and was drafted.
        let cost = self.cost.clone();
        let drafted = self.draft_cost(1, usize::MAX);
        let costs = |nodes: usize| (1..=nodes).map(|n| cost.of(round_rows(n)) + drafted).collect::<Vec<f32>>();
        let dims = match *kind {
            Kind::Verify { largest } | Kind::VerifyMasked { largest } => self.dims_for(largest),
            _ => self.dims.clone(),
        };
        let llama = self.llama(&dims);
        let pass = match kind {
            Kind::Extend => llama.extend_pass(rows),
            Kind::Verify { .. } => llama.verify_pass(rows),
            Kind::VerifyMasked { .. } => llama.verify_masked_pass(rows),
            Kind::Draft => llama.draft_pass(rows),
            Kind::Block { depth } => self.block_pass(self.shortened(*depth), rows, None),
            Kind::GrowBlock { depth, nodes } => self.block_pass(self.shortened(*depth), rows, Some(&costs(*nodes))),
            Kind::Grow(shape) => llama.grow_pass(shape.clone()),
            Kind::Keep => llama.keep_pass(rows),
            Kind::Guess { is_first } => llama.level_pass(rows, *is_first),
            Kind::Round { nodes } if self.speculator.is_some() => llama.round_pass_with_block(rows, *nodes),
            Kind::Round { nodes } => llama.round_pass(rows, drafter(*nodes)),
            Kind::OpenBlocks { depth, nodes } => llama.block_pass(self.shortened(*depth), *nodes),
            Kind::First { nodes } if self.speculator.is_some() => llama.block_pass(self.block(), *nodes),
            Kind::First { nodes } => llama.ngram_pass(drafter(*nodes)),
        };
        Ok(pass?)
    }

    /// What fills one block, all of it, and how many rows that has.
    fn whole_block(&self, nodes: usize) -> (Kind, usize) {
        (Kind::GrowBlock { depth: self.block().depth(), nodes }, self.block().rows)
    }
}

/// Rows that a pass is compiled for: 1, 4, 16, 64 or 256. Kernels take seconds to compile where a driver does it for the
/// first time; rows that are not there cost little.
pub fn compiled_rows(rows: usize) -> usize {
    let power = rows.next_power_of_two().ilog2();
    1 << power.next_multiple_of(2)
}

/// The same for rounds where the device drafts, which are what it does all the time: each power of two from 4 on.
pub fn round_rows(rows: usize) -> usize {
    if rows == 1 { 1 } else { rows.next_power_of_two().max(4) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_compiled_for_a_few_sizes() {
        let sizes = [(1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (17, 64), (64, 64), (65, 256), (256, 256)];
        sizes.into_iter().for_each(|(rows, size)| assert_eq!(compiled_rows(rows), size));
    }
}

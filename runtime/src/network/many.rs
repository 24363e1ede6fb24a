//! What a verify pass of many sequences leaves: what was accepted, and where the device drafts, the next trees.
//!
//! Behind the verify pass a second one fills a block for every sequence that may draft and grows its tree. The host waits once,
//! for both; it then chooses among the nodes of all trees, and writes the rows of the next pass.

use treespark_kernel_gen::layout::{RoundReport, report_words};
use treespark_kernel_gen::{BlockShape, MAX_NODES};
use treespark_models::block;

use super::block::floats;
use super::{Kind, Network};
use crate::backend::{Backend, Extent};
use crate::batch::Entry;
use crate::draft::Draft;
use crate::error::Result;
use crate::sequence::Fresh;
use crate::tree::{ACCEPTED_WORDS, Accepted};

/// What became of an entry.
#[derive(Debug, Default)]
pub struct Outcome {
    pub accepted: Accepted,
    /// The logits behind which its tokens were drawn, if its sequence wants them.
    pub logits: Vec<Vec<f32>>,
    /// What the device drafted behind them.
    pub draft: Option<Draft>,
}

impl Network {
    /// Of the last verify pass, in the order of its entries. Waits. With `nodes` the device drafts trees of up to so many for
    /// those that may have one, before it is waited for: from blocks as long as the deepest needs.
    pub fn outcomes(
        &mut self,
        backend: &mut dyn Backend,
        entries: &mut [Entry<'_>],
        nodes: Option<usize>,
    ) -> Result<Vec<Outcome>> {
        if !self.has_mtp() {
            return self.outcomes_of(backend, entries, nodes);
        }
        let first_rows: Vec<usize> = entries.iter().map(|entry| entry.seq.last_row).collect();
        let outcomes = self.outcomes_of(backend, entries, nodes)?;
        for ((entry, outcome), first) in entries.iter_mut().zip(&outcomes).zip(first_rows) {
            let rows = outcome.accepted.path.iter().map(|node| (first + node) as u32).collect();
            entry.seq.fresh = Fresh { rows, pass: self.target_passes };
        }
        Ok(outcomes)
    }

    fn outcomes_of(
        &mut self,
        backend: &mut dyn Backend,
        entries: &mut [Entry<'_>],
        nodes: Option<usize>,
    ) -> Result<Vec<Outcome>> {
        let Some(nodes) = nodes.filter(|_| entries.iter().any(|entry| entry.draft_depth > 0)) else {
            return self.accepted(backend, entries);
        };
        // Who drafts overwrites the logits.
        if entries.iter().any(|entry| entry.seq.wants_logits) {
            let mut outcomes = self.accepted(backend, entries)?;
            self.draft_behind(backend, entries, nodes)?;
            let reported = self.reported(backend, entries, nodes)?;
            outcomes.iter_mut().zip(reported).for_each(|(outcome, reported)| outcome.draft = reported.draft);
            return Ok(outcomes);
        }
        self.draft_behind(backend, entries, nodes)?;
        self.reported(backend, entries, nodes)
    }

    fn accepted(&self, backend: &mut dyn Backend, entries: &mut [Entry<'_>]) -> Result<Vec<Outcome>> {
        if entries.iter().all(Entry::is_part) {
            let given = |entry: &Entry<'_>| Outcome { accepted: Accepted::given(&entry.tree), ..Outcome::default() };
            return Ok(entries.iter().map(given).collect());
        }
        let words = backend.read(self.memory.get("accepted"), 0, entries.len() * ACCEPTED_WORDS)?;
        let each = entries.iter_mut().zip(words.chunks_exact(ACCEPTED_WORDS));
        each.map(|(entry, words)| {
            let accepted = Accepted::from_words(words, MAX_NODES);
            let first_row = entry.seq.last_row;
            entry.seq.last_row += accepted.path[accepted.draft_len()];
            let logits = self.logits(backend, entry, first_row, &accepted)?;
            Ok(Outcome { accepted, logits, draft: None })
        })
        .collect()
    }

    fn logits(
        &self,
        backend: &mut dyn Backend,
        entry: &Entry<'_>,
        first_row: usize,
        accepted: &Accepted,
    ) -> Result<Vec<Vec<f32>>> {
        if !entry.seq.wants_logits || entry.is_part() {
            return Ok(Vec::new());
        }
        let (logits, vocab) = (self.memory.get("logits"), self.config.vocab_size);
        let rows = accepted.path[entry.given - 1..].iter().map(|node| first_row + node);
        rows.map(|row| floats(backend, logits, row * vocab, vocab)).collect()
    }

    /// Enqueues the passes that draft.
    fn draft_behind(&mut self, backend: &mut dyn Backend, entries: &[Entry<'_>], nodes: usize) -> Result<()> {
        let requests = entries.len();
        let (block, drafting) = self.blocks_of(entries);
        let (depth, blocks) = (block.depth(), drafting.next_power_of_two().min(self.dims.max_requests));
        let rows = block.rows * blocks;
        let open = self.pass(backend, Kind::OpenBlocks { depth, nodes }, 1)?;
        let grow = self.pass(backend, Kind::GrowBlock { depth, nodes }, rows)?;
        // A sequence that has reached its limit gets no block; that of the others is 0.
        let mut words = vec![0; requests * report_words(nodes)];
        for (entry, report) in entries.iter().zip(words.chunks_exact_mut(report_words(nodes))) {
            let limit = entry.seq.tokens().len() + entry.seq.room();
            report[0] = if entry.draft_depth > 0 { limit as u32 } else { 0 };
        }
        backend.write(self.memory.get(block::STATE), 0, &words)?;
        let keys = entries.iter().map(|entry| entry.seq.tokens().len()).max().unwrap_or(0) + rows;
        [open, grow].into_iter().try_for_each(|pass| backend.run(pass, Extent { rows, requests, keys }))
    }

    /// What blocks the entries' drafts need, and how many.
    fn blocks_of(&self, entries: &[Entry<'_>]) -> (BlockShape, usize) {
        let depths = entries.iter().map(|entry| entry.draft_depth).filter(|&depth| depth > 0);
        (self.shortened(depths.clone().max().unwrap_or(0)), depths.count())
    }

    fn reported(&mut self, backend: &mut dyn Backend, entries: &[Entry<'_>], nodes: usize) -> Result<Vec<Outcome>> {
        let words = backend.read(self.memory.get(block::STATE), 0, entries.len() * report_words(nodes))?;
        let (block, drafting) = self.blocks_of(entries);
        let cost = self.draft_cost(drafting, block.depth()) / drafting as f32;
        let each = entries.iter().zip(words.chunks_exact(report_words(nodes)));
        each.map(|(entry, words)| {
            let report = RoundReport::new(words, nodes);
            let is_there = entry.draft_depth > 0 && report.nodes() > 0;
            let draft = if is_there { Some(drafted(&report, cost, block.depth())?) } else { None };
            Ok(Outcome { accepted: accepted(entry, &report), logits: Vec::new(), draft })
        })
        .collect()
    }
}

/// Of what was given, the report tells only what follows: the next root.
fn accepted(entry: &Entry<'_>, report: &RoundReport) -> Accepted {
    if entry.given == 1 {
        let path = report.path().iter().map(|&node| node as usize).collect();
        return Accepted { path, tokens: report.drawn().to_vec() };
    }
    let mut accepted = Accepted::given(&entry.tree);
    accepted.tokens.rotate_left(1);
    *accepted.tokens.last_mut().expect("a token at least") = report.token(0);
    accepted
}

fn drafted(report: &RoundReport, cost: f32, reach: usize) -> Result<Draft> {
    let mut draft = Draft { cost, reach, ..Draft::root(report.token(0)) };
    for node in 1..report.nodes() {
        draft.push(report.parent(node), report.token(node), report.survival(node))?;
    }
    Ok(draft)
}

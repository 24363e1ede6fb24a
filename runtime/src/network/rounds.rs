//! Rounds in which the device drafts: a pass verifies a tree, commits what it accepts and drafts the next, from n-grams or
//! from a speculator's block. The host waits once.
//!
//! The host starts a sequence: reserves pages for all that it may become, and writes its tokens. From then on it writes
//! nothing. It runs the pass that is large enough for the tree, waits, and reads what became of it and how the next looks.

use treespark_kernel_gen::layout::{RoundReport, report_words};
use treespark_models::block;

use super::{Kind, Network, round_rows};
use crate::backend::{Backend, Extent, PassId};
use crate::batch::Batch;
use crate::error::Result;
use crate::kv::KvCache;
use crate::sequence::Sequence;
use crate::tree::{Accepted, TokenTree};

/// A tree that the device has put into the batch buffers, and whose it is.
pub(super) struct Drafted {
    /// No two sequences hold the same page.
    first_page: Option<u32>,
    prefix: usize,
    tree: TokenTree,
}

impl Drafted {
    fn is_of(&self, kv: &KvCache) -> bool {
        self.first_page.is_some() && self.first_page == kv.pages().first().copied() && self.prefix == kv.len()
    }
}

impl Network {
    /// The tree of the sequence's next round, of up to `nodes` nodes. The round before has drafted it; only before the
    /// first round is there something to run and to wait for.
    pub fn drafted(&mut self, backend: &mut dyn Backend, seq: &mut Sequence, nodes: usize) -> Result<TokenTree> {
        match self.drafted.take() {
            Some(drafted) if drafted.is_of(&seq.kv) => Ok(drafted.tree),
            _ => self.start(backend, seq, nodes),
        }
    }

    /// One round on the tree that [`Network::drafted`] returned: verify, accept, commit, and draft the next. Waits.
    pub fn round(
        &mut self,
        backend: &mut dyn Backend,
        kv: &mut KvCache,
        tree: &TokenTree,
        nodes: usize,
    ) -> Result<Accepted> {
        let prefix = kv.len();
        let pass = self.pass(backend, Kind::Round { nodes }, tree.len())?;
        let keys = prefix + tree.shape().max_depth() + 1;
        backend.run(pass, Extent { rows: tree.len(), requests: 1, keys })?;
        let words = self.report(backend, nodes)?; // the round's only wait
        let report = RoundReport::new(&words, nodes);
        let path = report.path().iter().map(|&node| node as usize).collect();
        let accepted = Accepted { path, tokens: report.drawn().to_vec() }.checked(prefix)?;
        kv.commit(accepted.path.len());
        if report.rows() > 0 {
            let first_page = kv.pages().first().copied();
            self.drafted = Some(Drafted { first_page, prefix: kv.len(), tree: drafted_tree(&report)? });
        }
        Ok(accepted)
    }

    /// Compiles all that rounds of up to `nodes` nodes may need, so that they wait for no compiler. Returns the pass that
    /// drafts the first tree.
    pub fn prepare_rounds(&mut self, backend: &mut dyn Backend, nodes: usize) -> Result<PassId> {
        let sizes = (1..=nodes).filter(|&rows| rows == round_rows(rows) || rows == nodes);
        let whole = self.grows_blocks().then(|| self.whole_block(nodes));
        let rounds = sizes.map(|rows| (Kind::Round { nodes }, rows));
        self.prepare(backend, rounds.chain(whole).chain([(Kind::First { nodes }, 1)]).collect())?;
        self.pass(backend, Kind::First { nodes }, 1)
    }

    /// Tells the device of a sequence, and has it draft the first tree.
    fn start(&mut self, backend: &mut dyn Backend, seq: &mut Sequence, nodes: usize) -> Result<TokenTree> {
        let limit = seq.tokens().len() + seq.room();
        // Behind the last token lies the tree, or the block that it is grown from.
        let behind = if self.grows_blocks() { nodes.max(self.block().rows) } else { nodes };
        seq.kv.reserve(&mut self.pool, limit + behind - seq.kv.len())?;
        let root = TokenTree::root(seq.last());
        let mut batch = Batch::new(self.dims.pages_per_request);
        batch.add(&seq.kv, &root, &[], &seq.sampling);
        let pass = self.prepare_rounds(backend, nodes)?;
        if self.grows_blocks() {
            backend.write(self.memory.get(block::STATE), 0, &[limit as u32, 0, 0, 0, seq.last()])?;
        } else {
            backend.write(self.memory.get("history"), 0, seq.tokens())?;
            // Hit rates, further on, are kept from one sequence to the next.
            backend.write(self.memory.get("state"), 0, &[limit as u32])?;
        }
        backend.write(self.memory.get("accepted"), 0, &[0])?;
        self.write_and_run(backend, pass, &batch)?;
        let words = self.report(backend, nodes)?;
        drafted_tree(&RoundReport::new(&words, nodes))
    }

    fn report(&self, backend: &mut dyn Backend, nodes: usize) -> Result<Vec<u32>> {
        let state = if self.grows_blocks() { block::STATE } else { "state" };
        backend.read(self.memory.get(state), 0, report_words(nodes))
    }
}

fn drafted_tree(report: &RoundReport) -> Result<TokenTree> {
    let mut tree = TokenTree::root(report.token(0));
    for node in 1..report.rows() {
        tree.push(report.parent(node), report.token(node))?;
    }
    Ok(tree)
}

//! The rows of one pass: which tokens, at which positions, seeing what. Written to the device before the pass.

use treespark_kernel_gen::layout::HEADER_WORDS;
use treespark_kernel_gen::{ANCESTOR_WORDS, Request, Row};

use crate::backend::Extent;
use crate::grammar::Grammar;
use crate::kv::KvCache;
use crate::sampling::Sampling;
use crate::sequence::Sequence;
use crate::tree::TokenTree;

/// What a pass runs of a sequence: the tokens that are not in its cache, and a tree behind them. The first `given` nodes are a
/// chain, which nobody doubts; the last of them is the tree's root.
pub struct Entry<'a> {
    pub seq: &'a mut Sequence,
    pub tree: TokenTree,
    pub given: usize,
    /// How deep the device, if it drafts for many, may draft what comes next; 0: not at all.
    pub draft_depth: usize,
}

impl<'a> Entry<'a> {
    /// Of a sequence whose text is in the cache but for the last token.
    pub fn of_tree(seq: &'a mut Sequence, tree: TokenTree) -> Entry<'a> {
        Entry { seq, tree, given: 1, draft_depth: 0 }
    }

    /// Whether it is a part of a prompt that does not reach the end: nobody wants to know what follows it.
    pub fn is_part(&self) -> bool {
        self.given < self.seq.pending().len()
    }
}

/// A mask for each row of a pass (bit t is set if token t may be drawn there), where a grammar has a say in it. May cut trees.
pub fn masks(entries: &mut [Entry<'_>]) -> Option<Vec<u32>> {
    let asked = |entry: &Entry<'_>| entry.seq.grammar.as_ref().filter(|_| !entry.is_part()).map(Grammar::words);
    let words = entries.iter().find_map(asked)?;
    let mut masks = Vec::new();
    for entry in entries {
        let is_part = entry.is_part();
        match &mut entry.seq.grammar {
            Some(grammar) if !is_part => grammar.masks(&mut entry.tree, entry.given, &mut masks),
            _ => masks.resize(masks.len() + entry.tree.len() * words, u32::MAX),
        }
    }
    Some(masks)
}

#[derive(Debug, Default)]
pub struct Batch {
    rows: Vec<u32>,
    requests: Vec<u32>,
    pages: Vec<u32>,
    pages_per_request: usize,
    keys: usize,
}

impl Batch {
    pub fn new(pages_per_request: usize) -> Batch {
        Batch { requests: vec![0; HEADER_WORDS], pages_per_request, ..Batch::default() }
    }

    /// Adds a request with some nodes of its tree. Nodes outside the range must already have their cache rows.
    pub fn add(&mut self, kv: &KvCache, tree: &TokenTree, nodes: &[usize], sampling: &Sampling) {
        let row = |&node: &usize| (node, tree.token(node), tree.shape().depth(node), tree.shape().ancestors(node));
        self.add_rows(kv, nodes.iter().map(row), 0, sampling);
    }

    /// The same behind so many tokens of the cache, not all of it. Nothing is drawn.
    pub fn add_behind(&mut self, kv: &KvCache, prefix: usize, tree: &TokenTree, nodes: &[usize]) {
        let row = |&node: &usize| (node, tree.token(node), tree.shape().depth(node), tree.shape().ancestors(node));
        self.add_rows_at(kv, prefix, nodes.iter().map(row), 0, &Sampling::default());
    }

    /// Adds a request with a block: tokens one behind the other that all see each other.
    pub fn add_block(&mut self, kv: &KvCache, tokens: &[u32], sampling: &Sampling) {
        let mut seen = [0; ANCESTOR_WORDS];
        (0..tokens.len()).for_each(|node| seen[node / 32] |= 1 << (node % 32));
        self.add_rows(kv, tokens.iter().enumerate().map(|(node, &token)| (node, token, node, seen)), 0, sampling);
    }

    /// Adds a request with a row for each depth from the root's on, all of which read the hidden state of one node: by its row
    /// in the pass that verified it, which is the node itself where the pass had one request.
    pub fn add_readers(&mut self, kv: &KvCache, rows: usize, token: u32, node: usize, sampling: &Sampling) {
        let mut seen = [0; ANCESTOR_WORDS];
        seen[node / 32] |= 1 << (node % 32);
        self.add_rows(kv, (0..rows).map(|depth| (node, token, depth, seen)), 0, sampling);
    }

    /// Node, token, depth and what is seen, of each row.
    fn add_rows(
        &mut self,
        kv: &KvCache,
        rows: impl ExactSizeIterator<Item = (usize, u32, usize, [u32; ANCESTOR_WORDS])>,
        given: usize,
        sampling: &Sampling,
    ) {
        self.add_rows_at(kv, kv.len(), rows, given, sampling);
    }

    fn add_rows_at(
        &mut self,
        kv: &KvCache,
        prefix: usize,
        rows: impl ExactSizeIterator<Item = (usize, u32, usize, [u32; ANCESTOR_WORDS])>,
        given: usize,
        sampling: &Sampling,
    ) {
        let request = Request {
            prefix: prefix as u32,
            first_row: self.n_rows() as u32,
            n_rows: rows.len() as u32,
            sample: sampling.sample,
            seed: [sampling.seed as u32, (sampling.seed >> 32) as u32],
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            given: given as u32,
        };
        let index = self.n_requests() as u32;
        for (node, token, depth, ancestors) in rows {
            let position = prefix + depth;
            let row = Row { token, position: position as u32, request: index, node: node as u32, ancestors };
            self.rows.extend(row.to_words());
            self.keys = self.keys.max(position + 1);
        }
        self.requests.extend(request.to_words());
        self.pages.extend(kv.pages());
        self.pages.resize(self.n_requests() * self.pages_per_request, 0);
        self.requests[0] = self.n_rows() as u32;
        self.requests[1] = self.n_requests() as u32;
    }

    /// Adds a request with all nodes of its tree.
    pub fn add_tree(&mut self, kv: &KvCache, tree: &TokenTree, sampling: &Sampling) {
        self.add_given(kv, tree, 0, sampling);
    }

    /// The same, the first so many nodes being a chain that is accepted whatever is drawn.
    pub fn add_given(&mut self, kv: &KvCache, tree: &TokenTree, given: usize, sampling: &Sampling) {
        let row = |node: usize| (node, tree.token(node), tree.shape().depth(node), tree.shape().ancestors(node));
        self.add_rows(kv, (0..tree.len()).map(row), given, sampling);
    }

    pub fn n_rows(&self) -> usize {
        self.rows.len() / Row::WORDS
    }

    fn n_requests(&self) -> usize {
        (self.requests.len() - HEADER_WORDS) / Request::WORDS
    }

    pub fn extent(&self) -> Extent {
        Extent { rows: self.n_rows(), requests: self.n_requests(), keys: self.keys }
    }

    /// The words of the `rows`, `requests` and `pages` buffers.
    pub fn words(&self) -> [(&'static str, &[u32]); 3] {
        [("rows", &self.rows), ("requests", &self.requests), ("pages", &self.pages)]
    }
}

//! The rows of one pass: which tokens, at which positions, seeing what. Written to the device before the pass.

use std::ops::Range;

use treespark_kernel_gen::layout::HEADER_WORDS;
use treespark_kernel_gen::{Request, Row};

use crate::backend::Extent;
use crate::kv::KvCache;
use crate::sampling::Sampling;
use crate::tree::TokenTree;

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
        let request = Request {
            prefix: kv.len() as u32,
            first_row: self.n_rows() as u32,
            n_rows: nodes.len() as u32,
            sample: sampling.sample,
            seed: [sampling.seed as u32, (sampling.seed >> 32) as u32],
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
        };
        let index = self.n_requests() as u32;
        for &node in nodes {
            let position = kv.len() + tree.shape().depth(node);
            let ancestors = tree.shape().ancestors(node);
            let row = Row {
                token: tree.token(node),
                position: position as u32,
                request: index,
                node: node as u32,
                ancestors,
            };
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
        let nodes: Vec<usize> = Range { start: 0, end: tree.len() }.collect();
        self.add(kv, tree, &nodes, sampling);
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

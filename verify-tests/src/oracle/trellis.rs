//! The oracle's drafting from a block: every path of the trellis is looked at, and the likeliest are the tree.
//!
//! Survivals are f32, as in `drafting`: they only rank nodes, and another rounding would be another tree.

use treespark_kernel_gen::layout::{HEADER_WORDS, accepted_words, report_nodes, report_words};
use treespark_kernel_gen::{Fill, MAX_NODES, Op, Request, Row};

use super::Step;
use crate::batch::Tree;

impl Step<'_> {
    pub(super) fn open_block(&mut self, op: &Op) {
        let &Op::OpenBlock { accepted, state, block, .. } = op else { unreachable!() };
        let nodes = report_nodes(self.width(state));
        let mut row = 0;
        for request in 0..self.n_requests() {
            let (at, from) = (request * self.width(state), request * accepted_words(MAX_NODES));
            let words = HEADER_WORDS + request * Request::WORDS;
            let n = self.word(accepted, from) as usize;
            let prefix = self.request(request).prefix + n as u32;
            let drawn: Vec<u32> = (0..n).map(|i| self.word(accepted, from + 1 + MAX_NODES + i)).collect();
            let root = drawn.last().copied().unwrap_or_else(|| self.word(state, at + 4));
            for (i, &token) in drawn.iter().enumerate().take(nodes) {
                self.set_word(state, at + 4 + 2 * nodes + i, self.word(accepted, from + 1 + i));
                self.set_word(state, at + 4 + 3 * nodes + i, token);
            }
            let rows = if prefix + 1 < self.word(state, at) { block.rows } else { 0 };
            [(1, 0), (2, 0), (3, n as u32), (4, root)].into_iter().for_each(|(i, word)| self.set_word(state, at + i, word));
            for (i, word) in [prefix, row as u32, rows as u32].into_iter().enumerate() {
                self.set_word(self.batch.requests, words + i, word);
            }
            for node in 0..rows {
                let mut ancestors = [0; MAX_NODES / 32];
                (0..rows).for_each(|seen| ancestors[seen / 32] |= 1 << (seen % 32));
                let position = prefix + node as u32;
                let (token, node) = match block.fill {
                    Fill::Mask(token) if node > 0 => (token, node as u32),
                    Fill::Mask(_) => (root, 0),
                    Fill::State if n == 0 => (root, 0),
                    Fill::State => (root, self.word(accepted, from + n)),
                };
                self.set_batch_row(row, Row { token, position, request: request as u32, node, ancestors });
                row += 1;
            }
        }
        self.set_word(self.batch.requests, 0, row as u32);
    }

    pub(super) fn trellis(&mut self, op: &Op) {
        let &Op::Trellis { block, ids, scores, hidden, markov, confidence, trellis, order, .. } = op else {
            unreachable!()
        };
        let (k, width) = (self.width(ids), self.width(hidden));
        let rank = markov.map_or(0, |(w1, _)| self.width(w1));
        for request in 0..self.n_requests() {
            let batch = self.request(request);
            if batch.n_rows == 0 {
                continue;
            }
            let first = batch.first_row as usize;
            let temperature = if batch.temperature > 0.0 { f64::from(batch.temperature) } else { 1.0 };
            for depth in 0..block.depth() {
                let row = first + block.first + depth;
                let parents: Vec<u32> = match depth {
                    0 => vec![self.row(first).token],
                    _ => (0..k).map(|i| self.word(ids, (row - 1) * k + i)).collect(),
                };
                for (i, parent) in parents.into_iter().enumerate() {
                    let embedded = markov.map_or(Vec::new(), |(w1, _)| self.row_of(w1, parent as usize));
                    let score = |j: usize| {
                        let token = self.word(ids, row * k + j) as usize;
                        let bias = markov.map_or(0.0, |(_, w2)| dot(&embedded, &self.row_of(w2, token)));
                        self.get(scores, row * k + j) + bias / temperature
                    };
                    let all: Vec<f64> = (0..k).map(score).collect();
                    let best = (0..k).reduce(|best, j| if all[j] > all[best] { j } else { best }).expect("k is not 0");
                    let weights: Vec<f64> = all.iter().map(|score| (score - all[best]).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    let sure = confidence.map(|buf| {
                        let numbers = self.slice(buf, 0, width + rank + 1 + 2 * block.depth());
                        let inputs = [self.slice(hidden, row * width, width), embedded.clone()].concat();
                        let logit = dot(&inputs, &numbers[..width + rank]) + numbers[width + rank];
                        let inverse_temperature = numbers[width + rank + 1 + depth];
                        let factor = numbers[width + rank + 1 + block.depth() + depth];
                        (1.0 / (1.0 + (-logit * inverse_temperature).exp()), factor)
                    });
                    let (sure, factor) = sure.unwrap_or((1.0 / total, 1.0));
                    let share = if total > 1.0 { factor * (1.0 - sure) / (total - 1.0) } else { 0.0 };
                    let p = |j: usize| if j == best { sure } else { weights[j] * share };
                    let mut sorted: Vec<usize> = (0..k).collect();
                    sorted.sort_by(|&a, &b| p(b).total_cmp(&p(a)));
                    for (rank, j) in sorted.into_iter().enumerate() {
                        let at = ((request * block.depth() + depth) * k + i) * k + rank;
                        self.set(trellis, at, p(j));
                        self.set_word(order, at, j as u32);
                    }
                }
            }
        }
    }

    pub(super) fn grow_trellis(&mut self, op: &Op) {
        let Op::GrowTrellis { block, ids, trellis, order, state, costs, .. } = op else { unreachable!() };
        let (k, nodes) = (self.width(*ids), costs.len());
        let mut first_row = 0;
        for request in 0..self.n_requests() {
            let batch = self.request(request);
            let (at, words) = (request * report_words(nodes), HEADER_WORDS + request * Request::WORDS);
            let mut tree = Vec::new();
            if batch.n_rows > 0 {
                let max_depth = block.depth().min((self.word(*state, at) - batch.prefix) as usize - 2);
                let child = |depth: usize, i: usize, rank: usize| {
                    let at = ((request * block.depth() + depth) * k + i) * k + rank;
                    (self.word(*order, at) as usize, self.get(*trellis, at) as f32)
                };
                tree = likeliest(max_depth, k, nodes, child);
            }
            let (mut best, mut expected) = ((0, 0.0), 0.0);
            for (n, place) in tree.iter().enumerate() {
                expected += place.survival;
                if expected / costs[n] > best.1 {
                    best = (n + 1, expected / costs[n]);
                }
            }
            let token = |place: &Place| match place.depth {
                0 => self.word(*state, at + 4),
                depth => {
                    let row = batch.first_row as usize + block.first + depth - 1;
                    self.word(*ids, row * k + place.candidate)
                }
            };
            let tokens: Vec<u32> = tree.iter().map(token).collect();
            let shape = Tree { parents: tree.iter().map(|place| place.parent).collect(), tokens };
            for (n, place) in tree.iter().enumerate() {
                self.set_word(*state, at + 4 + n, shape.tokens[n]);
                self.set_word(*state, at + 4 + nodes + n, place.parent as u32);
                self.set_word(*state, at + 4 + 4 * nodes + n, place.survival.to_bits());
            }
            for (n, place) in tree.iter().enumerate().take(best.0) {
                let (token, ancestors) = (shape.tokens[n], shape.ancestor_words(n));
                let position = batch.prefix + place.depth as u32;
                let row = Row { token, position, request: request as u32, node: n as u32, ancestors };
                self.set_batch_row(first_row + n, row);
            }
            self.set_word(*state, at + 1, tree.len() as u32);
            self.set_word(*state, at + 2, best.0 as u32);
            self.set_word(self.batch.requests, words + 1, first_row as u32);
            self.set_word(self.batch.requests, words + 2, best.0 as u32);
            first_row += best.0;
        }
        self.set_word(self.batch.requests, 0, first_row as u32);
    }

    fn set_batch_row(&mut self, index: usize, row: Row) {
        for (i, word) in row.to_words().into_iter().enumerate() {
            self.set_word(self.batch.rows, index * Row::WORDS + i, word);
        }
    }
}

#[derive(Debug, Clone)]
struct Place {
    survival: f32,
    depth: usize,
    candidate: usize,
    parent: usize,
}

/// The likeliest paths, one node after the other: of all children of chosen nodes always the best that is left.
fn likeliest(
    max_depth: usize,
    k: usize,
    nodes: usize,
    child: impl Fn(usize, usize, usize) -> (usize, f32),
) -> Vec<Place> {
    let mut tree = vec![Place { survival: 1.0, depth: 0, candidate: 0, parent: 0 }];
    while tree.len() < nodes {
        let mut best: Option<Place> = None;
        for (parent, above) in tree.iter().enumerate().filter(|(_, place)| place.depth < max_depth) {
            for (candidate, p) in (0..k).map(|rank| child(above.depth, above.candidate, rank)) {
                let taken = |place: &Place| place.depth > 0 && place.parent == parent && place.candidate == candidate;
                let survival = above.survival * p;
                let better = best.as_ref().is_none_or(|best| survival > best.survival);
                if survival > 0.0 && better && !tree.iter().any(taken) {
                    best = Some(Place { survival, depth: above.depth + 1, candidate, parent });
                }
            }
        }
        match best {
            Some(place) => tree.push(place),
            None => break,
        }
    }
    tree
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

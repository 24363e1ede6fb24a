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
            let Request { prefix, first_row, .. } = self.request(request);
            let prefix = prefix + n as u32;
            let drawn: Vec<u32> = (0..n).map(|i| self.word(accepted, from + 1 + MAX_NODES + i)).collect();
            let root = drawn.last().copied().unwrap_or_else(|| self.word(state, at + 4));
            for (i, &token) in drawn.iter().enumerate().take(nodes) {
                self.set_word(state, at + 4 + 2 * nodes + i, self.word(accepted, from + 1 + i));
                self.set_word(state, at + 4 + 3 * nodes + i, token);
            }
            let rows = if prefix + 1 < self.word(state, at) { block.rows } else { 0 };
            [(1, 0), (2, 0), (3, n as u32), (4, root)]
                .into_iter()
                .for_each(|(i, word)| self.set_word(state, at + i, word));
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
                    Fill::State => (root, first_row + self.word(accepted, from + n)),
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
                        let [inverse_temperature, factor] = [1, 2].map(|i| numbers[width + rank + i + 2 * depth]);
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
        let Op::GrowTrellis { state, costs, least, .. } = op else { unreachable!() };
        let nodes = costs.len();
        let is_alone = self.pass.buffer(self.batch.requests).len() == HEADER_WORDS + Request::WORDS;
        for request in 0..self.n_requests() {
            if self.request(request).n_rows == 0 {
                continue;
            }
            let mut places = self.likeliest_of(op, request);
            if !is_alone {
                places.retain(|place| place.survival >= *least);
            }
            let rows = if is_alone { worth_it(&places, costs) } else { places.len() };
            let tokens: Vec<u32> = places.iter().map(|place| self.token_of(op, request, place)).collect();
            let at = request * report_words(nodes);
            self.set_word(*state, at + 1, places.len() as u32);
            self.set_word(*state, at + 2, rows as u32);
            for (n, place) in places.iter().enumerate() {
                self.set_word(*state, at + 4 + n, tokens[n]);
                self.set_word(*state, at + 4 + nodes + n, place.parent as u32);
                self.set_word(*state, at + 4 + 4 * nodes + n, place.survival.to_bits());
            }
            if is_alone {
                self.set_tree_rows(&places[..rows], &tokens);
            }
        }
    }

    /// As many nodes as a tree may have.
    fn likeliest_of(&self, op: &Op, request: usize) -> Vec<Place> {
        let Op::GrowTrellis { block, ids, trellis, order, state, costs, .. } = op else { unreachable!() };
        let k = self.width(*ids);
        let limit = self.word(*state, request * report_words(costs.len()));
        let max_depth = block.depth().min((limit - self.request(request).prefix) as usize - 2);
        let child = |depth: usize, i: usize, rank: usize| {
            let at = ((request * block.depth() + depth) * k + i) * k + rank;
            (self.word(*order, at) as usize, self.get(*trellis, at) as f32)
        };
        likeliest(max_depth, k, costs.len(), child)
    }

    fn token_of(&self, op: &Op, request: usize, place: &Place) -> u32 {
        let &Op::GrowTrellis { block, ids, state, .. } = op else { unreachable!() };
        if place.depth == 0 {
            return self.word(state, request * self.width(state) + 4);
        }
        let row = self.request(request).first_row as usize + block.first + place.depth - 1;
        self.word(ids, row * self.width(ids) + place.candidate)
    }

    /// The rows of the only request's tree.
    fn set_tree_rows(&mut self, places: &[Place], tokens: &[u32]) {
        let prefix = self.request(0).prefix;
        let tree = Tree { parents: places.iter().map(|place| place.parent).collect(), tokens: tokens.to_vec() };
        for (n, place) in places.iter().enumerate() {
            let (position, ancestors) = (prefix + place.depth as u32, tree.ancestor_words(n));
            self.set_batch_row(n, Row { token: tokens[n], position, request: 0, node: n as u32, ancestors });
        }
        for at in [0, HEADER_WORDS + 2] {
            self.set_word(self.batch.requests, at, places.len() as u32);
        }
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

/// How many of the nodes to verify: expected tokens over cost are most.
fn worth_it(places: &[Place], costs: &[f32]) -> usize {
    let (mut best, mut expected) = ((0, 0.0), 0.0);
    for (n, place) in places.iter().enumerate() {
        expected += place.survival;
        if expected / costs[n] > best.1 {
            best = (n + 1, expected / costs[n]);
        }
    }
    best.0
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

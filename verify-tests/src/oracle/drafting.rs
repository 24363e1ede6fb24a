//! The oracle's n-gram drafter: a trie of what followed, grown match by match and token by token.
//!
//! Rates and survivals are f32, the one exception here: they only rank nodes, and another rounding would be another tree.

use treespark_kernel_gen::layout::{HEADER_WORDS, accepted_words, ngram_nodes, report_words};
use treespark_kernel_gen::{MAX_NODES, Op, Request, Row};

use super::Step;
use crate::batch::Tree;

const CLASSES: usize = 12;
const PRIORS: [f32; CLASSES] = [0.08, 0.2, 0.35, 0.55, 0.7, 0.85, 0.04, 0.08, 0.12, 0.15, 0.15, 0.1];
const MAX_MATCH: usize = 12;
const FOLLOWED: usize = 8;
const DEPTH: usize = 16;

/// A node of the trie; node 0 is the root.
#[derive(Debug, Clone)]
struct Node {
    token: u32,
    parent: usize,
    depth: usize,
    class: usize,
    survival: f32,
}

impl Step<'_> {
    pub(super) fn draft_ngram(&mut self, op: &Op) {
        let mut first_row = 0;
        for request in 0..self.n_requests() {
            let n_rows = self.draft(op, request, first_row);
            let at = HEADER_WORDS + request * Request::WORDS;
            self.set_word(self.batch.requests, at + 1, first_row as u32);
            self.set_word(self.batch.requests, at + 2, n_rows as u32);
            // None of them is given.
            self.set_word(self.batch.requests, at + 11, 0);
            first_row += n_rows;
        }
        self.set_word(self.batch.requests, 0, first_row as u32);
    }

    /// One request; returns how many rows it gets.
    fn draft(&mut self, op: &Op, request: usize, first_row: usize) -> usize {
        let &Op::DraftNgram { accepted, history, state, row_cost, .. } = op else { unreachable!() };
        let max_nodes = ngram_nodes(self.width(state));
        let at = request * self.width(state);
        let rates = self.observe(op, request, max_nodes);

        let accepted = self.word(accepted, request * accepted_words(MAX_NODES));
        let prefix = (self.request(request).prefix + accepted) as usize;
        self.set_word(self.batch.requests, HEADER_WORDS + request * Request::WORDS, prefix as u32);
        let limit = (self.word(state, at) as usize).min(self.width(history));
        if prefix + 1 >= limit {
            self.set_word(state, at + 1, 0);
            self.set_word(state, at + 2, 0);
            return 0;
        }
        let from = request * self.width(history);
        let text: Vec<u32> = (from..=from + prefix).map(|i| self.word(history, i)).collect();
        let nodes = best_nodes(trie(&text, limit - prefix - 2, &rates), max_nodes);
        let n_rows = worth_it(&nodes, row_cost);
        self.set_word(state, at + 1, nodes.len() as u32);
        self.set_word(state, at + 2, n_rows as u32);
        for (i, node) in nodes.iter().enumerate() {
            let link = if i == 0 { 0 } else { node.parent | node.class << 8 | node.depth << 16 };
            self.set_word(state, at + 4 + i, node.token);
            self.set_word(state, at + 4 + max_nodes + i, link as u32);
            self.set_word(state, at + 4 + 4 * max_nodes + i, node.survival.to_bits());
        }
        let parents = nodes.iter().map(|node| node.parent).collect();
        let tree = Tree { parents, tokens: nodes.iter().map(|node| node.token).collect() };
        for (i, node) in nodes.iter().enumerate().take(n_rows) {
            let position = (prefix + node.depth) as u32;
            let ancestors = tree.ancestor_words(i);
            let row = Row { token: node.token, position, request: request as u32, node: i as u32, ancestors };
            for (j, word) in row.to_words().into_iter().enumerate() {
                self.set_word(self.batch.rows, (first_row + i) * Row::WORDS + j, word);
            }
        }
        n_rows
    }

    /// Notes the accepted tokens, and returns the hit rates that they lead to.
    fn observe(&mut self, op: &Op, request: usize, max_nodes: usize) -> Vec<f32> {
        let &Op::DraftNgram { accepted, history, state, .. } = op else { unreachable!() };
        let from = request * accepted_words(MAX_NODES);
        let at = request * self.width(state);
        let prefix = self.request(request).prefix as usize;
        let n = self.word(accepted, from) as usize;
        let path: Vec<u32> = (0..n).map(|i| self.word(accepted, from + 1 + i)).collect();
        let drawn: Vec<u32> = (0..n).map(|i| self.word(accepted, from + 1 + MAX_NODES + i)).collect();
        self.set_word(state, at + 3, n as u32);
        for (i, &token) in drawn.iter().enumerate() {
            self.set_word(history, request * self.width(history) + prefix + 1 + i, token);
        }
        for (i, (&node, &token)) in path.iter().zip(&drawn).enumerate().take(max_nodes) {
            self.set_word(state, at + 4 + 2 * max_nodes + i, node);
            self.set_word(state, at + 4 + 3 * max_nodes + i, token);
        }
        let (mut hits, mut trials) = ([0u32; CLASSES], [0u32; CLASSES]);
        for node in 1..self.word(state, at + 1) as usize {
            let link = self.word(state, at + 4 + max_nodes + node);
            let (parent, class, depth) = (link & 0xff, (link >> 8 & 0xff) as usize, (link >> 16) as usize);
            if path.get(depth - 1) == Some(&parent) {
                trials[class] += 1;
                hits[class] += u32::from(self.word(state, at + 4 + node) == drawn[depth - 1]);
            }
        }
        let rates = at + report_words(max_nodes);
        let mut rate = |class: usize| {
            let known = [rates + class, rates + CLASSES + class].map(|i| f32::from_bits(self.word(state, i)));
            let mut sums = [known[0] + hits[class] as f32, known[1] + trials[class] as f32];
            if sums[1] >= 64.0 {
                sums = sums.map(|x| x * 0.5);
            }
            self.set_word(state, rates + class, sums[0].to_bits());
            self.set_word(state, rates + CLASSES + class, sums[1].to_bits());
            (sums[0] + PRIORS[class] * 4.0) / (sums[1] + 4.0)
        };
        (0..CLASSES).map(&mut rate).collect()
    }
}

/// What followed earlier occurrences of the text's end, down to `max_depth`; nodes in the order in which they were found.
fn trie(text: &[u32], max_depth: usize, rates: &[f32]) -> Vec<Node> {
    let matched = |at: usize| {
        let backwards = text[..at].iter().rev().zip(text.iter().rev());
        backwards.take(MAX_MATCH).take_while(|(a, b)| a == b).count()
    };
    let mut matches: Vec<(usize, usize)> = (1..text.len()).map(|at| (matched(at), at)).filter(|m| m.0 > 0).collect();
    matches.sort_by(|a, b| b.cmp(a));
    let mut nodes = vec![Node { token: text[text.len() - 1], parent: 0, depth: 0, class: 0, survival: 1.0 }];
    for &(matched, at) in matches.iter().take(FOLLOWED) {
        let mut parent = 0;
        for depth in 1..=DEPTH.min(max_depth) {
            let token = text[at + (depth - 1) % (text.len() - at)];
            let children: Vec<usize> = (1..nodes.len()).filter(|&n| nodes[n].parent == parent).collect();
            parent = children.iter().copied().find(|&child| nodes[child].token == token).unwrap_or_else(|| {
                let by_length = [2, 3, 4, 6, 9].iter().filter(|&&length| matched + depth > length).count();
                let class = if children.is_empty() { by_length } else { by_length + CLASSES / 2 };
                let survival = nodes[parent].survival * rates[class];
                nodes.push(Node { token, parent, depth, class, survival });
                nodes.len() - 1
            });
        }
    }
    nodes
}

/// The nodes most likely to survive, the most likely first; of two alike the one that was found first.
fn best_nodes(trie: Vec<Node>, max_nodes: usize) -> Vec<Node> {
    let mut order: Vec<usize> = (0..trie.len()).collect();
    order[1..].sort_by(|&a, &b| trie[b].survival.total_cmp(&trie[a].survival).then(a.cmp(&b)));
    order.truncate(max_nodes);
    let place = |old: usize| order.iter().position(|&o| o == old).expect("a parent survives its children");
    order.iter().map(|&old| Node { parent: place(trie[old].parent), ..trie[old].clone() }).collect()
}

/// How many of the nodes to verify: expected tokens over cost are most.
fn worth_it(nodes: &[Node], row_cost: f32) -> usize {
    let mut best = (0.0, 0);
    let mut expected = 0.0;
    for (i, node) in nodes.iter().enumerate() {
        expected += node.survival; // the root's is 1
        let worth: f32 = expected / (1.0 + row_cost * i as f32);
        if worth > best.0 {
            best = (worth, i + 1);
        }
    }
    best.1
}

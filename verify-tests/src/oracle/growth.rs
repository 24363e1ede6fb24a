//! The oracle's growth of a tree by one level: node by node, each handed the next of its parent's ranked continuations.

use treespark_kernel_gen::layout::HEADER_WORDS;
use treespark_kernel_gen::{MAX_NODES, Op, Request, Row};

use super::Step;
use crate::batch::Tree;

impl Step<'_> {
    pub(super) fn grow(&mut self, op: &Op) {
        let Op::Grow { shape, ids, tokens, .. } = op else { unreachable!() };
        let parents: Vec<usize> = shape.parents().iter().map(|&parent| parent as usize).collect();
        let tree = Tree { tokens: vec![0; parents.len()], parents };
        let deepest = (0..tree.nodes()).map(|node| tree.depth(node)).max().expect("a tree has a root");
        let at_depth = |depth: usize| (0..tree.nodes()).filter(|&node| tree.depth(node) == depth).collect::<Vec<_>>();
        let (above, level) = (at_depth(deepest - 1), at_depth(deepest));

        let mut row = 0;
        for request in 0..self.n_requests() {
            let at = HEADER_WORDS + request * Request::WORDS;
            self.set_word(self.batch.requests, at + 1, row as u32);
            self.set_word(self.batch.requests, at + 2, level.len() as u32);
            let mut taken = vec![0; above.len()];
            for &node in &level {
                let parent = above.iter().position(|&n| n == tree.parents[node]).expect("a parent is one level above");
                let token = self.word(*ids, (request * above.len() + parent) * self.width(*ids) + taken[parent]);
                taken[parent] += 1;
                self.set_word(*tokens, request * MAX_NODES + node, token);
                let position = self.request(request).prefix + deepest as u32;
                let ancestors = tree.ancestor_words(node);
                let words = Row { token, position, request: request as u32, node: node as u32, ancestors }.to_words();
                for (i, word) in words.into_iter().enumerate() {
                    self.set_word(self.batch.rows, row * Row::WORDS + i, word);
                }
                row += 1;
            }
        }
        self.set_word(self.batch.requests, 0, row as u32);
    }
}

//! The oracle's end of a round: accept by walking the tree from its root, commit row by row.

use treespark_kernel_gen::layout::{NO_TOKEN, accepted_words};
use treespark_kernel_gen::{MAX_NODES, Op};

use super::{Slot, Step};

impl Step<'_> {
    pub(super) fn accept(&mut self, op: &Op) {
        let &Op::Accept { draws, accepted, .. } = op else { unreachable!() };
        for request in 0..self.n_requests() {
            let r = self.request(request);
            let first = r.first_row as usize;
            let nodes: Vec<Node> = (first..first + r.n_rows as usize)
                .map(|row| {
                    let view = self.row(row);
                    // The path ends `.., parent, node`.
                    let parent = view.path.iter().rev().nth(1).copied();
                    let is_given = row - first < r.given as usize;
                    Node { token: view.token, parent, is_given, draw: self.word(draws, row) }
                })
                .collect();
            let path = if nodes.is_empty() { Vec::new() } else { walk(&nodes, vec![0]) };
            let at = request * accepted_words(MAX_NODES);
            self.set_word(accepted, at, path.len() as u32);
            for (i, &node) in path.iter().enumerate() {
                self.set_word(accepted, at + 1 + i, node as u32);
                let next = path.get(i + 1).map_or(nodes[node].draw, |&next| nodes[next].token);
                self.set_word(accepted, at + 1 + MAX_NODES + i, next);
            }
        }
    }

    pub(super) fn commit(&mut self, op: &Op) {
        let &Op::Commit { accepted, k_cache, v_cache, .. } = op else { unreachable!() };
        let [layers, _, kv_heads, _, dim] = self.pass.buffer(k_cache).shape[..] else { panic!("not a cache") };
        for request in 0..self.n_requests() {
            let prefix = self.request(request).prefix as usize;
            let at = request * accepted_words(MAX_NODES);
            for i in 0..self.word(accepted, at) as usize {
                let node = self.word(accepted, at + 1 + i) as usize;
                for cache in [Some(k_cache), v_cache].into_iter().flatten() {
                    for layer in 0..layers {
                        for head in 0..kv_heads {
                            let from = self.cache_at(cache, layer, head, Slot { request, slot: prefix + node });
                            let to = self.cache_at(cache, layer, head, Slot { request, slot: prefix + i });
                            for (j, value) in self.slice(cache, from, dim).into_iter().enumerate() {
                                self.set(cache, to + j, value);
                            }
                        }
                    }
                }
            }
        }
    }
}

struct Node {
    token: u32,
    parent: Option<usize>,
    /// It is part of a prompt, which nobody doubts.
    is_given: bool,
    /// What the target drew after this node.
    draw: u32,
}

/// The deepest accepted path that starts with `path`; of equally deep ones the one that ends in the lowest node.
fn walk(nodes: &[Node], path: Vec<usize>) -> Vec<usize> {
    let end = path[path.len() - 1];
    let mut best = path.clone();
    for (node, n) in nodes.iter().enumerate() {
        let is_drawn = nodes[end].draw != NO_TOKEN && n.token == nodes[end].draw;
        if n.parent == Some(end) && (n.is_given || is_drawn) {
            let found = walk(nodes, [path.clone(), vec![node]].concat());
            let deeper = found.len() > best.len();
            if deeper || (found.len() == best.len() && found[found.len() - 1] < best[best.len() - 1]) {
                best = found;
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(token: u32, parent: usize, draw: u32) -> Node {
        Node { token, parent: Some(parent), is_given: false, draw }
    }

    fn root(draw: u32) -> Node {
        Node { token: 7, parent: None, is_given: false, draw }
    }

    #[test]
    fn takes_the_deepest_of_duplicate_siblings_then_the_lowest() {
        let nodes = [root(1), node(1, 0, 2), node(1, 0, 2), node(2, 2, 9), node(2, 1, 9), node(8, 4, 0)];
        assert_eq!(walk(&nodes, vec![0]), [0, 2, 3]);
    }

    #[test]
    fn a_missing_draw_accepts_nothing() {
        assert_eq!(walk(&[root(NO_TOKEN), node(NO_TOKEN, 0, 1)], vec![0]), [0]);
    }

    #[test]
    fn what_is_given_is_accepted_and_what_follows_it_must_be_drawn() {
        let given = |token, parent, draw| Node { is_given: true, ..node(token, parent, draw) };
        let nodes = [root(NO_TOKEN), given(1, 0, 9), given(2, 1, 3), node(4, 2, 0), node(3, 2, 0)];
        assert_eq!(walk(&nodes, vec![0]), [0, 1, 2, 4]);
    }
}

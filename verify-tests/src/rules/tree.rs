//! A tree of drafted tokens. Node 0 is the root, a text's last token; `parents[i] < i`.

use crate::rng::Rng;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    parents: Vec<usize>,
    /// The root's is never looked at.
    tokens: Vec<usize>,
}

impl Tree {
    pub fn root() -> Tree {
        Tree { parents: vec![0], tokens: vec![usize::MAX] }
    }

    pub fn chain(tokens: &[usize]) -> Tree {
        let mut tree = Tree::root();
        for (parent, &token) in tokens.iter().enumerate() {
            tree.push(parent, token);
        }
        tree
    }

    /// Adds a child and returns its node.
    pub fn push(&mut self, parent: usize, token: usize) -> usize {
        assert!(parent < self.len(), "a parent comes before its children");
        self.parents.push(parent);
        self.tokens.push(token);
        self.len() - 1
    }

    /// Number of nodes, root included.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.parents.len()
    }

    pub fn parent(&self, node: usize) -> usize {
        self.parents[node]
    }

    pub fn token(&self, node: usize) -> usize {
        self.tokens[node]
    }

    /// In the order in which they were added.
    pub fn children(&self, node: usize) -> impl Iterator<Item = usize> {
        (node + 1..self.len()).filter(move |&child| self.parents[child] == node)
    }

    /// The child that holds `token`, lowest id first.
    pub fn child_with(&self, node: usize, token: usize) -> Option<usize> {
        self.children(node).find(|&child| self.tokens[child] == token)
    }

    /// Of the root, 0.
    pub fn depth(&self, node: usize) -> usize {
        if node == 0 { 0 } else { self.depth(self.parents[node]) + 1 }
    }

    /// The tokens from below the root down to a node.
    pub fn text(&self, node: usize) -> Vec<usize> {
        if node == 0 { vec![] } else { [self.text(self.parents[node]), vec![self.tokens[node]]].concat() }
    }

    /// Adds up to `nodes` nodes wherever the depth allows, with any tokens, siblings alike among them.
    pub fn add_any(&mut self, nodes: usize, depth: usize, vocab: usize, rng: &mut Rng) {
        for _ in 0..nodes {
            let parent = rng.below(self.len());
            let token = rng.below(vocab);
            if self.depth(parent) < depth {
                self.push(parent, token);
            }
        }
    }

    /// How many trees there are of distinct siblings, up to a depth.
    pub fn count(vocab: usize, depth: usize) -> usize {
        if depth == 0 { 1 } else { (1 + Tree::count(vocab, depth - 1)).pow(vocab as u32) }
    }

    /// The tree of a number below [`Tree::count`]. For each token a digit says which sub-tree follows, 0 that none does.
    pub fn numbered(number: usize, vocab: usize, depth: usize) -> Tree {
        let mut tree = Tree::root();
        let mut pending = vec![(0, number)];
        while let Some((node, mut number)) = pending.pop() {
            let left = depth - tree.depth(node);
            let base = if left == 0 { 1 } else { 1 + Tree::count(vocab, left - 1) };
            for token in 0..vocab {
                if !number.is_multiple_of(base) {
                    pending.push((tree.push(node, token), number % base - 1));
                }
                number /= base;
            }
        }
        tree
    }

    /// Adds what another has and this has not.
    pub fn merge(&mut self, other: &Tree) {
        let mut places = vec![0];
        for node in 1..other.len() {
            let (parent, token) = (places[other.parent(node)], other.token(node));
            places.push(self.child_with(parent, token).unwrap_or_else(|| self.push(parent, token)));
        }
    }

    /// Everything there is to know of it, for a [`super::model::whim`].
    pub fn words(&self) -> impl Iterator<Item = usize> {
        self.parents.iter().chain(&self.tokens).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_tree_has_a_number() {
        for (vocab, depth, count) in [(3, 0, 1), (3, 1, 8), (3, 2, 729), (2, 3, 676)] {
            assert_eq!(Tree::count(vocab, depth), count);
            let texts = |tree: Tree| (1..tree.len()).map(|node| tree.text(node)).collect::<BTreeSet<_>>();
            let trees: BTreeSet<_> = (0..count).map(|number| texts(Tree::numbered(number, vocab, depth))).collect();
            assert_eq!(trees.len(), count);
            assert!(trees.iter().flatten().all(|text| text.len() <= depth));
        }
    }

    #[test]
    fn a_merged_tree_has_the_texts_of_both() {
        let mut tree = Tree::chain(&[0, 1]);
        tree.merge(&Tree::chain(&[0, 2]));
        tree.merge(&Tree::chain(&[0, 1]));
        assert_eq!((1..tree.len()).map(|node| tree.text(node)).collect::<Vec<_>>(), [vec![0], vec![0, 1], vec![0, 2]]);
    }
}

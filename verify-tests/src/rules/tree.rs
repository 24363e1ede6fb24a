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

    /// Everything there is to know of it, for a [`super::model::whim`].
    pub fn words(&self) -> impl Iterator<Item = usize> {
        self.parents.iter().chain(&self.tokens).copied()
    }
}

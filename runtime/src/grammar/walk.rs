//! How a grammar follows the nodes of a tree: one state that goes down and takes steps back.

use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;

use super::{Grammar, told};
use crate::tree::TokenTree;

/// A grammar's state at some node of a tree.
pub struct Walk<'a> {
    grammar: &'a Grammar,
    tree: &'a TokenTree,
    /// Of a copy, since one that fails is of no more use.
    state: Matcher,
    /// The node at which the grammar stands, and its depth.
    root: usize,
    root_depth: usize,
    /// Nodes below it that the state has taken.
    path: Vec<usize>,
}

impl<'a> Walk<'a> {
    pub fn new(grammar: &'a Grammar, tree: &'a TokenTree, root: usize) -> Walk<'a> {
        let (state, root_depth) = (grammar.state.clone(), tree.shape().depth(root));
        Walk { grammar, tree, state, root, root_depth, path: Vec::new() }
    }

    /// Whether a node may be accepted. The root has been.
    pub fn allows(&mut self, node: usize) -> bool {
        if node > self.root && self.is_stop(node) {
            return self.go_to(self.tree.shape().parent(node)) && self.state.is_accepting().unwrap_or(false);
        }
        self.go_to(node)
    }

    /// What may follow a node that is no stop token.
    pub fn mask(&mut self, node: usize) -> Result<SimpleVob, String> {
        if !self.go_to(node) {
            return Err("a token that the grammar forbids".to_string());
        }
        // The library knows its last mask by how many lexemes came before, which those of another branch may equal.
        self.state.invalidate_bias_cache();
        self.state.compute_mask_or_eos().map_err(|error| told(&error))
    }

    pub fn is_stop(&self, node: usize) -> bool {
        self.grammar.is_stop(self.tree.token(node))
    }

    /// Moves the state behind a node, unless the grammar forbids it or the text has ended before.
    fn go_to(&mut self, node: usize) -> bool {
        let path = self.tree.shape().path(node).split_off(self.root_depth + 1);
        let common = self.path.iter().zip(&path).take_while(|(a, b)| a == b).count();
        if self.state.rollback(self.path.len() - common).is_err() {
            return false;
        }
        self.path.truncate(common);
        path[common..].iter().all(|&node| self.step(node))
    }

    fn step(&mut self, node: usize) -> bool {
        if self.is_stop(node) || !matches!(self.state.try_consume_tokens(&[self.tree.token(node)]), Ok(1)) {
            return false;
        }
        self.path.push(node);
        true
    }
}

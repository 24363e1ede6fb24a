//! Match: the target draws its own token at every node, and the walk goes on where a child holds it.
//!
//! Every emitted token is a draw of the target after the text that it follows, so the tree may come from anywhere: it
//! may be pruned and ranked with hindsight of the draft, and its drafter may even know the target's noise
//! ([`super::noise`]). This is the rule of treespark, and SpecInfer's naive one (Miao et al., 2024).

use super::model::Model;
use super::{Choose, Tree};

pub fn verify(target: &Model, tree: &Tree, choose: &mut Choose) -> Vec<usize> {
    descend(target, tree, 0, choose)
}

/// From a node that was accepted, to the end of the walk. Returns the whole text below the root.
pub fn descend(target: &Model, tree: &Tree, mut node: usize, choose: &mut Choose) -> Vec<usize> {
    let mut text = tree.text(node);
    loop {
        let token = choose(target.after(&text));
        text.push(token);
        match tree.child_with(node, token) {
            Some(child) => node = child,
            None => return text,
        }
    }
}

//! Sampled tokens with side branches that were not drawn: the former by a rule of theirs, the latter by match.
//!
//! The token that a rule adds in the end may stand on a side branch, and then the walk goes on there. It goes on with
//! draws of the target, so the branches may be chosen with hindsight of all that was sampled, later tokens included.
//! What was sampled keeps the rules of its kind: a spine those of [`super::chain`] or [`super::block`].

use super::model::Model;
use super::{Choose, Tree, matching};

/// Goes on from what a rule has emitted, as far as the tree leads: its sampled nodes and its side branches alike.
pub fn go_on(target: &Model, tree: &Tree, emitted: Vec<usize>, choose: &mut Choose) -> Vec<usize> {
    let end = emitted.iter().try_fold(0, |node, &token| tree.child_with(node, token));
    end.map_or(emitted, |node| matching::descend(target, tree, node, choose))
}

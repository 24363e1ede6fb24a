//! Trees whose nodes are chosen best first: of all that could come next, always the one most likely to be accepted. A
//! node's survival is the product of probabilities along its path, which only falls, so that the first n nodes are the
//! best tree of n nodes (OPT-Tree, Wang et al. 2024; DDTree).

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use treespark_kernel_gen::TreeShape;

use super::{Draft, Plan};
use crate::error::Result;

/// A token that may follow a node, and how likely it is accepted if the node is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Continuation {
    pub token: u32,
    pub probability: f32,
}

/// Grows a tree as planned. `continuations` of a node come with the likeliest first; it is asked once for each node that
/// may have children, parents before children.
pub fn grow(
    root: u32,
    plan: &Plan,
    mut continuations: impl FnMut(&Draft, usize) -> Vec<Continuation>,
) -> Result<Draft> {
    let mut draft = Draft::root(root);
    match &plan.shape {
        Some(shape) => fill(&mut draft, shape, plan, &mut continuations)?,
        None => choose(&mut draft, plan, &mut continuations)?,
    }
    Ok(draft)
}

/// A node that could come next. Ties go to the one that was found first.
struct Candidate {
    survival: f32,
    found: usize,
    parent: usize,
    token: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Candidate) -> Ordering {
        self.survival.total_cmp(&other.survival).then(other.found.cmp(&self.found))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Candidate) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Candidate) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

fn choose(
    draft: &mut Draft,
    plan: &Plan,
    continuations: &mut impl FnMut(&Draft, usize) -> Vec<Continuation>,
) -> Result<()> {
    let mut heap = BinaryHeap::new();
    let mut node = 0;
    let mut found = 0;
    while draft.tree.len() < plan.max_nodes {
        if draft.tree.shape().depth(node) < plan.max_depth {
            for Continuation { token, probability } in continuations(draft, node) {
                heap.push(Candidate { survival: draft.survival[node] * probability, found, parent: node, token });
                found += 1;
            }
        }
        let Some(best) = heap.pop() else { break };
        node = draft.push(best.parent, best.token, best.survival)?;
    }
    Ok(())
}

/// Fills a given shape: the children of a node take its best continuations in turn.
fn fill(
    draft: &mut Draft,
    shape: &TreeShape,
    plan: &Plan,
    continuations: &mut impl FnMut(&Draft, usize) -> Vec<Continuation>,
) -> Result<()> {
    // Of each node of the shape, the draft's, and what may still follow it.
    let mut placed: Vec<Option<(usize, std::vec::IntoIter<Continuation>)>> = Vec::new();
    for node in 0..shape.len() {
        let drafted = match node {
            0 => Some(0),
            _ => {
                let parent = placed[shape.parent(node)].as_mut();
                let next = parent.and_then(|(at, rest)| rest.next().map(|next| (*at, next)));
                next.map(|(at, next)| draft.push(at, next.token, draft.survival[at] * next.probability)).transpose()?
            }
        };
        let deepest = shape.depth(node) >= plan.max_depth || shape.children(node).next().is_none();
        placed.push(drafted.map(|at| (at, if deepest { Vec::new() } else { continuations(draft, at) }.into_iter())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two continuations of every node: the likely one holds its parent's token + 1, the other + 2.
    fn two(draft: &Draft, node: usize) -> Vec<Continuation> {
        let token = draft.tree.token(node);
        vec![Continuation { token: token + 1, probability: 0.6 }, Continuation { token: token + 2, probability: 0.3 }]
    }

    fn plan(shape: Option<&str>, max_nodes: usize, max_depth: usize) -> Plan {
        Plan { shape: shape.map(|text| text.parse().unwrap()), max_nodes, max_depth, reach: max_depth }
    }

    #[test]
    fn nodes_come_by_falling_survival_and_parents_first() {
        let draft = grow(10, &plan(None, 6, 8), two).unwrap();
        assert!(draft.survival.is_sorted_by(|a, b| a >= b), "{:?}", draft.survival);
        // 0.6, 0.36, 0.3, 0.216, then 0.18 twice: the one that was found first.
        assert_eq!((0..6).map(|n| draft.tree.token(n)).collect::<Vec<_>>(), [10, 11, 12, 12, 13, 13]);
        assert_eq!((1..6).map(|n| draft.tree.shape().parent(n)).collect::<Vec<_>>(), [0, 1, 0, 2, 1]);
    }

    #[test]
    fn depth_and_nodes_are_limits() {
        let draft = grow(0, &plan(None, 64, 2), two).unwrap();
        assert_eq!(draft.tree.len(), 7);
        assert_eq!(grow(0, &plan(None, 64, 0), two).unwrap().tree.len(), 1);
    }

    #[test]
    fn a_shape_is_filled_as_far_as_there_are_continuations() {
        let draft = grow(0, &plan(Some("3x1"), 7, 8), two).unwrap();
        assert_eq!(draft.tree.shape().to_string(), "2x1".parse::<TreeShape>().unwrap().to_string());
        assert_eq!(draft.survival, [1.0, 0.6, 0.3, 0.6 * 0.6, 0.3 * 0.6]);
        assert_eq!(grow(0, &plan(Some("2x1"), 7, 1), two).unwrap().tree.len(), 3);
    }
}

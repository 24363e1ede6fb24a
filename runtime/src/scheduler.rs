//! How many nodes a round verifies: as many as pay.
//!
//! With survival s of a node (the probability that it is accepted), cost C(n) of a pass of n rows, relative to one row, and
//! D of the draft, a tree of n nodes is worth E(n) / (C(n) + D) plain steps, E(n) = sum of the first n survivals (the root's is 1: its
//! draw is the bonus token). The best prefix of the draft is verified; it may be the root alone. The choice changes
//! the speed, never the tokens (they are the target's own draws), so it may look at everything.

use crate::backend::PassCost;
use crate::draft::{Draft, Plan};
use treespark_kernel_gen::TreeShape;

/// How much of a draft is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    pub nodes: Nodes,
    /// Only the likeliest path of a tree.
    pub chain: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nodes {
    /// As many as pay, by what the drafter expects of them.
    Confidence,
    /// So many in every round, where there are as many.
    Fixed(usize),
    /// None: plain decoding.
    Off,
}

impl Policy {
    pub const CONFIDENCE: Policy = Policy { nodes: Nodes::Confidence, chain: false };
    pub const OFF: Policy = Policy { nodes: Nodes::Off, chain: false };
}

impl std::str::FromStr for Policy {
    type Err = String;

    /// `confidence`, `fixed:N` (N draft tokens a round), `off`; `chain` and `chain:N` are the first two over chains.
    fn from_str(text: &str) -> Result<Policy, String> {
        let number = |n: &str| n.parse().map_err(|_| format!("'{n}' is no number of draft tokens"));
        Ok(match text.split_once(':') {
            None if text == "confidence" => Policy::CONFIDENCE,
            None if text == "off" => Policy::OFF,
            None if text == "chain" => Policy { chain: true, ..Policy::CONFIDENCE },
            Some(("fixed", n)) => Policy { nodes: Nodes::Fixed(number(n)?), chain: false },
            Some(("chain", n)) => Policy { nodes: Nodes::Fixed(number(n)?), chain: true },
            _ => return Err(format!("'{text}' is no policy; there are: confidence, fixed:N, chain, chain:N, off")),
        })
    }
}

#[derive(Debug)]
pub struct Scheduler {
    shape: Option<TreeShape>,
    max_nodes: usize,
    cost: PassCost,
}

impl Scheduler {
    /// With a shape every round verifies all of it that the drafter can fill.
    pub fn new(shape: Option<TreeShape>, max_nodes: usize, cost: PassCost) -> Scheduler {
        Scheduler { max_nodes: shape.as_ref().map_or(max_nodes, TreeShape::len), shape, cost }
    }

    /// What the next round may draft, with room for so many more tokens.
    pub fn plan(&self, room: usize) -> Plan {
        // The bonus token takes one place; a node deeper than the rest could never be emitted.
        Plan { shape: self.shape.clone(), max_nodes: self.max_nodes, max_depth: room.saturating_sub(1) }
    }

    /// How many nodes of the draft to verify.
    pub fn nodes(&self, draft: &Draft) -> usize {
        if self.shape.is_some() {
            return draft.tree.len();
        }
        let (mut best, mut expected) = ((1, 0.0), 0.0);
        for (i, survival) in draft.survival.iter().enumerate() {
            expected += survival;
            let worth = expected / (self.cost.of(i + 1) + draft.cost);
            if worth > best.1 {
                best = (i + 1, worth);
            }
        }
        best.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::TokenTree;

    fn chain(survival: &[f32]) -> Draft {
        Draft { tree: TokenTree::chain(&vec![0; survival.len()]).unwrap(), survival: survival.to_vec(), cost: 0.0 }
    }

    #[test]
    fn nodes_are_verified_while_they_pay() {
        let scheduler = Scheduler::new(None, 64, PassCost(&[(1, 1.0), (2, 1.25)]));
        assert_eq!(scheduler.nodes(&chain(&[1.0])), 1);
        assert_eq!(scheduler.nodes(&chain(&[1.0, 0.2, 0.1])), 1, "0.2 of a token for a quarter of a pass");
        assert_eq!(scheduler.nodes(&chain(&[1.0, 0.9, 0.8, 0.1])), 3);
        let cheap = Scheduler::new(None, 64, PassCost(&[(1, 1.0), (2, 1.01)]));
        assert_eq!(cheap.nodes(&chain(&[1.0, 0.2, 0.1])), 3);
    }

    #[test]
    fn a_given_shape_is_verified_whole() {
        let scheduler = Scheduler::new(Some(TreeShape::chain(2).unwrap()), 64, PassCost(&[(1, 1.0), (2, 1.25)]));
        assert_eq!(scheduler.nodes(&chain(&[1.0, 0.0, 0.0])), 3);
        assert_eq!(scheduler.plan(10).max_nodes, 3);
    }
}

//! How well a drafter knows what it knows: what it expected of the nodes of its trees, against what became of them.
//!
//! The error is the expected calibration error (Naeini et al., 2015): nodes are put into twenty bins by their expected
//! survival, and each bin's mean is compared with the share that was accepted.

use crate::engine::Round;

const BINS: usize = 20;

/// Expected and met, by bin.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Bin {
    nodes: f64,
    expected: f64,
    accepted: f64,
}

/// What was seen of the nodes of one depth that are no first choice, where their parent was accepted.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Siblings {
    expected: f64,
    accepted: f64,
}

#[derive(Debug, Clone, Default)]
pub struct Reliability {
    /// By depth - 1: first choices, then the others.
    bins: Vec<[[Bin; BINS]; 2]>,
    siblings: Vec<Siblings>,
}

impl Reliability {
    /// Notes a round of which all drafted nodes were verified.
    pub fn note(&mut self, round: &Round) {
        let shape = round.tree.shape();
        self.bins.resize(self.bins.len().max(shape.max_depth()), Default::default());
        self.siblings.resize(self.bins.len(), Siblings::default());
        for node in 1..round.tree.len().min(round.survival.len()) {
            let (depth, parent) = (shape.depth(node), shape.parent(node));
            let expected = f64::from(round.survival[node]);
            let accepted = round.accepted.path.contains(&node);
            // Of siblings the first choice comes first.
            let is_first = shape.children(parent).next() == Some(node);
            let at = ((expected * BINS as f64) as usize).min(BINS - 1);
            let bin = &mut self.bins[depth - 1][usize::from(!is_first)][at];
            bin.nodes += 1.0;
            bin.expected += expected;
            bin.accepted += f64::from(u8::from(accepted));
            if !is_first && round.accepted.path.contains(&parent) {
                let siblings = &mut self.siblings[depth - 1];
                siblings.expected += expected / f64::from(round.survival[parent]);
                siblings.accepted += f64::from(u8::from(accepted));
            }
        }
    }

    /// Nodes that were noted.
    pub fn nodes(&self) -> usize {
        self.all().map(|bin| bin.nodes).sum::<f64>() as usize
    }

    /// By depth: what the probability of a node that is no first choice is to be multiplied by.
    pub fn factors(&self) -> Vec<f64> {
        let factor = |s: &Siblings| if s.expected > 0.0 { (s.accepted / s.expected).clamp(0.05, 20.0) } else { 1.0 };
        self.siblings.iter().map(factor).collect()
    }

    /// The expected calibration error of all nodes.
    pub fn error(&self) -> f64 {
        // Bins of the same expectation are one, whatever the depth.
        let merged = (0..BINS).map(|at| merge(self.bins.iter().flatten().map(|bins| &bins[at])));
        error(merged)
    }

    /// The same of each depth: first choices, and the others.
    pub fn error_by_depth(&self) -> Vec<[f64; 2]> {
        self.bins.iter().map(|kinds| kinds.map(|bins| error(bins.into_iter()))).collect()
    }

    fn all(&self) -> impl Iterator<Item = &Bin> {
        self.bins.iter().flatten().flatten()
    }
}

fn merge<'a>(bins: impl Iterator<Item = &'a Bin>) -> Bin {
    bins.fold(Bin::default(), |sum, bin| Bin {
        nodes: sum.nodes + bin.nodes,
        expected: sum.expected + bin.expected,
        accepted: sum.accepted + bin.accepted,
    })
}

fn error(bins: impl Iterator<Item = Bin>) -> f64 {
    let (mut apart, mut nodes) = (0.0, 0.0);
    for bin in bins {
        apart += (bin.expected - bin.accepted).abs();
        nodes += bin.nodes;
    }
    if nodes > 0.0 { apart / nodes } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Accepted, TokenTree};

    /// A root with two children, expected at 0.5 and 0.1; the given one is accepted.
    fn round(path: &[usize]) -> Round {
        let mut tree = TokenTree::root(1);
        tree.push(0, 2).unwrap();
        tree.push(0, 3).unwrap();
        let accepted = Accepted { path: path.to_vec(), tokens: vec![9; path.len()] };
        Round { tree, survival: vec![1.0, 0.5, 0.1], accepted, tokens: vec![], logits: vec![] }
    }

    #[test]
    fn what_is_as_expected_has_no_error() {
        let mut reliability = Reliability::default();
        (0..10).for_each(|i| reliability.note(&round(if i < 5 { &[0, 1] } else { &[0] })));
        assert!(reliability.error_by_depth()[0][0] < 1e-6, "half of the first choices, expected at 0.5");
        assert!((reliability.error_by_depth()[0][1] - 0.1).abs() < 1e-6, "none of the others, expected at 0.1");
        assert!((reliability.error() - 0.05).abs() < 1e-6);
        assert_eq!(reliability.nodes(), 20);
    }

    #[test]
    fn factors_make_siblings_as_likely_as_they_are() {
        let mut reliability = Reliability::default();
        (0..10).for_each(|i| reliability.note(&round(if i < 2 { &[0, 2] } else { &[0] })));
        assert!((reliability.factors()[0] - 2.0).abs() < 1e-5, "{:?}", reliability.factors());
    }
}

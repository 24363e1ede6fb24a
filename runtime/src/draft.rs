//! Drafters: who proposes the trees.
//!
//! A drafter's proposals change only the speed, never the tokens: the target draws its own token at every node, and
//! only the path that equals those draws is kept.

pub mod best_first;
pub mod block;
pub mod model;
pub mod mtp;
pub mod ngram;

use treespark_kernel_gen::TreeShape;

use crate::backend::Backend;
use crate::error::Result;
use crate::grammar::Grammar;
use crate::memory::MemoryUse;
use crate::network::Network;
use crate::sequence::Sequence;
use crate::tree::{Accepted, TokenTree};

/// A proposed tree. Nodes are listed best first where the drafter can choose, so that every prefix of them is the
/// best tree of its size.
#[derive(Debug, Clone)]
pub struct Draft {
    pub tree: TokenTree,
    /// Estimated probability that a node is accepted, given everything before this round; 1 for the root.
    pub survival: Vec<f32>,
    /// What drafting cost, relative to a pass of one row.
    pub cost: f32,
    /// How deep its drafter looked, at that cost: the tree may end before.
    pub reach: usize,
}

impl Draft {
    pub fn root(token: u32) -> Draft {
        Draft { tree: TokenTree::root(token), survival: vec![1.0], cost: 0.0, reach: 0 }
    }

    /// Adds a child and returns its node.
    pub fn push(&mut self, parent: usize, token: u32, survival: f32) -> Result<usize> {
        self.survival.push(survival);
        self.tree.push(parent, token)
    }

    /// Some of its nodes, ascending, each with its parent.
    pub fn only(&self, nodes: &[usize]) -> Draft {
        let mut some = Draft { cost: self.cost, reach: self.reach, ..Draft::root(self.tree.token(0)) };
        let place = |node: usize| nodes.binary_search(&node).expect("a node comes with its parent");
        for &node in &nodes[1..] {
            let parent = place(self.tree.shape().parent(node));
            some.push(parent, self.tree.token(node), self.survival[node]).expect("no more nodes than before");
        }
        some
    }
}

/// What a drafter proposed, and what of it may be verified: a grammar forbids the rest.
#[derive(Debug, Clone)]
pub struct Proposal {
    pub draft: Draft,
    /// All of it, and which of its nodes each of the draft's is; `None` where nothing is forbidden.
    whole: Option<(Draft, Vec<usize>)>,
}

impl Proposal {
    /// With `chain`, only the likeliest path of what is allowed.
    pub fn new(draft: Draft, grammar: Option<&Grammar>, chain: bool) -> Proposal {
        let mut nodes = grammar.map_or_else(|| (0..draft.tree.len()).collect(), |grammar| grammar.allowed(&draft.tree));
        if chain {
            // Nodes ascend, and of siblings the likeliest comes first.
            let mut end = 0;
            nodes.retain(|&node| {
                let is_next = node == 0 || draft.tree.shape().parent(node) == end;
                end = if is_next { node } else { end };
                is_next
            });
        }
        match nodes.len() < draft.tree.len() {
            true => Proposal { draft: draft.only(&nodes), whole: Some((draft, nodes)) },
            false => Proposal { draft, whole: None },
        }
    }

    /// Tells the drafter what became of it, by the numbers that it gave the nodes.
    pub fn observe(&self, drafter: &mut dyn Drafter, seq: &Sequence, accepted: &Accepted) {
        match &self.whole {
            Some((whole, nodes)) => {
                let path = accepted.path.iter().map(|&node| nodes[node]).collect();
                drafter.observe(seq, whole, &Accepted { path, tokens: accepted.tokens.clone() });
            }
            None => drafter.observe(seq, &self.draft, accepted),
        }
    }
}

/// What a round may draft.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The tree to fill; a drafter leaves out what it cannot fill. `None`: the drafter's own choice.
    pub shape: Option<TreeShape>,
    /// Most nodes, root included.
    pub max_nodes: usize,
    /// Deepest useful node: tokens that may still be generated.
    pub max_depth: usize,
    /// How deep it pays to look. A drafter of blocks looks as deep as the deepest of many needs.
    pub reach: usize,
}

pub trait Drafter {
    fn name(&self) -> &'static str;

    /// Proposes continuations of a sequence; the root is its last token.
    fn propose(
        &mut self,
        backend: &mut dyn Backend,
        target: &mut Network,
        seq: &mut Sequence,
        plan: &Plan,
    ) -> Result<Draft>;

    /// The same for many sequences, each with a plan of its own.
    fn propose_all(
        &mut self,
        backend: &mut dyn Backend,
        target: &mut Network,
        seqs: &mut [(&mut Sequence, Plan)],
    ) -> Result<Vec<Draft>> {
        seqs.iter_mut().map(|(seq, plan)| self.propose(backend, target, seq, plan)).collect()
    }

    /// Learns what became of a sequence's last proposal, of which a prefix was verified.
    fn observe(&mut self, _: &Sequence, _: &Draft, _: &Accepted) {}

    /// A sequence's prompt is run.
    fn start(&mut self, _: &mut dyn Backend, _: &Sequence) -> Result<()> {
        Ok(())
    }

    /// A sequence has ended, or waits and may come back.
    fn forget(&mut self, _: &Sequence) {}

    /// Compiles what prompts and drafts by this plan will need, where that takes time.
    fn prepare(&mut self, _: &mut dyn Backend, _target: &mut Network, _: &Plan) -> Result<()> {
        Ok(())
    }

    /// Nodes of the largest tree, root included, where the device drafts in its place. `None`: it cannot.
    fn nodes_on_device(&self) -> Option<usize> {
        None
    }

    /// Device memory of its own.
    fn memory_use(&self) -> MemoryUse {
        MemoryUse::default()
    }
}

/// Proposes nothing: plain decoding.
#[derive(Debug, Default)]
pub struct NoDrafter;

impl Drafter for NoDrafter {
    fn name(&self) -> &'static str {
        "none"
    }

    fn propose(&mut self, _: &mut dyn Backend, _: &mut Network, seq: &mut Sequence, _: &Plan) -> Result<Draft> {
        Ok(Draft::root(seq.last()))
    }

    fn nodes_on_device(&self) -> Option<usize> {
        Some(1)
    }
}

/// Measured acceptance of classes of nodes, given that their parent was accepted.
#[derive(Debug, Clone)]
pub struct HitRates {
    classes: Vec<(f32, f32)>,
}

/// Trials that a prior counts for, and after how many the past begins to fade.
const PRIOR_TRIALS: f32 = 4.0;
const MEMORY_TRIALS: f32 = 64.0;

impl HitRates {
    /// One class for every prior rate.
    pub fn new(priors: &[f32]) -> HitRates {
        HitRates { classes: priors.iter().map(|rate| (rate * PRIOR_TRIALS, PRIOR_TRIALS)).collect() }
    }

    pub fn rate(&self, class: usize) -> f32 {
        let (hits, trials) = self.classes[class];
        hits / trials
    }

    pub fn record(&mut self, class: usize, hit: bool) {
        let (hits, trials) = &mut self.classes[class];
        if *trials >= MEMORY_TRIALS {
            *hits *= 0.5;
            *trials *= 0.5;
        }
        *hits += f32::from(u8::from(hit));
        *trials += 1.0;
    }

    /// Records every child of every node on the path that the target took, whether it was verified or not: the
    /// target's draws say what each would have met. `class[node]` for every node of the tree.
    pub fn learn(&mut self, tree: &TokenTree, class: &[usize], drawn: &[u32]) {
        let mut node = Some(0);
        for &token in drawn {
            let Some(parent) = node else { return };
            for child in tree.shape().children(parent) {
                self.record(class[child], tree.token(child) == token);
            }
            node = tree.child_with(parent, token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_the_likeliest_path_and_is_told_by_the_drafters_numbers() {
        let mut draft = Draft::root(1);
        for (parent, token, survival) in [(0, 2, 0.6), (0, 3, 0.3), (2, 4, 0.2), (1, 5, 0.1), (1, 6, 0.05)] {
            draft.push(parent, token, survival).unwrap();
        }
        let Proposal { draft: chain, whole } = Proposal::new(draft.clone(), None, true);
        assert_eq!((0..chain.tree.len()).map(|node| chain.tree.token(node)).collect::<Vec<_>>(), [1, 2, 5]);
        assert_eq!((chain.survival, whole.map(|(_, nodes)| nodes)), (vec![1.0, 0.6, 0.1], Some(vec![0, 1, 4])));
        assert!(Proposal::new(draft, None, false).whole.is_none());
    }
}

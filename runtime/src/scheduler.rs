//! How many nodes a round verifies: as many as pay.
//!
//! With survival s of a node (the probability that it is accepted), cost C(n) of a pass of n rows, relative to one row, and D of
//! drafting, R requests whose drafts have n nodes together are worth E(n) / (C(n) + D) plain steps of one request, E(n) = sum of
//! the survivals (a root's is 1: its draw is the bonus token). The nodes of all requests stand in one queue, the likeliest
//! first, and of its beginnings the best is verified; it may be the roots alone. (DSpark's hardware-aware prefix scheduler,
//! extended to trees.) The choice changes the speed, never the tokens, which are the target's own draws at positions that know
//! nothing of each other: so it may look at everything, and where the cost has steps it need not stop at the first.

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

/// Rounds of not drafting, at most, before a drafter is tried again.
const LONGEST_REST: usize = 64;

#[derive(Debug)]
pub struct Scheduler {
    shape: Option<TreeShape>,
    max_nodes: usize,
    cost: PassCost,
    /// Whether drafters rest while they do not pay.
    rests: bool,
    rest: Rest,
}

/// Whether drafting has paid of late: a drafter costs its time also where none of its nodes is worth a row.
#[derive(Debug, Default)]
struct Rest {
    /// Rounds that are left.
    left: usize,
    /// Of the last time.
    last: usize,
    /// Speed against plain decoding, as expected, less 1; averaged over the last rounds.
    gain: f32,
}

impl Scheduler {
    /// With a shape every round verifies all of it that the drafter can fill.
    pub fn new(shape: Option<TreeShape>, max_nodes: usize, cost: PassCost) -> Scheduler {
        let max_nodes = shape.as_ref().map_or(max_nodes, TreeShape::len);
        Scheduler { max_nodes, shape, cost, rests: false, rest: Rest::default() }
    }

    /// From now on nodes are weighed by what was measured, and drafters rest while they do not pay.
    pub fn serve_many(&mut self, cost: PassCost) {
        self.cost = cost;
        self.rests = true;
    }

    /// Nodes of the largest tree.
    pub fn max_nodes(&self) -> usize {
        self.max_nodes
    }

    /// What the next round may draft, with room for so many more tokens.
    pub fn plan(&self, policy: Policy, room: usize) -> Plan {
        let max_nodes = match policy.nodes {
            Nodes::Confidence if self.rest.left > 0 => 1,
            Nodes::Confidence => self.max_nodes,
            Nodes::Fixed(drafts) => self.max_nodes.min(drafts + 1),
            Nodes::Off => 1,
        };
        // A chain is the likeliest path of a tree.
        let max_nodes = if policy.chain && max_nodes > 1 { self.max_nodes } else { max_nodes };
        // The bonus token takes one place; a node deeper than the rest could never be emitted.
        Plan { shape: self.shape.clone().filter(|_| max_nodes > 1), max_nodes, max_depth: room.saturating_sub(1) }
    }

    /// How many nodes of each draft to verify in one pass, beside so many rows of prompts and with no more than `room` rows
    /// in all.
    pub fn nodes(&mut self, drafts: &[(&Draft, Policy)], prompt_rows: usize, room: usize) -> Vec<usize> {
        let mut nodes = vec![1; drafts.len()];
        let mut room = room.saturating_sub(prompt_rows + drafts.len());
        let mut rows = prompt_rows + drafts.len();
        // One queue over all requests.
        let mut queue = Vec::new();
        for (i, (draft, policy)) in drafts.iter().enumerate() {
            let fixed = match policy.nodes {
                _ if self.shape.is_some() && policy.nodes != Nodes::Off => Some(draft.tree.len()),
                Nodes::Fixed(drafts) => Some(draft.tree.len().min(drafts + 1)),
                Nodes::Off => Some(1),
                Nodes::Confidence => None,
            };
            match fixed {
                Some(fixed) => {
                    nodes[i] = fixed.min(1 + room);
                    room -= nodes[i] - 1;
                    rows += nodes[i] - 1;
                }
                // No node is likelier than the one before it, so that what is taken of a draft is a prefix.
                None => queue.extend(falling(&draft.survival).skip(1).map(|survival| (survival, i))),
            }
        }
        queue.sort_by(|a, b| b.0.total_cmp(&a.0));
        queue.truncate(room);
        let drafting: f32 = drafts.iter().map(|(draft, _)| draft.cost).sum();
        let (taken, gain) = self.worth(&queue, drafts.len(), rows, drafting);
        queue[..taken].iter().for_each(|&(_, i)| nodes[i] += 1);
        if self.rests && drafts.iter().any(|(_, policy)| policy.nodes == Nodes::Confidence) {
            self.rest.note(gain, drafting > 0.0);
        }
        nodes
    }

    /// How many nodes of the queue pay beside so many rows, and the speed with them against that of plain decoding.
    fn worth(&self, queue: &[(f32, usize)], requests: usize, rows: usize, drafting: f32) -> (usize, f32) {
        let plain = requests as f32 / self.cost.of(rows.max(1));
        let mut expected = requests as f32;
        let mut best = (0, expected / (self.cost.of(rows.max(1)) + drafting));
        for (i, (survival, _)) in queue.iter().enumerate() {
            expected += survival;
            let worth = expected / (self.cost.of(rows + i + 1) + drafting);
            if worth > best.1 {
                best = (i + 1, worth);
            }
        }
        (best.0, best.1 / plain)
    }
}

impl Rest {
    fn note(&mut self, gain: f32, has_drafted: bool) {
        if !has_drafted {
            self.left = self.left.saturating_sub(1);
            return;
        }
        self.gain += 0.25 * (gain - 1.0 - self.gain);
        if self.gain < 0.0 {
            self.last = (2 * self.last).clamp(4, LONGEST_REST);
            (self.left, self.gain) = (self.last, 0.0);
        } else if self.gain > 0.02 {
            self.last = 0;
        }
    }
}

/// Each value, or the least before it.
fn falling(values: &[f32]) -> impl Iterator<Item = f32> {
    values.iter().scan(f32::INFINITY, |least, &value| {
        *least = least.min(value);
        Some(*least)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::TokenTree;

    fn chain(survival: &[f32]) -> Draft {
        Draft { tree: TokenTree::chain(&vec![0; survival.len()]).unwrap(), survival: survival.to_vec(), cost: 0.0 }
    }

    fn scheduler(points: &'static [(usize, f32)]) -> Scheduler {
        Scheduler::new(None, 64, PassCost::new(points))
    }

    fn nodes(scheduler: &mut Scheduler, drafts: &[Draft], policy: Policy) -> Vec<usize> {
        let drafts: Vec<_> = drafts.iter().map(|draft| (draft, policy)).collect();
        scheduler.nodes(&drafts, 0, 256)
    }

    #[test]
    fn nodes_are_verified_while_they_pay() {
        let mut dear = scheduler(&[(1, 1.0), (2, 1.25)]);
        let mut one = |survival: &[f32]| nodes(&mut dear, &[chain(survival)], Policy::CONFIDENCE)[0];
        assert_eq!(one(&[1.0]), 1);
        assert_eq!(one(&[1.0, 0.2, 0.1]), 1, "0.2 of a token for a quarter of a pass");
        assert_eq!(one(&[1.0, 0.9, 0.8, 0.1]), 3);
        let mut cheap = scheduler(&[(1, 1.0), (2, 1.01)]);
        assert_eq!(nodes(&mut cheap, &[chain(&[1.0, 0.2, 0.1])], Policy::CONFIDENCE), [3]);
    }

    #[test]
    fn a_given_shape_is_verified_whole() {
        let shape = Some(TreeShape::chain(2).unwrap());
        let mut scheduler = Scheduler::new(shape, 64, PassCost::new(&[(1, 1.0), (2, 1.25)]));
        assert_eq!(nodes(&mut scheduler, &[chain(&[1.0, 0.0, 0.0])], Policy::CONFIDENCE), [3]);
        assert_eq!(scheduler.plan(Policy::CONFIDENCE, 10).max_nodes, 3);
    }

    #[test]
    fn requests_compete_in_one_queue() {
        // A row costs nothing up to six, and then a whole pass.
        let mut scheduler = scheduler(&[(1, 1.0), (6, 1.0), (7, 2.0)]);
        let drafts = [chain(&[1.0, 0.9, 0.8, 0.7, 0.6]), chain(&[1.0, 0.3, 0.2]), chain(&[1.0, 0.65])];
        assert_eq!(nodes(&mut scheduler, &drafts, Policy::CONFIDENCE), [4, 1, 1]);
        let crowded: Vec<_> = drafts.iter().map(|draft| (draft, Policy::CONFIDENCE)).collect();
        assert_eq!(scheduler.nodes(&crowded, 0, 4), [2, 1, 1], "rows are limited");
        assert_eq!(scheduler.nodes(&crowded, 8, 100), [1, 1, 1], "prompts have made rows dear");
    }

    #[test]
    fn policies_are_obeyed() {
        let mut scheduler = scheduler(&[(1, 1.0), (2, 1.01)]);
        let drafts = [chain(&[1.0, 0.9, 0.8]), chain(&[1.0, 0.9, 0.8])];
        let of = |text: &str| text.parse::<Policy>().unwrap();
        assert_eq!(nodes(&mut scheduler, &drafts, Policy::OFF), [1, 1]);
        assert_eq!(nodes(&mut scheduler, &drafts, of("fixed:1")), [2, 2]);
        let mixed = [(&drafts[0], Policy::OFF), (&drafts[1], of("confidence"))];
        assert_eq!(scheduler.nodes(&mixed, 0, 64), [1, 3]);
        assert_eq!(scheduler.plan(Policy::OFF, 10).max_nodes, 1);
        assert_eq!(scheduler.plan(of("fixed:5"), 10).max_nodes, 6);
        for wrong in ["", "fixed", "fixed:x", "of"] {
            assert!(wrong.parse::<Policy>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn drafters_rest_while_they_do_not_pay() {
        let mut scheduler = Scheduler { rests: true, ..scheduler(&[(1, 1.0), (2, 2.0)]) };
        let drafts = [Draft { cost: 0.5, ..chain(&[1.0, 0.5]) }];
        let plain = [Draft::root(0)];
        let rests: Vec<usize> = (0..6)
            .map(|_| {
                nodes(&mut scheduler, &drafts, Policy::CONFIDENCE);
                let mut rest = 0;
                while scheduler.plan(Policy::CONFIDENCE, 10).max_nodes == 1 {
                    nodes(&mut scheduler, &plain, Policy::CONFIDENCE);
                    rest += 1;
                }
                rest
            })
            .collect();
        assert_eq!(rests, [4, 8, 16, 32, 64, 64]);
        let good = [Draft { cost: 0.1, ..chain(&[1.0, 1.0]) }];
        let mut free = Scheduler { rests: true, ..Scheduler::new(None, 64, PassCost::FREE_ROWS) };
        (0..10).for_each(|_| drop(nodes(&mut free, &good, Policy::CONFIDENCE)));
        assert_eq!(free.plan(Policy::CONFIDENCE, 10).max_nodes, 64);
    }
}

//! How many nodes a round verifies: as many as pay.
//!
//! With survival s of a node (the probability that it is accepted), cost C(R, n) of a pass of n rows of R requests, relative to
//! one row, and D of drafting, R requests whose drafts have n nodes together are worth E(n) / (C(R, n) + D) plain steps of one
//! request, E(n) = sum of the survivals (a root's is 1: its draw is the bonus token). The nodes of all requests stand in one
//! queue, the likeliest first, and of its beginnings the best is verified; it may be the roots alone. (DSpark's hardware-aware
//! prefix scheduler, extended to trees.) The choice changes the speed, never the tokens, which are the target's own draws at
//! positions that know nothing of each other: so it may look at everything, and where the cost has steps it need not stop at
//! the first.

mod outlook;

use outlook::Outlook;

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
    costs: Costs,
    /// Whether drafters rest while they do not pay.
    rests: bool,
    /// How deep the next draft should look; 0: none is expected to pay.
    depth: usize,
    outlook: Outlook,
    /// What the host does between passes, in the mean: of all rounds' time, whatever is verified.
    beside: f32,
}

/// What passes cost, relative to a pass of one row: by their rows, and by their requests, for every one has a cache that is
/// read.
#[derive(Debug, Clone)]
pub struct Costs {
    /// Of passes of so many requests, ascending; what is between is between them.
    by_requests: Vec<(usize, PassCost)>,
    /// Of a pass of one row.
    seconds: f64,
}

impl Costs {
    /// With the seconds that a pass of one row takes.
    pub fn new(by_requests: Vec<(usize, PassCost)>, seconds: f64) -> Costs {
        Costs { by_requests, seconds }
    }

    /// Of passes of so many requests, by their rows, not fewer.
    fn of(&self, requests: usize) -> impl Fn(usize) -> f32 + '_ {
        let at = |i: usize| &self.by_requests[i];
        let next = self.by_requests.iter().position(|(n, _)| *n >= requests).unwrap_or(self.by_requests.len() - 1);
        let before = if next > 0 && at(next).0 > requests { next - 1 } else { next };
        let ((fewer, below), (more, above)) = (at(before), at(next));
        let share = (requests.saturating_sub(*fewer)) as f32 / (more - fewer).max(1) as f32;
        move |rows| {
            let [low, high] = [below.of(rows.max(*fewer)), above.of(rows.max(*more))];
            if fewer == more { low } else { low + share * (high - low) }
        }
    }
}

impl Scheduler {
    /// With a shape every round verifies all of it that the drafter can fill.
    pub fn new(shape: Option<TreeShape>, max_nodes: usize, cost: PassCost) -> Scheduler {
        let max_nodes = shape.as_ref().map_or(max_nodes, TreeShape::len);
        let costs = Costs::new(vec![(1, cost)], 0.0);
        Scheduler { max_nodes, shape, costs, rests: false, depth: usize::MAX, outlook: Outlook::default(), beside: 0.0 }
    }

    /// From now on nodes are weighed by what was measured, and drafters rest while they do not pay.
    pub fn serve_many(&mut self, costs: Costs) {
        self.costs = costs;
        self.rests = true;
    }

    /// Nodes of the largest tree.
    pub fn max_nodes(&self) -> usize {
        self.max_nodes
    }

    /// What the next round may draft, with room for so many more tokens.
    pub fn plan(&self, policy: Policy, room: usize) -> Plan {
        let max_nodes = match policy.nodes {
            Nodes::Confidence if self.depth == 0 => 1,
            Nodes::Confidence => self.max_nodes,
            Nodes::Fixed(drafts) => self.max_nodes.min(drafts + 1),
            Nodes::Off => 1,
        };
        // A chain is the likeliest path of a tree.
        let max_nodes = if policy.chain && max_nodes > 1 { self.max_nodes } else { max_nodes };
        let reach = match policy.nodes {
            Nodes::Confidence => self.depth,
            Nodes::Fixed(drafts) if self.shape.is_none() => drafts,
            Nodes::Fixed(_) | Nodes::Off => usize::MAX,
        };
        // The bonus token takes one place; a node deeper than the rest could never be emitted.
        let max_depth = room.saturating_sub(1).min(reach);
        Plan { shape: self.shape.clone().filter(|_| max_nodes > 1), max_nodes, max_depth, reach }
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
                None => queue.extend(falling(draft.survival.iter().copied()).skip(1).map(|survival| (survival, i))),
            }
        }
        queue.sort_by(|a, b| b.0.total_cmp(&a.0));
        queue.truncate(room);
        let drafting: f32 = drafts.iter().map(|(draft, _)| draft.cost).sum();
        let (taken, ..) = self.best(queue.iter().map(|&(survival, _)| survival), drafts.len(), rows, drafting);
        queue[..taken].iter().for_each(|&(_, i)| nodes[i] += 1);
        let foretell = |(draft, policy): &&(&Draft, Policy)| draft.cost > 0.0 && policy.nodes == Nodes::Confidence;
        self.learn(drafts.iter().filter(foretell).map(|(draft, _)| *draft));
        nodes
    }

    /// Foretells how deep drafts for so many requests should look, if a draft will pay at all. `drafting` tells how deep they
    /// can, the deepest first, and what that costs.
    pub fn look_ahead(&mut self, requests: usize, drafting: &[(usize, f32)]) {
        if self.rests {
            self.depth = self.outlook.depth(requests, drafting);
        }
    }

    /// Tells of a round's seconds that were spent neither on drafting nor on its passes.
    pub fn took_beside(&mut self, seconds: f64) {
        if self.rests {
            self.beside += ((seconds / self.costs.seconds) as f32 - self.beside) / 16.0;
        }
    }

    /// What these drafts would have brought if they had looked less deep, too.
    fn learn<'a>(&mut self, drafts: impl Iterator<Item = &'a Draft> + Clone) {
        for (place, (depth, cost)) in self.outlook.drafting().to_vec().into_iter().enumerate() {
            let (mut queue, mut requests) = (Vec::new(), 0);
            for draft in drafts.clone().filter(|draft| draft.reach >= depth) {
                let nodes = draft.survival.iter().zip(draft.tree.shape().depths()).filter(|(_, at)| *at <= depth);
                queue.extend(falling(nodes.map(|(&survival, _)| survival)).skip(1));
                requests += 1;
            }
            if requests > 0 {
                queue.sort_unstable_by(|a, b| b.total_cmp(a));
                let (_, tokens, time) = self.best(queue.into_iter(), requests, requests, cost);
                self.outlook.learn(
                    place,
                    tokens / requests as f32,
                    time / (self.costs.of(requests)(requests) + self.beside),
                );
            }
        }
    }

    /// How many nodes of a queue pay beside so many rows: with their tokens, and the time that they take.
    fn best(
        &self,
        likely: impl Iterator<Item = f32>,
        requests: usize,
        rows: usize,
        drafting: f32,
    ) -> (usize, f32, f32) {
        let cost = self.costs.of(requests);
        let time = |nodes: usize| cost(rows + nodes) + drafting + self.beside;
        let mut expected = requests as f32;
        let mut best = (0, expected, time(0));
        for (i, survival) in likely.enumerate() {
            expected += survival;
            let time = time(i + 1);
            if expected * best.2 > best.1 * time {
                best = (i + 1, expected, time);
            }
        }
        best
    }
}

/// Each value, or the least before it.
fn falling(values: impl Iterator<Item = f32>) -> impl Iterator<Item = f32> {
    values.scan(f32::INFINITY, |least, value| {
        *least = least.min(value);
        Some(*least)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::TokenTree;

    fn chain(survival: &[f32]) -> Draft {
        Draft {
            tree: TokenTree::chain(&vec![0; survival.len()]).unwrap(),
            survival: survival.to_vec(),
            cost: 0.0,
            reach: 0,
        }
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

    /// DeepSeek-V2-Lite: 64 experts a layer, 6 of a row; of what a row reads, half are experts.
    #[test]
    fn trees_are_smaller_where_rows_bring_experts() {
        let device = PassCost::new(&[(1, 1.0), (16, 1.1), (64, 1.5)]);
        let mixture = device.with_experts(13, 128, [6, 64]);
        assert!((mixture.of(1) - 1.0).abs() < 1e-6 && mixture.of(2) > 1.4 && mixture.of(64) > 5.5, "{mixture:?}");
        assert!(mixture.of(256) < 1.2 * mixture.of(64), "each expert is read once");
        let survival: Vec<f32> = (0..16).map(|depth| 0.8f32.powi(depth)).collect();
        let taken = |cost: &PassCost| {
            nodes(&mut Scheduler::new(None, 64, cost.clone()), &[chain(&survival)], Policy::CONFIDENCE)[0]
        };
        let (of_mixture, of_dense) = (taken(&mixture), taken(&device));
        assert!(of_mixture < of_dense / 2, "{of_mixture} nodes beside {of_dense} of a dense model");
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
        assert_eq!(scheduler.nodes(&crowded, 8, 100), [4, 1, 2], "beside prompts a row more is little");
    }

    #[test]
    fn a_request_costs_more_than_a_row() {
        let curve = |points: &'static [(usize, f32)]| PassCost::new(points);
        let costs = Costs::new(vec![(1, curve(&[(1, 1.0), (11, 2.0)])), (11, curve(&[(11, 4.0), (21, 6.0)]))], 1.0);
        assert_eq!([costs.of(1)(1), costs.of(1)(11), costs.of(11)(11), costs.of(11)(16)], [1.0, 2.0, 4.0, 5.0]);
        assert_eq!([costs.of(6)(11), costs.of(6)(21)], [3.0, 4.5], "half as many requests");
        assert_eq!([costs.of(6)(8), costs.of(22)(22)], [(1.7 + 4.0) / 2.0, 6.2], "as near as it is known");
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
    fn drafts_look_as_deep_as_pays() {
        let mut scheduler = Scheduler { rests: true, ..scheduler(&[(1, 1.0), (64, 1.63)]) };
        // For each request looking four deep costs two fifths of a pass, one deep a twentieth.
        let depth_for = |scheduler: &mut Scheduler, requests: usize| {
            scheduler.look_ahead(requests, &[(4, 0.4 * requests as f32), (1, 0.05 * requests as f32)]);
            scheduler.plan(Policy::CONFIDENCE, 10).max_depth
        };
        let drafts_of = |requests: usize, reach: usize, survival: &[f32]| {
            vec![Draft { cost: 0.1, reach, ..chain(survival) }; requests]
        };
        for requests in [1, 8, 32] {
            for _ in 0..outlook::LOOK {
                assert_eq!(depth_for(&mut scheduler, requests), 4, "nothing is known yet");
                let drafts = drafts_of(requests, 4, &[1.0, 0.9, 0.8, 0.7, 0.6]);
                nodes(&mut scheduler, &drafts, Policy::CONFIDENCE);
            }
        }
        assert_eq!([1, 8, 32].map(|requests| depth_for(&mut scheduler, requests)), [4, 1, 0]);
        // What is less deep tells nothing of what is deeper.
        for _ in 0..100 {
            depth_for(&mut scheduler, 8);
            nodes(&mut scheduler, &drafts_of(8, 1, &[1.0, 0.1]), Policy::CONFIDENCE);
        }
        assert_eq!([1, 8].map(|requests| depth_for(&mut scheduler, requests)), [4, 0]);
        assert_eq!(scheduler.plan("fixed:2".parse().unwrap(), 10).max_depth, 2);
        assert_eq!(scheduler.plan("fixed:2".parse().unwrap(), 2).max_depth, 1, "the last token is no draft");
    }
}

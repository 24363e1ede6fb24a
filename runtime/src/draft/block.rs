//! Drafters that fill a block in one parallel pass ([`Network::draft_blocks`]), a row for each depth: DSpark, with sequential
//! heads that turn the independent rows into a tree, DFlash and Medusa, whose rows stand by themselves.
//!
//! With DSpark's vanilla and gated heads, what follows a node depends on its depth and its token alone: the tree is a
//! path through a trellis, and each place of the trellis is computed once. The rows rank only their best candidates, so
//! that the Markov head reads a few rows of its matrix and not the whole.
//!
//! At a temperature the candidates' scores have the very noise of the target's draws, so that the likeliest token is
//! the one that the target would draw if its logits were the drafter's.

use std::collections::HashMap;

use treespark_models::dspark::sigmoid;
use treespark_models::{MarkovState, SequentialHeads, Speculator};

use super::best_first::{Continuation, grow};
use super::{Draft, Drafter, Plan};
use crate::backend::Backend;
use crate::error::Result;
use crate::network::{Block, Network};
use crate::sequence::Sequence;

/// Nodes of a tree that the device drafts.
const NODES_ON_DEVICE: usize = 64;

pub struct BlockDrafter {
    name: &'static str,
    heads: SequentialHeads,
    /// Devices that draft can grow its trees by themselves.
    fits_devices: bool,
}

impl BlockDrafter {
    /// The same without what was measured of its confidence.
    pub fn without_calibration(mut self) -> BlockDrafter {
        self.heads.forget_calibration();
        self
    }

    /// The heads of a speculator whose other weights lie beside the target's.
    pub fn load(speculator: &Speculator) -> Result<BlockDrafter> {
        let (config, heads) = (speculator.config(), speculator.sequential_heads()?);
        Ok(BlockDrafter { name: config.name(), heads, fits_devices: config.fits_devices() })
    }

    /// The tree that a block says.
    fn grow(&self, block: &Block, seq: &Sequence, plan: &Plan) -> Result<Draft> {
        let inverse_temperature = if seq.sampling.temperature > 0.0 { 1.0 / seq.sampling.temperature } else { 1.0 };
        // Of each node that was asked for: what the heads carry on.
        let mut states: HashMap<usize, MarkovState> = HashMap::new();
        let mut known: HashMap<(usize, u32), Vec<Continuation>> = HashMap::new();
        grow(seq.last(), plan, |draft, node| {
            let (depth, token) = (draft.tree.shape().depth(node) + 1, draft.tree.token(node));
            if depth > block.candidates.len() {
                return Vec::new();
            }
            if let Some(continuations) = known.get(&(depth, token)) {
                return continuations.clone();
            }
            let before = states.get(&draft.tree.shape().parent(node)).cloned().unwrap_or_default();
            let (continuations, state) = self.continuations(block, depth, token, &before, inverse_temperature);
            if self.heads.has_memory() {
                states.insert(node, state);
            } else {
                known.insert((depth, token), continuations.clone());
            }
            continuations
        })
    }

    /// What may follow a token at a depth, the likeliest first, and the state behind it.
    fn continuations(
        &self,
        block: &Block,
        depth: usize,
        previous: u32,
        state: &MarkovState,
        inverse_temperature: f32,
    ) -> (Vec<Continuation>, MarkovState) {
        let hidden = block.hidden.get(depth - 1).map_or(&[][..], Vec::as_slice);
        let step = self.heads.step(depth, previous, hidden, state);
        let score = |&(token, score): &(u32, f32)| (token, score + self.heads.bias(&step, token) * inverse_temperature);
        let mut scored: Vec<(u32, f32)> = block.candidates[depth - 1].iter().map(score).collect();
        scored.sort_by(|a, b| b.1.total_cmp(&a.1));
        (probabilities(&scored, step.confidence, step.siblings), step.state)
    }
}

/// Softmax over the candidates. With a confidence the first has that, and the others share the rest as they would, times a
/// factor.
fn probabilities(scored: &[(u32, f32)], confidence: Option<f32>, factor: f32) -> Vec<Continuation> {
    let weights: Vec<f32> = scored.iter().map(|(_, score)| (score - scored[0].1).exp()).collect();
    let rest = weights[1..].iter().sum::<f32>().max(f32::MIN_POSITIVE);
    let first = confidence.map_or(1.0 / (1.0 + rest), sigmoid);
    let share = |(i, (&(token, _), weight)): (usize, (&(u32, f32), &f32))| Continuation {
        token,
        probability: if i == 0 { first } else { factor * (1.0 - first) * weight / rest },
    };
    scored.iter().zip(&weights).enumerate().map(share).collect()
}

impl Drafter for BlockDrafter {
    fn name(&self) -> &'static str {
        self.name
    }

    fn propose(
        &mut self,
        backend: &mut dyn Backend,
        target: &mut Network,
        seq: &mut Sequence,
        plan: &Plan,
    ) -> Result<Draft> {
        let drafts = self.propose_all(backend, target, &mut [(seq, plan.clone())])?;
        Ok(drafts.into_iter().next().expect("one for each sequence"))
    }

    fn propose_all(
        &mut self,
        backend: &mut dyn Backend,
        target: &mut Network,
        seqs: &mut [(&mut Sequence, Plan)],
    ) -> Result<Vec<Draft>> {
        let depth = seqs.iter().map(|(_, plan)| plan.reach).max().unwrap_or(0);
        let mut drafting: Vec<&mut Sequence> = seqs.iter_mut().map(|(seq, _)| &mut **seq).collect();
        let cost = target.draft_cost(drafting.len(), depth) / drafting.len() as f32;
        let blocks = target.draft_blocks(backend, &mut drafting, depth)?;
        let draft = |(block, (seq, plan)): (&Block, &(&mut Sequence, Plan))| {
            let reach = block.candidates.len();
            self.grow(block, seq, plan).map(|draft| Draft { cost, reach, ..draft })
        };
        blocks.iter().zip(seqs.iter()).map(draft).collect()
    }

    fn nodes_on_device(&self) -> Option<usize> {
        self.fits_devices.then_some(NODES_ON_DEVICE)
    }
}

//! A standalone draft model: any model with the target's tokenizer. Its top-k growth gives the tree, level by level
//! ([`Network::grow`]).
//!
//! The draft's own cache mirrors the committed text. Before a round it may lack the last few tokens (the bonus token,
//! and an accepted leaf, which the draft never ran), or hold those of another sequence: what is missing is run first.

use treespark_kernel_gen::TreeShape;
use treespark_models::Model;

use super::{Draft, Drafter, HitRates, Plan};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::kv::KvCache;
use crate::memory::MemoryUse;
use crate::network::{Limits, Network};
use crate::sequence::Sequence;
use crate::tree::Accepted;

/// Children of a node that a draft pass offers; a shape with more takes these.
pub const MAX_CHILDREN: usize = 16;
/// The tree when none is asked for. A longer or bushier one costs more than it saves: with the shipped model on an H200 a chain
/// of 3 gives 1.49 times the speed of plain decoding, one of 4 1.37, 3x2x2x1 0.7 to 1.0.
const DEFAULT_SHAPE: &str = "chain:3";
/// Hit rates of the first, second, ... child before anything is measured.
const PRIORS: [f32; MAX_CHILDREN] =
    [0.6, 0.15, 0.07, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01];

pub struct ModelDrafter {
    network: Network,
    kv: KvCache,
    /// The tokens that are in the cache.
    cached: Vec<u32>,
    rates: HitRates,
    default_shape: TreeShape,
}

impl ModelDrafter {
    /// Refuses a model whose vocabulary is not the target's.
    pub fn load(
        backend: &mut dyn Backend,
        model: &Model,
        target_vocab: usize,
        limits: Limits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ModelDrafter> {
        let vocab = model.config().vocab_size;
        if vocab != target_vocab {
            return Err(Error::Vocabulary { draft: vocab, target: target_vocab });
        }
        let limits = Limits { top_k: MAX_CHILDREN.min(vocab), ..limits };
        Ok(ModelDrafter {
            network: Network::load(backend, model, limits, progress)?,
            kv: KvCache::default(),
            cached: Vec::new(),
            rates: HitRates::new(&PRIORS),
            default_shape: DEFAULT_SHAPE.parse().map_err(Error::Shape)?,
        })
    }

    /// Runs what the cache lacks of a text, and forgets what is not part of it.
    fn read(&mut self, backend: &mut dyn Backend, text: &[u32]) -> Result<()> {
        let common = self.cached.iter().zip(text).take_while(|(cached, token)| cached == token).count();
        self.kv.rewind(common);
        self.cached.truncate(common);
        self.network.extend(backend, &mut self.kv, &text[common..], &mut |_| {})?;
        self.cached.extend_from_slice(&text[common..]);
        Ok(())
    }
}

impl Drafter for ModelDrafter {
    fn name(&self) -> &'static str {
        "model"
    }

    fn propose(
        &mut self,
        backend: &mut dyn Backend,
        _: &mut Network,
        seq: &mut Sequence,
        plan: &Plan,
    ) -> Result<Draft> {
        self.read(backend, &seq.tokens()[..seq.tokens().len() - 1])?;
        let shape = fitting(plan.shape.as_ref().unwrap_or(&self.default_shape), plan, self.network.top_k());
        let tree = self.network.grow(backend, &mut self.kv, seq.last(), &shape)?;
        let mut survival = vec![1.0];
        for (node, rank) in shape.ranks().into_iter().enumerate().skip(1) {
            survival.push(survival[shape.parent(node)] * self.rates.rate(rank));
        }
        Ok(Draft { tree, survival, cost: 0.0 })
    }

    fn observe(&mut self, backend: &mut dyn Backend, draft: &Draft, accepted: &Accepted) -> Result<()> {
        let shape = draft.tree.shape();
        self.rates.learn(&draft.tree, &shape.ranks(), &accepted.tokens);
        // The last level was never run: it has no cache rows.
        let path = &accepted.path[..accepted.path.len().min(shape.max_depth())];
        if !path.is_empty() {
            self.network.commit(backend, &mut self.kv, path)?;
            self.cached.extend(path.iter().map(|&node| draft.tree.token(node)));
        }
        Ok(())
    }

    fn start(&mut self, backend: &mut dyn Backend, prompt: &[u32]) -> Result<()> {
        self.network.release(&mut self.kv);
        self.cached.clear();
        self.read(backend, &prompt[..prompt.len() - 1])
    }

    fn prepare(&mut self, backend: &mut dyn Backend) -> Result<()> {
        self.network.prepare_prompts(backend)
    }

    fn memory_use(&self) -> MemoryUse {
        self.network.memory_use()
    }
}

/// The nodes of a shape that a round can use, level by level: none too deep, with too many elder siblings, or too many.
fn fitting(shape: &TreeShape, plan: &Plan, max_children: usize) -> TreeShape {
    let mut fit = TreeShape::root();
    let (mut from, mut parent) = (vec![0], 0); // the shape's node that each is
    while parent < fit.len() && fit.depth(parent) < plan.max_depth {
        let room = plan.max_nodes.saturating_sub(fit.len());
        for child in shape.children(from[parent]).take(room.min(max_children)) {
            fit.push(parent).expect("no more nodes than the shape has");
            from.push(child);
        }
        parent += 1;
    }
    fit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(shape: &str, max_nodes: usize, max_depth: usize, max_children: usize) -> String {
        let plan = Plan { shape: None, max_nodes, max_depth };
        fitting(&shape.parse().unwrap(), &plan, max_children).to_string()
    }

    #[test]
    fn shapes_are_cut_to_what_a_round_can_use() {
        assert_eq!(fit("3x2x1", 64, 64, 16), "3x2x1");
        assert_eq!(fit("3x2x1", 64, 2, 16), "3x2");
        assert_eq!(fit("3x2x1", 64, 64, 2), "2x2x1");
        assert_eq!(fit("3x2x1", 6, 64, 16), "parents:0,0,0,0,1,1");
        assert_eq!(fit("3x2x1", 1, 64, 16), "root");
        assert_eq!(fit("3x2x1", 64, 0, 16), "root");
        assert_eq!(fit("parents:0,0,1,1,0,4,2", 64, 64, 16), "parents:0,0,0,1,1,2,3", "breadth first");
    }
}

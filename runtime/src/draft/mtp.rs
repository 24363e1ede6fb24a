//! A target's own MTP module ([`Network::grow_pairs`]): it drafts token by token, and by its best few at each step a tree.

use treespark_kernel_gen::TreeShape;

use super::model::{MAX_CHILDREN, PRIORS, fitting};
use super::{Draft, Drafter, HitRates, Plan};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::network::Network;
use crate::sequence::Sequence;
use crate::tree::Accepted;

/// The tree when none is asked for: the module is trained for one token, and what it guesses from its own states is right less often.
const DEFAULT_SHAPE: &str = "chain:3";

pub struct MtpDrafter {
    rates: HitRates,
    default_shape: TreeShape,
}

impl MtpDrafter {
    pub fn new() -> Result<MtpDrafter> {
        let default_shape = DEFAULT_SHAPE.parse().map_err(Error::Shape)?;
        Ok(MtpDrafter { rates: HitRates::new(&PRIORS), default_shape })
    }

    fn shape(&self, target: &Network, plan: &Plan) -> TreeShape {
        let most = MAX_CHILDREN.min(target.top_k());
        fitting(plan.shape.as_ref().unwrap_or(&self.default_shape), plan, most)
    }
}

impl Drafter for MtpDrafter {
    fn name(&self) -> &'static str {
        "mtp"
    }

    fn propose(
        &mut self,
        backend: &mut dyn Backend,
        target: &mut Network,
        seq: &mut Sequence,
        plan: &Plan,
    ) -> Result<Draft> {
        let shape = self.shape(target, plan);
        let Some(tree) = target.grow_pairs(backend, seq, &shape)? else { return Ok(Draft::root(seq.last())) };
        let mut survival = vec![1.0];
        for (node, rank) in shape.ranks().into_iter().enumerate().skip(1) {
            survival.push(survival[shape.parent(node)] * self.rates.rate(rank));
        }
        let cost = target.draft_cost(1, 1) * shape.max_depth() as f32;
        Ok(Draft { tree, survival, cost, reach: shape.max_depth() })
    }

    fn prepare(&mut self, backend: &mut dyn Backend, target: &mut Network, plan: &Plan) -> Result<()> {
        target.prepare_guesses(backend, &self.shape(target, plan))
    }

    fn observe(&mut self, _: &Sequence, draft: &Draft, accepted: &Accepted) {
        self.rates.learn(&draft.tree, &draft.tree.shape().ranks(), &accepted.tokens);
    }
}

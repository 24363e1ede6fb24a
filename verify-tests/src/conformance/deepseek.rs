//! DeepSeek's layers: latent attention and experts, under the properties of all others.

use treespark::backend::Backend;

use super::ops::op_by_op;
use super::structure::any_compiled_size;
use super::{ATTENTION, IN_ANY_CASE, Property, for_cases};
use crate::arb::{Case, Topology, WIDE_DEEPSEEK, deepseek_cases, tree};
use crate::batch::{Batch, Member, Tree};
use crate::tiny_model::{Tail, TinyModel};

/// What has grouped queries alone, or no layers at all.
const NOT_OF_LATENTS: [&str; 8] = [
    ATTENTION,
    "long contexts and large numbers equal the oracle",
    "acceptance equals the oracle",
    "draws equal the oracle",
    "a NaN draws no token",
    "perturbed logits equal the oracle",
    "a mask leaves what it allows",
    "a masked head draws what is allowed",
];

/// Whether one of [`IN_ANY_CASE`] is a property of models with latents, too.
pub fn is_of_latents(property: &str) -> bool {
    !NOT_OF_LATENTS.contains(&property)
}

pub fn latents_and_experts_keep_every_property(backend: &mut dyn Backend) -> Property {
    let properties = IN_ANY_CASE.iter().filter(|(name, _)| is_of_latents(name));
    for (index, (name, property)) in properties.enumerate() {
        // Each on one of the models, which are four: emulated kernels take minutes as it is.
        for_cases(backend, 1, deepseek_cases(index), property).map_err(|problem| format!("{name}: {problem}"))?;
    }
    Ok(())
}

/// Large experts, each with a few rows or with more than a tile has.
pub fn wide_experts_equal_the_oracle(backend: &mut dyn Backend) -> Property {
    for (index, nodes) in [1, 9, 60, 180].into_iter().enumerate() {
        let model = TinyModel { sizes: WIDE_DEEPSEEK, seed: index as u64 };
        let member = Member::new(&[5, 7], tree(nodes, Topology::Recursive, model.sizes.vocab, index as u64));
        let case = Case { model, batch: Batch { members: vec![member] }, seed: 0 };
        op_by_op(backend, &case, Tail::Commit).map_err(|problem| format!("{nodes} nodes: {problem}"))?;
    }
    Ok(())
}

/// How a pass cuts the weights of experts is no matter of how many rows it is compiled for.
pub fn the_compiled_size_of_wide_experts_changes_nothing(backend: &mut dyn Backend) -> Property {
    let member = Member::new(&[3, 1, 4], Tree::chain(&[1]));
    any_compiled_size(backend, TinyModel { sizes: WIDE_DEEPSEEK, seed: 1 }, &member)
}

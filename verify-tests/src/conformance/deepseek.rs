//! DeepSeek's layers: latent attention and experts, under the properties of all others.

use treespark::backend::Backend;

use super::{ATTENTION, IN_ANY_CASE, Property, for_cases};
use crate::arb::deepseek_cases;

/// What has grouped queries alone.
const NOT_OF_LATENTS: [&str; 2] = [ATTENTION, "long contexts and large numbers equal the oracle"];

pub fn latents_and_experts_keep_every_property(backend: &mut dyn Backend) -> Property {
    for (name, property) in IN_ANY_CASE.iter().filter(|(name, _)| !NOT_OF_LATENTS.contains(name)) {
        for_cases(backend, 2, deepseek_cases(), property).map_err(|problem| format!("{name}: {problem}"))?;
    }
    Ok(())
}

//! A random case: everything about it follows from a seed, its index and the kind of backend.

use serde::{Deserialize, Serialize};
use treespark::backend::Backend;
use treespark_kernel_gen::TreeShape;
use treespark_kernel_gen::draw::draw;
use treespark_verify_tests::arb::{Case, Failure, Scale, attempt, some_cases};
use treespark_verify_tests::conformance::{IN_ANY_CASE, InCase};
use treespark_verify_tests::rng::Rng;

/// What a failure file holds: enough to make the case again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CaseId {
    pub backend: String,
    pub seed: u64,
    pub index: u64,
    pub property: String,
    /// Any sizes, and not those of a few models: kernels of their own.
    pub wild: bool,
    pub scale: Scale,
}

/// What case `index` is about: one of these properties, in turn.
pub fn plan(backend: &str, seed: u64, index: u64, properties: &[(&'static str, InCase)]) -> CaseId {
    let mut rng = Rng::new(seed.rotate_left(32) ^ index);
    let (property, _) = properties[index as usize % properties.len()];
    // A GPU has a compiler to wait for.
    let wild = if backend == "cpu" { rng.below(4) > 0 } else { rng.below(64) == 0 };
    // The oracle takes most of the time, and most of it for the few large cases.
    let scale = match rng.below(16) {
        0 => Scale::Usual,
        1 => Scale::Large,
        _ => Scale::Small,
    };
    CaseId { backend: backend.to_string(), seed, index, property: property.to_string(), wild, scale }
}

/// Runs it; a failing one shrinks, by so many steps at most. `seen` gets the case as it was made.
pub fn run(id: &CaseId, backend: &mut dyn Backend, shrinks: u32, seen: &mut dyn FnMut(&Case)) -> Result<(), Failure> {
    let (_, property) = IN_ANY_CASE
        .into_iter()
        .find(|(name, _)| *name == id.property)
        .ok_or_else(|| Failure { case: None, problem: format!("no property is called `{}`", id.property) })?;
    let strategy = some_cases(id.wild, id.scale);
    attempt([id.seed, id.index], strategy, shrinks, seen, &mut |case| property(&mut *backend, case))
}

/// For people: sizes, and every request with its tree.
pub fn describe(case: &Case) -> String {
    let mut text = format!("{:?}\n", case.model);
    for (i, member) in case.batch.members.iter().enumerate() {
        let parents: Vec<u32> = member.tree.parents.iter().map(|&parent| parent as u32).collect();
        let drawn = TreeShape::from_parents(&parents)
            .map_or_else(|e| e.to_string(), |shape| draw(&shape, |node| node.to_string()));
        let (prefix, tokens) = (member.prefix.len(), &member.tree.tokens);
        text +=
            &format!("request {i}: {prefix} tokens committed, tokens of the tree {tokens:?}, {:?}\n", member.sampling);
        text += drawn.trim_end();
        text += "\n";
    }
    text
}

//! A random case: everything about it follows from a seed, its index and the kind of backend.

use serde::{Deserialize, Serialize};
use treespark_kernel_gen::TreeShape;
use treespark_kernel_gen::draw::draw;
use treespark_verify_tests::arb::{self, Case, Family, Scale, attempt, some_cases};
use treespark_verify_tests::conformance::deepseek::is_of_latents;
use treespark_verify_tests::conformance::{ATTENTION, IN_ANY_CASE};
use treespark_verify_tests::decoding::arb::decodings;
use treespark_verify_tests::decoding::{Decoding, GUESSERS, Seen};
use treespark_verify_tests::rng::Rng;
use treespark_verify_tests::shared::Shared;

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
    /// Llama where a file does not say.
    #[serde(default)]
    pub family: Family,
}

/// The smallest case found that fails, for people, and what is wrong with it.
pub struct Failure {
    pub case: Option<String>,
    pub problem: String,
}

/// What whoever counts is told.
pub enum Sight<'a> {
    Case(&'a Case),
    Decoding(&'a Decoding),
    /// What a decoding came to, shrunken ones included.
    Decoded(&'a Seen),
}

/// What a case of passes may be about: [`IN_ANY_CASE`].
pub fn of_passes() -> Vec<String> {
    IN_ANY_CASE.map(|(name, _)| name.to_string()).to_vec()
}

const OF_ROUNDS: &str = "speculative decoding equals plain, drafter: ";

/// What a case of whole generations may be about: one of the [`GUESSERS`].
pub fn of_rounds() -> Vec<String> {
    GUESSERS.map(|name| format!("{OF_ROUNDS}{name}")).to_vec()
}

/// What case `index` is about: one of these properties, in turn.
pub fn plan(backend: &str, seed: u64, index: u64, properties: &[String]) -> CaseId {
    let mut rng = Rng::new(seed.rotate_left(32) ^ index);
    let property = properties[index as usize % properties.len()].clone();
    // A GPU has a compiler to wait for.
    let wild = if backend == "cpu" { rng.below(4) > 0 } else { rng.below(256) == 0 };
    // The oracle takes most of the time, and most of it for the few large cases.
    let scale = match rng.below(16) {
        0 => Scale::Usual,
        1 => Scale::Large,
        2 | 3 if property == ATTENTION => Scale::Long,
        _ => Scale::Small,
    };
    let is_deepseek = is_of_latents(&property) && (rng.below(4) == 0 || property == format!("{OF_ROUNDS}mtp"));
    let family = if is_deepseek { Family::Deepseek } else { Family::Llama };
    CaseId { backend: backend.to_string(), seed, index, property, wild, scale, family }
}

/// Runs it; a failing one shrinks, by so many steps at most. `seen` is told of the case as it was made.
pub fn run(id: &CaseId, backend: &mut Shared, shrinks: u32, seen: &mut dyn FnMut(Sight)) -> Result<(), Failure> {
    let key = [id.seed, id.index];
    if let Some(guesser) = id.property.strip_prefix(OF_ROUNDS).filter(|name| GUESSERS.contains(name)) {
        let mut sights = Vec::new();
        let strategy = decodings(id.family, id.wild, guesser);
        let result = attempt(key, strategy, shrinks, &mut |made| seen(Sight::Decoding(made)), &mut |made| {
            sights.push(made.check(backend)?);
            Ok(())
        });
        sights.iter().for_each(|sight| seen(Sight::Decoded(sight)));
        return result.map_err(|failure| told(failure, Decoding::describe));
    }
    let Some((_, property)) = IN_ANY_CASE.into_iter().find(|(name, _)| *name == id.property) else {
        return Err(Failure { case: None, problem: format!("no property is called `{}`", id.property) });
    };
    let strategy = some_cases(id.family, id.wild, id.scale);
    attempt(key, strategy, shrinks, &mut |made| seen(Sight::Case(made)), &mut |made| property(backend, made))
        .map_err(|failure| told(failure, describe))
}

fn told<T>(failure: arb::Failure<T>, describe: fn(&T) -> String) -> Failure {
    Failure { case: failure.case.map(|case| describe(&case)), problem: failure.problem }
}

/// For people: sizes, and every request with its tree.
pub fn describe(case: &Case) -> String {
    let mut text = format!("{:?}\n", case.model);
    for (i, member) in case.batch.members.iter().enumerate() {
        let parents: Vec<u32> = member.tree.parents.iter().map(|&parent| parent as u32).collect();
        let drawn = TreeShape::from_parents(&parents)
            .map_or_else(|e| e.to_string(), |shape| draw(&shape, |node| node.to_string()));
        let (prefix, given, tokens) = (member.prefix.len(), member.given, &member.tree.tokens);
        text += &format!("request {i}: {prefix} tokens committed, {given} nodes given, ");
        text += &format!("tokens of the tree {tokens:?}, {:?}\n", member.sampling);
        text += drawn.trim_end();
        text += "\n";
    }
    text
}

//! What is claimed of the rules: one list for the tests and for `treespark-fuzz prove`.
//!
//! Models are random and tiny, with tokens that cannot occur, and every law is a sum of fractions: "lossless" means a
//! distance of exactly 0 on every model. A mistake may be harmless on some models and must be rejected on one at least.

pub mod lossless;
pub mod known_noise;
pub mod batch;
pub mod rejected;

use std::ops::Range;

use super::law::ratio;
use super::proof::{Verdict, examine, examine_one};
use super::replay::law_of;
use super::{Choose, Models, Rational, Tree, chain, schedule};
use crate::rng::Rng;

pub struct Claim {
    pub name: &'static str,
    pub expected: Expected,
    /// How many models, or pairs of them, it is examined on.
    pub models: u64,
    /// On one of them.
    pub verdict: fn(u64) -> Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Expected {
    Lossless,
    /// With the distance that the mistake was described with, on one instance of three tokens.
    Rejected(Option<f64>),
}

impl Claim {
    pub fn verdicts(&self) -> Vec<Verdict> {
        (0..self.models).map(self.verdict).collect()
    }

    pub fn holds(&self, verdicts: &[Verdict]) -> bool {
        match self.expected {
            Expected::Lossless => verdicts.iter().all(Verdict::is_lossless),
            Expected::Rejected(_) => !verdicts.iter().all(Verdict::is_lossless),
        }
    }
}

pub fn all() -> impl Iterator<Item = &'static Claim> {
    use {batch::BATCH, known_noise::NOISE, lossless::*, rejected::*};
    [MATCH, NOISE, CHAINS, WITHOUT_REPLACEMENT, HYBRID, BATCH, MISTAKES, MORE_MISTAKES].into_iter().flatten()
}

const fn lossless(name: &'static str, models: u64, verdict: fn(u64) -> Verdict) -> Claim {
    Claim { name, expected: Expected::Lossless, models, verdict }
}

const fn rejected(name: &'static str, distance: Option<f64>, models: u64, verdict: fn(u64) -> Verdict) -> Claim {
    Claim { name, expected: Expected::Rejected(distance), models, verdict }
}

const MODELS: u64 = 32;
/// Pairs of requests: each takes longer.
const PAIRS: u64 = 24;

/// A round of one request.
fn one(seed: u64, round: impl Fn(&Models, &mut Choose) -> Vec<usize>) -> Verdict {
    let models = one_request(seed);
    examine_one(&models, |choose| round(&models, choose))
}

/// Vocabularies of 2 and 3 tokens, drafts of 2 and 3.
fn one_request(seed: u64) -> Models {
    let (vocab, depth) = [(2, 2), (2, 3), (3, 2), (3, 3)][seed as usize % 4];
    Models::random(seed, vocab, depth)
}

/// A round of two requests, with drafts of 2 and 3 tokens.
fn two(seed: u64, round: impl Fn(&[Models], &mut Choose) -> Vec<Vec<usize>>) -> Verdict {
    let requests = two_requests(seed, &[2, 3]);
    examine(&requests, |choose| round(&requests, choose))
}

/// Vocabularies of 2 and 3 tokens side by side, drafts of one of these depths.
fn two_requests(seed: u64, depths: &[usize]) -> [Models; 2] {
    let depth = depths[seed as usize / 2 % depths.len()];
    [0, 1].map(|i| Models::random(1000 + 2 * seed + i, 2 + (seed + i) as usize % 2, depth))
}

/// Applies a rule to what each request has drafted.
fn each<T>(requests: &[Models], drafts: Vec<T>, mut verify: impl FnMut(&Models, &T) -> Vec<usize>) -> Vec<Vec<usize>> {
    requests.iter().zip(&drafts).map(|(models, draft)| verify(models, draft)).collect()
}

/// Of chains: every third row slows a round down, to 50 to 89 % of its rate.
fn rates(seed: u64) -> Vec<Rational> {
    staircase(seed, 50..90)
}

/// Of trees, which have more rows that pay.
fn tree_rates(seed: u64) -> Vec<Rational> {
    staircase(seed, 75..98)
}

/// What every third row leaves of the rate, in percent: kernels have tiles.
fn staircase(seed: u64, left: Range<usize>) -> Vec<Rational> {
    let mut rng = Rng::new(seed);
    let first = rng.below(3);
    let mut rate = ratio(1, 1);
    let rate_of = |rows: usize| {
        if rows % 3 == first {
            rate *= ratio(left.start + rng.below(left.len()), 100);
        }
        rate.clone()
    };
    (0..9).map(rate_of).collect()
}

/// Rates at which whole chains just pay in the mean, and parts of them cost as much.
fn break_even(requests: &[Models]) -> Vec<Rational> {
    let survivors = |models: &Models| -> Rational {
        let chains = law_of(|choose| chain::draw(&models.draft, models.depth, choose));
        chains.iter().map(|(tokens, weight)| schedule::survivors(models, tokens) * weight).sum()
    };
    let undrafted = ratio(requests.len(), 1);
    let drafted = requests.iter().map(survivors).sum::<Rational>() + &undrafted;
    let rows = requests.iter().map(|models| models.depth + 1).sum::<usize>();
    let mut rates = vec![undrafted / drafted; rows + 1];
    rates[requests.len()] = ratio(1, 1);
    rates
}

fn any_tree(models: &Models, nodes: usize, rng: &mut Rng) -> Tree {
    let mut tree = Tree::root();
    tree.add_any(nodes, models.depth, models.vocab, rng);
    tree
}

/// The shapes whose siblings are drawn without replacement: small enough to enumerate.
fn widths(models: &Models) -> &'static [usize] {
    if models.depth == 2 { &[2, 2] } else { &[2, 1, 1] }
}

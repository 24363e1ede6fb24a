//! The proof: a round, gone on with by plain decoding, against plain decoding alone.

use std::collections::{BTreeMap, BTreeSet};

use super::law::ratio;
use super::replay::law_of;
use super::{Choose, Models, Rational};

/// What each request of a batch has emitted.
pub type Texts = Vec<Vec<usize>>;

/// What was found out about a round.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Total variation distance to the target's own law, of all requests together. Lossless means 0.
    pub distance: Rational,
    /// Tokens a round in the mean, of all requests together.
    pub tokens: Rational,
}

/// A round of requests that may depend on each other. `run` returns what it emitted for each.
pub fn examine(requests: &[Models], run: impl FnMut(&mut Choose) -> Texts) -> Verdict {
    let emitted = law_of(run);
    let length = |texts: &Texts| ratio(texts.iter().map(Vec::len).sum(), 1);
    let tokens = emitted.iter().map(|(texts, weight)| length(texts) * weight).sum();
    let nothing = BTreeMap::from([(vec![vec![]; requests.len()], ratio(1, 1))]);
    let distance = distance(&completed(requests, &emitted), &completed(requests, &nothing));
    Verdict { distance, tokens }
}

/// A round of one request.
pub fn examine_one(models: &Models, mut run: impl FnMut(&mut Choose) -> Vec<usize>) -> Verdict {
    examine(std::slice::from_ref(models), |choose| vec![run(choose)])
}

/// The law of the first tokens of every request, up to its horizon, if plain decoding takes over.
fn completed(requests: &[Models], emitted: &BTreeMap<Texts, Rational>) -> BTreeMap<Texts, Rational> {
    let (starts, weights): (Vec<&Texts>, Vec<Rational>) = emitted.iter().map(|(t, w)| (t, w.clone())).unzip();
    law_of(|choose| {
        let mut texts = starts[choose(&weights)].clone();
        for (models, text) in requests.iter().zip(&mut texts) {
            while text.len() < models.horizon() {
                text.push(choose(models.target.after(text)));
            }
        }
        texts
    })
}

/// Half the sum of all differences.
fn distance(a: &BTreeMap<Texts, Rational>, b: &BTreeMap<Texts, Rational>) -> Rational {
    let outcomes: BTreeSet<&Texts> = a.keys().chain(b.keys()).collect();
    let difference = |texts: &Texts| {
        let [a, b] = [a, b].map(|law| law.get(texts).cloned().unwrap_or(ratio(0, 1)));
        if a > b { a - b } else { b - a }
    };
    outcomes.into_iter().map(difference).sum::<Rational>() / ratio(2, 1)
}

/// A fraction to three decimals, for a person.
pub fn decimal(number: &Rational) -> String {
    let thousandths = (number * ratio(1000, 1)).round().to_integer().to_string();
    let padded = format!("{thousandths:0>4}");
    let (whole, rest) = padded.split_at(padded.len() - 3);
    format!("{whole}.{rest}")
}

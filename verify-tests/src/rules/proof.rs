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

impl Verdict {
    pub fn is_lossless(&self) -> bool {
        self.distance == ratio(0, 1)
    }
}

/// A round of requests that may depend on each other. `run` returns what it emitted for each.
pub fn examine(requests: &[Models], mut run: impl FnMut(&mut Choose) -> Texts) -> Verdict {
    examine_on(requests, |choose| {
        let texts = run(choose);
        (texts.iter().map(Vec::len).sum(), texts)
    })
}

/// A round that `run` has gone on from by itself: it returns the texts, and how many tokens of them the round emitted.
pub fn examine_on(requests: &[Models], run: impl FnMut(&mut Choose) -> (usize, Texts)) -> Verdict {
    let mut emitted = BTreeMap::new();
    let mut tokens = ratio(0, 1);
    for ((count, texts), weight) in law_of(run) {
        tokens += &weight * ratio(count, 1);
        *emitted.entry(texts).or_insert(ratio(0, 1)) += weight;
    }
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

pub fn largest(verdicts: &[Verdict]) -> &Rational {
    verdicts.iter().map(|verdict| &verdict.distance).max().expect("some models")
}

pub fn mean_tokens(verdicts: &[Verdict]) -> Rational {
    verdicts.iter().map(|verdict| &verdict.tokens).sum::<Rational>() / ratio(verdicts.len(), 1)
}

/// A fraction to three decimals, for a person.
pub fn decimal(number: &Rational) -> String {
    let thousandths = (number * ratio(1000, 1)).round().to_integer().to_string();
    let padded = format!("{thousandths:0>4}");
    let (whole, rest) = padded.split_at(padded.len() - 3);
    format!("{whole}.{rest}")
}

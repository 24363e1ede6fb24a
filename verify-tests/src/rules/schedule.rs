//! Who drafts how much: DSpark's hardware-aware prefix scheduler (Algorithm 1) over the sampled chains of a batch.
//!
//! ```text
//! rate[b] = rounds a second of a batch of b rows
//! admit the token that most likely survives, while (expected tokens) · rate[rows] grows; stop at the first drop
//! ```
//!
//! Whether a token is admitted is decided before it is seen. Here it is not even drawn before, so that no rule can
//! look. A drafter that draws whole chains first and cuts them gives the same law, as long as it does not look either.

use std::cmp::min;

use super::law::{Rational, ratio};
use super::{Choose, Models};

/// The chain of each request, drawn as far as it pays.
pub fn admit(requests: &[Models], rates: &[Rational], choose: &mut Choose) -> Vec<Vec<usize>> {
    let mut chains = vec![vec![]; requests.len()];
    let mut rows = requests.len();
    let mut tokens = ratio(rows, 1);
    let mut best = &tokens * &rates[rows];
    let mut survival: Vec<Rational> = requests.iter().map(|models| confidence(models, &[])).collect();
    loop {
        let open = (0..requests.len()).filter(|&request| chains[request].len() < requests[request].depth);
        // Of equally likely ones the first request: never by a token that has not been seen.
        let Some(request) = open.max_by(|&a, &b| survival[a].cmp(&survival[b]).then(b.cmp(&a))) else { return chains };
        tokens += &survival[request];
        rows += 1;
        let throughput = &tokens * &rates[rows];
        if throughput <= best {
            return chains;
        }
        best = throughput;
        let models = &requests[request];
        let chain = &mut chains[request];
        chain.push(choose(models.draft.after(chain)));
        survival[request] *= confidence(models, chain);
    }
}

/// How likely the draft's next token after a text is kept: what DSpark trains a head to predict.
pub fn confidence(models: &Models, text: &[usize]) -> Rational {
    let (target, draft) = models.after(text);
    target.iter().zip(draft.iter()).map(|(target, draft)| min(target, draft)).sum()
}

/// How many tokens of a chain are kept in the mean, by confidence.
pub fn survivors(models: &Models, chain: &[usize]) -> Rational {
    let survival = |survival: &mut Rational, kept: usize| {
        *survival *= confidence(models, &chain[..kept]);
        Some(survival.clone())
    };
    (0..chain.len()).scan(ratio(1, 1), survival).sum()
}

//! How often each token follows each beginning of an answer, over many answers by speculative decoding, against the target's
//! own law, which the f64 oracle says.

use std::collections::BTreeMap;

use treespark::{Engine, Sampling, Statistics};
use treespark_kernel_gen::DType;
use treespark_models::Model;

use crate::decoding::{Ask, Decoding, Guesser, Stop, Way};
use crate::goodness::{Fit, fit};
use crate::logits::logits;
use crate::near_tie::{draw_context, is_at_an_edge};
use crate::oracle::{Oracle, law, scores};
use crate::shared::Shared;
use crate::tiny_model::Sizes;

/// Tokens of an answer: a round or more.
pub const ANSWER: usize = 4;
/// Beginnings of up to so many tokens are told apart.
const LONGEST: usize = 2;
const VOCAB: usize = 16;

/// What is sampled: a tiny model of random weights, a drafter, and how the target draws.
pub struct Trial {
    decoding: Decoding,
    model: Model,
}

/// Of each beginning, how often each token followed it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Frequencies {
    counts: BTreeMap<Vec<u32>, Vec<u64>>,
}

/// An engine with its counters.
pub struct Sampler<'a> {
    trial: &'a Trial,
    engine: Engine,
    pub frequencies: Frequencies,
    pub statistics: Statistics,
}

/// A filter's edge within which f32 may fall to either side: the law behind a beginning is then not known.
const EDGE: f64 = 1e-4;

impl Trial {
    /// Weights and cache of this type.
    pub fn new(guesser: Guesser, sampling: Sampling, dtype: DType) -> Trial {
        let sizes = Sizes {
            vocab: VOCAB,
            hidden: 64,
            layers: 2,
            kv_heads: 2,
            group: 3,
            head_dim: 64,
            ffn: 128,
            bias: false,
            qk_norm: false,
            weights: dtype,
            cache: dtype,
            page_size: 16,
            ..Sizes::PLAIN
        };
        let ask = Ask { prompt: vec![3, 14, 7], sampling, max_new_tokens: ANSWER, stop: Stop::Nothing, language: None };
        // Few enough nodes that drafts are wrong as often as right.
        let decoding = Decoding {
            sizes,
            seed: 1,
            guesser,
            shape: None,
            max_nodes: 12,
            context: 16,
            asks: vec![ask],
            way: Way::Alone,
        };
        Trial { model: decoding.model(), decoding }
    }

    pub fn guesser(&self) -> &Guesser {
        &self.decoding.guesser
    }

    pub fn sampling(&self) -> &Sampling {
        &self.decoding.asks[0].sampling
    }

    pub fn sampler(&self, backend: &Shared) -> Result<Sampler<'_>, String> {
        let engine = self.decoding.engine(&self.model, backend.share(), Vec::new())?;
        Ok(Sampler { trial: self, engine, frequencies: Frequencies::default(), statistics: Statistics::default() })
    }

    /// The target's law behind a beginning of an answer, if it is known.
    fn law(&self, oracle: &mut Oracle, beginning: &[u32]) -> Option<Vec<f64>> {
        let ask = &self.decoding.asks[0];
        let text = [&ask.prompt, beginning].concat();
        let mut rows = logits(oracle, &self.model, self.decoding.sizes.cache, std::slice::from_ref(&text)).remove(0);
        let row: Vec<f64> = rows.pop().expect("a prompt has a token").into_iter().map(f64::from).collect();
        let context = draw_context(&ask.sampling, &text);
        let scored = scores(&row, &context.request, context.position, |token| context.seen.contains(&token));
        (!is_at_an_edge(&scored, &context.request, EDGE)).then(|| law(&scored))
    }

    /// The fit of every beginning that occurred often enough.
    pub fn fits(&self, frequencies: &Frequencies) -> Vec<(Vec<u32>, Fit)> {
        let mut oracle = Oracle::new();
        let fits = frequencies.counts.iter().filter_map(|(beginning, counts)| {
            Some((beginning.clone(), fit(counts, &self.law(&mut oracle, beginning)?)?))
        });
        fits.collect()
    }
}

impl Sampler<'_> {
    /// Decodes the answer of this index, and counts it.
    pub fn sample(&mut self, index: u32) -> treespark::Result<()> {
        let Decoding { asks, .. } = &self.trial.decoding;
        let ask = Ask { sampling: Sampling { sample: index, ..asks[0].sampling.clone() }, ..asks[0].clone() };
        let mut seq = self.trial.decoding.sequence(&ask);
        self.engine.generate(&mut seq, &mut self.statistics)?;
        let answer = seq.generated();
        for len in 0..=LONGEST {
            self.frequencies.count(&answer[..len], answer[len], 1);
        }
        Ok(())
    }
}

impl Frequencies {
    fn count(&mut self, beginning: &[u32], token: u32, n: u64) {
        let counts = self.counts.entry(beginning.to_vec()).or_insert_with(|| vec![0; VOCAB]);
        counts[token as usize] += n;
    }

    pub fn merge(&mut self, other: &Frequencies) {
        for (beginning, counts) in &other.counts {
            counts.iter().zip(0..).for_each(|(&n, token)| self.count(beginning, token, n));
        }
    }
}

#[cfg(test)]
mod tests {
    use treespark::cpu::CpuBackend;
    use treespark_kernel_gen::Request;

    use super::*;
    use crate::mutant::{Mistake, Mutant};

    const SAMPLES: u32 = 2000;

    fn least_p(mistake: Mistake) -> f64 {
        let guesser = Guesser::Dspark { layers: 1, block: 4, first: 0, markov: None, confidence: None, own: false };
        let trial = Trial::new(guesser, Sampling { temperature: 1.0, ..Sampling::default() }, DType::BF16);
        let backend = Shared::new(Box::new(Mutant::new(Box::new(CpuBackend::new(Some(1))), mistake)));
        let mut sampler = trial.sampler(&backend).unwrap();
        (0..SAMPLES).for_each(|index| sampler.sample(index).unwrap());
        assert!(sampler.statistics.new_tokens > sampler.statistics.rounds * 5 / 4, "hardly a draft was accepted");
        trial.fits(&sampler.frequencies).iter().map(|(_, fit)| fit.p).fold(1.0, f64::min)
    }

    #[test]
    fn the_target_s_law_fits_and_a_wrong_one_does_not() {
        let right = least_p(Mistake::Request(|_| {}));
        assert!(right > 1e-4, "{right}");
        // One seed for all: every answer is the same.
        assert!(least_p(Mistake::Request(|request: &mut Request| request.sample = 0)) < 1e-9);
        assert!(least_p(Mistake::Request(|request| request.temperature *= 0.25)) < 1e-9);
    }
}

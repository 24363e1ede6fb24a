//! Sums over the answers of one way to decode, and the figures that follow from them.

use serde::Serialize;
use serde_json::{Value, json};

use crate::stats::{Acceptance, Statistics};

/// Depths that a table shows the accepted share of.
pub const DEPTHS: usize = 4;

#[derive(Debug, Clone, Default)]
pub struct Tally {
    pub prompts: usize,
    /// Sums of counts and seconds; memory, backend and end are those of the last answer.
    pub sums: Statistics,
}

/// What a row of a table says.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Figures {
    /// The bonus token included.
    pub tokens_per_round: f64,
    /// Entry d - 1: of the rounds whose tree reached depth d, the share that accepted to depth d; none if none reached it.
    pub accepted_at_depth: [Option<f64>; DEPTHS],
    pub draft_ms_per_round: f64,
    pub verify_ms_per_round: f64,
    /// New tokens over seconds of rounds.
    pub tokens_per_second: f64,
    /// The same of plain decoding, on the same prompts in the same minutes.
    pub plain_tokens_per_second: Option<f64>,
    pub times_plain: Option<f64>,
    /// Tokens per round as measured elsewhere.
    pub reference_tokens_per_round: Option<f64>,
}

impl Tally {
    /// Adds one answer.
    pub fn add(&mut self, one: Statistics) {
        let sums = &mut self.sums;
        let mut by_depth = std::mem::take(&mut sums.by_depth);
        by_depth.resize(by_depth.len().max(one.by_depth.len()), Acceptance::default());
        by_depth.iter_mut().zip(&one.by_depth).for_each(|(sum, one)| sum.add(one));
        let mut by_drafter = std::mem::take(&mut sums.by_drafter);
        one.by_drafter.iter().for_each(|(name, one)| by_drafter.entry(name.clone()).or_default().add(one));
        let mut seconds = sums.seconds;
        seconds.prefill += one.seconds.prefill;
        seconds.draft += one.seconds.draft;
        seconds.verify += one.seconds.verify;
        seconds.accept += one.seconds.accept;
        seconds.commit += one.seconds.commit;
        *sums = Statistics {
            prompt_tokens: sums.prompt_tokens + one.prompt_tokens,
            new_tokens: sums.new_tokens + one.new_tokens,
            rounds: sums.rounds + one.rounds,
            verified_rows: sums.verified_rows + one.verified_rows,
            weight_bytes_read: sums.weight_bytes_read + one.weight_bytes_read,
            first_token_seconds: sums.first_token_seconds + one.first_token_seconds,
            by_depth,
            by_drafter,
            seconds,
            ..one
        };
    }

    /// Beside plain decoding of the same prompts, where that was measured.
    pub fn figures(&self, plain: Option<&Tally>, reference: Option<f64>) -> Figures {
        let sums = &self.sums;
        let ms_per_round = |seconds: f64| 1e3 * seconds / sums.rounds.max(1) as f64;
        let tokens_per_second = sums.tokens_per_second();
        let plain = plain.map(|plain| plain.sums.tokens_per_second());
        Figures {
            tokens_per_round: sums.tokens_per_round(),
            accepted_at_depth: std::array::from_fn(|d| sums.by_depth.get(d).and_then(share)),
            draft_ms_per_round: ms_per_round(sums.seconds.draft),
            verify_ms_per_round: ms_per_round(sums.seconds.verify),
            tokens_per_second,
            plain_tokens_per_second: plain,
            times_plain: plain.map(|plain| tokens_per_second / plain.max(f64::MIN_POSITIVE)),
            reference_tokens_per_round: reference,
        }
    }

    /// The sums, seconds by part among them.
    pub fn to_json(&self) -> Value {
        let Statistics { prompt_tokens, new_tokens, rounds, verified_rows, by_depth, seconds, memory, .. } = &self.sums;
        json!({
            "prompts": self.prompts, "prompt_tokens": prompt_tokens, "tokens": new_tokens, "rounds": rounds,
            "verified_rows": verified_rows, "by_depth": by_depth, "by_drafter": self.sums.by_drafter,
            "seconds": seconds, "memory_bytes": memory,
        })
    }
}

impl Acceptance {
    fn add(&mut self, one: &Acceptance) {
        self.drafted += one.drafted;
        self.accepted += one.accepted;
    }
}

fn share(at: &Acceptance) -> Option<f64> {
    (at.drafted > 0).then(|| at.accepted as f64 / at.drafted as f64)
}

impl Figures {
    /// Unweighted. A figure that some of them lack is the mean of the others.
    pub fn mean(all: &[Figures]) -> Figures {
        let mean = |of: &dyn Fn(&Figures) -> f64| all.iter().map(of).sum::<f64>() / all.len().max(1) as f64;
        let some = |of: &dyn Fn(&Figures) -> Option<f64>| {
            let values: Vec<f64> = all.iter().filter_map(of).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        Figures {
            tokens_per_round: mean(&|f| f.tokens_per_round),
            accepted_at_depth: std::array::from_fn(|d| some(&|f| f.accepted_at_depth[d])),
            draft_ms_per_round: mean(&|f| f.draft_ms_per_round),
            verify_ms_per_round: mean(&|f| f.verify_ms_per_round),
            tokens_per_second: mean(&|f| f.tokens_per_second),
            plain_tokens_per_second: some(&|f| f.plain_tokens_per_second),
            times_plain: some(&|f| f.times_plain),
            reference_tokens_per_round: some(&|f| f.reference_tokens_per_round),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::stats::Times;

    /// An answer with this many tokens, rounds and seconds of verify, and acceptance by depth (drafted, accepted).
    pub fn answer(tokens: usize, rounds: usize, verify: f64, depths: &[(usize, usize)]) -> Statistics {
        let at = |&(drafted, accepted): &(usize, usize)| Acceptance { drafted, accepted };
        Statistics {
            new_tokens: tokens,
            rounds,
            seconds: Times { verify, prefill: 100.0, ..Times::default() },
            by_depth: depths.iter().map(at).collect(),
            ..Statistics::default()
        }
    }

    #[test]
    fn answers_add_up_and_long_ones_weigh_more() {
        let mut tally = Tally::default();
        tally.add(answer(10, 10, 1.0, &[]));
        tally.add(answer(90, 30, 1.5, &[(20, 10), (4, 0)]));
        tally.add(answer(20, 10, 1.5, &[(10, 5)]));
        let mut plain = Tally::default();
        plain.add(answer(120, 120, 6.0, &[]));
        let figures = tally.figures(Some(&plain), Some(2.5));
        assert_eq!(figures.tokens_per_round, 120.0 / 50.0);
        assert_eq!(figures.accepted_at_depth, [Some(0.5), Some(0.0), None, None]);
        assert_eq!((figures.draft_ms_per_round, figures.verify_ms_per_round), (0.0, 80.0));
        assert_eq!((figures.tokens_per_second, figures.plain_tokens_per_second), (30.0, Some(20.0)));
        assert_eq!((figures.times_plain, figures.reference_tokens_per_round), (Some(1.5), Some(2.5)));
        assert_eq!(tally.figures(None, None).times_plain, None);
        assert_eq!(tally.to_json()["by_depth"][0], json!({"drafted": 30, "accepted": 15}));
    }

    #[test]
    fn a_mean_is_over_sets_and_over_what_is_known() {
        let one = Figures { tokens_per_round: 2.0, times_plain: Some(1.0), ..Figures::default() };
        let two = Figures { tokens_per_round: 4.0, times_plain: Some(2.0), ..Figures::default() };
        let two = Figures { accepted_at_depth: [Some(0.5), None, None, None], ..two };
        let mean = Figures::mean(&[one, two]);
        assert_eq!((mean.tokens_per_round, mean.times_plain, mean.accepted_at_depth[0]), (3.0, Some(1.5), Some(0.5)));
    }
}

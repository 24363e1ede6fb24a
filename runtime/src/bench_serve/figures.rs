//! What one measurement comes to.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Load;
use super::answer::{Counts, Record};
use super::window::Window;

/// Times and tokens are those of requests that succeeded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// That were sent, those of the warm-up left out.
    pub requests: usize,
    pub failed: usize,
    /// By their kind.
    pub failures: BTreeMap<String, Failures>,
    pub prompt_tokens: usize,
    pub tokens: usize,
    /// Requests whose tokens are their chunks, for want of a usage.
    pub guessed: usize,
    pub tokens_per_chunk: Option<f64>,
    pub window: Window,
    pub tokens_per_second: f64,
    pub requests_per_second: f64,
    pub user_tokens_per_second: Option<UserSpeed>,
    pub ttft_ms: Option<Percentiles>,
    pub tpot_ms: Option<Percentiles>,
    pub e2e_ms: Option<Percentiles>,
    /// Between chunks of one request, however many tokens they hold.
    pub chunk_gap_ms: Option<Percentiles>,
    /// Means over the requests whose usage tells of drafts.
    pub accepted_per_request: Option<f64>,
    pub rejected_per_request: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failures {
    pub requests: usize,
    /// What the first of them said.
    pub example: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct UserSpeed {
    pub mean: f64,
    /// Nine of ten users are faster.
    pub p10: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

impl Figures {
    pub fn of(load: Load, records: &[Record]) -> Figures {
        let window = Window::of(load, records);
        let done: Vec<(&Record, Counts)> =
            records.iter().filter_map(|record| Some((record, *record.outcome.as_ref().ok()?))).collect();
        let per_second = |amount: f64| if window.seconds() > 0.0 { amount / window.seconds() } else { 0.0 };
        let tokens: usize = done.iter().map(|(_, counts)| counts.tokens).sum();
        let chunks: usize = done.iter().map(|(record, _)| record.chunks.len()).sum();
        let ms = |seconds: f64| 1e3 * seconds;
        let tpot: Vec<f64> = done.iter().filter_map(|(record, counts)| seconds_per_token(record, counts)).collect();
        let gaps = done.iter().flat_map(|(record, _)| record.chunks.windows(2).map(|pair| ms(pair[1] - pair[0])));
        let ttft = done.iter().filter_map(|(record, _)| Some(ms(record.chunks.first()? - record.sent)));
        Figures {
            requests: records.len(),
            failed: records.len() - done.len(),
            failures: failures(records),
            prompt_tokens: done.iter().filter_map(|(_, counts)| counts.prompt_tokens).sum(),
            tokens,
            guessed: done.iter().filter(|(_, counts)| counts.guessed).count(),
            tokens_per_chunk: (chunks > 0).then(|| tokens as f64 / chunks as f64),
            window,
            tokens_per_second: per_second(
                done.iter().map(|(record, counts)| window.share(record) * counts.tokens as f64).sum(),
            ),
            requests_per_second: per_second(done.iter().map(|(record, _)| window.share(record)).sum()),
            user_tokens_per_second: UserSpeed::of(tpot.iter().map(|seconds| 1.0 / seconds).collect()),
            ttft_ms: Percentiles::of(ttft.collect()),
            tpot_ms: Percentiles::of(tpot.iter().copied().map(ms).collect()),
            e2e_ms: Percentiles::of(done.iter().map(|(record, _)| ms(record.end - record.sent)).collect()),
            chunk_gap_ms: Percentiles::of(gaps.collect()),
            accepted_per_request: mean(done.iter().filter_map(|(_, counts)| counts.accepted)),
            rejected_per_request: mean(done.iter().filter_map(|(_, counts)| counts.rejected)),
        }
    }
}

/// None for an answer without two moments to measure between.
fn seconds_per_token(record: &Record, counts: &Counts) -> Option<f64> {
    let seconds = record.chunks.last()? - record.chunks.first()?;
    (counts.tokens > 1 && seconds > 0.0).then(|| seconds / (counts.tokens - 1) as f64)
}

fn failures(records: &[Record]) -> BTreeMap<String, Failures> {
    let mut failures = BTreeMap::new();
    for failure in records.iter().filter_map(|record| record.outcome.as_ref().err()) {
        let first = || Failures { requests: 0, example: failure.message.clone() };
        failures.entry(failure.kind.to_string()).or_insert_with(first).requests += 1;
    }
    failures
}

fn mean(numbers: impl Iterator<Item = usize>) -> Option<f64> {
    let numbers: Vec<usize> = numbers.collect();
    (!numbers.is_empty()).then(|| numbers.iter().sum::<usize>() as f64 / numbers.len() as f64)
}

impl UserSpeed {
    fn of(mut speeds: Vec<f64>) -> Option<UserSpeed> {
        speeds.sort_by(f64::total_cmp);
        let mean = speeds.iter().sum::<f64>() / speeds.len() as f64;
        Some(UserSpeed { p10: quantile(&speeds, 0.1)?, mean })
    }
}

impl Percentiles {
    fn of(mut values: Vec<f64>) -> Option<Percentiles> {
        values.sort_by(f64::total_cmp);
        let at = |part| quantile(&values, part);
        Some(Percentiles { p50: at(0.5)?, p90: at(0.9)?, p99: at(0.99)? })
    }
}

/// Between two values it lies on the line between them, as with most who measure servers.
fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let place = part * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(below + place.fract() * (above - below))
}

#[cfg(test)]
mod tests {
    use super::super::window::tests::{failed, record};
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        let hundred: Vec<f64> = (0..=100).map(f64::from).collect();
        let shuffled = hundred.iter().map(|value| (value * 37.0) % 101.0).collect();
        assert_eq!(Percentiles::of(shuffled), Some(Percentiles { p50: 50.0, p90: 90.0, p99: 99.0 }));
        assert_eq!(quantile(&[1.0, 2.0], 0.9), Some(1.9));
        assert_eq!(Percentiles::of(vec![3.0]), Some(Percentiles { p50: 3.0, p90: 3.0, p99: 3.0 }));
        assert_eq!((Percentiles::of(Vec::new()), UserSpeed::of(Vec::new())), (None, None));
    }

    #[test]
    fn a_request_is_measured_by_its_chunks_and_tokens() {
        // 8 tokens in 4 chunks: 7 tokens in the 3 seconds behind the first chunk.
        let mut records = vec![record(0, 0.5, &[1.0, 2.0, 3.0, 4.0]), failed(0, 4.0, 4.5), failed(0, 4.5, 5.0)];
        let counts = records[0].outcome.as_mut().unwrap();
        (counts.accepted, counts.rejected) = (Some(4), Some(2));
        let figures = Figures::of(Load::Streams(1), &records);
        assert_eq!((figures.requests, figures.failed, figures.tokens, figures.prompt_tokens), (3, 2, 8, 10));
        assert_eq!(figures.failures["HTTP 503"], Failures { requests: 2, example: "full".to_string() });
        assert_eq!(figures.ttft_ms.unwrap().p50, 500.0);
        assert_eq!(figures.e2e_ms.unwrap().p99, 3500.0);
        assert_eq!(figures.chunk_gap_ms.unwrap().p90, 1000.0);
        assert!((figures.tpot_ms.unwrap().p50 - 3000.0 / 7.0).abs() < 1e-9);
        assert!((figures.user_tokens_per_second.unwrap().p10 - 7.0 / 3.0).abs() < 1e-9);
        assert_eq!((figures.accepted_per_request, figures.rejected_per_request), (Some(4.0), Some(2.0)));
        // Three of four chunks within 1 to 5 seconds: 6 tokens.
        assert_eq!((figures.window.seconds(), figures.tokens_per_second), (4.0, 1.5));
        assert_eq!((figures.requests_per_second, figures.tokens_per_chunk), (0.1875, Some(2.0)));
    }

    #[test]
    fn failures_alone_have_no_times() {
        let figures = Figures::of(Load::Rate(1.0), &[failed(0, 0.0, 1.0)]);
        assert_eq!((figures.requests, figures.failed, figures.tokens_per_second), (1, 1, 0.0));
        assert_eq!((figures.ttft_ms, figures.user_tokens_per_second, figures.tokens_per_chunk), (None, None, None));
    }
}

//! The part of a measurement in which the load was what it was meant to be (see the head of this module's parent).

use serde::Serialize;

use super::Load;
use super::answer::Record;

/// Seconds since the measurement began; what comes at `from` itself lies outside.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Window {
    #[serde(rename = "from_s")]
    pub from: f64,
    #[serde(rename = "until_s")]
    pub until: f64,
    /// False where the load never was: then this is the whole run.
    pub steady: bool,
}

impl Window {
    pub fn of(load: Load, records: &[Record]) -> Window {
        let steady = match load {
            Load::Streams(streams) => closed(streams, records),
            Load::Rate(_) => open(records),
        };
        let whole = (least(records.iter().map(|record| record.sent)), most(records.iter().map(|record| record.end)));
        match (steady, whole) {
            (Some((from, until)), _) if from < until => Window { from, until, steady: true },
            (_, (Some(from), Some(until))) => Window { from, until, steady: false },
            _ => Window { from: 0.0, until: 0.0, steady: false },
        }
    }

    pub fn seconds(&self) -> f64 {
        self.until - self.from
    }

    /// How much of a request came within the window, by its chunks.
    pub fn share(&self, record: &Record) -> f64 {
        let times = if record.chunks.is_empty() { &[record.end][..] } else { &record.chunks };
        let within = times.iter().filter(|&&time| self.from < time && time <= self.until).count();
        within as f64 / times.len() as f64
    }
}

/// From when every stream runs until the first has no more work; None if one never ran.
fn closed(streams: usize, records: &[Record]) -> Option<(f64, f64)> {
    let of = |stream| records.iter().filter(move |record| record.stream == stream);
    let running = |stream| {
        let first = of(stream).min_by(|a, b| a.sent.total_cmp(&b.sent))?;
        // A first request that fails does not keep the others waiting.
        Some(first.chunks.first().copied().unwrap_or(first.end))
    };
    let all_run = (0..streams).map(running).collect::<Option<Vec<f64>>>()?;
    let out_of_work = (0..streams).filter_map(|stream| most(of(stream).map(|record| record.end)));
    Some((most(all_run)?, least(out_of_work)?))
}

/// From the first chunk of all until the last request arrives.
fn open(records: &[Record]) -> Option<(f64, f64)> {
    let first = least(records.iter().filter_map(|record| record.chunks.first().copied()))?;
    Some((first, most(records.iter().map(|record| record.sent))?))
}

fn least(times: impl IntoIterator<Item = f64>) -> Option<f64> {
    times.into_iter().min_by(f64::total_cmp)
}

fn most(times: impl IntoIterator<Item = f64>) -> Option<f64> {
    times.into_iter().max_by(f64::total_cmp)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::answer::{Counts, Failure, FailureKind};
    use super::*;

    /// A request with a chunk of two tokens at each of these times, the last of which is its end.
    pub fn record(stream: usize, sent: f64, chunks: &[f64]) -> Record {
        let counts = Counts { tokens: 2 * chunks.len(), prompt_tokens: Some(10), ..Counts::default() };
        Record { stream, sent, chunks: chunks.to_vec(), end: *chunks.last().unwrap(), outcome: Ok(counts) }
    }

    pub fn failed(stream: usize, sent: f64, end: f64) -> Record {
        let failure = Failure { kind: FailureKind::Status(503), message: "full".to_string() };
        Record { stream, sent, chunks: Vec::new(), end, outcome: Err(failure) }
    }

    #[test]
    fn a_closed_window_is_when_all_streams_run() {
        let records = [
            record(0, 0.0, &[1.0, 2.0, 3.0, 4.0]),
            record(1, 0.0, &[1.5, 2.5]),
            record(1, 2.5, &[3.5, 6.5]),
            record(0, 4.0, &[5.0]),
        ];
        let window = Window::of(Load::Streams(2), &records);
        assert_eq!(window, Window { from: 1.5, until: 5.0, steady: true });
        assert_eq!(records.each_ref().map(|record| window.share(record)), [0.75, 0.5, 0.5, 1.0]);
        // A third stream never ran: the whole run.
        let window = Window::of(Load::Streams(3), &records);
        assert_eq!(window, Window { from: 0.0, until: 6.5, steady: false });
        assert!(records.iter().all(|record| window.share(record) == 1.0));
    }

    #[test]
    fn a_stream_whose_first_request_fails_runs_all_the_same() {
        let records = [record(0, 0.0, &[1.0, 9.0]), failed(1, 0.0, 2.0), record(1, 2.0, &[3.0, 8.0])];
        assert_eq!(Window::of(Load::Streams(2), &records), Window { from: 2.0, until: 8.0, steady: true });
    }

    #[test]
    fn an_open_window_ends_with_the_last_arrival() {
        let records = [record(0, 0.5, &[1.0, 2.0]), record(0, 4.0, &[5.0, 6.0]), failed(0, 3.0, 3.5)];
        assert_eq!(Window::of(Load::Rate(1.0), &records), Window { from: 1.0, until: 4.0, steady: true });
        assert_eq!(Window::of(Load::Rate(1.0), &records[..1]), Window { from: 0.5, until: 2.0, steady: false });
        assert_eq!(Window::of(Load::Rate(1.0), &[]).seconds(), 0.0);
    }
}

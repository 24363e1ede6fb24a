//! A report as two tables for people, speeds and latencies, and what is to be known about them.

use super::Report;
use super::figures::{Failures, Figures, Percentiles};
use super::report::Entry;
use crate::eval::table::{NOTHING, align, without_empty_columns};

/// Columns that are aligned to the left: load and policy.
const NAMES: usize = 2;
/// A steady window shorter than this says little.
const SHORT: f64 = 2.0;

pub fn render(report: &Report) -> String {
    let mut text = String::new();
    if !report.entries().is_empty() {
        let head = |columns: &[&str]| columns.iter().map(|column| column.to_string()).collect();
        let mut speeds = vec![head(&SPEEDS)];
        speeds.extend(report.entries().iter().map(|entry| speed_row(report, entry)));
        let mut latencies = vec![head(&LATENCIES)];
        latencies.extend(report.entries().iter().map(latency_row));
        text += &align(&without_empty_columns(speeds), NAMES);
        text.push('\n');
        text += &align(&without_empty_columns(latencies), NAMES);
    }
    text += &notes(report);
    text
}

const SPEEDS: [&str; 13] = [
    "load",
    "policy",
    "requests",
    "failed",
    "tokens/s",
    "ratio",
    "user tokens/s",
    "p10",
    "ratio",
    "frontier",
    "requests/s",
    "accepted",
    "window s",
];

fn speed_row(report: &Report, entry: &Entry) -> Vec<String> {
    let Entry { load, policy, figures } = entry;
    let (ratios, user) = (report.ratios(entry), figures.user_tokens_per_second);
    let frontier = if report.on_frontier(entry) { "*" } else { NOTHING };
    // Of one policy, every point may well lie there.
    let frontier = if report.policies.len() > 1 { frontier } else { NOTHING };
    vec![
        load.to_string(),
        policy.to_string(),
        figures.requests.to_string(),
        figures.failed.to_string(),
        format!("{:.1}", figures.tokens_per_second),
        some(ratios.tokens_per_second, 2),
        some(user.map(|speed| speed.mean), 1),
        some(user.map(|speed| speed.p10), 1),
        some(ratios.user_tokens_per_second, 2),
        frontier.to_string(),
        format!("{:.2}", figures.requests_per_second),
        some(figures.accepted_per_request, 1),
        format!("{:.1}", figures.window.seconds()),
    ]
}

const LATENCIES: [&str; 11] =
    ["load", "policy", "TTFT ms p50", "p90", "p99", "TPOT ms p50", "p90", "p99", "E2E ms p50", "p90", "p99"];

fn latency_row(entry: &Entry) -> Vec<String> {
    let Figures { ttft_ms, tpot_ms, e2e_ms, .. } = &entry.figures;
    let percentiles = |values: &Option<Percentiles>, digits| {
        let of = |part: fn(&Percentiles) -> f64| some(values.as_ref().map(part), digits);
        [of(|values| values.p50), of(|values| values.p90), of(|values| values.p99)]
    };
    let mut row = vec![entry.load.to_string(), entry.policy.to_string()];
    row.extend(percentiles(ttft_ms, 1));
    row.extend(percentiles(tpot_ms, 2));
    row.extend(percentiles(e2e_ms, 0));
    row
}

fn some(value: Option<f64>, digits: usize) -> String {
    value.map_or(NOTHING.to_string(), |value| format!("{value:.digits$}"))
}

fn notes(report: &Report) -> String {
    let mut text = String::new();
    let mut note = |entry: &Entry, what: String| {
        let Entry { load, policy, .. } = entry;
        let policy = policy.0.as_ref().map_or(String::new(), |policy| format!(", {policy}"));
        text += &format!("{load}{policy}: {what}\n");
    };
    for entry in report.entries() {
        let figures = &entry.figures;
        for (kind, Failures { requests, example }) in &figures.failures {
            note(entry, format!("{requests} failed: {kind} ({example})"));
        }
        if figures.guessed > 0 {
            note(entry, format!("{} without a usage: each chunk is counted as one token", figures.guessed));
        }
        if !figures.window.steady {
            note(entry, "the load was never steady: speeds are of the whole run".to_string());
        } else if figures.window.seconds() < SHORT {
            note(entry, format!("steady for {:.2} s only", figures.window.seconds()));
        }
    }
    if report.partial {
        text += "partial: ended before everything was measured\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn speeds_and_latencies_are_aligned_and_notes_follow() {
        let mut report = report();
        report.partial = true;
        let text = render(&report);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..3],
            [
                "load       policy   requests  failed  tokens/s  ratio  user tokens/s    p10  ratio  frontier  requests/s  accepted  window s",
                "1 stream   off             1       0     100.0      -          105.6  105.6      -         -        5.00         -       0.2",
                "1 stream   fixed:1         2       1     200.0   2.00          211.1  211.1   2.00         -       10.00      10.0       0.1",
            ],
            "{text}"
        );
        assert_eq!(
            lines[5..8],
            [
                "",
                "load       policy   TTFT ms p50   p90   p99  TPOT ms p50   p90   p99  E2E ms p50  p90  p99",
                "1 stream   off             20.0  20.0  20.0         9.47  9.47  9.47         200  200  200",
            ],
            "{text}"
        );
        assert_eq!(lines[11], "1 stream, off: steady for 0.18 s only");
        assert_eq!(lines[12], "1 stream, fixed:1: 1 failed: HTTP 503 (full)");
        assert_eq!(*lines.last().unwrap(), "partial: ended before everything was measured");
    }
}

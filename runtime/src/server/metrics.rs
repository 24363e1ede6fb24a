//! `GET /metrics`, in Prometheus' text format: what the service counts, and what clients wait for.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Server;
use crate::serving::{Counters, Facts};

/// Upper bounds of buckets, in seconds: of whole answers and first tokens, and of one token behind the first.
const ANSWER_BOUNDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0];
const TOKEN_BOUNDS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0];

/// What is measured here, beside what the service counts.
#[derive(Debug)]
pub struct Metrics(Mutex<Measured>);

#[derive(Debug)]
struct Measured {
    /// By route and status.
    requests: BTreeMap<(String, u16), u64>,
    first_token: Histogram,
    per_token: Histogram,
    answer: Histogram,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics(Mutex::new(Measured {
            requests: BTreeMap::new(),
            first_token: Histogram::new(ANSWER_BOUNDS),
            per_token: Histogram::new(TOKEN_BOUNDS),
            answer: Histogram::new(ANSWER_BOUNDS),
        }))
    }
}

impl Metrics {
    fn with<T>(&self, act: impl FnOnce(&mut Measured) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The times of one answer.
#[derive(Debug)]
pub struct Stopwatch {
    to: Arc<Metrics>,
    start: Instant,
    first: Option<Instant>,
}

impl Stopwatch {
    pub fn start(to: Arc<Metrics>) -> Stopwatch {
        Stopwatch { to, start: Instant::now(), first: None }
    }

    /// To be told of every token; the first counts.
    pub fn first_token(&mut self) {
        if self.first.is_none() {
            let now = Instant::now();
            self.first = Some(now);
            self.to.with(|measured| measured.first_token.record(now - self.start));
        }
    }

    pub fn end(&self, tokens: usize) {
        let now = Instant::now();
        self.to.with(|measured| {
            measured.answer.record(now - self.start);
            if let (Some(first), 2..) = (self.first, tokens) {
                measured.per_token.record((now - first).div_f64((tokens - 1) as f64));
            }
        });
    }
}

#[derive(Debug)]
struct Histogram {
    bounds: &'static [f64],
    /// Those up to each bound and above the one before; the last are above all.
    counts: Vec<u64>,
    sum: Duration,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: vec![0; bounds.len() + 1], sum: Duration::ZERO }
    }

    fn record(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.counts[self.bounds.partition_point(|&bound| bound < seconds)] += 1;
        self.sum += time;
    }
}

/// Counts requests by route and status. What is no route of ours is one label, or strangers could make up any number.
pub async fn count(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_string();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    server.metrics.with(|measured| *measured.requests.entry((route, status)).or_default() += 1);
    response
}

pub async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let mut page = Page::default();
    page.facts(&server.options.model_name, server.service.facts());
    page.counters(&server.service.counters());
    server.metrics.with(|measured| page.measured(measured));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page.0).into_response()
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn facts(&mut self, model: &str, facts: &Facts) {
        let version = env!("CARGO_PKG_VERSION");
        let labels = [("version", version), ("model", model), ("device", &facts.device), ("drafter", facts.drafter)];
        self.head("info", "gauge", "What runs here.");
        self.line("info", &labels, 1);
        self.gauge("max_running_requests", "Sequences that run at once.", facts.max_requests);
        self.gauge("context_tokens", "Tokens of a sequence, prompt included.", facts.context);
    }

    fn counters(&mut self, c: &Counters) {
        self.counter("rounds_total", "Rounds of all running sequences together.", c.rounds);
        self.counter("round_seconds_total", "Seconds of all rounds.", c.round_seconds);
        self.counter("device_seconds_total", "Of these, seconds of waiting for the device.", c.device_seconds);
        self.counter("requests_total", "Answers that were asked for.", c.requests);
        self.counter("requests_cancelled_total", "Answers whose reader left.", c.cancelled);
        self.counter(
            "requests_preempted_total",
            "Answers that gave their pages up to others for a while.",
            c.preempted,
        );
        self.counter("prompt_tokens_total", "Tokens of prompts.", c.prompt_tokens);
        self.counter("cached_tokens_total", "Tokens of prompts that were in the cache already.", c.cached_tokens);
        self.counter("generated_tokens_total", "Tokens of answers.", c.new_tokens);
        self.counter("draft_tokens_total", "Draft tokens that were verified.", c.drafted);
        self.counter("accepted_tokens_total", "Draft tokens that were accepted.", c.accepted);
        let depths = |entry: fn(&(u64, u64)) -> u64| {
            c.by_depth.iter().zip(1..).map(move |(counts, depth)| (depth, entry(counts))).collect::<Vec<_>>()
        };
        let help = "Rounds of a sequence whose tree reached this depth.";
        self.by_depth("depth_rounds_total", help, &depths(|&(reached, _)| reached));
        let help = "Rounds of a sequence that accepted a token at this depth.";
        self.by_depth("depth_accepted_total", help, &depths(|&(_, accepted)| accepted));
        self.gauge("running_requests", "Sequences that run now.", c.running);
        self.gauge("waiting_requests", "Answers that wait for their turn.", c.waiting);
        self.gauge("cache_pages_used", "Pages of the cache that hold something.", c.pages_used);
        self.gauge("cache_pages", "Pages of the cache.", c.pages);
    }

    fn measured(&mut self, measured: &Measured) {
        let help = "From the request, queue included, to the first token of an answer.";
        self.histogram("time_to_first_token_seconds", help, &measured.first_token);
        let help = "Mean time of a token behind the first of an answer.";
        self.histogram("time_per_output_token_seconds", help, &measured.per_token);
        self.histogram("answer_seconds", "From the request to the end of an answer.", &measured.answer);
        self.head("http_requests_total", "counter", "HTTP requests by route and status.");
        for ((route, status), count) in &measured.requests {
            self.line("http_requests_total", &[("route", route), ("status", &status.to_string())], count);
        }
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP treespark_{name} {help}\n# TYPE treespark_{name} {kind}\n");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<String> = labels.iter().map(|(label, text)| format!("{label}=\"{}\"", escaped(text))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "treespark_{name}{labels} {value}");
    }

    fn counter(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.head(name, "counter", help);
        self.line(name, &[], value);
    }

    fn gauge(&mut self, name: &str, help: &str, value: usize) {
        self.head(name, "gauge", help);
        self.line(name, &[], value);
    }

    fn by_depth(&mut self, name: &str, help: &str, counts: &[(u32, u64)]) {
        self.head(name, "counter", help);
        for (depth, count) in counts {
            self.line(name, &[("depth", &depth.to_string())], count);
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let (bucket, mut total) = (format!("{name}_bucket"), 0);
        let bounds = histogram.bounds.iter().map(f64::to_string).chain(["+Inf".to_string()]);
        for (bound, count) in bounds.zip(&histogram.counts) {
            total += count;
            self.line(&bucket, &[("le", &bound)], total);
        }
        self.line(&format!("{name}_sum"), &[], histogram.sum.as_secs_f64());
        self.line(&format!("{name}_count"), &[], total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_is_up_to_their_bound() {
        let mut histogram = Histogram::new(&[0.5, 1.0]);
        for milliseconds in [0, 500, 501, 1000, 3000] {
            histogram.record(Duration::from_millis(milliseconds));
        }
        let mut page = Page::default();
        page.histogram("x_seconds", "Some.", &histogram);
        let expected = [
            "# HELP treespark_x_seconds Some.",
            "# TYPE treespark_x_seconds histogram",
            "treespark_x_seconds_bucket{le=\"0.5\"} 2",
            "treespark_x_seconds_bucket{le=\"1\"} 4",
            "treespark_x_seconds_bucket{le=\"+Inf\"} 5",
            "treespark_x_seconds_sum 5.001",
            "treespark_x_seconds_count 5",
        ];
        assert_eq!(page.0.lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn labels_are_escaped_and_depths_count_from_one() {
        let mut page = Page::default();
        page.line("info", &[("model", "a\\b\"c\nd")], 1);
        assert_eq!(page.0, "treespark_info{model=\"a\\\\b\\\"c\\nd\"} 1\n");
        let mut page = Page::default();
        page.counters(&Counters { by_depth: vec![(9, 5), (4, 1)], ..Counters::default() });
        assert!(page.0.contains("treespark_depth_rounds_total{depth=\"1\"} 9\n"), "{}", page.0);
        assert!(page.0.contains("treespark_depth_accepted_total{depth=\"2\"} 1\n"), "{}", page.0);
    }

    #[test]
    fn one_token_has_no_time_behind_the_first() {
        let metrics = Arc::new(Metrics::default());
        let counts = |metrics: &Metrics| {
            let count = |histogram: &Histogram| histogram.counts.iter().sum::<u64>();
            metrics.with(|m| [count(&m.first_token), count(&m.per_token), count(&m.answer)])
        };
        for (tokens, expected) in [(1, [1, 0, 1]), (3, [2, 1, 2])] {
            let mut watch = Stopwatch::start(metrics.clone());
            (0..tokens).for_each(|_| watch.first_token());
            watch.end(tokens);
            assert_eq!(counts(&metrics), expected);
        }
    }
}

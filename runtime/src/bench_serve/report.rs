//! What a run found: one entry for every load and policy, beside the first policy's at the same load.

use serde_json::{Value, json};

use super::answer::Record;
use super::figures::Figures;
use super::{Load, Plan, Policy};

#[derive(Debug)]
pub struct Report {
    /// It was ended before all was measured.
    pub partial: bool,
    /// The one that answered.
    pub model: String,
    pub policies: Vec<Policy>,
    loads: Vec<Load>,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone)]
pub struct Entry {
    pub load: Load,
    pub policy: Policy,
    pub figures: Figures,
}

/// Against the first policy at the same load.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratios {
    pub tokens_per_second: Option<f64>,
    pub user_tokens_per_second: Option<f64>,
}

impl Report {
    pub fn new(plan: &Plan) -> Report {
        let (policies, loads) = (plan.policies.clone(), plan.loads.clone());
        Report { partial: false, model: String::new(), policies, loads, entries: Vec::new() }
    }

    pub fn add(&mut self, load: Load, policy: Policy, records: &[Record]) {
        self.entries.push(Entry { load, policy, figures: Figures::of(load, records) });
        // As they were asked for, whichever was measured first.
        self.entries.sort_by_key(|entry| {
            let policy = self.policies.iter().position(|policy| *policy == entry.policy);
            (self.loads.iter().position(|load| *load == entry.load), policy)
        });
    }

    /// Load by load, and there policy by policy.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub fn ratios(&self, entry: &Entry) -> Ratios {
        let is_base = |other: &&Entry| other.load == entry.load && other.policy == self.policies[0];
        let base = self.entries.iter().find(is_base).filter(|base| base.policy != entry.policy);
        let ratio = |of: fn(&Figures) -> Option<f64>| {
            let (base, this) = (of(&base?.figures)?, of(&entry.figures)?);
            (base > 0.0).then_some(this / base)
        };
        Ratios {
            tokens_per_second: ratio(|figures| Some(figures.tokens_per_second)),
            user_tokens_per_second: ratio(user),
        }
    }

    /// No other entry is faster for its users without being slower in all, or the other way round.
    pub fn on_frontier(&self, entry: &Entry) -> bool {
        let place = |entry: &Entry| Some((entry.figures.tokens_per_second, user(&entry.figures)?));
        let Some((total, each)) = place(entry) else { return false };
        let better = |(a, b): (f64, f64)| a >= total && b >= each && (a, b) != (total, each);
        !self.entries.iter().filter_map(place).any(better)
    }

    /// Not one request succeeded.
    pub fn all_failed(&self) -> bool {
        self.entries.iter().all(|entry| entry.figures.requests == entry.figures.failed)
    }

    pub fn to_json(&self) -> Value {
        let points = self.entries.iter().map(|entry| {
            let mut point = json!({ "policy": entry.policy, "load": entry.load });
            let figures = serde_json::to_value(&entry.figures).expect("plain numbers and strings");
            let ratios = self.ratios(entry);
            let fields = point.as_object_mut().expect("made as one");
            fields.extend(figures.as_object().cloned().into_iter().flatten());
            point["times_first_policy"] = json!({
                "tokens_per_second": ratios.tokens_per_second,
                "user_tokens_per_second": ratios.user_tokens_per_second,
            });
            point["on_frontier"] = json!(self.on_frontier(entry));
            point
        });
        json!({ "partial": self.partial, "model": self.model, "points": points.collect::<Vec<_>>() })
    }
}

/// Tokens a second that a user sees, on average.
pub fn user(figures: &Figures) -> Option<f64> {
    figures.user_tokens_per_second.map(|speed| speed.mean)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::plan::tests::plan;
    use super::super::window::tests::{failed, record};
    use super::*;

    /// `off` and `fixed:1` at one and two streams, the latter twice as fast and with a failure; measured in turn.
    pub fn report() -> Report {
        let plan = plan(&["off", "fixed:1"], &[1, 2].map(Load::Streams));
        let mut report = Report::new(&plan);
        for (load, policy) in plan.measurements() {
            let Load::Streams(streams) = load else { unreachable!("as planned") };
            let step = if policy == plan.policies[0] { 0.02 } else { 0.01 };
            let times: Vec<f64> = (1..=10).map(|i| f64::from(i) * step).collect();
            let mut records: Vec<Record> = (0..streams).map(|stream| record(stream, 0.0, &times)).collect();
            if policy != plan.policies[0] {
                records[0].outcome.as_mut().unwrap().accepted = Some(10);
                records.push(failed(0, 0.1, 0.1));
            }
            report.add(load, policy, &records);
        }
        report
    }

    #[test]
    fn entries_are_in_the_order_asked_for_beside_the_first_policy() {
        let report = report();
        let text = |entry: &Entry| format!("{} {}", entry.load, entry.policy);
        let rows: Vec<String> = report.entries().iter().map(text).collect();
        assert_eq!(rows, ["1 stream off", "1 stream fixed:1", "2 streams off", "2 streams fixed:1"]);
        let ratios: Vec<Ratios> = report.entries().iter().map(|entry| report.ratios(entry)).collect();
        assert_eq!(ratios[0], Ratios { tokens_per_second: None, user_tokens_per_second: None });
        for ratio in [ratios[1].tokens_per_second, ratios[3].user_tokens_per_second] {
            assert!((ratio.unwrap() - 2.0).abs() < 1e-9, "{ratios:?}");
        }
        let frontier: Vec<bool> = report.entries().iter().map(|entry| report.on_frontier(entry)).collect();
        assert_eq!(frontier, [false, false, false, true]);
        assert!(!report.all_failed());
    }

    #[test]
    fn json_holds_loads_figures_and_ratios() {
        let json = report().to_json();
        let point = &json["points"][3];
        assert_eq!((&point["policy"], &point["load"]), (&json!("fixed:1"), &json!({ "streams": 2 })));
        assert_eq!((point["requests"].as_u64(), point["failed"].as_u64()), (Some(3), Some(1)));
        assert_eq!(point["failures"]["HTTP 503"], json!({ "requests": 1, "example": "full" }));
        assert_eq!((point["window"]["steady"].as_bool(), point["on_frontier"].as_bool()), (Some(true), Some(true)));
        assert!(point["ttft_ms"]["p99"].is_f64() && point["times_first_policy"]["tokens_per_second"].is_f64());
    }
}

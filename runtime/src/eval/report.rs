//! What an evaluation found: one entry for every set and combination, and what follows from them.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use super::tally::{Figures, Tally};
use super::{PromptSet, Reference, Setup};

#[derive(Debug, Default)]
pub struct Report {
    /// It was ended before all was measured.
    pub partial: bool,
    pub reference: Option<Reference>,
    entries: Vec<Entry>,
    /// Of each set: prompts with a turn that did not fit the context.
    too_long: BTreeMap<String, usize>,
}

/// What tells one column of measurements from another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Combination {
    /// As it was asked for.
    pub drafter: String,
    /// What it turned out to be.
    pub used: String,
    /// `auto`, a number of nodes, a shape, or `-` where nothing is drafted.
    pub budget: String,
    #[serde(serialize_with = "as_written")]
    pub temperature: f32,
}

#[derive(Debug, Clone)]
pub struct Entry {
    pub set: String,
    pub combination: Combination,
    pub tally: Tally,
    /// Plain decoding of the same prompts in turn with this.
    pub plain: Option<Tally>,
    /// Prompts whose tokens differ from plain decoding's.
    pub differences: Vec<Difference>,
    pub figures: Figures,
}

/// Where an answer first parts from plain decoding's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Line of the prompt in its file, from 1.
    pub line: usize,
    /// From 1.
    pub turn: usize,
    /// Of the answer, from 0.
    pub token: usize,
}

/// What was measured of one set: the contenders' sums in the order of their turns.
#[derive(Debug)]
pub struct Outcome {
    pub tallies: Vec<Tally>,
    pub differences: Vec<Difference>,
    pub too_long: usize,
}

/// One combination over all sets, unweighted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mean {
    #[serde(flatten)]
    pub combination: Combination,
    pub sets: usize,
    pub prompts: usize,
    pub tokens: usize,
    /// Prompts whose tokens differ from plain decoding's, where that was measured.
    pub different_prompts: Option<usize>,
    #[serde(flatten)]
    pub figures: Figures,
    /// The lowest ratio to plain decoding, and the set that it is of.
    pub lowest_times_plain: Option<(f64, String)>,
}

/// 0.6 as 0.6, not as the nearest f32 in the digits of an f64.
fn as_written<S: serde::Serializer>(number: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(number.to_string().parse().unwrap_or(f64::from(*number)))
}

impl Report {
    pub fn new(reference: Option<Reference>) -> Report {
        Report { reference, ..Report::default() }
    }

    /// Books a set that a setup has run through, or what it got through of it. `used` is the drafter's own name.
    pub fn add(&mut self, set: &PromptSet, setup: &Setup, used: &str, temperature: f32, outcome: Outcome) {
        let Outcome { mut tallies, differences, too_long } = outcome;
        let most = self.too_long.entry(set.name.clone()).or_default();
        *most = too_long.max(*most);
        let (tally, plain) = (tallies.pop(), tallies.pop());
        let combination = |setup: &Setup, used: &str| Combination {
            drafter: setup.drafter_text().to_string(),
            used: used.to_string(),
            budget: setup.budget_text(),
            temperature,
        };
        // Plain decoding is measured beside every setup; it is told of once.
        let base = combination(&Setup::plain(), "none");
        if let Some(plain) = plain.clone().filter(|_| !self.has(&set.name, &base)) {
            self.push(&set.name, base, plain, None, Vec::new());
        }
        if let Some(tally) = tally {
            self.push(&set.name, combination(setup, used), tally, plain, differences);
        }
    }

    fn has(&self, set: &str, combination: &Combination) -> bool {
        self.entries.iter().any(|entry| entry.set == set && entry.combination == *combination)
    }

    fn push(
        &mut self,
        set: &str,
        combination: Combination,
        tally: Tally,
        plain: Option<Tally>,
        differences: Vec<Difference>,
    ) {
        if tally.sums.rounds == 0 {
            return;
        }
        let reference = self.reference.as_ref().and_then(|reference| reference.tokens_per_round(&combination, set));
        let figures = tally.figures(plain.as_ref(), reference);
        self.entries.push(Entry { set: set.to_string(), combination, tally, plain, differences, figures });
    }

    /// Set by set, temperature by temperature, in the order of their first appearance.
    pub fn entries(&self) -> Vec<&Entry> {
        let set = |entry: &Entry| self.entries.iter().position(|first| first.set == entry.set);
        let temperature = |entry: &Entry| {
            let same = |first: &Entry| first.combination.temperature == entry.combination.temperature;
            self.entries.iter().position(same)
        };
        let mut entries: Vec<&Entry> = self.entries.iter().collect();
        entries.sort_by_key(|entry| (set(entry), temperature(entry)));
        entries
    }

    /// One for every combination.
    pub fn means(&self) -> Vec<Mean> {
        let mut groups: Vec<(&Combination, Vec<&Entry>)> = Vec::new();
        for entry in self.entries() {
            match groups.iter_mut().find(|(combination, _)| **combination == entry.combination) {
                Some((_, entries)) => entries.push(entry),
                None => groups.push((&entry.combination, vec![entry])),
            }
        }
        groups.into_iter().map(|(combination, entries)| Mean::of(combination, &entries)).collect()
    }

    /// Sets with prompts that were left out, at least in part, and how many.
    pub fn too_long(&self) -> impl Iterator<Item = (&str, usize)> {
        self.too_long.iter().filter(|(_, prompts)| **prompts > 0).map(|(set, prompts)| (set.as_str(), *prompts))
    }

    /// What ran all this, by its own name.
    pub fn backend(&self) -> &str {
        self.entries.first().map_or("", |entry| &entry.tally.sums.backend)
    }

    pub fn to_json(&self) -> Value {
        let source = self.reference.as_ref().map(|reference| &reference.source);
        json!({
            "partial": self.partial,
            "backend": self.backend(),
            "results": self.entries().into_iter().map(Entry::to_json).collect::<Vec<_>>(),
            "means": self.means(),
            "too_long": self.too_long,
            "reference": source,
        })
    }
}

impl Entry {
    fn to_json(&self) -> Value {
        let mut value = json!({ "set": self.set });
        let figures = serde_json::to_value(&self.figures).expect("plain numbers");
        let combination = serde_json::to_value(&self.combination).expect("plain numbers and strings");
        for part in [combination, self.tally.to_json(), figures] {
            let fields = value.as_object_mut().expect("made as one");
            fields.extend(part.as_object().cloned().into_iter().flatten());
        }
        value["plain"] = self.plain.as_ref().map_or(Value::Null, Tally::to_json);
        value["different_prompts"] = self.plain.as_ref().map(|_| self.differences.len()).into();
        value["differences"] = serde_json::to_value(&self.differences).expect("plain numbers");
        value
    }
}

impl Mean {
    fn of(combination: &Combination, entries: &[&Entry]) -> Mean {
        let ratios = entries.iter().filter_map(|entry| Some((entry.figures.times_plain?, entry.set.clone())));
        let compared = entries.iter().any(|entry| entry.plain.is_some());
        let figures: Vec<Figures> = entries.iter().map(|entry| entry.figures.clone()).collect();
        Mean {
            combination: combination.clone(),
            sets: entries.len(),
            prompts: entries.iter().map(|entry| entry.tally.prompts).sum(),
            tokens: entries.iter().map(|entry| entry.tally.sums.new_tokens).sum(),
            different_prompts: compared.then(|| entries.iter().map(|entry| entry.differences.len()).sum()),
            figures: Figures::mean(&figures),
            lowest_times_plain: ratios.min_by(|a, b| a.0.total_cmp(&b.0)),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::DrafterChoice;
    use crate::eval::Budget;
    use crate::eval::tally::tests::answer;

    fn tally(tokens: usize, rounds: usize, seconds: f64) -> Tally {
        let mut tally = Tally { prompts: 2, ..Tally::default() };
        tally.add(answer(tokens, rounds, seconds, &[(rounds, rounds / 2)]));
        tally
    }

    /// Two sets, ngram with 8 and 16 nodes beside plain decoding, at two temperatures; the second set is twice as fast.
    pub fn report() -> Report {
        let mut report = Report::default();
        for nodes in [8, 16] {
            let setup = Setup { drafter: DrafterChoice::Ngram, budget: Budget::Nodes(nodes) };
            for temperature in [0.0, 0.6] {
                for (name, speed) in [("first", 1.0), ("second", 2.0)] {
                    let set = PromptSet { name: name.to_string(), path: name.into(), prompts: Vec::new() };
                    let tallies = vec![tally(100, 100, 10.0), tally(100, 50, 8.0 / speed)];
                    let differences = vec![Difference { line: 3, turn: 1, token: 9 }];
                    report.add(&set, &setup, "ngram", temperature, Outcome { tallies, differences, too_long: 1 });
                }
            }
        }
        report
    }

    #[test]
    fn entries_come_set_by_set_and_plain_decoding_once() {
        let report = report();
        let row = |e: &Entry| format!("{} {} {}", e.set, e.combination.budget, e.combination.temperature);
        let rows: Vec<String> = report.entries().into_iter().map(row).collect();
        let of = |set: &str| ["- 0", "8 0", "16 0", "- 0.6", "8 0.6", "16 0.6"].map(|rest| format!("{set} {rest}"));
        assert_eq!(rows, [of("first"), of("second")].concat());
        assert_eq!(report.too_long().collect::<Vec<_>>(), [("first", 1), ("second", 1)]);
    }

    #[test]
    fn means_are_over_sets_and_name_the_lowest_ratio() {
        let means = report().means();
        assert_eq!(means.len(), 6);
        let ngram = &means[1];
        assert_eq!((ngram.combination.budget.as_str(), ngram.sets, ngram.prompts, ngram.tokens), ("8", 2, 4, 200));
        assert_eq!(ngram.figures.times_plain, Some((1.25 + 2.5) / 2.0));
        assert_eq!(ngram.lowest_times_plain, Some((1.25, "first".to_string())));
        assert_eq!((means[0].different_prompts, ngram.different_prompts), (None, Some(2)));
    }

    #[test]
    fn json_holds_sums_and_figures() {
        let json = report().to_json();
        let entry = &json["results"][1];
        assert_eq!((entry["set"].as_str(), entry["drafter"].as_str()), (Some("first"), Some("ngram")));
        assert_eq!((entry["tokens"].as_u64(), entry["plain"]["tokens"].as_u64()), (Some(100), Some(100)));
        assert_eq!((entry["times_plain"].as_f64(), entry["tokens_per_round"].as_f64()), (Some(1.25), Some(2.0)));
        assert_eq!(entry["differences"][0], json!({"line": 3, "turn": 1, "token": 9}));
        assert_eq!(json["results"][4]["temperature"], 0.6);
        assert_eq!(json["means"].as_array().unwrap().len(), 6);
    }

    #[test]
    fn a_set_without_an_answer_has_no_entry() {
        let mut report = Report::default();
        let set = PromptSet { name: "set".to_string(), path: "set".into(), prompts: Vec::new() };
        let outcome = Outcome { tallies: vec![Tally::default(); 2], differences: Vec::new(), too_long: 2 };
        report.add(&set, &Setup::plain(), "none", 0.0, outcome);
        assert!(report.entries().is_empty() && report.means().is_empty());
        assert_eq!(report.too_long().next(), Some(("set", 2)));
    }
}

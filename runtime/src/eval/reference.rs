//! Tokens per round of the same checkpoint, measured elsewhere, to be shown beside ours.
//!
//! Two forms are read. The simple one, for one drafter and one temperature (0 if it says none):
//!
//! ```json
//! {"source": "the paper, table 2", "tokens_per_round": {"gsm8k": 3.1}, "drafter": "dspark", "temperature": 0}
//! ```
//!
//! where `drafter` may be left out: the numbers then stand beside every drafter but `none` and `ngram`. And the report of
//! `models/train/evaluate.py`, which is greedy and holds `{"drafters": {NAME: {"sets": {SET: {"tokens_per_round": 3.1}}}}}`;
//! a NAME is the last part of a drafter's path, or what it is. Where there is one alone, it may have any name.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::InputError;
use super::report::Combination;

#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    pub source: String,
    temperature: f32,
    /// Drafter (or any that has weights), then set.
    drafters: Vec<(Option<String>, BTreeMap<String, f64>)>,
}

impl Reference {
    pub fn read(path: &Path) -> Result<Reference, InputError> {
        let text = std::fs::read_to_string(path).map_err(|source| InputError::Io { path: path.into(), source })?;
        let refuse = |problem| InputError::Reference { path: path.into(), problem };
        let value = serde_json::from_str(&text).map_err(|error| refuse(format!("not JSON: {error}")))?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        Reference::parse(&value, &name).map_err(refuse)
    }

    /// `name` is the source where the numbers name none.
    fn parse(value: &Value, name: &str) -> Result<Reference, String> {
        let source = value["source"].as_str().unwrap_or(name).to_string();
        if let Some(sets) = value["tokens_per_round"].as_object() {
            let number = |(set, number): (&String, &Value)| match number.as_f64() {
                Some(number) => Ok((set.clone(), number)),
                None => Err(format!("tokens_per_round of {set} is no number: {number}")),
            };
            let drafter = value["drafter"].as_str().map(str::to_string);
            let sets = sets.iter().map(number).collect::<Result<_, _>>()?;
            let temperature = value["temperature"].as_f64().unwrap_or(0.0) as f32;
            return Ok(Reference { source, temperature, drafters: vec![(drafter, sets)] });
        }
        let drafters = value["drafters"].as_object().ok_or(
            "no reference numbers: expected {\"source\": TEXT, \"tokens_per_round\": {SET: NUMBER}}, or the report of evaluate.py",
        )?;
        let alone = drafters.len() == 1;
        let drafter = |(name, drafter): (&String, &Value)| {
            let known = |(set, value): (&String, &Value)| Some((set.clone(), value["tokens_per_round"].as_f64()?));
            let sets = drafter["sets"].as_object().into_iter().flatten().filter_map(known).collect();
            ((!alone).then(|| name.clone()), sets)
        };
        Ok(Reference { source, temperature: 0.0, drafters: drafters.iter().map(drafter).collect() })
    }

    /// What stands beside a combination on a set.
    pub fn tokens_per_round(&self, combination: &Combination, set: &str) -> Option<f64> {
        let Combination { drafter, used, temperature, .. } = combination;
        let asked = Path::new(drafter).file_name().map_or(drafter.as_str().into(), |name| name.to_string_lossy());
        let has_weights = !["none", "ngram"].contains(&used.as_str());
        let named = |name: &str| self.drafters.iter().find(|(drafter, _)| drafter.as_deref() == Some(name));
        let any = || self.drafters.iter().find(|(drafter, _)| drafter.is_none() && has_weights);
        let (_, sets) = named(&asked).or_else(|| named(used)).or_else(any)?;
        sets.get(set).copied().filter(|_| *temperature == self.temperature)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn find(reference: &Reference, drafter: &str, used: &str, temperature: f32) -> Option<f64> {
        let (drafter, used, budget) = (drafter.to_string(), used.to_string(), "auto".to_string());
        reference.tokens_per_round(&Combination { drafter, used, budget, temperature }, "gsm8k")
    }

    #[test]
    fn the_simple_form_is_for_drafters_with_weights() {
        let value = json!({"source": "a paper", "tokens_per_round": {"gsm8k": 3.5}});
        let reference = Reference::parse(&value, "file.json").unwrap();
        assert_eq!(reference.source, "a paper");
        assert_eq!(find(&reference, "auto", "dspark", 0.0), Some(3.5));
        assert_eq!(find(&reference, "auto", "dspark", 1.0), None, "another temperature");
        assert_eq!(find(&reference, "ngram", "ngram", 0.0), None);
        let value = json!({"tokens_per_round": {"gsm8k": 3.5}, "drafter": "ngram", "temperature": 1});
        let reference = Reference::parse(&value, "file.json").unwrap();
        assert_eq!(find(&reference, "ngram", "ngram", 1.0), Some(3.5));
        assert_eq!(find(&reference, "dspark", "dspark", 1.0), None);
    }

    #[test]
    fn a_report_of_evaluate_names_its_drafters() {
        let set = |number: f64| json!({"kind": "x", "sets": {"gsm8k": {"tokens_per_round": number}, "empty": null}});
        let value = json!({"new_tokens": 256, "drafters": {"dspark-5": set(2.5), "medusa": set(1.5)}});
        let reference = Reference::parse(&value, "report.json").unwrap();
        assert_eq!(reference.source, "report.json");
        assert_eq!(find(&reference, "runs/dspark-5", "dspark", 0.0), Some(2.5));
        assert_eq!(find(&reference, "auto", "medusa", 0.0), Some(1.5));
        assert_eq!(find(&reference, "runs/other", "dspark", 0.0), None);
        let alone = Reference::parse(&json!({"drafters": {"dspark-5": set(2.5)}}), "report.json").unwrap();
        assert_eq!(find(&alone, "auto", "dspark", 0.0), Some(2.5));
    }

    #[test]
    fn what_holds_no_numbers_is_refused() {
        for (value, words) in [
            (json!({"speed": 1}), "tokens_per_round"),
            (json!([1]), "tokens_per_round"),
            (json!({"tokens_per_round": {"gsm8k": "three"}}), "gsm8k"),
        ] {
            let problem = Reference::parse(&value, "file.json").unwrap_err();
            assert!(problem.contains(words), "{value}: {problem}");
        }
    }
}

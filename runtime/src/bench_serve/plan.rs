//! What is asked of a server: every policy at every load.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Serialize, Serializer};

pub struct Plan {
    /// Without a path: `http://127.0.0.1:8080`.
    pub url: String,
    /// None takes the first one that the server names.
    pub model: Option<String>,
    pub api_key: Option<String>,
    pub prompts: Vec<String>,
    /// Complete the prompts as they are, without the model's chat template.
    pub raw: bool,
    pub loads: Vec<Load>,
    /// In turn at every load; ratios are against the first.
    pub policies: Vec<Policy>,
    pub end: End,
    /// Requests before each measurement that count for nothing; None is one a stream.
    pub warm_up: Option<usize>,
    /// Most tokens of an answer: for each request another one out of these.
    pub max_tokens: RangeInclusive<usize>,
    pub temperature: f64,
    pub seed: u64,
    /// Go on to `max_tokens`, whatever the model says (an extension of vLLM's).
    pub ignore_eos: bool,
    /// A request that takes longer has failed.
    pub timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Load {
    /// Clients that always have one request running.
    Streams(usize),
    /// Requests a second, each of which is sent when its time has come.
    Rate(f64),
}

/// When a measurement sends no more requests; those that run are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Requests(usize),
    After(Duration),
}

/// How the server is to speculate, in the words of its own field `speculation`; None leaves the field out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Policy(pub Option<String>);

impl Plan {
    /// Every measurement, in order. Each load begins with another policy.
    pub fn measurements(&self) -> Vec<(Load, Policy)> {
        let mut all = Vec::new();
        for (turn, &load) in self.loads.iter().enumerate() {
            let first = turn % self.policies.len();
            let (later, sooner) = self.policies.split_at(first);
            all.extend(sooner.iter().chain(later).map(|policy| (load, policy.clone())));
        }
        all
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Load::Streams(1) => write!(f, "1 stream"),
            Load::Streams(streams) => write!(f, "{streams} streams"),
            Load::Rate(rate) => write!(f, "{rate} requests/s"),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_deref().unwrap_or("-"))
    }
}

impl Serialize for Load {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (kind, number): (_, serde_json::Number) = match *self {
            Load::Streams(streams) => ("streams", streams.into()),
            Load::Rate(rate) => {
                ("requests_per_second", serde_json::Number::from_f64(rate).expect("checked to be finite"))
            }
        };
        serializer.collect_map([(kind, number)])
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn plan(policies: &[&str], loads: &[Load]) -> Plan {
        Plan {
            url: "http://127.0.0.1:8080".to_string(),
            model: Some("tiny".to_string()),
            api_key: None,
            prompts: (0..10).map(|i| format!("prompt {i}")).collect(),
            raw: false,
            loads: loads.to_vec(),
            policies: policies.iter().map(|policy| Policy(Some(policy.to_string()))).collect(),
            end: End::Requests(8),
            warm_up: None,
            max_tokens: 16..=16,
            temperature: 0.0,
            seed: 7,
            ignore_eos: false,
            timeout: Duration::from_secs(10),
        }
    }

    #[test]
    fn policies_take_turns_and_each_is_first_once() {
        let measurements = plan(&["off", "fixed:1", "confidence"], &[1, 4, 16].map(Load::Streams)).measurements();
        let text: Vec<String> = measurements.iter().map(|(load, policy)| format!("{load} {policy}")).collect();
        assert_eq!(text[..4], ["1 stream off", "1 stream fixed:1", "1 stream confidence", "4 streams fixed:1"]);
        assert_eq!(
            text[4..],
            ["4 streams confidence", "4 streams off", "16 streams confidence", "16 streams off", "16 streams fixed:1"]
        );
    }
}

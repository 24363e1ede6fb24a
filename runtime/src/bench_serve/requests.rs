//! The requests of a run: which prompt the i-th asks, with which seed, and when it arrives. All of it follows from the
//! run's seed and i, by the noise that also draws tokens.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{End, Plan, Policy};
use crate::philox::NoiseKey;

/// What noise is drawn for, so that one use tells nothing of another.
#[derive(Clone, Copy)]
enum Use {
    Order,
    Seed,
    Arrival,
    Length,
}

/// Tokens of a request that only warms up.
const WARM_UP_TOKENS: usize = 32;

pub struct Requests {
    pub plan: Arc<Plan>,
    model: String,
    /// Of the prompts, shuffled; request i has the i-th, and begins again where there are no more.
    order: Vec<usize>,
}

impl Requests {
    pub fn new(plan: Arc<Plan>, model: &str) -> Requests {
        let mut order: Vec<usize> = (0..plan.prompts.len()).collect();
        for last in (1..order.len()).rev() {
            let word = u64::from(noise(plan.seed, Use::Order, last));
            order.swap(last, ((word * (last as u64 + 1)) >> 32) as usize);
        }
        Requests { plan, model: model.to_string(), order }
    }

    /// The body of request `index`.
    pub fn body(&self, index: usize, policy: &Policy) -> Value {
        let plan = &self.plan;
        let mut body = json!({ "model": self.model });
        let prompt = &plan.prompts[self.order[index % self.order.len()]];
        if plan.raw {
            body["prompt"] = json!(prompt);
        } else {
            body["messages"] = json!([{ "role": "user", "content": prompt }]);
        }
        body["max_tokens"] = json!(self.most_tokens(index));
        body["temperature"] = json!(plan.temperature);
        // Of 31 bits: some servers take no more.
        body["seed"] = json!(noise(plan.seed, Use::Seed, index) >> 1);
        body["stream"] = json!(true);
        body["stream_options"] = json!({ "include_usage": true });
        if plan.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        if let Policy(Some(policy)) = policy {
            body["speculation"] = json!(policy);
        }
        body
    }

    /// Any of the plan's lengths, each as likely.
    fn most_tokens(&self, index: usize) -> usize {
        let (first, last) = self.plan.max_tokens.clone().into_inner();
        let word = u64::from(noise(self.plan.seed, Use::Length, index));
        first + ((word * (last - first + 1) as u64) >> 32) as usize
    }

    /// A short request that counts for nothing. The prompts that are asked last come first here, so that no cache of
    /// prompts knows those that are measured.
    pub fn warm_up_body(&self, index: usize, policy: &Policy) -> Value {
        let prompts = self.order.len();
        let mut body = self.body(prompts - 1 - index % prompts, policy);
        body["max_tokens"] = json!(WARM_UP_TOKENS.min(*self.plan.max_tokens.end()));
        body
    }

    /// When requests arrive, at so many a second on average: the gaps are exponential.
    pub fn arrivals(&self, rate: f64) -> Vec<Duration> {
        let seed = self.plan.seed;
        let mut time = 0.0;
        let times = (0..).map(|index| {
            // Never 0 or 1.
            let uniform = (f64::from(noise(seed, Use::Arrival, index)) + 0.5) / (f64::from(u32::MAX) + 1.0);
            time -= uniform.ln() / rate;
            Duration::from_secs_f64(time)
        });
        match self.plan.end {
            End::Requests(requests) => times.take(requests).collect(),
            End::After(end) => times.take_while(|&time| time < end).collect(),
        }
    }
}

fn noise(seed: u64, purpose: Use, index: usize) -> u32 {
    let seed = [seed as u32, (seed >> 32) as u32];
    NoiseKey { seed, sample: purpose as u32, position: (index >> 32) as u32 }.word(index as u32)
}

#[cfg(test)]
mod tests {
    use super::super::Load;
    use super::super::plan::tests::plan;
    use super::*;

    fn requests(end: End, seed: u64) -> Requests {
        Requests::new(Arc::new(Plan { end, seed, ..plan(&["off"], &[Load::Streams(1)]) }), "tiny")
    }

    #[test]
    fn every_prompt_comes_once_before_any_comes_twice() {
        let requests = requests(End::Requests(8), 7);
        let prompt = |index| requests.body(index, &Policy(None))["messages"][0]["content"].to_string();
        let asked: Vec<String> = (0..10).map(prompt).collect();
        let mut sorted = asked.clone();
        sorted.sort();
        assert_ne!(asked, sorted, "shuffled");
        sorted.dedup();
        assert_eq!((sorted.len(), prompt(13)), (10, prompt(3)));
        assert_eq!(requests.warm_up_body(0, &Policy(None))["messages"], requests.body(9, &Policy(None))["messages"]);
    }

    #[test]
    fn policies_ask_the_same_and_seeds_differ() {
        let requests = requests(End::Requests(8), 7);
        let mut with = requests.body(3, &Policy(Some("fixed:1".to_string())));
        assert_eq!(with.as_object_mut().unwrap().remove("speculation"), Some(json!("fixed:1")));
        assert_eq!(with, requests.body(3, &Policy(None)));
        assert_eq!(with["stream_options"]["include_usage"], true);
        assert!(with.get("ignore_eos").is_none() && with["seed"].as_u64().unwrap() < 1 << 31);
        assert_ne!(requests.body(13, &Policy(None))["seed"], with["seed"], "the same prompt again");
    }

    #[test]
    fn lengths_are_the_plans_and_seeded() {
        let lengths = |max_tokens| -> Vec<usize> {
            let plan = Plan { max_tokens, ..plan(&["off"], &[Load::Streams(1)]) };
            let requests = Requests::new(Arc::new(plan), "tiny");
            (0..200).map(|index| requests.most_tokens(index)).collect()
        };
        assert_eq!(lengths(7..=7), [7; 200]);
        let found = lengths(3..=6);
        assert_eq!(found, lengths(3..=6));
        assert!((3..=6).all(|length| found.iter().filter(|&&l| l == length).count() > 30));
        assert!(found.iter().all(|length| (3..=6).contains(length)));
    }

    #[test]
    fn arrivals_are_seeded_and_poisson() {
        let times = requests(End::Requests(20_000), 7).arrivals(4.0);
        assert_eq!(times, requests(End::Requests(20_000), 7).arrivals(4.0));
        assert_ne!(times[0], requests(End::Requests(1), 8).arrivals(4.0)[0]);
        let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // An exponential law's deviation is its mean; of 20,000 gaps the mean is good to 0.7 %.
        assert!((mean - 0.25).abs() < 0.01 && (variance.sqrt() - 0.25).abs() < 0.01, "{mean} {variance}");

        let within = requests(End::After(Duration::from_secs(100)), 7).arrivals(4.0);
        assert_eq!(within[..], times[..within.len()], "the same requests, as many as come in time");
        assert!((300..500).contains(&within.len()), "{}", within.len());
    }
}

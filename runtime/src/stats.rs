//! What a generation did and what it cost. Counting is a by-product of the round.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::memory::MemoryUse;
use crate::tree::{Accepted, TokenTree};

/// Nodes verified and accepted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Acceptance {
    pub drafted: usize,
    pub accepted: usize,
}

/// Seconds spent in each part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Times {
    pub prefill: f64,
    pub draft: f64,
    /// The target's pass and the wait for its draws and accepted path.
    pub verify: f64,
    pub accept: f64,
    pub commit: f64,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct Statistics {
    pub prompt_tokens: usize,
    /// Tokens generated, a closing stop token included.
    pub new_tokens: usize,
    pub rounds: usize,
    /// Rows that the target verified, roots included.
    pub verified_rows: usize,
    /// Entry d - 1: rounds whose tree reached depth d, and rounds that accepted to depth d.
    pub by_depth: Vec<Acceptance>,
    /// Draft nodes verified and accepted, by who proposed them.
    pub by_drafter: BTreeMap<String, Acceptance>,
    pub seconds: Times,
    /// From the prompt to the first token, prompt included.
    pub first_token_seconds: f64,
    /// Bytes of weights that the verify passes read.
    pub weight_bytes_read: usize,
    /// Target and draft model together.
    pub memory: MemoryUse,
    pub backend: String,
    pub finish_reason: Option<crate::sequence::FinishReason>,
}

/// A round's stopwatch: each call books the time since the one before.
#[derive(Debug)]
pub struct Clock(Instant);

impl Clock {
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now)).as_secs_f64()
    }

    pub fn drafted(&mut self, stats: &mut Statistics) {
        stats.seconds.draft += self.lap();
    }

    pub fn verified(&mut self, stats: &mut Statistics) {
        stats.seconds.verify += self.lap();
    }

    pub fn accepted(&mut self, stats: &mut Statistics) {
        stats.seconds.accept += self.lap();
    }

    pub fn committed(&mut self, stats: &mut Statistics) {
        stats.seconds.commit += self.lap();
    }
}

impl Statistics {
    pub fn start_round(&self) -> Clock {
        Clock(Instant::now())
    }

    pub fn prefill(&mut self, prompt_tokens: usize, time: Duration) {
        self.prompt_tokens = prompt_tokens;
        self.seconds.prefill += time.as_secs_f64();
    }

    /// Books a round: its verified tree, what was accepted, and how many tokens the sequence took.
    pub fn record(&mut self, drafter: &str, tree: &TokenTree, accepted: &Accepted, taken: usize) {
        self.rounds += 1;
        self.new_tokens += taken;
        self.verified_rows += tree.len();
        let depth = tree.shape().max_depth();
        if self.by_depth.len() < depth {
            self.by_depth.resize(depth, Acceptance::default());
        }
        for (d, at) in self.by_depth.iter_mut().enumerate().take(depth) {
            at.drafted += 1;
            at.accepted += usize::from(d < accepted.draft_len());
        }
        if tree.len() > 1 {
            let by = self.by_drafter.entry(drafter.to_string()).or_default();
            by.drafted += tree.len() - 1;
            by.accepted += accepted.draft_len();
        }
        if self.rounds == 1 {
            self.first_token_seconds = self.seconds.prefill + self.decode_seconds();
        }
    }

    /// Seconds of all rounds.
    pub fn decode_seconds(&self) -> f64 {
        let Times { draft, verify, accept, commit, .. } = self.seconds;
        draft + verify + accept + commit
    }

    /// Generated tokens a second, the prompt's time not counted.
    pub fn tokens_per_second(&self) -> f64 {
        self.new_tokens as f64 / self.decode_seconds().max(f64::MIN_POSITIVE)
    }

    /// Tokens a round, the bonus token included.
    pub fn tokens_per_round(&self) -> f64 {
        self.new_tokens as f64 / self.rounds.max(1) as f64
    }

    /// As one JSON object; derived figures included.
    pub fn to_json(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).expect("plain numbers and strings");
        value["tokens_per_second"] = self.tokens_per_second().into();
        value["tokens_per_round"] = self.tokens_per_round().into();
        value
    }
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |seconds: f64| format!("{:.1} ms", seconds * 1e3);
        let mb = |bytes: usize| format!("{:.1} MB", bytes as f64 / 1e6);
        let Times { prefill, draft, verify, accept, commit } = self.seconds;
        writeln!(f, "backend          {}", self.backend)?;
        writeln!(
            f,
            "prompt           {} tokens in {} ({:.0} tokens/s), first token after {}",
            self.prompt_tokens,
            ms(prefill),
            self.prompt_tokens as f64 / prefill.max(f64::MIN_POSITIVE),
            ms(self.first_token_seconds),
        )?;
        writeln!(
            f,
            "generated        {} tokens in {} ({:.1} tokens/s)",
            self.new_tokens,
            ms(self.decode_seconds()),
            self.tokens_per_second(),
        )?;
        writeln!(
            f,
            "rounds           {} ({:.2} tokens per round, {:.2} rows per pass)",
            self.rounds,
            self.tokens_per_round(),
            self.verified_rows as f64 / self.rounds.max(1) as f64,
        )?;
        for (name, Acceptance { drafted, accepted }) in &self.by_drafter {
            writeln!(f, "drafter          {name}: {accepted} of {drafted} nodes accepted")?;
        }
        if !self.by_depth.is_empty() {
            let share = |a: &Acceptance| format!("{:.0} %", 100.0 * a.accepted as f64 / a.drafted.max(1) as f64);
            let shares: Vec<String> = self.by_depth.iter().map(share).collect();
            writeln!(f, "accepted to depth 1, 2, ...: {}", shares.join(", "))?;
        }
        writeln!(
            f,
            "time             draft {}, verify {}, accept {}, commit {}",
            ms(draft),
            ms(verify),
            ms(accept),
            ms(commit)
        )?;
        let MemoryUse { weights, cache, scratch } = self.memory;
        write!(
            f,
            "memory           weights {}, cache {}, scratch {}; {} of weights read",
            mb(weights),
            mb(cache),
            mb(scratch),
            mb(self.weight_bytes_read),
        )
    }
}

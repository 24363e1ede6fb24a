//! What a service counts, and what whoever watches sees of a round.

use crate::engine::Round;

/// What was counted since the start.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Counters {
    pub rounds: u64,
    pub requests: u64,
    /// Whose client went away.
    pub cancelled: u64,
    /// Who had to wait again for want of pages.
    pub preempted: u64,
    pub prompt_tokens: u64,
    /// Of the prompts': already in the cache.
    pub cached_tokens: u64,
    pub new_tokens: u64,
    /// Draft nodes that were verified, and that were accepted.
    pub drafted: u64,
    pub accepted: u64,
    /// Entry d - 1: rounds of a sequence whose tree reached depth d, and that accepted to depth d.
    pub by_depth: Vec<(u64, u64)>,
    /// Seconds of all rounds, and of these what was waited for the device.
    pub round_seconds: f64,
    pub device_seconds: f64,
    pub running: usize,
    pub waiting: usize,
    pub pages_used: usize,
    pub pages: usize,
}

impl Counters {
    /// A sequence's round; a part of a prompt counts for nothing.
    pub(super) fn note(&mut self, round: &Round) {
        if round.tokens.is_empty() {
            return;
        }
        self.new_tokens += round.tokens.len() as u64;
        self.drafted += round.tree.len() as u64 - 1;
        self.accepted += round.accepted.draft_len() as u64;
        let depth = round.tree.shape().max_depth();
        self.by_depth.resize(self.by_depth.len().max(depth), (0, 0));
        for (d, (reached, accepted)) in self.by_depth.iter_mut().enumerate().take(depth) {
            *reached += 1;
            *accepted += u64::from(d < round.accepted.draft_len());
        }
    }
}

/// A verified tree.
#[derive(Debug, Clone, serde::Serialize)]
pub struct TreeView {
    /// Which ask, counted from the start of the service.
    pub request: u64,
    pub tokens: Vec<u32>,
    /// The root's is itself.
    pub parents: Vec<usize>,
    /// Accepted nodes, the root first.
    pub path: Vec<usize>,
    pub bonus: u32,
}

impl TreeView {
    pub(super) fn new(request: u64, round: &Round) -> TreeView {
        let nodes = 0..round.tree.len();
        let parent = |node| if node == 0 { 0 } else { round.tree.shape().parent(node) };
        TreeView {
            request,
            tokens: nodes.clone().map(|node| round.tree.token(node)).collect(),
            parents: nodes.map(parent).collect(),
            path: round.accepted.path.clone(),
            bonus: round.accepted.tokens[round.accepted.draft_len()],
        }
    }
}

/// One round of all that run.
#[derive(Debug, Clone, serde::Serialize)]
pub struct RoundView {
    pub trees: Vec<TreeView>,
    /// Of all trees together.
    pub rows: usize,
    pub running: usize,
    pub waiting: usize,
    pub seconds: f64,
}

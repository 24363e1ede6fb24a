//! One request's tokens, and when it is finished.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::draft::Draft;
use crate::grammar::Grammar;
use crate::kv::KvCache;
use crate::sampling::Sampling;
use crate::scheduler::Policy;

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its answer with one of its stop tokens.
    StopToken,
    /// A stop string appeared.
    StopString,
    /// The asked number of tokens was reached.
    Length,
    /// The context is full.
    Context,
    /// The caller stopped listening.
    Cancelled,
}

/// The rows of a target's pass whose tokens it left in the cache last: their hidden states are there until the next pass.
#[derive(Debug, Default)]
pub(crate) struct Fresh {
    pub rows: Vec<u32>,
    /// Which pass.
    pub pass: u64,
}

/// Invariant between rounds, once its prompt is in the cache: the cache holds every token but the last,
/// `tokens.len() == kv.len() + 1`.
#[derive(Debug)]
pub struct Sequence {
    pub kv: KvCache,
    pub sampling: Sampling,
    /// How much of its drafts is verified.
    pub policy: Policy,
    /// What it may say.
    pub grammar: Option<Grammar>,
    /// Whether its rounds tell the logits behind which its tokens were drawn.
    pub wants_logits: bool,
    /// What the device has drafted for the next round, where it drafts for many.
    pub(crate) draft: Option<Draft>,
    /// Row of the target's last pass behind which it drew the last token.
    pub(crate) last_row: usize,
    /// What an MTP module has yet to take in.
    pub(crate) fresh: Fresh,
    id: u64,
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Total length at which the sequence ends, and why.
    end: (usize, FinishReason),
    stop_tokens: Vec<u32>,
    /// Bit t: token t occurred. Kept only for a repetition penalty.
    seen: Option<Vec<u32>>,
    finished: Option<FinishReason>,
}

impl Sequence {
    /// The prompt must not be empty and must leave room for a token within `context`.
    pub fn new(
        prompt: Vec<u32>,
        sampling: Sampling,
        max_new_tokens: usize,
        stop_tokens: Vec<u32>,
        context: usize,
        vocab: usize,
    ) -> Sequence {
        let end = match prompt.len().saturating_add(max_new_tokens) {
            total if total <= context => (total, FinishReason::Length),
            _ => (context, FinishReason::Context),
        };
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let mut sequence = Sequence {
            kv: KvCache::default(),
            policy: Policy::CONFIDENCE,
            grammar: None,
            wants_logits: false,
            draft: None,
            last_row: 0,
            fresh: Fresh::default(),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            seen: (sampling.repetition_penalty != 1.0).then(|| vec![0; vocab.div_ceil(32)]),
            sampling,
            prompt_len: prompt.len(),
            tokens: Vec::new(),
            end,
            stop_tokens,
            finished: (max_new_tokens == 0).then_some(FinishReason::Length),
        };
        prompt.into_iter().for_each(|token| sequence.append(token));
        sequence
    }

    fn append(&mut self, token: u32) {
        if let Some(seen) = &mut self.seen {
            seen[token as usize / 32] |= 1 << (token % 32);
        }
        self.tokens.push(token);
    }

    /// Takes a round's tokens up to the end of the sequence, and returns those it took. A stop token is taken but is
    /// the last; nothing behind it leaks out.
    pub fn push(&mut self, tokens: &[u32]) -> &[u32] {
        let before = self.tokens.len();
        for &token in tokens {
            self.append(token);
            if self.stop_tokens.contains(&token) {
                self.finished = Some(FinishReason::StopToken);
            } else if self.tokens.len() >= self.end.0 {
                self.finished = Some(self.end.1);
            }
            if self.finished.is_some() {
                break;
            }
        }
        &self.tokens[before..]
    }

    /// Takes the last tokens back: they lie behind what ended the sequence.
    pub fn cut(&mut self, surplus: usize, reason: FinishReason) {
        self.tokens.truncate(self.tokens.len() - surplus);
        self.finished = Some(reason);
    }

    pub fn finish(&mut self, reason: FinishReason) {
        self.finished.get_or_insert(reason);
    }

    pub fn finished(&self) -> Option<FinishReason> {
        self.finished
    }

    /// No other sequence of the process has it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The tokens that are not in the cache: one between rounds, more while a prompt is run in parts.
    pub fn pending(&self) -> &[u32] {
        &self.tokens[self.kv.len()..]
    }

    /// Prompt and generated tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The last token: the root of the next tree.
    pub fn last(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }

    pub fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    pub fn is_stop_token(&self, token: u32) -> bool {
        self.stop_tokens.contains(&token)
    }

    /// Tokens that may still be added.
    pub fn room(&self) -> usize {
        self.end.0.saturating_sub(self.tokens.len())
    }

    /// The words of the `seen` buffer, if the sampling needs it.
    pub fn seen(&self) -> Option<&[u32]> {
        self.seen.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(prompt: &[u32], max_new_tokens: usize) -> Sequence {
        Sequence::new(prompt.to_vec(), Sampling::default(), max_new_tokens, vec![2], 10, 64)
    }

    #[test]
    fn nothing_behind_a_stop_token_leaks_out() {
        let mut seq = sequence(&[5, 6], 100);
        assert_eq!(seq.push(&[7, 8]), [7, 8]);
        assert_eq!(seq.push(&[9, 2, 11, 12]), [9, 2]);
        assert_eq!(seq.finished(), Some(FinishReason::StopToken));
        assert_eq!(seq.generated(), [7, 8, 9, 2]);
    }

    #[test]
    fn length_and_context_cut_an_accepted_run() {
        let mut seq = sequence(&[5, 6], 3);
        assert_eq!(seq.push(&[7, 8, 9, 10]), [7, 8, 9]);
        assert_eq!(seq.finished(), Some(FinishReason::Length));

        let mut seq = sequence(&[1; 8], 3);
        assert_eq!(seq.push(&[7, 8, 9]), [7, 8]);
        assert_eq!(seq.finished(), Some(FinishReason::Context));
    }

    #[test]
    fn tokens_are_noted_only_for_a_penalty() {
        assert!(sequence(&[5], 1).seen().is_none());
        let sampling = Sampling { repetition_penalty: 1.2, ..Sampling::default() };
        let mut seq = Sequence::new(vec![5], sampling, 4, vec![], 10, 64);
        seq.push(&[33]);
        assert_eq!(seq.seen().unwrap(), [1 << 5, 1 << 1]);
    }
}

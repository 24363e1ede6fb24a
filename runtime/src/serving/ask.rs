//! What a client asks for, and what it hears of it.

use tokio::sync::mpsc;

use crate::grammar::GrammarSource;
use crate::sampling::Sampling;
use crate::scheduler::Policy;
use crate::sequence::FinishReason;

/// One answer that is wanted.
#[derive(Debug, Clone)]
pub struct Ask {
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    pub max_new_tokens: usize,
    /// Go on behind the model's stop tokens, as load tests do. Under a grammar they still end the answer.
    pub ignore_stop_tokens: bool,
    /// Log-probabilities of every token, and of so many of the likeliest beside it.
    pub logprobs: Option<usize>,
    /// How much of a draft is verified; `None` leaves it to the service.
    pub policy: Option<Policy>,
    /// What the answer must be.
    pub grammar: Option<GrammarSource>,
}

/// What becomes of an ask, as it happens. The last is `End` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// What one round brought; never empty.
    Tokens(Vec<Emitted>),
    End(FinishReason, Usage),
    /// The device or the model failed; a person can act on the text.
    Failed(String),
}

/// A token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Emitted {
    pub token: u32,
    pub logprobs: Option<Logprobs>,
}

/// The target's own log-probabilities at one place: of its logits as they are, before temperature and filters, or of those that a
/// grammar allows.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    pub token: f32,
    /// The likeliest tokens, descending.
    pub top: Vec<(u32, f32)>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Of the prompt's: already in the cache.
    pub cached_tokens: usize,
    /// Generated tokens, a closing stop token included.
    pub new_tokens: usize,
    /// Draft nodes that were verified, and that were accepted.
    pub drafted: usize,
    pub accepted: usize,
}

/// The events of one ask. Dropping it cancels the ask; its pages are free with the next round.
#[derive(Debug)]
pub struct Answer(pub(super) mpsc::UnboundedReceiver<Event>);

impl Answer {
    /// Where events come in, and the answer that hears of them.
    pub fn channel() -> (mpsc::UnboundedSender<Event>, Answer) {
        let (events, answer) = mpsc::unbounded_channel();
        (events, Answer(answer))
    }

    /// The next event; `None` behind the last.
    pub async fn next(&mut self) -> Option<Event> {
        self.0.recv().await
    }

    /// The same, for a thread that may wait.
    pub fn wait(&mut self) -> Option<Event> {
        self.0.blocking_recv()
    }
}

/// Why an ask was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the queue is full: {waiting} requests wait already; try again later")]
    Busy { waiting: usize },
    #[error("the server is shutting down")]
    Draining,
    /// The ask itself is wrong.
    #[error("{0}")]
    Bad(String),
    /// The engine has failed.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}

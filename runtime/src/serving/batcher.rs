//! Continuous batching: requests join and leave between rounds. Those that run share every pass; those that wait come to
//! run in the order of their arrival, as soon as there is a place and the cache has pages for them.
//!
//! Where the pages run out, the latest to arrive waits again (it is *preempted*): its pages are given back, and when its
//! turn comes it runs its text once more, or finds it still in the cache. Its tokens are the same ever after, since a draw
//! depends on nothing but seed and position.

use std::collections::VecDeque;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::ask::{Ask, Emitted, Event, Logprobs, Usage};
use super::counters::{Counters, RoundView, TreeView};
use crate::draw;
use crate::engine::{Engine, Round};
use crate::error::{Error, Result};
use crate::grammar::Grammar;
use crate::scheduler::Policy;
use crate::sequence::{FinishReason, Sequence};
use crate::stats::Statistics;

pub struct Batcher {
    engine: Engine,
    stop_tokens: Vec<u32>,
    /// Where an ask names none.
    policy: Policy,
    max_requests: usize,
    /// By arrival, as are those that run.
    waiting: VecDeque<Request>,
    running: Vec<Request>,
    arrivals: u64,
    stats: Statistics,
    counters: Counters,
    mail: Vec<Message>,
}

/// What one who asked is to hear.
pub struct Message {
    to: UnboundedSender<Event>,
    event: Event,
}

impl Message {
    /// Wakes whoever waits for it. If nobody listens any more, the next round finds out.
    pub fn deliver(self) {
        let _ = self.to.send(self.event);
    }
}

/// An ask that waits or runs.
struct Request {
    arrival: u64,
    seq: Sequence,
    logprobs: Option<usize>,
    usage: Usage,
    events: UnboundedSender<Event>,
}

impl Batcher {
    /// Over an engine whose target has room for so many requests.
    pub fn new(engine: Engine, stop_tokens: Vec<u32>, policy: Policy) -> Batcher {
        let pages = engine.target().pool().pages();
        Batcher {
            max_requests: engine.target().max_requests(),
            engine,
            stop_tokens,
            policy,
            waiting: VecDeque::new(),
            running: Vec::new(),
            arrivals: 0,
            stats: Statistics::default(),
            counters: Counters { pages, ..Counters::default() },
            mail: Vec::new(),
        }
    }

    /// Queues an ask, with its grammar compiled. One that cannot be answered hears so at once.
    pub fn add(&mut self, ask: Ask, grammar: Option<Grammar>, events: UnboundedSender<Event>) {
        self.counters.requests += 1;
        if let Err(error) = self.engine.check_prompt(&ask.prompt) {
            return self.mail.push(Message { to: events, event: Event::Failed(error.to_string()) });
        }
        let stops = if ask.ignore_stop_tokens && grammar.is_none() { Vec::new() } else { self.stop_tokens.clone() };
        let (context, vocab) = (self.engine.context(), self.engine.target().config().vocab_size);
        let usage = Usage { prompt_tokens: ask.prompt.len(), ..Usage::default() };
        let mut seq = Sequence::new(ask.prompt, ask.sampling, ask.max_new_tokens, stops, context, vocab);
        seq.grammar = grammar;
        seq.policy = ask.policy.unwrap_or(self.policy);
        seq.wants_logits = ask.logprobs.is_some();
        self.waiting.push_back(Request { arrival: self.arrivals, seq, logprobs: ask.logprobs, usage, events });
        self.arrivals += 1;
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub fn counters(&self) -> Counters {
        let pool = self.engine.target().pool();
        Counters {
            running: self.running.len(),
            waiting: self.waiting.len(),
            device_seconds: self.stats.seconds.verify,
            pages_used: pool.pages() - pool.available(),
            ..self.counters.clone()
        }
    }

    /// What is to be delivered since the last call: elsewhere, for waking many takes its time.
    pub fn take_mail(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.mail)
    }

    /// One round of all that run, after whoever may join has joined. Tells of it if somebody watches. An error is the
    /// engine's end.
    pub fn round(&mut self, watched: bool) -> Result<Option<RoundView>> {
        let start = Instant::now();
        self.drop_cancelled();
        self.admit();
        self.make_room();
        if self.running.is_empty() {
            return Ok(None);
        }
        let mut seqs: Vec<&mut Sequence> = self.running.iter_mut().map(|request| &mut request.seq).collect();
        let rounds = self.engine.rounds(&mut seqs, &mut self.stats)?;
        self.counters.rounds += 1;
        let mut trees = Vec::new();
        for (place, round) in rounds {
            let request = &mut self.running[place];
            match round {
                Ok(round) => {
                    self.counters.note(&round);
                    if watched && !round.tokens.is_empty() {
                        trees.push(TreeView::new(request.arrival, &round));
                    }
                    request.hear(&round, &mut self.mail);
                }
                Err(error) => request.fail(&error, &mut self.mail),
            }
            self.engine.publish(&mut request.seq);
        }
        self.dismiss_finished();
        self.counters.round_seconds += start.elapsed().as_secs_f64();
        let (running, waiting) = (self.running.len(), self.waiting.len());
        let rows = trees.iter().map(|tree| tree.tokens.len()).sum();
        let view = || RoundView { trees, rows, running, waiting, seconds: start.elapsed().as_secs_f64() };
        Ok(watched.then(view))
    }

    /// Tells everyone that the engine has failed.
    pub fn fail(&mut self, error: &Error) {
        let all = self.waiting.iter_mut().chain(&mut self.running);
        all.for_each(|request| request.fail(error, &mut self.mail));
    }

    fn drop_cancelled(&mut self) {
        let before = self.waiting.len() + self.running.len();
        self.waiting.retain(|request| !request.events.is_closed());
        let engine = &mut self.engine;
        self.running.retain_mut(|request| {
            let goes_on = !request.events.is_closed();
            if !goes_on {
                engine.release(&mut request.seq);
            }
            goes_on
        });
        self.counters.cancelled += (before - self.waiting.len() - self.running.len()) as u64;
    }

    /// Lets as many run as there is room for.
    fn admit(&mut self) {
        while self.running.len() < self.max_requests {
            let Some(mut request) = self.waiting.pop_front() else { return };
            if request.seq.finished().is_some() {
                // No token was asked for.
                request.end(&mut self.mail);
                continue;
            }
            let cached = self.engine.share(&mut request.seq);
            // Its whole text, and a round of everybody.
            let needed = self.engine.pages_for(&request.seq, request.seq.pending().len())
                + self.running.iter().map(|other| self.engine.pages_for(&other.seq, 0)).sum::<usize>();
            if needed > self.engine.target().pool().available() {
                self.engine.release(&mut request.seq);
                if self.running.is_empty() {
                    request.fail(&self.full(&request.seq), &mut self.mail);
                    continue;
                }
                return self.waiting.push_front(request);
            }
            if request.usage.new_tokens == 0 {
                request.usage.cached_tokens = cached;
                self.counters.prompt_tokens += request.usage.prompt_tokens as u64;
                self.counters.cached_tokens += cached as u64;
            }
            let place = self.running.partition_point(|other| other.arrival < request.arrival);
            self.running.insert(place, request);
        }
    }

    /// Has the latest wait until there are pages for a round of the others. One alone that finds too few is given up.
    fn make_room(&mut self) {
        loop {
            let needed: usize = self.running.iter().map(|request| self.engine.pages_for(&request.seq, 0)).sum();
            if needed <= self.engine.target().pool().available() {
                return;
            }
            let mut latest = self.running.pop().expect("who needs a page runs");
            self.engine.release(&mut latest.seq);
            if self.running.is_empty() {
                return latest.fail(&self.full(&latest.seq), &mut self.mail);
            }
            self.counters.preempted += 1;
            self.waiting.push_front(latest);
        }
    }

    fn full(&self, seq: &Sequence) -> Error {
        let pool = self.engine.target().pool();
        Error::ContextFull { needed: seq.tokens().len() + 1, limit: pool.pages() * pool.page_size() }
    }

    fn dismiss_finished(&mut self) {
        let engine = &mut self.engine;
        self.running.retain_mut(|request| {
            let goes_on = request.seq.finished().is_none();
            if !goes_on {
                request.end(&mut self.mail);
                engine.release(&mut request.seq);
            }
            goes_on
        });
    }
}

impl Request {
    /// Passes a round's tokens on.
    fn hear(&mut self, round: &Round, mail: &mut Vec<Message>) {
        if round.tokens.is_empty() {
            return;
        }
        self.usage.new_tokens += round.tokens.len();
        self.usage.drafted += round.tree.len() - 1;
        self.usage.accepted += round.accepted.draft_len();
        let logprobs = |i: usize| self.logprobs.map(|top| logprobs(&round.logits[i], round.tokens[i], top));
        let emitted = round.tokens.iter().enumerate().map(|(i, &token)| Emitted { token, logprobs: logprobs(i) });
        mail.push(self.message(Event::Tokens(emitted.collect())));
    }

    fn message(&self, event: Event) -> Message {
        Message { to: self.events.clone(), event }
    }

    fn end(&mut self, mail: &mut Vec<Message>) {
        // Whoever was cancelled has gone, or has heard why.
        if let Some(reason) = self.seq.finished().filter(|reason| *reason != FinishReason::Cancelled) {
            mail.push(self.message(Event::End(reason, self.usage)));
        }
    }

    fn fail(&mut self, error: &Error, mail: &mut Vec<Message>) {
        mail.push(self.message(Event::Failed(error.to_string())));
        self.seq.finish(FinishReason::Cancelled);
    }
}

/// Of a token, and of the `top` likeliest.
fn logprobs(logits: &[f32], token: u32, top: usize) -> Logprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    let of = |logit: f32| (f64::from(logit - max) - total.ln()) as f32;
    // What a grammar forbids is not among the likeliest.
    let possible = logits.iter().filter(|&&logit| logit > f32::NEG_INFINITY).count();
    let mut ids = vec![0; top.min(possible)];
    let mut values = vec![0.0; ids.len()];
    if !ids.is_empty() {
        draw::top_k(logits, &mut ids, &mut values, &mut draw::Scratch::default());
    }
    Logprobs { token: of(logits[token as usize]), top: ids.into_iter().zip(values.into_iter().map(of)).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_normalised_and_sorted() {
        let Logprobs { token, top } = logprobs(&[0.0, 2.0f32.ln(), 1.0f32.ln(), f32::NEG_INFINITY], 1, 2);
        assert!((token - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 0]);
        assert!((top[1].1 - 0.25f32.ln()).abs() < 1e-6);
        assert!(logprobs(&[1.0, 2.0], 0, 0).top.is_empty());
        assert_eq!(logprobs(&[1.0, f32::NEG_INFINITY], 0, 2).top, [(0, 0.0)]);
    }
}

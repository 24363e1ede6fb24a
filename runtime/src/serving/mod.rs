//! Many requests at once: a thread that owns the engine and runs its rounds, and a handle that everyone else holds.

pub mod ask;
pub mod options;

pub use ask::{Answer, Ask, Emitted, Event, Logprobs, Refusal, Usage};
pub use options::ServiceOptions;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc as sync_mpsc;
use std::thread::JoinHandle;

use tokio::sync::{broadcast, mpsc};
use treespark_models::{ChatTemplate, Tokenizer};

use crate::error::Result;
use crate::llm::Llm;
use crate::sequence::Sequence;
use crate::stats::Statistics;

/// What does not change while a service runs.
#[derive(Debug, Clone)]
pub struct Facts {
    /// As a person would name the device.
    pub device: String,
    pub drafter: &'static str,
    pub vocab: usize,
    /// Tokens of a sequence, prompt included.
    pub context: usize,
    /// Sequences that run at once.
    pub max_requests: usize,
    /// Tokens that fit into the cache, of all sequences together.
    pub cache_tokens: usize,
}

/// A verified tree, for whoever watches.
#[derive(Debug, Clone, serde::Serialize)]
pub struct TreeView {
    /// Which ask, counted from the start of the service.
    pub request: u64,
    pub tokens: Vec<u32>,
    pub parents: Vec<usize>,
    /// Accepted nodes, the root first.
    pub path: Vec<usize>,
    pub bonus: u32,
}

/// One round, for whoever watches.
#[derive(Debug, Clone, serde::Serialize)]
pub struct RoundView {
    pub trees: Vec<TreeView>,
    /// Rows of the pass, prompts included.
    pub rows: usize,
    pub running: usize,
    pub waiting: usize,
    pub seconds: f64,
}

/// What was counted since the start.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Counters {
    pub rounds: u64,
    pub requests: u64,
    pub cancelled: u64,
    pub preempted: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub new_tokens: u64,
    pub drafted: u64,
    pub accepted: u64,
    /// Entry d - 1: rounds of a sequence whose tree reached depth d, and that accepted to depth d.
    pub by_depth: Vec<(u64, u64)>,
    pub running: usize,
    pub waiting: usize,
    pub pages_used: usize,
    pub pages: usize,
}

/// The text side of a model, which any thread may use.
pub struct Text {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub stop_tokens: Vec<u32>,
}

struct Shared {
    facts: Facts,
    text: Text,
    waiting: AtomicUsize,
    draining: AtomicBool,
    rounds: broadcast::Sender<Arc<RoundView>>,
}

/// A handle to a running engine. Cloning it is cheap.
#[derive(Clone)]
pub struct Service {
    shared: Arc<Shared>,
    asks: sync_mpsc::Sender<(Ask, mpsc::UnboundedSender<Event>)>,
    #[allow(dead_code)]
    thread: Arc<JoinHandle<()>>,
}

impl Service {
    /// Loads a model on a thread of its own and begins to serve it.
    pub fn start(load: impl FnOnce() -> Result<Llm> + Send + 'static) -> Result<Service> {
        let (asks, inbox) = sync_mpsc::channel::<(Ask, mpsc::UnboundedSender<Event>)>();
        let (ready, loaded) = sync_mpsc::channel();
        let thread = std::thread::spawn(move || {
            let llm = match load() {
                Ok(llm) => llm,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let (mut engine, text) = llm.into_parts();
            let facts = Facts {
                device: engine.backend().info().name.clone(),
                drafter: engine.drafter.name(),
                vocab: engine.target().config().vocab_size,
                context: engine.context(),
                max_requests: 1,
                cache_tokens: engine.context(),
            };
            let stop_tokens = text.stop_tokens.clone();
            let shared = Arc::new(Shared {
                facts,
                text,
                waiting: AtomicUsize::new(0),
                draining: AtomicBool::new(false),
                rounds: broadcast::channel(64).0,
            });
            if ready.send(Ok(shared.clone())).is_err() {
                return;
            }
            for (ask, events) in inbox {
                shared.waiting.fetch_sub(1, Ordering::Relaxed);
                let stops = if ask.ignore_stop_tokens { Vec::new() } else { stop_tokens.clone() };
                let (context, vocab) = (engine.context(), shared.facts.vocab);
                let mut usage = Usage { prompt_tokens: ask.prompt.len(), ..Usage::default() };
                let mut seq = Sequence::new(ask.prompt, ask.sampling, ask.max_new_tokens, stops, context, vocab);
                let mut stats = Statistics::default();
                if let Err(error) = engine.prefill(&mut seq, &mut stats, &mut |_| {}) {
                    let _ = events.send(Event::Failed(error.to_string()));
                    continue;
                }
                while seq.finished().is_none() && !events.is_closed() {
                    let round = engine.round(&mut seq, &mut stats).expect("a round");
                    usage.new_tokens += round.tokens.len();
                    usage.drafted += round.tree.len() - 1;
                    usage.accepted += round.accepted.draft_len();
                    let shape = round.tree.shape();
                    let tree = TreeView {
                        request: 0,
                        tokens: (0..round.tree.len()).map(|n| round.tree.token(n)).collect(),
                        parents: (0..round.tree.len()).map(|n| if n == 0 { 0 } else { shape.parent(n) }).collect(),
                        bonus: round.accepted.tokens[round.accepted.draft_len()],
                        path: round.accepted.path,
                    };
                    let rows = tree.tokens.len();
                    let view = RoundView { trees: vec![tree], rows, running: 1, waiting: 0, seconds: 0.01 };
                    let _ = shared.rounds.send(Arc::new(view));
                    let emitted = round.tokens.iter().map(|&token| Emitted { token, logprobs: None });
                    let _ = events.send(Event::Tokens(emitted.collect()));
                }
                if let Some(reason) = seq.finished() {
                    let _ = events.send(Event::End(reason, usage));
                }
                engine.release(&mut seq);
            }
        });
        let shared = loaded.recv().expect("the engine's thread answers")?;
        Ok(Service { shared, asks, thread: Arc::new(thread) })
    }

    /// The same, within limits. They are not kept yet.
    pub fn start_with(_: ServiceOptions, load: impl FnOnce() -> Result<Llm> + Send + 'static) -> Result<Service> {
        Service::start(load)
    }

    /// Takes an ask, or says why not.
    pub fn ask(&self, ask: Ask) -> Result<Answer, Refusal> {
        if self.shared.draining.load(Ordering::Relaxed) {
            return Err(Refusal::Draining);
        }
        ask.sampling.check().map_err(|error| Refusal::Bad(error.to_string()))?;
        let (events, answer) = mpsc::unbounded_channel();
        self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        self.asks.send((ask, events)).map_err(|_| Refusal::Stopped("the engine's thread ended".to_string()))?;
        Ok(Answer(answer))
    }

    pub fn facts(&self) -> &Facts {
        &self.shared.facts
    }

    pub fn text(&self) -> &Text {
        &self.shared.text
    }

    pub fn counters(&self) -> Counters {
        Counters::default()
    }

    /// Rounds as they happen; whoever reads too slowly misses some.
    pub fn watch(&self) -> broadcast::Receiver<Arc<RoundView>> {
        self.shared.rounds.subscribe()
    }

    /// Takes no more asks; those that it has are answered. `None` once nothing runs or waits.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Relaxed);
    }

    /// Why the engine stopped, if it has.
    pub fn failure(&self) -> Option<String> {
        None
    }
}

//! Many requests at once: a thread that owns the engine and runs its rounds, and a handle that everyone else holds.

pub mod ask;
pub mod batcher;
pub mod counters;

pub use ask::{Answer, Ask, Emitted, Event, Logprobs, Refusal, Usage};
pub use counters::{Counters, RoundView, TreeView};

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{broadcast, mpsc};
use treespark_models::{ChatTemplate, Tokenizer};

use crate::error::Result;
use crate::grammar::{Grammar, GrammarEngine};
use crate::llm::Llm;
use crate::scheduler::Policy;
use batcher::{Batcher, Message};

/// Rounds that a watcher may be behind before it misses some.
const WATCHED_ROUNDS: usize = 64;

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

/// The text side of a model, which any thread may use.
pub struct Text {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub stop_tokens: Vec<u32>,
    pub grammars: GrammarEngine,
}

/// How a service treats those who ask.
#[derive(Debug, Clone)]
pub struct ServiceOptions {
    /// Asks that may wait; more are refused.
    pub max_queue: usize,
    /// Where an ask names none.
    pub policy: Policy,
}

impl Default for ServiceOptions {
    fn default() -> ServiceOptions {
        ServiceOptions { max_queue: 256, policy: Policy::CONFIDENCE }
    }
}

type Letter = (Ask, Option<Grammar>, mpsc::UnboundedSender<Event>);

struct Shared {
    facts: Facts,
    text: Text,
    max_queue: usize,
    draining: AtomicBool,
    /// As of the last round.
    counters: Mutex<Counters>,
    failure: Mutex<Option<String>>,
    rounds: broadcast::Sender<Arc<RoundView>>,
    /// Asks that the engine's thread has not read yet.
    unread: Mutex<usize>,
}

/// A handle to a running engine. Cloning it is cheap; the engine ends with the last.
#[derive(Clone)]
pub struct Service {
    shared: Arc<Shared>,
    asks: Sender<Letter>,
}

impl Service {
    /// Loads a model on a thread of its own, and begins to serve it. Devices are used by the thread that opened them.
    pub fn start(load: impl FnOnce() -> Result<Llm> + Send + 'static, options: ServiceOptions) -> Result<Service> {
        let (asks, inbox) = channel::<Letter>();
        let (ready, loaded) = channel();
        std::thread::spawn(move || match load() {
            Ok(llm) => {
                let (shared, batcher) = prepare(llm, &options);
                if ready.send(Ok(shared.clone())).is_ok() {
                    serve(&shared, batcher, &inbox);
                }
            }
            Err(error) => drop(ready.send(Err(error))),
        });
        let shared = loaded.recv().expect("the engine's thread answers")?;
        Ok(Service { shared, asks })
    }

    /// Takes an ask, or says why not.
    pub fn ask(&self, ask: Ask) -> Result<Answer, Refusal> {
        if self.shared.draining.load(Ordering::Relaxed) {
            return Err(Refusal::Draining);
        }
        if let Some(why) = self.failure() {
            return Err(Refusal::Stopped(why));
        }
        ask.sampling.check().map_err(|error| Refusal::Bad(error.to_string()))?;
        // Here, for the engine's thread has other things to do.
        let grammar = ask.grammar.as_ref().map(|source| self.text().grammars.compile(source)).transpose();
        let grammar = grammar.map_err(|error| Refusal::Bad(error.to_string()))?;
        let mut unread = lock(&self.shared.unread);
        let waiting = *unread + lock(&self.shared.counters).waiting;
        if waiting >= self.shared.max_queue {
            return Err(Refusal::Busy { waiting });
        }
        let (events, answer) = Answer::channel();
        let stopped = |_| Refusal::Stopped(self.failure().unwrap_or_else(|| "its thread has ended".to_string()));
        self.asks.send((ask, grammar, events)).map_err(stopped)?;
        *unread += 1;
        Ok(answer)
    }

    pub fn facts(&self) -> &Facts {
        &self.shared.facts
    }

    pub fn text(&self) -> &Text {
        &self.shared.text
    }

    pub fn counters(&self) -> Counters {
        lock(&self.shared.counters).clone()
    }

    /// Rounds as they happen; whoever reads too slowly misses some.
    pub fn watch(&self) -> broadcast::Receiver<Arc<RoundView>> {
        self.shared.rounds.subscribe()
    }

    /// Takes no more asks; those that it has are answered.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Relaxed);
    }

    /// Why the engine stopped, if it has.
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared.failure).clone()
    }
}

fn prepare(llm: Llm, options: &ServiceOptions) -> (Arc<Shared>, Batcher) {
    let (engine, text) = llm.into_parts();
    let target = engine.target();
    let facts = Facts {
        device: engine.backend().info().name.clone(),
        drafter: engine.drafter.name(),
        vocab: target.config().vocab_size,
        context: engine.context(),
        max_requests: target.max_requests(),
        cache_tokens: target.pool().pages() * target.pool().page_size(),
    };
    let batcher = Batcher::new(engine, text.stop_tokens.clone(), options.policy);
    let shared = Shared {
        facts,
        text,
        max_queue: options.max_queue,
        draining: AtomicBool::new(false),
        counters: Mutex::new(batcher.counters()),
        failure: Mutex::new(None),
        rounds: broadcast::channel(WATCHED_ROUNDS).0,
        unread: Mutex::new(0),
    };
    (Arc::new(shared), batcher)
}

/// Tells of a panic of the engine's thread, which nobody would hear of otherwise.
struct Guard<'a>(&'a Shared);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            *lock(&self.0.failure) = Some("it panicked; standard error says where".to_string());
        }
    }
}

/// Rounds for as long as someone may ask.
fn serve(shared: &Shared, mut batcher: Batcher, inbox: &Receiver<Letter>) {
    let _guard = Guard(shared);
    let (post, mail) = channel::<Vec<Message>>();
    // Whoever waits is woken while the device computes.
    std::thread::spawn(move || mail.into_iter().flatten().for_each(Message::deliver));
    loop {
        if batcher.is_idle() {
            let Ok(letter) = inbox.recv() else { return };
            take(shared, &mut batcher, letter);
        }
        inbox.try_iter().for_each(|letter| take(shared, &mut batcher, letter));
        match batcher.round(shared.rounds.receiver_count() > 0) {
            Ok(Some(view)) => drop(shared.rounds.send(Arc::new(view))),
            Ok(None) => {}
            Err(error) => {
                *lock(&shared.failure) = Some(error.to_string());
                inbox.try_iter().for_each(|letter| take(shared, &mut batcher, letter));
                batcher.fail(&error);
                drop(post.send(batcher.take_mail()));
                return;
            }
        }
        let mail = batcher.take_mail();
        if !mail.is_empty() {
            drop(post.send(mail));
        }
        *lock(&shared.counters) = batcher.counters();
    }
}

fn take(shared: &Shared, batcher: &mut Batcher, (ask, grammar, events): Letter) {
    let mut unread = lock(&shared.unread);
    batcher.add(ask, grammar, events);
    *unread -= 1;
    *lock(&shared.counters) = batcher.counters();
}

/// What the others hold is whole between their statements, also if one of them panicked.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

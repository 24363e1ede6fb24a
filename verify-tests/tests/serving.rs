//! A service where things go wrong: a device that fails, pages that run out, queues that fill.

use treespark::backend::{Backend, BufferId, DeviceInfo, Extent, PassCost, PassId};
use treespark::cpu::CpuBackend;
use treespark::draft::ngram::NgramDrafter;
use treespark::network::{Limits, Network};
use treespark::scheduler::{Policy, Scheduler};
use treespark::serving::{Answer, Ask, Event, Refusal, Service, ServiceOptions};
use treespark::{Engine, Error, FinishReason, Llm, Result, Sampling};
use treespark_kernel_gen::{BufferDesc, Pass};
use treespark_models::{Model, Tensor};
use treespark_verify_tests::cases::tiny_models;
use treespark_verify_tests::decoding::tokenizer;

const CONTEXT: usize = 128;

/// Passes that are left when the device panics.
const PANIC: usize = 1 << 40;

/// A device that is lost after so many passes.
struct Frail {
    inner: CpuBackend,
    passes: usize,
}

impl Backend for Frail {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }

    fn load(&mut self, desc: &BufferDesc, parts: &[Tensor]) -> Result<BufferId> {
        self.inner.load(desc, parts)
    }

    fn alloc(&mut self, desc: &BufferDesc) -> Result<BufferId> {
        self.inner.alloc(desc)
    }

    fn free(&mut self, buffer: BufferId) {
        self.inner.free(buffer);
    }

    fn write(&mut self, buffer: BufferId, offset: usize, words: &[u32]) -> Result<()> {
        self.inner.write(buffer, offset, words)
    }

    fn read(&mut self, buffer: BufferId, offset: usize, len: usize) -> Result<Vec<u32>> {
        self.inner.read(buffer, offset, len)
    }

    fn compile(&mut self, pass: &Pass, buffers: &[BufferId]) -> Result<PassId> {
        self.inner.compile(pass, buffers)
    }

    fn run(&mut self, pass: PassId, extent: Extent) -> Result<()> {
        self.passes = self.passes.checked_sub(1).ok_or_else(|| Error::Device("lost".to_string()))?;
        assert_ne!(self.passes, PANIC, "a mistake in the engine");
        self.inner.run(pass, extent)
    }
}

/// A service over a tiny random model, two sequences at a time, on a device that lives for so many passes.
fn service(passes: usize, cache_tokens: Option<usize>, max_queue: usize) -> Service {
    let load = move || {
        let model = Model::open(&tiny_models()[0])?;
        let vocab = model.config().vocab_size;
        let mut backend: Box<dyn Backend> = Box::new(Frail { inner: CpuBackend::new(Some(1)), passes });
        let limits = Limits { cache_tokens, ..Limits::new(CONTEXT, 8).for_many(2, 0, false)? };
        let target = Network::load(backend.as_mut(), &model, limits, &mut |_, _| {})?;
        let scheduler = Scheduler::new(None, 8, PassCost::FREE_ROWS);
        let engine = Engine::new(backend, target, Box::new(NgramDrafter::default()), scheduler, CONTEXT);
        Ok(Llm::from_parts(engine, tokenizer(vocab), None, vec![]))
    };
    Service::start(load, ServiceOptions { max_queue, policy: Policy::CONFIDENCE }).unwrap()
}

fn ask(prompt: usize, max_new_tokens: usize) -> Ask {
    Ask {
        prompt: vec![3; prompt],
        sampling: Sampling { temperature: 1.0, ..Sampling::default() },
        max_new_tokens,
        ignore_stop_tokens: false,
        logprobs: None,
        policy: None,
        grammar: None,
    }
}

/// How an answer ends, and with how many tokens.
fn end(mut answer: Answer) -> (usize, Result<FinishReason, String>) {
    let mut tokens = 0;
    while let Some(event) = answer.wait() {
        match event {
            Event::Tokens(emitted) => tokens += emitted.len(),
            Event::End(reason, usage) => {
                assert_eq!(usage.new_tokens, tokens);
                return (tokens, Ok(reason));
            }
            Event::Failed(error) => return (tokens, Err(error)),
        }
    }
    panic!("an answer without an end");
}

#[test]
fn a_lost_device_is_told_to_everyone() {
    let service = service(30, None, 16);
    let answers: Vec<Answer> = (0..5).map(|_| service.ask(ask(4, 100)).unwrap()).collect();
    for answer in answers {
        assert!(end(answer).1.is_err_and(|error| error.contains("lost")));
    }
    // The thread ends right behind what it told.
    while service.failure().is_none() {
        std::thread::yield_now();
    }
    assert!(service.failure().unwrap().contains("lost"));
    let later = service.ask(ask(4, 1)).unwrap_err();
    assert!(matches!(&later, Refusal::Stopped(why) if why.contains("lost")), "{later}");
}

#[test]
fn a_panic_of_the_engine_is_told() {
    let service = service(PANIC + 10, None, 16);
    let mut answer = service.ask(ask(4, 100)).unwrap();
    while answer.wait().is_some() {}
    while service.failure().is_none() {
        std::thread::yield_now();
    }
    assert!(matches!(service.ask(ask(4, 1)), Err(Refusal::Stopped(_))));
}

#[test]
fn whoever_finds_no_page_waits_or_is_told() {
    // 48 tokens: one sequence at a time, and none of a hundred.
    let service = service(usize::MAX, Some(48), 16);
    let [short, other, long] = [ask(9, 20), ask(9, 20), ask(9, 100)].map(|ask| service.ask(ask).unwrap());
    assert_eq!([end(short), end(other)], [(20, Ok(FinishReason::Length)), (20, Ok(FinishReason::Length))]);
    assert!(end(long).1.is_err_and(|error| error.contains("context is full")));
    settle(&service);
}

/// Who has ended is counted behind the round in which he did.
fn settle(service: &Service) {
    let counted = || service.counters();
    while counted().pages_used + counted().running + counted().waiting > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn a_full_queue_refuses_and_says_so() {
    let service = service(usize::MAX, None, 2);
    let mut answers = Vec::new();
    let refusal = loop {
        match service.ask(ask(60, 60)) {
            Ok(answer) => answers.push(answer),
            Err(refusal) => break refusal,
        }
        assert!(answers.len() < 100, "nobody is refused");
    };
    assert!(matches!(refusal, Refusal::Busy { waiting } if waiting >= 2), "{refusal}");
    answers.into_iter().for_each(|answer| assert_eq!(end(answer), (60, Ok(FinishReason::Length))));
}

#[test]
fn who_drains_answers_those_that_it_has() {
    let service = service(usize::MAX, None, 16);
    let answers: Vec<Answer> = (0..4).map(|_| service.ask(ask(5, 40)).unwrap()).collect();
    service.drain();
    assert!(matches!(service.ask(ask(5, 1)), Err(Refusal::Draining)));
    answers.into_iter().for_each(|answer| assert_eq!(end(answer), (40, Ok(FinishReason::Length))));
}

#[test]
fn whoever_leaves_frees_his_pages() {
    let service = service(usize::MAX, None, 16);
    let mut answer = service.ask(ask(5, 100)).unwrap();
    assert!(matches!(answer.wait(), Some(Event::Tokens(_))));
    drop(answer);
    while service.counters().cancelled == 0 {
        std::thread::yield_now();
    }
    settle(&service);
}

#[test]
fn a_prefix_is_run_once() {
    let service = service(usize::MAX, None, 16);
    let usage = |ask: Ask| {
        let mut answer = service.ask(ask).unwrap();
        loop {
            if let Event::End(_, usage) = answer.wait().unwrap() {
                return usage;
            }
        }
    };
    assert_eq!(usage(ask(50, 4)).cached_tokens, 0);
    // Whole pages of 16, and never the last token.
    assert_eq!(usage(ask(50, 4)).cached_tokens, 48);
    assert_eq!(usage(ask(48, 4)).cached_tokens, 32);
}

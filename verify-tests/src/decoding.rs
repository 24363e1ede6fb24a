//! Whole generations of random tiny models: speculative decoding against plain, plain against the oracle.
//!
//! A [`Decoding`] says everything: the model, who drafts, the tree, the cache and what is asked. [`Decoding::check`] decodes it
//! plainly, then with drafts, and wants equal tokens, equal text and the same end. Where a backend promises less than equal
//! bits, a first difference must be a near-tie.

mod answer;
pub mod arb;
mod config;
mod guesser;
pub mod language;
mod together;

use std::fmt::Write;

use answer::{Answer, expected};
pub use answer::{Stop, tokenizer};
pub use guesser::{GUESSERS, Guesser, backbone};
use treespark::backend::{Backend, PassCost};
use treespark::draft::block::BlockDrafter;
use treespark::draft::model::{MAX_CHILDREN, ModelDrafter};
use treespark::draft::mtp::MtpDrafter;
use treespark::draft::ngram::NgramDrafter;
use treespark::draft::{Drafter, NoDrafter};
use treespark::network::{Limits, Network};
use treespark::scheduler::Scheduler;
use treespark::{Engine, Error, FinishReason, GenerateOptions, GrammarSource, Llm, Sampling, Sequence, Statistics};
use treespark_kernel_gen::{DType, TreeShape};
use treespark_models::{Model, Speculator};

use crate::conformance::agreement::{Agreement, Tolerance};
use crate::conformance::same;
use crate::half_right::HalfRight;
use crate::logits::logits;
use crate::near_tie::{Verdict, classify, draw_context};
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::shared::Shared;
use crate::tiny_model::Sizes;

/// A random tiny model, who drafts for it, and what is asked.
#[derive(Debug, Clone)]
pub struct Decoding {
    /// Pages of the cache, too.
    pub sizes: Sizes,
    pub seed: u64,
    pub guesser: Guesser,
    /// The tree of every round, or the drafter's own choice.
    pub shape: Option<TreeShape>,
    pub max_nodes: usize,
    /// Tokens of a sequence.
    pub context: usize,
    pub asks: Vec<Ask>,
    pub way: Way,
}

/// How the asks are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One after the other, as text.
    Alone,
    /// All at once, a round each in turn, from one pool of pages that may be too small for them.
    InTurns,
    /// By a batcher with so many places, which may have pages for one of them alone, and of whose clients one may leave.
    Together { places: usize, few_pages: bool, one_leaves: bool },
}

impl Way {
    pub fn name(self) -> &'static str {
        match self {
            Way::Alone => "alone",
            Way::InTurns => "in turns",
            Way::Together { few_pages: false, .. } => "together",
            Way::Together { few_pages: true, .. } => "together, few pages",
        }
    }
}

#[derive(Debug, Clone)]
pub struct Ask {
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    pub max_new_tokens: usize,
    pub stop: Stop,
    /// One of the languages: all of the answer is in it, if it comes to its end.
    pub language: Option<&'static str>,
}

/// What was seen on the way.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub rounds: usize,
    /// Draft tokens that were accepted.
    pub accepted: usize,
    /// Answers that differ, excusably.
    pub near_ties: usize,
    /// Rounds that found no page.
    pub exhausted: usize,
    /// Sequences that had to wait again, and tokens of prompts that were in the cache already.
    pub preempted: usize,
    pub shared: usize,
    /// How answers ended.
    pub ends: Vec<FinishReason>,
}

impl Decoding {
    /// What is wrong with speculative decoding of this on a backend, if anything.
    pub fn check(&self, backend: &Shared) -> Result<Seen, String> {
        let model = self.model();
        let plain = self.plain(&model, backend.share())?;
        let mut seen = Seen::default();
        seen.near_ties += usize::from(!self.as_the_oracle(&model, backend, &plain[0])?);
        match self.way {
            Way::Alone => self.check_texts(&model, backend, &plain, &mut seen)?,
            Way::InTurns => self.check_turns(&model, backend, &plain, &mut seen)?,
            Way::Together { .. } => self.check_together(&model, backend, &plain, &mut seen)?,
        }
        Ok(seen)
    }

    pub fn model(&self) -> Model {
        Model::random(self.config(), self.seed)
    }

    /// Sizes with the cache that the runtime chooses.
    fn sizes(&self) -> Sizes {
        Sizes { cache: if self.sizes.weights == DType::F32 { DType::F32 } else { DType::BF16 }, ..self.sizes }
    }

    fn limits(&self) -> Limits {
        let max_nodes = self.shape.as_ref().map_or(self.max_nodes, TreeShape::len);
        let top_k = if self.guesser == Guesser::Mtp { MAX_CHILDREN } else { 1 };
        let one = Limits { page_size: self.sizes.page_size, top_k, ..Limits::new(self.context, max_nodes) };
        match self.way {
            Way::Together { places, few_pages, .. } => {
                let many = one.for_many(places, 0, false).expect("a few sequences");
                // Of the longest sequence, a tree or a block behind it, and whatever a page leaves over.
                let one_alone = self.context + max_nodes.max(16) + 2 * self.sizes.page_size;
                Limits { cache_tokens: few_pages.then_some(one_alone), ..many }
            }
            _ => one,
        }
    }

    fn plain_engine(&self, model: &Model, mut backend: Box<dyn Backend>) -> Result<Engine, String> {
        let limits = Limits { page_size: self.sizes.page_size, ..Limits::new(self.context, 1) };
        let target = Network::load(backend.as_mut(), model, limits, &mut |_, _| {}).map_err(told)?;
        let scheduler = Scheduler::new(None, 1, PassCost::FREE_ROWS);
        Ok(Engine::new(backend, target, Box::new(NoDrafter), scheduler, self.context))
    }

    /// An engine with its drafter; one that is half right needs the truths.
    pub fn engine(
        &self,
        model: &Model,
        mut backend: Box<dyn Backend>,
        truths: Vec<Vec<u32>>,
    ) -> Result<Engine, String> {
        let (config, limits) = (model.config(), self.limits());
        let speculator =
            self.guesser.speculator(config).map(|drafter| Speculator::random(drafter, config, self.seed ^ 1));
        let quiet = &mut |_, _| {};
        let target =
            Network::load_with_speculator(backend.as_mut(), model, speculator.as_ref(), limits, quiet).map_err(told)?;
        let drafter: Box<dyn Drafter> = match (&self.guesser, &speculator) {
            (Guesser::Mtp, _) => Box::new(MtpDrafter::new().map_err(told)?),
            (_, Some(speculator)) => Box::new(BlockDrafter::load(speculator).map_err(told)?),
            (Guesser::HalfRight, _) => {
                Box::new(HalfRight { truths, vocab: config.vocab_size, rng: Rng::new(self.seed) })
            }
            (Guesser::Model { itself }, _) => {
                let draft = Model::random(config.clone(), if *itself { self.seed } else { self.seed ^ 2 });
                let vocab = config.vocab_size;
                Box::new(ModelDrafter::load(backend.as_mut(), &draft, vocab, limits, quiet).map_err(told)?)
            }
            _ => Box::new(NgramDrafter::default()),
        };
        // Rows as good as free, so that drafts are large.
        let scheduler = Scheduler::new(self.shape.clone(), self.max_nodes, PassCost::new(&[(1, 1.0), (2, 1.001)]));
        Ok(Engine::new(backend, target, drafter, scheduler, self.context))
    }

    /// Nothing stops it, but for the end of its language.
    pub fn sequence(&self, ask: &Ask) -> Sequence {
        let Ask { prompt, sampling, max_new_tokens, language, .. } = ask;
        let vocab = self.sizes.vocab;
        let stop_tokens = language.map(|_| language::end(vocab)).into_iter().collect();
        let mut seq =
            Sequence::new(prompt.clone(), sampling.clone(), *max_new_tokens, stop_tokens, self.context, vocab);
        seq.grammar = language.map(|language| language::grammar(language, vocab));
        seq
    }

    /// What plain decoding answers where nothing stops it, prompts included.
    fn plain(&self, model: &Model, backend: Box<dyn Backend>) -> Result<Vec<Sequence>, String> {
        let mut engine = self.plain_engine(model, backend)?;
        let mut answer = |ask: &Ask| {
            let mut seq = self.sequence(ask);
            engine.generate(&mut seq, &mut Statistics::default()).map_err(told)?;
            self.in_its_language(ask, &seq)?;
            Ok(seq)
        };
        self.asks.iter().map(&mut answer).collect()
    }

    fn in_its_language(&self, ask: &Ask, seq: &Sequence) -> Result<(), String> {
        let (Some(language), Some(FinishReason::StopToken)) = (ask.language, seq.finished()) else { return Ok(()) };
        let (_, answer) = seq.generated().split_last().ok_or("an answer without its stop token")?;
        let tokenizer = tokenizer(self.sizes.vocab);
        let text: Vec<u8> = answer.iter().flat_map(|&token| tokenizer.token_bytes(token)).collect();
        match language::contains(language, &text) {
            true => Ok(()),
            false => Err(format!("{:?} is not in {language}", String::from_utf8_lossy(&text))),
        }
    }

    /// The first answer against that of the f64 oracle, of which every round is driven by the host.
    fn as_the_oracle(&self, model: &Model, backend: &Shared, plain: &Sequence) -> Result<bool, String> {
        let mut engine = self.plain_engine(model, Box::new(Oracle::new()))?.drafting_on_the_host();
        let mut seq = self.sequence(&self.asks[0]);
        engine.generate(&mut seq, &mut Statistics::default()).map_err(told)?;
        let agreement = Agreement::Within(Tolerance::logits(backend.info().backend, &self.sizes()));
        let what = "plain decoding against the oracle";
        self.same_tokens(what, agreement, &self.asks[0], backend, [plain.tokens(), seq.tokens()])
    }

    /// One after the other, as text. A stop token is the model's: it ends every answer.
    fn check_texts(&self, model: &Model, backend: &Shared, plain: &[Sequence], seen: &mut Seen) -> Result<(), String> {
        let truths = plain.iter().map(|seq| seq.tokens().to_vec()).collect();
        let engine = self.engine(model, backend.share(), truths)?;
        let tokenizer = tokenizer(self.sizes.vocab);
        let stops = self.asks.iter().zip(plain).filter_map(|(ask, plain)| ask.stop.token(plain.generated()));
        // Where there is a language its end is the model's only stop token, as it was for plain decoding.
        let stop_tokens: Vec<u32> = match self.asks.iter().any(|ask| ask.language.is_some()) {
            true => vec![language::end(self.sizes.vocab)],
            false => stops.collect(),
        };
        let mut llm = Llm::from_parts(engine, tokenizer.clone(), None, stop_tokens.clone());
        for (index, (ask, plain)) in self.asks.iter().zip(plain).enumerate() {
            let stop = ask.stop.text(plain.generated(), &tokenizer);
            let want = expected(plain, &stop_tokens, &stop, &tokenizer);
            let options = GenerateOptions {
                sampling: ask.sampling.clone(),
                max_new_tokens: ask.max_new_tokens,
                stop: stop.into_iter().collect(),
                grammar: ask.language.map(|language| GrammarSource::Regex(language.to_string())),
            };
            let mut generation = llm.generate(ask.prompt.clone(), &options).map_err(told)?;
            let mut text = String::new();
            for step in generation.by_ref() {
                let step = step.map_err(told)?;
                seen.rounds += 1;
                seen.accepted += step.round.accepted.draft_len();
                text += &step.text;
            }
            let why = generation.finish_reason().ok_or("a generation ended without a reason")?;
            let tokens = generation.tokens().to_vec();
            seen.ends.push(why);
            let whole = |tokens: &[u32]| [&ask.prompt, tokens].concat();
            let agreement = Agreement::of(backend.info().backend, &self.sizes());
            let both = [whole(&tokens), whole(&want.tokens)];
            let what = format!("answer {index}");
            if self.same_tokens(&what, agreement, ask, backend, [&both[0], &both[1]])? {
                same(&what, Answer { tokens, text, why }, want)?;
            } else {
                seen.near_ties += 1;
            }
        }
        Ok(())
    }

    /// A round each, in turn. Who finds no page waits; if all wait, the one that is furthest is given up.
    fn check_turns(&self, model: &Model, backend: &Shared, plain: &[Sequence], seen: &mut Seen) -> Result<(), String> {
        let truths = plain.iter().map(|seq| seq.tokens().to_vec()).collect();
        let mut engine = self.engine(model, backend.share(), truths)?;
        let mut stats = Statistics::default();
        let mut sequences: Vec<Sequence> = self.asks.iter().map(|ask| self.sequence(ask)).collect();
        let mut is_begun = vec![false; sequences.len()];
        while sequences.iter().any(|seq| seq.finished().is_none()) {
            let mut went_on = false;
            for (seq, begun) in sequences.iter_mut().zip(&mut is_begun).filter(|(seq, _)| seq.finished().is_none()) {
                let result = match *begun {
                    false => engine.prefill(seq, &mut stats, &mut |_| {}).map(|()| *begun = true),
                    true => engine.round(seq, &mut stats).map(|round| seen.accepted += round.accepted.draft_len()),
                };
                match result {
                    Ok(()) => went_on = true,
                    Err(Error::ContextFull { .. }) => seen.exhausted += 1,
                    Err(error) => return Err(told(error)),
                }
                if seq.finished().is_some() {
                    engine.release(seq);
                }
            }
            if !went_on {
                let waiting = sequences.iter_mut().filter(|seq| seq.finished().is_none());
                let furthest = waiting.max_by_key(|seq| seq.tokens().len()).ok_or("nobody waits")?;
                furthest.finish(FinishReason::Cancelled);
                engine.release(furthest);
            }
        }
        seen.rounds += stats.rounds;
        for (index, (seq, plain)) in sequences.iter().zip(plain).enumerate() {
            let why = seq.finished().ok_or("a sequence without an end")?;
            seen.ends.push(why);
            let (what, agreement) = (format!("sequence {index}"), Agreement::of(backend.info().backend, &self.sizes()));
            let both = [seq.tokens(), plain.tokens()];
            match self.same_tokens(&what, agreement, &self.asks[index], backend, both)? {
                true if why == FinishReason::Cancelled => {}
                true => same(&what, (seq.tokens(), Some(why)), (plain.tokens(), plain.finished()))?,
                false => seen.near_ties += 1,
            }
        }
        Ok(())
    }

    /// Whether two texts are equal as far as both go; an error where they differ inexcusably.
    fn same_tokens(
        &self,
        what: &str,
        agreement: Agreement,
        ask: &Ask,
        backend: &Shared,
        [got, want]: [&[u32]; 2],
    ) -> Result<bool, String> {
        let Some(at) = got.iter().zip(want).position(|(a, b)| a != b) else { return Ok(true) };
        let differ = format!("{what}: token {at} is {}, not {}: {got:?} against {want:?}", got[at], want[at]);
        let Agreement::Within(tolerance) = agreement else { return Err(differ) };
        let text = [want[..at].to_vec()];
        let model = self.model();
        let row = |mut backend: Box<dyn Backend>| {
            let mut rows = logits(backend.as_mut(), &model, self.sizes().cache, &text).remove(0);
            let mut row = rows.pop().expect("a prompt has a token");
            if let Some(language) = ask.language {
                language::forbid(language, &want[ask.prompt.len()..at], &mut row);
            }
            row
        };
        let rows = [row(backend.share()), row(Box::<Oracle>::default())];
        let finite = rows[1].iter().filter(|x| x.is_finite());
        let largest = finite.fold(0f32, |largest, x| largest.max(x.abs()));
        let temperature = if ask.sampling.temperature > 0.0 { f64::from(ask.sampling.temperature) } else { 1.0 };
        let penalty = f64::from(ask.sampling.repetition_penalty);
        // The penalty divides logits or multiplies them.
        let scale = penalty.max(1.0 / penalty) / temperature;
        let tolerance = tolerance.relative * f64::from(largest) * scale;
        let context = draw_context(&ask.sampling, &want[..at]);
        let divergence = classify(at, [got[at], want[at]], [&rows[0], &rows[1]], &context, tolerance);
        match divergence.verdict {
            Verdict::NearTie => Ok(false),
            _ => Err(format!("{differ}\n{divergence}")),
        }
    }

    /// For people.
    pub fn describe(&self) -> String {
        let mut text = format!("{:?}\nseed {}, context {}, {:?}", self.sizes, self.seed, self.context, self.guesser);
        match &self.shape {
            Some(shape) => _ = write!(text, ", tree {shape}"),
            None => _ = write!(text, ", up to {} nodes", self.max_nodes),
        }
        text += &format!(", {}\n", self.way.name());
        for Ask { prompt, sampling, max_new_tokens, stop, language } in &self.asks {
            let language = language.unwrap_or("anything");
            _ = writeln!(text, "{prompt:?}, up to {max_new_tokens} tokens, stop {stop:?}, {language}, {sampling:?}");
        }
        text
    }
}

fn told(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::strategy::{Strategy, ValueTree};
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
    use treespark::cpu::CpuBackend;
    use treespark_kernel_gen::Op;

    use super::*;
    use crate::arb::Family;
    use crate::mutant::{Mistake, Mutant};

    /// How many of some decodings are wrong on a backend with a mistake.
    fn found(guesser: &str, mistake: Mistake) -> usize {
        let config = Config { failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
        let wrong = (0..60).filter(|_| {
            let decoding = arb::decodings(Family::Llama, true, guesser).new_tree(&mut runner).unwrap().current();
            let backend = Mutant::new(Box::new(CpuBackend::new(Some(1))), mistake);
            decoding.check(&Shared::new(Box::new(backend))).is_err()
        });
        wrong.count()
    }

    #[test]
    fn rounds_that_go_wrong_are_found() {
        assert_eq!(found("half right", Mistake::Request(|_| {})), 0);
        // Accepted rows stay where they are.
        assert!(found("half right", Mistake::Op(|op| !matches!(op, Op::Commit { .. }))) > 2);
        // Positions by slot and not by depth: a chain does not show it.
        let by_slot = |row: &mut treespark_kernel_gen::Row| {
            row.position = row.position - (row.path().count() as u32 - 1) + row.node;
        };
        assert!(found("half right", Mistake::Row(by_slot)) > 2);
    }
}

//! Text in, text out: a model with its tokenizer, and generations that stream.

use std::path::{Path, PathBuf};

use treespark_kernel_gen::{MAX_NODES, TreeShape};
use treespark_models::llama::streamed_bytes;
use treespark_models::{ChatTemplate, Config, Message, Model, Speculator, TextStream, Tokenizer, hub, pretrained};

use crate::backend::{Backend, DeviceInfo, PassCost};
use crate::devices::{self, BackendChoice};
use crate::draft::block::BlockDrafter;
use crate::draft::model::{MAX_CHILDREN, ModelDrafter};
use crate::draft::mtp::MtpDrafter;
use crate::draft::ngram::NgramDrafter;
use crate::draft::{Drafter, NoDrafter};
use crate::engine::{Engine, Round};
use crate::error::{Error, Result};
use crate::grammar::{GrammarEngine, GrammarSource};
use crate::network::{Limits, Network};
use crate::plan::MemoryPlan;
use crate::sampling::Sampling;
use crate::scheduler::Scheduler;
use crate::sequence::{FinishReason, Sequence};
use crate::serving::Text;
use crate::stats::Statistics;
use crate::stop::StopStrings;

/// Context that is set up when none is asked for: the model's own, up to this.
const DEFAULT_CONTEXT: usize = 8192;
/// Largest tree that a drafter may choose by itself, where no shape is given.
const DEFAULT_MAX_NODES: usize = 64;

/// Who drafts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DrafterChoice {
    /// The DSpark drafter that is shipped for the target, or repeats where there is none.
    Auto,
    /// Plain decoding.
    None,
    /// Repeats of the prompt and the generated text.
    Ngram,
    /// The target's own module for the next tokens (MTP), where its checkpoint has one.
    Mtp,
    /// One that is shipped for the target, by its name: `dspark`, `medusa` or `model`.
    Shipped(&'static str),
    /// A speculator that was made for the target, or a model with the same tokenizer: anything that `--model` takes.
    Path(String),
}

const SHIPPED: [&str; 3] = ["dspark", "medusa", "model"];

impl DrafterChoice {
    /// Where its checkpoint is, if it has one.
    fn resolve(&self, target: &str, progress: &mut dyn FnMut(LoadProgress)) -> Result<Option<PathBuf>> {
        Ok(match self {
            DrafterChoice::Auto => pretrained::find(target, "dspark").ok(),
            DrafterChoice::None | DrafterChoice::Ngram | DrafterChoice::Mtp => None,
            DrafterChoice::Shipped(name) => Some(pretrained::find(target, name)?),
            DrafterChoice::Path(name) => Some(Llm::resolve(name, progress)?),
        })
    }
}

impl std::str::FromStr for DrafterChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<DrafterChoice, String> {
        if let Some(name) = SHIPPED.into_iter().find(|name| *name == text) {
            return Ok(DrafterChoice::Shipped(name));
        }
        let path = |name: &str| Ok(DrafterChoice::Path(name.to_string()));
        match (text, text.strip_prefix("model:")) {
            ("auto", _) => Ok(DrafterChoice::Auto),
            ("none", _) => Ok(DrafterChoice::None),
            ("ngram", _) => Ok(DrafterChoice::Ngram),
            ("mtp", _) => Ok(DrafterChoice::Mtp),
            (_, Some(name)) if !name.is_empty() => path(name),
            // A mistyped name is not taken for the name of a file that is missing.
            _ if text.contains(['/', '.']) || Path::new(text).exists() => path(text),
            _ => Err(format!("'{text}' is no drafter; there are: auto, none, ngram, mtp, dspark, medusa, model, PATH")),
        }
    }
}

/// What to load and how to run it.
#[derive(Debug, Clone)]
pub struct LlmOptions {
    /// A folder in the Hugging Face layout, a GGUF file, a name this project knows, or `org/name` in the hub's cache.
    pub model: String,
    /// Random weights of this seed, in the sizes of the model's config alone: for whoever measures speed.
    pub random_weights: Option<u64>,
    pub drafter: DrafterChoice,
    /// The tree of every round; `None` lets drafter and scheduler choose.
    pub tree: Option<TreeShape>,
    /// Nodes of the largest tree that may be chosen, root included; `None` is 64. A given tree has its own size.
    pub max_nodes: Option<usize>,
    /// Verify as many nodes as that every round, whether they pay or not; without a given tree.
    pub all_nodes: bool,
    pub backend: BackendChoice,
    /// Tokens of a sequence, prompt included; `None` takes the model's own, up to 8192.
    pub context: Option<usize>,
    /// For many sequences at once, which a [`Service`](crate::serving::Service) runs; `None` is one at a time.
    pub many: Option<Many>,
}

/// Room for many sequences.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Many {
    /// Sequences that run at once; `None`: as many as the device serves well.
    pub max_requests: Option<usize>,
    /// Tokens that the cache holds, of all sequences together; `None`: as many as they may need, and the memory has room for.
    pub cache_tokens: Option<usize>,
}

impl Many {
    fn max_requests(&self, backend: &dyn Backend) -> usize {
        self.max_requests.unwrap_or(match backend.drafts() {
            true => 128,
            // Where rows cost what they compute, many sequences are no faster than few.
            false if backend.info().cost.of(16) < 2.0 => 32,
            false => 8,
        })
    }
}

impl Default for LlmOptions {
    fn default() -> LlmOptions {
        LlmOptions {
            model: hub::DEFAULT_MODEL.to_string(),
            random_weights: None,
            drafter: DrafterChoice::Auto,
            tree: None,
            max_nodes: None,
            all_nodes: false,
            backend: BackendChoice::Auto,
            context: None,
            many: None,
        }
    }
}

/// What a load is doing.
#[derive(Debug, Clone)]
pub enum LoadProgress {
    /// Getting the checkpoint.
    Hub(hub::Progress),
    /// Weights on the device, in bytes.
    Weights { done: usize, total: usize },
    /// What will be on the device; only of a model for many sequences, as is the next.
    Memory(MemoryPlan),
    /// Measuring what passes cost.
    Timing { done: usize, total: usize },
}

/// How a generation ends and draws.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    pub sampling: Sampling,
    pub max_new_tokens: usize,
    /// Texts that end the generation; they and what follows are not part of it.
    pub stop: Vec<String>,
    /// What the answer must be.
    pub grammar: Option<GrammarSource>,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions { sampling: Sampling::default(), max_new_tokens: 256, stop: Vec::new(), grammar: None }
    }
}

/// A language model, ready to generate.
/// What passes of a model cost, on a device whose costs are those of a dense one.
fn cost_of(config: &Config, device: &DeviceInfo) -> PassCost {
    let [bytes, of_experts] = streamed_bytes(config);
    let beside = config.layers * device.layer_bytes;
    match &config.experts {
        Some(experts) => device.cost.with_experts(bytes + beside, of_experts, [experts.chosen, experts.count]),
        None => device.cost.clone(),
    }
}

pub struct Llm {
    engine: Engine,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    stop_tokens: Vec<u32>,
    grammars: GrammarEngine,
}

impl Llm {
    /// Loads the default model on the best device.
    pub fn load(options: &LlmOptions) -> Result<Llm> {
        Llm::load_with_progress(options, &mut |_| {})
    }

    pub fn load_with_progress(options: &LlmOptions, progress: &mut dyn FnMut(LoadProgress)) -> Result<Llm> {
        let path = Llm::resolve(&options.model, progress)?;
        let model = match options.random_weights {
            Some(seed) => Model::random_like(&path, seed)?,
            None => Model::open(&path)?,
        };
        let config = model.config();
        let own = config.max_position_embeddings;
        let context = options.context.unwrap_or(own.min(DEFAULT_CONTEXT));
        if context < 2 || context > own {
            return Err(Error::Parameter {
                parameter: "context",
                value: context.to_string(),
                expected: "2 to the model's own context (max_position_embeddings)",
            });
        }
        let chosen = options.max_nodes.unwrap_or(DEFAULT_MAX_NODES);
        if !(1..=MAX_NODES).contains(&chosen) {
            let expected = "1 to 256 nodes of a tree, root included";
            return Err(Error::Parameter { parameter: "max_nodes", value: chosen.to_string(), expected });
        }
        let tokenizer = model.tokenizer()?;
        let (mut speculator, mut draft) = (None, None);
        match options.drafter.resolve(&options.model, progress)? {
            Some(path) if Speculator::is_at(&path) => speculator = Some(Speculator::open(&path, config)?),
            Some(path) => {
                let model = Model::open(&path)?;
                model.tokenizer()?.check_same(&tokenizer)?;
                draft = Some(model);
            }
            None if options.drafter == DrafterChoice::Mtp => speculator = Some(Speculator::of_target(&model)?),
            None => {}
        }

        let mut backend = devices::open(&options.backend)?;
        let mut limits = Limits::new(context, options.tree.as_ref().map_or(chosen, TreeShape::len));
        if options.drafter == DrafterChoice::Mtp {
            limits.top_k = MAX_CHILDREN.min(config.vocab_size);
        }
        if let Some(many) = options.many {
            let block_rows = speculator.as_ref().map_or(0, |speculator| speculator.config().block().rows);
            limits = limits.for_many(many.max_requests(backend.as_ref()), block_rows, backend.drafts())?;
            limits.cache_tokens = many.cache_tokens;
            let free = backend.free_bytes();
            let plan = MemoryPlan::new(&model, speculator.as_ref(), draft.as_ref(), &limits, free)?;
            limits.cache_tokens = Some(plan.tokens);
            progress(LoadProgress::Memory(plan));
        }
        let mut weights = |done, total| progress(LoadProgress::Weights { done, total });
        let beside = speculator.as_ref();
        let mut target = Network::load_with_speculator(backend.as_mut(), &model, beside, limits, &mut weights)?;
        let drafter: Box<dyn Drafter> = match (&speculator, &draft) {
            _ if options.drafter == DrafterChoice::Mtp => Box::new(MtpDrafter::new()?),
            (Some(speculator), _) => Box::new(BlockDrafter::load(speculator)?),
            (None, Some(draft)) => {
                Box::new(ModelDrafter::load(backend.as_mut(), draft, config.vocab_size, limits, &mut weights)?)
            }
            _ if options.drafter == DrafterChoice::None => Box::new(NoDrafter),
            _ => Box::new(NgramDrafter::default()),
        };
        let cost = if options.all_nodes { PassCost::FREE_ROWS } else { cost_of(config, backend.info()) };
        target.set_cost(cost.clone());
        let scheduler = Scheduler::new(options.tree.clone(), limits.max_nodes.min(MAX_NODES), cost);
        let mut engine = Engine::new(backend, target, drafter, scheduler, context);
        engine.prepare()?;
        if options.many.is_some() {
            engine.serve_many(&mut |done, total| progress(LoadProgress::Timing { done, total }))?;
        }
        let (template, stop_tokens) = (model.chat_template()?, model.stop_tokens(&tokenizer));
        Ok(Llm::from_parts(engine, tokenizer, template, stop_tokens))
    }

    /// Over parts that are there already. Chats need a template; a generation ends at one of the stop tokens.
    pub fn from_parts(
        engine: Engine,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        stop_tokens: Vec<u32>,
    ) -> Llm {
        let grammars = GrammarEngine::new(&tokenizer, engine.target().config().vocab_size, &stop_tokens);
        Llm { engine, tokenizer, template, stop_tokens, grammars }
    }

    /// The engine, and the text side of the model.
    pub fn into_parts(self) -> (Engine, Text) {
        let Llm { engine, tokenizer, template, stop_tokens, grammars } = self;
        (engine, Text { tokenizer, template, stop_tokens, grammars })
    }

    fn resolve(name: &str, progress: &mut dyn FnMut(LoadProgress)) -> Result<PathBuf> {
        Ok(hub::resolve(name, &mut |step| progress(LoadProgress::Hub(step)))?)
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The prompt that a conversation becomes by the model's chat template. A model without one is an error.
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.template.as_ref().ok_or(Error::NoChatTemplate)?;
        Ok(self.tokenizer.encode(&template.render(messages, true)?, false)?)
    }

    /// A text as it is, to be continued.
    pub fn text_prompt(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, true)?)
    }

    /// Starts a generation; iterating over it yields the rounds as they come.
    pub fn generate(&mut self, prompt: Vec<u32>, options: &GenerateOptions) -> Result<Generation<'_>> {
        self.generate_with_progress(prompt, options, &mut |_, _| {})
    }

    /// The same, telling how many tokens of the prompt are done, of how many.
    pub fn generate_with_progress(
        &mut self,
        prompt: Vec<u32>,
        options: &GenerateOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Generation<'_>> {
        options.sampling.check()?;
        let total = prompt.len();
        let mut sequence = Sequence::new(
            prompt,
            options.sampling.clone(),
            options.max_new_tokens,
            self.stop_tokens.clone(),
            self.engine.context(),
            self.engine.target().config().vocab_size,
        );
        sequence.grammar = options.grammar.as_ref().map(|source| self.grammars.compile(source)).transpose()?;
        let mut statistics = Statistics::default();
        self.engine.prefill(&mut sequence, &mut statistics, &mut |done| progress(done, total))?;
        Ok(Generation {
            stream: self.tokenizer.stream(),
            engine: &mut self.engine,
            stop: StopStrings::new(&options.stop),
            sequence,
            statistics,
        })
    }
}

/// One round of a generation, as text.
#[derive(Debug, Clone)]
pub struct Step {
    /// The new text. May be empty: a half-known character or stop string is held back.
    pub text: String,
    pub round: Round,
}

/// A running generation: an iterator over its rounds. Stop iterating to cancel it.
pub struct Generation<'a> {
    engine: &'a mut Engine,
    stream: TextStream,
    stop: StopStrings,
    sequence: Sequence,
    statistics: Statistics,
}

impl Generation<'_> {
    /// What has been done so far.
    pub fn statistics(&self) -> Statistics {
        let drafter = self.engine.drafter.memory_use();
        let target = self.engine.target.memory_use();
        Statistics {
            memory: target + drafter,
            weight_bytes_read: self.engine.target.pass_weight_bytes() * self.statistics.rounds,
            backend: self.engine.backend().info().name.clone(),
            finish_reason: self.finish_reason(),
            ..self.statistics.clone()
        }
    }

    /// Why the generation ended; `None` while it has not.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.sequence.finished()
    }

    /// Generated tokens so far, a closing stop token included.
    pub fn tokens(&self) -> &[u32] {
        self.sequence.generated()
    }

    /// Ends the generation as cancelled; the statistics so far remain.
    pub fn cancel(&mut self) {
        self.sequence.finish(FinishReason::Cancelled);
    }

    fn step(&mut self) -> Result<Step> {
        let mut round = self.engine.round(&mut self.sequence, &mut self.statistics)?;
        let mut text = String::new();
        for (i, &token) in round.tokens.iter().enumerate() {
            if !self.sequence.is_stop_token(token) {
                text += &self.stop.push(&self.stream.push(token));
            }
            if self.stop.found() {
                let surplus = round.tokens.len() - (i + 1);
                self.sequence.cut(surplus, FinishReason::StopString);
                self.statistics.new_tokens -= surplus;
                round.tokens.truncate(i + 1);
                break;
            }
        }
        if self.sequence.finished().is_some() && !self.stop.found() {
            text += &self.stop.push(&self.stream.finish());
            text += &self.stop.finish();
        }
        Ok(Step { text, round })
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Result<Step>> {
        if self.sequence.finished().is_some() {
            return None;
        }
        let step = self.step();
        if step.is_err() {
            self.sequence.finish(FinishReason::Cancelled);
        }
        Some(step)
    }
}

impl Drop for Generation<'_> {
    fn drop(&mut self) {
        self.engine.release(&mut self.sequence);
    }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use std::path::Path;

    use treespark_models::Model;

    use super::*;

    /// Passes of DeepSeek-V2-Lite's sizes behind 4096 tokens, on an H200: `benches/record/h200-cuda/2026-11-30-latents.txt`.
    #[test]
    fn passes_with_experts_cost_about_what_was_measured() {
        let sizes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/configs/deepseek-v2-lite.json");
        let model = Model::random_like(&sizes, 1).unwrap();
        let (cost, layer_bytes) = crate::cuda::COSTS;
        let cost = cost_of(model.config(), &DeviceInfo { backend: "cuda", name: String::new(), cost, layer_bytes });
        for (rows, ms) in [(1, 2.548), (2, 3.405), (4, 4.835), (8, 6.819), (16, 9.030), (64, 12.763)] {
            let ratio = cost.of(rows) / (ms / 2.548);
            assert!((0.9..1.1).contains(&ratio), "{rows} rows: {ratio} of what was measured");
        }
    }
}

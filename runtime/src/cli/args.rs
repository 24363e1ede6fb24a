//! What the command line takes.

use anstyle::{AnsiColor, Style};
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use treespark::devices::BackendChoice;
use treespark::{DrafterChoice, GenerateOptions, GrammarSource, LlmOptions, Sampling};
use treespark_kernel_gen::TreeShape;

use super::bench_serve::args::BenchServeArgs;
use super::eval::args::EvalArgs;
use super::serve::ServeArgs;

pub const ERROR: Style = AnsiColor::Red.on_default().bold();

/// Lossless, tree-based speculative decoding of language models, on any GPU or none.
#[derive(Parser)]
#[command(version, about, after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "Examples:
  treespark generate -p \"Why is the sky blue?\" --stats
  treespark generate -p \"Quote this twice: all roads lead to Rome.\" --show-tree
  treespark generate --raw -p \"Once upon a time\" --temperature 0.8 --top-p 0.95 --seed 7
  treespark generate -p \"Describe a cat as JSON.\" --json-schema pet.json
  treespark chat --model path/to/model
  git diff | treespark generate --tree 4x2x2x1 --max-new-tokens 400
  treespark serve --port 8080
  treespark devices
  treespark tree 4x2x2x1
  treespark eval --prompts gsm8k.jsonl --drafter ngram,dspark --budget 16,64
  treespark bench-serve --prompts gsm8k.jsonl --policy off,confidence --streams 1,16,64";

#[derive(Subcommand)]
pub enum Command {
    /// Answer one prompt (-p, or standard input)
    Generate(GenerateArgs),
    /// Talk with the model
    Chat(ChatArgs),
    /// Serve many clients at once by HTTP, as OpenAI's API does
    Serve(ServeArgs),
    /// List the devices, and which one is taken and why
    Devices,
    /// Measure accepted length and speed on sets of prompts
    Eval(EvalArgs),
    /// Measure throughput and latency of a server under load
    BenchServe(BenchServeArgs),
    /// Draw a tree shape
    Tree(TreeArgs),
}

#[derive(ClapArgs)]
pub struct GenerateArgs {
    /// The prompt; without it, standard input is the prompt
    #[arg(short, long)]
    pub prompt: Option<String>,
    /// Take the prompt as it is, without the model's chat template
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(ClapArgs)]
pub struct ChatArgs {
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[command(flatten)]
    pub run: RunArgs,
}

/// What every command that generates takes.
#[derive(ClapArgs)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub decoding: DecodingArgs,
    #[command(flatten)]
    pub report: ReportArgs,
}

#[derive(ClapArgs)]
pub struct TreeArgs {
    /// root, chain:8, 4x2x2x1, parents:0,0,0,1 or paths:0;1;0.0
    #[arg(value_parser = parse_shape)]
    pub shape: TreeShape,
}

#[derive(ClapArgs)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    #[command(flatten)]
    pub target: TargetArgs,
    /// Who drafts: auto (the shipped dspark where there is one, else ngram), none, ngram, mtp (the model's own), dspark, medusa, model
    /// (shipped ones), or the PATH of a DSpark, DFlash or Medusa drafter, or of a model with the same tokenizer
    #[arg(short, long, default_value = "auto")]
    pub drafter: DrafterChoice,
    /// Tree of every round, or auto: root, chain:8, 4x2x2x1, parents:0,0,0,1, paths:0;1;0.0, or a FILE with such a text
    #[arg(short, long, default_value = "auto", value_parser = parse_tree)]
    pub tree: Tree,
}

/// The model that answers, and where it runs.
#[derive(ClapArgs)]
#[command(next_help_heading = "Model")]
pub struct TargetArgs {
    /// A folder in the Hugging Face layout, a GGUF file, a known name, or org/name in the hub's cache
    #[arg(short, long, default_value = treespark_models::hub::DEFAULT_MODEL)]
    pub model: String,
    /// Take the sizes in the model's config.json (the file itself will do) and random weights of this seed: its text is
    /// noise, its speed that of the real one
    #[arg(long, value_name = "SEED")]
    pub random_weights: Option<u64>,
    /// auto, cpu, cuda, cuda:N, wgpu, or wgpu:N (see `treespark devices`)
    #[arg(short, long, default_value = "auto")]
    pub backend: BackendChoice,
    /// Tokens that fit, prompt included [default: the model's own, up to 8192]
    #[arg(short, long, value_name = "TOKENS")]
    pub context: Option<usize>,
}

#[derive(ClapArgs)]
#[command(next_help_heading = "Decoding")]
pub struct DecodingArgs {
    /// Most tokens to generate
    #[arg(short = 'n', long, default_value_t = 256, value_name = "N")]
    pub max_new_tokens: usize,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0, value_name = "T", allow_negative_numbers = true)]
    pub temperature: f32,
    /// Keep the K most likely tokens; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: u32,
    /// Keep the most likely tokens with this mass; 1 keeps all
    #[arg(long, default_value_t = 1.0, value_name = "P", allow_negative_numbers = true)]
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely; 0 keeps all
    #[arg(long, default_value_t = 0.0, value_name = "P", allow_negative_numbers = true)]
    pub min_p: f32,
    /// Make tokens that occurred less likely; 1 does nothing
    #[arg(long, default_value_t = 1.0, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Equal seeds give equal texts, with any drafter and tree
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Answer with JSON that a schema describes: a FILE, or the schema itself
    #[arg(long, value_name = "FILE|TEXT", value_parser = parse_schema, group = "grammars")]
    pub json_schema: Option<GrammarSource>,
    /// Answer with a text that matches this expression, all of it
    #[arg(long, value_name = "EXPRESSION", value_parser = parse_regex, group = "grammars")]
    pub regex: Option<GrammarSource>,
    /// Answer with a text of this grammar, in llguidance's dialect of Lark
    #[arg(long, value_name = "FILE", value_parser = parse_grammar, group = "grammars")]
    pub grammar: Option<GrammarSource>,
}

#[derive(ClapArgs)]
#[command(next_help_heading = "Reports (to standard error)")]
pub struct ReportArgs {
    /// Speed, acceptance, times and memory; =json for one line of JSON
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    pub stats: Option<StatsFormat>,
    /// Every round's tree, with accepted, rejected and bonus tokens
    #[arg(long)]
    pub show_tree: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StatsFormat {
    Text,
    Json,
}

/// The `--tree` option: a shape, or the drafter's and scheduler's choice.
#[derive(Clone)]
pub struct Tree(pub Option<TreeShape>);

pub fn parse_shape(text: &str) -> Result<TreeShape, String> {
    text.parse().map_err(|error| format!("{error}"))
}

fn parse_tree(text: &str) -> Result<Tree, String> {
    if text == "auto" {
        return Ok(Tree(None));
    }
    // A file holds the text of a tree, as `models/train/static_tree.py` writes it.
    let from_file = std::fs::read_to_string(text).ok();
    parse_shape(from_file.as_deref().unwrap_or(text).trim()).map(|shape| Tree(Some(shape)))
}

fn parse_schema(text: &str) -> Result<GrammarSource, String> {
    let text = if text.trim_start().starts_with('{') { text.to_string() } else { read(text)? };
    serde_json::from_str(&text).map(GrammarSource::JsonSchema).map_err(|error| format!("not JSON: {error}"))
}

fn parse_regex(text: &str) -> Result<GrammarSource, String> {
    Ok(GrammarSource::Regex(text.to_string()))
}

fn parse_grammar(path: &str) -> Result<GrammarSource, String> {
    read(path).map(GrammarSource::Lark)
}

fn read(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

impl ModelArgs {
    pub fn options(&self) -> LlmOptions {
        LlmOptions { drafter: self.drafter.clone(), tree: self.tree.0.clone(), ..self.target.options() }
    }
}

impl TargetArgs {
    pub fn options(&self) -> LlmOptions {
        LlmOptions {
            model: self.model.clone(),
            random_weights: self.random_weights,
            backend: self.backend,
            context: self.context,
            ..LlmOptions::default()
        }
    }
}

impl DecodingArgs {
    pub fn options(&self) -> GenerateOptions {
        GenerateOptions {
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
                sample: 0,
            },
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.clone(),
            grammar: [&self.json_schema, &self.regex, &self.grammar].into_iter().flatten().next().cloned(),
        }
    }
}

//! `treespark-bench`: what passes and kernels cost on a device, against sizes, floors and peers.

mod attention;
mod calibrate;
mod device;
mod matmul;
mod models;
mod ops;
mod pass;
mod passes;
mod peers;
mod replay;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use treespark::devices::BackendChoice;
use treespark::tree::TokenTree;
use treespark_models::hub;

#[derive(Parser)]
#[command(version, about = "Times kernels, and passes of a model across tree sizes", after_help = EXAMPLES)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  treespark-bench pass --backend cpu --rows 1,2,4,8,16
  treespark-bench pass --backend cuda --model random:qwen3-8b --depth 2048 --rows 1,16
  treespark-bench ops --backend wgpu --rows 1,16
  treespark-bench ops --backend cuda --rows 1,16 --drafter models/pretrained/smollm2-135m-instruct/dspark
  treespark-bench replay --backend cuda --report eval.json --model random:qwen3-8b --drafter random:dspark
  treespark-bench attention --peers peers.json
  treespark-bench matmul --models qwen3-8b --rows 1,16,64";

#[derive(Subcommand)]
enum Command {
    /// One verify pass (layers, head, draw, accept) by number of rows
    Pass(PassArgs),
    /// Where the time of a verify pass goes, and of a draft: each kind of op run alone
    Ops(OpsArgs),
    /// What speculation would bring on another shape of model: an evaluation's acceptance, with that shape's times
    Replay(replay::Args),
    /// Attention alone, to keys and values or to latents, beside peers and floors (needs an NVIDIA GPU)
    Attention(attention::Args),
    /// How well a DSpark drafter's confidence is calibrated on the nodes of its trees
    Calibrate(calibrate::Args),
    /// Products with weights alone, beside cuBLAS and the memory's speed (needs an NVIDIA GPU)
    Matmul(matmul::Args),
}

#[derive(clap::Args)]
#[command(after_help = PASS_EXAMPLES)]
struct PassArgs {
    /// A name or path as everywhere, or random:NAME for a model of real sizes without files: random:smollm2-135m,
    /// random:qwen3-0.6b, random:qwen3-8b, random:llama-3.1-8b, or random:PATH of a config.json (benches/configs/)
    #[arg(short, long, default_value = hub::DEFAULT_MODEL)]
    model: String,
    #[arg(short, long, default_value = "auto")]
    backend: BackendChoice,
    /// Rows of a pass: a root with rows - 1 children and grandchildren
    #[arg(short, long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64")]
    rows: Vec<usize>,
    /// Committed tokens before the tree
    #[arg(short, long, default_value_t = 512)]
    depth: usize,
    /// Timed runs of each, after a fifth as many for warming up
    #[arg(long, default_value_t = 30)]
    repeats: usize,
    /// Temperature of the draws; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// One JSON object a line instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct OpsArgs {
    #[command(flatten)]
    pass: PassArgs,
    /// Folder of a DSpark, DFlash or Medusa drafter of the model: its part of a pass is timed, and its draft
    #[arg(long)]
    drafter: Option<PathBuf>,
    /// Most nodes of a tree that is drafted
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(usize))]
    nodes: usize,
    /// Sequences of a pass: each has the rows, or a block
    #[arg(long, default_value_t = 1)]
    requests: usize,
}

const PASS_EXAMPLES: &str = "The median is by the host's clock, from writing the batch to reading the result. On an \
NVIDIA GPU 'device ms' is the pass alone, by the GPU's clock, and 'weights' the share of it that a device copy would need for the \
weights' bytes. Passes are compiled for 1, 4, 16, 64 and 256 rows: others run in the next larger.

Examples:
  treespark-bench pass --backend cpu --rows 1,2,4,8,16
  treespark-bench pass --backend wgpu --depth 512 --repeats 50 --json
  treespark-bench pass --backend cuda --model random:qwen3-8b --depth 2048 --rows 1,16
  treespark-bench ops --backend wgpu --rows 1,16";

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Pass(args) => pass::run(&args),
        Command::Ops(args) => ops::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Attention(args) => attention::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Matmul(args) => matmul::run(&args),
    }
}

/// A tree of this many nodes, two children a node.
fn bushy(nodes: usize, token: impl Fn(usize) -> u32) -> Result<TokenTree> {
    let mut tree = TokenTree::root(token(0));
    for node in 1..nodes {
        tree.push((node - 1) / 2, token(node))?;
    }
    Ok(tree)
}

//! `treespark-bench`: what a pass costs on a device, against the number of its rows.

mod ops;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use treespark::backend::{Backend, Extent};
use treespark::devices::{self, BackendChoice};
use treespark::network::{Limits, Network};
use treespark::sampling::Sampling;
use treespark::sequence::Sequence;
use treespark::tree::TokenTree;
use treespark_benches::{Samples, circumstances};
use treespark_kernel_gen::layout::{HEADER_WORDS, accepted_words};
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{DType, MAX_NODES, Op, Pass, Request, Role, Row, TreeSpec};
use treespark_models::{Model, hub};

#[derive(Parser)]
#[command(version, about = "Times passes of a model across tree sizes", after_help = EXAMPLES)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  treespark-bench pass --backend cpu --rows 1,2,4,8,16
  treespark-bench pass --backend wgpu --depth 512 --repeats 50 --json
  treespark-bench ops --backend wgpu --rows 1,16";

#[derive(Subcommand)]
enum Command {
    /// One verify pass (layers, head, draw, accept) by number of rows
    Pass(PassArgs),
    /// Where the time of a verify pass goes: each kind of op run alone
    Ops(PassArgs),
}

#[derive(clap::Args)]
struct PassArgs {
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

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Pass(args) => pass(&args),
        Command::Ops(args) => ops::run(&args),
    }
}

fn pass(args: &PassArgs) -> Result<()> {
    let model = Model::open(&hub::resolve(&args.model, &mut |_| {})?)?;
    let mut backend = devices::open(&args.backend)?;
    let backend = backend.as_mut();
    let max_nodes = args.rows.iter().copied().max().context("no rows were asked for")?;
    let context = args.depth + MAX_NODES;
    let limits = Limits { context, max_nodes, top_k: 1 };
    let mut network = Network::load(backend, &model, limits, &mut |_, _| {})?;
    eprintln!("{}", circumstances(&backend.info().name));

    let vocab = model.config().vocab_size;
    let token = |i: usize| (i * 7919 % vocab) as u32;
    let sampling = Sampling { temperature: args.temperature, ..Sampling::default() };
    let mut seq = Sequence::new(vec![token(0)], sampling, 1, vec![], context, vocab);
    let prompt: Vec<u32> = (0..args.depth).map(token).collect();
    network.extend(backend, &mut seq.kv, &prompt, &mut |_| {})?;

    let dispatch = dispatch_ms(backend, args.repeats)?;
    if !args.json {
        println!("an op of one workgroup: {:.2} us", dispatch * 1e3);
        println!("{:>5} {:>10} {:>10} {:>10} {:>8} {:>10}", "rows", "median ms", "p10", "p90", "of 1 row", "rows/s");
    }
    let mut one_row = None;
    for &rows in &args.rows {
        let tree = bushy(rows, token)?;
        let samples = Samples::take(args.repeats, || {
            network.verify(backend, &mut seq, &tree)?;
            network.accepted(backend, &seq.kv).map(drop)
        })?;
        let (median, p10, p90) = (samples.median(), samples.quantile(0.1), samples.quantile(0.9));
        let ratio = median / *one_row.get_or_insert(median);
        let per_second = rows as f64 / median * 1e3;
        if args.json {
            let line = serde_json::json!({
                "bench": "pass", "device": backend.info().name, "model": args.model, "depth": args.depth, "rows": rows,
                "temperature": args.temperature, "median_ms": median, "p10_ms": p10, "p90_ms": p90,
                "ratio": ratio, "op_us": dispatch * 1e3,
            });
            println!("{line}");
        } else {
            println!("{rows:>5} {median:>10.3} {p10:>10.3} {p90:>10.3} {ratio:>8.2} {per_second:>10.0}");
        }
    }
    Ok(())
}

/// A tree of this many nodes, two children a node.
fn bushy(nodes: usize, token: impl Fn(usize) -> u32) -> Result<TokenTree> {
    let mut tree = TokenTree::root(token(0));
    for node in 1..nodes {
        tree.push((node - 1) / 2, token(node))?;
    }
    Ok(tree)
}

/// What an op costs that does next to nothing: many acceptances of one node, in one pass.
fn dispatch_ms(backend: &mut dyn Backend, repeats: usize) -> Result<f64> {
    const OPS: usize = 200;
    let mut pass = Pass::new("dispatch", 1);
    let batch = Batch {
        rows: pass.add("rows", Role::Input, DType::U32, &[1, Row::WORDS]),
        requests: pass.add("requests", Role::Input, DType::U32, &[HEADER_WORDS + Request::WORDS]),
        pages: pass.add("pages", Role::Input, DType::U32, &[1, 1]),
    };
    let draws = pass.add("draws", Role::Scratch, DType::U32, &[1]);
    let accepted = pass.add("accepted", Role::Output, DType::U32, &[1, accepted_words(MAX_NODES)]);
    pass.ops = vec![Op::Accept { batch, tree: TreeSpec::Any(MAX_NODES), draws, accepted }; OPS];
    pass.check()?;
    let buffers = pass.buffers.iter().map(|desc| backend.alloc(desc)).collect::<Result<Vec<_>, _>>()?;
    let mut row = [0; Row::WORDS];
    row[4] = 1; // its own ancestor bit
    backend.write(buffers[batch.rows.0], 0, &row)?;
    backend.write(buffers[batch.requests.0], 0, &[1, 1, 0, 0, 0, 0, 1])?;
    let id = backend.compile(&pass, &buffers)?;
    let samples = Samples::take(repeats, || {
        backend.run(id, Extent { rows: 1, requests: 1, keys: 1 })?;
        backend.read(buffers[accepted.0], 0, 1).map(drop)
    })?;
    buffers.into_iter().for_each(|buffer| backend.free(buffer));
    Ok(samples.median() / OPS as f64)
}

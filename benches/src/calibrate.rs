//! How well a DSpark drafter's confidence is calibrated on the nodes of its trees, and the factors that make its other
//! choices as likely as they are. Temperatures of the confidence head are fitted where it is trained
//! (`models/train/calibrate.py`).

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use treespark::backend::PassCost;
use treespark::calibration::Reliability;
use treespark::devices::{self, BackendChoice};
use treespark::draft::block::BlockDrafter;
use treespark::network::{Limits, Network};
use treespark::scheduler::Scheduler;
use treespark::{Engine, Sampling, Sequence, Statistics};
use treespark_benches::circumstances;
use treespark_models::{Message, Model, Speculator, hub};

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// Folder of the drafter
    drafter: PathBuf,
    /// Prompts, one JSON object a line with a list of `turns`: never those of an evaluation
    #[arg(long, required = true, num_args = 1..)]
    prompts: Vec<PathBuf>,
    #[arg(short, long, default_value = hub::DEFAULT_MODEL)]
    model: String,
    #[arg(short, long, default_value = "cpu")]
    backend: BackendChoice,
    /// Prompts of each file
    #[arg(long, default_value_t = 40)]
    first: usize,
    /// Tokens of an answer
    #[arg(short = 'n', long, default_value_t = 128)]
    max_new_tokens: usize,
    /// Nodes of a tree, all of which are verified
    #[arg(long, default_value_t = 64)]
    nodes: usize,
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Write the factors into the drafter's calibration.json
    #[arg(long)]
    write: bool,
}

const HELP: &str = "Half of the prompts fit the factors, the other half are what errors are told of.

Examples:
  treespark-bench calibrate models/pretrained/smollm2-135m-instruct/dspark --prompts held_out.jsonl
  treespark-bench calibrate my-drafter --model my-model --prompts held_out.jsonl --write";

const CONTEXT: usize = 2048;

pub fn run(args: &Args) -> Result<()> {
    let path = hub::resolve(&args.model, &mut |_| {})?;
    let model = Model::open(&path)?;
    let (tokenizer, template) = (model.tokenizer()?, model.chat_template()?.context("the model has no chat template")?);
    let mut prompts = Vec::new();
    for prompt in texts(args)? {
        let text = template.render(&[Message::user(prompt)], true)?;
        prompts.push(tokenizer.encode(&text, false)?);
    }
    let stop = model.stop_tokens(&tokenizer);
    let half = prompts.len() / 2;
    let measure = |calibrated: bool, prompts: &[Vec<u32>]| measure(args, &model, &stop, calibrated, prompts);

    eprintln!("{}", circumstances(&devices::open(&args.backend)?.info().name));
    let raw = measure(false, &prompts[half..])?;
    let fitting = measure(true, &prompts[..half])?;
    let known = calibration(args)?;
    let before: Vec<f64> =
        known["siblings"].as_array().map_or(Vec::new(), |l| l.iter().filter_map(Value::as_f64).collect());
    let factors: Vec<f64> =
        fitting.factors().iter().enumerate().map(|(i, factor)| factor * before.get(i).unwrap_or(&1.0)).collect();
    println!("factors of what is no first choice, by depth: {factors:.3?}");
    if args.write {
        write(args, known, &factors, &raw)?;
    }
    let now = measure(true, &prompts[half..])?;
    println!("{:<28} {:>8} {:>8}", "error (ECE) of", "raw", "now");
    println!("{:<28} {:>7.2}% {:>7.2}%   {} nodes", "all nodes", 100.0 * raw.error(), 100.0 * now.error(), now.nodes());
    for (depth, (raw, now)) in raw.error_by_depth().iter().zip(now.error_by_depth()).enumerate() {
        for (kind, what) in ["first choices", "the others"].into_iter().enumerate() {
            let what = format!("depth {}, {what}", depth + 1);
            println!("{what:<28} {:>7.2}% {:>7.2}%", 100.0 * raw[kind], 100.0 * now[kind]);
        }
    }
    if args.write {
        let mut json = calibration(args)?;
        json["tree_ece_after"] = json!(now.error());
        save(args, &json)?;
    } else {
        println!("nothing was written (--write does): 'now' is what the drafter's folder holds");
    }
    Ok(())
}

/// What became of the trees of some answers.
fn measure(args: &Args, model: &Model, stop: &[u32], calibrated: bool, prompts: &[Vec<u32>]) -> Result<Reliability> {
    let speculator = Speculator::open(&args.drafter, model.config())?;
    let mut backend = devices::open(&args.backend)?;
    let limits = Limits::new(CONTEXT, args.nodes);
    let network = Network::load_with_speculator(backend.as_mut(), model, Some(&speculator), limits, &mut |_, _| {})?;
    let drafter = BlockDrafter::load(&speculator)?;
    let drafter = if calibrated { drafter } else { drafter.without_calibration() };
    // Rows are free here: all nodes are verified.
    let scheduler = Scheduler::new(None, args.nodes, PassCost::FREE_ROWS);
    let mut engine = Engine::new(backend, network, Box::new(drafter), scheduler, CONTEXT).drafting_on_the_host();
    let mut reliability = Reliability::default();
    let vocab = model.config().vocab_size;
    for (i, prompt) in prompts.iter().enumerate() {
        let sampling = Sampling { temperature: args.temperature, seed: i as u64, ..Sampling::default() };
        let mut seq = Sequence::new(prompt.clone(), sampling, args.max_new_tokens, stop.to_vec(), CONTEXT, vocab);
        let mut stats = Statistics::default();
        engine.prefill(&mut seq, &mut stats, &mut |_| {})?;
        while seq.finished().is_none() {
            reliability.note(&engine.round(&mut seq, &mut stats)?);
        }
        engine.release(&mut seq);
        eprint!("\r{} of {} answers ", i + 1, prompts.len());
    }
    eprintln!();
    Ok(reliability)
}

/// The first turns.
fn texts(args: &Args) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for path in &args.prompts {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        for (number, line) in text.lines().enumerate().take(args.first) {
            let json: Value =
                serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), number + 1))?;
            match json["turns"][0].as_str() {
                Some(turn) => texts.push(turn.to_string()),
                None => bail!("{}:{}: no turns", path.display(), number + 1),
            }
        }
    }
    Ok(texts)
}

fn file(args: &Args) -> PathBuf {
    args.drafter.join("calibration.json")
}

fn calibration(args: &Args) -> Result<Value> {
    match std::fs::read(file(args)) {
        Ok(text) => Ok(serde_json::from_slice(&text).with_context(|| file(args).display().to_string())?),
        Err(_) => Ok(json!({})),
    }
}

fn write(args: &Args, mut json: Value, factors: &[f64], raw: &Reliability) -> Result<()> {
    let round = |x: f64| (x * 1e4).round() / 1e4;
    json["siblings"] = factors.iter().map(|&factor| round(factor)).collect();
    json["tree_ece_before"] = json!(raw.error());
    if json["temperatures"].is_null() {
        json["temperatures"] = factors.iter().map(|_| 1.0).collect();
    }
    save(args, &json)
}

fn save(args: &Args, json: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(json)? + "\n";
    std::fs::write(file(args), text).with_context(|| file(args).display().to_string())
}

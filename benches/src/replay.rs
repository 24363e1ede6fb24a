//! What speculation would bring on a shape of model that nobody has a drafter for: the acceptance that an evaluation measured
//! on another model, with the times of passes of this shape.
//!
//! ```text
//! times plain = tokens a round · plain / (verify + draft)
//! ```

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use treespark::backend::PassId;
use treespark::devices::BackendChoice;
use treespark::eval::report::Combination;
use treespark::network::{compiled_rows, round_rows};
use treespark::sampling::Sampling;
use treespark_benches::{circumstances, commit};
use treespark_kernel_gen::{BlockShape, MAX_NODES};
use treespark_models::{Config, Llama, SpeculatorConfig};

use crate::device::Device;
use crate::passes::{Bench, CANDIDATES, Timing, add_block};
use crate::{bushy, models};

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// What `treespark eval --json` wrote: its rows of drafters of the same kind as --drafter are replayed
    #[arg(long)]
    report: PathBuf,
    /// The target whose passes are timed: a name or path as everywhere, or random:NAME as in `pass`
    #[arg(short, long, default_value = "random:qwen3-8b")]
    model: String,
    /// Folder of its drafter, or random:dspark for one of the target's sizes: five layers, blocks of 7, Markov rank 256, a
    /// confidence head, the target's embedding and head
    #[arg(long, default_value = "random:dspark")]
    drafter: String,
    #[arg(short, long, default_value = "auto")]
    backend: BackendChoice,
    /// Committed tokens before the tree
    #[arg(short, long, default_value_t = 512)]
    depth: usize,
    /// Timed runs of each pass
    #[arg(long, default_value_t = 30)]
    repeats: usize,
    /// One JSON object a line instead of a table
    #[arg(long)]
    json: bool,
}

const HELP: &str = "times plain = tokens a round, as the evaluation measured them, * plain / (verify + draft), as measured \
here. That is no measurement of a trained pair: a larger target with a drafter of its own accepts what it accepts.

Trees vary, and of a report's rounds only the average of their rows is known. Passes are therefore timed at both ends of every \
size that they are compiled for (1, 2, 4, 5, 8, 9, 16 .. rows), and between them by a straight line at that average. 'verify' has \
what the target computes for the drafter, and the commit; 'plain' is one row without the drafter. 'draft' is one of 64 \
nodes, whatever the budget; where the device leaves trees to the host (all but CUDA), only the draft's pass. Times are the medians \
of --repeats runs: on an NVIDIA GPU by its own clock, without a round's launches and its wait, which plain decoding has too; \
else by the host's.

Example:
  treespark eval --backend cuda --drafter dspark --budget 8,16,auto --temperature 0,0.6 --prompts *.jsonl --json eval.json
  treespark-bench replay --backend cuda --report eval.json --model random:qwen3-8b --drafter random:dspark";

/// Nodes of a drafted tree: what devices that draft grow at most.
const NODES: usize = 64;

pub fn run(args: &Args) -> Result<()> {
    let path = args.report.display();
    let text = std::fs::read_to_string(&args.report).with_context(|| format!("{path}"))?;
    let report: Value = serde_json::from_str(&text).with_context(|| format!("{path} is not JSON"))?;
    let model = models::open(&args.model)?;
    let speculator = models::open_speculator(&args.drafter, model.config())?;
    let entries = entries(&report, speculator.config().name()).with_context(|| format!("{path}"))?;
    let most = entries.iter().map(|entry| entry.rows).fold(1.0, f64::max);
    ensure!(most <= MAX_NODES as f64, "{path} has rounds of {most} rows: {MAX_NODES} is what a tree may have");

    let mut device = Device::open(args.backend)?;
    eprintln!("{}", circumstances(&device.name()));
    if let Some(driver) = device.driver() {
        eprintln!("driver   {driver}");
    }
    let on_device = device.backend().drafts() && speculator.config().fits_devices();
    let rows = sizes(most, on_device);
    let config = speculator.config_on_device();
    let head_rows = rows[rows.len() - 1].max(config.block().rows);
    let timing = Timing { requests: 1, depth: args.depth, nodes: 1, repeats: args.repeats };
    let mut bench = Bench::load(device, &model, Some((&speculator, &config)), head_rows, timing)?;
    let passes = Passes::compile(&mut bench, model.config(), &config, &rows, on_device)?;

    let mut temperatures: Vec<f32> = Vec::new();
    let mut lines: Vec<Replayed> = Vec::new();
    for temperature in entries.iter().map(|entry| entry.combination.temperature) {
        if temperatures.contains(&temperature) {
            continue;
        }
        temperatures.push(temperature);
        let costs = passes.time(&mut bench, temperature)?;
        let here = entries.iter().filter(|entry| entry.combination.temperature == temperature);
        lines.extend(here.map(|entry| costs.replay(entry)));
    }
    lines.extend(means(&lines));

    let random = [&args.model, &args.drafter].iter().any(|name| name.starts_with(models::RANDOM));
    let clock = if bench.device.has_clock() { "device" } else { "host" };
    if args.json {
        let about = json!({
            "bench": "replay", "device": bench.device.name(), "driver": bench.device.driver(), "commit": commit(),
            "model": args.model, "drafter_timed": args.drafter, "random_weights": random, "depth": args.depth,
            "clock": clock, "acceptance_of": report["model"], "acceptance_on": report["backend"],
            "report": args.report, "report_is_partial": report["partial"],
        });
        lines.iter().for_each(|line| println!("{}", line.json(&about)));
        return Ok(());
    }
    let of = |key: &str| report[key].as_str().unwrap_or("unknown").to_string();
    let partial = if report["partial"] == true { ", which was ended early" } else { "" };
    println!("tokens and rows a round: {} on {}, replayed from {path}{partial}", of("model"), of("backend"));
    let weights = if random { ": random weights of real sizes, which accept nothing themselves" } else { "" };
    println!(
        "times: {} with {} behind {} tokens, by the {clock}'s clock{weights}",
        args.model, args.drafter, args.depth
    );
    print!("{:<14} {:>10} {:>5}", "set", "budget", "temp");
    FIGURES.iter().for_each(|(name, _)| print!(" {name:>12}"));
    println!("  drafter");
    lines.iter().for_each(|line| println!("{}", line.text()));
    Ok(())
}

/// What a report says of one drafter on one set.
struct Entry {
    set: String,
    combination: Combination,
    /// Of an average round.
    tokens: f64,
    rows: f64,
}

/// The report's entries of drafters of this kind.
fn entries(report: &Value, used: &str) -> Result<Vec<Entry>> {
    let results = report["results"].as_array().context("holds no results of `treespark eval`")?;
    let entry = |value: &Value| {
        let text =
            |key: &str| value[key].as_str().map(str::to_string).with_context(|| format!("a result has no {key}"));
        let number = |key: &str| value[key].as_f64().with_context(|| format!("a result has no {key}"));
        let combination = Combination {
            drafter: text("drafter")?,
            used: text("used")?,
            budget: text("budget")?,
            temperature: number("temperature")? as f32,
        };
        let rows = number("verified_rows")? / number("rounds")?;
        Ok(Entry { set: text("set")?, combination, tokens: number("tokens_per_round")?, rows })
    };
    let mine = results.iter().filter(|value| value["used"] == used);
    let entries = mine.map(entry).collect::<Result<Vec<Entry>>>()?;
    ensure!(!entries.is_empty(), "holds no results of a {used} drafter");
    Ok(entries)
}

/// The rows that a round's pass is compiled for.
fn pass_rows(rows: usize, on_device: bool) -> usize {
    if on_device { round_rows(rows) } else { compiled_rows(rows) }
}

/// The fewest and the most rows of every compiled size, up to one that holds `most`.
fn sizes(most: f64, on_device: bool) -> Vec<usize> {
    let size = |rows| pass_rows(rows, on_device);
    (1..=size(most.ceil() as usize)).filter(|&n| n == size(n) || size(n - 1) < size(n)).collect()
}

struct Passes {
    plain: Vec<PassId>,
    /// With the rows that are run.
    verify: Vec<(usize, Vec<PassId>)>,
    draft: Vec<PassId>,
    block: BlockShape,
}

impl Passes {
    fn compile(
        bench: &mut Bench,
        target: &Config,
        speculator: &SpeculatorConfig,
        rows: &[usize],
        on_device: bool,
    ) -> Result<Passes> {
        let dims = bench.dims.clone();
        let plain = Llama::new(target, &dims);
        let llama = Llama { speculator: Some(speculator), ..plain };
        let plain = vec![bench.compile(&plain.verify_pass(1)?)?];
        let mut verify = Vec::new();
        for &rows in rows {
            let pass = llama.verify_pass(pass_rows(rows, on_device))?;
            verify.push((rows, vec![bench.compile(&pass)?]));
        }
        let costs = on_device.then_some(&[1.0; NODES][..]);
        let mut draft =
            vec![bench.compile(&speculator.draft_pass(&llama, speculator.block(), 1, CANDIDATES, costs)?)?];
        if on_device {
            draft.insert(0, bench.compile(&llama.block_pass(speculator.block(), NODES)?)?);
        }
        Ok(Passes { plain, verify, draft, block: speculator.block() })
    }

    fn time(&self, bench: &mut Bench, temperature: f32) -> Result<Costs> {
        let sampling = Sampling { temperature, ..Sampling::default() };
        let mut of_rows = |rows: usize, passes: &[PassId]| {
            let tree = bushy(rows, |i| i as u32)?;
            bench.time(passes, &|batch, kv| batch.add_tree(kv, &tree, &sampling))
        };
        let plain = of_rows(1, &self.plain)?;
        let verify = self.verify.iter().map(|(rows, passes)| Ok((*rows as f64, of_rows(*rows, passes)?)));
        let verify = verify.collect::<Result<Vec<_>>>()?;
        Ok(Costs { plain, verify, draft: bench.time(&self.draft, &add_block(self.block, &sampling))? })
    }
}

/// Milliseconds.
struct Costs {
    plain: f64,
    /// By rows, ascending.
    verify: Vec<(f64, f64)>,
    draft: f64,
}

impl Costs {
    fn replay(&self, entry: &Entry) -> Replayed {
        let &Entry { tokens, rows, .. } = entry;
        let &Costs { plain, draft, .. } = self;
        let verify = interpolate(&self.verify, rows);
        Replayed {
            set: Some(entry.set.clone()),
            combination: entry.combination.clone(),
            figures: [tokens, rows, verify, draft, plain, tokens * plain / (verify + draft)],
        }
    }
}

/// On straight lines between points, which ascend; what lies outside has the nearest's value.
fn interpolate(points: &[(f64, f64)], x: f64) -> f64 {
    let next = points.partition_point(|&(at, _)| at < x);
    if next == 0 || next == points.len() {
        return points[next.min(points.len() - 1)].1;
    }
    let ((x0, y0), (x1, y1)) = (points[next - 1], points[next]);
    y0 + (y1 - y0) * (x - x0) / (x1 - x0)
}

/// Names of figures, with their digits.
const FIGURES: [(&str, usize); 6] =
    [("tokens/round", 2), ("rows/round", 1), ("verify ms", 3), ("draft ms", 3), ("plain ms", 3), ("times plain", 2)];

/// A line of the table.
struct Replayed {
    /// None for the mean of all.
    set: Option<String>,
    combination: Combination,
    figures: [f64; 6],
}

/// One for every combination over its sets, unweighted, figure by figure.
fn means(lines: &[Replayed]) -> Vec<Replayed> {
    let mut groups: Vec<(&Combination, Vec<[f64; 6]>)> = Vec::new();
    for Replayed { combination, figures, .. } in lines {
        match groups.iter_mut().find(|(known, _)| *known == combination) {
            Some((_, all)) => all.push(*figures),
            None => groups.push((combination, vec![*figures])),
        }
    }
    let mean = |(combination, all): (&Combination, Vec<[f64; 6]>)| Replayed {
        set: None,
        combination: combination.clone(),
        figures: std::array::from_fn(|i| all.iter().map(|one| one[i]).sum::<f64>() / all.len() as f64),
    };
    groups.into_iter().map(mean).collect()
}

impl Replayed {
    fn text(&self) -> String {
        let Combination { drafter, budget, temperature, .. } = &self.combination;
        let mut line = format!("{:<14} {budget:>10} {temperature:>5}", self.set.as_deref().unwrap_or("mean"));
        for (figure, (_, digits)) in self.figures.iter().zip(FIGURES) {
            line += &format!(" {figure:>12.digits$}");
        }
        line + "  " + drafter
    }

    /// Besides what is true of all lines. The set of a mean is null.
    fn json(&self, about: &Value) -> Value {
        let mut line = about.clone();
        line["set"] = json!(self.set);
        let combination = serde_json::to_value(&self.combination).expect("plain numbers and strings");
        line.as_object_mut()
            .into_iter()
            .for_each(|line| line.extend(combination.as_object().cloned().into_iter().flatten()));
        for (figure, (name, _)) in self.figures.iter().zip(FIGURES) {
            line[name.replace('/', "_per_").replace(' ', "_")] = json!(figure);
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_timed_at_both_ends_of_their_sizes() {
        assert_eq!(sizes(9.2, true), [1, 2, 4, 5, 8, 9, 16]);
        assert_eq!(sizes(16.0, true), [1, 2, 4, 5, 8, 9, 16]);
        assert_eq!(sizes(16.1, true)[7..], [17, 32]);
        assert_eq!(sizes(9.2, false), [1, 2, 4, 5, 16]);
        assert_eq!(sizes(1.0, true), [1]);
    }

    #[test]
    fn between_measured_rows_there_are_straight_lines() {
        let points = [(1.0, 4.0), (8.0, 5.0), (9.0, 7.0), (16.0, 8.4)];
        for (x, y) in
            [(1.0, 4.0), (4.5, 4.5), (8.0, 5.0), (8.25, 5.5), (12.5, 7.7), (16.0, 8.4), (0.5, 4.0), (20.0, 8.4)]
        {
            assert!((interpolate(&points, x) - y).abs() < 1e-12, "at {x}: {}", interpolate(&points, x));
        }
    }

    fn result(set: &str, used: &str, budget: &str, tokens: f64, verified_rows: usize) -> Value {
        json!({
            "set": set, "drafter": "auto", "used": used, "budget": budget, "temperature": 0.6,
            "tokens_per_round": tokens, "rounds": 10, "verified_rows": verified_rows,
        })
    }

    #[test]
    fn a_ratio_is_of_tokens_and_times_and_a_mean_is_one_of_ratios() {
        let report = json!({"results": [
            result("one", "dspark", "auto", 3.0, 20), result("one", "ngram", "auto", 9.0, 20),
            result("one", "dspark", "8", 3.5, 30), result("two", "dspark", "auto", 2.0, 40),
        ]});
        let entries = entries(&report, "dspark").unwrap();
        let costs = Costs { plain: 4.0, verify: vec![(1.0, 4.0), (2.0, 5.0), (4.0, 7.0)], draft: 1.0 };
        let lines: Vec<Replayed> = entries.iter().map(|entry| costs.replay(entry)).collect();
        let figures: Vec<[f64; 6]> = lines.iter().map(|line| line.figures).collect();
        assert_eq!(figures[0], [3.0, 2.0, 5.0, 1.0, 4.0, 2.0]);
        assert_eq!(figures[1], [3.5, 3.0, 6.0, 1.0, 4.0, 2.0]);
        assert_eq!(figures[2], [2.0, 4.0, 7.0, 1.0, 4.0, 1.0]);
        let means = means(&lines);
        assert_eq!(means.len(), 2);
        assert_eq!((means[0].combination.budget.as_str(), means[0].figures), ("auto", [2.5, 3.0, 6.0, 1.0, 4.0, 1.5]));
        assert_eq!((means[1].combination.budget.as_str(), means[1].figures), ("8", figures[1]));
        assert!(super::entries(&report, "medusa").is_err());
    }

    #[test]
    fn a_line_of_json_says_what_is_replayed_and_what_is_measured() {
        let entry = entries(&json!({"results": [result("one", "dspark", "8", 3.0, 20)]}), "dspark").unwrap().remove(0);
        let costs = Costs { plain: 4.0, verify: vec![(1.0, 5.0)], draft: 1.0 };
        let line = costs.replay(&entry).json(&json!({"bench": "replay", "random_weights": true}));
        assert_eq!(
            (line["set"].as_str(), line["budget"].as_str(), &line["temperature"]),
            (Some("one"), Some("8"), &json!(0.6))
        );
        assert_eq!((line["tokens_per_round"].as_f64(), line["times_plain"].as_f64()), (Some(3.0), Some(2.0)));
        assert_eq!(line["random_weights"], true);
    }
}

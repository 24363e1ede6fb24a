//! What `treespark eval` takes.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueEnum};
use treespark::DrafterChoice;
use treespark::eval::{Budget, Setup};
use treespark_kernel_gen::{MAX_NODES, TreeShape};

use crate::cli::args::{TargetArgs, parse_shape};

const NOTES: &str = "Examples:
  treespark eval --prompts gsm8k.jsonl
  treespark eval --prompts gsm8k.jsonl,mt-bench.jsonl --drafter ngram,dspark --budget 16,64
  treespark eval --prompts mt-bench.jsonl --turns all --temperature 0,1 --json report.json
  treespark eval --prompts gsm8k.jsonl --drafter dspark --first 80 --compare paper.json
  treespark eval --prompts gsm8k.jsonl --drafter model --tree chain:4 --tree 3x2x1

Every prompt is answered by plain decoding and then by the drafter, in turn. Columns:
  tokens/round   the bonus token included
  depth 1 to 4   of the rounds whose tree reached that depth, the share that accepted to it
  draft, verify  milliseconds a round; where the device drafts, its pass does both
  tokens/s       new tokens over seconds of rounds, the prompt's time not counted
  plain          the same by plain decoding of the same prompts, in the same minutes
  differ         prompts with other tokens than plain decoding's; 0, but for near-ties of
                 tensor-core attention on CUDA
Ctrl-C ends early and prints what is there.";

#[derive(ClapArgs)]
#[command(after_help = NOTES)]
pub struct EvalArgs {
    /// Sets of prompts, each named by its stem: JSON lines with "turns", a list of user turns
    #[arg(short, long, required = true, num_args = 1.., value_delimiter = ',', value_name = "FILE")]
    pub prompts: Vec<PathBuf>,
    /// Use the first N prompts of each set
    #[arg(long, default_value = "20", value_name = "N")]
    pub first: NonZeroUsize,
    /// The first turn of each prompt, or all, later ones behind the model's own answers
    #[arg(long, default_value = "first", value_name = "WHICH")]
    pub turns: Turns,
    /// Take the turns as they are, without the model's chat template
    #[arg(long, conflicts_with = "turns")]
    pub raw: bool,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub measured: MeasuredArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(ClapArgs)]
#[command(next_help_heading = "What is measured: each with each")]
pub struct MeasuredArgs {
    /// Who drafts: auto, none, ngram, dspark, medusa, model, or a PATH, as `generate` takes; several by commas
    #[arg(short, long, default_value = "auto", value_delimiter = ',')]
    pub drafter: Vec<DrafterChoice>,
    /// Most nodes of a tree, root included, or auto; best:NODES verifies so many, whether they pay or not; several by
    /// commas [default: auto, unless there is --tree]
    #[arg(long, value_delimiter = ',', value_name = "NODES", value_parser = parse_budget)]
    pub budget: Vec<Budget>,
    /// This tree every round; may be given several times, and beside --budget
    #[arg(short, long, value_name = "SHAPE", value_parser = parse_shape)]
    pub tree: Vec<TreeShape>,
    /// 0 is greedy; several by commas
    #[arg(long, default_value = "0", value_delimiter = ',', value_name = "T", allow_negative_numbers = true)]
    pub temperature: Vec<f32>,
    /// Most tokens to generate a turn
    #[arg(short = 'n', long, default_value = "128", value_name = "N")]
    pub max_new_tokens: NonZeroUsize,
    /// Equal seeds give equal texts, with any drafter and tree
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Leave plain decoding out, and with it the ratio and the comparison of tokens
    #[arg(long)]
    pub no_plain: bool,
}

#[derive(ClapArgs)]
#[command(next_help_heading = "Output (a table, to standard output)")]
pub struct OutputArgs {
    /// Write all that was measured there too, as one JSON document
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Tokens per round as measured elsewhere, for a column beside ours: {"source": TEXT, "tokens_per_round": {SET:
    /// NUMBER}}, with "drafter" and "temperature" if there are several; or a report of models/train/evaluate.py
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Turns {
    First,
    All,
}

fn parse_budget(text: &str) -> Result<Budget, String> {
    let (budget, number): (fn(usize) -> Budget, &str) = match text.strip_prefix("best:") {
        Some(number) => (Budget::Best, number),
        None => (Budget::Nodes, text),
    };
    match number.parse() {
        _ if text == "auto" => Ok(Budget::Auto),
        Ok(nodes) if (1..=MAX_NODES).contains(&nodes) => Ok(budget(nodes)),
        _ => Err(format!("expected auto, 1 to {MAX_NODES} nodes, or best:NODES")),
    }
}

impl MeasuredArgs {
    /// Every drafter with every budget and tree, each once. Plain decoding has neither, and is no setup of its own where
    /// it is measured anyway.
    pub fn setups(&self) -> Vec<Setup> {
        let mut budgets = self.budget.clone();
        budgets.extend(self.tree.iter().cloned().map(Budget::Shape));
        if budgets.is_empty() {
            budgets.push(Budget::Auto);
        }
        let measured_anyway = |drafter: &&DrafterChoice| **drafter == DrafterChoice::None && !self.no_plain;
        let mut setups = Vec::new();
        for drafter in self.drafter.iter().filter(|drafter| !measured_anyway(drafter)) {
            for budget in &budgets {
                let setup = match drafter {
                    DrafterChoice::None => Setup::plain(),
                    _ => Setup { drafter: drafter.clone(), budget: budget.clone() },
                };
                if !setups.contains(&setup) {
                    setups.push(setup);
                }
            }
        }
        setups
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        args: EvalArgs,
    }

    fn setups(more: &[&str]) -> Vec<String> {
        let args = [&["eval", "--prompts", "a.jsonl"], more].concat();
        let only = Only::try_parse_from(args).unwrap_or_else(|error| panic!("{error}"));
        let text = |setup: &Setup| format!("{} {}", setup.drafter_text(), setup.budget_text());
        only.args.measured.setups().iter().map(text).collect()
    }

    #[test]
    fn every_drafter_has_every_budget_and_tree_once() {
        assert_eq!(setups(&[]), ["auto auto"]);
        assert_eq!(setups(&["--drafter", "none"]), Vec::<String>::new(), "measured anyway");
        assert_eq!(setups(&["--drafter", "none", "--no-plain", "--budget", "8"]), ["none -"]);
        assert_eq!(
            setups(&["-d", "ngram,none", "-d", "some/path", "--budget", "8,auto,8"]),
            ["ngram 8", "ngram auto", "some/path 8", "some/path auto"]
        );
        assert_eq!(
            setups(&["-d", "ngram", "--tree", "parents:0,0,0,1", "-t", "3x1", "--budget", "16"]),
            ["ngram 16", "ngram parents:0,0,0,1", "ngram 3x1"]
        );
    }

    #[test]
    fn budgets_are_nodes_of_a_tree() {
        for text in ["0", "257", "many", "-3", ""] {
            assert!(parse_budget(text).is_err(), "{text}");
        }
        assert_eq!(parse_budget("256"), Ok(Budget::Nodes(256)));
    }
}

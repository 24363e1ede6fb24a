//! What an evaluation measures: every setup at every temperature on every set.

use std::fmt;

use treespark_kernel_gen::TreeShape;

use super::PromptSet;
use crate::{DrafterChoice, GenerateOptions, LlmOptions, Sampling};

pub struct Plan {
    /// The model and where it runs; drafter and tree come from the setups.
    pub target: LlmOptions,
    pub sets: Vec<PromptSet>,
    /// Empty: only plain decoding.
    pub setups: Vec<Setup>,
    pub temperatures: Vec<f32>,
    pub seed: u64,
    /// Of each turn.
    pub max_new_tokens: usize,
    /// Go on with later turns, behind the model's own answers.
    pub all_turns: bool,
    /// Take a turn as it is, without the chat template.
    pub raw: bool,
    /// Measure plain decoding beside every setup.
    pub plain: bool,
}

/// One way to decode, loaded once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    pub drafter: DrafterChoice,
    pub budget: Budget,
}

/// Which trees a drafter may make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Budget {
    /// The drafter's and scheduler's choice.
    Auto,
    /// The same, of up to so many nodes, root included.
    Nodes(usize),
    /// The likeliest of so many nodes every round, whether they pay or not.
    Best(usize),
    /// This tree every round.
    Shape(TreeShape),
}

impl Plan {
    /// Prompts to be answered in all; a prompt that several contenders answer in turn counts once.
    pub fn steps(&self) -> usize {
        let prompts: usize = self.sets.iter().map(|set| set.prompts.len()).sum();
        prompts * self.temperatures.len() * self.setups.len().max(1)
    }

    pub fn generate_options(&self, temperature: f32) -> GenerateOptions {
        let sampling = Sampling { temperature, seed: self.seed, ..Sampling::default() };
        GenerateOptions { sampling, max_new_tokens: self.max_new_tokens, ..GenerateOptions::default() }
    }
}

impl Setup {
    pub fn plain() -> Setup {
        Setup { drafter: DrafterChoice::None, budget: Budget::Auto }
    }

    pub fn llm_options(&self, target: &LlmOptions) -> LlmOptions {
        let (tree, max_nodes) = match &self.budget {
            Budget::Auto => (None, None),
            Budget::Nodes(nodes) | Budget::Best(nodes) => (None, Some(*nodes)),
            Budget::Shape(shape) => (Some(shape.clone()), None),
        };
        let all_nodes = matches!(self.budget, Budget::Best(_));
        LlmOptions { drafter: self.drafter.clone(), tree, max_nodes, all_nodes, ..target.clone() }
    }

    /// The drafter as it was asked for.
    pub fn drafter_text(&self) -> &str {
        match &self.drafter {
            DrafterChoice::Auto => "auto",
            DrafterChoice::None => "none",
            DrafterChoice::Mtp => "mtp",
            DrafterChoice::Ngram => "ngram",
            DrafterChoice::Shipped(name) => name,
            DrafterChoice::Path(path) => path,
        }
    }

    /// The budget, or that there is none to have.
    pub fn budget_text(&self) -> String {
        if self.drafter == DrafterChoice::None { "-".to_string() } else { self.budget.to_string() }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Budget::Auto => write!(f, "auto"),
            Budget::Nodes(nodes) => write!(f, "{nodes}"),
            Budget::Best(nodes) => write!(f, "best:{nodes}"),
            Budget::Shape(shape) => write!(f, "{shape}"),
        }
    }
}

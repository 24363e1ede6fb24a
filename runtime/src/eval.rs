//! Accepted length and speed on sets of prompts: what `treespark eval` runs.
//!
//! Every prompt is answered by plain decoding and then, right after, by the drafter under test, so that both meet the
//! machine in the same state. Speeds are new tokens over the seconds of the rounds; the prompt's time is not counted. A
//! ratio is one of sums over a set, so long answers weigh as much as they take.
//!
//! What a drafter learns of its own hits lasts from prompt to prompt, as it does in use; sets are run in the order given.

pub mod plan;
pub mod prompts;
pub mod reference;
pub mod report;
pub mod run;
pub mod table;
pub mod tally;

use std::path::PathBuf;

pub use plan::{Budget, Plan, Setup};
pub use prompts::{Prompt, PromptSet};
pub use reference::Reference;
pub use report::Report;
pub use run::{Event, run};

/// What is wrong with a file that an evaluation reads.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}:{line}: {problem}", path.display())]
    Line { path: PathBuf, line: usize, problem: String },
    #[error("{}:1: no prompts: expected a JSON object a line, like {{\"turns\": [\"a prompt\"]}}", path.display())]
    NoPrompts { path: PathBuf },
    #[error("{}: {problem}", path.display())]
    Reference { path: PathBuf, problem: String },
}

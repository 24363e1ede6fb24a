//! A GPU runtime for lossless, tree-based speculative decoding of language models.
//!
//! A light drafter proposes a *tree* of continuations, the target model verifies every branch in **one** forward pass,
//! and the branch that the target itself would have produced is kept. The output is the target's own, sooner.
//!
//! ```no_run
//! use treespark::{GenerateOptions, Llm, LlmOptions, Message};
//!
//! # fn main() -> treespark::Result<()> {
//! let mut llm = Llm::load(&LlmOptions::default())?;
//! let prompt = llm.chat_prompt(&[Message::user("Why is the sky blue?")])?;
//!
//! let mut generation = llm.generate(prompt, &GenerateOptions::default())?;
//! for step in &mut generation {
//!     print!("{}", step?.text);
//! }
//!
//! let statistics = generation.statistics();
//! println!("\n{:.1} tokens/s, {:.2} tokens per round", statistics.tokens_per_second(), statistics.tokens_per_round());
//! # Ok(())
//! # }
//! ```
//!
//! Modules in reading order: [`engine`] (the round), [`tree`], [`draft`], [`scheduler`], [`network`] and [`kv`] (the
//! target on a device), [`backend`] and its implementations.

pub mod engine;
pub mod tree;
pub mod draft;
pub mod scheduler;
pub mod sequence;
pub mod sampling;
pub mod grammar;
pub mod network;
pub mod batch;
pub mod kv;
pub mod memory;
pub mod plan;
pub mod backend;
pub mod cpu;
#[cfg(any(cuda, feature = "wgpu"))]
mod cache_folder;
#[cfg(cuda)]
pub mod cuda;
#[cfg(feature = "wgpu")]
pub mod wgpu;
pub mod devices;
pub mod draw;
pub mod philox;
pub mod llm;
pub mod serving;
pub mod server;
pub mod eval;
pub mod bench_serve;
pub mod stop;
pub mod stats;
pub mod calibration;
pub mod error;

pub use engine::{Engine, Round};
pub use error::{Error, Result};
pub use grammar::{Grammar, GrammarEngine, GrammarSource};
pub use llm::{DrafterChoice, GenerateOptions, Generation, Llm, LlmOptions, LoadProgress, Many, Step};
pub use sampling::Sampling;
pub use sequence::{FinishReason, Sequence};
pub use stats::Statistics;
pub use treespark_models::Message;

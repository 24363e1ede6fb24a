//! What can go wrong with a checkpoint, naming the file or tensor and what would be right.

use std::path::PathBuf;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {problem}", path.display())]
    Malformed { path: PathBuf, problem: String },
    #[error("tensor {name} is missing: {context}")]
    MissingTensor { name: String, context: String },
    #[error("tensor {name} has shape {got:?}, expected {expected:?}")]
    TensorShape { name: String, expected: Vec<usize>, got: Vec<usize> },
    #[error("architecture {got} is not supported; supported: {supported}")]
    Architecture { got: String, supported: String },
    #[error("{}: made for another target: its {what} is {drafter}, the target's {target}", path.display())]
    Mismatch { path: PathBuf, what: String, drafter: String, target: String },
    #[error("{0}")]
    Drafter(String),
    #[error("{0}")]
    Tokenizer(String),
    #[error("{0}")]
    ChatTemplate(String),
    #[error("model {name}: {problem}")]
    NotFound { name: String, problem: String },
}

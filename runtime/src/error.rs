//! What can go wrong, with the values that a person needs to act on it.

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Model(#[from] treespark_models::Error),
    #[error("tree: {0}")]
    Shape(#[from] treespark_kernel_gen::shape::ShapeError),
    #[error(transparent)]
    Pass(#[from] treespark_kernel_gen::PassError),
    #[error("the context is full: {needed} tokens are needed, {limit} fit (raise --context, or shorten the prompt)")]
    ContextFull { needed: usize, limit: usize },
    #[error("the model has no chat template: pass the prompt as it is (--raw)")]
    NoChatTemplate,
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    #[error("{parameter} is {value}, expected {expected}")]
    Parameter { parameter: &'static str, value: String, expected: &'static str },
    #[error("token {token} is outside the vocabulary of {vocab}")]
    Token { token: u32, vocab: usize },
    #[error(
        "the draft model's vocabulary has {draft} tokens, the target's {target}: a draft model needs the target's own tokenizer"
    )]
    Vocabulary { draft: usize, target: usize },
    #[error("the target's logits are not numbers (NaN) at position {position}: its weights are damaged, or overflow")]
    NotANumber { position: usize },
    #[error("grammar: {0}")]
    Grammar(String),
    #[error("out of device memory: {needed} bytes needed for {what}, on {device}")]
    OutOfMemory { needed: u64, what: String, device: String },
    #[error("no device for --backend {wanted}: {why}")]
    NoDevice { wanted: String, why: String },
    #[error("device: {0}")]
    Device(String),
}

//! Checkpoints to passes.

mod builder;
pub mod chat;
pub mod checkpoint;
pub mod config;
mod dequant;
mod dialect;
pub mod error;
mod gguf;
mod gguf_tokenizer;
pub mod hub;
pub mod llama;
mod mmap;
pub mod model;
pub mod random;
pub mod rope;
mod safetensors;
mod stored;
pub mod tensor;
pub mod tokenizer;

pub use builder::{Dims, NgramDims, Source, Weight};
pub use chat::{ChatTemplate, Message};
pub use checkpoint::Checkpoint;
pub use config::Config;
pub use error::{Error, Result};
pub use model::Model;
pub use tensor::{Bytes, Tensor};
pub use tokenizer::{TextStream, Tokenizer};

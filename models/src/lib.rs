//! Checkpoints to passes.

pub mod block;
mod builder;
pub mod chat;
pub mod checkpoint;
pub mod config;
mod decoder;
mod dequant;
mod dialect;
pub mod dspark;
pub mod error;
mod gguf;
mod gguf_tokenizer;
pub mod hub;
pub mod llama;
mod mmap;
pub mod medusa;
pub mod model;
pub mod pretrained;
pub mod random;
pub mod rope;
mod safetensors;
pub mod speculator;
mod stored;
pub mod tensor;
pub mod tokenizer;

pub use builder::{Dims, NgramDims, Source, Weight};
pub use chat::{ChatTemplate, Message};
pub use checkpoint::Checkpoint;
pub use config::Config;
pub use dspark::{DsparkConfig, MarkovState, SequentialHeads};
pub use error::{Error, Result};
pub use llama::Llama;
pub use model::Model;
pub use speculator::{Speculator, SpeculatorConfig};
pub use tensor::{Bytes, Tensor};
pub use tokenizer::{TextStream, Tokenizer};

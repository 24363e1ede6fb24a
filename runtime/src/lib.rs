//! A GPU runtime for lossless, tree-based speculative decoding of language models.

pub mod backend;
pub mod error;

pub use error::{Error, Result};

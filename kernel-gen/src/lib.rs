//! What a pass is made of, and how it becomes kernel source.
//!
//! A language model's forward pass is described as a [`Pass`]: a straight line of [`Op`]s on named buffers. An op is
//! what one good kernel does, not a tensor primitive. This crate checks passes ([`Op::check`]), prints and counts
//! them, and turns their ops into kernel source. It knows no GPU API and performs no I/O.
//!
//! Modules in reading order: [`shape`] (the tree), [`layout`] (how rows and requests lie in memory), [`op`] and
//! [`pass`]; then how they become source: [`lower`] (an op's kernel calls), [`spec`] (one kernel), [`emit`] (its text)
//! and [`release`] (the kernels that a build proves).

pub mod shape;
pub mod draw;
pub mod layout;
pub mod op;
mod check;
pub mod pass;
pub mod lower;
pub mod cuda;
pub mod spec;
pub mod emit;
pub mod release;

pub use layout::{ANCESTOR_WORDS, MAX_NODES, Request, Row};
pub use op::{BlockShape, CacheShape, Fill, Op, TreeSpec};
pub use pass::{Buf, BufferDesc, DType, Pass, PassError, Role};
pub use shape::{ShapeError, TreeShape};

//! Acceptance rules, written to be read, and the proof that a rule leaves the target's law alone.
//!
//! A round drafts something, accepts a part of it and adds exactly one token. It is *lossless* if the text, gone on
//! with by plain decoding, has the law that plain decoding gives it. Here that is no estimate: every coin of a round
//! is tossed every way ([`replay`]), probabilities are fractions, and the two laws must differ by nothing ([`proof`]).
//!
//! In reading order: [`law`] (laws of a token, as fractions), [`model`] (random targets and drafters), [`tree`]; the
//! rules [`matching`], [`chain`] (token by token), [`block`], [`without_replacement`], [`hybrid`]; [`noise`] (a
//! drafter that knows what the target draws with); [`schedule`] (who drafts how much) and [`growth`] (trees in place
//! of chains); [`replay`], [`proof`]; [`mistakes`], which the proof must reject; and [`catalogue`], all that is claimed.
//!
//! A rule gets its randomness as a function, [`Choose`]: the proof enumerates with it, and another caller may draw.

pub mod law;
pub mod model;
pub mod tree;
pub mod matching;
pub mod chain;
pub mod block;
pub mod without_replacement;
pub mod hybrid;
pub mod noise;
pub mod schedule;
pub mod growth;
pub mod replay;
pub mod proof;
pub mod mistakes;
pub mod catalogue;

pub use law::{Law, Rational};
pub use model::Models;
pub use tree::Tree;

/// Draws an index from a law.
pub type Choose<'a> = dyn FnMut(&[Rational]) -> usize + 'a;

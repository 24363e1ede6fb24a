//! How the target draws its tokens.
//!
//! The noise of a draw depends on nothing but (seed, sample index, absolute position, vocabulary id), so equal seeds
//! give equal tokens, speculative or plain, whatever the tree or the drafter.

use crate::error::{Error, Result};

#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all tokens.
    pub top_k: u32,
    /// 1 keeps all tokens.
    pub top_p: f32,
    /// 0 keeps all tokens.
    pub min_p: f32,
    /// 1 does nothing.
    pub repetition_penalty: f32,
    pub seed: u64,
    /// Which sample of the same prompt and seed.
    pub sample: u32,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Sampling {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0, sample: 0 }
    }
}

impl Sampling {
    pub fn check(&self) -> Result<()> {
        let number = |parameter, value: f32, good: bool, expected| {
            if good { Ok(()) } else { Err(Error::Parameter { parameter, value: value.to_string(), expected }) }
        };
        // Comparisons with NaN are false, so NaN is refused everywhere.
        let Sampling { temperature: t, top_p, min_p, repetition_penalty: penalty, .. } = *self;
        number("temperature", t, t >= 0.0 && t.is_finite(), "a number of at least 0 (0 is greedy)")?;
        number("top_p", top_p, (0.0..=1.0).contains(&top_p), "a number from 0 to 1 (1 keeps all)")?;
        number("min_p", min_p, (0.0..=1.0).contains(&min_p), "a number from 0 to 1 (0 keeps all)")?;
        number("repetition_penalty", penalty, penalty > 0.0 && penalty.is_finite(), "a number above 0 (1 does nothing)")
    }
}

//! Rotary embedding as a config describes it.

use serde_json::Value;

use super::Keys;
use crate::error::Result;

/// What `rope_theta` is where a config does not say: Llama 2's does not.
const DEFAULT_THETA: f32 = 10000.0;

#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f32,
    pub scaling: RopeScaling,
}

/// How inverse frequencies are changed for longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// All are divided by the factor.
    Linear {
        factor: f32,
    },
    /// Long waves are divided, short ones kept, those between blended.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_positions: f32,
    },
    /// The same by turns within the original context, blended along dimensions (Peng et al., 2023).
    Yarn {
        factor: f32,
        original_max_positions: f32,
        /// Waves that turn more often are kept, those that turn less often than `beta_slow` divided.
        beta_fast: f32,
        beta_slow: f32,
        /// What cosines and sines are multiplied with.
        attention_factor: f32,
        /// DeepSeek's: what scores are multiplied with, twice.
        score_factor: f32,
    },
}

impl Rope {
    /// What cosines and sines are multiplied with.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }
}

impl Keys<'_> {
    pub(super) fn rope(&self) -> Result<Rope> {
        let newer = &self.json["rope_parameters"];
        for object in [self.json, newer] {
            if object["partial_rotary_factor"].as_f64().is_some_and(|share| share != 1.0) {
                return Err(self.error("partial_rotary_factor is not 1, which is not supported".to_string()));
            }
        }
        let scaling = if newer.is_object() { newer } else { &self.json["rope_scaling"] };
        let theta = match [newer, self.json].into_iter().find(|object| !object["rope_theta"].is_null()) {
            Some(object) => self.number_in(object, "rope_theta")?,
            None => DEFAULT_THETA,
        };
        Ok(Rope { theta, scaling: self.rope_scaling(scaling)? })
    }

    fn rope_scaling(&self, object: &Value) -> Result<RopeScaling> {
        let number = |key| self.number_in(object, key);
        match object["rope_type"].as_str().or(object["type"].as_str()).unwrap_or("default") {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
            "llama3" => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if low >= high {
                    return Err(self.error(format!("low_freq_factor is {low}, not below high_freq_factor {high}")));
                }
                Ok(RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_positions: number("original_max_position_embeddings")?,
                })
            }
            "yarn" => self.yarn(object),
            other => Err(self.error(format!("rope_type is {other}; supported: default, linear, llama3, yarn"))),
        }
    }

    fn yarn(&self, object: &Value) -> Result<RopeScaling> {
        let or = |key: &str, default: f32| match object[key].is_null() {
            true => Ok(default),
            false => self.number_in(object, key),
        };
        let original = match object["original_max_position_embeddings"].is_null() {
            true => self.number("max_position_embeddings")?,
            false => self.number_in(object, "original_max_position_embeddings")?,
        };
        let factor = or("factor", self.number("max_position_embeddings")? / original)?;
        // Values of zero count as absent, as in Python.
        let magnitude = |key: &str| object[key].as_f64().filter(|&x| x != 0.0).map(|x| grown(factor, x as f32));
        let (all, own) = (magnitude("mscale_all_dim"), magnitude("mscale"));
        let attention_factor = match (own, all) {
            (Some(own), Some(all)) => own / all,
            _ => grown(factor, 1.0),
        };
        if object["truncate"] == false {
            return Err(self.error("rope scaling has truncate = false, which is not supported".to_string()));
        }
        Ok(RopeScaling::Yarn {
            factor,
            original_max_positions: original,
            beta_fast: or("beta_fast", 32.0)?,
            beta_slow: or("beta_slow", 1.0)?,
            attention_factor: or("attention_factor", attention_factor)?,
            score_factor: all.unwrap_or(1.0),
        })
    }
}

/// How much a context that is longer by a factor sharpens attention.
fn grown(factor: f32, magnitude: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * magnitude * factor.ln() + 1.0 }
}

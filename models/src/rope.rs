//! Rotary position embedding: the table of cosines and sines that kernels look up.
//!
//! Rounds where the Hugging Face implementation rounds: an inverse frequency is an f32, an angle is the f32 product
//! of position and inverse frequency, and the table holds cosine and sine of that angle. At position 8000 the rounding
//! of the angle alone moves it by 2e-4, so a more exact table would agree less.

use std::f32::consts::PI;

use crate::config::{Rope, RopeScaling};

/// Inverse frequencies, `[head_dim / 2]`. `factors`, of the same length, are a GGUF file's own divisors.
pub fn inverse_frequencies(rope: &Rope, head_dim: usize, factors: Option<&[f32]>) -> Vec<f32> {
    let theta = f64::from(rope.theta);
    let plain = (0..head_dim / 2).map(|i| (1.0 / theta.powf((2 * i) as f64 / head_dim as f64)) as f32);
    let kept = |i| yarn_keeps(rope, head_dim, i);
    let scaled = plain.enumerate().map(|(i, frequency)| scale(&rope.scaling, frequency, kept(i)));
    match factors {
        Some(factors) => scaled.zip(factors).map(|(frequency, factor)| frequency / factor).collect(),
        None => scaled.collect(),
    }
}

/// `[positions, frequencies, 2]`: cosine and sine, times a factor.
pub fn table(inverse_frequencies: &[f32], positions: usize, factor: f32) -> Vec<f32> {
    let mut table = Vec::with_capacity(positions * inverse_frequencies.len() * 2);
    for position in 0..positions {
        for &frequency in inverse_frequencies {
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            table.extend([cos * factor, sin * factor]);
        }
    }
    table
}

/// `yarn_kept`: how much of the frequency YaRN keeps.
fn scale(scaling: &RopeScaling, frequency: f32, yarn_kept: f32) -> f32 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Yarn { factor, .. } => frequency / factor * (1.0 - yarn_kept) + frequency * yarn_kept,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            // How often the wave turns within the context that the model was first trained for.
            let turns = original_max_positions * frequency / (2.0 * PI);
            if turns < low_freq_factor {
                frequency / factor
            } else if turns > high_freq_factor {
                frequency
            } else {
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        }
    }
}

/// 1 for the dimensions whose waves turn often within the original context, 0 where they hardly turn, a ramp between.
fn yarn_keeps(rope: &Rope, head_dim: usize, i: usize) -> f32 {
    let RopeScaling::Yarn { original_max_positions, beta_fast, beta_slow, .. } = rope.scaling else { return 1.0 };
    let (dim, theta) = (head_dim as f64, f64::from(rope.theta));
    // The dimension whose wave turns so often.
    let of_turns = |turns: f32| {
        let wave = f64::from(original_max_positions) / (f64::from(turns) * 2.0 * std::f64::consts::PI);
        dim * wave.ln() / (2.0 * theta.ln())
    };
    let first = of_turns(beta_fast).floor().max(0.0) as f32;
    let last = of_turns(beta_slow).ceil().min(dim - 1.0) as f32;
    let last = if first == last { last + 0.001 } else { last };
    1.0 - ((i as f32 - first) / (last - first)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: &[f32], expected: &[f32]) {
        assert_eq!(got.len(), expected.len());
        for (i, (g, e)) in got.iter().zip(expected).enumerate() {
            assert!((g - e).abs() <= 4e-7 * e.abs(), "frequency {i}: {g} instead of {e}");
        }
    }

    #[test]
    fn frequencies_fall_by_powers_of_theta() {
        let rope = Rope { theta: 10000.0, scaling: RopeScaling::None };
        close(&inverse_frequencies(&rope, 8, None), &[1.0, 0.1, 0.01, 0.001]);
        let linear = Rope { theta: 10000.0, scaling: RopeScaling::Linear { factor: 4.0 } };
        close(&inverse_frequencies(&linear, 8, None), &[0.25, 0.025, 0.0025, 0.00025]);
        close(&inverse_frequencies(&rope, 8, Some(&[1.0, 2.0, 4.0, 8.0])), &[1.0, 0.05, 0.0025, 0.000125]);
    }

    /// The reference values are those of transformers 5.23 (`inv_freq` in the parity fixture of a Llama with
    /// `llama3` scaling): the first is kept, the next two are blended, the others divided by 8.
    #[test]
    fn llama3_scaling_equals_the_reference() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 64.0,
        };
        let reference = [1.0, 2.4438459e-1, 1.3042256e-2, 3.9528473e-3, 1.25e-3, 3.9528473e-4, 1.25e-4, 3.9528473e-5];
        close(&inverse_frequencies(&Rope { theta: 10000.0, scaling }, 16, None), &reference);
    }

    #[test]
    fn table_holds_cosine_and_sine_of_each_position() {
        let table = table(&[1.0, 0.5], 4, 1.0);
        assert_eq!(table.len(), 4 * 2 * 2);
        assert_eq!(table[..4], [1.0, 0.0, 1.0, 0.0]);
        let at = |position: usize, i: usize| &table[(position * 2 + i) * 2..][..2];
        assert_eq!(at(3, 0), [3f32.cos(), 3f32.sin()]);
        assert_eq!(at(3, 1), [1.5f32.cos(), 1.5f32.sin()]);
    }
}

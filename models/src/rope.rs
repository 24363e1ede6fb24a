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
    let scaled = plain.map(|frequency| scale(&rope.scaling, frequency));
    match factors {
        Some(factors) => scaled.zip(factors).map(|(frequency, factor)| frequency / factor).collect(),
        None => scaled.collect(),
    }
}

/// `[positions, frequencies, 2]`: cosine and sine.
pub fn table(inverse_frequencies: &[f32], positions: usize) -> Vec<f32> {
    let mut table = Vec::with_capacity(positions * inverse_frequencies.len() * 2);
    for position in 0..positions {
        for &frequency in inverse_frequencies {
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            table.extend([cos, sin]);
        }
    }
    table
}

fn scale(scaling: &RopeScaling, frequency: f32) -> f32 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
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
        let table = table(&[1.0, 0.5], 4);
        assert_eq!(table.len(), 4 * 2 * 2);
        assert_eq!(table[..4], [1.0, 0.0, 1.0, 0.0]);
        let at = |position: usize, i: usize| &table[(position * 2 + i) * 2..][..2];
        assert_eq!(at(3, 0), [3f32.cos(), 3f32.sin()]);
        assert_eq!(at(3, 1), [1.5f32.cos(), 1.5f32.sin()]);
    }
}

//! Functions on single rows: norm, rotation, activation. Plain loops that compilers vectorise.

use treespark_kernel_gen::Row;

use super::simd::{Kernel, LANES, Lanes, fold};

/// e^x to about one unit in the last place, without a branch or a call. Beyond ±87 it stays at e^±87; NaN is kept.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves that in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts: the product of the first and a small integer is exact.
    const LN_2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
    let x = if x > 87.0 { 87.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2[0] - n * LN_2[1];
    // The Taylor series: |r| < 0.35, so the next term is below 6e-9.
    let mut sum = 1.0 / 5040.0;
    for inverse_factorial in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + inverse_factorial;
    }
    sum * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()))
}

/// `out = x / rms(x) * weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = inverse_rms(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = inverse_rms(x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let (vectors, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for vector in vectors {
        for i in 0..LANES {
            lanes[i] += vector[i] * vector[i];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x * x;
    }
    1.0 / (fold(lanes) / x.len() as f32 + eps).sqrt()
}

/// Rotates a head by its position; `table` is `[max_positions, D/2, 2]`: cos, sin.
pub fn rope(head: &mut [f32], table: &[f32], row: &Row) {
    let half = head.len() / 2;
    let angles = table[row.position as usize * head.len()..].as_chunks::<2>().0;
    let (low, high) = head.split_at_mut(half);
    for ((a, b), [cos, sin]) in low.iter_mut().zip(high).zip(angles) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// `out = silu(gate) * up`.
pub struct SwiGlu<'a> {
    pub gate: &'a [f32],
    pub up: &'a [f32],
    pub out: &'a mut [f32],
}

impl Kernel for SwiGlu<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for i in -8700..=8700 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error < 2e-7, "exp({x}) is {}, off by {error:e}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(f32::NEG_INFINITY), exp(f32::INFINITY)), (exp(-87.0), exp(87.0)));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn norm_divides_by_the_root_of_the_mean_square() {
        let x: Vec<f32> = (1..=40).map(|i| i as f32).collect();
        let weight: Vec<f32> = (0..40).map(|i| 0.5 + i as f32).collect();
        let mut out = vec![0.0; 40];
        rms_norm(&x, &weight, 1e-5, &mut out);
        let rms = (x.iter().map(|x| f64::from(x * x)).sum::<f64>() / 40.0 + 1e-5).sqrt();
        for i in 0..40 {
            let want = f64::from(x[i]) / rms * f64::from(weight[i]);
            assert!((f64::from(out[i]) - want).abs() < 1e-6 * want, "[{i}] {} is not {want}", out[i]);
        }
        let mut in_place = x.clone();
        rms_norm_in_place(&mut in_place, &weight, 1e-5);
        assert_eq!(in_place, out);
    }
}

//! Attention of one request in f64, as its definition says: what a kernel must agree with before it is timed.

use std::slice::Chunks;

use rayon::prelude::*;

pub struct Request<'a> {
    pub heads: usize,
    pub kv_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    pub scale: f64,
    /// `[rows, heads, key_dim]`
    pub q: &'a [f32],
    /// `[kv_heads, slots, key_dim]`
    pub k: &'a [f32],
    /// `[kv_heads, slots, key_dim]`, of which the first `value_dim` elements count: latents are their own values.
    pub v: &'a [f32],
}

impl Request<'_> {
    /// `[rows, heads, value_dim]`; `sees` says which slots a row attends to.
    pub fn attend(&self, sees: impl Fn(usize, usize) -> bool + Sync) -> Vec<f64> {
        let rows = self.q.par_chunks(self.key_dim).enumerate();
        rows.flat_map_iter(|(i, q)| self.attend_row(q, i % self.heads, |slot| sees(i / self.heads, slot))).collect()
    }

    fn attend_row(&self, q: &[f32], head: usize, sees: impl Fn(usize) -> bool) -> Vec<f64> {
        let score = |(slot, key)| if sees(slot) { dot(q, key) * self.scale } else { f64::NEG_INFINITY };
        let scores: Vec<f64> = self.vectors(self.k, head).enumerate().map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut out = vec![0.0; self.value_dim];
        let mut sum = 0.0;
        for (score, value) in scores.iter().zip(self.vectors(self.v, head)) {
            let weight = (score - largest).exp();
            sum += weight;
            out.iter_mut().zip(value).for_each(|(out, &v)| *out += weight * f64::from(v));
        }
        out.iter().map(|out| out / sum).collect()
    }

    /// Of the kv head that a query head reads.
    fn vectors<'a>(&self, cache: &'a [f32], head: usize) -> Chunks<'a, f32> {
        let len = cache.len() / self.kv_heads;
        let first = head / (self.heads / self.kv_heads) * len;
        cache[first..first + len].chunks(self.key_dim)
    }
}

/// Eight sums, so that the compiler may use vectors.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(first: f32) -> Vec<f32> {
        [&[first][..], &[0.0; 7]].concat()
    }

    #[test]
    fn two_keys_are_averaged_by_their_weights_and_hidden_ones_are_not() {
        let (q, k) = ([vector(1.0), vector(0.0)].concat(), [vector(2.0), vector(0.0), vector(5.0)].concat());
        let v = [vector(1.0), vector(3.0), vector(100.0)].concat();
        let request = Request { heads: 2, kv_heads: 1, key_dim: 8, value_dim: 8, scale: 0.5, q: &q, k: &k, v: &v };
        let out = request.attend(|_, slot| slot < 2);
        let e = 1f64.exp();
        assert!((out[0] - (e + 3.0) / (e + 1.0)).abs() < 1e-6, "{}", out[0]);
        assert!((out[8] - 2.0).abs() < 1e-12, "{}", out[8]);
    }

    #[test]
    fn keys_may_be_longer_than_the_values_that_they_begin_with() {
        // The second key differs from the first in an element behind the value, and weighs e times as much.
        let mut k = [vector(1.0), vector(3.0)].concat();
        k[15] = 2.0;
        let q = [[0.0; 7].as_slice(), &[1.0]].concat();
        let request = Request { heads: 1, kv_heads: 1, key_dim: 8, value_dim: 4, scale: 0.5, q: &q, k: &k, v: &k };
        let out = request.attend(|_, _| true);
        let e = 1f64.exp();
        assert_eq!(out.len(), 4);
        assert!((out[0] - (1.0 + 3.0 * e) / (1.0 + e)).abs() < 1e-6, "{}", out[0]);
    }
}

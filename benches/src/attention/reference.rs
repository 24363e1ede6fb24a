//! Tree attention of one request in f64, as its definition says: what a kernel must agree with before it is timed.

use rayon::prelude::*;

pub struct Request {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// `[rows, heads, head_dim]`
    pub q: Vec<f32>,
    /// `[kv_heads, slots, head_dim]`
    pub k: Vec<f32>,
    /// `[kv_heads, slots, head_dim]`
    pub v: Vec<f32>,
}

impl Request {
    /// `[rows, heads, head_dim]`; `sees` says which slots a row attends to.
    pub fn attend(&self, sees: impl Fn(usize, usize) -> bool + Sync) -> Vec<f64> {
        let rows = self.q.par_chunks(self.head_dim).enumerate();
        rows.flat_map_iter(|(i, q)| self.attend_row(q, i % self.heads, |slot| sees(i / self.heads, slot))).collect()
    }

    fn attend_row(&self, q: &[f32], head: usize, sees: impl Fn(usize) -> bool) -> Vec<f64> {
        let of_head = |cache: &'_ [f32]| {
            let len = cache.len() / self.kv_heads;
            let first = head / (self.heads / self.kv_heads) * len;
            first..first + len
        };
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let keys = self.k[of_head(&self.k)].chunks(self.head_dim).enumerate();
        let score = |(slot, key)| if sees(slot) { dot(q, key) * scale } else { f64::NEG_INFINITY };
        let scores: Vec<f64> = keys.map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut out = vec![0.0; self.head_dim];
        let mut sum = 0.0;
        for (score, value) in scores.iter().zip(self.v[of_head(&self.v)].chunks(self.head_dim)) {
            let weight = (score - largest).exp();
            sum += weight;
            out.iter_mut().zip(value).for_each(|(out, &v)| *out += weight * f64::from(v));
        }
        out.iter().map(|out| out / sum).collect()
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

    #[test]
    fn two_keys_are_averaged_by_their_weights_and_hidden_ones_are_not() {
        let head_dim = 8;
        let vector = |first: f32| [&[first][..], &[0.0; 7]].concat();
        let request = Request {
            heads: 2,
            kv_heads: 1,
            head_dim,
            q: [vector(1.0), vector(0.0)].concat(),
            k: [vector(8f32.sqrt()), vector(0.0), vector(5.0)].concat(),
            v: [vector(1.0), vector(3.0), vector(100.0)].concat(),
        };
        let out = request.attend(|_, slot| slot < 2);
        let e = 1f64.exp();
        assert!((out[0] - (e + 3.0) / (e + 1.0)).abs() < 1e-6, "{}", out[0]);
        assert!((out[8] - 2.0).abs() < 1e-12, "{}", out[8]);
    }
}

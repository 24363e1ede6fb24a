//! A few outputs of a product in f64, as the ops are defined.

use half::bf16;
use rayon::prelude::*;
use treespark_models::{Config, Tensor};

use super::shapes::Kind;

/// What a product is computed from, as the device was given it. Rope turns by no angle.
pub struct Inputs<'a> {
    pub config: &'a Config,
    pub kind: Kind,
    /// `[rows, columns]`
    pub x: &'a [f32],
    /// `[columns]`
    pub norm: &'a [f32],
    /// `[head_dim]`
    pub q_norm: &'a [f32],
    /// What is in `out` before: the residual.
    pub before: f32,
    /// Of bf16, stacked; all but the last have the same number of rows.
    pub weight: &'a [Tensor],
}

impl Inputs<'_> {
    /// Which outputs of a row are computed: first, last and some between; for qkv whole heads.
    pub fn sample(&self) -> Vec<usize> {
        let count = self.kind.outputs(self.config);
        if self.kind == Kind::Qkv {
            let dim = self.config.head_dim;
            let heads = [0, self.config.heads / 2, self.config.heads - 1];
            return heads.into_iter().flat_map(|head| head * dim..(head + 1) * dim).collect();
        }
        let step = (count / 256).max(1) | 1;
        (0..count).step_by(step).chain([count - 1]).collect()
    }

    /// The sampled outputs of a row.
    pub fn outputs(&self, row: usize) -> Vec<f64> {
        let [_, columns] = self.kind.size(self.config);
        let x = self.x[row * columns..][..columns].iter().map(|&x| f64::from(x));
        let y: Vec<f64> = match self.kind {
            Kind::O | Kind::Down => x.collect(),
            _ => normed(&x.collect::<Vec<_>>(), self.norm, self.config.rms_eps),
        };
        let product = |at: usize| -> f64 { self.weight_row(at, columns).iter().zip(&y).map(|(w, y)| w * y).sum() };
        let sample = self.sample();
        let one = |&at: &usize| match self.kind {
            Kind::O | Kind::Down => f64::from(self.before) + product(at),
            Kind::Head | Kind::Qkv => product(at),
            Kind::GateUp => {
                let (gate, up) = (product(at), product(self.config.ffn + at));
                gate / (1.0 + (-gate).exp()) * up
            }
        };
        let outputs: Vec<f64> = sample.par_iter().map(one).collect();
        if self.kind != Kind::Qkv || !self.config.qk_norm {
            return outputs;
        }
        outputs.chunks(self.config.head_dim).flat_map(|head| normed(head, self.q_norm, self.config.rms_eps)).collect()
    }

    fn weight_row(&self, row: usize, columns: usize) -> Vec<f64> {
        let rows = self.weight[0].shape[0];
        let bytes = &self.weight[row / rows].bytes.as_slice()[row % rows * columns * 2..][..columns * 2];
        bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
    }
}

fn normed(x: &[f64], norm: &[f32], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let inverse = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(norm).map(|(x, &norm)| x * inverse * f64::from(norm)).collect()
}

//! A few outputs of a product in f64, as the ops are defined.

use half::bf16;
use rayon::prelude::*;
use treespark_kernel_gen::DType;
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
    /// Flat bf16 tensors, all but the last of one length, that are the weight one after the other.
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
        let length = self.weight[0].shape[0];
        let element = |at: usize| {
            let bytes = &self.weight[at / length].bytes.as_slice()[at % length * 2..][..2];
            bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64()
        };
        assert_eq!(self.weight[0].dtype, DType::BF16);
        (row * columns..(row + 1) * columns).map(element).collect()
    }
}

fn normed(x: &[f64], norm: &[f32], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let inverse = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(norm).map(|(x, &norm)| x * inverse * f64::from(norm)).collect()
}

//! Latent attention: its heads read one latent of each token, which is key and value of all.

use rayon::prelude::*;
use treespark_kernel_gen::{Buf, Op};

use super::Run;
use crate::cpu::linear;
use crate::cpu::math::{rms_norm_in_place, rope as rotate};
use crate::cpu::simd::Element;

impl Run<'_> {
    pub(super) fn latent(&mut self, op: &Op) {
        let &Op::Latent { ref batch, layer, eps, latent_eps, x, norm, weight, latent_norm, rope, compressed, cache } =
            op
        else {
            unreachable!("{} keeps no latents", op.name())
        };
        let rows = self.batch_rows(batch);
        let query = compressed.map_or(0, |buf| self.width(buf));
        let mut y = self.projected(x, norm, eps, weight);
        let width = y.len() / self.n_rows;
        for (y, row) in y.chunks_exact_mut(width).zip(&rows) {
            let norm = self.floats(latent_norm);
            let (latent, key) = y[query..].split_at_mut(norm.len());
            rms_norm_in_place(latent, norm, latent_eps);
            rotate(key, self.floats(rope), row);
        }
        if let Some(compressed) = compressed {
            self.writing(compressed, |_, out| {
                out.chunks_exact_mut(query)
                    .zip(y.chunks_exact(width))
                    .for_each(|(out, y)| out.copy_from_slice(&y[..query]));
            });
        }
        self.keep(batch, cache, layer, &rows, y.chunks_exact(width).map(|y| &y[query..]));
    }

    pub(super) fn latent_queries(&mut self, op: &Op) {
        let &Op::LatentQueries { ref batch, heads, eps, x, norm, weight, rope, nope, q } = op else {
            unreachable!("{} makes no queries", op.name())
        };
        let rows = self.batch_rows(batch);
        let mut y = self.projected(x, norm, eps, weight);
        let (head, nope_dim, q_dim) =
            (y.len() / (self.n_rows * heads), self.width(nope) / heads, self.width(q) / heads);
        for (y, row) in y.chunks_exact_mut(head * heads).zip(&rows) {
            y.chunks_exact_mut(head).for_each(|y| rotate(&mut y[nope_dim..], self.floats(rope), row));
        }
        self.writing(nope, |_, out| {
            let heads = out.chunks_exact_mut(nope_dim).zip(y.chunks_exact(head));
            heads.for_each(|(out, y)| out.copy_from_slice(&y[..nope_dim]));
        });
        self.writing(q, |_, out| {
            let heads = out.chunks_exact_mut(q_dim).zip(y.chunks_exact(head));
            heads.for_each(|(out, y)| out[q_dim - (head - nope_dim)..].copy_from_slice(&y[nope_dim..]));
        });
    }

    pub(super) fn per_head(&mut self, heads: usize, x: Buf, weight: Buf, out: Buf) {
        let (columns, width) = (self.width(x) / heads, self.width(out) / heads);
        self.writing(out, |run, out| {
            let (x, weight) = (run.rows(x), run.matrix(weight));
            let n = weight.rows() / heads;
            let products = (0..heads).into_par_iter().map(|head| {
                let x: Vec<f32> = x.chunks_exact(columns).skip(head).step_by(heads).flatten().copied().collect();
                let mut products = vec![0.0; run.n_rows * n];
                weight.multiply(run.isa, head * n..(head + 1) * n, &x, &mut products);
                products
            });
            for (head, products) in products.collect::<Vec<_>>().iter().enumerate() {
                let out = out.chunks_exact_mut(width).skip(head).step_by(heads);
                out.zip(products.chunks_exact(n)).for_each(|(out, product)| out[..n].copy_from_slice(product));
            }
        });
    }

    pub(super) fn latent_attention<T: Element>(&mut self, op: &Op) {
        let &Op::LatentAttention { ref batch, layer, heads, scale, q, cache, out, .. } = op else {
            unreachable!("{} is no attention to latents", op.name())
        };
        self.attend::<T>(batch, layer, [heads, 1], scale, q, [cache, cache], out);
    }

    /// `rms_norm(x, norm, eps) · weightᵀ`
    pub(super) fn projected(&self, x: Buf, norm: Buf, eps: f32, weight: Buf) -> Vec<f32> {
        let x = linear::normed(self.rows(x), self.floats(norm), eps);
        let weight = self.matrix(weight);
        let mut y = vec![0.0; self.n_rows * weight.rows()];
        linear::product(self.isa, weight, &x, &mut y);
        y
    }
}

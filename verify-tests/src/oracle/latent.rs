//! The oracle's latent attention.

use treespark_kernel_gen::Op;

use super::layers::{dot, rms_norm, softmax};
use super::{Slot, Step};

impl Step<'_> {
    pub(super) fn latent(&mut self, op: &Op) {
        let &Op::Latent { layer, eps, latent_eps, x, norm, weight, latent_norm, rope, compressed, cache, .. } = op
        else {
            unreachable!()
        };
        let rank = self.width(latent_norm);
        let query = compressed.map_or(0, |buf| self.width(buf));
        for r in 0..self.n_rows() {
            let row = self.row(r);
            let y = self.product(weight, &rms_norm(&self.row_of(x, r), &self.all(norm), eps));
            if let Some(compressed) = compressed {
                self.set_row(compressed, r, &y[..query]);
            }
            let mut kept = rms_norm(&y[query..query + rank], &self.all(latent_norm), latent_eps);
            kept.extend(self.turned(&y[query + rank..], rope, row.position));
            let slot = Slot { request: row.request, slot: self.prefix(row.request) + row.node };
            self.set_cached(cache, layer, 0, slot, &kept);
        }
    }

    pub(super) fn latent_queries(&mut self, op: &Op) {
        let &Op::LatentQueries { heads, eps, x, norm, weight, rope, nope, q, .. } = op else { unreachable!() };
        let (nope_dim, q_dim, rotated) = (self.width(nope), self.width(q), 2 * self.pass.buffer(rope).shape[1]);
        for r in 0..self.n_rows() {
            let position = self.row(r).position;
            let y = self.product(weight, &rms_norm(&self.row_of(x, r), &self.all(norm), eps));
            for (h, y) in y.chunks(nope_dim + rotated).enumerate() {
                let head = r * heads + h;
                for (i, &value) in y[..nope_dim].iter().enumerate() {
                    self.set(nope, head * nope_dim + i, value);
                }
                for (i, value) in self.turned(&y[nope_dim..], rope, position).into_iter().enumerate() {
                    self.set(q, head * q_dim + q_dim - rotated + i, value);
                }
            }
        }
    }

    pub(super) fn per_head(&mut self, op: &Op) {
        let &Op::PerHead { heads, x, weight, out, .. } = op else { unreachable!() };
        let (columns, width) = (self.width(x), self.width(out));
        let n = self.pass.buffer(weight).shape[0] / heads;
        for head in 0..self.n_rows() * heads {
            let x = self.slice(x, head * columns, columns);
            for i in 0..n {
                let value = dot(&self.row_of(weight, head % heads * n + i), &x);
                self.set(out, head * width + i, value);
            }
        }
    }

    pub(super) fn latent_attention(&mut self, op: &Op) {
        let &Op::LatentAttention { layer, heads, scale, q, cache, out, .. } = op else { unreachable!() };
        let (dim, rank) = (self.width(cache), self.width(out));
        for r in 0..self.n_rows() {
            let row = self.row(r);
            let prefix = self.prefix(row.request);
            let slots = (0..prefix).chain(row.path.iter().map(|node| prefix + node));
            let keys: Vec<Vec<f64>> = slots
                .map(|slot| {
                    let at = self.cache_at(cache, layer, 0, Slot { request: row.request, slot });
                    self.slice(cache, at, dim)
                })
                .collect();
            let mut result = Vec::new();
            for h in 0..heads {
                let query = self.slice(q, (r * heads + h) * dim, dim);
                let scores: Vec<f64> = keys.iter().map(|key| dot(&query, key) * f64::from(scale)).collect();
                let weights = softmax(&scores);
                result.extend((0..rank).map(|i| keys.iter().zip(&weights).map(|(key, w)| w * key[i]).sum::<f64>()));
            }
            self.set_row(out, r, &result);
        }
    }
}

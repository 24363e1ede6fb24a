//! Latent attention: the cache has one head, of a latent and a rotated key.

use super::Check;
use crate::op::{CacheShape, Op};
use crate::pass::{Buf, DType, PassError};

/// Elements of a latent and its key; 576 in every model so far.
const MAX_LATENT: usize = 576;

impl Check<'_> {
    pub(super) fn latent(&self, max_rows: usize) -> Result<(), PassError> {
        match self.op {
            Op::Latent { layer, x, norm, weight, latent_norm, rope, compressed, cache, .. } => {
                let width = self.latent_cache(*cache, *layer)?.head_dim;
                let hidden = self.normed("x", *x, *norm, max_rows)?;
                self.rank("latent_norm", *latent_norm, 1)?;
                let latent = self.dims(*latent_norm)[0];
                self.rotated(*rope, latent, width)?;
                let mut query = 0;
                if let Some(compressed) = compressed {
                    self.rank("compressed", *compressed, 2)?;
                    query = self.dims(*compressed)[1];
                    self.shape("compressed", *compressed, DType::F32, &[max_rows, query])?;
                }
                self.shape("latent_norm", *latent_norm, DType::F32, &[latent])?;
                self.weight_shape("weight", *weight, &[query + width, hidden])
            }
            Op::LatentQueries { heads, x, norm, weight, rope, nope, q, .. } => {
                let columns = self.normed("x", *x, *norm, max_rows)?;
                let (nope_dim, width) =
                    (self.of_heads("nope", *nope, *heads, max_rows)?, self.of_heads("q", *q, *heads, max_rows)?);
                self.rank("rope", *rope, 3)?;
                let rotated = 2 * self.dims(*rope)[1];
                self.rotated(*rope, width.saturating_sub(rotated), width)?;
                self.weight_shape("weight", *weight, &[heads * (nope_dim + rotated), columns])
            }
            Op::PerHead { heads, x, weight, out, .. } => {
                let columns = self.of_heads("x", *x, *heads, max_rows)?;
                let width = self.of_heads("out", *out, *heads, max_rows)?;
                self.weight("weight", *weight)?;
                let rows = self.dims(*weight)[0];
                if !rows.is_multiple_of(*heads) || rows / heads > width {
                    let problem =
                        format!("has {rows} rows for {heads} heads, whose results have room for {width} each");
                    return Err(self.error("weight", problem));
                }
                self.weight_shape("weight", *weight, &[rows, columns])
            }
            Op::LatentAttention { layer, heads, tree, q, cache, out, .. } => {
                let width = self.latent_cache(*cache, *layer)?.head_dim;
                self.tree(tree)?;
                self.shape("q", *q, DType::F32, &[max_rows, *heads, width])?;
                let latent = self.of_heads("out", *out, *heads, max_rows)?;
                if latent >= width || !latent.is_multiple_of(8) {
                    let problem =
                        format!("has latents of {latent} of keys of {width}, expected a multiple of 8 below that");
                    return Err(self.error("out", problem));
                }
                Ok(())
            }
            _ => unreachable!("{} is no op of latent attention", self.op.name()),
        }
    }

    pub(super) fn latent_cache(&self, cache: Buf, layer: usize) -> Result<CacheShape, PassError> {
        let shape = self.one_cache("cache", cache, layer, MAX_LATENT)?;
        match shape.kv_heads {
            1 => Ok(shape),
            heads => Err(self.error("cache", format!("has {heads} heads, expected one of latents"))),
        }
    }

    /// The table rotates what is behind the latent.
    fn rotated(&self, rope: Buf, latent: usize, width: usize) -> Result<(), PassError> {
        self.rank("rope", rope, 3)?;
        let dim = width.saturating_sub(latent);
        if dim == 0 || latent == 0 || !dim.is_multiple_of(2) {
            let problem = format!("of {dim} elements behind {latent}, expected an even number behind some");
            return Err(self.error("rope", problem));
        }
        self.shape("rope", rope, DType::F32, &[self.dims(rope)[0], dim / 2, 2])
    }

    /// F32 `[R, heads, width]`; returns the width.
    fn of_heads(&self, field: &'static str, buf: Buf, heads: usize, max_rows: usize) -> Result<usize, PassError> {
        self.rank(field, buf, 3)?;
        let width = self.dims(buf)[2];
        self.shape(field, buf, DType::F32, &[max_rows, heads, width])?;
        Ok(width)
    }
}

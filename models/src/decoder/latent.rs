//! Latent attention (MLA; DeepSeek-V2, 2024), in the space of latents:
//!
//! ```text
//! compressed, cache = latent(x)             norm, projection, the latent's norm, rope
//! nope, q = latent_queries(compressed or x) norm, projection, rope
//! q = nope · absorb                         of each head: the latent's part of a key is a product with it
//! latents = latent_attention(q, cache)
//! attention = latents · values              of each head
//! x += attention · oᵀ
//! ```
//!
//! `kv_b_proj` makes keys and values of a latent. Its part for keys is multiplied with the query instead, that for values with
//! what attention leaves, so that nothing is ever made of a cached latent: its heads are one head of 576, read once for all.

use treespark_kernel_gen::{Buf, Op};

use super::Decoder;
use crate::builder::{Builder, WeightList};
use crate::config::Latent;
use crate::cut::Cut;

/// Of the norms of a latent and of a compressed query, whatever a config says of the others.
const EPS: f32 = 1e-6;

impl Decoder<'_> {
    pub(super) fn latent_weights(&self, list: &mut WeightList, latent: &Latent, tensors: &str, layer: usize) {
        let &Latent { compressed, rank, nope_dim, rotated, value_dim, interleaved } = latent;
        let (heads, hidden) = (self.config.heads, self.config.hidden);
        let ours = |name: &str| self.layer_buffer(layer, name);
        let theirs = |name: &str| format!("{tensors}layers.{}.self_attn.{name}.weight", self.first + layer);

        let paired = |head| interleaved.then_some(Cut::Rotated { head, rotated });
        let query = compressed.map(|size| (theirs("q_a_proj"), [size, hidden], None));
        let head = rank + rotated;
        let kept = (theirs("kv_a_proj_with_mqa"), [head, hidden], paired(head));
        list.cut(ours("latent"), query.into_iter().chain([kept]).collect());
        list.vector(ours("latent_norm"), vec![(theirs("kv_a_layernorm"), rank)]);

        let head = nope_dim + rotated;
        let (tensor, columns) = match compressed {
            Some(size) => (theirs("q_b_proj"), size),
            None => (theirs("q_proj"), hidden),
        };
        if let Some(size) = compressed {
            list.vector(ours("q_norm"), vec![(theirs("q_a_layernorm"), size)]);
        }
        list.cut(ours("q"), vec![(tensor, [heads * head, columns], paired(head))]);

        let head = nope_dim + value_dim;
        let shape = [heads * head, rank];
        let keys = Cut::Transposed { head, rows: 0..nope_dim };
        list.cut(ours("absorb"), vec![(theirs("kv_b_proj"), shape, Some(keys))]);
        let values = Cut::OfHeads { head, rows: nope_dim..head };
        list.cut(ours("values"), vec![(theirs("kv_b_proj"), shape, Some(values))]);
    }

    pub(super) fn keep_latents(&self, builder: &mut Builder, latent: &Latent, layer: usize) {
        let op = Op::Latent {
            batch: builder.batch,
            layer,
            eps: self.config.rms_eps,
            latent_eps: EPS,
            x: self.x(builder),
            norm: self.layer_weight(builder, layer, "attn_norm"),
            weight: self.layer_weight(builder, layer, "latent"),
            latent_norm: self.layer_weight(builder, layer, "latent_norm"),
            rope: builder.weight(&self.buffer("rope")),
            compressed: latent.compressed.map(|size| builder.scratch(&self.buffer("compressed"), &[size])),
            cache: self.latents(builder),
        };
        builder.push(op);
    }

    pub(super) fn latent_attention(&self, builder: &mut Builder, latent: &Latent, layer: usize) {
        let (batch, heads) = (builder.batch, self.config.heads);
        let of_heads = |builder: &mut Builder, name: &str, width| builder.scratch(&self.buffer(name), &[heads, width]);
        let nope = of_heads(builder, "nope", latent.nope_dim);
        let q = of_heads(builder, "q", latent.cached());
        let latents = of_heads(builder, "latents", latent.rank);
        let attention = of_heads(builder, "attention", latent.value_dim);

        let (x, norm) = match latent.compressed {
            Some(size) => (builder.scratch(&self.buffer("compressed"), &[size]), "q_norm"),
            None => (self.x(builder), "attn_norm"),
        };
        let eps = if latent.compressed.is_some() { EPS } else { self.config.rms_eps };
        let [norm, weight] = [norm, "q"].map(|name| self.layer_weight(builder, layer, name));
        let rope = builder.weight(&self.buffer("rope"));
        builder.push(Op::LatentQueries { batch, heads, eps, x, norm, weight, rope, nope, q });

        let weight = self.layer_weight(builder, layer, "absorb");
        builder.push(Op::PerHead { batch, heads, x: nope, weight, out: q });

        let (cache, tree, scale) = (self.latents(builder), builder.dims.tree.clone(), self.config.softmax_scale());
        builder.push(Op::LatentAttention { batch, layer, heads, scale, tree, q, cache, out: latents });

        let weight = self.layer_weight(builder, layer, "values");
        builder.push(Op::PerHead { batch, heads, x: latents, weight, out: attention });

        let (weight, residual) = (self.layer_weight(builder, layer, "o"), self.x(builder));
        builder.push(Op::Project { batch, add: true, x: attention, weight, residual });
    }

    pub(super) fn latents(&self, builder: &mut Builder) -> Buf {
        builder.cache(self.prefix, "cache", self.config)
    }
}

//! Decoder layers as ops: what a target and a drafter's backbone have in common. Those of the Llama family are below; a
//! layer may have [latent attention](latent) or [experts](experts) instead.
//!
//! ```text
//! q, cache = qkv(x)                  norm, projection, bias, q/k norm, rope
//! attention = tree_attention(q, cache)
//! x += attention · oᵀ                project
//! ffn = gate_up(x)                   norm, projection, SwiGLU
//! x += ffn · downᵀ                   project
//! ```

use treespark_kernel_gen::{Buf, Op};

use crate::builder::{Builder, WeightList};
use crate::config::Config;

mod experts;
mod latent;

/// A stack of layers whose buffers begin with `prefix`. `x` is its residual stream.
#[derive(Clone, Copy)]
pub(crate) struct Decoder<'a> {
    pub config: &'a Config,
    pub prefix: &'static str,
    /// Which of the checkpoint's layers is layer 0.
    pub first: usize,
}

impl Decoder<'_> {
    /// The weight buffers of all layers. Tensors of layer i are called `{tensors}layers.{first + i}.…`.
    pub fn weights(&self, list: &mut WeightList, tensors: &str) {
        let Config { hidden, ffn, .. } = *self.config;
        for layer in 0..self.config.layers {
            let ours = |name: &str| self.layer_buffer(layer, name);
            let theirs = |name: &str, rows: usize| (format!("{tensors}layers.{}.{name}", self.first + layer), rows);
            list.vector(ours("attn_norm"), vec![theirs("input_layernorm.weight", hidden)]);
            match &self.config.latent {
                Some(latent) => self.latent_weights(list, latent, tensors, layer),
                None => self.qkv_weights(list, tensors, layer),
            }
            list.matrix(ours("o"), self.config.q_dim(), vec![theirs("self_attn.o_proj.weight", hidden)]);
            list.vector(ours("ffn_norm"), vec![theirs("post_attention_layernorm.weight", hidden)]);
            if let Some(experts) = self.config.experts_of(layer) {
                self.expert_weights(list, experts, tensors, layer);
                continue;
            }
            let gate_up = vec![theirs("mlp.gate_proj.weight", ffn), theirs("mlp.up_proj.weight", ffn)];
            list.matrix(ours("gate_up"), hidden, gate_up);
            list.matrix(ours("down"), ffn, vec![theirs("mlp.down_proj.weight", hidden)]);
        }
    }

    fn qkv_weights(&self, list: &mut WeightList, tensors: &str, layer: usize) {
        let ours = |name: &str| self.layer_buffer(layer, name);
        let theirs = |name: &str, rows: usize| (format!("{tensors}layers.{}.{name}", self.first + layer), rows);
        let qkv = |kind: &str| {
            let projections = [("q", self.config.q_dim()), ("k", self.config.kv_dim()), ("v", self.config.kv_dim())];
            projections.map(|(letter, rows)| theirs(&format!("self_attn.{letter}_proj.{kind}"), rows)).to_vec()
        };
        list.matrix(ours("qkv"), self.config.hidden, qkv("weight"));
        if self.config.qkv_bias {
            list.vector(ours("qkv_bias"), qkv("bias"));
        }
        if self.config.qk_norm {
            list.vector(ours("q_norm"), vec![theirs("self_attn.q_norm.weight", self.config.head_dim)]);
            list.vector(ours("k_norm"), vec![theirs("self_attn.k_norm.weight", self.config.head_dim)]);
        }
    }

    pub fn layer(&self, builder: &mut Builder, layer: usize) {
        self.keep(builder, layer);
        match &self.config.latent {
            Some(latent) => self.latent_attention(builder, latent, layer),
            None => self.attention(builder, layer),
        }
        match self.config.experts_of(layer) {
            Some(experts) => self.mixture(builder, experts, layer),
            None => self.mlp(builder, ["gate_up", "down"], self.config.ffn, layer),
        }
    }

    /// What the cache keeps of the rows; with grouped queries, these too.
    pub fn keep(&self, builder: &mut Builder, layer: usize) {
        match &self.config.latent {
            Some(latent) => self.keep_latents(builder, latent, layer),
            None => self.qkv(builder, layer),
        }
    }

    fn qkv(&self, builder: &mut Builder, layer: usize) {
        let [k_cache, v_cache] = self.cache(builder);
        let op = Op::Qkv {
            batch: builder.batch,
            layer,
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            eps: self.config.rms_eps,
            x: self.x(builder),
            norm: self.layer_weight(builder, layer, "attn_norm"),
            weight: self.layer_weight(builder, layer, "qkv"),
            bias: builder.optional_weight(&self.layer_buffer(layer, "qkv_bias")),
            q_norm: builder.optional_weight(&self.layer_buffer(layer, "q_norm")),
            k_norm: builder.optional_weight(&self.layer_buffer(layer, "k_norm")),
            rope: builder.weight(&self.buffer("rope")),
            q: self.heads_of_rows(builder, "q"),
            k_cache,
            v_cache,
        };
        builder.push(op);
    }

    fn attention(&self, builder: &mut Builder, layer: usize) {
        let [k_cache, v_cache] = self.cache(builder);
        let (batch, out, residual) = (builder.batch, self.heads_of_rows(builder, "attention"), self.x(builder));
        let op = Op::TreeAttention {
            batch,
            layer,
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            scale: self.config.softmax_scale(),
            tree: builder.dims.tree.clone(),
            q: self.heads_of_rows(builder, "q"),
            k_cache,
            v_cache,
            out,
        };
        builder.push(op);
        let weight = self.layer_weight(builder, layer, "o");
        builder.push(Op::Project { batch, add: true, x: out, weight, residual });
    }

    /// With these weights, of an inner size.
    fn mlp(&self, builder: &mut Builder, [gate_up, down]: [&str; 2], ffn: usize, layer: usize) {
        let (batch, x) = (builder.batch, self.x(builder));
        let norm = self.layer_weight(builder, layer, "ffn_norm");
        let weight = self.layer_weight(builder, layer, gate_up);
        let out = builder.scratch(&self.buffer(if gate_up == "gate_up" { "ffn" } else { "shared_ffn" }), &[ffn]);
        builder.push(Op::GateUp { batch, eps: self.config.rms_eps, x, norm, weight, out });
        let weight = self.layer_weight(builder, layer, down);
        builder.push(Op::Project { batch, add: true, x: out, weight, residual: x });
    }

    pub fn commit(&self, builder: &mut Builder) {
        let (batch, accepted) = (builder.batch, builder.accepted());
        let (k_cache, v_cache) = match self.config.latent {
            Some(_) => (self.latents(builder), None),
            None => (self.cache(builder)[0], Some(self.cache(builder)[1])),
        };
        builder.push(Op::Commit { batch, accepted, k_cache, v_cache });
    }

    pub fn x(&self, builder: &mut Builder) -> Buf {
        builder.scratch(&self.buffer("x"), &[self.config.hidden])
    }

    pub fn heads_of_rows(&self, builder: &mut Builder, name: &str) -> Buf {
        builder.scratch(&self.buffer(name), &[self.config.heads, self.config.head_dim])
    }

    /// Keys and values.
    pub fn cache(&self, builder: &mut Builder) -> [Buf; 2] {
        ["cache.k", "cache.v"].map(|name| builder.cache(self.prefix, name, self.config))
    }

    pub fn layer_weight(&self, builder: &mut Builder, layer: usize, name: &str) -> Buf {
        builder.weight(&self.layer_buffer(layer, name))
    }

    pub fn buffer(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub fn layer_buffer(&self, layer: usize, name: &str) -> String {
        format!("{}layers.{layer}.{name}", self.prefix)
    }
}

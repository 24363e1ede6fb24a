//! The Llama family as passes: what runs, in which order, on which buffers.
//!
//! Llama, Qwen2 and Qwen3 differ in optional buffers of one op (biases, q/k norm), so one description serves all:
//!
//! ```text
//! x = embed(rows)
//! for each layer:
//!     q, cache = qkv(x)                  norm, projection, bias, q/k norm, rope
//!     attention = tree_attention(q, cache)
//!     x += attention · oᵀ                project
//!     ffn = gate_up(x)                   norm, projection, SwiGLU
//!     x += ffn · downᵀ                   project
//! logits = head(x)                       norm, projection
//! ```

use treespark_kernel_gen::{Buf, Op, Pass, PassError, TreeShape};

use crate::builder::{Builder, Dims, NgramDims, Weight, WeightList};
use crate::config::Config;

/// Embeds and runs all layers for their keys and values: what a prompt needs but for its last token. The last layer
/// ends with its cache rows, since nobody reads what would follow.
pub fn extend_pass(config: &Config, dims: &Dims, rows: usize) -> Result<Pass, PassError> {
    let mut llama = Llama::new("extend", config, dims, rows);
    llama.embed();
    for layer in 0..config.layers - 1 {
        llama.layer(layer);
    }
    llama.qkv(config.layers - 1);
    llama.builder.finish()
}

/// Every row's logits.
pub fn logits_pass(config: &Config, dims: &Dims, rows: usize) -> Result<Pass, PassError> {
    let mut llama = Llama::new("logits", config, dims, rows);
    llama.forward();
    llama.builder.finish()
}

/// The target's draw at every row, and the accepted path of every request.
pub fn verify_pass(config: &Config, dims: &Dims, rows: usize) -> Result<Pass, PassError> {
    let mut llama = Llama::new("verify", config, dims, rows);
    llama.forward();
    llama.builder.draw_and_accept();
    llama.builder.finish()
}

/// The most likely continuations of every row: what a tree grows from.
pub fn draft_pass(config: &Config, dims: &Dims, rows: usize) -> Result<Pass, PassError> {
    let mut llama = Llama::new("draft", config, dims, rows);
    llama.forward();
    llama.builder.top_k();
    llama.builder.finish()
}

/// Grows trees by the last level of their shape, from what a draft pass over the level above ranked. It reads no weights.
pub fn grow_pass(config: &Config, dims: &Dims, shape: TreeShape) -> Result<Pass, PassError> {
    let mut llama = Llama::new("grow", config, dims, dims.max_rows);
    llama.builder.grow(shape);
    llama.builder.finish()
}

/// Moves the accepted rows of the cache next to the prefix. It reads no weights and works on requests, not on rows.
pub fn commit_pass(config: &Config, dims: &Dims) -> Result<Pass, PassError> {
    let mut llama = Llama::new("commit", config, dims, dims.max_rows);
    llama.commit();
    llama.builder.finish()
}

/// A whole round that needs the host only to wait for it: verify and commit the trees in the batch buffers, then draft
/// those of the next round into them.
pub fn round_pass(config: &Config, dims: &Dims, rows: usize, drafter: NgramDims) -> Result<Pass, PassError> {
    let mut llama = Llama::new("round", config, dims, rows);
    llama.forward();
    llama.builder.draw_and_accept();
    llama.commit();
    llama.builder.draft_ngram(drafter);
    llama.builder.finish()
}

/// Drafts the first round's trees on the device.
pub fn ngram_pass(config: &Config, dims: &Dims, drafter: NgramDims) -> Result<Pass, PassError> {
    let mut llama = Llama::new("draft n-grams", config, dims, dims.max_rows);
    llama.builder.draft_ngram(drafter);
    llama.builder.finish()
}

/// All weight buffers, in the order of their use. A tied head is the embedding table and no buffer of its own.
pub fn weights(config: &Config, context: usize) -> Vec<Weight> {
    let Config { hidden, ffn, vocab_size, head_dim, .. } = *config;
    let mut list = WeightList::new(config.weight_dtype);
    list.matrix("embed", hidden, vec![("model.embed_tokens.weight".into(), vocab_size)]);
    list.rope(context, head_dim);
    for layer in 0..config.layers {
        let ours = |name: &str| layer_buffer(layer, name);
        let theirs = |name: &str, rows: usize| (format!("model.layers.{layer}.{name}"), rows);
        let qkv = |kind: &str| {
            let projections = [("q", config.q_dim()), ("k", config.kv_dim()), ("v", config.kv_dim())];
            projections.map(|(letter, rows)| theirs(&format!("self_attn.{letter}_proj.{kind}"), rows)).to_vec()
        };
        list.vector(ours("attn_norm"), vec![theirs("input_layernorm.weight", hidden)]);
        list.matrix(ours("qkv"), hidden, qkv("weight"));
        if config.qkv_bias {
            list.vector(ours("qkv_bias"), qkv("bias"));
        }
        if config.qk_norm {
            list.vector(ours("q_norm"), vec![theirs("self_attn.q_norm.weight", head_dim)]);
            list.vector(ours("k_norm"), vec![theirs("self_attn.k_norm.weight", head_dim)]);
        }
        list.matrix(ours("o"), config.q_dim(), vec![theirs("self_attn.o_proj.weight", hidden)]);
        list.vector(ours("ffn_norm"), vec![theirs("post_attention_layernorm.weight", hidden)]);
        let gate_up = vec![theirs("mlp.gate_proj.weight", ffn), theirs("mlp.up_proj.weight", ffn)];
        list.matrix(ours("gate_up"), hidden, gate_up);
        list.matrix(ours("down"), ffn, vec![theirs("mlp.down_proj.weight", hidden)]);
    }
    list.vector("norm", vec![("model.norm.weight".into(), hidden)]);
    if !config.tied {
        list.matrix("head", hidden, vec![("lm_head.weight".into(), vocab_size)]);
    }
    list.finish()
}

fn layer_buffer(layer: usize, name: &str) -> String {
    format!("layers.{layer}.{name}")
}

/// A pass of this family being described. `x` is the residual stream.
struct Llama<'a> {
    config: &'a Config,
    builder: Builder<'a>,
}

impl<'a> Llama<'a> {
    fn new(name: &str, config: &'a Config, dims: &'a Dims, rows: usize) -> Llama<'a> {
        let weights = weights(config, dims.context);
        Llama { config, builder: Builder::new(name, dims, rows, config.vocab_size, weights) }
    }

    /// From tokens to logits.
    fn forward(&mut self) {
        self.embed();
        for layer in 0..self.config.layers {
            self.layer(layer);
        }
        self.head();
    }

    fn embed(&mut self) {
        let op = Op::Embed { batch: self.builder.batch, table: self.builder.weight("embed"), out: self.x() };
        self.builder.push(op);
    }

    fn layer(&mut self, layer: usize) {
        self.qkv(layer);
        self.attention(layer);
        self.mlp(layer);
    }

    fn qkv(&mut self, layer: usize) {
        let (k_cache, v_cache) = self.cache();
        let op = Op::Qkv {
            batch: self.builder.batch,
            layer,
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            eps: self.config.rms_eps,
            x: self.x(),
            norm: self.layer_weight(layer, "attn_norm"),
            weight: self.layer_weight(layer, "qkv"),
            bias: self.builder.optional_weight(&layer_buffer(layer, "qkv_bias")),
            q_norm: self.builder.optional_weight(&layer_buffer(layer, "q_norm")),
            k_norm: self.builder.optional_weight(&layer_buffer(layer, "k_norm")),
            rope: self.builder.weight("rope"),
            q: self.heads_of_rows("q"),
            k_cache,
            v_cache,
        };
        self.builder.push(op);
    }

    fn attention(&mut self, layer: usize) {
        let (k_cache, v_cache) = self.cache();
        let (batch, out, residual) = (self.builder.batch, self.heads_of_rows("attention"), self.x());
        let op = Op::TreeAttention {
            batch,
            layer,
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            scale: 1.0 / (self.config.head_dim as f32).sqrt(),
            tree: self.builder.dims.tree.clone(),
            q: self.heads_of_rows("q"),
            k_cache,
            v_cache,
            out,
        };
        self.builder.push(op);
        let weight = self.layer_weight(layer, "o");
        self.builder.push(Op::Project { batch, x: out, weight, residual });
    }

    fn mlp(&mut self, layer: usize) {
        let (batch, x) = (self.builder.batch, self.x());
        let (norm, weight) = (self.layer_weight(layer, "ffn_norm"), self.layer_weight(layer, "gate_up"));
        let out = self.builder.scratch("ffn", &[self.config.ffn]);
        self.builder.push(Op::GateUp { batch, eps: self.config.rms_eps, x, norm, weight, out });
        let weight = self.layer_weight(layer, "down");
        self.builder.push(Op::Project { batch, x: out, weight, residual: x });
    }

    fn head(&mut self) {
        let op = Op::Head {
            batch: self.builder.batch,
            eps: self.config.rms_eps,
            x: self.x(),
            norm: self.builder.weight("norm"),
            weight: self.builder.weight(if self.config.tied { "embed" } else { "head" }),
            logits: self.builder.logits(),
        };
        self.builder.push(op);
    }

    fn commit(&mut self) {
        let (batch, accepted, (k_cache, v_cache)) = (self.builder.batch, self.builder.accepted(), self.cache());
        self.builder.push(Op::Commit { batch, accepted, k_cache, v_cache });
    }

    fn x(&mut self) -> Buf {
        self.builder.scratch("x", &[self.config.hidden])
    }

    fn heads_of_rows(&mut self, name: &str) -> Buf {
        self.builder.scratch(name, &[self.config.heads, self.config.head_dim])
    }

    fn cache(&mut self) -> (Buf, Buf) {
        self.builder.cache(self.config.layers, self.config.kv_heads, self.config.head_dim)
    }

    fn layer_weight(&mut self, layer: usize, name: &str) -> Buf {
        self.builder.weight(&layer_buffer(layer, name))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;

    use serde_json::json;
    use treespark_kernel_gen::{BufferDesc, DType, MAX_NODES, Role, TreeSpec};

    use super::*;

    fn config(architecture: &str, tied: bool) -> Config {
        let json = json!({
            "architectures": [architecture], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        });
        Config::from_json(&json, DType::BF16, Path::new("config.json")).unwrap()
    }

    fn dims() -> Dims {
        Dims {
            max_rows: 16,
            head_rows: 8,
            max_requests: 2,
            context: 64,
            page_size: 16,
            pages: 8,
            pages_per_request: 4,
            top_k: 4,
            cache_dtype: DType::BF16,
            tree: TreeSpec::Any(MAX_NODES),
        }
    }

    const DRAFTER: NgramDims = NgramDims { nodes: 8, row_cost: 0.01 };

    fn all_passes(config: &Config) -> Vec<Pass> {
        let dims = dims();
        vec![
            extend_pass(config, &dims, 16).unwrap(),
            logits_pass(config, &dims, 8).unwrap(),
            verify_pass(config, &dims, 8).unwrap(),
            draft_pass(config, &dims, 4).unwrap(),
            grow_pass(config, &dims, "2x2".parse().unwrap()).unwrap(),
            commit_pass(config, &dims).unwrap(),
            round_pass(config, &dims, 8, DRAFTER).unwrap(),
            ngram_pass(config, &dims, DRAFTER).unwrap(),
        ]
    }

    fn op_names(pass: &Pass) -> Vec<&'static str> {
        pass.ops.iter().map(Op::name).collect()
    }

    #[test]
    fn a_verify_pass_prints_as_a_forward_pass_reads() {
        let mut config = config("Qwen3ForCausalLM", true);
        config.layers = 1;
        let golden = "\
pass verify (8 rows)
  embed           table=embed:bf16[100, 32] out=x:f32[16, 32]
  qkv             x=x:f32[16, 32] norm=layers.0.attn_norm:f32[32] weight=layers.0.qkv:bf16[80, 32] \
q_norm=layers.0.q_norm:f32[8] k_norm=layers.0.k_norm:f32[8] rope=rope:f32[64, 4, 2] q=q:f32[16, 6, 8] \
k_cache=cache.k:bf16[1, 8, 2, 16, 8] v_cache=cache.v:bf16[1, 8, 2, 16, 8]
  tree_attention  q=q:f32[16, 6, 8] k_cache=cache.k:bf16[1, 8, 2, 16, 8] v_cache=cache.v:bf16[1, 8, 2, 16, 8] \
out=attention:f32[16, 6, 8]
  project         x=attention:f32[16, 6, 8] weight=layers.0.o:bf16[32, 48] residual=x:f32[16, 32]
  gate_up         x=x:f32[16, 32] norm=layers.0.ffn_norm:f32[32] weight=layers.0.gate_up:bf16[96, 32] \
out=ffn:f32[16, 48]
  project         x=ffn:f32[16, 48] weight=layers.0.down:bf16[32, 48] residual=x:f32[16, 32]
  head            x=x:f32[16, 32] norm=norm:f32[32] weight=embed:bf16[100, 32] logits=logits:f32[8, 100]
  draw            seen=seen:u32[2, 4] logits=logits:f32[8, 100] draws=draws:u32[16]
  accept          draws=draws:u32[16] accepted=accepted:u32[2, 513]
  9 ops, 0.0 MB of weights
";
        assert_eq!(verify_pass(&config, &dims(), 8).unwrap().to_string(), golden);
    }

    #[test]
    fn an_extend_pass_ends_with_the_last_layer_s_cache_rows() {
        let pass = extend_pass(&config("LlamaForCausalLM", false), &dims(), 16).unwrap();
        let layer = ["qkv", "tree_attention", "project", "gate_up", "project"];
        assert_eq!(op_names(&pass), [&["embed"], &layer[..], &["qkv"]].concat());
        assert!(matches!(pass.ops.last(), Some(Op::Qkv { layer: 1, .. })));
        assert!(pass.buffers.iter().all(|b| b.name != "layers.1.o" && b.name != "logits"), "{pass}");
    }

    #[test]
    fn a_round_pass_is_a_verify_pass_and_what_follows_it() {
        let config = config("LlamaForCausalLM", true);
        let verify = op_names(&verify_pass(&config, &dims(), 4).unwrap());
        let round = round_pass(&config, &dims(), 4, DRAFTER).unwrap();
        assert_eq!(op_names(&round), [&verify[..], &["commit", "draft_ngram"]].concat());
    }

    #[test]
    fn passes_share_buffers_by_name() {
        for architecture in crate::config::SUPPORTED {
            for tied in [false, true] {
                let mut known: HashMap<String, BufferDesc> = HashMap::new();
                for pass in all_passes(&config(architecture, tied)) {
                    for buffer in pass.buffers {
                        let before = known.entry(buffer.name.clone()).or_insert_with(|| buffer.clone());
                        assert_eq!(*before, buffer, "{}", pass.name);
                    }
                }
            }
        }
    }

    /// No weight is loaded for nothing, and none is missing.
    #[test]
    fn a_forward_pass_uses_exactly_the_listed_weights() {
        for architecture in crate::config::SUPPORTED {
            for tied in [false, true] {
                let config = config(architecture, tied);
                let mut listed: Vec<_> = weights(&config, 64).into_iter().map(|w| w.desc).collect();
                let mut used = logits_pass(&config, &dims(), 8).unwrap().buffers;
                used.retain(|buffer| buffer.role == Role::Weight);
                listed.sort_by(|a, b| a.name.cmp(&b.name));
                used.sort_by(|a, b| a.name.cmp(&b.name));
                assert_eq!(listed, used, "{architecture}, tied: {tied}");
            }
        }
    }

    #[test]
    fn a_pass_too_large_for_its_buffers_is_refused() {
        let config = config("LlamaForCausalLM", true);
        let error = verify_pass(&config, &dims(), 9).unwrap_err();
        assert_eq!((error.op, error.field), ("head", "logits"));
        assert!(extend_pass(&config, &dims(), 17).unwrap_err().problem.contains("17 rows"));
        assert!(draft_pass(&config, &Dims { top_k: 0, ..dims() }, 4).unwrap_err().problem.contains("k = 0"));
    }
}

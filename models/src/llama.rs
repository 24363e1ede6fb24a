//! A target's passes: what runs, in which order, on which buffers.
//!
//! Llama, Qwen2 and Qwen3 differ in optional buffers of one op (biases, q/k norm), DeepSeek's in the ops of a layer, so one
//! description serves all:
//!
//! ```text
//! x = embed(rows)
//! for each layer: decoder
//! logits = head(x)                   norm, projection
//! ```
//!
//! A drafter that reads the target's hidden states ([`Speculator`](crate::Speculator)) adds to these passes what it
//! takes from them.

use treespark_kernel_gen::{BlockShape, Op, Pass, PassError, TreeShape};

use crate::block;
use crate::builder::{Builder, Dims, NgramDims, Weight, WeightList};
use crate::config::Config;
use crate::decoder::Decoder;
use crate::mtp::MtpConfig;
use crate::speculator::SpeculatorConfig;

/// The passes of a target.
#[derive(Clone, Copy)]
pub struct Llama<'a> {
    pub config: &'a Config,
    pub dims: &'a Dims,
    pub speculator: Option<&'a SpeculatorConfig>,
}

impl<'a> Llama<'a> {
    pub fn new(config: &'a Config, dims: &'a Dims) -> Llama<'a> {
        Llama { config, dims, speculator: None }
    }

    /// Embeds and runs all layers for their keys and values: what a prompt needs but for its last token. The last layer
    /// ends with its cache rows, unless a speculator reads what follows.
    pub fn extend_pass(&self, rows: usize) -> Result<Pass, PassError> {
        let mut builder = self.builder("extend", rows);
        self.embed(&mut builder);
        for layer in 0..self.config.layers - 1 {
            self.layer(&mut builder, layer);
        }
        match self.speculator {
            Some(speculator) if speculator.reads_all_states() => {
                self.layer(&mut builder, self.config.layers - 1);
                let x = self.decoder().x(&mut builder);
                speculator.keep_states(&mut builder, x);
            }
            _ => self.decoder().keep(&mut builder, self.config.layers - 1),
        }
        self.inject(&mut builder);
        builder.finish()
    }

    /// Every row's logits.
    pub fn logits_pass(&self, rows: usize) -> Result<Pass, PassError> {
        let mut builder = self.builder("logits", rows);
        self.forward(&mut builder);
        builder.finish()
    }

    /// The target's draw at every row, the accepted path of every request, and its rows of the cache moved next to the prefix.
    pub fn verify_pass(&self, rows: usize) -> Result<Pass, PassError> {
        let mut builder = self.builder("verify", rows);
        self.verify(&mut builder);
        builder.finish()
    }

    /// The same under a grammar: each row draws one of the tokens that are allowed behind it.
    pub fn verify_masked_pass(&self, rows: usize) -> Result<Pass, PassError> {
        let mut builder = self.builder("verify under a grammar", rows);
        self.forward(&mut builder);
        builder.mask();
        self.accept(&mut builder);
        builder.finish()
    }

    /// The most likely continuations of every row: what a tree grows from.
    pub fn draft_pass(&self, rows: usize) -> Result<Pass, PassError> {
        let mut builder = self.builder("draft", rows);
        self.forward(&mut builder);
        builder.top_k();
        builder.finish()
    }

    /// Grows trees by the last level of their shape, from what a draft pass over the level above ranked. It reads no
    /// weights.
    pub fn grow_pass(&self, shape: TreeShape) -> Result<Pass, PassError> {
        let mut builder = self.builder("grow", self.dims.max_rows);
        builder.grow(shape);
        builder.finish()
    }

    /// A whole round that needs the host only to wait for it: verify the trees in the batch buffers, then draft
    /// those of the next round into them.
    pub fn round_pass(&self, rows: usize, drafter: NgramDims) -> Result<Pass, PassError> {
        let mut builder = self.builder("round", rows);
        self.verify(&mut builder);
        builder.draft_ngram(drafter);
        builder.finish()
    }

    /// The same with a speculator, whose own pass drafts: this one ends with the block that it fills.
    pub fn round_pass_with_block(&self, rows: usize, nodes: usize) -> Result<Pass, PassError> {
        let mut builder = self.builder("round", rows);
        self.verify(&mut builder);
        let speculator = self.speculator.expect("a drafter of blocks is loaded");
        block::open(&mut builder, speculator.block(), nodes);
        builder.finish()
    }

    /// Begins the blocks of the first round, or of any round of several sequences; they may be shortened ones.
    pub fn block_pass(&self, block: BlockShape, nodes: usize) -> Result<Pass, PassError> {
        let mut builder = self.builder("open a block", self.dims.max_rows);
        block::open(&mut builder, block, nodes);
        builder.finish()
    }

    /// With an MTP module: what it keeps of pairs of a state and the token behind it.
    pub fn keep_pass(&self, rows: usize) -> Result<Pass, PassError> {
        self.mtp().keep_pass(self, rows)
    }

    /// With an MTP module: the best tokens behind every pair, whose states are the target's (`is_first`) or its own.
    pub fn level_pass(&self, rows: usize, is_first: bool) -> Result<Pass, PassError> {
        self.mtp().level_pass(self, rows, is_first)
    }

    fn mtp(&self) -> &MtpConfig {
        match self.speculator {
            Some(SpeculatorConfig::Mtp(mtp)) => mtp,
            _ => panic!("no MTP module is loaded"),
        }
    }

    /// Drafts the first round's trees on the device.
    pub fn ngram_pass(&self, drafter: NgramDims) -> Result<Pass, PassError> {
        let mut builder = self.builder("draft n-grams", self.dims.max_rows);
        builder.draft_ngram(drafter);
        builder.finish()
    }

    pub(crate) fn builder(&self, name: &str, rows: usize) -> Builder<'a> {
        let mut weights = weights(self.config, self.dims.context);
        weights.extend(self.speculator.iter().flat_map(|speculator| speculator.weights(self.dims.context)));
        Builder::new(name, self.dims, rows, self.config.vocab_size, weights)
    }

    fn decoder(&self) -> Decoder<'a> {
        decoder(self.config)
    }

    /// From tokens to logits.
    fn forward(&self, builder: &mut Builder) {
        self.embed(builder);
        for layer in 0..self.config.layers {
            self.layer(builder, layer);
        }
        self.inject(builder);
        if let Some(speculator) = self.speculator {
            let x = self.decoder().x(builder);
            speculator.keep_states(builder, x);
        }
        self.head(builder);
    }

    fn verify(&self, builder: &mut Builder) {
        self.forward(builder);
        self.accept(builder);
    }

    /// From logits to the cache.
    fn accept(&self, builder: &mut Builder) {
        builder.draw_and_accept();
        self.commit(builder);
    }

    fn embed(&self, builder: &mut Builder) {
        let op = Op::Embed { batch: builder.batch, table: builder.weight("embed"), out: self.decoder().x(builder) };
        builder.push(op);
        self.tap(builder, 0);
    }

    fn layer(&self, builder: &mut Builder, layer: usize) {
        self.decoder().layer(builder, layer);
        self.tap(builder, layer + 1);
    }

    fn tap(&self, builder: &mut Builder, state: usize) {
        if let Some(speculator) = self.speculator {
            let x = self.decoder().x(builder);
            speculator.tap(builder, state, x);
        }
    }

    fn inject(&self, builder: &mut Builder) {
        if let Some(speculator) = self.speculator {
            speculator.inject(builder);
        }
    }

    fn head(&self, builder: &mut Builder) {
        let op = Op::Head {
            batch: builder.batch,
            eps: self.config.rms_eps,
            x: self.decoder().x(builder),
            norm: builder.weight("norm"),
            weight: builder.weight(head_buffer(self.config)),
            logits: builder.logits(),
        };
        builder.push(op);
    }

    fn commit(&self, builder: &mut Builder) {
        self.decoder().commit(builder);
        if let Some(speculator) = self.speculator {
            speculator.commit(builder);
        }
    }
}

fn decoder(config: &Config) -> Decoder<'_> {
    Decoder { config, prefix: "", first: 0 }
}

/// The head's weight: a tied head is the embedding table.
pub(crate) fn head_buffer(config: &Config) -> &'static str {
    if config.tied { "embed" } else { "head" }
}

/// All weight buffers, in the order of their use. A tied head is the embedding table and no buffer of its own.
pub fn weights(config: &Config, context: usize) -> Vec<Weight> {
    let Config { hidden, vocab_size, .. } = *config;
    let mut list = WeightList::new(config.weight_dtype);
    list.matrix("embed", hidden, vec![("model.embed_tokens.weight".into(), vocab_size)]);
    list.rope("rope", context, config.rotated());
    decoder(config).weights(&mut list, "model.");
    list.vector("norm", vec![("model.norm.weight".into(), hidden)]);
    if !config.tied {
        list.matrix("head", hidden, vec![("lm_head.weight".into(), vocab_size)]);
    }
    list.finish()
}

/// Bytes of weights that every pass with a head reads, and those of all experts, of which it reads what its rows chose.
pub fn streamed_bytes(config: &Config) -> [usize; 2] {
    let mut bytes = [0, 0];
    let is_looked_up = |name: &str| name == "embed" && !config.tied;
    for Weight { desc, .. } in weights(config, 1).iter().filter(|weight| !is_looked_up(&weight.desc.name)) {
        bytes[usize::from(desc.name.contains(".expert_"))] += desc.bytes();
    }
    bytes
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
            "q_lora_rank": if architecture == "DeepseekV2ForCausalLM" { None } else { Some(24) },
            "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24,
            "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
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
        let llama = Llama::new(config, &dims);
        vec![
            llama.extend_pass(16).unwrap(),
            llama.logits_pass(8).unwrap(),
            llama.verify_pass(8).unwrap(),
            llama.verify_masked_pass(8).unwrap(),
            llama.draft_pass(4).unwrap(),
            llama.grow_pass("2x2".parse().unwrap()).unwrap(),
            llama.round_pass(8, DRAFTER).unwrap(),
            llama.ngram_pass(DRAFTER).unwrap(),
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
  commit          accepted=accepted:u32[2, 513] k_cache=cache.k:bf16[1, 8, 2, 16, 8] v_cache=cache.v:bf16[1, 8, 2, 16, 8]
  10 ops, 0.0 MB of weights
";
        assert_eq!(Llama::new(&config, &dims()).verify_pass(8).unwrap().to_string(), golden);
    }

    #[test]
    fn latents_and_experts_print_as_they_are_computed() {
        let config = config("DeepseekV3ForCausalLM", false);
        let names = op_names(&Llama::new(&config, &dims()).verify_pass(8).unwrap());
        let attention = ["latent", "latent_queries", "per_head", "latent_attention", "per_head", "project"];
        let mlp = ["gate_up", "project"];
        let experts = ["route", "group_rows", "expert_gate_up", "gate_up", "project", "expert_down", "combine"];
        let layers = [&attention[..], &mlp, &attention, &experts].concat();
        assert_eq!(names, [&["embed"], &layers[..], &["head", "draw", "accept", "commit"]].concat());
    }

    #[test]
    fn an_extend_pass_ends_with_the_last_layer_s_cache_rows() {
        let pass = Llama::new(&config("LlamaForCausalLM", false), &dims()).extend_pass(16).unwrap();
        let layer = ["qkv", "tree_attention", "project", "gate_up", "project"];
        assert_eq!(op_names(&pass), [&["embed"], &layer[..], &["qkv"]].concat());
        assert!(matches!(pass.ops.last(), Some(Op::Qkv { layer: 1, .. })));
        assert!(pass.buffers.iter().all(|b| b.name != "layers.1.o" && b.name != "logits"), "{pass}");
    }

    #[test]
    fn a_grammar_stands_between_head_and_draw() {
        let config = config("Qwen2ForCausalLM", true);
        let mut names = op_names(&Llama::new(&config, &dims()).verify_pass(4).unwrap());
        names.insert(names.iter().position(|&name| name == "draw").unwrap(), "mask");
        assert_eq!(op_names(&Llama::new(&config, &dims()).verify_masked_pass(4).unwrap()), names);
    }

    #[test]
    fn a_round_pass_is_a_verify_pass_and_what_follows_it() {
        let config = config("LlamaForCausalLM", true);
        let verify = op_names(&Llama::new(&config, &dims()).verify_pass(4).unwrap());
        let round = Llama::new(&config, &dims()).round_pass(4, DRAFTER).unwrap();
        assert_eq!(op_names(&round), [&verify[..], &["draft_ngram"]].concat());
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
                let mut used = Llama::new(&config, &dims()).logits_pass(8).unwrap().buffers;
                used.retain(|buffer| buffer.role == Role::Weight);
                listed.sort_by(|a, b| a.name.cmp(&b.name));
                used.sort_by(|a, b| a.name.cmp(&b.name));
                assert_eq!(listed, used, "{architecture}, tied: {tied}");
            }
        }
    }

    #[test]
    fn experts_are_counted_apart() {
        let config = config("DeepseekV3ForCausalLM", false);
        let [dense, experts] = streamed_bytes(&config);
        // Eight of three matrices each, in one layer.
        assert_eq!(experts, 8 * 3 * 16 * 32 * 2);
        let dims = dims();
        let pass = Llama::new(&config, &dims).logits_pass(1).unwrap();
        let rope = pass.buffers.iter().find(|desc| desc.name == "rope").unwrap().bytes();
        assert_eq!(pass.weight_bytes() - rope, dense - 8 / 2 * 2 * 4 + experts * 2 / 8, "two of them for each row");
    }

    #[test]
    fn a_pass_too_large_for_its_buffers_is_refused() {
        let config = config("LlamaForCausalLM", true);
        let error = Llama::new(&config, &dims()).verify_pass(9).unwrap_err();
        assert_eq!((error.op, error.field), ("head", "logits"));
        assert!(Llama::new(&config, &dims()).extend_pass(17).unwrap_err().problem.contains("17 rows"));
        assert!(Llama::new(&config, &Dims { top_k: 0, ..dims() }).draft_pass(4).unwrap_err().problem.contains("k = 0"));
    }
}

//! DSpark drafters (PKU and DeepSeek, 2026): a few layers that draft a whole block in one parallel pass, and heads that
//! make a sequence of it. DFlash drafters are the same without the heads.
//!
//! The drafter reads the target: for every token that the target runs, the residual stream behind some of its layers
//! (the *taps*) is fused and projected to keys and values of all draft layers. These lie in a cache of the drafter's own,
//! in the very slots that the target's keys and values have, so that one page table and one commit serve both.
//!
//! ```text
//! in every pass of the target:
//!     fused += x · fc[tap]ᵀ                    project, behind each tapped layer
//!     draft cache = kv(fused)                  norm, projection, k norm, rope; for each draft layer
//!
//! the draft pass, over a block of rows [last committed token, MASK, MASK ..] that all see each other:
//!     draft.x = embed(rows)
//!     for each draft layer: decoder
//!     hidden = norm(draft.x)                   what the sequential heads read
//!     logits = head(draft.x), perturbed, and the best of each row
//! ```

mod config;
mod heads;

use treespark_kernel_gen::{BlockShape, Buf, DType, Op, Pass, PassError, Role};

pub use config::{DsparkConfig, MarkovKind};
pub use heads::{MarkovState, SequentialHeads, Step, sigmoid};

use crate::block::{self, Sequential};
use crate::builder::{Builder, Weight, WeightList};
use crate::cut::Cut;
use crate::decoder::Decoder;
use crate::llama::{Llama, head_buffer};

const PREFIX: &str = "draft.";
impl DsparkConfig {
    fn decoder(&self) -> Decoder<'_> {
        Decoder { config: &self.backbone, prefix: PREFIX, first: 0 }
    }

    /// The weight buffers that the passes read. The sequential heads are not among them.
    pub(crate) fn weights(&self, context: usize) -> Vec<Weight> {
        let (config, decoder) = (&self.backbone, self.decoder());
        let mut list = WeightList::new(config.weight_dtype);
        let [hidden, taps] = [config.hidden, self.taps.len()];
        for tap in 0..taps {
            let columns = Cut::Columns(tap * hidden..(tap + 1) * hidden);
            let part = ("fc.weight".to_string(), [hidden, taps * hidden], Some(columns));
            list.cut(decoder.buffer(&format!("fc.{tap}")), vec![part]);
        }
        list.vector(decoder.buffer("hidden_norm"), vec![("hidden_norm.weight".into(), hidden)]);
        list.rope(&decoder.buffer("rope"), context, config.head_dim);
        decoder.weights(&mut list, "");
        for layer in 0..config.layers {
            let projection = |letter: &str| (format!("layers.{layer}.self_attn.{letter}_proj.weight"), config.kv_dim());
            list.matrix(decoder.layer_buffer(layer, "kv"), hidden, vec![projection("k"), projection("v")]);
        }
        list.vector(decoder.buffer("norm"), vec![("norm.weight".into(), hidden)]);
        if self.has_embedding {
            list.matrix(decoder.buffer("embed"), hidden, vec![("embed_tokens.weight".into(), config.vocab_size)]);
        }
        if self.has_head {
            list.matrix(decoder.buffer("head"), hidden, vec![("lm_head.weight".into(), config.vocab_size)]);
        }
        if let Some((_, rank)) = self.markov.filter(|_| self.heads_on_device) {
            for name in ["markov_w1", "markov_w2"] {
                let tensor = format!("markov_head.{name}.weight");
                list.matrix(decoder.buffer(name), rank, vec![(tensor, config.vocab_size)]);
            }
        }
        list.finish()
    }

    /// Where the target's residual stream `x` is hidden state `state`: 0 behind the embedding, l + 1 behind layer l.
    pub(crate) fn tap(&self, builder: &mut Builder, state: usize, x: Buf) {
        let Some(tap) = self.taps.iter().position(|&tapped| tapped == state) else { return };
        let weight = builder.weight(&self.decoder().buffer(&format!("fc.{tap}")));
        let residual = self.fused(builder);
        builder.push(Op::Project { batch: builder.batch, add: tap > 0, x, weight, residual });
    }

    /// Behind the last tap: keys and values of the pass's rows for every draft layer.
    pub(crate) fn inject(&self, builder: &mut Builder) {
        let (config, decoder) = (&self.backbone, self.decoder());
        let [k_cache, v_cache] = decoder.cache(builder);
        for layer in 0..config.layers {
            let op = Op::Qkv {
                batch: builder.batch,
                layer,
                heads: 0,
                kv_heads: config.kv_heads,
                eps: config.rms_eps,
                x: self.fused(builder),
                norm: builder.weight(&decoder.buffer("hidden_norm")),
                weight: decoder.layer_weight(builder, layer, "kv"),
                bias: None,
                q_norm: None,
                k_norm: builder.optional_weight(&decoder.layer_buffer(layer, "k_norm")),
                rope: builder.weight(&decoder.buffer("rope")),
                q: decoder.heads_of_rows(builder, "q"),
                k_cache,
                v_cache,
            };
            builder.push(op);
        }
    }

    pub(crate) fn commit(&self, builder: &mut Builder) {
        self.decoder().commit(builder);
    }

    /// The parallel stage, over the rows of up to `blocks` blocks: `draft.hidden`, and of each row the `candidates` best
    /// tokens, `draft.ids` with `draft.scores`. With `costs` of a pass of 1, 2, .. rows, as many as a tree may have nodes, the
    /// device also grows the next round's trees.
    pub fn draft_pass(
        &self,
        target: &Llama,
        block: BlockShape,
        blocks: usize,
        candidates: usize,
        costs: Option<&[f32]>,
    ) -> Result<Pass, PassError> {
        let (config, decoder) = (&self.backbone, self.decoder());
        let mut b = target.builder("draft a block", blocks * block.rows);
        let (batch, x, eps) = (b.batch, decoder.x(&mut b), config.rms_eps);
        let table = b.weight(if self.has_embedding { "draft.embed" } else { "embed" });
        b.push(Op::Embed { batch, table, out: x });
        for layer in 0..config.layers {
            decoder.layer(&mut b, layer);
        }
        let norm = b.weight(&decoder.buffer("norm"));
        let shape = [b.dims.max_rows, config.hidden];
        let hidden = b.pass.add(decoder.buffer("hidden"), Role::Output, DType::F32, &shape);
        b.push(Op::Norm { batch, eps, x, norm, out: hidden });
        let weight = b.weight(if self.has_head { "draft.head" } else { head_buffer(target.config) });
        let logits = b.logits();
        b.push(Op::Head { batch, eps, x, norm, weight, logits });
        // Where a row predicts the token of its own position, its noise would be that of the next.
        let ranked = block::rank(&mut b, candidates, self.first == 0);
        if let Some(costs) = costs {
            let markov = ["markov_w1", "markov_w2"].map(|name| b.optional_weight(&decoder.buffer(name)));
            let rank = self.markov.map_or(0, |(_, rank)| rank);
            let confidence = self.confidence.map(|_| config.hidden + rank + 1 + 2 * self.depth());
            let heads = Sequential { hidden, markov: markov[0].zip(markov[1]), confidence };
            block::grow(&mut b, [block, self.block_shape()], ranked, heads, costs);
        }
        b.finish()
    }

    fn fused(&self, builder: &mut Builder) -> Buf {
        builder.scratch(&self.decoder().buffer("fused"), &[self.backbone.hidden])
    }
}

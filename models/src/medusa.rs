//! Medusa heads (Cai et al., 2024): each guesses a token further on from the target's last hidden state alone.
//!
//! ```text
//! in every pass of the target that draws:
//!     states = norm(x)                         of all rows: which is the last accepted one is known later
//!
//! the draft pass, a row for each head, all reading the state behind which the target drew the last token:
//!     out = s + silu(weight · s + bias)        res_block
//!     logits = head(out), perturbed, and the best of each row
//! ```
//!
//! The checkpoint holds `{i}.0.linear.weight` and `.bias` of each head i, with or without `medusa_head.` in front, and
//! perhaps `{i}.1.weight`, a matrix of its own; without it the target's head is used.

use serde_json::Value;
use treespark_kernel_gen::{BlockShape, Buf, DType, Fill, Op, Pass, PassError, Role};

use crate::block::{self, Sequential};
use crate::builder::{Builder, Weight, WeightList};
use crate::error::{Error, Result};
use crate::llama::{Llama, head_buffer};
use crate::{Checkpoint, Config};

#[derive(Debug, Clone, PartialEq)]
pub struct MedusaConfig {
    pub heads: usize,
    hidden: usize,
    vocab: usize,
    /// Of the target's last norm.
    eps: f32,
    weight_dtype: DType,
    /// What stands before the number of a head in its tensors' names.
    tensors: &'static str,
    /// The heads have matrices of their own.
    has_matrices: bool,
}

impl MedusaConfig {
    /// Heads for a target, with matrices of their own or with its head.
    pub fn of_target(target: &Config, heads: usize, has_matrices: bool) -> MedusaConfig {
        MedusaConfig {
            heads,
            hidden: target.hidden,
            vocab: target.vocab_size,
            eps: target.rms_eps,
            weight_dtype: target.weight_dtype,
            tensors: "",
            has_matrices,
        }
    }

    pub fn is_described_by(json: &Value) -> bool {
        json["medusa_num_heads"].is_u64()
    }

    pub(crate) fn from_checkpoint(checkpoint: &Checkpoint, target: &Config) -> Result<MedusaConfig> {
        let path = checkpoint.path().to_path_buf();
        let malformed = |problem| Error::Malformed { path: path.clone(), problem };
        let number = |key: &str| checkpoint.config()[key].as_u64().map(|n| n as usize);
        let heads = number("medusa_num_heads").filter(|heads| (1..=16).contains(heads));
        let Some(heads) = heads else {
            return Err(malformed(format!(
                "config: medusa_num_heads is {}, expected 1 to 16",
                checkpoint.config()["medusa_num_heads"]
            )));
        };
        if number("medusa_num_layers").unwrap_or(1) != 1 {
            return Err(malformed("config: medusa_num_layers is not 1, which is not supported".to_string()));
        }
        let tensors = if checkpoint.has("0.0.linear.weight") { "" } else { "medusa_head." };
        let first = format!("{tensors}0.0.linear.weight");
        let mismatch = |what: &str, drafter: usize, target: usize| Error::Mismatch {
            path: path.clone(),
            what: what.to_string(),
            drafter: drafter.to_string(),
            target: target.to_string(),
        };
        match checkpoint.shape(&first) {
            Some(&[_, hidden]) if hidden != target.hidden => {
                return Err(mismatch("hidden size", hidden, target.hidden));
            }
            Some(_) => {}
            None => {
                let context = format!("the drafter as configured in {} needs it", path.display());
                return Err(Error::MissingTensor { name: first, context });
            }
        }
        let matrix = format!("{tensors}0.1.weight");
        if let Some(&[vocab, _]) = checkpoint.shape(&matrix)
            && vocab != target.vocab_size
        {
            return Err(mismatch("vocabulary", vocab, target.vocab_size));
        }
        let config = MedusaConfig::of_target(target, heads, checkpoint.has(&matrix));
        Ok(MedusaConfig { weight_dtype: checkpoint.dtype(), tensors, ..config })
    }

    pub fn block_shape(&self) -> BlockShape {
        BlockShape { rows: self.heads, first: 0, fill: Fill::State }
    }

    /// Whether devices that draft can run the heads: one matrix must serve all rows.
    pub fn fits_devices(&self) -> bool {
        !self.has_matrices
    }

    pub(crate) fn weights(&self) -> Vec<Weight> {
        let mut list = WeightList::new(self.weight_dtype);
        let tensors =
            |kind: &str| (0..self.heads).map(|i| (format!("{}{i}.{kind}", self.tensors), self.hidden)).collect();
        list.matrix("draft.blocks", self.hidden, tensors("0.linear.weight"));
        list.vector("draft.block_bias", tensors("0.linear.bias"));
        for head in (0..self.heads).filter(|_| self.has_matrices) {
            let tensor = (format!("{}{head}.1.weight", self.tensors), self.vocab);
            list.matrix(format!("draft.head.{head}"), self.hidden, vec![tensor]);
        }
        list.finish()
    }

    /// Behind the last layer of the target, where its residual stream is `x`.
    pub(crate) fn keep_states(&self, b: &mut Builder, x: Buf) {
        let (batch, norm, out) = (b.batch, b.weight("norm"), self.states(b));
        b.push(Op::Norm { batch, eps: self.eps, x, norm, out });
    }

    /// `draft.ids` and `draft.scores` of a row for each head, of up to `blocks` blocks. Heads with matrices of their own rank
    /// all rows each, and leave `draft.ids.{i}` and `draft.scores.{i}`, of which row i of every block counts.
    pub(crate) fn draft_pass(
        &self,
        target: &Llama,
        block: BlockShape,
        blocks: usize,
        candidates: usize,
        costs: Option<&[f32]>,
    ) -> Result<Pass, PassError> {
        let mut b = target.builder("draft with heads", blocks * block.rows);
        let (batch, states, out) = (b.batch, self.states(&mut b), b.scratch("draft.x", &[self.hidden]));
        let (weight, bias) = (b.weight("draft.blocks"), b.weight("draft.block_bias"));
        b.push(Op::ResBlock { batch, states, weight, bias, out });
        let residual = b.logits();
        if self.has_matrices {
            for head in 0..block.rows {
                let weight = b.weight(&format!("draft.head.{head}"));
                b.push(Op::Project { batch, add: false, x: out, weight, residual });
                block::rank_as(&mut b, &format!(".{head}"), candidates, true);
            }
            return b.finish();
        }
        let weight = b.weight(head_buffer(target.config));
        b.push(Op::Project { batch, add: false, x: out, weight, residual });
        let ranked = block::rank(&mut b, candidates, true);
        if let Some(costs) = costs {
            let heads = Sequential { hidden: states, markov: None, confidence: None };
            block::grow(&mut b, [block, self.block_shape()], ranked, heads, costs);
        }
        b.finish()
    }

    fn states(&self, b: &mut Builder) -> Buf {
        b.pass.add("draft.states", Role::Output, DType::F32, &[b.dims.max_rows, self.hidden])
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;
    use treespark_kernel_gen::{MAX_NODES, TreeSpec};

    use super::*;
    use crate::{Dims, SpeculatorConfig};

    fn target() -> Config {
        let json = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        });
        Config::from_json(&json, DType::BF16, Path::new("config.json")).unwrap()
    }

    #[test]
    fn a_draft_pass_fills_blocks_of_several_requests() {
        let dims = Dims {
            max_rows: 64,
            head_rows: 20,
            max_requests: 8,
            context: 64,
            page_size: 16,
            pages: 8,
            pages_per_request: 4,
            top_k: 4,
            cache_dtype: DType::BF16,
            tree: TreeSpec::Any(MAX_NODES),
        };
        let config = target();
        for has_matrices in [false, true] {
            let speculator = SpeculatorConfig::Medusa(MedusaConfig::of_target(&config, 5, has_matrices));
            let llama = Llama { config: &config, dims: &dims, speculator: Some(&speculator) };
            for blocks in [1, 3, 4] {
                let pass = speculator.draft_pass(&llama, speculator.block(), blocks, 16, None).unwrap();
                assert_eq!(pass.rows, 5 * blocks);
            }
            // The logits hold 20 rows, whichever op comes to write them.
            let refused = speculator.draft_pass(&llama, speculator.block(), 5, 16, None).unwrap_err();
            assert!(["logits", "residual"].contains(&refused.field), "{refused}");
        }
        let speculator = SpeculatorConfig::Medusa(MedusaConfig::of_target(&config, 5, false));
        let llama = Llama { config: &config, dims: &dims, speculator: Some(&speculator) };
        let pass = speculator.draft_pass(&llama, speculator.block(), 4, 16, Some(&[1.0; 64])).unwrap();
        // Trees of all requests have more nodes than the batch has rows: which of them get one, the host says.
        assert_eq!(pass.ops.last().map(Op::name), Some("grow_trellis"));
        llama.round_pass_with_block(16, 64).unwrap();
    }
}

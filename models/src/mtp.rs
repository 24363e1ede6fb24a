//! Multi-token prediction (DeepSeek-V3, 2024): a layer behind the target's last that guesses one token further, from the
//! target's hidden state at a position and the token that follows it. Its own output stands in for the target's state where
//! there is none yet, so that it drafts a chain, or level by level a tree.
//!
//! ```text
//! in every pass of the target:
//!     states = norm(x)                         of all rows
//!
//! for every token that was accepted (`keep_pass`), in a cache of its own, at the slot of the position before it:
//!     x = norm(embed(token)) · Wₑᵀ + norm(states[source]) · Wₛᵀ
//!     cache = latent(x)                        or keys and values
//!
//! for every node of a level (`level_pass`), the same and behind it:
//!     x = layer(x)
//!     guesses = norm(x)                        what the next level reads as states
//!     logits = head(guesses), and the best of each row
//! ```
//!
//! A row of the module stands for a pair: the state at position p, and token p + 1. It lies at slot p, so that what was accepted
//! in a pass needs nothing of another. (A page that is shared may so hold a last pair with another's token: one guess in many.)

use treespark_kernel_gen::{BlockShape, Buf, DType, Fill, Op, Pass, PassError, Role};

use crate::builder::{Builder, Weight, WeightList};
use crate::config::{Config, Experts};
use crate::cut::Cut;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::llama::{Llama, head_buffer};

const PREFIX: &str = "mtp.";

#[derive(Debug, Clone, PartialEq)]
pub struct MtpConfig {
    /// One layer, like the target's last.
    layer: Config,
    /// Which layer of the checkpoint it is.
    at: usize,
}

impl MtpConfig {
    /// The first module of a target's checkpoint.
    pub fn of_target(target: &Config) -> Result<MtpConfig> {
        if target.next_token_layers == 0 {
            let problem = format!("{} as configured has no MTP module (num_nextn_predict_layers)", target.architecture);
            return Err(Error::Drafter(problem));
        }
        let experts = target.experts.clone().map(|experts| Experts { first_layer: 0, ..experts });
        Ok(MtpConfig { layer: Config { layers: 1, experts, ..target.clone() }, at: target.layers })
    }

    /// It drafts token by token.
    pub fn block_shape(&self) -> BlockShape {
        BlockShape { rows: 1, first: 0, fill: Fill::State }
    }

    /// The layer that it is, as the one layer of a model.
    pub fn layer(&self) -> &Config {
        &self.layer
    }

    fn decoder(&self) -> Decoder<'_> {
        Decoder { config: &self.layer, prefix: PREFIX, first: self.at }
    }

    pub(crate) fn weights(&self, context: usize) -> Vec<Weight> {
        let (hidden, decoder) = (self.layer.hidden, self.decoder());
        let theirs = |name: &str| format!("model.layers.{}.{name}.weight", self.at);
        let mut list = WeightList::new(self.layer.weight_dtype);
        for (ours, name) in [("enorm", "enorm"), ("hnorm", "hnorm"), ("norm", "shared_head.norm")] {
            list.vector(decoder.buffer(ours), vec![(theirs(name), hidden)]);
        }
        for (ours, columns) in [("of_token", 0..hidden), ("of_state", hidden..2 * hidden)] {
            let part = (theirs("eh_proj"), [hidden, 2 * hidden], Some(Cut::Columns(columns)));
            list.cut(decoder.buffer(ours), vec![part]);
        }
        list.rope(&decoder.buffer("rope"), context, self.layer.rotated());
        decoder.weights(&mut list, "model.");
        list.finish()
    }

    /// Behind the last layer of the target, where its residual stream is `x`.
    pub(crate) fn keep_states(&self, b: &mut Builder, x: Buf) {
        let (batch, norm, out) = (b.batch, b.weight("norm"), self.states(b, "states"));
        b.push(Op::Norm { batch, eps: self.layer.rms_eps, x, norm, out });
    }

    /// What the cache keeps of pairs whose states the target's last pass left.
    pub(crate) fn keep_pass(&self, target: &Llama, rows: usize) -> Result<Pass, PassError> {
        let mut b = target.builder("keep pairs", rows);
        self.pairs(&mut b, "states");
        self.decoder().keep(&mut b, 0);
        b.finish()
    }

    /// `top_ids`: the best tokens behind every pair. States are those of the target's last pass, or of this one's.
    pub(crate) fn level_pass(&self, target: &Llama, rows: usize, is_first: bool) -> Result<Pass, PassError> {
        let mut b = target.builder("guess", rows);
        self.pairs(&mut b, if is_first { "states" } else { "guesses" });
        let (decoder, batch) = (self.decoder(), b.batch);
        decoder.layer(&mut b, 0);
        let (x, norm, out) = (decoder.x(&mut b), b.weight(&decoder.buffer("norm")), self.states(&mut b, "guesses"));
        b.push(Op::Norm { batch, eps: self.layer.rms_eps, x, norm, out });
        let (weight, residual) = (b.weight(head_buffer(target.config)), b.logits());
        b.push(Op::Project { batch, add: false, x: out, weight, residual });
        b.top_k();
        b.finish()
    }

    /// The layer's input: of the rows' tokens, and of the states that `sources` names.
    fn pairs(&self, b: &mut Builder, states: &str) {
        let (batch, eps, hidden, decoder) = (b.batch, self.layer.rms_eps, self.layer.hidden, self.decoder());
        let x = decoder.x(b);
        let [token, state, normed] =
            ["token", "state", "normed"].map(|name| b.scratch(&decoder.buffer(name), &[hidden]));
        let [enorm, hnorm, of_token, of_state] =
            ["enorm", "hnorm", "of_token", "of_state"].map(|name| b.weight(&decoder.buffer(name)));
        let sources = b.pass.add(decoder.buffer("sources"), Role::Input, DType::U32, &[b.dims.max_rows]);
        let (table, states) = (b.weight("embed"), self.states(b, states));
        b.push(Op::Embed { batch, table, out: token });
        b.push(Op::Norm { batch, eps, x: token, norm: enorm, out: normed });
        b.push(Op::Project { batch, add: false, x: normed, weight: of_token, residual: x });
        b.push(Op::Gather { batch, states, sources, out: state });
        b.push(Op::Norm { batch, eps, x: state, norm: hnorm, out: normed });
        b.push(Op::Project { batch, add: true, x: normed, weight: of_state, residual: x });
    }

    fn states(&self, b: &mut Builder, name: &str) -> Buf {
        let shape = [b.dims.max_rows, self.layer.hidden];
        b.pass.add(self.decoder().buffer(name), Role::Output, DType::F32, &shape)
    }
}

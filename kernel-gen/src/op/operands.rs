//! What all ops can be asked: their names, batches and buffers.

use super::{Batch, Op};
use crate::pass::Buf;

impl Op {
    /// The op's name, as printed and as the kernel's file stem.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::Qkv { .. } => "qkv",
            Op::TreeAttention { .. } => "tree_attention",
            Op::Project { .. } => "project",
            Op::GateUp { .. } => "gate_up",
            Op::Latent { .. } => "latent",
            Op::LatentQueries { .. } => "latent_queries",
            Op::PerHead { .. } => "per_head",
            Op::LatentAttention { .. } => "latent_attention",
            Op::Route { .. } => "route",
            Op::GroupRows { .. } => "group_rows",
            Op::ExpertGateUp { .. } => "expert_gate_up",
            Op::ExpertDown { .. } => "expert_down",
            Op::Combine { .. } => "combine",
            Op::ResBlock { .. } => "res_block",
            Op::Norm { .. } => "rms_norm",
            Op::Gather { .. } => "gather",
            Op::Head { .. } => "head",
            Op::Mask { .. } => "mask",
            Op::Draw { .. } => "draw",
            Op::Perturb { .. } => "perturb",
            Op::TopK { .. } => "top_k",
            Op::Accept { .. } => "accept",
            Op::Commit { .. } => "commit",
            Op::DraftNgram { .. } => "draft_ngram",
            Op::Grow { .. } => "grow",
            Op::OpenBlock { .. } => "open_block",
            Op::Trellis { .. } => "trellis",
            Op::GrowTrellis { .. } => "grow_trellis",
        }
    }

    pub fn batch(&self) -> &Batch {
        match self {
            Op::Embed { batch, .. }
            | Op::Qkv { batch, .. }
            | Op::TreeAttention { batch, .. }
            | Op::Project { batch, .. }
            | Op::GateUp { batch, .. }
            | Op::Latent { batch, .. }
            | Op::LatentQueries { batch, .. }
            | Op::PerHead { batch, .. }
            | Op::LatentAttention { batch, .. }
            | Op::Route { batch, .. }
            | Op::GroupRows { batch, .. }
            | Op::ExpertGateUp { batch, .. }
            | Op::ExpertDown { batch, .. }
            | Op::Combine { batch, .. }
            | Op::ResBlock { batch, .. }
            | Op::Norm { batch, .. }
            | Op::Gather { batch, .. }
            | Op::Head { batch, .. }
            | Op::Mask { batch, .. }
            | Op::Draw { batch, .. }
            | Op::Perturb { batch, .. }
            | Op::TopK { batch, .. }
            | Op::Accept { batch, .. }
            | Op::Commit { batch, .. }
            | Op::DraftNgram { batch, .. }
            | Op::Grow { batch, .. }
            | Op::OpenBlock { batch, .. }
            | Op::Trellis { batch, .. }
            | Op::GrowTrellis { batch, .. } => batch,
        }
    }

    /// Whether it makes up the batch of the next pass, which some backends leave to the host.
    pub fn drafts(&self) -> bool {
        matches!(
            self,
            Op::DraftNgram { .. }
                | Op::Grow { .. }
                | Op::OpenBlock { .. }
                | Op::Trellis { .. }
                | Op::GrowTrellis { .. }
        )
    }

    /// The buffers the op names, with the name of the field, in field order (batch first).
    pub fn operands(&self) -> Vec<(&'static str, Buf)> {
        let batch = self.batch();
        let mut list = vec![("rows", batch.rows), ("requests", batch.requests), ("pages", batch.pages)];
        match *self {
            Op::Embed { table, out, .. } => list.extend([("table", table), ("out", out)]),
            Op::Qkv { x, norm, weight, bias, q_norm, k_norm, rope, q, k_cache, v_cache, .. } => {
                list.extend([("x", x), ("norm", norm), ("weight", weight)]);
                list.extend(bias.map(|b| ("bias", b)));
                list.extend(q_norm.map(|b| ("q_norm", b)));
                list.extend(k_norm.map(|b| ("k_norm", b)));
                list.extend([("rope", rope), ("q", q), ("k_cache", k_cache), ("v_cache", v_cache)]);
            }
            Op::TreeAttention { q, k_cache, v_cache, out, .. } => {
                list.extend([("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("out", out)]);
            }
            Op::Project { x, weight, residual, .. } => {
                list.extend([("x", x), ("weight", weight), ("residual", residual)]);
            }
            Op::GateUp { x, norm, weight, out, .. } => {
                list.extend([("x", x), ("norm", norm), ("weight", weight), ("out", out)]);
            }
            Op::Latent { x, norm, weight, latent_norm, rope, compressed, cache, .. } => {
                list.extend([
                    ("x", x),
                    ("norm", norm),
                    ("weight", weight),
                    ("latent_norm", latent_norm),
                    ("rope", rope),
                ]);
                list.extend(compressed.map(|b| ("compressed", b)));
                list.push(("cache", cache));
            }
            Op::LatentQueries { x, norm, weight, rope, nope, q, .. } => {
                list.extend([("x", x), ("norm", norm), ("weight", weight), ("rope", rope), ("nope", nope), ("q", q)]);
            }
            Op::PerHead { x, weight, out, .. } => list.extend([("x", x), ("weight", weight), ("out", out)]),
            Op::LatentAttention { q, cache, out, .. } => list.extend([("q", q), ("cache", cache), ("out", out)]),
            Op::Route { x, norm, weight, bias, experts, weights, .. } => {
                list.extend([("x", x), ("norm", norm), ("weight", weight)]);
                list.extend(bias.map(|b| ("bias", b)));
                list.extend([("experts", experts), ("weights", weights)]);
            }
            Op::GroupRows { experts, groups, .. } => list.extend([("experts", experts), ("groups", groups)]),
            Op::ExpertGateUp { x, norm, weight, groups, out, .. } => {
                list.extend([("x", x), ("norm", norm), ("weight", weight), ("groups", groups), ("out", out)]);
            }
            Op::ExpertDown { x, weight, groups, out, .. } => {
                list.extend([("x", x), ("weight", weight), ("groups", groups), ("out", out)]);
            }
            Op::Combine { x, weights, residual, .. } => {
                list.extend([("x", x), ("weights", weights), ("residual", residual)]);
            }
            Op::ResBlock { states, weight, bias, out, .. } => {
                list.extend([("states", states), ("weight", weight), ("bias", bias), ("out", out)]);
            }
            Op::Norm { x, norm, out, .. } => list.extend([("x", x), ("norm", norm), ("out", out)]),
            Op::Gather { states, sources, out, .. } => {
                list.extend([("states", states), ("sources", sources), ("out", out)]);
            }
            Op::Head { x, norm, weight, logits, .. } => {
                list.extend([("x", x), ("norm", norm), ("weight", weight), ("logits", logits)]);
            }
            Op::Mask { allowed, logits, .. } => list.extend([("allowed", allowed), ("logits", logits)]),
            Op::Draw { seen, logits, draws, .. } => {
                list.extend([("seen", seen), ("logits", logits), ("draws", draws)]);
            }
            Op::Perturb { logits, .. } => list.push(("logits", logits)),
            Op::TopK { logits, ids, values, .. } => {
                list.extend([("logits", logits), ("ids", ids), ("values", values)]);
            }
            Op::Accept { draws, accepted, .. } => list.extend([("draws", draws), ("accepted", accepted)]),
            Op::Commit { accepted, k_cache, v_cache, .. } => {
                list.extend([("accepted", accepted), ("k_cache", k_cache)]);
                list.extend(v_cache.map(|b| ("v_cache", b)));
            }
            Op::DraftNgram { accepted, history, state, .. } => {
                list.extend([("accepted", accepted), ("history", history), ("state", state)]);
            }
            Op::Grow { ids, tokens, .. } => list.extend([("ids", ids), ("tokens", tokens)]),
            Op::OpenBlock { accepted, state, .. } => list.extend([("accepted", accepted), ("state", state)]),
            Op::Trellis { ids, scores, hidden, markov, confidence, trellis, order, .. } => {
                list.extend([("ids", ids), ("scores", scores), ("hidden", hidden)]);
                list.extend(markov.into_iter().flat_map(|(w1, w2)| [("w1", w1), ("w2", w2)]));
                list.extend(confidence.map(|buf| ("confidence", buf)));
                list.extend([("trellis", trellis), ("order", order)]);
            }
            Op::GrowTrellis { ids, trellis, order, state, .. } => {
                list.extend([("ids", ids), ("trellis", trellis), ("order", order), ("state", state)]);
            }
        }
        list
    }
}

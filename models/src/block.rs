//! What drafters that fill a block have in common (DSpark, DFlash, Medusa): the rows of a block, one for each depth, are
//! ranked; and where the device drafts, they become a trellis, and a tree is grown through it.
//!
//! Buffers: `draft.ids` and `draft.scores`, the best candidates of each row; `draft.state`, what the device reports of a
//! round.

use treespark_kernel_gen::layout::report_words;
use treespark_kernel_gen::{BlockShape, Buf, DType, Op, Role};

use crate::builder::Builder;

/// What a device that drafts reports to the host.
pub const STATE: &str = "draft.state";
/// The numbers of a confidence head on a device: [`SequentialHeads::confidence_numbers`](crate::SequentialHeads).
pub const CONFIDENCE: &str = "draft.confidence";

/// Candidates of each row.
#[derive(Clone, Copy)]
pub(crate) struct Ranked {
    pub ids: Buf,
    pub scores: Buf,
}

/// What makes a trellis of candidates that stand by themselves.
pub(crate) struct Sequential {
    /// What the confidence head reads.
    pub hidden: Buf,
    pub markov: Option<(Buf, Buf)>,
    /// Numbers of the confidence head.
    pub confidence: Option<usize>,
}

/// The `candidates` best tokens of each row's logits, perturbed first where a row's noise is that of the token it predicts.
pub(crate) fn rank(b: &mut Builder, candidates: usize, perturb: bool) -> Ranked {
    rank_as(b, "", candidates, perturb)
}

/// The same, in buffers whose names end so.
pub(crate) fn rank_as(b: &mut Builder, end: &str, candidates: usize, perturb: bool) -> Ranked {
    let (batch, logits, rows) = (b.batch, b.logits(), b.dims.max_rows);
    if perturb {
        b.push(Op::Perturb { batch, logits });
    }
    let ids = b.pass.add(format!("draft.ids{end}"), Role::Output, DType::U32, &[rows, candidates]);
    let scores = b.pass.add(format!("draft.scores{end}"), Role::Output, DType::F32, &[rows, candidates]);
    b.push(Op::TopK { batch, logits, ids, values: scores });
    Ranked { ids, scores }
}

/// Trees on the device, from a block that may be a shortened one of the drafter's. `costs` are those of a pass of 1, 2, .. rows,
/// as many as a tree may have nodes.
pub(crate) fn grow(
    b: &mut Builder,
    [block, longest]: [BlockShape; 2],
    ranked: Ranked,
    heads: Sequential,
    costs: &[f32],
) {
    let (batch, Ranked { ids, scores }) = (b.batch, ranked);
    let Sequential { hidden, markov, confidence } = heads;
    let candidates = b.pass.buffer(ids).shape[1];
    let confidence = confidence.map(|numbers| b.pass.add(CONFIDENCE, Role::Input, DType::F32, &[numbers]));
    let shape = [b.dims.max_requests * longest.depth(), candidates, candidates];
    let trellis = b.pass.add("draft.trellis", Role::Scratch, DType::F32, &shape);
    let order = b.pass.add("draft.order", Role::Scratch, DType::U32, &shape);
    let state = state(b, costs.len());
    b.push(Op::Trellis { batch, block, ids, scores, hidden, markov, confidence, trellis, order });
    let least = least_survival(b.pass.rows / block.rows);
    b.push(Op::GrowTrellis { batch, block, ids, trellis, order, state, costs: costs.to_vec(), least });
}

/// Of the nodes of many requests only the likely ones pay, and the host looks at all that it is told of.
fn least_survival(blocks: usize) -> f32 {
    match blocks {
        ..=8 => 0.02,
        9..=32 => 0.05,
        _ => 0.15,
    }
}

/// Behind a round of trees of up to so many nodes: the rows become those of the next block.
pub(crate) fn open(b: &mut Builder, block: BlockShape, nodes: usize) {
    let (batch, accepted, state) = (b.batch, b.accepted(), state(b, nodes));
    b.push(Op::OpenBlock { batch, accepted, state, block });
}

fn state(b: &mut Builder, nodes: usize) -> Buf {
    b.pass.add(STATE, Role::Output, DType::U32, &[b.dims.max_requests, report_words(nodes)])
}

//! Drafting on the device, so that draft, verify, accept and commit are one graph. No op yet stands for these kernels:
//! whoever records a round adds their launches to those of its passes.

use super::{Argument, Launch};
use crate::TreeShape;
use crate::pass::{Buf, Pass};
use crate::spec::KernelSpec;

/// Words of one request's state in [`Ngram::state`], all zero for a request that is finished or new; but for the first,
/// the number of tokens that its history may have.
pub const fn ngram_state_words(nodes: usize) -> usize {
    2 + 2 * 12 + 2 * nodes
}

/// The n-gram drafter: observes the last round, proposes the trees of the next. `shaders/cuda/draft_ngram.cu` says how the
/// buffers go together.
#[derive(Debug, Clone, PartialEq)]
pub struct Ngram {
    pub rows: Buf,
    pub requests: Buf,
    /// U32 `[B, accepted_words(MAX_NODES)]` of the last round
    pub accepted: Buf,
    /// U32 `[B, tokens]`
    pub history: Buf,
    /// U32 `[B, ngram_state_words(nodes)]`
    pub state: Buf,
    /// Slots that a request has in the cache.
    pub slots: usize,
    /// Cost of a further row of the pass, relative to a pass of one.
    pub row_cost: f32,
}

impl Ngram {
    /// Nodes of a request's tree, root included, in a pass of so many rows for so many requests.
    pub const fn nodes(rows: usize, requests: usize) -> usize {
        let share = rows / requests;
        if share < 64 { share } else { 64 }
    }

    pub fn launch(&self, pass: &Pass) -> Launch {
        const DEPTH: usize = 16;
        let &[requests, history] = pass.buffer(self.history).shape.as_slice() else {
            panic!("history has two dimensions")
        };
        let nodes = Ngram::nodes(pass.rows, requests);
        assert!(history.is_multiple_of(4), "a history of {history} tokens is not read four by four");
        assert_eq!(pass.buffer(self.state).shape, [requests, ngram_state_words(nodes)]);
        let spec = KernelSpec::new("draft_ngram")
            .size("HISTORY", "t", history)
            .size("NODES", "n", nodes)
            .size("DEPTH", "d", DEPTH)
            .with("SLOTS", self.slots)
            .with("ROW_COST", self.row_cost);
        let operands = [self.rows, self.requests, self.accepted, self.history, self.state];
        launch(spec, operands.map(Argument::from).to_vec(), 1, 1024)
    }
}

/// One level of a draft model's growth; see `shaders/cuda/grow.cu`.
#[derive(Debug, Clone, PartialEq)]
pub struct Grow {
    /// U32 `[rows of the draft's pass, k]`
    pub ids: Buf,
    /// The target's batch.
    pub requests: Buf,
    pub rows: Buf,
    /// The draft's batch.
    pub draft_requests: Buf,
    pub draft_rows: Buf,
}

impl Grow {
    /// The launch after the draft has run the nodes of `depth`. Panics if there is none deeper, or if the shape's nodes are
    /// not in order of depth.
    pub fn launch(&self, pass: &Pass, shape: &TreeShape, depth: usize, requests: usize) -> Launch {
        let depths = shape.depths();
        assert!(depths.is_sorted(), "the nodes of {shape} do not come level by level");
        let begin_of = |depth: usize| depths.partition_point(|&d| d < depth);
        let [first, begin, end] = [depth, depth + 1, depth + 2].map(begin_of);
        assert!(begin < end, "{shape} has no nodes below depth {depth}");
        let spec = KernelSpec::new("grow")
            .parents(shape, begin..end)
            .size("BEGIN", "from", begin)
            .size("K", "k", pass.buffer(self.ids).shape[1])
            .with("FIRST", first)
            .with("END", end)
            .with("RUNS", depth + 1 < shape.max_depth());
        let operands = [self.ids, self.requests, self.rows, self.draft_requests, self.draft_rows];
        launch(spec, operands.map(Argument::from).to_vec(), requests, 256)
    }
}

fn launch(spec: KernelSpec, arguments: Vec<Argument>, blocks: usize, threads: usize) -> Launch {
    Launch { spec, arguments, grid: [blocks, 1, 1], threads, shared_bytes: 0, cluster: 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emit::{Lang, emit};
    use crate::layout::accepted_words;
    use crate::{DType, MAX_NODES, Role};

    #[test]
    fn specs_give_the_constants_that_sources_have() {
        let mut pass = Pass::new("round", 32);
        let mut add = |name: &str, shape: &[usize]| pass.add(name, Role::Input, DType::U32, shape);
        let [rows, requests, draft_rows, draft_requests] =
            ["rows", "requests", "draft.rows", "draft.requests"].map(|name| add(name, &[32 * 12]));
        let ngram = Ngram {
            rows,
            requests,
            accepted: add("accepted", &[2, accepted_words(MAX_NODES)]),
            history: add("history", &[2, 4096]),
            state: add("state", &[2, ngram_state_words(16)]),
            slots: 4096,
            row_cost: 0.01,
        };
        let grow = Grow { ids: add("ids", &[8, 4]), requests, rows, draft_requests, draft_rows };
        let source = |launch: &Launch| emit(&launch.spec, Lang::Cuda).unwrap();
        assert!(source(&ngram.launch(&pass)).contains("constexpr u32 NODES = 16u;"));

        let shape: TreeShape = "3x2x1".parse().unwrap();
        let grown: Vec<Launch> = (0..3).map(|depth| grow.launch(&pass, &shape, depth, 2)).collect();
        assert_eq!(grown[1].spec.name(), "grow__3x2x1_from4_k4");
        assert!(source(&grown[1]).contains("PARENTS[] = {0x1u, 0x1u, 0x2u, 0x2u, 0x3u, 0x3u};"));
        assert!(source(&grown[1]).contains("RUNS = true") && source(&grown[2]).contains("RUNS = false"));
    }
}

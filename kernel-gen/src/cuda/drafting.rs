//! Drafting on the device: the n-gram drafter, and one level of a draft model's growth. No op stands for the latter yet,
//! and nothing launches it: a draft model is still driven by the host.

use super::{Argument, Launch, Lowering};
use crate::TreeShape;
use crate::layout::ngram_nodes;
use crate::op::Op;
use crate::pass::{Buf, Pass};
use crate::spec::KernelSpec;

impl Lowering<'_> {
    pub(super) fn draft_ngram(&self) -> Vec<Launch> {
        const DEPTH: usize = 16;
        let &Op::DraftNgram { accepted, history, state, row_cost, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let [tokens, state_words] = [history, state].map(|buf| self.desc(buf).shape[1]);
        let spec = KernelSpec::new("draft_ngram")
            .size("HISTORY", "t", tokens)
            .size("NODES", "n", ngram_nodes(state_words))
            .size("DEPTH", "d", DEPTH)
            .with("ROW_COST", row_cost);
        let operands = [self.batch.rows, self.batch.requests, accepted, history, state];
        vec![launch(spec, operands.map(Argument::from).to_vec(), 1, 1024)]
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
    use crate::cuda::{Device, lower};
    use crate::emit::{Lang, emit};
    use crate::layout::{HEADER_WORDS, accepted_words, ngram_state_words};
    use crate::op::Batch;
    use crate::{DType, MAX_NODES, Request, Role, Row};

    fn source(launch: &Launch) -> String {
        emit(&launch.spec, Lang::Cuda).unwrap()
    }

    #[test]
    fn a_drafter_is_compiled_for_the_sizes_of_its_buffers() {
        let mut pass = Pass::new("round", 1);
        let mut add = |name: &str, shape: &[usize]| pass.add(name, Role::Input, DType::U32, shape);
        let batch = Batch {
            rows: add("rows", &[32, Row::WORDS]),
            requests: add("requests", &[HEADER_WORDS + 2 * Request::WORDS]),
            pages: add("pages", &[2, 8]),
        };
        let accepted = add("accepted", &[2, accepted_words(MAX_NODES)]);
        let (history, state) = (add("history", &[2, 4096]), add("state", &[2, ngram_state_words(16)]));
        let op = Op::DraftNgram { batch, accepted, history, state, row_cost: 0.01 };
        op.check(&pass).unwrap();
        let launch = lower(&op, &pass, &Device::H100).unwrap().remove(0);
        assert_eq!(launch.spec.name(), "draft_ngram__t4096_n16_d16");
        assert!(source(&launch).contains("constexpr u32 NODES = 16u;"));
        for (buffer, words, problem) in [(4, 4095, "history of 4095 tokens"), (5, 4 + 4 * 17 + 24, "2 trees of 17")] {
            let mut pass = pass.clone();
            pass.buffers[buffer].shape[1] = words;
            let refused = op.check(&pass).unwrap_err().to_string();
            assert!(refused.contains(problem), "{refused}");
        }
    }

    #[test]
    fn growth_is_compiled_level_by_level() {
        let mut pass = Pass::new("round", 32);
        let mut add = |name: &str, shape: &[usize]| pass.add(name, Role::Input, DType::U32, shape);
        let [rows, requests, draft_rows, draft_requests] =
            ["rows", "requests", "draft.rows", "draft.requests"].map(|name| add(name, &[32 * 12]));
        let grow = Grow { ids: add("ids", &[8, 4]), requests, rows, draft_requests, draft_rows };

        let shape: TreeShape = "3x2x1".parse().unwrap();
        let grown: Vec<Launch> = (0..3).map(|depth| grow.launch(&pass, &shape, depth, 2)).collect();
        assert_eq!(grown[1].spec.name(), "grow__3x2x1_from4_k4");
        assert!(source(&grown[1]).contains("PARENTS[] = {0x1u, 0x1u, 0x2u, 0x2u, 0x3u, 0x3u};"));
        assert!(source(&grown[1]).contains("RUNS = true") && source(&grown[2]).contains("RUNS = false"));
    }
}

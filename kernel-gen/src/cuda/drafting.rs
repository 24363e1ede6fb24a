//! Drafting on the device: the n-gram drafter, the growth of a draft model's tree by one level, and what makes a tree of a
//! parallel drafter's block.

use super::{Argument, Launch, Lowering};
use crate::MAX_NODES;
use crate::layout::{ngram_nodes, report_nodes};
use crate::op::{Fill, MAX_OPENED, Op};
use crate::pass::{Buf, DType};
use crate::spec::{KernelSpec, Value};

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

    /// The kernel is compiled for the shape: what a row holds, but for its token, is known before.
    pub(super) fn grow(&self) -> Vec<Launch> {
        let &Op::Grow { ref shape, ids, tokens, .. } = self.op else { unreachable!("lowering another op") };
        let depth = shape.max_depth();
        let spec = KernelSpec::new("grow")
            .parents(shape)
            .size("K", "k", self.desc(ids).shape[1])
            .with("DEPTH", depth)
            .with("ABOVE", shape.level(depth - 1).start)
            .with("BEGIN", shape.level(depth).start)
            .with("END", shape.len());
        let operands = [ids, self.batch.rows, self.batch.requests, tokens];
        vec![launch(spec, operands.map(Argument::from).to_vec(), self.max_requests(), MAX_NODES)]
    }
}

impl Lowering<'_> {
    pub(super) fn open_block(&self) -> Vec<Launch> {
        let &Op::OpenBlock { accepted, state, ref block, .. } = self.op else { unreachable!("lowering another op") };
        let spec = KernelSpec::new("open_block")
            .size("REQUESTS", "b", self.max_requests())
            .size("NODES", "n", self.report_nodes(state))
            .size("ROWS", "r", block.rows)
            .flag("READS_STATE", "state", block.fill == Fill::State)
            .size("MASK", "m", if let Fill::Mask(token) = block.fill { token as usize } else { 0 });
        let operands = [self.batch.rows, self.batch.requests, accepted, state];
        let threads = if self.max_requests() == 1 { 64 } else { MAX_OPENED };
        vec![launch(spec, operands.map(Argument::from).to_vec(), 1, threads)]
    }

    pub(super) fn trellis(&self) -> Vec<Launch> {
        const PARENTS: usize = 8;
        let &Op::Trellis { ref block, ids, scores, hidden, markov, confidence, trellis, order, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let [k, hidden_size] = [ids, hidden].map(|buf| self.desc(buf).shape[1]);
        let (w1, w2) = markov.unzip();
        let (rank, dtype) = w1.map_or((0, DType::F32), |w1| (self.desc(w1).shape[1], self.desc(w1).dtype));
        let spec = KernelSpec::new("trellis")
            .size("K", "k", k)
            .size("RANK", "rank", rank)
            .size("HIDDEN", "h", hidden_size)
            .size("ROWS", "r", block.rows)
            .with("FIRST", block.first)
            .format("WEIGHT", dtype)
            .flag("CONFIDENCE", "conf", confidence.is_some());
        let arguments = vec![
            self.batch.rows.into(),
            self.batch.requests.into(),
            ids.into(),
            scores.into(),
            hidden.into(),
            w1.into(),
            w2.into(),
            confidence.into(),
            trellis.into(),
            order.into(),
        ];
        let grid = [k.div_ceil(PARENTS), block.depth(), self.max_requests()];
        vec![Launch { grid, ..launch(spec, arguments, 1, 256) }]
    }

    pub(super) fn grow_trellis(&self) -> Vec<Launch> {
        let &Op::GrowTrellis { ref block, ids, trellis, order, state, ref costs, least, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let spec = KernelSpec::new("grow_trellis")
            .size("NODES", "n", self.report_nodes(state))
            .size("K", "k", self.desc(ids).shape[1])
            .size("ROWS", "r", block.rows)
            .with("FIRST", block.first)
            .flag("MAKES_ROWS", "rows", self.max_requests() == 1)
            .with("LEAST", least)
            .with("COSTS", Value::Words(costs.iter().map(|cost| cost.to_bits()).collect()));
        let operands = [self.batch.rows, self.batch.requests, ids, trellis, order, state];
        vec![launch(spec, operands.map(Argument::from).to_vec(), self.max_requests(), 512)]
    }

    /// Nodes of the trees that a state reports.
    fn report_nodes(&self, state: Buf) -> usize {
        report_nodes(self.desc(state).shape[1])
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
    use crate::layout::{HEADER_WORDS, accepted_words, ngram_state_words, report_words};
    use crate::op::{Batch, BlockShape};
    use crate::{Pass, Request, Role, Row};

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
        for (buffer, words, problem) in
            [(4, 4095, "history of 4095 tokens"), (5, ngram_state_words(17), "2 trees of 17")]
        {
            let mut pass = pass.clone();
            pass.buffers[buffer].shape[1] = words;
            let refused = op.check(&pass).unwrap_err().to_string();
            assert!(refused.contains(problem), "{refused}");
        }
    }

    /// A block of five rows for each of so many requests, opened, and the tree grown from it; and rows of the batch.
    fn block(requests: usize, rows: usize) -> (Pass, [Op; 2]) {
        let mut pass = Pass::new("block", 5 * requests);
        let mut add = |name: &str, dtype, shape: &[usize]| pass.add(name, Role::Input, dtype, shape);
        let batch = Batch {
            rows: add("rows", DType::U32, &[rows, Row::WORDS]),
            requests: add("requests", DType::U32, &[HEADER_WORDS + requests * Request::WORDS]),
            pages: add("pages", DType::U32, &[requests, 8]),
        };
        let accepted = add("accepted", DType::U32, &[requests, accepted_words(MAX_NODES)]);
        let (state, ids) =
            (add("state", DType::U32, &[requests, report_words(16)]), add("ids", DType::U32, &[rows, 8]));
        let shape = [5 * requests, 8, 8];
        let (trellis, order) = (add("trellis", DType::F32, &shape), add("order", DType::U32, &shape));
        let block = BlockShape { rows: 5, first: 0, fill: Fill::Mask(7) };
        let open = Op::OpenBlock { batch, accepted, state, block };
        (pass, [open, Op::GrowTrellis { batch, block, ids, trellis, order, state, costs: vec![1.0; 16], least: 0.02 }])
    }

    #[test]
    fn one_request_of_room_is_given_rows_and_several_are_not() {
        for (requests, rows, open, grow, threads) in [
            (1, 16, "open_block__b1_n16_r5_m7", "grow_trellis__n16_k8_r5_rows", 64),
            // Their trees have more nodes than there are rows.
            (128, 640, "open_block__b128_n16_r5_m7", "grow_trellis__n16_k8_r5", 1024),
        ] {
            let (pass, ops) = block(requests, rows);
            let [opened, grown] = ops.map(|op| {
                op.check(&pass).unwrap();
                lower(&op, &pass, &Device::H100).unwrap().remove(0)
            });
            assert_eq!((opened.spec.name(), opened.grid, opened.threads), (open, [1, 1, 1], threads));
            assert_eq!((grown.spec.name(), grown.grid), (grow, [requests, 1, 1]));
            assert!(source(&grown).contains(&format!("MAKES_ROWS = {};", requests == 1)));
        }
        for (requests, rows, problem) in
            [(1, 15, "15 rows for one"), (128, 639, "the buffer holds 639"), (1025, 5125, "expected up to 1024")]
        {
            let (pass, [open, grow]) = block(requests, rows);
            let refused = open.check(&pass).and(grow.check(&pass)).unwrap_err().to_string();
            assert!(refused.contains(problem), "{refused}");
        }
    }

    /// A level for two requests, of whose rows the best four continuations are known.
    fn grow(shape: &str) -> (Pass, Op) {
        let mut pass = Pass::new("grow", 32);
        let mut add = |name: &str, shape: &[usize]| pass.add(name, Role::Input, DType::U32, shape);
        let batch = Batch {
            rows: add("rows", &[32, Row::WORDS]),
            requests: add("requests", &[HEADER_WORDS + 2 * Request::WORDS]),
            pages: add("pages", &[2, 8]),
        };
        let (ids, tokens) = (add("ids", &[8, 4]), add("tokens", &[2, MAX_NODES]));
        (pass, Op::Grow { batch, shape: shape.parse().unwrap(), ids, tokens })
    }

    #[test]
    fn growth_is_compiled_level_by_level() {
        let (pass, op) = grow("3x2");
        op.check(&pass).unwrap();
        let launch = lower(&op, &pass, &Device::H100).unwrap().remove(0);
        assert_eq!((launch.spec.name(), launch.grid), ("grow__3x2_k4", [2, 1, 1]));
        let source = source(&launch);
        assert!(
            source.contains("PARENTS[] = {0x0u, 0x0u, 0x0u, 0x0u, 0x1u, 0x1u, 0x2u, 0x2u, 0x3u, 0x3u};"),
            "{source}"
        );
        for (name, value) in [("DEPTH", 2), ("ABOVE", 1), ("BEGIN", 4), ("END", 10)] {
            assert!(source.contains(&format!("constexpr u32 {name} = {value}u;")), "{name}: {source}");
        }
    }

    #[test]
    fn what_cannot_grow_is_named() {
        for (shape, problem) in [
            ("root", "is root, expected two levels or more"),
            ("parents:0,0,1,0", "one after the other"),
            ("4x4x1", "the best 4 of 8 rows, expected 1 of 32"),
            ("5", "the best 4 of 8 rows, expected 5 of 2"),
            ("4x4x4", "2 times 64 nodes, the buffer holds 32 rows"),
        ] {
            let (pass, op) = grow(shape);
            let refused = op.check(&pass).unwrap_err().to_string();
            assert!(refused.contains(problem), "{refused}");
        }
    }
}

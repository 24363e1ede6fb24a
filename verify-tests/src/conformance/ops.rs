//! Every op against the oracle: alone on equal inputs, and as a whole round.

use treespark::Sampling;
use treespark::backend::Backend;
use treespark_kernel_gen::layout::NO_TOKEN;
use treespark_kernel_gen::{BufferDesc, DType, MAX_NODES, Op, Pass, Role, TreeSpec};

use super::agreement::Tolerance;
use super::draws::excusable;
use super::{Property, finite, for_cases, same};
use crate::arb::{Case, HOUSE_MODELS, Topology, WIDE_MODELS, cases, tree, wild_cases};
use crate::batch::{Batch, Member};
use crate::bed::Bed;
use crate::oracle::Oracle;
use crate::tiny_model::{MAX_ROWS, Tail, TinyModel, compiled_rows};

const ANY: TreeSpec = TreeSpec::Any(MAX_NODES);

/// Each op of a round runs alone, on the oracle's inputs, and must leave what the oracle leaves: its results within
/// [`Tolerance`], all other memory untouched.
pub fn every_op_equals_the_oracle(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 3, wild_cases(), every_op_equals_the_oracle_in_case)?;
    for_cases(backend, 4, cases(), every_op_equals_the_oracle_in_case)
}

pub fn every_op_equals_the_oracle_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    op_by_op(backend, &case, Tail::Commit)
}

/// Rows that see each other, whichever comes first: the block that a parallel drafter fills.
pub fn a_block_sees_all_of_itself(backend: &mut dyn Backend) -> Property {
    let sizes = [(0, 5), (1, 7), (15, 7), (63, 16), (125, 7), (127, 2), (150, 33)];
    for (index, (prefix, rows)) in sizes.into_iter().enumerate() {
        let model = TinyModel { sizes: HOUSE_MODELS[index % HOUSE_MODELS.len()], seed: index as u64 };
        let tree = tree(rows, Topology::Chain, model.sizes.vocab, index as u64);
        let block = |prefix: usize| Member { is_block: true, ..Member::new(&vec![3; prefix], tree.clone()) };
        let case = Case { model, batch: Batch { members: vec![block(prefix), block(prefix / 2)] }, seed: 0 };
        op_by_op(backend, &case, Tail::Draw)
            .map_err(|problem| format!("{rows} rows behind {prefix}, {:?}: {problem}", case.model))?;
    }
    Ok(())
}

/// The sizes at which kernels go wrong that know of slots and nodes, one by one: empty prefixes, one node, page and word
/// boundaries inside the tree, rows times group at the edges of tiles, very different lengths in one batch.
pub fn edge_sizes_equal_the_oracle(backend: &mut dyn Backend) -> Property {
    #[rustfmt::skip]
    let one_request = [
        (0, 1), (0, 33), (1, 1), (3, 2), (4, 3), (15, 2), (16, 1), (16, 17), (17, 31), (31, 65), (64, 7), (5, 256),
        // For tensor cores: groups of 3 (packed rows 15, 63, 129), 4 (16, 64, 128), 7 (63), 1 (15, 17, 65, 127).
        (62, 5), (63, 21), (65, 43), (127, 4), (128, 16), (64, 32), (1, 9), (0, 15), (16, 17), (61, 65), (2, 127),
    ];
    let models = [0, 1, 2, 0, 1, 3, 0, 1, 2, 3, 0, 1, 4, 4, 4, 5, 5, 5, 6, 7, 7, 7, 7];
    let alone = one_request.iter().zip(models).map(|(&size, model)| (model, vec![size]));
    let ragged = [0, 4, 7].map(|model| (model, vec![(1, 3), (300, 20), (17, 1)]));
    for (index, (model, sizes)) in alone.chain(ragged).enumerate() {
        let model = TinyModel { sizes: HOUSE_MODELS[model], seed: index as u64 };
        let vocab = model.sizes.vocab;
        let member = |&(prefix, nodes): &(usize, usize)| {
            // The last token of the vocabulary first.
            let tokens: Vec<u32> = (0..prefix).map(|i| (vocab - 1 - i * 7 % vocab) as u32).collect();
            Member::new(&tokens, tree(nodes, Topology::Recursive, vocab, index as u64))
        };
        let batch = Batch { members: sizes.iter().map(member).collect() };
        let case = Case { model, batch, seed: 0 };
        let knows_slots =
            |op: &Op| matches!(op, Op::Qkv { .. } | Op::TreeAttention { .. } | Op::Accept { .. } | Op::Commit { .. });
        ops_one_by_one(backend, &case, Tail::Commit, &knows_slots)
            .map_err(|problem| format!("prefixes and nodes {sizes:?}, {:?}: {problem}", case.model))?;
    }
    Ok(())
}

/// Products with matrices that are large for a GPU of one multiprocessor, at the edges of their tiles of tokens.
pub fn wide_matrices_equal_the_oracle(backend: &mut dyn Backend) -> Property {
    for (index, (nodes, sizes)) in [(1, 0), (9, 0), (17, 1), (40, 0), (64, 1), (70, 0)].into_iter().enumerate() {
        let model = TinyModel { sizes: WIDE_MODELS[sizes], seed: index as u64 };
        let member = Member::new(&[5, 7], tree(nodes, Topology::Recursive, model.sizes.vocab, index as u64));
        let case = Case { model, batch: Batch { members: vec![member] }, seed: 0 };
        op_by_op(backend, &case, Tail::Commit)
            .map_err(|problem| format!("{nodes} nodes, {:?}: {problem}", case.model))?;
    }
    Ok(())
}

pub(super) fn op_by_op(backend: &mut dyn Backend, case: &Case, tail: Tail) -> Result<(), String> {
    ops_one_by_one(backend, case, tail, &|_| true)
}

/// The oracle runs all of a pass, the backend some ops on the oracle's inputs.
fn ops_one_by_one(
    backend: &mut dyn Backend,
    case: &Case,
    tail: Tail,
    is_tested: &dyn Fn(&Op) -> bool,
) -> Result<(), String> {
    let mut oracle = Oracle::new();
    let mut right = Bed::new(&mut oracle, case.model.clone());
    right.prefill(&case.batch);
    let mut tested = Bed::new(backend, case.model.clone());
    let whole = case.model.pass(compiled_rows(case.batch.rows()), &ANY, tail);
    right.prepare(&whole);
    tested.prepare(&whole);
    for (index, op) in whole.ops.iter().enumerate() {
        let alone = alone(&whole, op);
        if !is_tested(op) {
            right.run(&alone, &case.batch);
            continue;
        }
        for desc in operands(&whole, op).filter(|desc| desc.role != Role::Weight) {
            let words = right.words(&desc.name, desc.bytes() / 4);
            right.write(&desc.name, &words);
            tested.write(&desc.name, &words);
        }
        right.run(&alone, &case.batch);
        tested.run(&alone, &case.batch);
        for desc in operands(&whole, op).filter(|desc| !matches!(desc.role, Role::Weight | Role::Input)) {
            compare(&mut tested, &mut right, desc, case)
                .map_err(|problem| format!("op {index}, {}: {problem}", op.name()))?;
        }
    }
    Ok(())
}

/// The pass with one op left. Its scratch is read by the host here, so it is no scratch.
fn alone(whole: &Pass, op: &Op) -> Pass {
    let mut pass = Pass { name: op.name().into(), ops: vec![op.clone()], ..whole.clone() };
    pass.buffers.iter_mut().filter(|desc| desc.role == Role::Scratch).for_each(|desc| desc.role = Role::Output);
    pass
}

fn operands<'a>(pass: &'a Pass, op: &Op) -> impl Iterator<Item = &'a BufferDesc> {
    op.operands().into_iter().map(|(_, buf)| pass.buffer(buf))
}

fn compare(tested: &mut Bed, right: &mut Bed, desc: &BufferDesc, case: &Case) -> Result<(), String> {
    let rows = case.batch.rows();
    let name = &desc.name;
    match (name.as_str(), desc.role) {
        // All of it, row of a head by row: what the op must not touch has to be as it was.
        (_, Role::Cache) => {
            let (got, want) = (tested.floats(name, desc.len()), right.floats(name, desc.len()));
            let dim = desc.shape[4];
            let tolerance = Tolerance::cache(desc.dtype);
            got.chunks(dim).zip(want.chunks(dim)).try_for_each(|(got, want)| tolerance.compare(name, got, want))
        }
        ("accepted", _) => {
            (0..case.batch.members.len()).try_for_each(|i| same("accepted", tested.accepted(i), right.accepted(i)))
        }
        ("draws", _) => {
            let vocab = case.model.sizes.vocab;
            let logits = right.floats("logits", rows * vocab);
            let (got, want) = (tested.words("draws", rows), right.words("draws", rows));
            excusable(&case.batch, &logits, &got, &want)?;
            // From here on both follow the oracle's draws.
            tested.write("draws", &want);
            Ok(())
        }
        ("expert_groups", _) => {
            let chosen = case.model.sizes.experts.expect("a model with experts").chosen;
            let words = desc.len() - (MAX_ROWS - rows) * chosen;
            same(name, tested.words(name, words), right.words(name, words))
        }
        (_, _) if desc.dtype == DType::U32 => {
            let words = rows * desc.len() / desc.shape[0];
            same(name, tested.words(name, words), right.words(name, words))
        }
        _ => {
            let width = desc.len() / desc.shape[0];
            let (got, want) = (tested.floats(name, rows * width), right.floats(name, rows * width));
            let (backend, sizes) = (tested.backend.info().backend, &case.model.sizes);
            let tolerance = match name.as_str() {
                "attention" | "latents" => Tolerance::attention(backend, sizes),
                _ => Tolerance::op(backend, sizes),
            };
            (0..rows).try_for_each(|row| {
                let of = |all: &[f32]| all[row * width..(row + 1) * width].to_vec();
                tolerance.compare(&format!("{name}, row {row}"), &of(&got), &of(&want))
            })
        }
    }
}

/// Prefill and a whole verify pass: the logits of all rows, and the greedy draws up to near-ties.
pub fn a_whole_round_equals_the_oracle(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), a_whole_round_equals_the_oracle_in_case)
}

pub fn a_whole_round_equals_the_oracle_in_case(backend: &mut dyn Backend, mut case: Case) -> Property {
    case.batch.members.iter_mut().for_each(|member| member.sampling = Sampling::default());
    let mut oracle = Oracle::new();
    let want = Bed::new(&mut oracle, case.model.clone()).verify(&case.batch, MAX_ROWS, &ANY);
    let got = Bed::new(backend, case.model.clone()).verify(&case.batch, MAX_ROWS, &ANY);
    finite(&got)?;
    let tolerance = Tolerance::logits(backend.info().backend, &case.model.sizes);
    for row in 0..case.batch.rows() {
        tolerance.compare(&format!("logits of row {row}"), &got.logits[row], &want.logits[row])?;
        let (drawn, logits) = (got.draws[row], &got.logits[row]);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if drawn == NO_TOKEN || logits[drawn as usize] < max {
            return Err(format!("row {row} drew {drawn}, which is not its own argmax"));
        }
    }
    Ok(())
}

//! The suite can fail: each of these known mistakes, planted into an otherwise right backend, is caught by a property.
//!
//! A [`Mutant`] wraps the CPU backend, or the oracle where a device drafts.

use treespark::backend::Backend;
use treespark::cpu::CpuBackend;
use treespark_kernel_gen::{Op, Request, Row, TreeShape};
use treespark_verify_tests::bed::POISON;
use treespark_verify_tests::conformance::{Property, commit, draws, growth, ops, structure};
use treespark_verify_tests::mutant::{Mistake, Mutant};
use treespark_verify_tests::oracle::Oracle;

#[track_caller]
fn caught_by(property: fn(&mut dyn Backend) -> Property, mistake: Mistake) {
    caught_on(Box::new(CpuBackend::new(Some(1))), property, mistake);
}

#[track_caller]
fn caught_on(backend: Box<dyn Backend>, property: fn(&mut dyn Backend) -> Property, mistake: Mistake) {
    assert!(property(&mut Mutant::new(backend, mistake)).is_err(), "the suite lets this mistake pass");
}

/// Bit of the parent in a row's ancestors, if it has one.
fn parent(row: &Row) -> Option<usize> {
    row.path().filter(|&n| n != row.node as usize).last()
}

#[test]
fn a_missing_ancestor() {
    let forget_parent = |row: &mut Row| {
        if let Some(parent) = parent(row).filter(|&p| p > 0) {
            row.ancestors[parent / 32] ^= 1 << (parent % 32);
        }
    };
    caught_by(structure::a_node_sees_exactly_its_root_path, Mistake::Row(forget_parent));
    caught_by(ops::every_op_equals_the_oracle, Mistake::Row(forget_parent));
}

#[test]
fn an_ancestor_bit_one_too_far() {
    let see_neighbour = |row: &mut Row| {
        let neighbour = row.node.saturating_sub(1) as usize;
        row.ancestors[neighbour / 32] |= 1 << (neighbour % 32);
    };
    caught_by(structure::a_node_sees_exactly_its_root_path, Mistake::Row(see_neighbour));
    caught_by(structure::node_order_changes_nothing, Mistake::Row(see_neighbour));
}

#[test]
fn a_node_that_sees_its_child() {
    let see_next = |row: &mut Row| {
        let next = (row.node as usize + 1).min(255);
        row.ancestors[next / 32] |= 1 << (next % 32);
    };
    caught_by(structure::a_chain_is_causal_attention, Mistake::Row(see_next));
}

#[test]
fn only_the_first_ancestor_word_is_read() {
    let one_word = |row: &mut Row| {
        let own = row.node as usize;
        row.ancestors[1..].fill(0);
        row.ancestors[own / 32] |= 1 << (own % 32);
    };
    caught_by(structure::a_node_sees_exactly_its_root_path, Mistake::Row(one_word));
    caught_by(ops::edge_sizes_equal_the_oracle, Mistake::Row(one_word));
}

#[test]
fn rope_by_slot_and_not_by_depth() {
    let by_slot = |row: &mut Row| {
        let depth = row.path().count() as u32 - 1;
        row.position = row.position - depth + row.node;
    };
    caught_by(structure::a_node_sees_exactly_its_root_path, Mistake::Row(by_slot));
    caught_by(structure::node_order_changes_nothing, Mistake::Row(by_slot));
    caught_by(commit::commit_leaves_the_cache_of_plain_decoding, Mistake::Row(by_slot));
}

#[test]
fn a_prefix_one_short() {
    let shorter = |r: &mut Request| r.prefix = r.prefix.saturating_sub(1);
    caught_by(ops::every_op_equals_the_oracle, Mistake::Request(shorter));
}

#[test]
fn a_prefix_one_long() {
    caught_by(structure::unused_memory_never_leaks, Mistake::Request(|r| r.prefix += 1));
}

#[test]
fn a_commit_that_does_nothing() {
    let forget = |op: &mut Op| !matches!(op, Op::Commit { .. });
    caught_by(commit::commit_leaves_the_cache_of_plain_decoding, Mistake::Op(forget));
}

#[test]
fn a_commit_of_keys_alone() {
    let keys_twice = |op: &mut Op| {
        if let Op::Commit { k_cache, v_cache, .. } = op {
            *v_cache = Some(*k_cache);
        }
        true
    };
    caught_by(commit::commit_leaves_the_cache_of_plain_decoding, Mistake::Op(keys_twice));
}

#[test]
fn a_scale_that_is_a_little_off() {
    let warmer = |op: &mut Op| {
        if let Op::TreeAttention { scale, .. } = op {
            *scale *= 1.001;
        }
        true
    };
    caught_by(ops::every_op_equals_the_oracle, Mistake::Op(warmer));
}

#[test]
fn no_bias_and_no_head_norms() {
    let plain = |op: &mut Op| {
        if let Op::Qkv { bias, .. } = op {
            *bias = None;
        }
        true
    };
    caught_by(ops::every_op_equals_the_oracle, Mistake::Op(plain));
    let unnormed = |op: &mut Op| {
        if let Op::Qkv { k_norm, .. } = op {
            *k_norm = None;
        }
        true
    };
    caught_by(ops::every_op_equals_the_oracle, Mistake::Op(unnormed));
}

#[test]
fn logits_off_in_the_fourth_digit() {
    let nudge = |words: &mut [u32]| words.iter_mut().for_each(|w| *w = (f32::from_bits(*w) * 1.0003 + 1e-3).to_bits());
    caught_by(ops::every_op_equals_the_oracle, Mistake::Read("logits", nudge));
}

#[test]
fn noise_keyed_by_anything_but_position_and_sample() {
    // By the node: equal to the position only on a chain without a prefix.
    caught_by(draws::draws_equal_the_oracle, Mistake::Row(|row| row.position = row.node));
    caught_by(draws::draws_follow_their_distribution, Mistake::Row(|row| row.position = 0));
    caught_by(draws::draws_equal_the_oracle, Mistake::Request(|r| r.sample = 0));
    caught_by(draws::draws_equal_the_oracle, Mistake::Request(|r| r.seed.swap(0, 1)));
}

#[test]
fn filters_that_are_skipped_or_one_off() {
    caught_by(draws::draws_equal_the_oracle, Mistake::Request(|r| r.top_k += u32::from(r.top_k > 1)));
    caught_by(draws::draws_equal_the_oracle, Mistake::Request(|r| r.top_p = 1.0));
    caught_by(draws::draws_equal_the_oracle, Mistake::Request(|r| r.min_p = 0.0));
    caught_by(draws::draws_equal_the_oracle, Mistake::Request(|r| r.repetition_penalty = 1.0));
    caught_by(draws::draws_follow_their_distribution, Mistake::Request(|r| r.temperature *= 1.1));
}

#[test]
fn acceptance_that_overlooks_a_branch() {
    let flatten = |row: &mut Row| {
        let own = row.node as usize;
        row.ancestors = [0; 8];
        row.ancestors[0] = 1;
        row.ancestors[own / 32] |= 1 << (own % 32);
    };
    caught_by(commit::acceptance_equals_the_oracle, Mistake::Row(flatten));
}

#[test]
fn a_request_that_is_run_on_when_it_has_ended() {
    let run_on = |r: &mut Request| r.n_rows = r.n_rows.max(1);
    caught_by(commit::a_request_without_rows_commits_nothing, Mistake::Request(run_on));
}

#[test]
fn growth_that_goes_wrong() {
    let caught =
        |mistake: Mistake| caught_on(Box::new(Oracle::new()), growth::a_grown_level_equals_the_oracle, mistake);
    // The last node of a level under the parent of the first: in chains and stars it is there anyway.
    let wrong_parent = |op: &mut Op| {
        if let Op::Grow { shape, .. } = op {
            let (mut parents, level) = (shape.parents().to_vec(), shape.level(shape.max_depth()));
            parents[level.end - 1] = parents[level.start];
            *shape = TreeShape::from_parents(&parents).unwrap();
        }
        true
    };
    caught(Mistake::Op(wrong_parent));
    // Ancestors of the first word only.
    caught(Mistake::Read("rows", |words| {
        for row in words.chunks_mut(Row::WORDS).filter(|row| row[0] != POISON) {
            let own = row[3] as usize;
            row[5..].fill(0);
            row[4 + own / 32] |= 1 << (own % 32);
        }
    }));
    // Some nodes one position too far.
    caught(Mistake::Read("rows", |words| {
        let rows = words.chunks_mut(Row::WORDS).filter(|row| row[0] != POISON);
        rows.for_each(|row| row[1] += u32::from(row[3] > 40));
    }));
}

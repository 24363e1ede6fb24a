//! Properties of a forward pass that need no oracle: two runs on one backend agree, bit for bit where it promises that.

use treespark::Sampling;
use treespark::backend::Backend;
use treespark_kernel_gen::{MAX_NODES, TreeShape, TreeSpec};

use super::agreement::{equal_row, same_row};
use super::{Property, finite, for_cases};
use crate::arb::{Case, WIDE_MODELS, cases};
use crate::batch::{Batch, Member, Tree};
use crate::bed::Bed;
use crate::rng::Rng;
use crate::tiny_model::{MAX_ROWS, TinyModel, compiled_rows};

const ANY: TreeSpec = TreeSpec::Any(MAX_NODES);

/// One token after another, each in its own pass, gives what a chain gives in one pass.
pub fn a_chain_is_causal_attention(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), a_chain_is_causal_attention_in_case)
}

pub fn a_chain_is_causal_attention_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let member = &case.batch.members[0];
    let tokens = &member.tree.tokens[..member.tree.nodes().min(40)];
    let chain = Member { tree: Tree::chain(tokens), ..member.clone() };
    let mut bed = Bed::new(backend, case.model.clone());
    let at_once = bed.verify(&Batch { members: vec![chain] }, MAX_ROWS, &ANY);
    let mut prefix = member.prefix.clone();
    for (i, &token) in tokens.iter().enumerate() {
        let step = Member { prefix: prefix.clone(), tree: Tree::chain(&[token]), ..member.clone() };
        let one = bed.decode(&Batch { members: vec![step] }, 1, &ANY);
        same_row("chain against token by token", (&at_once, i), (&one, 0))?;
        prefix.push(token);
    }
    Ok(())
}

/// A node's output is that of a prompt of its prefix and root path, computed from scratch, without a tree.
pub fn a_node_sees_exactly_its_root_path(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), a_node_sees_exactly_its_root_path_in_case)
}

pub fn a_node_sees_exactly_its_root_path_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let batch = Batch { members: case.batch.members[..1].to_vec() };
    let member = &batch.members[0];
    let tree = &member.tree;
    let in_tree = Bed::new(backend, case.model.clone()).verify(&batch, MAX_ROWS, &ANY);
    let deepest = (0..tree.nodes()).max_by_key(|&n| tree.depth(n)).expect("a tree has a root");
    for node in [0, deepest, tree.nodes() - 1, case.rng().below(tree.nodes())] {
        let path = tree.path_tokens(node);
        let prefix = [&member.prefix, &path[..path.len() - 1]].concat();
        let from_scratch = Member { prefix, tree: Tree::chain(&path[path.len() - 1..]), ..member.clone() };
        let alone = Bed::new(backend, case.model.clone()).verify(&Batch { members: vec![from_scratch] }, 1, &ANY);
        same_row(&format!("node {node} against its root path alone"), (&in_tree, node), (&alone, 0))?;
    }
    Ok(())
}

/// Renumbering the nodes (parents first) renumbers the outputs and does nothing else.
pub fn node_order_changes_nothing(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), node_order_changes_nothing_in_case)
}

pub fn node_order_changes_nothing_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut rng = case.rng();
    let orders: Vec<Vec<usize>> = case.batch.members.iter().map(|m| random_order(&m.tree, &mut rng)).collect();
    let reordered = |(m, order): (&Member, &Vec<usize>)| Member { tree: m.tree.reordered(order), ..m.clone() };
    let other = Batch { members: case.batch.members.iter().zip(&orders).map(reordered).collect() };
    let mut bed = Bed::new(backend, case.model.clone());
    let before = bed.verify(&case.batch, MAX_ROWS, &ANY);
    let after = bed.decode(&other, MAX_ROWS, &ANY);
    for (i, order) in orders.iter().enumerate() {
        let first = case.batch.first_row(i);
        for (new, &old) in order.iter().enumerate() {
            same_row(&format!("order {order:?}"), (&before, first + old), (&after, first + new))?;
        }
    }
    Ok(())
}

/// A random order of the nodes with parents first.
fn random_order(tree: &Tree, rng: &mut Rng) -> Vec<usize> {
    let mut order = vec![0];
    while order.len() < tree.nodes() {
        let ready = |n: &usize| !order.contains(n) && order.contains(&tree.parents[*n]);
        let candidates: Vec<usize> = (0..tree.nodes()).filter(ready).collect();
        order.push(rng.pick(&candidates));
    }
    order
}

/// A tree that grows, some nodes at a pass, gives what the same tree gives in one pass.
pub fn a_tree_may_grow_over_several_passes(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), a_tree_may_grow_over_several_passes_in_case)
}

pub fn a_tree_may_grow_over_several_passes_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    // Without a penalty: a draw takes the tokens of a path from the rows of its own pass.
    let member = Member { sampling: Sampling::default(), ..case.batch.members[0].clone() };
    let whole = Batch { members: vec![member.clone()] };
    let at_once = Bed::new(backend, case.model.clone()).verify(&whole, MAX_ROWS, &ANY);
    let mut rng = case.rng();
    let mut bed = Bed::new(backend, case.model.clone());
    bed.prefill(&whole);
    let mut done = 0;
    while done < member.tree.nodes() {
        let nodes = (done + 1 + rng.below(20)).min(member.tree.nodes());
        let step = Batch { members: vec![Member { tree: member.tree.first(nodes), done, ..member.clone() }] };
        let outputs = bed.decode(&step, compiled_rows(step.rows()), &ANY);
        for node in done..nodes {
            same_row("one pass against several", (&at_once, node), (&outputs, node - done))?;
        }
        done = nodes;
    }
    Ok(())
}

/// A request gives the same bits alone as beside others, in a pass of its size.
pub fn rows_are_independent_of_their_batch(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), rows_are_independent_of_their_batch_in_case)
}

pub fn rows_are_independent_of_their_batch_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let together = Bed::new(backend, case.model.clone()).verify(&case.batch, MAX_ROWS, &ANY);
    finite(&together)?;
    for (i, member) in case.batch.members.iter().enumerate() {
        let alone = Batch { members: vec![member.clone()] };
        let outputs = Bed::new(backend, case.model.clone()).verify(&alone, compiled_rows(alone.rows()), &ANY);
        for node in 0..member.tree.nodes() {
            let row = case.batch.first_row(i) + node;
            same_row(&format!("request {i} together and alone"), (&together, row), (&outputs, node))?;
        }
    }
    Ok(())
}

/// One row gives the same bits in passes compiled for any number of rows and nodes.
pub fn the_compiled_size_changes_nothing(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 2, cases(), |backend, case| any_compiled_size(backend, case.model, &case.batch.members[0]))
}

/// The same with large matrices.
pub fn the_compiled_size_of_a_wide_model_changes_nothing(backend: &mut dyn Backend) -> Property {
    WIDE_MODELS.iter().try_for_each(|&sizes| {
        let member = Member::new(&[3, 1, 4], Tree::chain(&[1]));
        any_compiled_size(backend, TinyModel { sizes, seed: 1 }, &member)
    })
}

/// The member's root alone.
pub(super) fn any_compiled_size(backend: &mut dyn Backend, model: TinyModel, member: &Member) -> Property {
    let root = Member { tree: Tree::chain(&member.tree.tokens[..1]), ..member.clone() };
    let batch = Batch { members: vec![root] };
    let mut bed = Bed::new(backend, model);
    let one = bed.verify(&batch, 1, &TreeSpec::Any(1));
    for rows in [2, 7, 16, 65, 256] {
        let more = bed.decode(&batch, rows, &TreeSpec::Any(rows));
        same_row(&format!("passes of 1 and {rows} rows"), (&one, 0), (&more, 0))?;
    }
    Ok(())
}

/// A pass compiled for one tree, and for a tree that this one begins, equals the pass for any tree.
pub fn a_static_tree_equals_any_tree(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), a_static_tree_equals_any_tree_in_case)
}

pub fn a_static_tree_equals_any_tree_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let batch = Batch { members: case.batch.members[..1].to_vec() };
    let tree = &batch.members[0].tree;
    let parents: Vec<u32> = tree.parents.iter().map(|&p| p as u32).collect();
    let exact = TreeShape::from_parents(&parents).map_err(|e| e.to_string())?;
    let mut specs = vec![exact.clone()];
    if exact.len() < MAX_NODES {
        let mut longer = exact;
        longer.push(0).map_err(|e| e.to_string())?;
        specs.push(longer);
    }
    let mut bed = Bed::new(backend, case.model.clone());
    let any = bed.verify(&batch, MAX_ROWS, &ANY);
    for spec in specs {
        let fixed = bed.decode(&batch, compiled_rows(spec.len()), &TreeSpec::Static(spec.clone()));
        for node in 0..tree.nodes() {
            same_row(&format!("static tree of {} nodes", spec.len()), (&any, node), (&fixed, node))?;
        }
    }
    Ok(())
}

/// A request that has no rows in a pass, as one that has ended since the batch was made, changes nothing for others,
/// whether it is the first of them, the last or between.
pub fn a_request_without_rows_is_passed_over(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 3, cases(), a_request_without_rows_is_passed_over_in_case)
}

pub fn a_request_without_rows_is_passed_over_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut bed = Bed::new(backend, case.model.clone());
    let before = bed.verify(&case.batch, MAX_ROWS, &ANY);
    for (ended, others) in case.batch.with_one_ended() {
        let after = bed.decode(&others, MAX_ROWS, &ANY);
        let (first, gone) = (case.batch.first_row(ended), case.batch.members[ended].rows());
        for row in 0..others.rows() {
            let row_before = if row < first { row } else { row + gone };
            same_row(&format!("request {ended} has ended"), (&before, row_before), (&after, row))?;
        }
    }
    Ok(())
}

/// A pass leaves nothing behind that its next run, on the same rows or others, would notice.
pub fn a_second_run_equals_the_first(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 3, cases(), a_second_run_equals_the_first_in_case)
}

pub fn a_second_run_equals_the_first_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut bed = Bed::new(backend, case.model.clone());
    let first = bed.verify(&case.batch, MAX_ROWS, &ANY);
    let mut other = Batch { members: case.batch.members[..1].to_vec() };
    other.members[0].tree = Tree::chain(&other.members[0].tree.tokens[..1]);
    bed.decode(&other, MAX_ROWS, &ANY);
    for _ in 0..2 {
        let again = bed.decode(&case.batch, MAX_ROWS, &ANY);
        (0..case.batch.rows()).try_for_each(|row| equal_row("again", (&first, row), (&again, row)))?;
    }
    Ok(())
}

/// What unwritten memory holds (NaN or zeros, in the cache, between ops, behind the last row) changes nothing.
pub fn unused_memory_never_leaks(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), unused_memory_never_leaks_in_case)
}

pub fn unused_memory_never_leaks_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let poisoned = Bed::new(backend, case.model.clone()).verify(&case.batch, MAX_ROWS, &ANY);
    finite(&poisoned)?;
    let mut bed = Bed::new(backend, case.model.clone());
    bed.clear(&case.model.pass(MAX_ROWS, &ANY, crate::tiny_model::Tail::Draw));
    let clean = bed.verify(&case.batch, MAX_ROWS, &ANY);
    (0..case.batch.rows()).try_for_each(|row| equal_row("NaN and zeros", (&poisoned, row), (&clean, row)))
}

//! Trees that the device grows from a parallel drafter's block.

use treespark::Sampling;
use treespark::backend::Backend;
use treespark_kernel_gen::layout::{HEADER_WORDS, accepted_words, report_words};
use treespark_kernel_gen::{BlockShape, Fill, MAX_NODES, Pass, Request, Role};

use super::agreement::Tolerance;
use super::{Property, same};
use crate::arb::HOUSE_MODELS;
use crate::batch::{Batch, Member, Tree};
use crate::bed::{Bed, POISON};
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::tiny_model::{MAX_ROWS, TinyModel};

/// What blocks of any size leave, op by op: rows, trellis and trees, of several requests that are at any point of their
/// way. A backend that leaves drafting to the host has nothing to show.
pub fn a_grown_block_equals_the_oracle(backend: &mut dyn Backend) -> Property {
    if !backend.drafts() {
        return Ok(());
    }
    let block = |rows, first| BlockShape { rows, first, fill: Fill::Mask(7) };
    // Block, most nodes, candidates, rank of the Markov head, hidden size, confidence head.
    let cases = [
        (block(7, 0), 64, 64, 64, 576, true),
        (block(7, 0), 16, 64, 64, 72, false),
        (block(16, 1), 64, 64, 0, 72, false),
        (block(5, 0), 32, 40, 24, 64, true),
        (block(2, 1), 64, 33, 200, 8, true),
        (block(1, 0), 8, 5, 8, 8, false),
        (BlockShape { rows: 5, first: 0, fill: Fill::State }, 64, 16, 0, 8, false),
    ];
    for (i, case) in cases.into_iter().enumerate() {
        // One that begins, goes on and ends; some; and several, with room for more.
        for (seed, (requests, room)) in [(1, 1), (1, 1), (1, 1), (3, 3), (3 + i, 3 + i + i % 3)].into_iter().enumerate()
        {
            let seed = (i * 100 + seed) as u64;
            drafts(backend, seed, (requests, room), case)
                .map_err(|problem| format!("{case:?}, {requests} requests in a room of {room}: {problem}"))?;
        }
    }
    Ok(())
}

/// The residual block of every row's head, of the row that its node names.
pub fn residual_blocks_equal_the_oracle(backend: &mut dyn Backend) -> Property {
    for (seed, sizes) in HOUSE_MODELS.iter().enumerate() {
        let model = TinyModel { sizes: *sizes, seed: seed as u64 };
        let mut rng = Rng::new(seed as u64);
        let member = |prefix: usize| Member::new(&vec![3; prefix], Tree::chain(&[0; 5]));
        let batch = Batch { members: vec![member(4), member(0), member(70)] };
        let pass = model.res_block_pass(batch.rows(), 5);
        let states: Vec<f32> = (0..MAX_ROWS * sizes.hidden).map(|_| rng.normal() as f32).collect();
        let mut oracle = Oracle::new();
        let [got, want] = [&mut *backend, &mut oracle as &mut dyn Backend].map(|backend| {
            let mut bed = Bed::new(backend, model.clone());
            bed.prepare(&pass);
            bed.write_floats("states", &states);
            bed.run(&pass, &batch);
            bed.floats("out", batch.rows() * sizes.hidden)
        });
        Tolerance::OP.compare(&format!("{sizes:?}"), &got, &want)?;
    }
    Ok(())
}

/// The values of sorted rows of `k`, where `order` says that they belong: equal values may stand in any order.
fn by_candidate(values: &[f32], order: &[u32], k: usize) -> Vec<f32> {
    let mut placed = vec![0.0; values.len()];
    for (i, (&value, &candidate)) in values.iter().zip(order).enumerate() {
        placed[i / k * k + candidate as usize % k] = value;
    }
    placed
}

/// A backend may end a tree once no further nodes can pay, which the oracle does not: blanks the nodes that it left out.
fn cut_alike(got: &mut [u32], want: &mut [u32], nodes: usize) -> Property {
    let (grown, most, pay) = (got[1], want[1], want[2]);
    if !(pay..=most).contains(&grown) {
        return Err(format!("a tree of {grown} nodes, expected {pay} to {most}"));
    }
    for report in [got, want] {
        report[1] = 0;
        for words in [0, 1, 4] {
            report[4 + words * nodes..][grown as usize..nodes].fill(0);
        }
    }
    Ok(())
}

type Sizes = (BlockShape, usize, usize, usize, usize, bool);

fn drafts(backend: &mut dyn Backend, seed: u64, (requests, room): (usize, usize), sizes: Sizes) -> Property {
    let (block, nodes, k, rank, hidden, confident) = sizes;
    let mut rng = Rng::new(seed + 77);
    let model = TinyModel { sizes: HOUSE_MODELS[0], seed };
    let vocab = model.sizes.vocab;
    let costs: Vec<f32> = (0..nodes).map(|n| 1.0 + n as f32 * [0.0, 0.02, 0.1][rng.below(3)]).collect();
    let pass = model.trellis_pass(block, room, &costs, [k, rank, hidden], confident);

    // Some had no rows, or more than a report can tell of; some are near their end, some are there. Those that there is room
    // for hold nothing of use.
    let mut accepted = vec![POISON; room * accepted_words(MAX_NODES)];
    let mut state = vec![POISON; room * report_words(nodes)];
    let mut members = Vec::new();
    for request in 0..requests {
        let prefix = rng.below(80);
        let n = [0, 1 + rng.below(block.depth()), 1 + rng.below(nodes), nodes + 9][rng.below(4)];
        let tree = Tree::chain(&vec![0; n.max(1) + rng.below(9)]);
        let words = &mut accepted[request * accepted_words(MAX_NODES)..];
        words[0] = n as u32;
        (0..n).for_each(|i| words[1 + i] = (tree.nodes() - n + i) as u32);
        (0..n).for_each(|i| words[1 + MAX_NODES + i] = rng.below(vocab) as u32);
        let left = [200, 200, 3, 1][rng.below(4)];
        state[request * report_words(nodes)] = (prefix + n + left) as u32;
        state[request * report_words(nodes) + 4] = rng.below(vocab) as u32;
        let temperature = [0.0, 0.6, 1.0][rng.below(3)];
        let sampling = Sampling { temperature, ..Sampling::default() };
        let done = if n == 0 { tree.nodes() } else { 0 };
        members.push(Member { sampling, done, ..Member::new(&vec![3; prefix], tree) });
    }
    let batch = Batch { members };
    let mut request_words = batch.request_words();
    request_words.resize(HEADER_WORDS + room * Request::WORDS, POISON);
    let ids: Vec<u32> = (0..room * block.rows)
        .flat_map(|_| {
            let mut tokens: Vec<u32> = (0..vocab as u32).collect();
            (0..k).for_each(|i| tokens.swap(i, i + rng.below(vocab - i)));
            tokens.truncate(k);
            tokens
        })
        .collect();
    let mut oracle = Oracle::new();
    let (mut right, mut tested) = (Bed::new(&mut oracle, model.clone()), Bed::new(backend, model));
    let mut numbers = |len: usize, scale: f64| (0..len).map(|_| (scale * rng.normal()) as f32).collect::<Vec<f32>>();
    let rows = room * block.rows;
    let (scores, states) = (numbers(rows * k, 2.0), numbers(rows * hidden, 1.0));
    let mut confidence = numbers(hidden + rank + 1, 1.0 / (hidden as f64).sqrt());
    let of_depth = |depth: f32| [1.0 / (1.0 + depth / 10.0), 1.1 - depth / 20.0];
    confidence.extend((0..block.depth()).flat_map(|depth| of_depth(depth as f32)));
    for bed in [&mut right, &mut tested] {
        bed.clear(&pass);
        bed.write("accepted", &accepted);
        bed.write("state", &state);
        bed.write("ids", &ids);
        bed.write_floats("scores", &scores);
        bed.write_floats("hidden", &states);
        if confident {
            bed.write_floats("confidence", &confidence);
        }
        bed.write("requests", &request_words);
    }
    for op in &pass.ops {
        let alone = Pass { ops: vec![op.clone()], ..pass.clone() };
        [&mut right, &mut tested].into_iter().for_each(|bed| bed.run_as_it_is(&alone, &batch));
        for desc in pass.buffers.iter().filter(|desc| desc.role != Role::Weight) {
            let what = format!("{}, after {}", desc.name, op.name());
            if desc.name == "trellis" {
                let sorted = [&mut tested, &mut right]
                    .map(|bed| (bed.floats("trellis", desc.len()), bed.words("order", desc.len())));
                let [got, want] = [&sorted[0], &sorted[1]].map(|(values, order)| by_candidate(values, order, k));
                Tolerance::OP.compare(&what, &got, &want)?;
                if let Some(row) = sorted[0].0.chunks(k).position(|row| !row.is_sorted_by(|a, b| a >= b)) {
                    return Err(format!("{what}: row {row} is not sorted"));
                }
                // From here on both follow the same numbers.
                let [_, (values, order)] = &sorted;
                tested.write_floats("trellis", values);
                tested.write("order", order);
            } else {
                let [mut got, mut want] = [&mut tested, &mut right].map(|bed| bed.words(&desc.name, desc.bytes() / 4));
                if desc.name == "state" && op.name() == "grow_trellis" && room == 1 {
                    cut_alike(&mut got, &mut want, nodes)?;
                }
                let width = desc.shape[desc.shape.len() - 1];
                for (index, (got, want)) in got.chunks(width).zip(want.chunks(width)).enumerate() {
                    same(&format!("{what}, {index}"), got, want)?;
                }
            }
        }
    }
    Ok(())
}

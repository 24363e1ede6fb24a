//! A draft model's tree, grown on the device.

use treespark::backend::Backend;
use treespark_kernel_gen::{MAX_NODES, TreeShape};

use super::{Property, same};
use crate::arb::{HOUSE_MODELS, Topology};
use crate::batch::{Batch, Member, Tree};
use crate::bed::Bed;
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::tiny_model::{MAX_REQUESTS, TinyModel};

/// Levels of every kind of shape: the tokens, the rows and the requests that growing them leaves, and nothing else. A
/// backend that leaves drafting to the host has nothing to show.
pub fn a_grown_level_equals_the_oracle(backend: &mut dyn Backend) -> Property {
    if !backend.drafts() {
        return Ok(());
    }
    let shaped =
        |text: &str| text.parse::<TreeShape>().expect("a shape").parents().iter().map(|&p| p as usize).collect();
    let mut rng = Rng::new(5);
    // Parents of every node, the requests, and levels to grow.
    let cases: [(Vec<usize>, usize, &[usize]); 8] = [
        (shaped("chain:40"), 3, &[1, 31, 32, 40]),
        (shaped("100"), MAX_REQUESTS, &[1]),
        (shaped("4x2x2x1"), MAX_REQUESTS, &[1, 2, 3, 4]),
        (shaped("2x2x2x2x2"), 2, &[4, 5]),
        // Leaves on every level, siblings apart, elder nodes without children.
        (shaped("parents:0,0,0,0,1,3,1,3,3,6,4,6,9"), 2, &[2, 3, 4]),
        (level_by_level(40, Topology::Recursive, &mut rng), 3, &[2, 4]),
        (level_by_level(70, Topology::Regular(3), &mut rng), 1, &[3, 4]),
        (level_by_level(MAX_NODES, Topology::Recursive, &mut rng), 1, &[3, 8]),
    ];
    for (parents, requests, depths) in cases {
        for &depth in depths {
            level(backend, &parents, requests, depth, &mut rng)
                .map_err(|problem| format!("level {depth} of {parents:?}, {requests} requests: {problem}"))?;
        }
    }
    Ok(())
}

/// Parents of a random tree whose nodes are in order of their depth.
fn level_by_level(nodes: usize, topology: Topology, rng: &mut Rng) -> Vec<usize> {
    let tree = Tree { parents: topology.parents(nodes, rng), tokens: vec![0; nodes] };
    let mut order: Vec<usize> = (0..nodes).collect();
    order.sort_by_key(|&node| tree.depth(node));
    tree.reordered(&order).parents
}

/// Grows the level of this depth. Its batch is what a pass over the level above was given.
fn level(backend: &mut dyn Backend, parents: &[usize], requests: usize, depth: usize, rng: &mut Rng) -> Property {
    let tree = Tree { parents: parents.to_vec(), tokens: vec![7; parents.len()] };
    let until = |depth: usize| (0..tree.nodes()).filter(|&node| tree.depth(node) <= depth).count();
    let (done, end) = (if depth > 1 { until(depth - 2) } else { 0 }, until(depth));
    let member = |_| {
        let prefix: Vec<u32> = vec![3; rng.below(100)];
        Member { done, ..Member::new(&prefix, tree.first(until(depth - 1))) }
    };
    let batch = Batch { members: (0..requests).map(member).collect() };

    let shape: Vec<u32> = parents[..end].iter().map(|&parent| parent as u32).collect();
    let most_children = (0..end).map(|node| (1..end).filter(|&n| parents[n] == node).count()).max().unwrap_or(0);
    let k = most_children + rng.below(3);
    let model = TinyModel { sizes: HOUSE_MODELS[0], seed: 0 };
    let pass = model.grow_pass(&TreeShape::from_parents(&shape).expect("a shape"), k);
    let ids: Vec<u32> = (0..batch.rows() * k).map(|_| rng.below(100_000) as u32).collect();

    let mut oracle = Oracle::new();
    let (mut right, mut tested) = (Bed::new(&mut oracle, model.clone()), Bed::new(backend, model));
    for bed in [&mut right, &mut tested] {
        bed.prepare(&pass);
        bed.write("ids", &ids);
        bed.run(&pass, &batch);
    }
    for desc in &pass.buffers {
        let [got, want] = [&mut tested, &mut right].map(|bed| bed.words(&desc.name, desc.len()));
        let width = desc.shape[desc.shape.len() - 1];
        for (index, (got, want)) in got.chunks(width).zip(want.chunks(width)).enumerate() {
            same(&format!("{}, {index}", desc.name), got, want)?;
        }
    }
    Ok(())
}

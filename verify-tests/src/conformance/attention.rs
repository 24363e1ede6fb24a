//! Attention alone, on what the host wrote: longer contexts and larger numbers than any prompt of a tiny model makes.

use treespark::backend::Backend;
use treespark_kernel_gen::DType;

use super::agreement::Tolerance;
use super::{Property, for_cases};
use crate::arb::{Case, cases};
use crate::attention::{Attention, Numbers};
use crate::batch::Batch;
use crate::rng::Rng;
use crate::tiny_model::Sizes;

/// Keys of a tile. Kernels cut a context of more than eight of them into chunks.
const TILE: usize = 64;
const LONG: usize = 8 * TILE;
const LONGEST: usize = 640;
/// Chunks count each other, and have to find the counters as they were.
const RUNS: usize = 3;

/// A request has a long context: beside others, and alone, where a small GPU cuts it in any case. Alone its numbers overflow
/// what has 16 bits.
pub fn long_contexts_and_large_numbers_equal_the_oracle(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 3, cases(), long_contexts_and_large_numbers_equal_the_oracle_in_case)
}

pub fn long_contexts_and_large_numbers_equal_the_oracle_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let (batch, alone) = with_long_context(&case.batch, &mut case.rng());
    let sizes = case.model.sizes;
    equals_the_oracle(backend, &Attention::new(sizes, &batch, Numbers::Usual, case.seed), Numbers::Usual)?;
    let sizes = Sizes { cache: DType::F16, ..sizes };
    equals_the_oracle(backend, &Attention::new(sizes, &alone, Numbers::Large, case.seed), Numbers::Large)
        .map_err(|problem| format!("large numbers: {problem}"))
}

/// Whatever the case, and however long.
pub fn attention_equals_the_oracle_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    equals_the_oracle(backend, &Attention::of(&case), Numbers::Usual)
}

fn equals_the_oracle(backend: &mut dyn Backend, attention: &Attention, numbers: Numbers) -> Property {
    let s = attention.sizes;
    // Large scores have fewer bits behind the point, and the weights with them.
    let rounding = 8.0 * f64::from(numbers.largest_score() * attention.scale) * 2f64.powi(-24);
    let tolerance = Tolerance { relative: Tolerance::attention(backend.info().backend, &s).relative + rounding };
    for (run, got) in attention.run(backend, RUNS).iter().enumerate() {
        for (at, (got, want)) in got.chunks(s.head_dim).zip(attention.out.chunks(s.head_dim)).enumerate() {
            tolerance.compare(&format!("run {run}, {}", attention.place(at)), got, want)?;
        }
    }
    Ok(())
}

/// Trees across the end of a tile, where some rows see nothing of the next; and one behind a long prefix, which is also
/// returned alone. What prefixes hold is of no matter here.
fn with_long_context(batch: &Batch, rng: &mut Rng) -> (Batch, Batch) {
    let mut batch = batch.clone();
    for member in &mut batch.members {
        member.tree = member.tree.first(member.tree.nodes().min(8));
        member.prefix = vec![0; TILE - rng.below(8)];
    }
    let long = rng.below(batch.members.len());
    batch.members[long].prefix = vec![0; LONG + rng.below(LONGEST - LONG - 8)];
    let alone = Batch { members: vec![batch.members[long].clone()] };
    (batch, alone)
}

//! Attention alone, on what the host wrote: longer contexts and larger numbers than any prompt of a tiny model makes.

use treespark::backend::Backend;
use treespark_kernel_gen::{DType, MAX_NODES, Op, Pass, TreeSpec};

use super::agreement::Tolerance;
use super::ops::alone;
use super::{Property, for_cases};
use crate::arb::{Case, cases};
use crate::batch::Batch;
use crate::bed::Bed;
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::tiny_model::{Sizes, Tail, TinyModel, compiled_rows};

/// Keys of a tile. Kernels cut a context of more than eight of them into chunks.
const TILE: usize = 64;
const LONG: usize = 8 * TILE;
const SLOTS: usize = 640;

/// One element of a query and of a key: their product is more than an f16 holds, and exact.
const LARGE_QUERY: f32 = 256.0;
const LARGE_KEY: f32 = 272.0;
/// Of values in f16, so that the sum of a few is.
const LARGE_VALUE: f32 = 20000.0;

/// A request has a long context: beside others, and alone, where a small GPU cuts it in any case. Alone its numbers overflow
/// what has 16 bits.
pub fn long_contexts_and_large_numbers_equal_the_oracle(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 3, cases(), long_contexts_and_large_numbers_equal_the_oracle_in_case)
}

pub fn long_contexts_and_large_numbers_equal_the_oracle_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let (batch, alone) = with_long_context(&case.batch, &mut case.rng());
    let sizes = Sizes { slots: SLOTS, layers: 1, ..case.model.sizes };
    let model = TinyModel { sizes, seed: case.seed };
    attention_equals_the_oracle(backend, &model, &batch, false)?;
    let model = TinyModel { sizes: Sizes { cache: DType::F16, ..sizes }, ..model };
    attention_equals_the_oracle(backend, &model, &alone, true).map_err(|problem| format!("large numbers: {problem}"))
}

/// It runs several times: chunks count each other, and have to find the counters as they were.
fn attention_equals_the_oracle(
    backend: &mut dyn Backend,
    model: &TinyModel,
    batch: &Batch,
    is_large: bool,
) -> Property {
    let whole = model.pass(compiled_rows(batch.rows()), &TreeSpec::Any(MAX_NODES), Tail::Draw);
    let op = whole.ops.iter().find(|op| matches!(op, Op::TreeAttention { .. })).expect("a model attends");
    let (pass, s) = (alone(&whole, op), model.sizes);
    let attended = |bed: &mut Bed| {
        bed.write_floats("attention", &vec![f32::NAN; batch.rows() * s.heads() * s.head_dim]);
        bed.run(&pass, batch);
        bed.floats("attention", batch.rows() * s.heads() * s.head_dim)
    };
    let mut oracle = Oracle::new();
    let mut right = Bed::new(&mut oracle, model.clone());
    write(&mut right, &pass, batch, is_large);
    let want = attended(&mut right);
    let tolerance = tolerance(backend, &s, is_large);
    let mut tested = Bed::new(backend, model.clone());
    write(&mut tested, &pass, batch, is_large);
    for run in 1..=3 {
        let got = attended(&mut tested);
        for (i, (got, want)) in got.chunks(s.head_dim).zip(want.chunks(s.head_dim)).enumerate() {
            let what = format!("run {run}, row {}, head {}", i / s.heads(), i % s.heads());
            tolerance.compare(&what, got, want)?;
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
    batch.members[long].prefix = vec![0; LONG + rng.below(SLOTS - LONG - 8)];
    let alone = Batch { members: vec![batch.members[long].clone()] };
    (batch, alone)
}

/// Queries, keys and values. Queries are multiples of an eighth, which tensor cores take as they are.
fn write(bed: &mut Bed, pass: &Pass, batch: &Batch, is_large: bool) {
    bed.prepare(pass);
    let (s, mut rng) = (bed.model.sizes, Rng::new(bed.model.seed));
    let mut element = |d: usize, large: f32| match is_large && d == 0 {
        true => large,
        false => (4.0 * rng.normal() as f32).round() / 8.0,
    };
    let vectors = (0..batch.rows() * s.heads()).flat_map(|_| 0..s.head_dim);
    let queries: Vec<f32> = vectors.map(|d| element(d, LARGE_QUERY)).collect();
    bed.write_floats("q", &queries);
    bed.fill_cache("k_cache", batch, &mut |d| element(d, LARGE_KEY));
    let (mean, spread) = if is_large { (LARGE_VALUE, LARGE_VALUE / 4.0) } else { (0.0, 1.0) };
    bed.fill_cache("v_cache", batch, &mut |_| mean + spread * rng.normal() as f32);
}

/// Large scores have fewer bits behind the point, and the weights with them.
fn tolerance(backend: &dyn Backend, sizes: &Sizes, is_large: bool) -> Tolerance {
    let largest = f64::from(LARGE_QUERY * LARGE_KEY) / (sizes.head_dim as f64).sqrt();
    let rounding = if is_large { 8.0 * largest * 2f64.powi(-24) } else { 0.0 };
    Tolerance { relative: Tolerance::attention(backend.info().backend, sizes).relative + rounding }
}

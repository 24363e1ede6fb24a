//! What a round does on the host: drawing a token, merging n-gram matches, growing and drawing trees.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use treespark::draft::Plan;
use treespark::draft::ngram::NgramDrafter;
use treespark_kernel_gen::TreeShape;

/// A text of a few hundred different tokens, in which phrases come again.
fn text(len: usize) -> Vec<u32> {
    (0..len).map(|i| ((i / 40 % 7) * 40 + i % 40 * (1 + i / 997)) as u32 % 600).collect()
}

fn shapes(c: &mut Criterion) {
    c.bench_function("parse 4x2x2x1 and derive its ancestors", |b| {
        b.iter(|| {
            let shape: TreeShape = black_box("4x2x2x1").parse().unwrap();
            (0..shape.len()).map(|node| shape.ancestors(node)[0]).fold(0, |a, b| a ^ b)
        })
    });
}

fn ngram(c: &mut Criterion) {
    let context = text(4096);
    let plan = Plan { shape: None, max_nodes: 64, max_depth: 64, reach: 64 };
    let mut drafter = NgramDrafter::default();
    drafter.continue_text(0, &context, &plan).unwrap();
    c.bench_function("n-gram tree of 64 nodes from 4096 tokens", |b| {
        b.iter(|| drafter.continue_text(0, black_box(&context), &plan).unwrap().tree.len())
    });
}

criterion_group!(host, shapes, ngram);
criterion_main!(host);

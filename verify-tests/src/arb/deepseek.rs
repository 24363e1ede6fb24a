//! Sizes of models with latents and experts.

use proptest::prelude::*;
use proptest::sample::select;
use treespark_kernel_gen::op::MAX_CHOSEN;

use super::weight_types;
use crate::tiny_model::{ExpertSizes, LatentSizes, Sizes};

/// Any that [`treespark_kernel_gen::Op::check`] admits, small; now and then with the latents of DeepSeek's own.
pub(super) fn sizes() -> impl Strategy<Value = Sizes> {
    (
        (select(vec![40usize, 97, 128]), select(vec![16usize, 24, 64, 72]), 1usize..=3),
        (select(vec![1usize, 2, 3, 5, 16, 17]), latents()),
        (select(vec![8usize, 24, 40]), prop_oneof![1 => Just(None), 3 => experts().prop_map(Some)]),
        (weight_types(), weight_types(), select(vec![4usize, 16, 64])),
    )
        .prop_map(
            |((vocab, hidden, layers), (group, (rank, latent)), (ffn, experts), (weights, cache, page_size))| {
                let (head_dim, latent) = (rank + latent.rotated, Some(latent));
                Sizes {
                    vocab,
                    hidden,
                    layers,
                    group,
                    head_dim,
                    ffn,
                    latent,
                    experts,
                    weights,
                    cache,
                    page_size,
                    ..Sizes::PLAIN
                }
            },
        )
}

/// Elements of a latent, and the rest.
fn latents() -> impl Strategy<Value = (usize, LatentSizes)> {
    let widths = prop_oneof![
        12 => (select(vec![8usize, 24, 32, 64]), select(vec![8usize, 16, 32])),
        1 => Just((512, 64)),
    ];
    let compressed = select(vec![0usize, 8, 24, 40]);
    (widths, compressed, select(vec![8usize, 16, 40]), select(vec![8usize, 16, 24])).prop_map(
        |((rank, rotated), compressed, nope_dim, value_dim)| {
            (rank, LatentSizes { compressed, nope_dim, rotated, value_dim })
        },
    )
}

/// Groups have two experts at least: V3's are worth their two best.
fn experts() -> impl Strategy<Value = ExpertSizes> {
    let groups = (select(vec![1usize, 2, 4]), 1..=4usize, select(vec![2usize, 3, 5, 8, 16]));
    (groups, 1..=MAX_CHOSEN, any::<bool>()).prop_map(|((groups, top_groups, of_group), chosen, is_v3)| {
        let top_groups = top_groups.min(groups);
        let chosen = chosen.min(top_groups * of_group);
        ExpertSizes { count: groups * of_group, chosen, groups, top_groups, is_v3 }
    })
}

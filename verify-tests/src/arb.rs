//! Generators of inputs: proptest strategies over a few small sizes and a seed, so that a failure shrinks to few nodes,
//! short prefixes and few requests.

use std::cell::RefCell;
use std::fmt::Debug;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use treespark::Sampling;
use treespark_kernel_gen::{DType, MAX_NODES};

use crate::batch::{Batch, Member, Tree};
use crate::rng::Rng;
use crate::tiny_model::{ExpertSizes, LatentSizes, MAX_REQUESTS, Sizes, TinyModel};

mod deepseek;

/// Which models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum Family {
    /// Grouped queries and MLPs.
    #[default]
    Llama,
    /// Latents, and mostly experts.
    Deepseek,
}

impl Family {
    /// Any sizes, or those of a few models, for which a backend compiles few kernels.
    pub fn sizes(self, wild: bool) -> BoxedStrategy<Sizes> {
        match (self, wild) {
            (Family::Llama, true) => sizes().boxed(),
            (Family::Llama, false) => select(HOUSE_MODELS.to_vec()).boxed(),
            (Family::Deepseek, true) => deepseek::sizes().boxed(),
            (Family::Deepseek, false) => select(DEEPSEEK_MODELS.to_vec()).boxed(),
        }
    }
}

/// A model and a batch for it.
#[derive(Debug, Clone)]
pub struct Case {
    pub model: TinyModel,
    pub batch: Batch,
    /// For whatever else the property chooses.
    pub seed: u64,
}

impl Case {
    pub fn rng(&self) -> Rng {
        Rng::new(self.seed)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topology {
    Chain,
    Star,
    /// Every node has this many children, level by level (breadth first).
    Regular(usize),
    /// Each node under a random earlier one.
    Recursive,
    /// The same in depth-first order.
    DepthFirst,
}

impl Topology {
    pub fn parents(self, nodes: usize, rng: &mut Rng) -> Vec<usize> {
        let mut parents = vec![0];
        for n in 1..nodes {
            parents.push(match self {
                Topology::Chain => n - 1,
                Topology::Star => 0,
                Topology::Regular(k) => (n - 1) / k,
                Topology::Recursive | Topology::DepthFirst => rng.below(n),
            });
        }
        if self == Topology::DepthFirst {
            let tree = Tree { tokens: vec![0; nodes], parents };
            let mut order: Vec<usize> = (0..nodes).collect();
            order.sort_by_key(|&n| tree.path(n));
            return tree.reordered(&order).parents;
        }
        parents
    }
}

fn tokens(n: usize, vocab: usize, rng: &mut Rng) -> Vec<u32> {
    (0..n).map(|_| rng.below(vocab) as u32).collect()
}

pub fn tree(nodes: usize, topology: Topology, vocab: usize, seed: u64) -> Tree {
    let rng = &mut Rng::new(seed);
    let parents = topology.parents(nodes, rng);
    // Sometimes few, so that siblings have equal tokens, which is legal.
    let distinct = if rng.below(3) == 0 { 3 } else { vocab };
    Tree { parents, tokens: tokens(nodes, distinct, rng) }
}

pub fn topologies() -> impl Strategy<Value = Topology> {
    use Topology::*;
    select(vec![Chain, Star, Regular(2), Regular(3), Recursive, DepthFirst])
}

/// Node counts around the edges of ancestor words and tiles; large ones rarely.
pub fn node_counts() -> impl Strategy<Value = usize> {
    prop_oneof![
        12 => select(vec![1usize, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33]),
        3 => select(vec![48usize, 63, 64, 65]),
        1 => select(vec![100usize, 128, 200, 256]),
    ]
}

/// Prefix lengths around the edges of pages (4, 16 and 64) and tiles.
pub fn prefix_lengths() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => select(vec![0usize, 1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]),
        1 => 0usize..150,
    ]
}

pub fn samplings() -> impl Strategy<Value = Sampling> {
    (
        (any::<u64>(), 0u32..4),
        select(vec![0.0f32, 0.2, 0.7, 1.0, 1.5]),
        select(vec![0u32, 1, 3, 20]),
        select(vec![1.0f32, 0.9, 0.5]),
        select(vec![0.0f32, 0.05, 0.2]),
        select(vec![1.0f32, 1.3, 0.8]),
    )
        .prop_map(|((seed, sample), temperature, top_k, top_p, min_p, repetition_penalty)| Sampling {
            sample,
            seed,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
        })
}

/// How many nodes are given: none, the root, a part of a prompt, and more than there are.
pub fn givens() -> impl Strategy<Value = usize> {
    prop_oneof![6 => Just(0usize), 1 => Just(1), 2 => 2usize..40, 1 => Just(MAX_NODES)]
}

/// How much is committed, and how large trees are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Scale {
    /// Little: many times faster.
    Small,
    /// Mostly little, now and then much.
    Usual,
    /// Trees beyond one ancestor word.
    Large,
    /// Thousands of committed tokens, now and then beside hardly any. Not for whole models.
    Long,
}

pub fn members(vocab: usize, scale: Scale) -> impl Strategy<Value = Member> {
    let lengths = match scale {
        Scale::Small => select(vec![0usize, 1, 3, 4, 5, 15, 16, 17]).boxed(),
        Scale::Usual | Scale::Large => prefix_lengths().boxed(),
        Scale::Long => {
            let edges = select(vec![511usize, 512, 513, 1023, 1024, 2047, 2048, 2049, 3000, 3900]);
            prop_oneof![2 => edges, 1 => 150usize..3900, 1 => 0usize..20].boxed()
        }
    };
    let counts = match scale {
        Scale::Small => select(vec![1usize, 2, 3, 5, 7, 8, 9]).boxed(),
        Scale::Usual => node_counts().boxed(),
        // The oracle takes a second for a large tree.
        Scale::Long => select(vec![1usize, 2, 3, 5, 7, 8, 9, 16, 17]).boxed(),
        Scale::Large => select(vec![31usize, 33, 63, 64, 65, 100, 128, 200, 256]).boxed(),
    };
    (lengths, counts, topologies(), any::<u64>(), samplings(), givens()).prop_map(
        move |(prefix, nodes, topology, seed, sampling, given)| Member {
            is_block: false,
            prefix: tokens(prefix, vocab, &mut Rng::new(seed ^ 1)),
            tree: tree(nodes, topology, vocab, seed).behind_a_chain(given),
            done: 0,
            given,
            sampling,
        },
    )
}

/// Up to [`MAX_REQUESTS`] requests with trees of at most 320 rows together.
pub fn batches(vocab: usize, scale: Scale) -> impl Strategy<Value = Batch> {
    prop::collection::vec(members(vocab, scale), 1..=MAX_REQUESTS)
        .prop_map(|members| Batch { members })
        .prop_filter("too many rows", |batch| batch.rows() <= crate::tiny_model::MAX_ROWS)
}

fn weight_types() -> impl Strategy<Value = DType> {
    select(vec![DType::BF16, DType::F16, DType::F32])
}

/// Any sizes that [`treespark_kernel_gen::Op::check`] admits, small.
fn sizes() -> impl Strategy<Value = Sizes> {
    (
        (select(vec![40usize, 97, 128]), select(vec![16usize, 24, 64, 72, 128]), 1usize..=2),
        (1usize..=2, select(vec![1usize, 2, 3, 5, 7]), select(vec![8usize, 16, 24, 32, 64, 128])),
        (select(vec![8usize, 40, 96]), any::<bool>(), any::<bool>()),
        (weight_types(), weight_types(), select(vec![4usize, 16, 64])),
    )
        .prop_map(
            |(
                (vocab, hidden, layers),
                (kv_heads, group, head_dim),
                (ffn, bias, qk_norm),
                (weights, cache, page_size),
            )| {
                Sizes {
                    vocab,
                    hidden,
                    layers,
                    kv_heads,
                    group,
                    head_dim,
                    ffn,
                    bias,
                    qk_norm,
                    latent: None,
                    experts: None,
                    weights,
                    cache,
                    page_size,
                }
            },
        )
}

/// A few models that between them have every head size, group, dtype, page size and option. Properties about structure
/// use these, so that a backend compiles few kernels.
#[rustfmt::skip]
pub const HOUSE_MODELS: [Sizes; 8] = [
    // Llama-like, grouped by 3 as SmolLM2 is.
    Sizes { vocab: 97, hidden: 64, layers: 2, kv_heads: 1, group: 3, head_dim: 32, ffn: 96, bias: false, qk_norm: false,
            weights: DType::BF16, cache: DType::F16, page_size: 16, ..Sizes::PLAIN },
    // Qwen2-like: biases, groups of 7.
    Sizes { vocab: 64, hidden: 48, layers: 2, kv_heads: 1, group: 7, head_dim: 16, ffn: 40, bias: true, qk_norm: false,
            weights: DType::F16, cache: DType::BF16, page_size: 4, ..Sizes::PLAIN },
    // Qwen3-like: norms of queries and keys, groups of 2.
    Sizes { vocab: 40, hidden: 64, layers: 2, kv_heads: 2, group: 2, head_dim: 64, ffn: 64, bias: false, qk_norm: true,
            weights: DType::F32, cache: DType::F32, page_size: 16, ..Sizes::PLAIN },
    // No grouping, everything on.
    Sizes { vocab: 97, hidden: 40, layers: 1, kv_heads: 2, group: 1, head_dim: 16, ffn: 24, bias: true, qk_norm: true,
            weights: DType::BF16, cache: DType::F32, page_size: 4, ..Sizes::PLAIN },
    // For tensor cores, which take heads of 64 and 128 in 16 bits: SmolLM2-like.
    Sizes { vocab: 97, hidden: 64, layers: 2, kv_heads: 2, group: 3, head_dim: 64, ffn: 128,
            bias: false, qk_norm: false, weights: DType::BF16, cache: DType::BF16, page_size: 16, ..Sizes::PLAIN },
    // Llama-3-like.
    Sizes { vocab: 128, hidden: 128, layers: 1, kv_heads: 1, group: 4, head_dim: 128, ffn: 64,
            bias: false, qk_norm: true, weights: DType::F16, cache: DType::F16, page_size: 64, ..Sizes::PLAIN },
    // Qwen2.5-0.5B-like.
    Sizes { vocab: 40, hidden: 64, layers: 1, kv_heads: 1, group: 7, head_dim: 64, ffn: 64, bias: true, qk_norm: false,
            weights: DType::BF16, cache: DType::F16, page_size: 16, ..Sizes::PLAIN },
    // No grouping, large pages.
    Sizes { vocab: 64, hidden: 64, layers: 2, kv_heads: 2, group: 1, head_dim: 128, ffn: 40,
            bias: false, qk_norm: false, weights: DType::F32, cache: DType::BF16, page_size: 64, ..Sizes::PLAIN },
];

/// Matrices that are large for a GPU of one multiprocessor: their kernels stream them. Attention of an f32 cache gives the
/// same bits in any pass, so the products must, too.
#[rustfmt::skip]
pub const WIDE_MODELS: [Sizes; 2] = [
    Sizes { vocab: 160, hidden: 512, layers: 1, kv_heads: 2, group: 2, head_dim: 64, ffn: 320, bias: false, qk_norm: true,
            weights: DType::BF16, cache: DType::F32, page_size: 16, ..Sizes::PLAIN },
    Sizes { vocab: 160, hidden: 512, layers: 1, kv_heads: 2, group: 2, head_dim: 64, ffn: 320, bias: true, qk_norm: false,
            weights: DType::F16, cache: DType::F32, page_size: 16, ..Sizes::PLAIN },
];

/// DeepSeek-like: latent attention with and without compressed queries, experts in groups or not.
#[rustfmt::skip]
pub const DEEPSEEK_MODELS: [Sizes; 4] = [
    Sizes { vocab: 97, hidden: 64, layers: 2, kv_heads: 1, group: 3, head_dim: 40, ffn: 24, bias: false, qk_norm: false,
            latent: Some(LatentSizes { compressed: 0, nope_dim: 16, rotated: 8, value_dim: 24 }), experts: None,
            weights: DType::BF16, cache: DType::BF16, page_size: 16 },
    Sizes { vocab: 64, hidden: 48, layers: 3, kv_heads: 1, group: 4, head_dim: 48, ffn: 40, bias: false, qk_norm: false,
            latent: Some(LatentSizes { compressed: 24, nope_dim: 24, rotated: 16, value_dim: 16 }),
            experts: Some(ExpertSizes { count: 12, chosen: 3, groups: 4, top_groups: 2, is_v3: true }),
            weights: DType::F16, cache: DType::F32, page_size: 4 },
    Sizes { vocab: 40, hidden: 64, layers: 2, kv_heads: 1, group: 16, head_dim: 576, ffn: 32, bias: false, qk_norm: false,
            latent: Some(LatentSizes { compressed: 0, nope_dim: 128, rotated: 64, value_dim: 128 }), experts: None,
            weights: DType::BF16, cache: DType::F16, page_size: 16 },
    Sizes { vocab: 64, hidden: 40, layers: 2, kv_heads: 1, group: 2, head_dim: 64, ffn: 32, bias: false, qk_norm: false,
            latent: Some(LatentSizes { compressed: 0, nope_dim: 32, rotated: 32, value_dim: 16 }),
            experts: Some(ExpertSizes { count: 40, chosen: 5, groups: 1, top_groups: 1, is_v3: false }),
            weights: DType::F32, cache: DType::F32, page_size: 64 },
];

/// The same with experts that are large for a GPU of one multiprocessor.
#[rustfmt::skip]
pub const WIDE_DEEPSEEK: Sizes =
    Sizes { vocab: 64, hidden: 512, layers: 1, kv_heads: 1, group: 2, head_dim: 40, ffn: 256, bias: false, qk_norm: false,
            latent: Some(LatentSizes { compressed: 0, nope_dim: 16, rotated: 8, value_dim: 24 }),
            experts: Some(ExpertSizes { count: 4, chosen: 2, groups: 1, top_groups: 1, is_v3: true }),
            weights: DType::BF16, cache: DType::F32, page_size: 16 };

/// A case on one of the [`HOUSE_MODELS`].
pub fn cases() -> impl Strategy<Value = Case> {
    cases_of(select(HOUSE_MODELS.to_vec()), Scale::Usual)
}

/// A case on one of the [`DEEPSEEK_MODELS`], counted around.
pub fn deepseek_cases(which: usize) -> impl Strategy<Value = Case> {
    cases_of(Just(DEEPSEEK_MODELS[which % DEEPSEEK_MODELS.len()]), Scale::Usual)
}

/// A case on any model of the Llama family.
pub fn wild_cases() -> impl Strategy<Value = Case> {
    cases_of(sizes(), Scale::Usual)
}

/// Cases of any model of a family, or of a few of them, at a scale.
pub fn some_cases(family: Family, wild: bool, scale: Scale) -> BoxedStrategy<Case> {
    cases_of(family.sizes(wild), scale).boxed()
}

/// What a property fails on, the smallest found, or none where it could not be made.
#[derive(Debug)]
pub struct Failure<T> {
    pub case: Option<Box<T>>,
    pub problem: String,
}

/// Makes case `index` of a seed and tries a property on it; a failing one shrinks, by so many steps at most. `seen` gets the
/// case as it was made.
pub fn attempt<T: Debug>(
    [seed, index]: [u64; 2],
    strategy: BoxedStrategy<T>,
    shrinks: u32,
    seen: &mut dyn FnMut(&T),
    property: &mut dyn FnMut(T) -> Result<(), String>,
) -> Result<(), Failure<T>> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&index.to_le_bytes());
    let config = Config { failure_persistence: None, max_shrink_iters: shrinks, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let none = |reason: String| Failure { case: None, problem: reason };
    let tree = strategy.new_tree(&mut runner).map_err(|reason| none(format!("no case was made: {reason}")))?;
    seen(&tree.current());
    let property = RefCell::new(property);
    match runner.run_one(tree, |case| (*property.borrow_mut())(case).map_err(TestCaseError::fail)) {
        Ok(_) => Ok(()),
        Err(TestError::Fail(reason, case)) => Err(Failure { case: Some(Box::new(case)), problem: reason.to_string() }),
        Err(TestError::Abort(reason)) => Err(none(reason.to_string())),
    }
}

fn cases_of(sizes: impl Strategy<Value = Sizes>, scale: Scale) -> impl Strategy<Value = Case> {
    (sizes, any::<u64>()).prop_flat_map(move |(sizes, seed)| {
        let model = TinyModel { sizes, seed };
        batches(sizes.vocab, scale).prop_map(move |batch| Case { model: model.clone(), batch, seed })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_topology_puts_parents_first() {
        use Topology::*;
        for topology in [Chain, Star, Regular(2), Regular(3), Recursive, DepthFirst] {
            for nodes in [1, 2, 33, 256] {
                let parents = topology.parents(nodes, &mut Rng::new(7));
                assert_eq!(parents.len(), nodes);
                assert!((1..nodes).all(|n| parents[n] < n), "{topology:?}: {parents:?}");
            }
        }
    }

    #[test]
    fn depth_first_order_keeps_subtrees_together() {
        let parents = Topology::DepthFirst.parents(64, &mut Rng::new(3));
        let tree = Tree { tokens: vec![0; 64], parents };
        // In depth-first order the parent of a node is an ancestor of the node before it.
        assert!((1..64).all(|n| tree.path(n - 1).contains(&tree.parents[n])));
    }

    #[test]
    fn the_house_models_cover_every_option() {
        let has = |f: &dyn Fn(&Sizes) -> bool| HOUSE_MODELS.iter().any(f);
        for dim in [16, 32, 64, 128] {
            assert!(has(&|s| s.head_dim == dim));
        }
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            assert!(has(&|s| s.cache == dtype) && has(&|s| s.weights == dtype));
        }
        assert!([1, 2, 3, 4, 7].iter().all(|&group| has(&|s| s.group == group)));
        assert!([4, 16, 64].iter().all(|&size| has(&|s| s.page_size == size)));
        assert!(has(&|s| s.bias) && has(&|s| s.qk_norm));
    }
}

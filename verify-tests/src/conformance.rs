//! The conformance suite: properties that every backend has, stamped onto each by [`conformance!`](crate::conformance!).
//!
//! A property is a plain function of a backend; its error shows the smallest failing case found. `agreement` says how
//! closely two runs on one backend agree (bit for bit, with one exception), and a backend and the oracle. The cases are
//! seeded: a failure repeats.
//!
//! Mistakes that kernels of this kind have had, here and elsewhere, and what would find them:
//!
//! | mistake | found by |
//! |---|---|
//! | ancestor bits off by one, by slot, only of the first word | `a_node_sees_exactly_its_root_path`, `edge_sizes` |
//! | a mask by slot order, a lower triangle | `node_order_changes_nothing`, `arb::topologies` |
//! | a page's end inside the tree; prefixes of -1, 0, 1 slots beyond a page | `arb::prefix_lengths`, `edge_sizes` |
//! | no prefix, one node, full trees, requests without rows | `edge_sizes`, `a_request_without_rows_*` |
//! | groups that are no power of two; packed rows 16, 64, 128, one more or less | `arb::HOUSE_MODELS`, `edge_sizes` |
//! | rows of two requests in one tile | `rows_are_independent_of_their_batch` |
//! | empty or fully masked parts (NaN), very different lengths in a batch | `edge_sizes` (1, 300 and 17 slots) |
//! | padding, freed pages, rows behind the last that leak | `unused_memory_never_leaks`, memory full of NaN (`bed`) |
//! | masks left over from the last run of a captured graph | `a_second_run_equals_the_first` |
//! | counters of chunks that the next run does not find at zero | `long_contexts_and_large_numbers_equal_the_oracle` |
//! | scores and sums that overflow 16 bits | `long_contexts_and_large_numbers_equal_the_oracle` |
//! | a pass that is compiled for more rows or requests than it gets | `the_compiled_size_changes_nothing` |
//! | a commit that overwrites what it has yet to read | `commit_moves_the_path_and_nothing_else` |
//! | positions by slot instead of depth | `a_node_sees_exactly_its_root_path` |
//! | equal siblings, children in any order, empty and full paths | `acceptance_equals_the_oracle` |
//! | a prompt's token doubted, a drawn one reported in its place | `acceptance_equals_the_oracle`, `arb::givens` |
//! | ties, the last token, a vocabulary that fills no tile | `ties_go_to_the_lowest_id`, `arb::HOUSE_MODELS` |
//! | tokens drawn that a grammar does not allow, NaN of their infinities | `a_masked_head_draws_what_is_allowed`, `draws_*` |
//! | a NaN among the logits | `a_nan_draws_no_token` |
//! | a block of which rows see only what comes before them | `a_block_sees_all_of_itself` |
//! | ranks over a level and not among siblings, continuations of another row or request | `a_grown_level_equals_the_oracle` |

pub mod agreement;
pub mod attention;
pub mod blocks;
pub mod commit;
pub mod deepseek;
pub mod draws;
pub mod growth;
pub mod masks;
pub mod ops;
pub mod structure;

use std::cell::RefCell;
use std::fmt::Debug;

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use treespark::backend::Backend;

use crate::arb::Case;
use crate::bed::Outputs;
use crate::cases::is_software;

/// Stamps the suite onto a backend: `conformance!(cpu, || Some(Box::new(CpuBackend::new(None))))` makes a module `cpu`
/// with one test for each property, or for each of those named behind. A constructor that returns `None` skips them, and
/// says why itself.
#[macro_export]
macro_rules! conformance {
    ($module:ident, $constructor:expr) => {
        $crate::conformance! { $module, $constructor,
            ops::every_op_equals_the_oracle
            ops::a_whole_round_equals_the_oracle
            ops::edge_sizes_equal_the_oracle
            ops::a_block_sees_all_of_itself
            attention::long_contexts_and_large_numbers_equal_the_oracle
            structure::a_chain_is_causal_attention
            structure::a_node_sees_exactly_its_root_path
            structure::node_order_changes_nothing
            structure::a_tree_may_grow_over_several_passes
            structure::rows_are_independent_of_their_batch
            structure::the_compiled_size_changes_nothing
            structure::a_static_tree_equals_any_tree
            structure::a_request_without_rows_is_passed_over
            structure::a_second_run_equals_the_first
            structure::unused_memory_never_leaks
            commit::acceptance_equals_the_oracle
            commit::commit_moves_the_path_and_nothing_else
            commit::a_request_without_rows_commits_nothing
            commit::commit_leaves_the_cache_of_plain_decoding
            commit::a_round_emits_what_plain_decoding_draws
            masks::a_mask_leaves_what_it_allows
            masks::a_masked_head_draws_what_is_allowed
            draws::draws_equal_the_oracle
            draws::a_large_vocabulary_draws_as_the_oracle_does
            draws::perturbed_logits_equal_the_oracle
            draws::a_head_ranks_what_it_leaves
            draws::draws_follow_their_distribution
            draws::ties_go_to_the_lowest_id
            draws::a_nan_draws_no_token
            draws::filters_keep_ties_at_their_threshold
            growth::a_grown_level_equals_the_oracle
            blocks::a_grown_block_equals_the_oracle
            blocks::residual_blocks_equal_the_oracle
        }
    };
    ($module:ident, $constructor:expr, $($file:ident :: $property:ident)*) => {
        mod $module {
            use super::*;
            $(
                #[test]
                fn $property() {
                    $crate::conformance::check($constructor, $crate::conformance::$file::$property);
                }
            )*
        }
    };
}

/// A property of one case.
pub type InCase = fn(&mut dyn Backend, Case) -> Property;

/// The one that takes prefixes of any length.
pub const ATTENTION: &str = "attention equals the oracle";

/// The properties that hold for any case, for whoever makes up cases of their own: the fuzzer.
pub const IN_ANY_CASE: [(&str, InCase); 23] = [
    (ATTENTION, attention::attention_equals_the_oracle_in_case),
    ("every op equals the oracle", ops::every_op_equals_the_oracle_in_case),
    (
        "long contexts and large numbers equal the oracle",
        attention::long_contexts_and_large_numbers_equal_the_oracle_in_case,
    ),
    ("a whole round equals the oracle", ops::a_whole_round_equals_the_oracle_in_case),
    ("a chain is causal attention", structure::a_chain_is_causal_attention_in_case),
    ("a node sees exactly its root path", structure::a_node_sees_exactly_its_root_path_in_case),
    ("node order changes nothing", structure::node_order_changes_nothing_in_case),
    ("a tree may grow over several passes", structure::a_tree_may_grow_over_several_passes_in_case),
    ("rows are independent of their batch", structure::rows_are_independent_of_their_batch_in_case),
    ("a static tree equals any tree", structure::a_static_tree_equals_any_tree_in_case),
    ("a request without rows is passed over", structure::a_request_without_rows_is_passed_over_in_case),
    ("a second run equals the first", structure::a_second_run_equals_the_first_in_case),
    ("unused memory never leaks", structure::unused_memory_never_leaks_in_case),
    ("acceptance equals the oracle", commit::acceptance_equals_the_oracle_in_case),
    ("commit moves the path and nothing else", commit::commit_moves_the_path_and_nothing_else_in_case),
    ("a request without rows commits nothing", commit::a_request_without_rows_commits_nothing_in_case),
    ("commit leaves the cache of plain decoding", commit::commit_leaves_the_cache_of_plain_decoding_in_case),
    ("a round emits what plain decoding draws", commit::a_round_emits_what_plain_decoding_draws_in_case),
    ("draws equal the oracle", draws::draws_equal_the_oracle_in_case),
    ("a NaN draws no token", draws::a_nan_draws_no_token_in_case),
    ("perturbed logits equal the oracle", draws::perturbed_logits_equal_the_oracle_in_case),
    ("a mask leaves what it allows", masks::a_mask_leaves_what_it_allows_in_case),
    ("a masked head draws what is allowed", masks::a_masked_head_draws_what_is_allowed_in_case),
];

/// What a property finds: nothing, or the smallest failing case and what is wrong with it.
pub type Property = Result<(), String>;

/// One test of the suite: the property on a fresh backend, if there is one.
pub fn check(constructor: impl FnOnce() -> Option<Box<dyn Backend>>, property: fn(&mut dyn Backend) -> Property) {
    let Some(mut backend) = constructor() else { return };
    if let Err(problem) = property(&mut *backend) {
        panic!("{}: {problem}", backend.info().name);
    }
}

/// Runs a property on `n` cases of a strategy; the error shows the smallest failing one. The CPU backend, which has
/// no kernels to compile, takes ten times as many, a GPU in software half.
pub fn for_cases<T: Debug>(
    backend: &mut dyn Backend,
    n: u32,
    strategy: impl Strategy<Value = T>,
    property: impl Fn(&mut dyn Backend, T) -> Property,
) -> Property {
    let cases = match backend.info() {
        info if info.backend == "cpu" => 10 * n,
        info if is_software(info) => n.div_ceil(2),
        _ => n,
    };
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 100, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let backend = RefCell::new(backend);
    runner
        .run(&strategy, |case| property(&mut **backend.borrow_mut(), case).map_err(TestCaseError::fail))
        .map_err(|error| error.to_string())
}

/// `Err` unless the two lists of floats are equal bit for bit.
pub fn same_bits(what: &str, a: &[f32], b: &[f32]) -> Property {
    if a.len() != b.len() {
        return Err(format!("{what}: {} numbers against {}", a.len(), b.len()));
    }
    match (0..a.len()).find(|&i| a[i].to_bits() != b[i].to_bits()) {
        Some(i) => Err(format!("{what}[{i}]: {:e} against {:e}, difference {:e}", a[i], b[i], a[i] - b[i])),
        None => Ok(()),
    }
}

pub fn same<T: PartialEq + Debug>(what: &str, a: T, b: T) -> Property {
    if a == b { Ok(()) } else { Err(format!("{what}: {a:?} against {b:?}")) }
}

/// `Err` if a logit is not a number.
pub fn finite(outputs: &Outputs) -> Property {
    match outputs.logits.iter().position(|row| row.iter().any(|x| !x.is_finite())) {
        Some(row) => Err(format!("row {row} has a logit that is not finite: memory leaked that no row owns")),
        None => Ok(()),
    }
}

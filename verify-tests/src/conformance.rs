//! The conformance suite: properties that every backend has, stamped onto each by [`conformance!`](crate::conformance!).
//!
//! A property is a plain function of a backend; its error shows the smallest failing case found. Where the
//! definition promises equality of two runs on one backend, bits are compared; where a backend is compared with the
//! oracle, [`Tolerance`] says how closely. The cases are seeded: a failure repeats.

pub mod commit;
pub mod draws;
pub mod ops;
pub mod structure;

use std::cell::RefCell;
use std::fmt::Debug;

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use treespark::backend::Backend;
use treespark_kernel_gen::DType;

use crate::bed::Outputs;
use crate::tiny_model::Sizes;

/// Stamps the suite onto a backend: `conformance!(cpu, || Some(Box::new(CpuBackend::new(None))))` makes a module `cpu`
/// with one test for each property. A constructor that returns `None` skips them, and says why itself.
#[macro_export]
macro_rules! conformance {
    ($module:ident, $constructor:expr) => {
        mod $module {
            use super::*;
            $crate::conformance!(@tests ($constructor)
                ops::every_op_equals_the_oracle
                ops::a_whole_round_equals_the_oracle
                ops::edge_sizes_equal_the_oracle
                structure::a_chain_is_causal_attention
                structure::a_node_sees_exactly_its_root_path
                structure::node_order_changes_nothing
                structure::a_tree_may_grow_over_several_passes
                structure::rows_are_independent_of_their_batch
                structure::the_compiled_size_changes_nothing
                structure::a_static_tree_equals_any_tree
                structure::unused_memory_never_leaks
                commit::acceptance_equals_the_oracle
                commit::commit_leaves_the_cache_of_plain_decoding
                commit::a_round_emits_what_plain_decoding_draws
                draws::draws_equal_the_oracle
                draws::draws_follow_their_distribution
                draws::ties_go_to_the_lowest_id
                draws::a_nan_draws_no_token
                draws::filters_keep_ties_at_their_threshold
            );
        }
    };
    (@tests ($constructor:expr) $($file:ident :: $property:ident)*) => {$(
        #[test]
        fn $property() {
            $crate::conformance::check($constructor, $crate::conformance::$file::$property);
        }
    )*};
}

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
/// no kernels to compile, takes ten times as many.
pub fn for_cases<T: Debug>(
    backend: &mut dyn Backend,
    n: u32,
    strategy: impl Strategy<Value = T>,
    property: impl Fn(&mut dyn Backend, T) -> Property,
) -> Property {
    let cases = if backend.info().backend == "cpu" { 10 * n } else { n };
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 100, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let backend = RefCell::new(backend);
    runner
        .run(&strategy, |case| property(&mut **backend.borrow_mut(), case).map_err(TestCaseError::fail))
        .map_err(|error| error.to_string())
}

/// How closely numbers must agree with the oracle's.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Relative to the largest magnitude among the row's numbers.
    pub relative: f64,
}

impl Tolerance {
    /// One op on equal inputs, result in f32. The sums have at most a few hundred terms of order 1, each rounded to 24
    /// bits: an error of sqrt(500) * 2^-24 = 1.3e-6 of the row's scale is expected, 500 * 2^-24 = 3e-5 the worst. GPUs
    /// add a few units in the last place for `exp` and division.
    pub const OP: Tolerance = Tolerance { relative: 2e-5 };

    /// Keys and values are rounded to the cache's dtype: a value that f32 error moved across a rounding boundary is one
    /// unit in the last place off.
    pub fn cache(dtype: DType) -> Tolerance {
        Tolerance { relative: Self::OP.relative + unit_in_last_place(dtype) }
    }

    /// Logits behind a few layers. Each op adds its error; and each cached value that falls to the other side of a
    /// rounding boundary one unit in the last place of its own, of which a softmax averages many: half a unit in all.
    pub fn logits(sizes: &Sizes) -> Tolerance {
        Tolerance { relative: 10.0 * Self::OP.relative + unit_in_last_place(sizes.cache) / 2.0 }
    }

    /// Compares the numbers of one row; NaN equals NaN.
    pub fn compare(&self, what: &str, got: &[f32], want: &[f32]) -> Property {
        let scale = want.iter().map(|x| f64::from(x.abs())).filter(|x| x.is_finite()).fold(0.0, f64::max);
        for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
            let close = (f64::from(g) - f64::from(w)).abs() <= self.relative * scale;
            if !close && g != w && !(g.is_nan() && w.is_nan()) {
                return Err(format!("{what}[{i}] is {g}, the oracle has {w} (scale {scale}, {self:?})"));
            }
        }
        Ok(())
    }
}

fn unit_in_last_place(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-10),
        DType::BF16 => 2f64.powi(-7),
        DType::F32 | DType::U32 => 0.0,
    }
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

/// `Err` unless row `a` of one run equals row `b` of another, bit for bit.
pub fn same_row(what: &str, (run_a, a): (&Outputs, usize), (run_b, b): (&Outputs, usize)) -> Property {
    same_bits(&format!("{what}: logits of rows {a} and {b}"), &run_a.logits[a], &run_b.logits[b])?;
    same(&format!("{what}: draws of rows {a} and {b}"), run_a.draws[a], run_b.draws[b])?;
    same(&format!("{what}: top ids of rows {a} and {b}"), &run_a.top_ids[a], &run_b.top_ids[b])?;
    same_bits(&format!("{what}: top values of rows {a} and {b}"), &run_a.top_values[a], &run_b.top_values[b])
}

/// `Err` if a logit is not a number.
pub fn finite(outputs: &Outputs) -> Property {
    match outputs.logits.iter().position(|row| row.iter().any(|x| !x.is_finite())) {
        Some(row) => Err(format!("row {row} has a logit that is not finite: memory leaked that no row owns")),
        None => Ok(()),
    }
}

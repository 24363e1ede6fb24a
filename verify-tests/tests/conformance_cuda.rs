//! The conformance suite on the CUDA backend, on the first NVIDIA GPU.

#![cfg(feature = "cuda")]

use treespark_verify_tests::arb::WIDE_MODELS;
use treespark_verify_tests::batch::{Member, Tree};
use treespark_verify_tests::conformance::structure;
use treespark_verify_tests::tiny_model::{Sizes, TinyModel};
use treespark_verify_tests::{cases, conformance};

conformance!(cuda, cases::nvidia);

/// Matrices that are large for an H100. The oracle would take minutes; that rows of any pass agree bit for bit needs none,
/// and `treespark-bench matmul` compares such products with f64.
#[test]
fn the_compiled_size_of_a_large_model_changes_nothing() {
    const LARGE: Sizes = Sizes { hidden: 4096, ffn: 2560, vocab: 5000, kv_heads: 8, group: 4, ..WIDE_MODELS[0] };
    let Some(mut backend) = cases::nvidia() else { return };
    let member = Member::new(&[3, 1, 4], Tree::chain(&[1]));
    structure::any_compiled_size(&mut *backend, TinyModel { sizes: LARGE, seed: 1 }, &member).unwrap();
}

//! Proof that the backends compute what they promise.
//!
//! In reading order: [`oracle`] (every op in plain f64 loops, the definition of right), [`rng`], [`batch`] and
//! [`tiny_model`] (inputs), [`arb`] (their generators), [`bed`] (runs a pass of a tiny model on any backend),
//! [`mod@conformance`] (the properties, stamped onto a backend by [`conformance!`]), [`logits`] and [`near_tie`] (are two
//! differing tokens excusable?), [`cases`] (what the losslessness tests run over), [`rules`] (acceptance rules, proved by
//! enumeration), [`decoding`] (whole generations on a [`shared`] backend, one drafter [`half_right`]), [`frequencies`] and
//! [`goodness`] (the law of their tokens), [`mutant`] and [`plants`] (known mistakes), [`attention`] (that op alone),
//! [`foreign`] (others' kernels), [`mod@cuda_on_cpu`] (CUDA without a GPU).

pub mod arb;
pub mod attention;
pub mod batch;
pub mod bed;
pub mod cases;
pub mod conformance;
pub mod cuda_on_cpu;
pub mod decoding;
pub mod foreign;
pub mod frequencies;
pub mod goodness;
pub mod half_right;
pub mod logits;
pub mod mutant;
pub mod near_tie;
pub mod oracle;
pub mod plants;
pub mod rng;
pub mod rules;
pub mod shared;
pub mod tiny_model;

//! The fuzzer's commands. Each returns whether all was right.

mod backends;
mod case;
mod coverage;
mod kernels;
pub mod mutants;
pub mod plot;
pub mod prove;
pub mod replay;
pub mod run;
pub mod soak;
pub mod stats;

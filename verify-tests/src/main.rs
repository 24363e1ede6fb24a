//! `treespark-fuzz`: attacks on verification. Proofs by enumeration, and random cases against the oracle.

mod fuzz;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about = "Attacks on the correctness of tree verification", after_help = EXAMPLES)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  treespark-fuzz prove
  treespark-fuzz run --backend cpu --seconds 60
  treespark-fuzz run --backend all --seconds 600 --seed 7
  treespark-fuzz rounds --seconds 60
  treespark-fuzz stats --backend cuda --workers 8
  treespark-fuzz mutants
  treespark-fuzz soak --seconds 60
  treespark-fuzz replay treespark-fuzz-cpu-7-1234.json

Exit status: 0 nothing was found, 1 something was, 2 it could not be run.";

#[derive(Subcommand)]
enum Command {
    /// Acceptance rules are lossless, by exact enumeration; known mistakes are not
    Prove(fuzz::prove::Args),
    /// Random models, trees and batches on a backend, against the f64 oracle
    #[command(after_help = fuzz::run::HELP)]
    Run(fuzz::run::Args),
    /// Whole generations of random models, speculative against plain
    #[command(after_help = fuzz::run::ROUNDS_HELP)]
    Rounds(fuzz::run::Args),
    /// The law of a million rounds' tokens against the target's
    Stats(fuzz::stats::Args),
    /// Plants known bugs and looks for them
    Mutants(fuzz::mutants::Args),
    /// A service under random load, with clients that leave: no wrong token, no page lost
    #[command(after_help = fuzz::soak::HELP)]
    Soak(fuzz::soak::Args),
    /// Runs a case again that `run` wrote
    Replay(fuzz::replay::Args),
}

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Prove(args) => fuzz::prove::run(&args),
        Command::Run(args) => fuzz::run::run(&args),
        Command::Rounds(args) => fuzz::run::rounds(&args),
        Command::Stats(args) => fuzz::stats::run(&args),
        Command::Mutants(args) => fuzz::mutants::run(&args),
        Command::Soak(args) => fuzz::soak::run(&args),
        Command::Replay(args) => fuzz::replay::run(&args),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("treespark-fuzz: {error:#}");
            ExitCode::from(2)
        }
    }
}

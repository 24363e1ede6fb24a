//! The report of proofs: every claim of the catalogue, what it must be and what was found.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use treespark_verify_tests::rules::catalogue::{self, Claim, Expected};
use treespark_verify_tests::rules::proof::{Verdict, decimal, largest, mean_tokens};

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Only claims whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// One JSON object a line instead of the table
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "Examples:
  treespark-fuzz prove
  treespark-fuzz prove --only 'two requests'
  treespark-fuzz prove --json | jq 'select(.ok | not)'

Every coin of a round is tossed every way, and probabilities are fractions: \"0\" is not rounded.
\"found\" is the largest total variation distance on the models here. \"expected\" of a mistake is the
distance that it was described with, on another model.";

struct Proof<'a> {
    claim: &'a Claim,
    verdicts: Vec<Verdict>,
    time: Duration,
}

pub fn run(args: &Args) -> Result<bool> {
    let wanted = |claim: &&Claim| args.only.as_ref().is_none_or(|text| claim.name.contains(text));
    let claims: Vec<&Claim> = catalogue::all().filter(wanted).collect();
    ensure!(!claims.is_empty(), "no claim has {:?} in its name", args.only.as_deref().unwrap_or_default());

    let start = Instant::now();
    let mut out = std::io::stdout();
    let mut wrong = 0;
    if !args.json {
        writeln!(out, "{HEAD}")?;
    }
    each_in_order(&claims, |proof| {
        wrong += usize::from(!proof.holds());
        let line = if args.json { proof.json().to_string() } else { proof.row() };
        Ok(writeln!(out, "{line}")?)
    })?;
    if !args.json {
        let verdict = if wrong == 0 { "as they must be".into() } else { format!("{wrong} WRONG") };
        writeln!(out, "{} claims, {verdict}, in {:.1} s", claims.len(), start.elapsed().as_secs_f64())?;
    }
    Ok(wrong == 0)
}

/// Proves on all cores, and hands over in the order of the claims.
fn each_in_order<'a>(claims: &[&'a Claim], mut report: impl FnMut(&Proof<'a>) -> Result<()>) -> Result<()> {
    let next = AtomicUsize::new(0);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let (send, proofs) = mpsc::channel();
        for _ in 0..cores.min(claims.len()) {
            let (send, next) = (send.clone(), &next);
            scope.spawn(move || {
                while let Some(claim) = claims.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let start = Instant::now();
                    let verdicts = claim.verdicts();
                    // Nobody listens any more if a line could not be printed.
                    let _ = send.send(Proof { claim, verdicts, time: start.elapsed() });
                }
            });
        }
        drop(send);
        let mut early = BTreeMap::new();
        for claim in claims {
            while !early.contains_key(claim.name) {
                let proof = proofs.recv()?;
                early.insert(proof.claim.name, proof);
            }
            report(&early[claim.name])?;
        }
        Ok(())
    })
}

const HEAD: &str = "\
claim, or mistake                                            expected  found  models  not 0  tokens  seconds";

impl Proof<'_> {
    fn holds(&self) -> bool {
        self.claim.holds(&self.verdicts)
    }

    fn rejected_on(&self) -> usize {
        self.verdicts.iter().filter(|verdict| !verdict.is_lossless()).count()
    }

    fn row(&self) -> String {
        let (expected, tokens) = match self.claim.expected {
            Expected::Lossless => ("0".into(), decimal(&mean_tokens(&self.verdicts))),
            Expected::Rejected(described) => (described.map_or("> 0".into(), |d| format!("{d:.3}")), String::new()),
        };
        let found = if self.rejected_on() == 0 { "0".into() } else { decimal(largest(&self.verdicts)) };
        format!(
            "{:60} {expected:>8} {found:>6} {:>7} {:>6} {tokens:>7} {:>8.1}  {}",
            self.claim.name,
            self.verdicts.len(),
            self.rejected_on(),
            self.time.as_secs_f64(),
            if self.holds() { "ok" } else { "WRONG" }
        )
    }

    fn json(&self) -> Value {
        let (expected, tokens) = match self.claim.expected {
            Expected::Lossless => (Some(0.0), Some(decimal(&mean_tokens(&self.verdicts)))),
            Expected::Rejected(described) => (described, None),
        };
        json!({
            "claim": self.claim.name,
            "lossless": self.claim.expected == Expected::Lossless,
            "expected": expected,
            "found": largest(&self.verdicts).to_string(),
            "models": self.verdicts.len(),
            "not_0": self.rejected_on(),
            "tokens_per_round": tokens.and_then(|tokens| tokens.parse::<f64>().ok()),
            "seconds": self.time.as_secs_f64(),
            "ok": self.holds(),
        })
    }
}

//! The law of speculative decoding at a temperature, at scale: are a million rounds' tokens the target's own?

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use treespark::backend::Backend;
use treespark::{Sampling, Statistics};
use treespark_kernel_gen::DType;
use treespark_models::dspark::MarkovKind;
use treespark_verify_tests::decoding::Guesser;
use treespark_verify_tests::frequencies::{ANSWER, Frequencies, Trial};
use treespark_verify_tests::goodness::{Fit, upper_tail};

use super::{backends, plot};

/// All tests together may reject a right program this often.
const LEVEL: f64 = 0.01;
/// Answers that a worker takes at a time.
const SHARE: u32 = 64;
/// Lines of the table of what fits worst.
const WORST: usize = 8;

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// cpu, wgpu, cuda or emulated
    #[arg(short, long, default_value = "cpu")]
    backend: String,
    /// Answers of four tokens for each of six trials; each takes two to three rounds
    #[arg(short, long, default_value_t = 70_000)]
    answers: u32,
    /// Equal seeds make equal answers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Answers at a time; on the CPU as many as it has cores, elsewhere 1
    #[arg(short, long)]
    workers: Option<usize>,
    /// Where stats.json (every test) and stats.svg (a plot of all p-values) are written
    #[arg(short, long, default_value = ".")]
    out: PathBuf,
}

const HELP: &str = "A tiny model of random weights answers one prompt many times at temperature 1, once as it is and once with top-k, top-p and min-p, with \
three drafters: DSpark, whose guesses see the noise of the target's own draws, Medusa, and a draft model. Behind every beginning of an answer \
that occurred often enough, the frequencies of the next token are tested against the target's law, which the f64 oracle says: Pearson's \
chi-square, Bonferroni-corrected over all tests, and total variation beside what chance alone gives.

Examples:
  treespark-fuzz stats --answers 5000
  treespark-fuzz stats --backend cuda --workers 8 --out record";

/// One test.
#[derive(Serialize)]
struct Test {
    drafter: &'static str,
    sampling: &'static str,
    /// Tokens before it, or nothing: all of this length together.
    beginning: Option<Vec<u32>>,
    length: usize,
    #[serde(flatten)]
    fit: Fit,
}

#[derive(Serialize)]
struct Report<'a> {
    device: &'a str,
    seed: u64,
    answers: u64,
    rounds: usize,
    drafts_accepted_per_round: f64,
    seconds: f64,
    level: f64,
    /// Below this, a p-value rejects.
    threshold: f64,
    least_p: f64,
    tests: &'a [Test],
}

pub fn run(args: &Args) -> Result<bool> {
    fs::create_dir_all(&args.out).with_context(|| format!("{}", args.out.display()))?;
    let start = Instant::now();
    let device = backends::open(&args.backend)?.info().name.clone();
    let trials = trials(args.seed);
    let (counted, statistics) = sample(args, &trials)?;
    let mut tests = Vec::new();
    for ((name, trial), frequencies) in trials.iter().zip(&counted) {
        tests.extend(tests_of(trial, name, frequencies));
    }
    tests.sort_by(|a, b| a.fit.p.total_cmp(&b.fit.p));
    let threshold = LEVEL / tests.len() as f64;
    let report = Report {
        device: &device,
        seed: args.seed,
        answers: u64::from(args.answers) * trials.len() as u64,
        rounds: statistics.rounds,
        drafts_accepted_per_round: statistics.new_tokens as f64 / statistics.rounds as f64 - 1.0,
        seconds: start.elapsed().as_secs_f64(),
        level: LEVEL,
        threshold,
        least_p: tests.first().map_or(1.0, |test| test.fit.p),
        tests: &tests,
    };
    let (json, svg) = (args.out.join("stats.json"), args.out.join("stats.svg"));
    fs::write(&json, serde_json::to_string(&report)? + "\n").with_context(|| format!("{}", json.display()))?;
    let p: Vec<f64> = tests.iter().map(|test| test.fit.p).collect();
    plot::p_values(&svg, &p, threshold).with_context(|| format!("{}", svg.display()))?;
    print(&report);
    println!("{} and {}", json.display(), svg.display());
    Ok(report.least_p >= threshold)
}

/// Every drafter with every sampling. With filters, numbers are of 32 bits: where a filter's edge lies must be known.
fn trials(seed: u64) -> Vec<(&'static str, Trial)> {
    let as_it_is = Sampling { temperature: 1.0, ..Sampling::default() };
    let filtered = Sampling { top_k: 12, top_p: 0.9, min_p: 0.05, ..as_it_is.clone() };
    let markov = Some((MarkovKind::Vanilla, 8));
    let guessers = [
        Guesser::Dspark { layers: 1, block: 4, first: 0, markov, confidence: Some(true), own: false },
        Guesser::Medusa { heads: 3, own: false },
        Guesser::Model { itself: true },
    ];
    let samplings =
        [("temperature 1", as_it_is, DType::BF16), ("top-k 12, top-p 0.9, min-p 0.05", filtered, DType::F32)];
    let mut trials = Vec::new();
    for guesser in &guessers {
        for (name, sampling, dtype) in &samplings {
            // Of equal seeds every drafter would give the same answers.
            let seed = seed.wrapping_mul(6).wrapping_add(trials.len() as u64);
            trials.push((*name, Trial::new(guesser.clone(), Sampling { seed, ..sampling.clone() }, *dtype)));
        }
    }
    trials
}

/// Answers, in shares that the workers take; what they count does not depend on who takes which.
fn sample(args: &Args, trials: &[(&'static str, Trial)]) -> Result<(Vec<Frequencies>, Statistics)> {
    let cores = || thread::available_parallelism().map_or(1, usize::from);
    let workers = args.workers.unwrap_or_else(|| if args.backend == "cpu" { cores() } else { 1 });
    let next = AtomicU32::new(0);
    let all = Mutex::new((vec![Frequencies::default(); trials.len()], Statistics::default()));
    let progress = indicatif::ProgressBar::new(u64::from(args.answers));
    let work = || -> Result<()> {
        let backend = backends::open(&args.backend)?;
        let samplers = trials.iter().map(|(_, trial)| trial.sampler(&backend)).collect::<Result<Vec<_>, String>>();
        let mut samplers = samplers.map_err(|problem| anyhow!(problem))?;
        loop {
            let first = next.fetch_add(SHARE, Ordering::Relaxed);
            let share = first..args.answers.min(first.saturating_add(SHARE));
            if share.is_empty() {
                break;
            }
            progress.inc(share.len() as u64);
            for sampler in &mut samplers {
                share.clone().try_for_each(|index| sampler.sample(index))?;
            }
        }
        let mut all = all.lock().expect("no worker panics");
        for (i, sampler) in samplers.iter().enumerate() {
            all.0[i].merge(&sampler.frequencies);
            all.1.rounds += sampler.statistics.rounds;
            all.1.new_tokens += sampler.statistics.new_tokens;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        handles.into_iter().try_for_each(|handle| handle.join().map_err(|_| anyhow!("a worker panicked"))?)
    })?;
    progress.finish_and_clear();
    Ok(all.into_inner().expect("no worker panicked"))
}

/// A test for each beginning, and one for all of a length together: small differences everywhere show there.
fn tests_of(trial: &Trial, sampling: &'static str, frequencies: &Frequencies) -> Vec<Test> {
    let drafter = trial.guesser().name();
    let fits = trial.fits(frequencies);
    let mut tests = Vec::new();
    for length in 0..ANSWER {
        let of_length: Vec<&Fit> =
            fits.iter().filter(|(beginning, _)| beginning.len() == length).map(|(_, fit)| fit).collect();
        if of_length.len() > 1 {
            let samples: u64 = of_length.iter().map(|fit| fit.samples).sum();
            let mean = |of: fn(&Fit) -> f64| {
                of_length.iter().map(|fit| of(fit) * fit.samples as f64).sum::<f64>() / samples as f64
            };
            let chi_square: f64 = of_length.iter().map(|fit| fit.chi_square).sum();
            let degrees = of_length.iter().map(|fit| fit.degrees).sum();
            let fit = Fit {
                samples,
                chi_square,
                degrees,
                p: upper_tail(chi_square, degrees),
                total_variation: mean(|fit| fit.total_variation),
                by_chance: mean(|fit| fit.by_chance),
            };
            tests.push(Test { drafter, sampling, beginning: None, length, fit });
        }
    }
    let single = fits.into_iter().map(|(beginning, fit)| {
        let length = beginning.len();
        Test { drafter, sampling, beginning: Some(beginning), length, fit }
    });
    tests.extend(single);
    tests
}

fn print(report: &Report) {
    println!("{}, seed {}", report.device, report.seed);
    println!(
        "{} answers, {} rounds, {:.2} drafts accepted a round, {:.0} s",
        report.answers, report.rounds, report.drafts_accepted_per_round, report.seconds
    );
    println!(
        "\n{:10} {:32} {:>7} {:>9} {:>8} {:>9} {:>9} {:>9}",
        "drafter", "sampling", "behind", "samples", "p", "TV", "by chance", "tests"
    );
    let mut together: Vec<&Test> =
        report.tests.iter().filter(|test| test.beginning.is_none() || test.length == 0).collect();
    together.sort_by_key(|test| (test.drafter, test.sampling, test.length));
    for test in together {
        let alike = |other: &&Test| {
            (other.drafter, other.sampling, other.length) == (test.drafter, test.sampling, test.length)
                && other.beginning.is_some()
        };
        let tests = report.tests.iter().filter(alike).count();
        let behind = format!("{} tok", test.length);
        let Fit { samples, p, total_variation, by_chance, .. } = &test.fit;
        println!(
            "{:10} {:32} {behind:>7} {samples:>9} {p:>8.4} {total_variation:>9.5} {by_chance:>9.5} {tests:>9}",
            test.drafter, test.sampling
        );
    }
    println!("\nthe worst of {} tests; below {:.1e}, one rejects:", report.tests.len(), report.threshold);
    for test in report.tests.iter().take(WORST) {
        let behind = test.beginning.as_ref().map_or("all together".into(), |tokens| format!("{tokens:?}"));
        let Fit { samples, chi_square, degrees, p, .. } = &test.fit;
        println!(
            "{p:>10.2e}  {:10} {:32} behind {behind}: chi-square {chi_square:.1} of {degrees} degrees, {samples} samples",
            test.drafter, test.sampling
        );
    }
    let verdict = if report.least_p >= report.threshold { "nothing is rejected" } else { "REJECTED" };
    println!("\n{verdict}: the least p is {:.2e}", report.least_p);
}

//! Differential fuzzing: random cases on a backend, against the oracle, or against itself where the law is that something
//! changes nothing.

use std::fs;
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::backends::{self, NAMES};
use super::case::{self, CaseId, Failure};
use super::coverage::Coverage;

/// Steps towards a smaller case, if nothing else is said.
pub const SHRINKS: u32 = 400;
/// Passes pile up in a backend: after so many cases a new one takes its place.
const CASES_OF_A_BACKEND: u64 = 500;

#[derive(clap::Args)]
pub struct Args {
    /// cpu, wgpu, cuda, emulated (CUDA's kernels on the CPU), or all that are here
    #[arg(short, long, default_value = "cpu")]
    backend: String,
    /// How long, for each backend
    #[arg(short, long, default_value_t = 60)]
    seconds: u64,
    /// Ends after so many cases, if that is earlier
    #[arg(long)]
    cases: Option<u64>,
    /// Equal seeds make equal cases
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The index of the first case
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Only properties (`run`) or drafters (`rounds`) whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Cases at a time; on the CPU as many as it has cores, elsewhere 1
    #[arg(short, long)]
    workers: Option<usize>,
    /// Ends at the first failure
    #[arg(long)]
    stop: bool,
    /// Steps towards a smaller case
    #[arg(long, default_value_t = SHRINKS)]
    shrinks: u32,
    /// Where failing cases are written
    #[arg(short, long, default_value = ".")]
    out: PathBuf,
}

pub const HELP: &str = "A case is a random model (heads, groups, sizes, types, page size; a quarter with DeepSeek's latents and experts), up \
to three requests (prefix, tree, sampling), and one of the properties that hold for any of them. Memory that nothing has written holds NaN. A failing case shrinks; the smallest one is printed \
with its trees, and a file is written that `replay` runs again.

Examples:
  treespark-fuzz run --seconds 600
  treespark-fuzz run --backend wgpu --only 'every op'
  treespark-fuzz run --backend all --seed 7 --out found";

pub const ROUNDS_HELP: &str = "A case is a random model, a drafter for it (repeats, one that knows half of the answer, a draft model, Medusa heads, \
DFlash, DSpark, an MTP module of its own), a tree or the drafter's own choice, a page size, and up to three questions (prompt, sampling, \
penalties, most tokens, a stop token or a stop string inside of what plain decoding says, a language that the answer must be in), one after the other or in turns, with fewer pages than they need. Tokens, text and \
end must be those of plain decoding, and these those of the f64 oracle; where a backend does not promise equal bits, up to a near-tie.

Examples:
  treespark-fuzz rounds --seconds 600
  treespark-fuzz rounds --backend cuda --only dspark";

/// Attacks passes, by the properties that hold for any case.
pub fn run(args: &Args) -> Result<bool> {
    attack(args, case::of_passes())
}

/// Attacks whole generations.
pub fn rounds(args: &Args) -> Result<bool> {
    attack(args, case::of_rounds())
}

fn attack(args: &Args, all: Vec<String>) -> Result<bool> {
    let properties = chosen(all, &args.only)?;
    fs::create_dir_all(&args.out).with_context(|| format!("{}", args.out.display()))?;
    let ended = std::sync::Arc::new(AtomicBool::new(false));
    let end = ended.clone();
    ctrlc::set_handler(move || end.store(true, Ordering::Relaxed))?;
    // What a property says of itself goes to the report; a panic of its own would be printed at every step of shrinking.
    panic::set_hook(Box::new(|_| {}));
    let (all, mut found) = (args.backend == "all", 0);
    // The make-believe driver must be the first that a process loads: it is attacked by itself.
    let names: Vec<&str> = if all { NAMES[..3].to_vec() } else { vec![&args.backend] };
    for name in names {
        match backends::open(name) {
            Ok(backend) => drop(backend),
            Err(why) if all => {
                eprintln!("{name}: left out, {why}");
                continue;
            }
            Err(why) => return Err(why),
        }
        found += Attack { args, name, properties: &properties, ended: &ended }.run()?;
    }
    Ok(found == 0)
}

/// Those whose name contains this.
pub fn chosen(mut properties: Vec<String>, only: &str) -> Result<Vec<String>> {
    let all = properties.join("; ");
    properties.retain(|name| name.contains(only));
    ensure!(!properties.is_empty(), "no property is called so: {all}");
    Ok(properties)
}

struct Attack<'a> {
    args: &'a Args,
    name: &'a str,
    properties: &'a [String],
    ended: &'a AtomicBool,
}

/// What workers share.
struct Shared {
    next: AtomicU64,
    done: AtomicU64,
    stop: AtomicBool,
    found: Mutex<usize>,
    coverage: Mutex<Coverage>,
}

impl Attack<'_> {
    /// Returns how many cases failed.
    fn run(&self) -> Result<usize> {
        let (start, args) = (Instant::now(), self.args);
        let shared = Shared {
            next: AtomicU64::new(args.first),
            done: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            found: Mutex::new(0),
            coverage: Mutex::new(Coverage::default()),
        };
        let cores = || thread::available_parallelism().map_or(1, usize::from);
        let workers = args.workers.unwrap_or_else(|| if self.name == "cpu" { cores() } else { 1 });
        println!("{}: {} properties, seed {}, {workers} workers", self.name, self.properties.len(), args.seed);
        thread::scope(|scope| -> Result<()> {
            let handles: Vec<_> = (0..workers).map(|_| scope.spawn(|| self.work(&shared))).collect();
            let mut told = Instant::now();
            while handles.iter().any(|handle| !handle.is_finished()) {
                thread::sleep(Duration::from_millis(50));
                let over = start.elapsed() >= Duration::from_secs(args.seconds) || self.ended.load(Ordering::Relaxed);
                shared.stop.fetch_or(over, Ordering::Relaxed);
                if told.elapsed() > Duration::from_secs(10) {
                    told = Instant::now();
                    eprintln!("{:>6.0} s: {}", start.elapsed().as_secs_f64(), rate(&shared, start));
                }
            }
            handles.into_iter().try_for_each(|handle| handle.join().expect("a worker catches what cases do"))
        })?;
        let found = *shared.found.lock().expect("no worker panics");
        print!("{}", shared.coverage.lock().expect("no worker panics").text());
        println!("{}: {}; {found} failed", self.name, rate(&shared, start));
        Ok(found)
    }

    fn work(&self, shared: &Shared) -> Result<()> {
        let (mut backend, mut coverage) = (backends::open(self.name)?, Coverage::default());
        while !shared.stop.load(Ordering::Relaxed) {
            let index = shared.next.fetch_add(1, Ordering::Relaxed);
            if self.args.cases.is_some_and(|cases| index >= self.args.first + cases) {
                break;
            }
            if index % CASES_OF_A_BACKEND == CASES_OF_A_BACKEND - 1 {
                coverage.add_runs(&backend);
                backend = backends::open(self.name)?;
            }
            let id = case::plan(self.name, self.args.seed, index, self.properties);
            let shrinks = self.args.shrinks;
            let result = case::run(&id, &mut backend, shrinks, &mut |sight| coverage.add(&id.property, sight));
            shared.done.fetch_add(1, Ordering::Relaxed);
            if let Err(failure) = result {
                *shared.found.lock().expect("no worker panics") += 1;
                report(&id, &failure, &self.args.out)?;
                shared.stop.fetch_or(self.args.stop, Ordering::Relaxed);
                // A panic may have left it in any state.
                coverage.add_runs(&backend);
                backend = backends::open(self.name)?;
            }
        }
        coverage.add_runs(&backend);
        coverage.add_runs(&backend);
        shared.coverage.lock().expect("no worker panics").merge(coverage);
        Ok(())
    }
}

fn rate(shared: &Shared, start: Instant) -> String {
    let (done, seconds) = (shared.done.load(Ordering::Relaxed), start.elapsed().as_secs_f64());
    format!("{done} cases in {seconds:.0} s, {:.0} a minute", done as f64 / seconds * 60.0)
}

/// Prints a failure, and writes what `replay` needs.
fn report(id: &CaseId, failure: &Failure, out: &Path) -> Result<()> {
    let file = out.join(format!("treespark-fuzz-{}-{}-{}.json", id.backend, id.seed, id.index));
    fs::write(&file, serde_json::to_string_pretty(id)? + "\n").with_context(|| format!("{}", file.display()))?;
    print(id, failure);
    println!("again: treespark-fuzz replay {}\n", file.display());
    Ok(())
}

/// The smallest failing case.
pub fn print(id: &CaseId, failure: &Failure) {
    println!("\nFAILED on {}: {} (seed {}, case {})", id.backend, id.property, id.seed, id.index);
    println!("{}", failure.problem);
    if let Some(case) = &failure.case {
        print!("the smallest case that fails:\n{case}");
    }
}

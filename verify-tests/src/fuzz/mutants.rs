//! Does the fuzzer find bugs? Known ones are planted around the CPU backend and into CUDA's kernels, one at a time, and
//! looked for.

use std::panic;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use treespark::cpu::CpuBackend;
use treespark_verify_tests::mutant::{Mistake, Mutant};
use treespark_verify_tests::plants::{Bug, NOT_PLANTED, PLANTS, Plant};
use treespark_verify_tests::shared::Shared;

use super::{case, kernels, run};

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// How long each is looked for
    #[arg(short, long, default_value_t = 60)]
    pub seconds: u64,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Only bugs of this class
    #[arg(long)]
    class: Option<usize>,
    /// By properties only whose name contains this
    #[arg(long, default_value = "")]
    pub only: String,
}

const HELP: &str = "Cases are those of `run`, on one core: on the CPU, or for bugs inside CUDA's kernels on these without a GPU, which must first pass \
some cases as they are (what they need is compiled then: minutes, once). Printed are the class of each bug, how long it took to find, after how many \
cases, and by which property.

Examples:
  treespark-fuzz mutants
  treespark-fuzz mutants --class 14 --seconds 10";

/// How a bug was found.
pub struct Found {
    /// None where it ended the process.
    pub cases: Option<u64>,
    pub by: String,
}

pub fn run(args: &Args) -> Result<bool> {
    panic::set_hook(Box::new(|_| {}));
    let properties = run::chosen(case::of_passes(), &args.only)?;
    let mut plants: Vec<&Plant> =
        PLANTS.iter().filter(|plant| args.class.is_none_or(|class| class == plant.class)).collect();
    let is_inside = |plant: &&Plant| matches!(plant.bug, Bug::Inside(_));
    if plants.iter().any(is_inside) && !kernels_are_right(args)? {
        plants.retain(|plant| !is_inside(plant));
    }
    println!("{:>5}  {:52} {:>8} {:>7}  found by", "class", "planted", "seconds", "cases");
    let mut missed = 0;
    for Plant { class, what, bug } in &plants {
        let start = Instant::now();
        let found = match *bug {
            Bug::Around(mistake) => hunt(mistake, &properties, args),
            Bug::Inside(change) => kernels::hunt(change, args)?,
        };
        let seconds = start.elapsed().as_secs_f64();
        missed += usize::from(found.is_none());
        let (cases, by) = found.map_or((None, "NOT FOUND".into()), |found| (found.cases, found.by));
        let cases = cases.map_or(String::new(), |cases| cases.to_string());
        println!("{class:>5}  {what:52} {seconds:>8.2} {cases:>7}  {by}");
    }
    println!("{} of {} found", plants.len() - missed, plants.len());
    for (class, why) in NOT_PLANTED {
        println!("{class:>5}  not planted: {why}");
    }
    Ok(missed == 0)
}

/// Whether bugs can be planted into them: `false`, with a printed reason, where they cannot be run.
fn kernels_are_right(args: &Args) -> Result<bool> {
    let start = Instant::now();
    match kernels::control(args) {
        Ok(Some(found)) => bail!("CUDA's kernels as they are, on the CPU: {}", found.by),
        Ok(None) => {
            let (cases, seconds) = (kernels::CONTROL, start.elapsed().as_secs_f64());
            println!("CUDA's kernels as they are, on the CPU: {cases} cases in {seconds:.0} s, nothing found");
            Ok(true)
        }
        Err(why) => {
            eprintln!("bugs inside CUDA's kernels are left out: {why}");
            Ok(false)
        }
    }
}

fn hunt(mistake: Mistake, properties: &[String], args: &Args) -> Option<Found> {
    let start = Instant::now();
    let mut index = 0;
    while start.elapsed() < Duration::from_secs(args.seconds) {
        let id = case::plan("cpu", args.seed, index, properties);
        let mut backend = Shared::new(Box::new(Mutant::new(Box::new(CpuBackend::new(Some(1))), mistake)));
        index += 1;
        if case::run(&id, &mut backend, 0, &mut |_| {}).is_err() {
            return Some(Found { cases: Some(index), by: id.property });
        }
    }
    None
}

//! Does the fuzzer find bugs? Known ones are planted into the CPU backend, one at a time, and looked for.

use std::panic;
use std::time::{Duration, Instant};

use anyhow::Result;
use treespark::cpu::CpuBackend;
use treespark_verify_tests::mutant::Mutant;
use treespark_verify_tests::plants::{NOT_PLANTED, PLANTS, Plant};
use treespark_verify_tests::shared::Shared;

use super::case::{self, CaseId};

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// How long each is looked for
    #[arg(short, long, default_value_t = 60)]
    seconds: u64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Only bugs of this class
    #[arg(long)]
    class: Option<usize>,
}

const HELP: &str = "Cases are those of `run --backend cpu`, on one core. Printed are the class of each bug, how long it took to find, after how many \
cases, and by which property.

Examples:
  treespark-fuzz mutants
  treespark-fuzz mutants --class 14 --seconds 10";

pub fn run(args: &Args) -> Result<bool> {
    panic::set_hook(Box::new(|_| {}));
    let plants: Vec<&Plant> =
        PLANTS.iter().filter(|plant| args.class.is_none_or(|class| class == plant.class)).collect();
    println!("{:>5}  {:50} {:>8} {:>7}  found by", "class", "planted", "seconds", "cases");
    let mut missed = 0;
    for plant in &plants {
        let start = Instant::now();
        let found = hunt(plant, args.seed, Duration::from_secs(args.seconds));
        let seconds = start.elapsed().as_secs_f64();
        match found {
            Some(CaseId { index, property, .. }) => {
                println!("{:>5}  {:50} {seconds:>8.2} {:>7}  {property}", plant.class, plant.what, index + 1);
            }
            None => {
                missed += 1;
                println!("{:>5}  {:50} {seconds:>8.2} {:>7}  NOT FOUND", plant.class, plant.what, "");
            }
        }
    }
    println!("{} of {} found", plants.len() - missed, plants.len());
    for (class, why) in NOT_PLANTED {
        println!("{class:>5}  not planted: {why}");
    }
    Ok(missed == 0)
}

fn hunt(plant: &Plant, seed: u64, limit: Duration) -> Option<CaseId> {
    let (start, properties) = (Instant::now(), case::of_passes());
    let mut index = 0;
    while start.elapsed() < limit {
        let id = case::plan("cpu", seed, index, &properties);
        let mutant = Mutant::new(Box::new(CpuBackend::new(Some(1))), plant.mistake);
        let mut backend = Shared::new(Box::new(mutant));
        if case::run(&id, &mut backend, 0, &mut |_| {}).is_err() {
            return Some(id);
        }
        index += 1;
    }
    None
}

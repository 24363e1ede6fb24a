//! Bugs inside CUDA's kernels, which run on the CPU. Each is looked for by a process of its own: a process loads kernels once,
//! and a bug may end it.

use std::path::Path;
use std::process::{self, Command, Output};
use std::{env, fs};

use anyhow::{Context, Result, anyhow, bail, ensure};
use treespark_verify_tests::cuda_on_cpu::{BY, REPLACE, places_in_kernels};
use treespark_verify_tests::plants::Change;

use super::case::CaseId;
use super::mutants::{Args, Found};

/// Cases that the kernels must pass as they are; what these need is compiled then, and in no bug's time.
pub const CONTROL: u64 = 4;

pub fn control(args: &Args) -> Result<Option<Found>> {
    attack(args, &["--cases", &CONTROL.to_string(), "--seconds", "3600"], &[])
}

pub fn hunt(change: Change, args: &Args) -> Result<Option<Found>> {
    let places = places_in_kernels(change.replace).map_err(|why| anyhow!(why))?;
    ensure!(places == 1, "{places} places of the kernels have `{}`", change.replace);
    attack(args, &["--seconds", &args.seconds.to_string()], &[(REPLACE, change.replace), (BY, change.by)])
}

fn attack(args: &Args, until: &[&str], planted: &[(&str, &str)]) -> Result<Option<Found>> {
    let out = env::temp_dir().join(format!("treespark-fuzz-mutants-{}", process::id()));
    let mut command = Command::new(env::current_exe()?);
    command.args(["run", "--backend", "emulated", "--stop", "--shrinks", "0"]);
    command.args(["--seed", &args.seed.to_string(), "--only", &args.only]);
    command.args(until).arg("--out").arg(&out).envs(planted.iter().copied());
    let found = found(&command.output()?, &out);
    drop(fs::remove_dir_all(&out));
    found
}

fn found(output: &Output, out: &Path) -> Result<Option<Found>> {
    let [text, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    if let Some(line) = text.lines().find(|line| line.contains("does not compile")) {
        bail!("{line}");
    }
    match output.status.code() {
        Some(0) => Ok(None),
        Some(1) => {
            let file = fs::read_dir(out)?.next().context("a failing case has a file")??.path();
            let id: CaseId = serde_json::from_str(&fs::read_to_string(file)?)?;
            Ok(Some(Found { cases: Some(id.index + 1), by: id.property }))
        }
        Some(_) => bail!("{}", errors.trim()),
        // The emulation ends a process whose kernel does what a GPU would leave undefined, and says so.
        None => Ok(Some(Found { cases: None, by: errors.lines().last().unwrap_or("the process ended").to_string() })),
    }
}

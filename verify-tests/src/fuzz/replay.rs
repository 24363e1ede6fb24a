//! A failing case again.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::case::{self, CaseId};
use super::{backends, run};

#[derive(clap::Args)]
pub struct Args {
    /// What `run` wrote
    file: PathBuf,
    /// On another backend than it failed on
    #[arg(short, long)]
    backend: Option<String>,
}

pub fn run(args: &Args) -> Result<bool> {
    let path = args.file.display();
    let text = fs::read_to_string(&args.file).with_context(|| format!("{path}"))?;
    let id: CaseId = serde_json::from_str(&text).with_context(|| format!("{path} holds no case of `run`"))?;
    let mut backend = backends::open(args.backend.as_ref().unwrap_or(&id.backend))?;
    match case::run(&id, backend.as_mut(), run::SHRINKS, &mut |case| {
        print!("the case as it was made:\n{}", case::describe(case))
    }) {
        Ok(()) => println!("{}: nothing wrong, on {}", id.property, backend.info().name),
        Err(failure) => {
            run::print(&id, &failure);
            return Ok(false);
        }
    }
    Ok(true)
}

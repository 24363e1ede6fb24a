//! A failing case again.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use treespark::backend::Backend;

use super::case::{self, CaseId, Sight};
use super::{backends, run};

#[derive(clap::Args)]
pub struct Args {
    /// What `run` or `rounds` wrote
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
    let name = backend.info().name.clone();
    match case::run(&id, &mut backend, run::SHRINKS, &mut |sight| match sight {
        Sight::Case(case) => print!("the case as it was made:\n{}", case::describe(case)),
        Sight::Decoding(decoding) => print!("the case as it was made:\n{}", decoding.describe()),
        Sight::Decoded(seen) => println!("{seen:?}"),
    }) {
        Ok(()) => println!("{}: nothing wrong, on {name}", id.property),
        Err(failure) => {
            run::print(&id, &failure);
            return Ok(false);
        }
    }
    Ok(true)
}

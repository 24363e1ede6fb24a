//! The command line. Standard output carries what was asked for (generated text, a table) and nothing else;
//! everything else goes to standard error.

mod args;
mod bench_serve;
mod chat;
mod devices;
mod eval;
mod generate;
mod progress;
mod serve;
mod show_tree;

use std::fs::OpenOptions;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Parser;

use args::{Args, Command};

/// What a command that ended by Ctrl-C returns, as shells expect.
const INTERRUPTED: u8 = 130;

/// How a command ended.
enum Outcome {
    Done,
    Interrupted,
}

pub fn main() -> ExitCode {
    let interrupted = Interrupt::install();
    let outcome = match Args::parse().command {
        Command::Generate(args) => generate::run(&args, &interrupted),
        Command::Chat(args) => chat::run(&args, &interrupted),
        Command::Serve(args) => serve::run(&args, &interrupted),
        Command::Devices => devices::run(),
        Command::Eval(args) => eval::run(&args, &interrupted),
        Command::BenchServe(args) => bench_serve::run(&args, &interrupted),
        Command::Tree(args) => show_tree::draw_shape(&args.shape),
    };
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(INTERRUPTED),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            anstream::eprintln!("{}error:{} {error:#}", args::ERROR.render(), args::ERROR.render_reset());
            ExitCode::FAILURE
        }
    }
}

/// Whoever read our output has had enough of it.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}

/// A file that cannot be written is known before the long work.
fn check_writable(option: &str, path: &Path) -> anyhow::Result<()> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.with_context(|| format!("{option}: {} cannot be written", path.display()))?;
    Ok(())
}

/// Ctrl-C: asked for between rounds, so that a generation ends cleanly.
#[derive(Clone)]
struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    fn install() -> Interrupt {
        let flag = Arc::new(AtomicBool::new(false));
        let set = flag.clone();
        // A second Ctrl-C ends the process at once: the first may have met a long load.
        let handler = move || {
            if set.swap(true, Ordering::SeqCst) {
                std::process::exit(i32::from(INTERRUPTED));
            }
        };
        if let Err(error) = ctrlc::set_handler(handler) {
            eprintln!("Ctrl-C will end the program without statistics: {error}");
        }
        Interrupt(flag)
    }

    fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

//! `treespark generate`: one prompt, one answer. Also what `chat` uses for each of its answers.

use std::io::{IsTerminal, Read, Write};

use anyhow::{Context, Result, bail};
use treespark::Llm;
use treespark_models::Message;

use super::args::{GenerateArgs, RunArgs, StatsFormat};
use super::progress::{LoadBar, PromptBar};
use super::show_tree::show_round;
use super::{Interrupt, Outcome};

pub fn run(args: &GenerateArgs, interrupt: &Interrupt) -> Result<Outcome> {
    let prompt = prompt(args)?;
    let mut llm = load(&args.run)?;
    let prompt = if args.raw { llm.text_prompt(&prompt)? } else { llm.chat_prompt(&[Message::user(prompt)])? };
    let (answer, outcome) = answer(&mut llm, prompt, &args.run, interrupt)?;
    if !answer.ends_with('\n') {
        println!();
    }
    Ok(outcome)
}

/// The prompt from `-p` or standard input, which must be text.
fn prompt(args: &GenerateArgs) -> Result<String> {
    let prompt = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None => {
            if std::io::stdin().is_terminal() {
                eprintln!("reading the prompt from standard input, up to Ctrl-D (or give -p)");
            }
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).context("reading standard input")?;
            match String::from_utf8(bytes) {
                Ok(text) => text,
                Err(error) => {
                    bail!("standard input is not UTF-8 text: bad byte at offset {}", error.utf8_error().valid_up_to())
                }
            }
        }
    };
    if prompt.trim().is_empty() {
        bail!("the prompt is empty: give -p TEXT, or text on standard input");
    }
    Ok(prompt)
}

/// Checks the options before the long work, and loads the model.
pub fn load(args: &RunArgs) -> Result<Llm> {
    args.decoding.options().sampling.check()?;
    let mut bar = LoadBar::new();
    let llm = Llm::load_with_progress(&args.model.options(), &mut |progress| bar.update(progress));
    bar.finish();
    Ok(llm?)
}

/// Streams one answer to standard output and returns it.
pub fn answer(llm: &mut Llm, prompt: Vec<u32>, args: &RunArgs, interrupt: &Interrupt) -> Result<(String, Outcome)> {
    let labels = args.report.show_tree.then(|| llm.tokenizer().clone());
    let mut bar = PromptBar::new();
    let mut generation =
        llm.generate_with_progress(prompt, &args.decoding.options(), &mut |done, total| bar.update(done, total))?;
    drop(bar);

    let mut stdout = std::io::stdout().lock();
    let mut text = String::new();
    while let Some(step) = generation.next() {
        let step = step?;
        if let Some(tokenizer) = &labels {
            show_round(tokenizer, &step.round);
        }
        text += &step.text;
        // Trees and text would mix on a terminal: with trees, the text comes at the end.
        if labels.is_none() {
            stdout.write_all(step.text.as_bytes())?;
            stdout.flush()?;
        }
        if interrupt.requested() {
            generation.cancel();
        }
    }
    if labels.is_some() {
        stdout.write_all(text.as_bytes())?;
    }
    drop(stdout);

    let statistics = generation.statistics();
    match args.report.stats {
        Some(StatsFormat::Text) => eprintln!("\n{statistics}"),
        Some(StatsFormat::Json) => eprintln!("{}", statistics.to_json()),
        None if interrupt.requested() => eprintln!("\n{statistics}"),
        None => {}
    }
    Ok((text, if interrupt.requested() { Outcome::Interrupted } else { Outcome::Done }))
}

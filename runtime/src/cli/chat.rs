//! `treespark chat`: a conversation on the terminal.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::Result;
use treespark_models::Message;

use super::args::ChatArgs;
use super::generate::{answer, load};
use super::{Interrupt, Outcome};

pub fn run(args: &ChatArgs, interrupt: &Interrupt) -> Result<Outcome> {
    let mut llm = load(&args.run)?;
    let system: Vec<Message> = args.system.iter().map(Message::system).collect();
    let mut messages = system.clone();
    let watched = std::io::stdin().is_terminal();
    if watched {
        eprintln!("Type a message and press Enter. /clear forgets the conversation, /exit or Ctrl-D ends it.");
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if watched {
            eprint!("> ");
            std::io::stderr().flush()?;
        }
        let Some(line) = lines.next() else { return Ok(Outcome::Done) };
        match line?.trim() {
            "" => continue,
            "/exit" => return Ok(Outcome::Done),
            "/clear" => messages = system.clone(),
            text => {
                messages.push(Message::user(text));
                let prompt = llm.chat_prompt(&messages)?;
                let (reply, outcome) = answer(&mut llm, prompt, &args.run, interrupt)?;
                println!();
                messages.push(Message::assistant(reply));
                if let Outcome::Interrupted = outcome {
                    return Ok(outcome);
                }
            }
        }
    }
}

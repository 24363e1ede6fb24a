//! `treespark eval`: accepted length and speed on sets of prompts, as a table and as JSON.

pub mod args;

use std::io::Write;
use std::ops::ControlFlow;

use anyhow::{Context, Result, bail};
use serde_json::json;
use treespark::eval::{Event, Plan, PromptSet, Reference, Report, run as run_plan, table};
use treespark::{DrafterChoice, GenerateOptions};
use treespark_models::pretrained;

use super::progress::{LoadBar, StepBar};
use super::{Interrupt, Outcome, check_writable};
use args::{EvalArgs, Turns};

pub fn run(args: &EvalArgs, interrupt: &Interrupt) -> Result<Outcome> {
    let plan = plan(args)?;
    let reference = args.output.compare.as_deref().map(Reference::read).transpose()?;
    let mut report = Report::new(reference);
    if let Some(path) = &args.output.json {
        check_writable("--json", path)?;
    }

    let measured = run_with_progress(&plan, &mut report, interrupt);
    // Whatever ended the run, what was measured by then is told.
    if let Some(path) = &args.output.json {
        let text = serde_json::to_string_pretty(&document(args, &plan, &report))? + "\n";
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    if measured.is_ok() || !report.entries().is_empty() {
        std::io::stdout().write_all(table::render(&report).as_bytes())?;
    }
    measured?;
    if !report.partial && report.entries().is_empty() {
        bail!("no prompt fits the context (raise --context)");
    }
    Ok(if interrupt.requested() { Outcome::Interrupted } else { Outcome::Done })
}

/// Reads and checks all that can be checked before a model is loaded.
fn plan(args: &EvalArgs) -> Result<Plan> {
    let mut sets: Vec<PromptSet> = Vec::new();
    for path in &args.prompts {
        let set = PromptSet::read(path, args.first.get())?;
        if let Some(other) = sets.iter().find(|other| other.name == set.name) {
            bail!("{} and {} have the same stem, which names a set", other.path.display(), path.display());
        }
        sets.push(set);
    }
    let plan = Plan {
        target: args.target.options(),
        sets,
        setups: args.measured.setups(),
        temperatures: args.measured.temperature.clone(),
        seed: args.measured.seed,
        max_new_tokens: args.measured.max_new_tokens.get(),
        all_turns: args.turns == Turns::All,
        raw: args.raw,
        plain: !args.measured.no_plain,
    };
    for &temperature in &plan.temperatures {
        let GenerateOptions { sampling, .. } = plan.generate_options(temperature);
        sampling.check()?;
    }
    for drafter in &args.measured.drafter {
        if let DrafterChoice::Shipped(name) = drafter {
            pretrained::find(&plan.target.model, name)?;
        }
    }
    Ok(plan)
}

fn run_with_progress(plan: &Plan, report: &mut Report, interrupt: &Interrupt) -> Result<()> {
    let (mut loading, bar) = (LoadBar::new(), StepBar::new(plan.steps(), "prompts"));
    let result = run_plan(plan, report, &mut |event| {
        match event {
            Event::Load(progress) => loading.update(progress),
            Event::Loaded => {
                loading.finish();
                loading = LoadBar::new();
            }
            Event::Set { set, setup, temperature } => {
                bar.name(&format!("{set}, {} {}, {temperature}", setup.drafter_text(), setup.budget_text()));
            }
            Event::Round => bar.tick(),
            Event::Prompt => bar.advance(),
        }
        if interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish();
    Ok(result?)
}

/// Everything, with what it takes to run it again.
fn document(args: &EvalArgs, plan: &Plan, report: &Report) -> serde_json::Value {
    let sets = plan.sets.iter().map(|set| json!({"set": set.name, "prompts": set.prompts.len()}));
    let mut document = json!({
        "treespark": env!("CARGO_PKG_VERSION"),
        "command": std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect::<Vec<_>>(),
        "machine": {"os": std::env::consts::OS, "architecture": std::env::consts::ARCH},
        "model": plan.target.model,
        "backend_asked": args.target.backend.to_string(),
        "context": plan.target.context,
        "sets": sets.collect::<Vec<_>>(),
        "first": args.first,
        "turns": if plan.all_turns { "all" } else { "first" },
        "raw": plan.raw,
        "max_new_tokens": plan.max_new_tokens,
        "seed": plan.seed,
    });
    let fields = document.as_object_mut().expect("made as one");
    fields.extend(report.to_json().as_object().cloned().into_iter().flatten());
    document
}

//! `treespark bench-serve`: load on a server, and how it bears it, as tables, JSON and a plot.

pub mod args;

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde_json::json;
use treespark::bench_serve::{Event, Plan, Report, plot, run as run_plan, table};
use treespark::eval::PromptSet;

use super::progress::StepBar;
use super::{Interrupt, Outcome, check_writable};
use args::BenchServeArgs;

pub fn run(args: &BenchServeArgs, interrupt: &Interrupt) -> Result<Outcome> {
    let plan = Arc::new(plan(args)?);
    let mut report = Report::new(&plan);
    for (option, path) in [("--json", &args.output.json), ("--svg", &args.output.svg)] {
        path.as_deref().map_or(Ok(()), |path| check_writable(option, path))?;
    }

    run_with_progress(&plan, &mut report, interrupt)?;
    if let Some(path) = &args.output.json {
        write_json(path, args, &plan, &report)?;
    }
    std::io::stdout().write_all(table::render(&report).as_bytes())?;
    if let Some(path) = &args.output.svg {
        plot::write(path, &report)?;
    }
    if interrupt.requested() {
        return Ok(Outcome::Interrupted);
    }
    if report.all_failed() {
        bail!("no request succeeded");
    }
    Ok(Outcome::Done)
}

/// Reads and checks all that can be checked before the server is asked.
fn plan(args: &BenchServeArgs) -> Result<Plan> {
    let mut prompts = Vec::new();
    for path in &args.prompts {
        let set = PromptSet::read(path, usize::MAX)?;
        prompts.extend(set.prompts.into_iter().filter_map(|prompt| prompt.turns.into_iter().next()));
    }
    let (server, load, request) = (&args.server, &args.load, &args.request);
    Ok(Plan {
        url: server.url.clone(),
        model: server.model.clone(),
        api_key: server.api_key.clone(),
        prompts,
        raw: request.raw,
        loads: load.loads(),
        policies: server.policies(),
        end: load.end(),
        warm_up: load.warmup,
        max_tokens: request.max_tokens.clone(),
        temperature: request.temperature,
        seed: request.seed,
        ignore_eos: request.ignore_eos,
        timeout: load.timeout,
    })
}

fn run_with_progress(plan: &Arc<Plan>, report: &mut Report, interrupt: &Interrupt) -> Result<()> {
    let bar = StepBar::new(plan.measurements().len(), "points");
    let (mut point, mut done, mut failed) = (String::new(), 0, 0);
    let result = run_plan(plan, report, &mut |event| {
        match event {
            Event::Measurement { load, policy } => {
                point = policy.0.as_ref().map_or(load.to_string(), |policy| format!("{policy}, {load}"));
                (done, failed) = (0, 0);
                bar.name(&point);
            }
            Event::Request { failed: it_failed } => {
                done += 1;
                failed += usize::from(it_failed);
                let failures = if failed > 0 { format!(", {failed} failed") } else { String::new() };
                bar.name(&format!("{point}: {done}{failures}"));
            }
            Event::Tick => bar.tick(),
            Event::Measured => bar.advance(),
        }
        if interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish();
    Ok(result?)
}

/// Everything, with what it takes to run it again.
fn write_json(path: &Path, args: &BenchServeArgs, plan: &Plan, report: &Report) -> Result<()> {
    let key = plan.api_key.as_deref().unwrap_or_default();
    // A key is nobody's business who reads a record.
    let shown = |arg: String| if key.is_empty() { arg } else { arg.replace(key, "KEY") };
    let command: Vec<_> = std::env::args_os().map(|arg| shown(arg.to_string_lossy().into_owned())).collect();
    let mut document = json!({
        "treespark": env!("CARGO_PKG_VERSION"),
        "command": command,
        "machine": {
            "os": std::env::consts::OS,
            "architecture": std::env::consts::ARCH,
            "cores": std::thread::available_parallelism().ok(),
        },
        "url": plan.url,
        "raw": plan.raw,
        "prompt_files": args.prompts,
        "prompts": plan.prompts.len(),
        "requests": args.load.requests,
        "duration_s": args.load.requests.is_none().then_some(args.load.duration.as_secs_f64()),
        "warm_up": plan.warm_up,
        "max_tokens": [plan.max_tokens.start(), plan.max_tokens.end()],
        "temperature": plan.temperature,
        "seed": plan.seed,
        "ignore_eos": plan.ignore_eos,
    });
    let fields = document.as_object_mut().expect("made as one");
    fields.extend(report.to_json().as_object().cloned().into_iter().flatten());
    let text = serde_json::to_string_pretty(&document)? + "\n";
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

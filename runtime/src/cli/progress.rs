//! Progress on standard error, only where a person watches.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use treespark::LoadProgress;
use treespark_models::hub;

/// Work shorter than this shows nothing.
const PATIENCE: Duration = Duration::from_millis(400);

/// One bar that follows a load through its stages.
pub struct LoadBar {
    bar: ProgressBar,
    start: std::time::Instant,
    quiet: bool,
}

impl LoadBar {
    pub fn new() -> LoadBar {
        LoadBar {
            bar: ProgressBar::hidden(),
            start: std::time::Instant::now(),
            quiet: !std::io::stderr().is_terminal(),
        }
    }

    pub fn update(&mut self, progress: LoadProgress) {
        match progress {
            LoadProgress::Hub(hub::Progress::Fetching { what, bytes, total }) => {
                self.announce(&format!("fetching {what}"));
                self.show(&format!("fetching {what}"), bytes, total);
            }
            LoadProgress::Hub(hub::Progress::Unpacking) => self.show("unpacking", 0, 0),
            LoadProgress::Hub(hub::Progress::Verifying) => self.show("verifying", 0, 0),
            LoadProgress::Weights { done, total } if self.start.elapsed() > PATIENCE || !self.bar.is_hidden() => {
                self.show("loading weights", done as u64, total as u64);
            }
            LoadProgress::Weights { .. } | LoadProgress::Memory(_) => {}
            LoadProgress::Timing { .. } => self.show("timing passes", 0, 0),
        }
    }

    /// Where no bar can be drawn, a long step is at least named, once.
    fn announce(&mut self, what: &str) {
        if self.quiet && self.bar.message() != what {
            eprintln!("{what}");
            self.bar.set_message(what.to_string());
        }
    }

    fn show(&mut self, message: &str, done: u64, total: u64) {
        if self.quiet {
            return;
        }
        if self.bar.is_hidden() {
            self.bar = ProgressBar::with_draw_target(Some(total.max(1)), ProgressDrawTarget::stderr());
            let style = "{msg:24} {bar:32} {bytes}/{total_bytes} {elapsed}";
            self.bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
        }
        self.bar.set_message(message.to_string());
        self.bar.set_length(total.max(1));
        self.bar.set_position(done);
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// A bar over a long prompt.
pub struct PromptBar(ProgressBar);

impl PromptBar {
    pub fn new() -> PromptBar {
        PromptBar(ProgressBar::hidden())
    }

    pub fn update(&mut self, done: usize, total: usize) {
        const LONG: usize = 1024;
        if total < LONG || !std::io::stderr().is_terminal() {
            return;
        }
        if self.0.is_hidden() {
            self.0 = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("reading the prompt       {bar:32} {pos}/{len} tokens {elapsed}");
            self.0.set_style(style.expect("a valid template"));
        }
        self.0.set_position(done as u64);
    }
}

impl Drop for PromptBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A bar over a measurement of many steps.
pub struct StepBar(ProgressBar);

impl StepBar {
    pub fn new(steps: usize, unit: &str) -> StepBar {
        if !std::io::stderr().is_terminal() {
            return StepBar(ProgressBar::hidden());
        }
        let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
        let style = format!("{{msg:36!}} {{bar:24}} {{pos}}/{{len}} {unit} {{elapsed}}, {{eta}} left");
        bar.set_style(ProgressStyle::with_template(&style).expect("a valid template"));
        StepBar(bar)
    }

    /// What is being measured.
    pub fn name(&self, what: &str) {
        self.0.set_message(what.to_string());
    }

    pub fn tick(&self) {
        self.0.tick();
    }

    pub fn advance(&self) {
        self.0.inc(1);
    }

    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

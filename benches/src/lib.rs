//! Honest timing: medians with their spread, and where they were taken.

use std::process::Command;
use std::time::Instant;

/// Milliseconds of repeated runs, sorted.
#[derive(Debug, Clone)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Runs `work` a few times for nothing, then `repeats` times by the clock.
    pub fn take<E>(repeats: usize, mut work: impl FnMut() -> Result<(), E>) -> Result<Samples, E> {
        for _ in 0..repeats.div_ceil(5) {
            work()?;
        }
        let mut samples = Vec::with_capacity(repeats);
        for _ in 0..repeats.max(1) {
            let start = Instant::now();
            work()?;
            samples.push(start.elapsed().as_secs_f64() * 1e3);
        }
        samples.sort_by(f64::total_cmp);
        Ok(Samples(samples))
    }

    /// A quantile in milliseconds: 0.5 is the median.
    pub fn quantile(&self, q: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * q).round() as usize]
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

/// Where and how a measurement was taken, a line each.
pub fn circumstances(device: &str) -> String {
    let commit = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    let commit = commit.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_string()).unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let command: Vec<String> = std::env::args().collect();
    format!(
        "device   {device}\ncommit   {}\nload     {}\ncommand  {}",
        if commit.is_empty() { "unknown" } else { &commit },
        if load.is_empty() { "unknown" } else { load.trim() },
        command.join(" "),
    )
}

//! Honest timing: medians with their spread, and where they were taken.

use std::time::Instant;

/// Times of repeated runs, sorted.
#[derive(Debug, Clone)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Measured already; there must be at least one.
    pub fn of(mut samples: Vec<f64>) -> Samples {
        samples.sort_by(f64::total_cmp);
        Samples(samples)
    }

    /// Runs `work` a few times for nothing, then `repeats` times by the clock, in milliseconds.
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
        Ok(Samples::of(samples))
    }

    /// A quantile: 0.5 is the median.
    pub fn quantile(&self, q: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * q).round() as usize]
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

/// The commit that this was built from, if a repository was there to tell.
pub fn commit() -> &'static str {
    env!("TREESPARK_COMMIT")
}

/// Where and how a measurement was taken, a line each.
pub fn circumstances(device: &str) -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let command: Vec<String> = std::env::args().collect();
    format!(
        "device   {device}\ncommit   {}\nload     {}\ncommand  {}",
        commit(),
        if load.is_empty() { "unknown" } else { load.trim() },
        command.join(" "),
    )
}

/// `||got - want|| / ||want||`; infinite if something is not finite.
pub fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |squares: f64| squares.sqrt();
    let difference = norm(got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).powi(2)).sum());
    let error = difference / norm(want.iter().map(|w| w * w).sum());
    if error.is_finite() { error } else { f64::INFINITY }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_infinitely_wrong() {
        assert_eq!(relative_error(&[f32::NAN], &[1.0]), f64::INFINITY);
        assert!((relative_error(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-12);
    }
}

//! cuBLAS' products, from the file of `peers/matmul_cublas.py`.

use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::geometric_mean;

pub struct Peers {
    about: String,
    /// Microseconds by rows and columns of the weight, rows of the activations.
    times: Vec<([usize; 3], f64)>,
}

impl Peers {
    pub fn read(path: &Path) -> Result<Peers> {
        let (rows, about) = super::read(path)?;
        Ok(Peers { about, times: rows.iter().filter_map(time).collect() })
    }

    /// Prints our times beside the peer's.
    pub fn compare(&self, ours: &[([usize; 3], f64)]) {
        println!("\ncuBLAS (the product alone): {}", self.about);
        println!("{:>14} {:>5} {:>9} {:>9} {:>8}", "weight", "rows", "us", "cuBLAS", "we are");
        let mut ratios = Vec::new();
        for (size, us) in ours {
            let Some((_, theirs)) = self.times.iter().find(|(known, _)| known == size) else { continue };
            let ([n, k, rows], ratio) = (size, theirs / us);
            let verdict = if ratio >= 1.0 { "" } else { "  LOSS" };
            println!("{:>14} {rows:>5} {us:>9.2} {theirs:>9.2} {ratio:>7.2}x{verdict}", format!("{n}x{k}"));
            ratios.push(ratio);
        }
        let wins = ratios.iter().filter(|&&ratio| ratio >= 1.0).count();
        if !ratios.is_empty() {
            let (losses, mean) = (ratios.len() - wins, geometric_mean(&ratios));
            println!("{wins} wins, {losses} losses; geometric mean {mean:.2}x as fast as cuBLAS");
        }
    }
}

fn time(row: &Value) -> Option<([usize; 3], f64)> {
    let size = |key: &str| row[key].as_u64().map(|size| size as usize);
    Some(([size("n")?, size("k")?, size("m")?], row["us"].as_f64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_a_time_are_left_out() {
        let row = serde_json::json!({"n": 4096, "k": 12288, "m": 16, "us": 33.5});
        assert_eq!(time(&row), Some(([4096, 12288, 16], 33.5)));
        assert_eq!(time(&serde_json::json!({"n": 4096, "k": 12288, "m": 16, "error": "out of memory"})), None);
    }
}

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

    /// Our times beside the peer's: a table.
    pub fn compare(&self, ours: &[([usize; 3], f64)]) -> String {
        let mut table = format!("\ncuBLAS (the product alone): {}\n", self.about);
        table += &format!("{:>14} {:>5} {:>9} {:>9} {:>8}\n", "weight", "rows", "us", "cuBLAS", "we are");
        let mut ratios = Vec::new();
        for (size, us) in ours {
            let Some((_, theirs)) = self.times.iter().find(|(known, _)| known == size) else { continue };
            let ([n, k, rows], ratio) = (size, theirs / us);
            let verdict = if ratio >= 1.0 { "" } else { "  LOSS" };
            table += &format!("{:>14} {rows:>5} {us:>9.2} {theirs:>9.2} {ratio:>7.2}x{verdict}\n", format!("{n}x{k}"));
            ratios.push(ratio);
        }
        let wins = ratios.iter().filter(|&&ratio| ratio >= 1.0).count();
        if !ratios.is_empty() {
            let (losses, mean) = (ratios.len() - wins, geometric_mean(&ratios));
            table += &format!("{wins} wins, {losses} losses; geometric mean {mean:.2}x as fast as cuBLAS\n");
        }
        table
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

    #[test]
    fn a_loss_is_shown() {
        let peers = Peers { about: "X".into(), times: vec![([8, 16, 1], 3.0), ([8, 16, 2], 3.0)] };
        let table = peers.compare(&[([8, 16, 1], 6.0), ([8, 16, 2], 1.5), ([8, 16, 4], 1.0)]);
        let lines: Vec<&str> = table.lines().map(str::trim).collect();
        assert!(lines[3].starts_with("8x16") && lines[3].ends_with("0.50x  LOSS"), "{table}");
        assert_eq!(lines[5], "1 wins, 1 losses; geometric mean 1.00x as fast as cuBLAS");
    }
}

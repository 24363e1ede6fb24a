//! What peers took for the same work on the same GPU, as their scripts wrote it, beside our own times.

pub mod attention;
pub mod matmul;

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// The rows of a peers' file, and one line on where it was taken.
fn read(path: &Path) -> Result<(Vec<Value>, String)> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    parse(&text).with_context(|| format!("{} is no file of peers' times", path.display()))
}

fn parse(text: &str) -> Result<(Vec<Value>, String)> {
    let json: Value = serde_json::from_str(text)?;
    let rows = json["rows"].as_array().context("it has no rows")?.clone();
    let known = |key: &str| json[key].as_str().map(|value| format!("{key} {value}"));
    let about = ["device", "torch", "flashinfer"].into_iter().filter_map(known).collect::<Vec<_>>().join(", ");
    Ok((rows, about))
}

pub fn geometric_mean(values: &[f64]) -> f64 {
    (values.iter().map(|value| value.ln()).sum::<f64>() / values.len() as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_geometric() {
        assert!((geometric_mean(&[0.5, 2.0, 8.0]) - 2.0).abs() < 1e-12);
    }

    #[test]
    fn files_without_rows_are_refused() {
        assert!(parse("{}").unwrap_err().to_string().contains("no rows"));
        let (rows, about) = parse(r#"{"device": "NVIDIA H100", "torch": "2.9", "rows": [{}]}"#).unwrap();
        assert_eq!((rows.len(), &about[..]), (1, "device NVIDIA H100, torch 2.9"));
    }
}

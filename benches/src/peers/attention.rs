//! Peers' attention, from the files of `tree_attention_peers.py` and `latent_attention_peers.py`.

use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::geometric_mean;

pub struct Peers {
    about: String,
    /// By shape, as `treespark-bench attention` writes it.
    best: Vec<(String, Best)>,
}

/// The fastest that can verify a tree; to latents, a chain.
#[derive(Debug, Clone, PartialEq)]
struct Best {
    name: String,
    us: f64,
}

impl Peers {
    pub fn read(path: &Path) -> Result<Peers> {
        let (rows, about) = super::read(path)?;
        let best = rows.iter().filter_map(|row| Some((shape(row)?, best(row)?))).collect();
        Ok(Peers { about, best })
    }

    /// Our times, of shapes by name, beside the best peer's: a table.
    pub fn compare(&self, ours: impl Iterator<Item = (String, f64)>) -> String {
        let mut table = format!("\npeers: {}\n", self.about);
        table += &format!("{:<26} {:>9} {:>9}  {:<16} {:>8}\n", "shape", "us", "peer's", "peer", "we are");
        let mut ratios = Vec::new();
        for (shape, us) in ours {
            let Some((_, peer)) = self.best.iter().find(|(known, _)| *known == shape) else {
                table += &format!("{shape:<26} {us:>9.2} {:>9}\n", "-");
                continue;
            };
            let ratio = peer.us / us;
            ratios.push(ratio);
            let verdict = if ratio >= 1.0 { "" } else { "  LOSS" };
            table += &format!("{shape:<26} {us:>9.2} {:>9.2}  {:<16} {ratio:>7.2}x{verdict}\n", peer.us, peer.name);
        }
        let wins = ratios.iter().filter(|&&ratio| ratio >= 1.0).count();
        if !ratios.is_empty() {
            let (losses, mean) = (ratios.len() - wins, geometric_mean(&ratios));
            table += &format!("{wins} wins, {losses} losses; geometric mean {mean:.2}x as fast as the best peer\n");
        }
        table
    }
}

fn shape(row: &Value) -> Option<String> {
    let size = |key: &str| row[key].as_u64();
    let model = match size("mla") {
        Some(heads) => format!("mla{heads}"),
        None => format!("{}/{}x{}", size("Hq")?, size("Hkv")?, size("D")?),
    };
    Some(format!("{model}:B{}:L{}:N{}", size("B")?, size("L")?, size("N")?))
}

/// Causal kernels verify chains only, and dense ones need a cache without pages: neither counts. To latents there are only
/// causal ones, so that there a chain stands beside our tree of as many nodes.
fn best(row: &Value) -> Option<Best> {
    let of_trees = |name: &str| ["fi_mask", "fi_xqa"].contains(&name) || name.starts_with("fi_cascade_");
    let counts = |name: &str| of_trees(name) || name.starts_with("fi_mla_");
    let times = row.as_object()?.iter().filter(|(name, _)| counts(name));
    // Where a peer failed, its column is named otherwise, or holds text.
    let times = times.filter(|(name, _)| !name.ends_with("_wrong")).filter_map(|(name, us)| Some((name, us.as_f64()?)));
    let (name, us) = times.min_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(Best { name: name.clone(), us })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_fastest_that_verifies_trees() {
        let row = serde_json::json!({
            "Hq": 32, "Hkv": 8, "D": 128, "B": 8, "L": 8192, "N": 16, "floor": 90.0, "fi_mask": 300.0, "fi_causal3": 100.0,
            "fi_cascade_fa3": 250.5, "fi_cascade_fa2_wrong": 0.5, "fi_xqa_err": "RuntimeError()", "sdpa": 1.0,
        });
        assert_eq!(shape(&row).unwrap(), "32/8x128:B8:L8192:N16");
        assert_eq!(best(&row), Some(Best { name: "fi_cascade_fa3".into(), us: 250.5 }));
        assert_eq!(best(&serde_json::json!({"floor": 1.0, "fi_causal2": 3.0})), None);
    }

    #[test]
    fn the_best_to_latents_is_of_all_page_sizes() {
        let row = serde_json::json!({
            "mla": 16, "B": 32, "L": 8192, "N": 4, "floor": 80.0, "fi_mla_fa3_p1": 210.0, "fi_mla_fa3_p64": 200.0,
            "fi_mla_fa2_p64_wrong": 0.5, "fi_mla_fa2_p16_err": "RuntimeError()",
        });
        assert_eq!(shape(&row).unwrap(), "mla16:B32:L8192:N4");
        assert_eq!(best(&row), Some(Best { name: "fi_mla_fa3_p64".into(), us: 200.0 }));
    }
}

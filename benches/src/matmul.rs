//! Products with weights alone: how fast each streams from memory, for few rows and for many.

mod bed;
mod reference;
mod shapes;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::ValueEnum;
use treespark::devices::BackendChoice;
use treespark_benches::{Samples, circumstances, commit};

use crate::device::Device;
use crate::models;
use crate::peers::matmul::Peers;
use bed::Bed;
use shapes::Kind;

/// A kernel that is further from the reference is wrong, and not timed.
const LARGEST_ERROR: f64 = 1e-4;

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    #[arg(short, long, default_value = "cuda")]
    backend: BackendChoice,
    /// Whose matrices: smollm2-135m, qwen3-0.6b, qwen3-8b, llama-3.1-8b
    #[arg(short, long, value_delimiter = ',', default_value = "qwen3-8b,smollm2-135m")]
    models: Vec<String>,
    /// Only these products
    #[arg(short, long, value_delimiter = ',')]
    ops: Vec<Kind>,
    /// Rows of the activations
    #[arg(short, long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64")]
    rows: Vec<usize>,
    /// Timed graphs of each, of 16 calls or more
    #[arg(long, default_value_t = 30)]
    repeats: usize,
    /// What peers/matmul_cublas.py has written on this GPU: print who is faster
    #[arg(long)]
    peers: Option<PathBuf>,
    /// One JSON object a line instead of a table
    #[arg(long)]
    json: bool,
}

const HELP: &str = "What is measured: the ops qkv (norm, product, head norms, rope, cache), o and down (product, \
residual), gate_up (norm, product, SwiGLU) and head (norm, product) of a model, bf16 weights, f32 activations. Calls take \
turns on copies of the weight, 200 MB of them or more, inside one CUDA graph; the time is the graph's, by the GPU's \
clock, over its calls. Weights repeat one block of 16 M random numbers, from a different place each time.

Before that, a few hundred outputs of the first and the last row (of qkv: queries) are compared with f64: over 1e-4 is an \
error. So is a first row that has other bits among more rows. GB/s counts the weight only; 'of copy' is its share of a device copy's speed in this run.

Examples:
  treespark-bench matmul
  treespark-bench matmul --models qwen3-8b --ops gate-up,down --rows 1,16,64,256 --json
  python peers/matmul_cublas.py cublas.json && treespark-bench matmul --peers cublas.json";

pub fn run(args: &Args) -> Result<()> {
    let peers = args.peers.as_deref().map(Peers::read).transpose()?;
    let configs = args.models.iter().map(|name| Ok((name, models::config(name)?))).collect::<Result<Vec<_>>>()?;
    let mut device = Device::open_with_clock(args.backend)?;
    let (name, driver) = (device.name(), device.driver().unwrap_or_default());
    let bandwidth = device.copy_bandwidth()?;
    eprintln!("{}\ndriver   {driver}\ncopy     {:.3} TB/s", circumstances(&name), bandwidth / 1e12);
    if !args.json {
        println!(
            "{:<14} {:<8} {:>14} {:>5} {:>9} {:>9} {:>9} {:>8} {:>8} {:>9}  kernel",
            "model", "op", "weight", "rows", "us", "p10", "p90", "GB/s", "of copy", "error"
        );
    }
    let kinds = if args.ops.is_empty() { Kind::value_variants() } else { &args.ops };
    let mut ours = Vec::new();
    let mut failed = 0;
    for (model, config) in &configs {
        for &kind in kinds {
            let [n, k] = kind.size(config);
            let mut bed = Bed::new(&mut device, config, kind, bed::copies(config, kind))?;
            for &rows in &args.rows {
                let measured = measure(&mut bed, rows, args.repeats);
                let Measured { error, samples, kernel } = match measured {
                    Ok(measured) => measured,
                    Err(error) => {
                        failed += 1;
                        eprintln!("{model}, {} of {n}x{k}, {rows} rows: {error:#}", kind.name());
                        continue;
                    }
                };
                let (us, p10, p90) = (samples.median(), samples.quantile(0.1), samples.quantile(0.9));
                let speed = (2 * n * k) as f64 / (us * 1e-6);
                let of_copy = speed / bandwidth;
                if args.json {
                    let line = serde_json::json!({
                        "bench": "matmul", "device": name, "driver": driver, "commit": commit(),
                        "copy_TBps": bandwidth / 1e12, "model": model, "op": kind.name(), "n": n, "k": k, "m": rows,
                        "us": us, "p10_us": p10, "p90_us": p90, "GBps": speed / 1e9, "of_copy": of_copy, "error": error,
                        "kernel": kernel,
                    });
                    println!("{line}");
                } else {
                    println!(
                        "{model:<14} {:<8} {:>14} {rows:>5} {us:>9.2} {p10:>9.2} {p90:>9.2} {:>8.0} {:>7.1}% {error:>9.1e}  {kernel}",
                        kind.name(),
                        format!("{n}x{k}"),
                        speed / 1e9,
                        100.0 * of_copy
                    );
                }
                ours.push(([n, k, rows], us));
            }
        }
    }
    if let Some(peers) = peers {
        let table = peers.compare(&ours);
        if args.json { eprint!("{table}") } else { print!("{table}") }
    }
    ensure!(failed == 0, "{failed} products were not timed");
    Ok(())
}

struct Measured {
    error: f64,
    samples: Samples,
    kernel: String,
}

fn measure(bed: &mut Bed, rows: usize, repeats: usize) -> Result<Measured> {
    let product = bed.product(rows)?;
    let error = bed.check(&product)?;
    ensure!(error <= LARGEST_ERROR, "wrong: relative error {error:.2e}");
    let (samples, kernel) = (Samples::of(bed.time(&product, repeats)?), bed.kernels(&product)?);
    bed.free(product);
    Ok(Measured { error, samples, kernel })
}

//! Attention alone, to keys and values or to latents, on the shapes that peers are measured with: checked against f64,
//! then timed by the GPU's clock.

mod bed;
mod reference;
mod report;
mod shapes;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use treespark::devices::BackendChoice;
use treespark_benches::{Samples, circumstances};

use crate::device::Device;
use crate::peers::attention::Peers;
use bed::{Bed, Mask};
use report::{Gpu, Line};
use shapes::Shape;

/// A kernel that is further from the reference is wrong, and not timed.
const LARGEST_ERROR: f64 = 0.02;
/// Turns that two variants take, so that a change of the GPU's speed meets both.
const TURNS: usize = 4;

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    #[arg(short, long, default_value = "cuda")]
    backend: BackendChoice,
    /// Shapes instead of all: query heads / kv heads x head dim : requests : prefix : nodes of each; mlaHEADS for latents
    #[arg(short, long, value_delimiter = ',')]
    shapes: Vec<Shape>,
    /// Latent attention (DeepSeek's) instead of tree attention: its shapes
    #[arg(long, conflicts_with = "shapes")]
    mla: bool,
    /// Timed graphs a shape, each of 16 calls or more
    #[arg(long, default_value_t = 50)]
    repeats: usize,
    /// Time each shape with nothing hidden too, and print what the mask costs
    #[arg(long)]
    mask_off: bool,
    /// What a script of peers/ has written on this GPU: print who is faster
    #[arg(long)]
    peers: Option<PathBuf>,
    /// One JSON object a line instead of a table
    #[arg(long)]
    json: bool,
}

const HELP: &str = "What is measured: B requests, each with a prefix of L slots and a binary tree of N nodes, in a bf16 \
cache of shuffled pages of 16 slots. With --mla, or shapes like mla16:B32:L8192:N4, it is DeepSeek's latent attention, \
absorbed: a slot is one latent of 512 elements and 64 rotated ones, for all (16) heads. Calls take turns on several sets of \
random buffers, together past the GPU's cache, inside one CUDA graph; the time is the graph's, by the GPU's clock, over \
its calls. Before that, a poisoned output is computed and all rows and heads of request 0 are compared with f64: over 0.02 \
is an error.

The floors: keys and values or latents, queries and outputs (all counted as bf16) at the speed of a device copy in this \
run; the two products at 600 TFLOP/s. TB/s are the cache's bytes, and TFLOP/s the two products', over the time.

--mask-off compares the same kernel, buffers, rows and number of keys with two batches: the tree behind its prefix, and \
L + N slots of prefix of which every row sees all, so that no row hides anything and a tile is tested only where its end \
is no multiple of a tile. The two take turns; the ratio is that of the medians.

Examples:
  treespark-bench attention
  treespark-bench attention --shapes 32/8x128:B8:L8192:N16,32/8x128:ragged --json
  treespark-bench attention --mask-off
  treespark-bench attention --mla
  python peers/tree_attention_peers.py peers.json && treespark-bench attention --peers peers.json
  python peers/latent_attention_peers.py mla.json && treespark-bench attention --mla --peers mla.json";

pub fn run(args: &Args) -> Result<()> {
    let peers = args.peers.as_deref().map(Peers::read).transpose()?;
    let mut device = Device::open_with_clock(args.backend)?;
    let gpu =
        Gpu { name: device.name(), driver: device.driver().unwrap_or_default(), bandwidth: device.copy_bandwidth()? };
    eprintln!("{}\ndriver   {}\ncopy     {:.3} TB/s", circumstances(&gpu.name), gpu.driver, gpu.bandwidth / 1e12);
    let shapes = if args.mla {
        Shape::latents()
    } else if args.shapes.is_empty() {
        Shape::all()
    } else {
        args.shapes.clone()
    };
    if !args.json {
        println!("{}", report::header());
    }
    let mut ours = Vec::new();
    let mut failed = 0;
    for shape in &shapes {
        match measure(&mut device, shape, args) {
            Ok(measured) => {
                let line = Line::new(shape, &measured, &gpu);
                if args.json {
                    println!("{}", line.json())
                } else {
                    println!("{line}")
                }
                ours.push((shape.to_string(), measured.samples.median()));
            }
            Err(error) => {
                failed += 1;
                eprintln!("{shape}: {error:#}");
            }
        }
    }
    if let Some(peers) = peers {
        let table = peers.compare(ours.into_iter());
        if args.json { eprint!("{table}") } else { print!("{table}") }
    }
    ensure!(failed == 0, "{failed} of {} shapes were not timed", shapes.len());
    Ok(())
}

struct Measured {
    error: f64,
    samples: Samples,
    /// The same with nothing hidden.
    off: Option<Samples>,
    kernel: String,
}

fn measure(device: &mut Device, shape: &Shape, args: &Args) -> Result<Measured> {
    let mut bed = Bed::new(device, shape)?;
    let kernel = bed.kernels()?;
    let error = checked(&mut bed, Mask::Tree)?;
    if !args.mask_off {
        let samples = Samples::of(bed.time(args.repeats)?);
        return Ok(Measured { error, samples, off: None, kernel });
    }
    bed.show(Mask::Off)?;
    checked(&mut bed, Mask::Off)?;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..TURNS {
        for (mask, times) in [Mask::Tree, Mask::Off].into_iter().zip(&mut times) {
            bed.show(mask)?;
            times.extend(bed.time(args.repeats.div_ceil(TURNS))?);
        }
    }
    let [on, off] = times.map(Samples::of);
    Ok(Measured { error, samples: on, off: Some(off), kernel })
}

fn checked(bed: &mut Bed, mask: Mask) -> Result<f64> {
    let error = bed.check(mask)?;
    ensure!(error <= LARGEST_ERROR, "wrong: relative error {error:.4} with {mask:?}");
    Ok(error)
}

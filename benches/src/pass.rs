//! One verify pass of a model by the number of its rows: as the host sees it, and where a clock tells, as the device does.

use anyhow::{Context, Result};
use serde_json::json;
use treespark::backend::{Backend, Extent};
use treespark::network::{Limits, Network};
use treespark::sampling::Sampling;
use treespark::sequence::Sequence;
use treespark_benches::{Samples, circumstances, commit};
use treespark_kernel_gen::layout::{HEADER_WORDS, accepted_words};
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{DType, MAX_NODES, Op, Pass, Request, Role, Row, TreeSpec};

use crate::device::Device;
use crate::{PassArgs, bushy, models};

pub fn run(args: &PassArgs) -> Result<()> {
    let model = models::open(&args.model)?;
    let mut device = Device::open(args.backend)?;
    let bandwidth = if device.has_clock() { Some(device.copy_bandwidth()?) } else { None };
    let max_nodes = args.rows.iter().copied().max().context("no rows were asked for")?;
    let context = args.depth + MAX_NODES;
    let limits = Limits { context, max_nodes, top_k: 1 };
    let mut network = Network::load(device.backend(), &model, limits, &mut |_, _| {})?;
    let name = device.name();
    eprintln!("{}", circumstances(&name));
    if let Some(driver) = device.driver() {
        eprintln!("driver   {driver}\ncopy     {:.3} TB/s", bandwidth.unwrap_or_default() / 1e12);
    }

    let vocab = model.config().vocab_size;
    let token = |i: usize| (i * 7919 % vocab) as u32;
    let sampling = Sampling { temperature: args.temperature, ..Sampling::default() };
    let mut seq = Sequence::new(vec![token(0)], sampling, 1, vec![], context, vocab);
    let prompt: Vec<u32> = (0..args.depth).map(token).collect();
    network.extend(device.backend(), &mut seq.kv, &prompt, &mut |_| {})?;

    let dispatch = dispatch_ms(device.backend(), args.repeats)?;
    if !args.json {
        println!("an op of one workgroup: {:.2} us", dispatch * 1e3);
        print!(
            "{:>5} {:>10} {:>10} {:>10} {:>8} {:>10} {:>8}",
            "rows", "median ms", "p10", "p90", "of 1 row", "rows/s", "kernels"
        );
        println!("{}", if device.has_clock() { "  device ms   of 1 row   of floor" } else { "" });
    }
    let mut one_row = None;
    for &rows in &args.rows {
        let tree = bushy(rows, token)?;
        let samples = Samples::take(args.repeats, || {
            network.verify(device.backend(), &mut seq, &tree)?;
            network.accepted(device.backend(), &seq.kv).map(drop)
        })?;
        let (pass, id) = network.verify_pass(device.backend(), rows)?;
        let kernels = device.kernels(&pass)?.count;
        let alone = match bandwidth {
            Some(_) => Some(Samples::of(device.time(&[id], args.repeats)?).median() / 1e3),
            None => None,
        };
        let (median, p10, p90) = (samples.median(), samples.quantile(0.1), samples.quantile(0.9));
        let (first, first_alone) = *one_row.get_or_insert((median, alone));
        let (ratio, per_second) = (median / first, rows as f64 / median * 1e3);
        let alone_ratio = alone.zip(first_alone).map(|(alone, first)| alone / first);
        // The share of the device's time that its memory needs for the weights.
        let weights_ms = bandwidth.map(|bandwidth| pass.weight_bytes() as f64 / bandwidth * 1e3);
        let of_floor = alone.zip(weights_ms).map(|(alone, weights)| weights / alone);
        if args.json {
            let line = json!({
                "bench": "pass", "device": name, "driver": device.driver(), "commit": commit(), "model": args.model,
                "depth": args.depth, "rows": rows, "temperature": args.temperature, "median_ms": median, "p10_ms": p10,
                "p90_ms": p90, "ratio": ratio, "op_us": dispatch * 1e3, "kernels": kernels, "device_ms": alone,
                "device_ratio": alone_ratio, "weights_ms": weights_ms, "of_weights_floor": of_floor,
            });
            println!("{line}");
        } else {
            print!("{rows:>5} {median:>10.3} {p10:>10.3} {p90:>10.3} {ratio:>8.2} {per_second:>10.0} {kernels:>8}");
            if let (Some(alone), Some(ratio), Some(of_floor)) = (alone, alone_ratio, of_floor) {
                print!(" {alone:>10.3} {ratio:>10.2} {:>9.1}%", 100.0 * of_floor);
            }
            println!();
        }
    }
    Ok(())
}

/// What an op costs that does next to nothing: many acceptances of one node, in one pass.
fn dispatch_ms(backend: &mut dyn Backend, repeats: usize) -> Result<f64> {
    const OPS: usize = 200;
    let mut pass = Pass::new("dispatch", 1);
    let batch = Batch {
        rows: pass.add("rows", Role::Input, DType::U32, &[1, Row::WORDS]),
        requests: pass.add("requests", Role::Input, DType::U32, &[HEADER_WORDS + Request::WORDS]),
        pages: pass.add("pages", Role::Input, DType::U32, &[1, 1]),
    };
    let draws = pass.add("draws", Role::Scratch, DType::U32, &[1]);
    let accepted = pass.add("accepted", Role::Output, DType::U32, &[1, accepted_words(MAX_NODES)]);
    pass.ops = vec![Op::Accept { batch, tree: TreeSpec::Any(MAX_NODES), draws, accepted }; OPS];
    pass.check()?;
    let buffers = pass.buffers.iter().map(|desc| backend.alloc(desc)).collect::<Result<Vec<_>, _>>()?;
    let mut row = [0; Row::WORDS];
    row[4] = 1; // its own ancestor bit
    backend.write(buffers[batch.rows.0], 0, &row)?;
    backend.write(buffers[batch.requests.0], 0, &[1, 1, 0, 0, 0, 0, 1])?;
    let id = backend.compile(&pass, &buffers)?;
    let samples = Samples::take(repeats, || {
        backend.run(id, Extent { rows: 1, requests: 1, keys: 1 })?;
        backend.read(buffers[accepted.0], 0, 1).map(drop)
    })?;
    buffers.into_iter().for_each(|buffer| backend.free(buffer));
    Ok(samples.median() / OPS as f64)
}

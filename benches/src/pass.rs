//! One verify pass of a model by the number of its rows: as the host sees it, and where a clock tells, as the device does.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use treespark::backend::{Backend, Extent};
use treespark::batch::Entry;
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
    let limits = Limits::new(context, max_nodes);
    let mut network = Network::load(device.backend(), &model, limits, &mut |_, _| {})?;
    eprintln!("{}", circumstances(&device.name()));
    if let (Some(driver), Some(bandwidth)) = (device.driver(), bandwidth) {
        eprintln!("driver   {driver}\ncopy     {:.3} TB/s", bandwidth / 1e12);
    }

    let vocab = model.config().vocab_size;
    let token = |i: usize| (i * 7919 % vocab) as u32;
    let sampling = Sampling { temperature: args.temperature, ..Sampling::default() };
    let mut seq = Sequence::new(vec![token(0)], sampling, 1, vec![], context, vocab);
    let prompt: Vec<u32> = (0..args.depth).map(token).collect();
    network.extend(device.backend(), &mut seq.kv, &prompt, &mut |_| {})?;

    let op_us = dispatch_ms(device.backend(), args.repeats)? * 1e3;
    if !args.json {
        println!("an op of one workgroup: {op_us:.2} us");
        print!("{:>5} {:>10} {:>10} {:>10} {:>8} {:>10}", "rows", "median ms", "p10", "p90", "of 1 row", "rows/s");
        println!("{}", if bandwidth.is_some() { "  device ms of 1 row   weights  kernels" } else { "" });
    }
    let mut first: Option<Measured> = None;
    for &rows in &args.rows {
        let tree = bushy(rows, token)?;
        let host = Samples::take(args.repeats, || {
            let mut entries = [Entry::of_tree(&mut seq, tree.clone())];
            network.verify(device.backend(), &mut entries)?;
            network.outcomes(device.backend(), &mut entries, None).map(drop)
        })?;
        let alone = match bandwidth {
            Some(bandwidth) => Some(Alone::measure(&mut device, &mut network, args, rows, bandwidth)?),
            None => None,
        };
        let measured = Measured { rows, host, alone };
        let first = first.get_or_insert_with(|| measured.clone());
        if args.json {
            let mut line = json!({
                "bench": "pass", "device": device.name(), "driver": device.driver(), "commit": commit(),
                "model": args.model, "depth": args.depth, "temperature": args.temperature, "op_us": op_us,
            });
            line.as_object_mut().into_iter().for_each(|line| line.append(&mut measured.json(first)));
            println!("{line}");
        } else {
            println!("{}", measured.line(first));
        }
    }
    Ok(())
}

/// What a pass of so many rows took.
#[derive(Clone)]
struct Measured {
    rows: usize,
    /// From writing the batch to reading the result.
    host: Samples,
    alone: Option<Alone>,
}

/// The pass by itself, by the device's clock.
#[derive(Clone)]
struct Alone {
    kernels: usize,
    ms: f64,
    /// What a copy would need for the weights' bytes.
    weights_ms: f64,
}

impl Alone {
    fn measure(
        device: &mut Device,
        network: &mut Network,
        args: &PassArgs,
        rows: usize,
        bandwidth: f64,
    ) -> Result<Alone> {
        let (pass, id) = network.verify_pass(device.backend(), rows)?;
        let ms = Samples::of(device.time(&[id], args.repeats)?).median() / 1e3;
        Ok(Alone {
            kernels: device.kernels(&pass)?.len(),
            ms,
            weights_ms: pass.weight_bytes() as f64 / bandwidth * 1e3,
        })
    }
}

impl Measured {
    fn ratio(&self, first: &Measured) -> f64 {
        self.host.median() / first.host.median()
    }

    /// The ratio of the device's times.
    fn alone_ratio(&self, first: &Measured) -> Option<f64> {
        Some(self.alone.as_ref()?.ms / first.alone.as_ref()?.ms)
    }

    fn line(&self, first: &Measured) -> String {
        let (median, p10, p90) = (self.host.median(), self.host.quantile(0.1), self.host.quantile(0.9));
        let per_second = self.rows as f64 / median * 1e3;
        let (rows, ratio) = (self.rows, self.ratio(first));
        let mut line = format!("{rows:>5} {median:>10.3} {p10:>10.3} {p90:>10.3} {ratio:>8.2} {per_second:>10.0}");
        if let (Some(Alone { kernels, ms, weights_ms }), Some(ratio)) = (&self.alone, self.alone_ratio(first)) {
            line += &format!(" {ms:>10.3} {ratio:>8.2} {:>8.1}% {kernels:>8}", 100.0 * weights_ms / ms);
        }
        line
    }

    fn json(&self, first: &Measured) -> Map<String, Value> {
        let alone = self.alone.as_ref();
        let fields = json!({
            "rows": self.rows, "median_ms": self.host.median(), "p10_ms": self.host.quantile(0.1),
            "p90_ms": self.host.quantile(0.9), "ratio": self.ratio(first), "device_ms": alone.map(|alone| alone.ms),
            "device_ratio": self.alone_ratio(first), "weights_ms": alone.map(|alone| alone.weights_ms),
            "of_weights_floor": alone.map(|alone| alone.weights_ms / alone.ms),
            "kernels": alone.map(|alone| alone.kernels),
        });
        fields.as_object().cloned().unwrap_or_default()
    }
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

//! Where the time of a verify pass goes: passes that hold only the ops of one kind, over the same buffers.

use anyhow::{Context, Result};
use treespark::backend::{Backend, BufferId, Extent, PassId};
use treespark::batch::Batch;
use treespark::kv::{KvCache, PagePool};
use treespark::memory::Memory;
use treespark::sampling::Sampling;
use treespark_benches::{Samples, circumstances};
use treespark_kernel_gen::release::PORTABLE;
use treespark_kernel_gen::{DType, MAX_NODES, Op, Pass, TreeSpec};
use treespark_models::{Dims, Llama};

use crate::device::Device;
use crate::{PassArgs, bushy, models};

const PAGE_SIZE: usize = 16;

pub fn run(args: &PassArgs) -> Result<()> {
    let model = models::open(&args.model)?;
    let mut device = Device::open(args.backend)?;
    eprintln!("{}", circumstances(&device.name()));
    let dims = dims(args, model.dtype())?;
    let mut memory = Memory::default();
    for weight in model.weights(dims.context) {
        let (desc, parts) = weight?;
        memory.load(device.backend(), desc, &parts)?;
    }
    for &rows in &args.rows {
        let whole = Llama::new(model.config(), &dims).verify_pass(rows)?;
        let buffers = memory.bind(device.backend(), &whole)?;
        let extent = write_batch(device.backend(), &memory, &dims, args, rows)?;
        let kernels = if device.has_clock() { device.kernels(&whole)?.len() } else { whole.kernels(&PORTABLE)? };
        let mut bench = |pass: &Pass| time(&mut device, pass, &buffers, extent, memory.get("accepted"), args.repeats);
        let idle = bench(&Pass { ops: vec![], ..whole.clone() })?;
        let (ops, mb) = (whole.ops.len(), whole.weight_bytes() as f64 / 1e6);
        println!("{rows} rows, {} keys: {ops} ops, {kernels} GPU kernels, {mb:.1} MB of weights", extent.keys);
        println!("  a pass without ops: {idle:.3} ms");
        println!("  {:<16} {:>6} {:>10} {:>10}", "op", "times", "us each", "ms");
        for name in kinds(&whole) {
            let ops: Vec<Op> = whole.ops.iter().filter(|op| op.name() == name).cloned().collect();
            let (times, pass) = (ops.len(), Pass { ops, ..whole.clone() });
            let ms = bench(&pass)? - idle;
            println!("  {name:<16} {times:>6} {:>10.2} {ms:>10.3}", ms * 1e3 / times as f64);
        }
        println!("  {:<16} {:>6} {:>10} {:>10.3}", "all", whole.ops.len(), "", bench(&whole)? - idle);
    }
    Ok(())
}

fn dims(args: &PassArgs, weight_dtype: DType) -> Result<Dims> {
    let rows = args.rows.iter().copied().max().context("no rows were asked for")?;
    let context = args.depth + MAX_NODES;
    let pages = context.div_ceil(PAGE_SIZE);
    Ok(Dims {
        max_rows: MAX_NODES,
        head_rows: rows,
        max_requests: 1,
        context,
        page_size: PAGE_SIZE,
        pages,
        pages_per_request: pages,
        top_k: 1,
        cache_dtype: if weight_dtype == DType::F32 { DType::F32 } else { DType::BF16 },
        tree: TreeSpec::Any(MAX_NODES),
    })
}

/// A bushy tree behind a prefix whose cache rows are zeros.
fn write_batch(
    backend: &mut dyn Backend,
    memory: &Memory,
    dims: &Dims,
    args: &PassArgs,
    rows: usize,
) -> Result<Extent> {
    let mut kv = KvCache::default();
    kv.reserve(&mut PagePool::new(dims.pages, PAGE_SIZE), args.depth + rows)?;
    kv.commit(args.depth);
    let sampling = Sampling { temperature: args.temperature, ..Sampling::default() };
    let mut batch = Batch::new(dims.pages_per_request);
    batch.add_tree(&kv, &bushy(rows, |i| i as u32)?, &sampling);
    for (name, words) in batch.words() {
        backend.write(memory.get(name), 0, words)?;
    }
    Ok(batch.extent())
}

fn kinds(pass: &Pass) -> Vec<&'static str> {
    let mut names = Vec::new();
    for op in &pass.ops {
        if !names.contains(&op.name()) {
            names.push(op.name());
        }
    }
    names
}

/// Median milliseconds of a pass: by the device's clock where it has one, else with the wait for a word of its result.
fn time(
    device: &mut Device,
    pass: &Pass,
    buffers: &[BufferId],
    extent: Extent,
    result: BufferId,
    repeats: usize,
) -> Result<f64> {
    let id: PassId = device.backend().compile(pass, buffers)?;
    if device.has_clock() {
        return Ok(Samples::of(device.time(&[id], repeats)?).median() / 1e3);
    }
    let samples = Samples::take(repeats, || {
        device.backend().run(id, extent)?;
        device.backend().read(result, 0, 1).map(drop)
    })?;
    Ok(samples.median())
}

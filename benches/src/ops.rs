//! Where the time of a verify pass goes, and of a draft: passes that hold only the ops of one kind, over the same buffers.

use anyhow::{Context, Result};
use treespark::batch::Batch;
use treespark::kv::KvCache;
use treespark::sampling::Sampling;
use treespark_benches::circumstances;
use treespark_kernel_gen::release::PORTABLE;
use treespark_kernel_gen::{Op, Pass};
use treespark_models::{Llama, Speculator};

use crate::device::Device;
use crate::passes::{AddRows, Bench, CANDIDATES, Timing, add_block};
use crate::{OpsArgs, bushy, models};

pub fn run(args: &OpsArgs) -> Result<()> {
    let (drafter, nodes, requests, args) = (&args.drafter, args.nodes, args.requests, &args.pass);
    let model = models::open(&args.model)?;
    let speculator = drafter.as_ref().map(|path| Speculator::open(path, model.config())).transpose()?;
    let config = speculator.as_ref().map(Speculator::config_on_device);
    let mut device = Device::open(args.backend)?;
    eprintln!("{}", circumstances(&device.name()));
    let block = config.as_ref().map_or(1, |config| config.block().rows);
    let rows = args.rows.iter().copied().chain([block]).max().context("no rows were asked for")?;
    let timing = Timing { requests, depth: args.depth, nodes, repeats: args.repeats };
    let mut bench = Bench::load(device, &model, speculator.as_ref().zip(config.as_ref()), rows, timing)?;
    let dims = bench.dims.clone();
    let llama = Llama { config: model.config(), dims: &dims, speculator: config.as_ref() };
    let sampling = Sampling { temperature: args.temperature, ..Sampling::default() };
    for &rows in &args.rows {
        let tree = bushy(rows, |i| i as u32)?;
        let (pass, add) = (llama.verify_pass(requests * rows)?, |batch: &mut Batch, kv: &KvCache| {
            batch.add_tree(kv, &tree, &sampling)
        });
        print(&mut bench, &pass, &add)?;
        print_experts(&mut bench, &pass, &add)?;
    }
    if let Some(config) = &config {
        let costs: Vec<f32> = (1..=nodes).map(|rows| bench.device.backend().info().cost.of(rows)).collect();
        let costs = (bench.device.backend().drafts() && config.fits_devices()).then_some(costs.as_slice());
        let pass = config.draft_pass(&llama, config.block(), requests, CANDIDATES, costs)?;
        print(&mut bench, &pass, &add_block(config.block(), &sampling))?;
    }
    Ok(())
}

/// Prints what each kind of op of a pass takes, on the rows that `add` adds.
fn print(bench: &mut Bench, whole: &Pass, add: &AddRows) -> Result<()> {
    let kernels = match bench.device.has_clock() {
        true => bench.device.kernels(whole)?.len(),
        false => whole.kernels(&PORTABLE)?,
    };
    let mut time = |ops: Vec<Op>| {
        let pass = bench.compile(&Pass { ops, ..whole.clone() })?;
        bench.time(&[pass], add)
    };
    let idle = time(vec![])?;
    let (ops, mb) = (whole.ops.len(), whole.weight_bytes() as f64 / 1e6);
    println!("{}, {} rows: {ops} ops, {kernels} GPU kernels, {mb:.1} MB of weights", whole.name, whole.rows);
    println!("  a pass without ops: {idle:.3} ms");
    println!("  {:<16} {:>6} {:>10} {:>10}", "op", "times", "us each", "ms");
    for name in kinds(whole) {
        let ops: Vec<Op> = whole.ops.iter().filter(|op| op.name() == name).cloned().collect();
        let times = ops.len();
        let ms = time(ops)? - idle;
        println!("  {name:<16} {times:>6} {:>10.2} {ms:>10.3}", ms * 1e3 / times as f64);
    }
    // What makes up other rows would leave the next run another batch.
    let ops: Vec<Op> = whole.ops.iter().filter(|op| op.name() != "grow_trellis").cloned().collect();
    let but = if ops.len() < whole.ops.len() { " but grow_trellis" } else { "" };
    let ms = time(ops)? - idle;
    println!("  {:<16} {:>6} {:>10} {ms:>10.3}", format!("all{but}"), whole.ops.len(), "");
    Ok(())
}

/// Prints how many experts the rows of a pass chose together: what nodes of a tree share is read once.
fn print_experts(bench: &mut Bench, whole: &Pass, add: &AddRows) -> Result<()> {
    let (mut layers, mut chosen, mut of, mut choices) = (0, 0, 0, 0);
    for (i, op) in whole.ops.iter().enumerate() {
        let &Op::GroupRows { experts, groups, .. } = op else { continue };
        choices = whole.rows * whole.buffer(experts).shape[1];
        of = whole.buffer(groups).len() - 1 - whole.buffer(experts).len();
        let upto = bench.compile(&Pass { ops: whole.ops[..=i].to_vec(), ..whole.clone() })?;
        let begins = bench.read_after(upto, add, &whole.buffer(groups).name, of + 1)?;
        chosen += begins.windows(2).filter(|of_expert| of_expert[0] < of_expert[1]).count();
        layers += 1;
    }
    if layers > 0 {
        let mean = chosen as f64 / layers as f64;
        println!("  experts: {mean:.1} of {of} a layer for {choices} choices, {:.2} each", choices as f64 / mean);
    }
    Ok(())
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

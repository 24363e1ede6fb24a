//! Where the time of a verify pass goes, and of a draft: passes that hold only the ops of one kind, over the same buffers.

use anyhow::{Context, Result};
use treespark::backend::{BufferId, Extent, PassId};
use treespark::batch::Batch;
use treespark::kv::{KvCache, PagePool};
use treespark::memory::Memory;
use treespark::sampling::Sampling;
use treespark_benches::{Samples, circumstances};
use treespark_kernel_gen::release::PORTABLE;
use treespark_kernel_gen::{DType, Fill, MAX_NODES, Op, Pass, TreeSpec};
use treespark_models::{Dims, Llama, Speculator, block};

use crate::device::Device;
use crate::{OpsArgs, PassArgs, bushy, models};

const PAGE_SIZE: usize = 16;

/// Candidates of a row in a draft.
const CANDIDATES: usize = 64;

pub fn run(args: &OpsArgs) -> Result<()> {
    let (drafter, nodes, args) = (&args.drafter, args.nodes, &args.pass);
    let model = models::open(&args.model)?;
    let speculator = drafter.as_ref().map(|path| Speculator::open(path, model.config())).transpose()?;
    let config = speculator.as_ref().map(Speculator::config_on_device);
    let mut device = Device::open(args.backend)?;
    eprintln!("{}", circumstances(&device.name()));
    let dims = dims(args, nodes, model.dtype())?;
    let mut memory = Memory::default();
    let beside =
        speculator.iter().zip(&config).flat_map(|(speculator, config)| speculator.weights(config, dims.context));
    for weight in model.weights(dims.context).chain(beside) {
        let (desc, parts) = weight?;
        memory.load(device.backend(), desc, &parts)?;
    }
    let llama = Llama { config: model.config(), dims: &dims, speculator: config.as_ref() };
    let mut bench = Bench { device: &mut device, memory: &mut memory, dims: &dims, args };
    for &rows in &args.rows {
        let tree = bushy(rows, |i| i as u32)?;
        bench.pass(&llama.verify_pass(rows)?, &|batch, kv, sampling| batch.add_tree(kv, &tree, sampling))?;
    }
    if let Some(config) = &config {
        let costs: Vec<f32> = (1..=nodes).map(|rows| bench.device.backend().info().cost.of(rows)).collect();
        let costs = (bench.device.backend().drafts() && config.fits_devices()).then_some(costs.as_slice());
        let block = config.block();
        bench.pass(&config.draft_pass(&llama, CANDIDATES, costs)?, &|batch, kv, sampling| match block.fill {
            Fill::Mask(mask) => batch.add_block(kv, &vec![mask; block.rows], sampling),
            Fill::State => batch.add_readers(kv, block.rows, 0, 0, sampling),
        })?;
    }
    Ok(())
}

/// What passes are timed on, behind a prefix whose cache rows are zeros.
struct Bench<'a> {
    device: &'a mut Device,
    memory: &'a mut Memory,
    dims: &'a Dims,
    args: &'a PassArgs,
}

impl Bench<'_> {
    /// Prints what each kind of op of a pass takes, on the rows that `fill` adds.
    fn pass(&mut self, whole: &Pass, fill: &dyn Fn(&mut Batch, &KvCache, &Sampling)) -> Result<()> {
        let buffers = self.memory.bind(self.device.backend(), whole)?;
        let kernels = match self.device.has_clock() {
            true => self.device.kernels(whole)?.len(),
            false => whole.kernels(&PORTABLE)?,
        };
        let idle = self.time(&Pass { ops: vec![], ..whole.clone() }, &buffers, fill)?;
        let (ops, mb) = (whole.ops.len(), whole.weight_bytes() as f64 / 1e6);
        println!("{}, {} rows: {ops} ops, {kernels} GPU kernels, {mb:.1} MB of weights", whole.name, whole.rows);
        println!("  a pass without ops: {idle:.3} ms");
        println!("  {:<16} {:>6} {:>10} {:>10}", "op", "times", "us each", "ms");
        for name in kinds(whole) {
            let ops: Vec<Op> = whole.ops.iter().filter(|op| op.name() == name).cloned().collect();
            let (times, pass) = (ops.len(), Pass { ops, ..whole.clone() });
            let ms = self.time(&pass, &buffers, fill)? - idle;
            println!("  {name:<16} {times:>6} {:>10.2} {ms:>10.3}", ms * 1e3 / times as f64);
        }
        // What makes up other rows would leave the next run another batch.
        let ops: Vec<Op> = whole.ops.iter().filter(|op| op.name() != "grow_trellis").cloned().collect();
        let but = if ops.len() < whole.ops.len() { " but grow_trellis" } else { "" };
        let ms = self.time(&Pass { ops, ..whole.clone() }, &buffers, fill)? - idle;
        println!("  {:<16} {:>6} {:>10} {ms:>10.3}", format!("all{but}"), whole.ops.len(), "");
        Ok(())
    }

    fn time(
        &mut self,
        pass: &Pass,
        buffers: &[BufferId],
        fill: &dyn Fn(&mut Batch, &KvCache, &Sampling),
    ) -> Result<f64> {
        let extent = self.write_batch(pass.rows, fill)?;
        time(self.device, pass, buffers, extent, self.memory.get("rows"), self.args.repeats)
    }

    fn write_batch(&mut self, rows: usize, fill: &dyn Fn(&mut Batch, &KvCache, &Sampling)) -> Result<Extent> {
        let mut kv = KvCache::default();
        kv.reserve(&mut PagePool::new(self.dims.pages, PAGE_SIZE), self.args.depth + rows)?;
        kv.commit(self.args.depth);
        let sampling = Sampling { temperature: self.args.temperature, ..Sampling::default() };
        let mut batch = Batch::new(self.dims.pages_per_request);
        fill(&mut batch, &kv, &sampling);
        for (name, words) in batch.words() {
            self.device.backend().write(self.memory.get(name), 0, words)?;
        }
        if let Some(state) = self.memory.find(block::STATE) {
            // Far from its limit.
            self.device.backend().write(state, 0, &[self.dims.context as u32])?;
        }
        Ok(batch.extent())
    }
}

fn dims(args: &PassArgs, nodes: usize, weight_dtype: DType) -> Result<Dims> {
    let rows = args.rows.iter().copied().chain([nodes]).max().context("no rows were asked for")?;
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

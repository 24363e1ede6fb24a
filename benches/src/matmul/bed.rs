//! Weights on a device, together larger than its cache, and passes over them.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use treespark::backend::{BufferId, Extent};
use treespark::batch::Batch;
use treespark::kv::{KvCache, PagePool};
use treespark::sampling::Sampling;
use treespark::tree::TokenTree;
use treespark_benches::relative_error;
use treespark_kernel_gen::{BufferDesc, DType, Pass, Role};
use treespark_models::random::RandomBlock;
use treespark_models::{Bytes, Config, Tensor};

use super::reference::Inputs;
use super::shapes::{self, Kind, PAGE_SIZE};
use crate::device::Device;

/// Bytes of weights that calls take turns on: four times the cache of an H100.
const LARGE: usize = 200_000_000;
/// Elements of the block that weights are cut from.
const BLOCK: usize = 16 << 20;
/// Calls of a timed pass, at least.
const CALLS: usize = 16;
/// What the outputs hold before a checked pass.
const BEFORE: f32 = 1.0;

pub struct Bed<'a> {
    device: &'a mut Device,
    config: &'a Config,
    kind: Kind,
    weights: Vec<BufferId>,
    /// The first weight, on the host.
    first: Vec<Tensor>,
    x: RandomBlock,
}

impl<'a> Bed<'a> {
    pub fn new(device: &'a mut Device, config: &'a Config, kind: Kind) -> Result<Bed<'a>> {
        let shape = kind.size(config);
        let desc = BufferDesc { name: "weight".into(), role: Role::Weight, dtype: DType::BF16, shape: shape.to_vec() };
        // Products have variance 1.
        let block = RandomBlock::new(DType::BF16, BLOCK, (3.0 / shape[1] as f32).sqrt(), 1);
        let x = RandomBlock::new(DType::F32, BLOCK / 4, 3f32.sqrt(), 2);
        let parts = |copy: usize| block.parts(desc.len(), (copy as u64) << 32);
        let mut bed = Bed { device, config, kind, weights: Vec::new(), first: parts(0), x };
        for copy in 0..LARGE / desc.bytes() + 1 {
            bed.weights.push(bed.device.backend().load(&desc, &parts(copy))?);
        }
        Ok(bed)
    }

    /// Checks a product of this many rows, then times it: the relative error, and microseconds of a call, a graph each.
    pub fn measure(&mut self, rows: usize, repeats: usize) -> Result<(f64, Vec<f64>, String)> {
        let calls = self.weights.len().max(CALLS);
        let pass = shapes::pass(self.config, self.kind, rows, self.weights.len(), calls)?;
        let once = Pass { ops: pass.ops[..1].to_vec(), ..pass.clone() };
        let mut values = HashMap::new();
        let buffers = self.fill(&pass, &mut values)?;
        let result = self.check_and_time(&pass, &once, &buffers, &values, repeats);
        for (&buffer, desc) in buffers.iter().zip(&pass.buffers) {
            if !desc.name.starts_with("weight") {
                self.device.backend().free(buffer);
            }
        }
        let (error, times) = result?;
        let kernel = self.device.kernels(&once)?.join(" + ");
        Ok((error, times.into_iter().map(|time| time / calls as f64).collect(), kernel))
    }

    /// Buffers with their contents, of which floats are kept.
    fn fill(&mut self, pass: &Pass, values: &mut HashMap<String, Vec<f32>>) -> Result<Vec<BufferId>> {
        let batch = batch(pass.rows)?;
        let mut buffers = Vec::new();
        for desc in &pass.buffers {
            if let Some(copy) = desc.name.strip_prefix("weight.") {
                buffers.push(self.weights[copy.parse::<usize>()?]);
                continue;
            }
            let random = || floats(&self.x.parts(desc.len(), buffers.len() as u64));
            let numbers = match &desc.name[..] {
                "x" => random(),
                "norm" | "q_norm" | "k_norm" => random().iter().map(|x| 1.0 + 0.1 * x).collect(),
                "rope" => [1.0, 0.0].repeat(desc.len() / 2),
                "out" => vec![BEFORE; desc.len()],
                _ => Vec::new(),
            };
            let backend = self.device.backend();
            let id = match desc.role {
                Role::Weight => backend.load(desc, &[tensor(&numbers)])?,
                _ => backend.alloc(desc)?,
            };
            buffers.push(id);
            if let Some((_, words)) = batch.words().iter().find(|(name, _)| *name == desc.name) {
                backend.write(id, 0, words)?;
            } else if desc.role != Role::Weight && !numbers.is_empty() {
                backend.write(id, 0, &numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>())?;
            }
            values.insert(desc.name.clone(), numbers);
        }
        Ok(buffers)
    }

    fn check_and_time(
        &mut self,
        pass: &Pass,
        once: &Pass,
        buffers: &[BufferId],
        values: &HashMap<String, Vec<f32>>,
        repeats: usize,
    ) -> Result<(f64, Vec<f64>)> {
        let (rows, width) = (pass.rows, self.kind.outputs(self.config));
        let floats = |name: &str| values.get(name).map(Vec::as_slice).unwrap_or_default();
        let inputs = Inputs {
            config: self.config,
            kind: self.kind,
            x: floats("x"),
            norm: floats("norm"),
            q_norm: floats("q_norm"),
            before: BEFORE,
            weight: &self.first,
        };
        let backend = self.device.backend();
        let id = backend.compile(once, buffers)?;
        backend.run(id, Extent { rows, requests: 1, keys: rows })?;
        let out = buffers[pass.buffers.iter().position(|desc| desc.name == "out").expect("every product has outputs")];
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for row in [0, rows - 1] {
            let words = backend.read(out, row * width, width)?;
            got.extend(inputs.sample().into_iter().map(|at| f32::from_bits(words[at])));
            want.extend(inputs.outputs(row));
        }
        let error = relative_error(&got, &want);
        ensure!(error <= super::LARGEST_ERROR, "wrong: relative error {error:.2e}");
        let id = backend.compile(pass, buffers)?;
        Ok((error, self.device.time(&[id], repeats)?))
    }
}

impl Drop for Bed<'_> {
    fn drop(&mut self) {
        self.weights.iter().for_each(|&weight| self.device.backend().free(weight));
    }
}

/// A chain of so many nodes, with no prefix.
fn batch(rows: usize) -> Result<Batch> {
    let pages = rows.div_ceil(PAGE_SIZE);
    let mut kv = KvCache::default();
    kv.reserve(&mut PagePool::new(pages, PAGE_SIZE), rows)?;
    let mut batch = Batch::new(pages);
    batch.add_tree(&kv, &TokenTree::chain(&vec![0; rows])?, &Sampling::default());
    Ok(batch)
}

fn floats(parts: &[Tensor]) -> Vec<f32> {
    let bytes = parts.iter().flat_map(|part| part.bytes.as_slice().chunks_exact(4));
    bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn tensor(values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor { dtype: DType::F32, shape: vec![values.len()], bytes: Bytes::from_vec(bytes) }
}

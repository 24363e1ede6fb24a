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
    /// The first row's outputs, as bits, in the first product that was checked.
    row: Option<Vec<u32>>,
}

/// A number of rows, made ready.
pub struct Product {
    /// The op as often as it is timed.
    pass: Pass,
    buffers: Vec<BufferId>,
    /// What the buffers of floats were filled with, by name.
    values: HashMap<String, Vec<f32>>,
}

impl<'a> Bed<'a> {
    /// Makes `copies` weights; [`copies`] says how many exceed every cache.
    pub fn new(device: &'a mut Device, config: &'a Config, kind: Kind, copies: usize) -> Result<Bed<'a>> {
        let shape = kind.size(config);
        let desc = BufferDesc { name: "weight".into(), role: Role::Weight, dtype: DType::BF16, shape: shape.to_vec() };
        // Products have variance 1.
        let block = RandomBlock::new(DType::BF16, BLOCK, (3.0 / shape[1] as f32).sqrt(), 1);
        let x = RandomBlock::new(DType::F32, BLOCK / 4, 3f32.sqrt(), 2);
        let parts = |copy: usize| block.parts(&desc.shape, (copy as u64) << 32);
        let mut bed = Bed { device, config, kind, weights: Vec::new(), first: parts(0), x, row: None };
        for copy in 0..copies {
            bed.weights.push(bed.device.backend().load(&desc, &parts(copy))?);
        }
        Ok(bed)
    }

    /// Makes the buffers and passes of a product of this many rows.
    pub fn product(&mut self, rows: usize) -> Result<Product> {
        let copies = self.weights.len();
        let pass = shapes::pass(self.config, self.kind, rows, copies, copies.max(CALLS))?;
        let mut product = Product { buffers: Vec::new(), values: HashMap::new(), pass };
        let batch = batch(rows)?;
        for (at, desc) in product.pass.buffers.iter().enumerate() {
            if let Some(copy) = desc.name.strip_prefix("weight.") {
                product.buffers.push(self.weights[copy.parse::<usize>()?]);
                continue;
            }
            // Row 0 begins with the same numbers, however many rows follow.
            let random = || floats(&self.x.parts(&[desc.len().max(BLOCK / 4)], at as u64))[..desc.len()].to_vec();
            let numbers = match &desc.name[..] {
                "x" => random(),
                "norm" | "q_norm" | "k_norm" => random().iter().map(|x| 1.0 + 0.1 * x).collect(),
                "rope" => [1.0, 0.0].repeat(desc.len() / 2),
                "out" => vec![BEFORE; desc.len()],
                _ => Vec::new(),
            };
            let words: Vec<u32> = match batch.words().iter().find(|(name, _)| *name == desc.name) {
                Some((_, words)) => words.to_vec(),
                None => numbers.iter().map(|x| x.to_bits()).collect(),
            };
            let backend = self.device.backend();
            if desc.role == Role::Weight {
                product.buffers.push(backend.load(desc, &[tensor(&numbers)])?);
            } else {
                let id = backend.alloc(desc)?;
                backend.write(id, 0, &words)?;
                product.buffers.push(id);
            }
            product.values.insert(desc.name.clone(), numbers);
        }
        Ok(product)
    }

    /// Runs the op once and compares outputs of the first and the last row with a reference in f64: the relative error.
    /// Fails where the first row has other bits than among another number of rows: its sums must not depend on that.
    pub fn check(&mut self, product: &Product) -> Result<f64> {
        let (rows, width) = (product.pass.rows, self.kind.outputs(self.config));
        let floats = |name: &str| product.values.get(name).map(Vec::as_slice).unwrap_or_default();
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
        let id = backend.compile(&product.once(), &product.buffers)?;
        backend.run(id, Extent { rows, requests: 1, keys: rows })?;
        let is_out = |desc: &BufferDesc| desc.name == "out";
        let out = product.buffers[product.pass.buffers.iter().position(is_out).expect("every product has outputs")];
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for row in [0, rows - 1] {
            let words = backend.read(out, row * width, width)?;
            if row == 0 {
                let first = self.row.get_or_insert_with(|| words.clone());
                let differing = first.iter().zip(&words).filter(|(a, b)| a != b).count();
                ensure!(differing == 0, "{differing} of {width} outputs of row 0 have other bits than before");
            }
            got.extend(inputs.sample().into_iter().map(|at| f32::from_bits(words[at])));
            want.extend(inputs.outputs(row));
        }
        Ok(relative_error(&got, &want))
    }

    /// Microseconds of a call, by each of `repeats` graphs.
    pub fn time(&mut self, product: &Product, repeats: usize) -> Result<Vec<f64>> {
        let id = self.device.backend().compile(&product.pass, &product.buffers)?;
        let calls = product.pass.ops.len() as f64;
        Ok(self.device.time(&[id], repeats)?.into_iter().map(|time| time / calls).collect())
    }

    pub fn kernels(&self, product: &Product) -> Result<String> {
        Ok(self.device.kernels(&product.once())?.join(" + "))
    }

    pub fn free(&mut self, product: Product) {
        let mine = |id: &&BufferId| !self.weights.contains(id);
        product.buffers.iter().filter(mine).for_each(|&id| self.device.backend().free(id));
    }
}

/// Copies of a weight that calls must take turns on to find nothing in the cache.
pub fn copies(config: &Config, kind: Kind) -> usize {
    let [n, k] = kind.size(config);
    LARGE / (n * k * DType::BF16.size()) + 1
}

impl Product {
    fn once(&self) -> Pass {
        Pass { ops: self.pass.ops[..1].to_vec(), ..self.pass.clone() }
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

#[cfg(test)]
mod tests {
    use treespark::cpu::CpuBackend;

    use super::*;
    use crate::models;

    #[test]
    fn the_cpu_backend_agrees_with_the_reference() {
        let smollm2 = models::config("smollm2-135m").unwrap();
        let qwen3 = Config { hidden: 256, ffn: 384, ..models::config("qwen3-0.6b").unwrap() };
        let mut device = Device::Other(Box::new(CpuBackend::new(Some(2))));
        for (config, kinds) in
            [(smollm2, vec![Kind::O, Kind::Head]), (qwen3, vec![Kind::Qkv, Kind::GateUp, Kind::Down])]
        {
            for kind in kinds {
                let mut bed = Bed::new(&mut device, &config, kind, 1).unwrap();
                for rows in [1, 5] {
                    let product = bed.product(rows).unwrap();
                    let error = bed.check(&product).unwrap();
                    assert!(error < 1e-5, "{kind:?}, {rows} rows: {error}");
                    bed.free(product);
                }
            }
        }
    }
}

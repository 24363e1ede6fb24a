//! Each op against plain loops, on whatever GPU is there; a machine without one has nothing to test.
//!
//! A [`Bench`] is a pass being put together, with what its buffers hold at first; `run` tells what they hold then.

use treespark_kernel_gen::layout::HEADER_WORDS;
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{Buf, BufferDesc, CacheShape, DType, Op, Pass, Request, Role, Row, TreeShape};
use treespark_models::{Bytes, Tensor};

use super::{WgpuBackend, adapters};
use crate::backend::{Backend, BufferId, Extent};

mod weights;
mod attention;
mod acceptance;
mod experts;
mod latent;

const MAX_REQUESTS: usize = 3;

/// Numbers in -1..1 that are the same on every machine.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// As the format holds it.
fn rounded(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
        DType::F16 => half::f16::from_f32(x).to_f32(),
        _ => x,
    }
}

fn packed(dtype: DType, numbers: &[f32]) -> Vec<u8> {
    match dtype {
        DType::BF16 => numbers.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        DType::F16 => numbers.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn unpacked(dtype: DType, words: &[u32]) -> Vec<f32> {
    let halves = words.iter().flat_map(|w| [*w as u16, (*w >> 16) as u16]);
    match dtype {
        DType::BF16 => halves.map(|h| half::bf16::from_bits(h).to_f32()).collect(),
        DType::F16 => halves.map(|h| half::f16::from_bits(h).to_f32()).collect(),
        _ => words.iter().map(|w| f32::from_bits(*w)).collect(),
    }
}

/// A pass being put together, with what its buffers hold at first.
struct Bench {
    pass: Pass,
    batch: Batch,
    rows: Vec<Row>,
    requests: usize,
    page_size: usize,
    pages: Vec<u32>,
    held: Vec<Option<Vec<f32>>>,
}

impl Bench {
    /// Requests of (prefix, tree). Tokens are random below 8; pages are dealt in reverse order.
    fn new(requests: &[(usize, TreeShape)], spare_rows: usize, page_size: usize, pages_per_request: usize) -> Bench {
        let mut rng = Rng(7);
        let mut rows = Vec::new();
        let mut words = vec![0; 4];
        for (index, (prefix, tree)) in requests.iter().enumerate() {
            let first_row = rows.len() as u32;
            let n_rows = tree.len() as u32;
            for node in 0..tree.len() {
                rows.push(Row {
                    token: ((rng.next() + 1.0) * 4.0) as u32,
                    position: (prefix + tree.depth(node)) as u32,
                    request: index as u32,
                    node: node as u32,
                    ancestors: tree.ancestors(node),
                });
            }
            let request = Request {
                prefix: *prefix as u32,
                first_row,
                n_rows,
                sample: 0,
                seed: [1, 2],
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                repetition_penalty: 1.0,
                given: 0,
            };
            words.extend(request.to_words());
        }
        (words[0], words[1]) = (rows.len() as u32, requests.len() as u32);
        words.resize(HEADER_WORDS + MAX_REQUESTS * Request::WORDS, 0);
        let n_pages = MAX_REQUESTS * pages_per_request;
        let pages: Vec<u32> = (0..n_pages as u32).rev().collect();
        let mut pass = Pass::new("test", rows.len() + spare_rows);
        let batch = Batch {
            rows: pass.add("rows", Role::Input, DType::U32, &[rows.len() + spare_rows, Row::WORDS]),
            requests: pass.add("requests", Role::Input, DType::U32, &[words.len()]),
            pages: pass.add("pages", Role::Input, DType::U32, &[MAX_REQUESTS, pages_per_request]),
        };
        let as_numbers = |words: &[u32]| Some(words.iter().map(|w| f32::from_bits(*w)).collect::<Vec<_>>());
        let row_words: Vec<u32> = rows.iter().flat_map(Row::to_words).collect();
        let held = vec![as_numbers(&row_words), as_numbers(&words), as_numbers(&pages)];
        Bench { pass, batch, rows, requests: requests.len(), page_size, pages, held }
    }

    fn buffer(&mut self, name: &str, role: Role, dtype: DType, shape: &[usize], numbers: Option<Vec<f32>>) -> Buf {
        let buf = self.pass.add(name, role, dtype, shape);
        assert_eq!(buf.0, self.held.len(), "{name} is new");
        self.held.push(numbers.map(|n| n.into_iter().map(|x| rounded(dtype, x)).collect()));
        buf
    }

    fn numbers(&self, buf: Buf) -> &[f32] {
        self.held[buf.0].as_ref().expect("a buffer that was given numbers")
    }

    /// Runs the ops; what every buffer holds then.
    fn run(&self, gpu: &mut WgpuBackend, ops: Vec<Op>) -> Vec<Vec<f32>> {
        let pass = Pass { ops, ..self.pass.clone() };
        pass.check().unwrap();
        let ids: Vec<BufferId> =
            pass.buffers.iter().zip(&self.held).map(|(desc, numbers)| place(gpu, desc, numbers.as_deref())).collect();
        let compiled = gpu.compile(&pass, &ids).unwrap();
        let keys = self.rows.iter().map(|r| r.position as usize + 1).max().unwrap();
        gpu.run(compiled, Extent { rows: self.rows.len(), requests: self.requests, keys }).unwrap();
        let all = pass.buffers.iter().zip(&ids);
        all.map(|(d, id)| unpacked(d.dtype, &gpu.read(*id, 0, d.bytes() / 4).unwrap())).collect()
    }

    fn slot(&self, request: usize, slot: usize) -> (usize, usize) {
        let pages_per_request = self.pages.len() / MAX_REQUESTS;
        (self.pages[request * pages_per_request + slot / self.page_size] as usize, slot % self.page_size)
    }

    fn slot_of(&self, row: &Row, node: usize) -> (usize, usize) {
        self.slot(row.request as usize, self.prefix(row) + node)
    }

    fn prefix(&self, row: &Row) -> usize {
        row.position as usize + 1 - row.path().count()
    }
}

fn place(gpu: &mut WgpuBackend, desc: &BufferDesc, numbers: Option<&[f32]>) -> BufferId {
    let bytes = numbers.map(|n| packed(desc.dtype, n));
    if let (Role::Weight, Some(bytes)) = (desc.role, &bytes) {
        // Two parts, as fused weights have.
        let cut = desc.shape[0] / 2 * (desc.bytes() / desc.shape[0]);
        let part = |b: &[u8]| Tensor { dtype: desc.dtype, shape: vec![], bytes: Bytes::from_vec(b.to_vec()) };
        return gpu.load(desc, &[part(&bytes[..cut]), part(&bytes[cut..])]).unwrap();
    }
    let id = gpu.alloc(desc).unwrap();
    if let Some(bytes) = bytes {
        gpu.write(id, 0, &bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>())
            .unwrap();
    }
    id
}

fn gpu(binding_bytes: usize) -> Option<WgpuBackend> {
    if adapters().is_empty() {
        return None;
    }
    Some(WgpuBackend::with_binding_bytes(0, binding_bytes).unwrap())
}

fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert!(got.len() >= want.len(), "{what}: {} numbers, expected {}", got.len(), want.len());
    let scale = want.iter().fold(1e-3_f64, |m, w| m.max(w.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() <= tolerance * scale, "{what}[{i}]: got {g}, expected {w}");
    }
}

fn chains(lengths: &[usize]) -> Vec<(usize, TreeShape)> {
    lengths.iter().map(|&n| (5, TreeShape::chain(n).unwrap())).collect()
}

struct Heads {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    page_size: usize,
    cache: DType,
}

impl Heads {
    fn caches(&self, b: &mut Bench, numbers: Option<Vec<f32>>) -> (CacheShape, Buf, Buf) {
        let shape = CacheShape {
            layers: 2,
            pages: b.pages.len(),
            kv_heads: self.kv_heads,
            page_size: self.page_size,
            head_dim: self.dim,
        };
        let k = b.buffer("k", Role::Cache, self.cache, &shape.dims(), numbers.clone());
        let v = numbers.map(|n| n.into_iter().rev().collect());
        (shape, k, b.buffer("v", Role::Cache, self.cache, &shape.dims(), v))
    }
}

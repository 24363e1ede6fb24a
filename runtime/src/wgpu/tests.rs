//! Each op against plain loops, on whatever GPU is there; a machine without one has nothing to test.

use treespark_kernel_gen::layout::{HEADER_WORDS, accepted_words};
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{
    Buf, BufferDesc, CacheShape, DType, MAX_NODES, Op, Pass, Request, Role, Row, TreeShape, TreeSpec,
};
use treespark_models::{Bytes, Tensor};

use super::{WgpuBackend, adapters};
use crate::backend::{Backend, BufferId, Extent};
use crate::error::Error;

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

fn norm(x: &[f32], gamma: &[f32], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
    x.iter().zip(gamma).map(|(&v, &g)| f64::from(v) * f64::from(g) / (mean + eps).sqrt()).collect()
}

fn product(weight: &[f32], x: &[f64]) -> Vec<f64> {
    weight.chunks(x.len()).map(|row| row.iter().zip(x).map(|(&w, v)| f64::from(w) * v).sum()).collect()
}

const FORMATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

#[test]
fn embed_widens_the_tokens_rows() {
    for (dtype, binding_bytes) in FORMATS.into_iter().zip([usize::MAX, 800, 400]) {
        let Some(mut gpu) = gpu(binding_bytes.max(1024)) else { return };
        let mut b = Bench::new(&chains(&[4, 0]), 2, 4, 8);
        let table = Rng(1).numbers(64 * 24);
        let table = b.buffer("table", Role::Weight, dtype, &[64, 24], Some(table));
        let out = b.buffer("out", Role::Scratch, DType::F32, &[b.rows.len() + 2, 24], None);
        let held = b.run(&mut gpu, vec![Op::Embed { batch: b.batch, table, out }]);
        for (i, row) in b.rows.iter().enumerate() {
            let at = row.token as usize * 24;
            assert_eq!(held[out.0][i * 24..][..24], b.numbers(table)[at..at + 24], "{dtype:?} row {i}");
        }
        assert_eq!(held[out.0][b.rows.len() * 24..], [0.0; 48], "rows past the end are left alone");
    }
}

/// project, gate/up and head over odd sizes, row counts and banks.
#[test]
fn weight_ops_match_plain_loops() {
    let cases =
        [(72, 40, 0, DType::BF16), (24, 100, 2, DType::F32), (136, 33, 15, DType::F16), (64, 40, 16, DType::BF16)];
    for ((k, n, tree, dtype), binding_bytes) in cases.into_iter().zip([usize::MAX, 6000, 9000, 5440]) {
        let Some(mut gpu) = gpu(binding_bytes) else { return };
        let mut b = Bench::new(&chains(&[tree]), 0, 4, 16);
        let rows = b.rows.len();
        let mut rng = Rng(3);
        let x = b.buffer("x", Role::Scratch, DType::F32, &[rows, k], Some(rng.numbers(rows * k)));
        let gamma = b.buffer("norm", Role::Weight, DType::F32, &[k], Some(rng.numbers(k)));
        let weight = b.buffer("weight", Role::Weight, dtype, &[2 * n, k], Some(rng.numbers(2 * n * k)));
        let residual = b.buffer("residual", Role::Scratch, DType::F32, &[rows, 2 * n], Some(rng.numbers(rows * 2 * n)));
        let out = b.buffer("out", Role::Scratch, DType::F32, &[rows, n], None);
        let logits = b.buffer("logits", Role::Scratch, DType::F32, &[rows, 2 * n], None);
        let (batch, eps) = (b.batch, 1e-5);
        let ops = vec![
            Op::Project { batch, x, weight, residual },
            Op::GateUp { batch, eps, x, norm: gamma, weight, out },
            Op::Head { batch, eps, x, norm: gamma, weight, logits },
        ];
        let held = b.run(&mut gpu, ops);
        for r in 0..rows {
            let row = &b.numbers(x)[r * k..][..k];
            let plain: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
            let mut sum = product(b.numbers(weight), &plain);
            sum.iter_mut().zip(&b.numbers(residual)[r * 2 * n..]).for_each(|(s, &v)| *s += f64::from(v));
            assert_close(&format!("project {dtype:?} row {r}"), &held[residual.0][r * 2 * n..], &sum, 1e-5);
            let normed = product(b.numbers(weight), &norm(row, b.numbers(gamma), 1e-5));
            assert_close(&format!("head {dtype:?} row {r}"), &held[logits.0][r * 2 * n..], &normed, 1e-5);
            let gated: Vec<f64> = (0..n).map(|i| normed[i] / (1.0 + (-normed[i]).exp()) * normed[n + i]).collect();
            assert_close(&format!("gate_up {dtype:?} row {r}"), &held[out.0][r * n..], &gated, 1e-5);
        }
    }
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

fn check_qkv(h: Heads, bias: bool, head_norm: bool, tree: &str, binding_bytes: usize) {
    let Some(mut gpu) = gpu(binding_bytes) else { return };
    let what = format!("{}/{} heads of {}, {:?}, {tree}", h.heads, h.kv_heads, h.dim, h.cache);
    let mut b = Bench::new(&[(3, tree.parse().unwrap()), (9, TreeShape::root())], 1, h.page_size, 64 / h.page_size);
    let (rows, hidden, dim) = (b.rows.len() + 1, 40, h.dim);
    let all = h.heads + 2 * h.kv_heads;
    let mut rng = Rng(5);
    let (_, k_cache, v_cache) = h.caches(&mut b, None);
    let x = b.buffer("x", Role::Scratch, DType::F32, &[rows, hidden], Some(rng.numbers(rows * hidden)));
    let gamma = b.buffer("norm", Role::Weight, DType::F32, &[hidden], Some(rng.numbers(hidden)));
    let numbers = rng.numbers(all * dim * hidden);
    let weight = b.buffer("weight", Role::Weight, DType::BF16, &[all * dim, hidden], Some(numbers));
    let mut small = |name: &str, n: usize| b.buffer(name, Role::Weight, DType::F32, &[n], Some(rng.numbers(n)));
    let bias = bias.then(|| small("bias", all * dim));
    let q_norm = head_norm.then(|| small("q_norm", dim));
    let k_norm = head_norm.then(|| small("k_norm", dim));
    let rope = b.buffer("rope", Role::Weight, DType::F32, &[64, dim / 2, 2], Some(rng.numbers(64 * dim)));
    let q = b.buffer("q", Role::Scratch, DType::F32, &[rows, h.heads, dim], None);
    let (batch, layer, heads, kv_heads, eps) = (b.batch, 1, h.heads, h.kv_heads, 1e-5);
    let op = Op::Qkv {
        batch,
        layer,
        heads,
        kv_heads,
        eps,
        x,
        norm: gamma,
        weight,
        bias,
        q_norm,
        k_norm,
        rope,
        q,
        k_cache,
        v_cache,
    };
    let held = b.run(&mut gpu, vec![op]);

    let cache = b.pass.cache_shape(k_cache);
    let mut written = vec![false; b.pass.buffer(k_cache).len()];
    for (r, row) in b.rows.iter().enumerate() {
        let mut y = product(b.numbers(weight), &norm(&b.numbers(x)[r * hidden..][..hidden], b.numbers(gamma), 1e-5));
        if let Some(bias) = bias {
            y.iter_mut().zip(b.numbers(bias)).for_each(|(y, &b)| *y += f64::from(b));
        }
        for (head, y) in y.chunks_mut(dim).enumerate() {
            let weights = if head < heads { q_norm } else { k_norm };
            if let Some(weights) = weights.filter(|_| head < heads + kv_heads) {
                let rms = (y.iter().map(|v| v * v).sum::<f64>() / dim as f64 + 1e-5).sqrt();
                y.iter_mut().zip(b.numbers(weights)).for_each(|(y, &w)| *y *= f64::from(w) / rms);
            }
            if head < heads + kv_heads {
                for i in 0..dim / 2 {
                    let turn = &b.numbers(rope)[(row.position as usize * dim / 2 + i) * 2..][..2];
                    let (cos, sin) = (f64::from(turn[0]), f64::from(turn[1]));
                    (y[i], y[i + dim / 2]) = (y[i] * cos - y[i + dim / 2] * sin, y[i + dim / 2] * cos + y[i] * sin);
                }
            }
            if head < heads {
                assert_close(&format!("{what}: q row {r}"), &held[q.0][(r * heads + head) * dim..], y, 1e-5);
                continue;
            }
            let to = if head < heads + kv_heads { k_cache } else { v_cache };
            let (page, place) = b.slot_of(row, row.node as usize);
            let at = cache.index(layer, page, (head - heads) % kv_heads, place);
            let tolerance = if h.cache == DType::F32 { 1e-5 } else { 5e-3 };
            assert_close(&format!("{what}: cached row {r}"), &held[to.0][at..], y, tolerance);
            written[at..at + dim].fill(true);
        }
    }
    let untouched = |buf: Buf| held[buf.0].iter().zip(&written).all(|(v, written)| *written || *v == 0.0);
    assert!(untouched(k_cache) && untouched(v_cache), "{what}: a slot that is no row's was written");
}

#[test]
fn qkv_matches_plain_loops() {
    let heads = |heads, kv_heads, dim, page_size, cache| Heads { heads, kv_heads, dim, page_size, cache };
    check_qkv(heads(3, 1, 16, 4, DType::BF16), false, false, "4x2x2x1", usize::MAX);
    check_qkv(heads(5, 1, 64, 16, DType::F16), true, false, "root", usize::MAX);
    check_qkv(heads(2, 2, 32, 4, DType::F32), false, true, "2x2", usize::MAX);
    check_qkv(heads(6, 2, 24, 8, DType::BF16), true, true, "chain:20", usize::MAX);
    check_qkv(heads(6, 1, 16, 4, DType::BF16), true, false, "2x1", 6144);
}

/// Attention of all rows; unused slots hold NaN. Returns the outputs after checking them.
fn check_attention(h: &Heads, requests: &[(usize, TreeShape)], spec: TreeSpec, tolerance: f64) -> Option<Vec<f32>> {
    let mut gpu = gpu(usize::MAX)?;
    let what = format!("{}/{} heads of {}, {:?}, {requests:?}", h.heads, h.kv_heads, h.dim, h.cache);
    let longest = requests.iter().map(|(prefix, tree)| prefix + tree.len()).max()?;
    let mut b = Bench::new(requests, 0, h.page_size, longest.div_ceil(h.page_size));
    let dim = h.dim;
    let len = 2 * b.pages.len() * h.kv_heads * h.page_size * dim;
    let (cache, k_cache, v_cache) = h.caches(&mut b, Some(vec![f32::NAN; len]));
    let used: Vec<(usize, usize)> =
        requests.iter().enumerate().map(|(r, (prefix, tree))| (r, prefix + tree.len())).collect();
    for (request, slots) in used {
        for slot in 0..slots {
            // What a slot holds depends on its place alone, so that different trees can be compared.
            let mut rng = Rng((request * 10_000 + slot) as u64);
            let (page, place) = b.slot(request, slot);
            for head in 0..h.kv_heads {
                let at = cache.index(1, page, head, place);
                for buf in [k_cache, v_cache] {
                    let numbers = rng.numbers(dim).into_iter().map(|x| rounded(h.cache, 2.0 * x));
                    b.held[buf.0].as_mut()?[at..at + dim].copy_from_slice(&numbers.collect::<Vec<_>>());
                }
            }
        }
    }
    let rows = b.rows.len();
    let queries = b.rows.iter().flat_map(|row| Rng(u64::from(row.position)).numbers(h.heads * dim)).collect();
    let q = b.buffer("q", Role::Scratch, DType::F32, &[rows, h.heads, dim], Some(queries));
    let out = b.buffer("out", Role::Scratch, DType::F32, &[rows, h.heads, dim], None);
    let scale = 1.0 / (dim as f32).sqrt();
    let (batch, heads, kv_heads) = (b.batch, h.heads, h.kv_heads);
    let op = Op::TreeAttention { batch, layer: 1, heads, kv_heads, scale, tree: spec, q, k_cache, v_cache, out };
    let held = b.run(&mut gpu, vec![op]);
    for (r, row) in b.rows.iter().enumerate() {
        let mut places: Vec<_> = (0..b.prefix(row)).map(|slot| b.slot(row.request as usize, slot)).collect();
        places.extend(row.path().map(|node| b.slot_of(row, node)));
        for head in 0..heads {
            let query = &b.numbers(q)[(r * heads + head) * dim..][..dim];
            let at = |(page, place): &(usize, usize)| cache.index(1, *page, head / (heads / kv_heads), *place);
            let dot = |from: usize| {
                let key = &b.numbers(k_cache)[from..from + dim];
                key.iter().zip(query).map(|(&k, &q)| f64::from(k) * f64::from(q)).sum::<f64>() * f64::from(scale)
            };
            let scores: Vec<f64> = places.iter().map(|p| dot(at(p)).exp()).collect();
            let sum: f64 = scores.iter().sum();
            let mut want = vec![0.0; dim];
            for (p, s) in places.iter().zip(&scores) {
                let value = &b.numbers(v_cache)[at(p)..][..dim];
                want.iter_mut().zip(value).for_each(|(w, &v)| *w += s / sum * f64::from(v));
            }
            assert_close(
                &format!("{what}: row {r} head {head}"),
                &held[out.0][(r * heads + head) * dim..],
                &want,
                tolerance,
            );
        }
    }
    Some(held[out.0].clone())
}

#[test]
fn attention_matches_plain_loops() {
    let tree = |text: &str| text.parse::<TreeShape>().unwrap();
    let cases = [
        (3, 1, 16, 4, DType::BF16, vec![(0, tree("root"))]),
        (3, 1, 64, 16, DType::BF16, vec![(300, tree("4x2x2x1"))]),
        (10, 2, 32, 4, DType::F16, vec![(0, tree("chain:40")), (129, tree("3x2")), (255, tree("root"))]),
        (2, 2, 64, 16, DType::F32, vec![(127, tree("2x2x2")), (0, tree("2x1x1x1"))]),
        (8, 1, 128, 16, DType::BF16, vec![(20, tree("4x4"))]),
        (4, 2, 256, 16, DType::BF16, vec![(513, tree("2x2"))]),
        (20, 1, 24, 8, DType::BF16, vec![(40, tree("2x3"))]),
        (1, 1, 32, 16, DType::BF16, vec![(100, tree("chain:255"))]),
    ];
    for (heads, kv_heads, dim, page_size, cache, requests) in cases {
        check_attention(&Heads { heads, kv_heads, dim, page_size, cache }, &requests, TreeSpec::Any(256), 2e-5);
    }
}

#[test]
fn a_static_tree_adds_the_same_numbers() {
    let h = Heads { heads: 3, kv_heads: 1, dim: 32, page_size: 4, cache: DType::BF16 };
    let tree: TreeShape = "4x2x2x1".parse().unwrap();
    // A prefix of the nodes is a tree too.
    let requests = [(130, tree.clone()), (7, tree.prefix(9))];
    let any = check_attention(&h, &requests, TreeSpec::Any(64), 2e-5);
    assert_eq!(any, check_attention(&h, &requests, TreeSpec::Static(tree), 2e-5));
}

/// The same token at the same place gets the same bits, however many rows share the pass, and in a tree as in plain
/// decoding.
#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let h = Heads { heads: 3, kv_heads: 1, dim: 64, page_size: 16, cache: DType::BF16 };
    let size = 3 * 64;
    let Some(chain) = check_attention(&h, &[(250, TreeShape::chain(15).unwrap())], TreeSpec::Any(64), 2e-5) else {
        return;
    };
    for depth in [0, 5, 6, 15] {
        let plain = check_attention(&h, &[(250 + depth, TreeShape::root())], TreeSpec::Any(64), 2e-5).unwrap();
        assert_eq!(chain[depth * size..][..size], plain[..], "depth {depth}");
    }

    let product = |rows: usize| {
        let mut gpu = gpu(usize::MAX).unwrap();
        let mut b = Bench::new(&chains(&[rows - 1]), 0, 16, 4);
        let numbers = Rng(11).numbers(72);
        let x = b.buffer("x", Role::Scratch, DType::F32, &[rows, 72], Some(numbers.repeat(rows)));
        let gamma = b.buffer("norm", Role::Weight, DType::F32, &[72], Some(Rng(12).numbers(72)));
        let weight = b.buffer("weight", Role::Weight, DType::BF16, &[80, 72], Some(Rng(13).numbers(80 * 72)));
        let logits = b.buffer("logits", Role::Scratch, DType::F32, &[rows, 80], None);
        let held = b.run(&mut gpu, vec![Op::Head { batch: b.batch, eps: 1e-5, x, norm: gamma, weight, logits }]);
        held[logits.0].clone()
    };
    let one = product(1);
    for rows in [2, 3, 7, 16, 21] {
        for (r, row) in product(rows).chunks(80).enumerate() {
            assert_eq!(row, one, "row {r} of {rows}");
        }
    }
}

/// Greedy: the draws along the accepted path, and the cache moved together.
#[test]
fn draw_accept_and_commit_follow_the_draws() {
    for (binding_bytes, requests) in [(usize::MAX, 1), (6160, 2)] {
        let Some(mut gpu) = gpu(binding_bytes) else { return };
        let tree: TreeShape = "2x2".parse().unwrap();
        let mut b = Bench::new(&vec![(6, tree); requests], 0, 4, 16);
        let rows = b.rows.len();
        let vocab = 70;
        // Node 2 and its child 6 are what the target draws; so are the tokens of the other leaves, at the wrong parent.
        let tokens = [10, 11, 12, 13, 14, 15, 16];
        let drawn = [12, 13, 16, 1, 1, 1, 69];
        let mut logits = Rng(17).numbers(rows * vocab);
        for r in 0..rows {
            logits[r * vocab + drawn[r % 7]] = 9.0;
            b.rows[r].token = tokens[r % 7];
        }
        b.held[0] = Some(b.rows.iter().flat_map(|r| r.to_words()).map(f32::from_bits).collect());
        let h = Heads { heads: 1, kv_heads: 1, dim: 16, page_size: 4, cache: DType::BF16 };
        let len = 2 * b.pages.len() * 4 * 16;
        let (cache, k_cache, v_cache) = h.caches(&mut b, Some(Rng(19).numbers(len)));
        let seen = b.buffer("seen", Role::Input, DType::U32, &[MAX_REQUESTS, 3], None);
        let logits = b.buffer("logits", Role::Scratch, DType::F32, &[rows, vocab], Some(logits));
        let draws = b.buffer("draws", Role::Output, DType::U32, &[rows], None);
        let ids = b.buffer("ids", Role::Output, DType::U32, &[rows, 3], None);
        let values = b.buffer("values", Role::Output, DType::F32, &[rows, 3], None);
        let accepted = b.buffer("accepted", Role::Output, DType::U32, &[MAX_REQUESTS, accepted_words(MAX_NODES)], None);
        let batch = b.batch;
        let ops = vec![
            Op::Draw { batch, seen, logits, draws },
            Op::TopK { batch, logits, ids, values },
            Op::Accept { batch, tree: TreeSpec::Any(64), draws, accepted },
            Op::Commit { batch, accepted, k_cache, v_cache },
        ];
        let held = b.run(&mut gpu, ops);
        let word = |buf: Buf, i: usize| held[buf.0][i].to_bits();
        for request in 0..requests {
            let at = request * accepted_words(MAX_NODES);
            assert_eq!(word(accepted, at), 3);
            assert_eq!([0, 1, 2].map(|i| word(accepted, at + 1 + i)), [0, 2, 6]);
            assert_eq!([0, 1, 2].map(|i| word(accepted, at + 1 + MAX_NODES + i)), [12, 16, 69]);
            assert_eq!(word(ids, request * 7 * 3), 12);
            assert_eq!(held[values.0][request * 7 * 3], 9.0);
            for (depth, node) in [(1, 2), (2, 6)] {
                let index = |slot: usize, layer: usize| {
                    let (page, place) = b.slot(request, slot);
                    cache.index(layer, page, 0, place)
                };
                for (layer, buf) in [(0, k_cache), (1, v_cache)] {
                    let (to, source) = (index(6 + depth, layer), index(6 + node, layer));
                    assert_eq!(held[buf.0][to..to + 16], b.numbers(buf)[source..source + 16], "depth {depth}");
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_had_is_an_error_with_its_size() {
    assert!(matches!(WgpuBackend::new(99), Err(Error::NoDevice { .. })));
    let Some(mut gpu) = gpu(usize::MAX) else { return };
    let shape = vec![1 << 20, 1 << 20];
    let desc = BufferDesc { name: "logits".into(), role: Role::Scratch, dtype: DType::F32, shape };
    let error = gpu.alloc(&desc).unwrap_err();
    assert!(
        matches!(&error, Error::OutOfMemory { needed, what, .. } if *needed == 4 << 40 && what == "logits"),
        "{error}"
    );
    // The device is none the worse for it.
    let desc = BufferDesc { shape: vec![3], ..desc };
    let id = gpu.alloc(&desc).unwrap();
    gpu.write(id, 1, &[7]).unwrap();
    assert_eq!(gpu.read(id, 0, 3).unwrap(), [0, 7, 0]);
    // A freed buffer's pass must not run again; if it does, that is no panic.
    let Some(out) = check_stale_pass(&mut gpu) else { return };
    assert!(matches!(out, Error::Device(_)), "{out}");
}

fn check_stale_pass(gpu: &mut WgpuBackend) -> Option<Error> {
    let mut b = Bench::new(&chains(&[1]), 0, 4, 8);
    let table = b.buffer("table", Role::Weight, DType::F32, &[16, 24], Some(vec![0.0; 16 * 24]));
    let out = b.buffer("out", Role::Scratch, DType::F32, &[2, 24], None);
    let pass = Pass { ops: vec![Op::Embed { batch: b.batch, table, out }], ..b.pass.clone() };
    let ids: Vec<BufferId> =
        pass.buffers.iter().zip(&b.held).map(|(desc, numbers)| place(gpu, desc, numbers.as_deref())).collect();
    let compiled = gpu.compile(&pass, &ids).unwrap();
    gpu.free(ids[table.0]);
    gpu.run(compiled, Extent { rows: 2, requests: 1, keys: 7 }).err()
}

//! The ops that multiply with a weight. Each is one parallel loop over chunks of weight rows: a chunk's product with all
//! rows of the pass, and what the op does with it, while it is in the cache.

use std::ops::Range;

use rayon::prelude::*;
use treespark_kernel_gen::Row;

use super::buffer::Matrix;
use super::math::{SwiGlu, rms_norm, rms_norm_in_place, rope};
use super::simd::Isa;

/// Chunks per thread: enough that a thread that is held up does not hold up the others.
const CHUNKS_PER_THREAD: usize = 8;
/// Fewer weight rows are not worth a task.
const MIN_CHUNK: usize = 16;
/// A chunk's products stay in the second-level cache: at most this many values.
const MAX_PRODUCTS: usize = 64 << 10;
/// Rows that are normalised by one thread before another is asked for help.
const NORM_ROWS: usize = 16;

/// `rms_norm` of every row of `x`, `[m, H]`.
pub fn normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let hidden = weight.len();
    let mut out = vec![0.0; x.len()];
    let rows = out.par_chunks_mut(hidden).zip(x.par_chunks(hidden)).with_min_len(NORM_ROWS);
    rows.for_each(|(out, x)| rms_norm(x, weight, eps, out));
    out
}

/// `residual += x · weightᵀ`
pub fn project(isa: Isa, weight: &Matrix, x: &[f32], residual: &mut [f32]) {
    let n = weight.rows();
    let m = residual.len() / n;
    for_chunks(columns(residual, n, chunk(n, m)), |range, products, residual| {
        products.resize(m * range.len(), 0.0);
        let width = range.len();
        weight.multiply(isa, range, x, products);
        for (residual, products) in residual.iter_mut().zip(products.chunks_exact(width)) {
            for (residual, product) in residual.iter_mut().zip(products) {
                *residual += product;
            }
        }
    });
}

/// `out = silu(x · gateᵀ) * (x · upᵀ)`, gate and up being the halves of the weight.
pub fn gate_up(isa: Isa, weight: &Matrix, x: &[f32], out: &mut [f32]) {
    let n = weight.rows() / 2;
    let m = out.len() / n;
    for_chunks(columns(out, n, chunk(n, 2 * m)), |range, products, out| {
        let width = range.len();
        products.resize(2 * m * width, 0.0);
        let (gates, ups) = products.split_at_mut(m * width);
        weight.multiply(isa, range.clone(), x, gates);
        weight.multiply(isa, n + range.start..n + range.end, x, ups);
        for ((out, gate), up) in out.iter_mut().zip(gates.chunks(width)).zip(ups.chunks(width)) {
            isa.run(SwiGlu { gate, up, out });
        }
    });
}

/// `out = x · weightᵀ`
pub fn product(isa: Isa, weight: &Matrix, x: &[f32], out: &mut [f32]) {
    let n = weight.rows();
    let m = out.len() / n;
    for_chunks(columns(out, n, chunk(n, m)), |range, products, out| {
        let width = range.len();
        products.resize(m * width, 0.0);
        weight.multiply(isa, range, x, products);
        for (out, products) in out.iter_mut().zip(products.chunks_exact(width)) {
            out.copy_from_slice(products);
        }
    });
}

/// What `Op::Qkv` does with a head once it is multiplied.
pub struct Heads<'a> {
    pub head_dim: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub eps: f32,
    pub bias: Option<&'a [f32]>,
    pub q_norm: Option<&'a [f32]>,
    pub k_norm: Option<&'a [f32]>,
    pub rope: &'a [f32],
    pub rows: &'a [Row],
}

impl Heads<'_> {
    /// Projects `x`: queries to `q`, `[m, heads, D]`, keys and then values to `kv`, `[m, 2 * kv_heads, D]`.
    pub fn project(&self, isa: Isa, weight: &Matrix, x: &[f32], q: &mut [f32], kv: &mut [f32]) {
        let dim = self.head_dim;
        let mut heads = if self.heads == 0 { Vec::new() } else { columns(q, self.heads * dim, dim) };
        heads.extend(columns(kv, 2 * self.kv_heads * dim, dim));
        for_chunks(heads, |range, products, out| {
            products.resize(out.len() * dim, 0.0);
            let head = range.start / dim;
            weight.multiply(isa, range, x, products);
            for ((out, y), row) in out.iter_mut().zip(products.chunks_exact_mut(dim)).zip(self.rows) {
                self.finish(head, y, row);
                out.copy_from_slice(y);
            }
        });
    }

    /// Bias, norm and rotation of one head of one row.
    fn finish(&self, head: usize, y: &mut [f32], row: &Row) {
        if let Some(bias) = self.bias {
            y.iter_mut().zip(&bias[head * self.head_dim..]).for_each(|(y, bias)| *y += bias);
        }
        let norm = match head {
            _ if head < self.heads => self.q_norm,
            _ if head < self.heads + self.kv_heads => self.k_norm,
            _ => return,
        };
        if let Some(norm) = norm {
            rms_norm_in_place(y, norm, self.eps);
        }
        rope(y, self.rope, row);
    }
}

/// Weight rows per chunk, of n in all, for products with m rows. It has no influence on any value.
fn chunk(n: usize, m: usize) -> usize {
    let even = n.div_ceil(CHUNKS_PER_THREAD * rayon::current_num_threads());
    even.min(MAX_PRODUCTS / m).max(MIN_CHUNK).next_multiple_of(4)
}

/// Cuts `[m, n]` into chunks of columns: for each, the slices of all rows.
fn columns(out: &mut [f32], n: usize, chunk: usize) -> Vec<Vec<&mut [f32]>> {
    let mut chunks: Vec<Vec<&mut [f32]>> = (0..n.div_ceil(chunk)).map(|_| Vec::new()).collect();
    for row in out.chunks_exact_mut(n) {
        for (chunk, slice) in chunks.iter_mut().zip(row.chunks_mut(chunk)) {
            chunk.push(slice);
        }
    }
    chunks
}

/// Runs a task for every chunk, with the range of weight rows that are its columns and memory for their products.
fn for_chunks(chunks: Vec<Vec<&mut [f32]>>, task: impl Fn(Range<usize>, &mut Vec<f32>, &mut [&mut [f32]]) + Sync) {
    let width = chunks[0][0].len();
    chunks.into_par_iter().with_max_len(1).enumerate().for_each_init(Vec::new, |products, (i, mut chunk)| {
        let range = i * width..i * width + chunk[0].len();
        task(range, products, &mut chunk);
    });
}

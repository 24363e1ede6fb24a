//! What lies in the CPU's memory: matrices as a checkpoint has them, and words for everything else.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use treespark_kernel_gen::{BufferDesc, DType};
use treespark_models::{Bytes, Tensor};

use super::matmul::Product;
use super::simd::{Element, Isa};

pub enum Buffer {
    /// A weight of two dimensions: shared with whoever loaded it.
    Matrix(Matrix),
    /// Everything else. Elements of 16 bits lie two in a word, the first in the low half.
    Words(Vec<u32>),
}

impl Buffer {
    /// A weight. What is not a matrix (norms, biases, the rope table) is small, and copied.
    pub fn load(desc: &BufferDesc, parts: &[Tensor]) -> Buffer {
        if let &[_, columns] = desc.shape.as_slice() {
            return Buffer::Matrix(Matrix::new(desc.dtype, columns, parts));
        }
        let mut words = zeroed(desc);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        let mut at = 0;
        for part in parts {
            let part = part.bytes.as_slice();
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        assert_eq!(at, desc.bytes(), "the parts of {} do not fill it", desc.name);
        Buffer::Words(words)
    }
}

/// Words of zeros, which take no memory until they are written.
pub fn zeroed(desc: &BufferDesc) -> Vec<u32> {
    vec![0; desc.bytes().div_ceil(size_of::<u32>())]
}

/// Weight rows `[n, k]`, stacked from parts that stay where they are.
pub struct Matrix {
    dtype: DType,
    columns: usize,
    parts: Vec<Part>,
}

struct Part {
    rows: Range<usize>,
    /// Aligned to the element's size.
    bytes: Bytes,
}

impl Matrix {
    fn new(dtype: DType, columns: usize, parts: &[Tensor]) -> Matrix {
        let mut first = 0;
        let parts = parts.iter().map(|part| {
            let n = part.bytes.as_slice().len() / (columns * dtype.size());
            let rows = first..first + n;
            first += n;
            Part { rows, bytes: aligned(&part.bytes, dtype) }
        });
        Matrix { dtype, columns, parts: parts.collect() }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.parts.last().map_or(0, |part| part.rows.end)
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Row `row`, widened.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        for (part, _) in self.parts_of(row..row + 1) {
            let bytes = self.bytes(part, row..row + 1);
            match self.dtype {
                DType::BF16 => widen::<bf16>(bytes, out),
                DType::F16 => widen::<f16>(bytes, out),
                DType::F32 => widen::<f32>(bytes, out),
                DType::U32 => unreachable!("a weight of words"),
            }
        }
    }

    /// `out[r][n - rows.start] = x[r] · self[n]` for n in `rows`; `out` is `[m, rows.len()]`.
    pub fn multiply(&self, isa: Isa, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
        let (k, stride) = (self.columns, rows.len());
        for (part, range) in self.parts_of(rows.clone()) {
            let out = &mut out[range.start - rows.start..];
            let bytes = self.bytes(part, range);
            match self.dtype {
                DType::BF16 => Product::<bf16> { weight: bytemuck::cast_slice(bytes), x, k, out, stride }.compute(isa),
                DType::F16 => Product::<f16> { weight: bytemuck::cast_slice(bytes), x, k, out, stride }.compute(isa),
                DType::F32 => Product::<f32> { weight: bytemuck::cast_slice(bytes), x, k, out, stride }.compute(isa),
                DType::U32 => unreachable!("a weight of words"),
            }
        }
    }

    /// The parts that hold some of these rows, and which.
    fn parts_of(&self, rows: Range<usize>) -> impl Iterator<Item = (&Part, Range<usize>)> {
        let overlap = move |part: &Range<usize>| part.start.max(rows.start)..part.end.min(rows.end);
        self.parts.iter().map(move |part| (part, overlap(&part.rows))).filter(|(_, range)| !range.is_empty())
    }

    fn bytes<'a>(&self, part: &'a Part, rows: Range<usize>) -> &'a [u8] {
        let row = self.columns * self.dtype.size();
        &part.bytes.as_slice()[(rows.start - part.rows.start) * row..(rows.end - part.rows.start) * row]
    }
}

fn widen<W: Element>(bytes: &[u8], out: &mut [f32]) {
    for (out, &element) in out.iter_mut().zip(bytemuck::cast_slice::<u8, W>(bytes)) {
        *out = element.to_f32();
    }
}

/// The same bytes, copied only if they are not aligned: files do not promise it.
fn aligned(bytes: &Bytes, dtype: DType) -> Bytes {
    struct Words(Vec<u32>);
    impl AsRef<[u8]> for Words {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }
    let slice = bytes.as_slice();
    if slice.as_ptr().addr().is_multiple_of(dtype.size()) {
        return bytes.clone();
    }
    let mut words = vec![0; slice.len().div_ceil(size_of::<u32>())];
    bytemuck::cast_slice_mut(&mut words)[..slice.len()].copy_from_slice(slice);
    Bytes::new(Arc::new(Words(words)), 0, slice.len())
}

#[cfg(test)]
mod tests {
    use treespark_kernel_gen::Role;

    use super::*;
    use crate::cpu::testing::Random;

    #[test]
    fn parts_and_misaligned_bytes_are_one_matrix() {
        let (k, sizes) = (24, [3, 1, 7]);
        let mut random = Random::new(1);
        let all: Vec<f32> = (0..11 * k).map(|_| random.symmetric()).collect();
        let x: Vec<f32> = (0..2 * k).map(|_| random.symmetric()).collect();
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let mut first = 0;
            let parts: Vec<Tensor> = sizes
                .iter()
                .enumerate()
                .map(|(shift, n)| {
                    let values = &all[first * k..(first + n) * k];
                    first += n;
                    let mut bytes = vec![0; shift];
                    values.iter().for_each(|&value| match dtype {
                        DType::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                        DType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                        _ => bytes.extend(value.to_le_bytes()),
                    });
                    let len = bytes.len() - shift;
                    Tensor { dtype, shape: vec![*n, k], bytes: Bytes::new(Arc::new(bytes), shift, len) }
                })
                .collect();
            let desc = BufferDesc { name: "w".into(), role: Role::Weight, dtype, shape: vec![11, k] };
            let Buffer::Matrix(matrix) = Buffer::load(&desc, &parts) else { panic!("two dimensions are a matrix") };
            assert_eq!(matrix.rows(), 11);
            let mut rows = vec![0.0; 11 * k];
            rows.chunks_mut(k).enumerate().for_each(|(row, out)| matrix.widen_row(row, out));
            assert!(rows.iter().zip(&all).all(|(a, b)| (a - b).abs() < 0.01));
            let mut out = vec![0.0; 2 * 8];
            matrix.multiply(Isa::best(), 2..10, &x, &mut out);
            for (i, y) in out.iter().enumerate() {
                let (r, n) = (i / 8, 2 + i % 8);
                let want: f32 = (0..k).map(|j| x[r * k + j] * rows[n * k + j]).sum();
                assert!((y - want).abs() < 1e-5, "{dtype:?} [{r}][{n}]: {y}, not {want}");
            }
        }
    }
}

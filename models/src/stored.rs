//! A tensor as a file stores it: where, in which format, and in which row order.

use std::ops::Range;
use std::sync::Arc;

use treespark_kernel_gen::DType;

use crate::dequant::fp8::{self, BlockScales};
use crate::dequant::{self, Format};
use crate::mmap::MappedFile;
use crate::{Bytes, Error, Result, Tensor};

#[derive(Debug, Clone)]
pub struct Stored {
    pub file: Arc<MappedFile>,
    /// Lies within the file, and holds `shape` in `format`: whoever makes a `Stored` has checked it.
    pub range: Range<usize>,
    /// The name of the type where it is not supported; then `range` means nothing.
    pub format: Result<Format, String>,
    /// Row-major: the last dimension is contiguous.
    pub shape: Vec<usize>,
    pub rows: RowOrder,
    /// Of 8-bit floats.
    pub scales: Option<BlockScales>,
}

/// The order in which the rows of a projection to rotated heads are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// As everywhere in this crate: dimension i of a head is rotated with dimension i + D/2.
    Halves,
    /// Dimension 2i of each of so many heads is rotated with dimension 2i + 1.
    Interleaved { heads: usize },
}

impl Stored {
    /// The tensor: a view of the file where it holds `dtype` already, else converted.
    pub fn read(&self, name: &str, dtype: DType) -> Result<Tensor> {
        let format = self.format.as_ref().map_err(|kind| {
            self.file.malformed(format!("tensor {name} is of type {kind}; supported: {}", Format::SUPPORTED))
        })?;
        let (range, shape) = (self.range.clone(), self.shape.clone());
        if format.dtype() == Some(dtype) && self.rows == RowOrder::Halves {
            return Ok(Tensor { dtype, shape, bytes: Bytes::new(self.file.clone(), range.start, range.len()) });
        }
        let bytes = (*self.file).as_ref();
        if let Some(BlockScales { scales, block }) = &self.scales {
            let scales = scales.read(name, DType::F32)?;
            let converted = fp8::convert(&bytes[range.clone()], shape[1], &scales.floats(), *block, dtype);
            self.file.release(range);
            return Ok(Tensor { dtype, shape, bytes: Bytes::from_vec(converted) });
        }
        let converted = match self.rows {
            RowOrder::Halves => {
                let columns = shape.last().copied().unwrap_or(1);
                dequant::convert_rows(*format, &bytes[range.clone()], columns, dtype, |row| row)
            }
            RowOrder::Interleaved { heads } => {
                let head_dim = self.head_dim(name, heads)?;
                let columns = shape[1..].iter().product();
                if format.bytes(columns).is_none() {
                    return Err(self.file.malformed(format!("tensor {name} has its rows inside {format:?} blocks")));
                }
                let stored_row = |row| interleaved_row(row, head_dim);
                dequant::convert_rows(*format, &bytes[range.clone()], columns, dtype, stored_row)
            }
        };
        self.file.release(range);
        Ok(Tensor { dtype, shape, bytes: Bytes::from_vec(converted) })
    }

    fn head_dim(&self, name: &str, heads: usize) -> Result<usize, Error> {
        let rows = self.shape[0];
        if !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
            return Err(self.file.malformed(format!(
                "tensor {name} has {rows} rows, which do not make {heads} heads of an even number of dimensions"
            )));
        }
        Ok(rows / heads)
    }
}

/// Where row `row`, of dimension i or i + D/2 of a head, is stored: at 2i or 2i + 1 of the same head.
fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, dim) = (row / head_dim, row % head_dim);
    let (half, i) = (dim / (head_dim / 2), dim % (head_dim / 2));
    head * head_dim + 2 * i + half
}

//! What of a tensor a weight buffer takes, where it is not all of it as it is stored.

use std::ops::Range;

use crate::{Bytes, Tensor};

#[derive(Debug, Clone, PartialEq)]
pub enum Cut {
    Columns(Range<usize>),
    /// Of the rows of each so large head, the last so many are rotated in pairs of neighbours as they are stored. They are
    /// taken as everywhere in this crate: row i of them is rotated with row i + half.
    Rotated {
        head: usize,
        rotated: usize,
    },
    /// Some rows of each so large head.
    OfHeads {
        head: usize,
        rows: Range<usize>,
    },
    /// The same, each head's transposed.
    Transposed {
        head: usize,
        rows: Range<usize>,
    },
}

impl Cut {
    /// Rows and columns of what is taken of so many.
    pub fn shape(&self, [rows, columns]: [usize; 2]) -> [usize; 2] {
        match self {
            Cut::Columns(range) => [rows, range.len()],
            Cut::Rotated { .. } => [rows, columns],
            Cut::OfHeads { head, rows: range } => [rows / head * range.len(), columns],
            Cut::Transposed { head, rows: range } => [rows / head * columns, range.len()],
        }
    }

    pub fn of(&self, tensor: &Tensor) -> Tensor {
        let [rows, columns] = [tensor.shape[0], tensor.shape[1]];
        let size = tensor.dtype.size();
        let bytes = tensor.bytes.as_slice();
        let row = |row: usize| &bytes[row * columns * size..][..columns * size];
        let taken: Vec<u8> = match self {
            Cut::Columns(range) => {
                (0..rows).flat_map(|i| &row(i)[range.start * size..range.end * size]).copied().collect()
            }
            &Cut::Rotated { head, rotated } => {
                (0..rows).flat_map(|i| row(stored_row(i, head, rotated))).copied().collect()
            }
            Cut::OfHeads { head, rows: range } => {
                (0..rows / head).flat_map(|h| range.clone().flat_map(move |i| row(h * head + i))).copied().collect()
            }
            Cut::Transposed { head, rows: range } => {
                let mut taken = Vec::with_capacity(rows / head * columns * range.len() * size);
                for (h, column) in (0..rows / head).flat_map(|h| (0..columns).map(move |column| (h, column))) {
                    for i in range.clone() {
                        taken.extend_from_slice(&row(h * head + i)[column * size..][..size]);
                    }
                }
                taken
            }
        };
        let shape = self.shape([rows, columns]).to_vec();
        Tensor { dtype: tensor.dtype, shape, bytes: Bytes::from_vec(taken) }
    }
}

/// Where row `row` is stored, if the last `rotated` rows of its head lie in pairs.
fn stored_row(row: usize, head: usize, rotated: usize) -> usize {
    match (row % head).checked_sub(head - rotated) {
        None => row,
        Some(i) => row - i + 2 * (i % (rotated / 2)) + i / (rotated / 2),
    }
}

#[cfg(test)]
mod tests {
    use treespark_kernel_gen::DType;

    use super::*;

    /// Rows of two elements: ten times the row, and one more.
    fn cut(rows: usize, cut: Cut) -> (Vec<usize>, Vec<f32>) {
        let bytes = (0..rows).flat_map(|row| [10.0 * row as f32, 10.0 * row as f32 + 1.0]).flat_map(f32::to_le_bytes);
        let tensor = Tensor { dtype: DType::F32, shape: vec![rows, 2], bytes: Bytes::from_vec(bytes.collect()) };
        let got = cut.of(&tensor);
        let values = got.bytes.as_slice().chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        (got.shape, values)
    }

    #[test]
    fn parts_of_heads() {
        let evens = |rows: &[usize]| rows.iter().flat_map(|&r| [10.0 * r as f32, 10.0 * r as f32 + 1.0]).collect();
        assert_eq!(cut(3, Cut::Columns(1..2)), (vec![3, 1], vec![1.0, 11.0, 21.0]));
        assert_eq!(cut(6, Cut::OfHeads { head: 3, rows: 1..3 }), (vec![4, 2], evens(&[1, 2, 4, 5])));
        let transposed = vec![0.0, 10.0, 1.0, 11.0, 30.0, 40.0, 31.0, 41.0];
        assert_eq!(cut(6, Cut::Transposed { head: 3, rows: 0..2 }), (vec![4, 2], transposed));
    }

    #[test]
    fn pairs_become_halves() {
        let (shape, values) = cut(10, Cut::Rotated { head: 5, rotated: 4 });
        let rows: Vec<usize> = values.iter().step_by(2).map(|&x| x as usize / 10).collect();
        assert_eq!((shape, rows), (vec![10, 2], vec![0, 1, 3, 2, 4, 5, 6, 8, 7, 9]));
    }
}

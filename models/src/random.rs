//! Random numbers in bulk, for whoever measures speed and does not care what a model says. One block is made, in
//! parallel, and tensors are views of it from different places on: 16 GB of weights cost no more than the largest.

use half::{bf16, f16};
use rayon::prelude::*;
use treespark_kernel_gen::DType;

use crate::{Bytes, Config, Tensor};

/// Bytes that one task makes.
const SHARE: usize = 1 << 20;

/// Elements drawn evenly from `-scale..scale`, the same for the same seed.
#[derive(Debug, Clone)]
pub struct RandomBlock {
    dtype: DType,
    bytes: Bytes,
}

impl RandomBlock {
    /// A block of `len` elements of a float type.
    pub fn new(dtype: DType, len: usize, scale: f32, seed: u64) -> RandomBlock {
        let size = dtype.size();
        let mut bytes = vec![0; len * size];
        bytes.par_chunks_mut(SHARE).enumerate().for_each(|(share, bytes)| {
            let first = (share * SHARE / size) as u64;
            for (quad, elements) in bytes.chunks_mut(4 * size).enumerate() {
                let bits = hash(seed ^ (first + 4 * quad as u64));
                for (i, element) in elements.chunks_mut(size).enumerate() {
                    // 16 bits of the hash, never zero: -32767.5 to 32767.5.
                    let value = (f32::from((bits >> (16 * i)) as i16) + 0.5) * (scale / 32768.0);
                    match dtype {
                        DType::F32 => element.copy_from_slice(&value.to_le_bytes()),
                        DType::BF16 => element.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                        DType::F16 => element.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                        DType::U32 => panic!("words are no floats"),
                    }
                }
            }
        });
        RandomBlock { dtype, bytes: Bytes::from_vec(bytes) }
    }

    /// A view of this shape, which the block must be large enough for. `which` says from where on.
    pub fn tensor(&self, shape: &[usize], which: u64) -> Tensor {
        let bytes = shape.iter().product::<usize>() * self.dtype.size();
        let spare = (self.bytes.as_slice().len() - bytes) / self.dtype.size() + 1;
        let start = hash(which) as usize % spare * self.dtype.size();
        Tensor { dtype: self.dtype, shape: shape.to_vec(), bytes: self.bytes.part(start, bytes) }
    }

    /// Tensors that, stacked along the first dimension, have this shape, which may hold more than the block does.
    pub fn parts(&self, shape: &[usize], which: u64) -> Vec<Tensor> {
        let row: usize = shape[1..].iter().product();
        // Half a block leaves as much to choose a place from.
        let most = (self.bytes.as_slice().len() / self.dtype.size() / 2 / row).max(1);
        let part = |first: usize| {
            let part = [&[most.min(shape[0] - first)], &shape[1..]].concat();
            self.tensor(&part, which + first as u64)
        };
        (0..shape[0]).step_by(most).map(part).collect()
    }
}

/// Weights for a model of any sizes, small enough that activations stay finite: matrices even around zero, norms near
/// one. No more is held than the largest needs.
pub(crate) struct RandomTensors {
    matrices: RandomBlock,
    vectors: RandomBlock,
    seed: u64,
}

impl RandomTensors {
    /// For tensors of these shapes, in layers of a config.
    pub fn new<'a>(shapes: impl Iterator<Item = &'a [usize]>, config: &Config, seed: u64) -> RandomTensors {
        let (mut matrix, mut vector) = (0, 0);
        for shape in shapes {
            let largest = if shape.len() == 1 { &mut vector } else { &mut matrix };
            *largest = shape.iter().product::<usize>().max(*largest);
        }
        let scale = 0.5 / (config.hidden as f32).sqrt();
        // Some more than the largest, so that two of that size differ.
        RandomTensors {
            matrices: RandomBlock::new(config.weight_dtype, matrix + (1 << 16), scale, seed),
            vectors: RandomBlock::new(DType::F32, vector + (1 << 10), 0.1, seed),
            seed,
        }
    }

    /// The same for the same name.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Tensor {
        let which = name.bytes().fold(self.seed, |h, byte| hash(h ^ u64::from(byte)));
        if shape.len() > 1 {
            return self.matrices.tensor(shape, which);
        }
        let tensor = self.vectors.tensor(shape, which);
        if !name.ends_with("norm.weight") {
            return tensor;
        }
        let values = tensor.floats();
        let bytes = values.iter().flat_map(|value| (1.0 + value).to_le_bytes()).collect();
        Tensor { bytes: Bytes::from_vec(bytes), ..tensor }
    }
}

/// SplitMix64: 64 random bits for a counter.
pub fn hash(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tensors: &[Tensor]) -> Vec<f32> {
        let bytes = tensors.iter().flat_map(|tensor| tensor.bytes.as_slice()).copied().collect::<Vec<u8>>();
        bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
    }

    #[test]
    fn blocks_are_even_and_never_zero() {
        let block = RandomBlock::new(DType::BF16, 3 * SHARE / 2 + 3, 2.0, 7);
        let all = values(&[block.tensor(&[3 * SHARE / 2 + 3], 0)]);
        assert!(all.iter().all(|x| *x != 0.0 && x.abs() <= 2.0));
        let mean = |f: fn(f32) -> f32| all.iter().map(|&x| f64::from(f(x))).sum::<f64>() / all.len() as f64;
        assert!(mean(|x| x).abs() < 0.01, "mean {}", mean(|x| x));
        assert!((mean(|x| x * x) - 4.0 / 3.0).abs() < 0.01, "mean square {}", mean(|x| x * x));
    }

    #[test]
    fn parts_add_up_and_differ() {
        let block = RandomBlock::new(DType::BF16, 1000, 1.0, 1);
        let parts = block.parts(&[335, 7], 0);
        assert!(parts.len() > 1 && parts.iter().all(|part| part.shape[1] == 7));
        let (one, other) = (values(&parts), values(&block.parts(&[335, 7], 1000)));
        assert_eq!((one.len(), other.len()), (2345, 2345));
        assert_ne!(one, other);
        assert_eq!(one, values(&RandomBlock::new(DType::BF16, 1000, 1.0, 1).parts(&[335, 7], 0)));
    }
}

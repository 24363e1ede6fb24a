//! Matrices of 8-bit floats (E4M3, without infinities) with a scale for each block of rows and columns: DeepSeek-V3's
//! checkpoints. `W[i, j] = q[i, j] * scale_inv[i / 128, j / 128]`, in f32, rounded once.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde_json::Value;
use treespark_kernel_gen::DType;

use super::{Format, narrow};
use crate::stored::Stored;
use crate::{Error, Result};

/// What a tensor's name ends with where it holds the scales of another.
const SCALES: &str = "_scale_inv";
/// Where a config does not say.
const BLOCK: [usize; 2] = [128, 128];

/// The scales of a matrix, `[rows / block[0], columns / block[1]]`, rounded up.
#[derive(Debug, Clone)]
pub struct BlockScales {
    pub scales: Box<Stored>,
    pub block: [usize; 2],
}

/// Gives every matrix of 8-bit floats its scales, which are no tensors of their own from here on.
pub fn attach_scales(tensors: &mut BTreeMap<String, Stored>, config: &Value) -> Result<()> {
    let of_config = &config["quantization_config"]["weight_block_size"];
    let block = match [&of_config[0], &of_config[1]].map(Value::as_u64) {
        [Some(rows), Some(columns)] if rows > 0 && columns > 0 => [rows as usize, columns as usize],
        _ => BLOCK,
    };
    let is_fp8 = |stored: &Stored| matches!(stored.format, Ok(Format::F8E4M3));
    let names: Vec<String> =
        tensors.iter().filter(|(_, stored)| is_fp8(stored)).map(|(name, _)| name.clone()).collect();
    for name in names {
        let scales = tensors.remove(&format!("{name}{SCALES}"));
        let stored = tensors.get_mut(&name).expect("it was there");
        let Some(scales) = scales else {
            let context = format!("tensor {name} holds 8-bit floats, whose scales they are");
            return Err(Error::MissingTensor { name: format!("{name}{SCALES}"), context });
        };
        let expected: Vec<usize> =
            stored.shape.iter().zip(block).map(|(len, of_block)| len.div_ceil(of_block)).collect();
        if stored.shape.len() != 2 || scales.shape != expected {
            return Err(Error::TensorShape { name: format!("{name}{SCALES}"), expected, got: scales.shape });
        }
        stored.scales = Some(BlockScales { scales: Box::new(scales), block });
    }
    Ok(())
}

/// A whole matrix, converted.
pub fn convert(stored: &[u8], columns: usize, scales: &[f32], block: [usize; 2], dtype: DType) -> Vec<u8> {
    let table: Vec<f32> = (0..=255).map(value).collect();
    let of_row = columns.div_ceil(block[1]);
    let mut out = vec![0; stored.len() * dtype.size()];
    let rows = out.par_chunks_mut(columns * dtype.size()).zip(stored.par_chunks(columns)).enumerate();
    rows.for_each_init(
        || vec![0.0; columns],
        |wide, (row, (out, stored))| {
            let scales = &scales[row / block[0] * of_row..][..of_row];
            for ((wide, stored), scale) in wide.chunks_mut(block[1]).zip(stored.chunks(block[1])).zip(scales) {
                wide.iter_mut().zip(stored).for_each(|(wide, &byte)| *wide = table[byte as usize] * scale);
            }
            narrow(wide, dtype, out);
        },
    );
    out
}

/// Sign, 4 bits of exponent with bias 7, 3 of mantissa; all ones is NaN.
fn value(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits >> 7 == 1 { -size } else { size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let cases =
            [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x07, 7.0 * 2f32.powi(-9)), (0x08, 2f32.powi(-6)), (0x38, 1.0)];
        for (bits, expected) in cases.into_iter().chain([(0x7e, 448.0), (0xb8, -1.0), (0x3c, 1.5), (0xfe, -448.0)]) {
            assert_eq!(value(bits), expected, "{bits:#x}");
        }
        assert!(value(0x7f).is_nan() && value(0xff).is_nan());
    }

    #[test]
    fn each_block_has_its_scale() {
        // Three rows of five ones, in blocks of two by two.
        let scales = [1.0, 2.0, 3.0, 10.0, 20.0, 30.0];
        let bytes = convert(&[0x38; 15], 5, &scales, [2, 2], DType::F32);
        let values: Vec<f32> = bytes.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let row = |by: f32| [1.0, 1.0, 2.0, 2.0, 3.0].map(|x| x * by);
        assert_eq!(values, [row(1.0), row(1.0), row(10.0)].concat());
    }
}

//! Element formats of stored weights, and their conversion to what is held in memory.
//!
//! A block format packs a run of a row's elements with their scales. The formulas (`d`, `m`: scales, f16; `q`: a small
//! integer) are evaluated in f32, in the order written here, and then rounded once to the target, to nearest even:
//!
//! ```text
//! Q8_0    32 elements, 34 bytes   d, 32 x i8                           d * q
//! Q4_0    32 elements, 18 bytes   d, 16 x (low, high nibble)           d * (q - 8)
//! Q4_1    32 elements, 20 bytes   d, m, 16 x (low, high nibble)        d * q + m
//! Q4_K   256 elements, 144 bytes  d, m, 12 bytes of 6-bit scales and   (d * scale) * q - (m * min)
//!                                 mins, 128 x (low, high nibble)       one scale and min for 32 elements
//! Q6_K   256 elements, 210 bytes  128 low nibbles, 64 high bit pairs,  (d * scale) * (q - 32)
//!                                 16 x i8 scales, d                    one scale for 16 elements
//! ```
//!
//! In a Q4_0 or Q4_1 block the low nibbles are its first 16 elements and the high nibbles its last 16.

pub mod fp8;

use half::{bf16, f16};
use rayon::prelude::*;
use treespark_kernel_gen::DType;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    F32,
    F16,
    BF16,
    /// 8-bit floats, whose scales are another tensor ([`fp8`]).
    F8E4M3,
    Q8_0,
    Q4_0,
    Q4_1,
    Q4K,
    Q6K,
}

impl Format {
    pub const SUPPORTED: &str = "F32, F16, BF16, F8_E4M3 (with scales), Q8_0, Q4_0, Q4_1, Q4_K, Q6_K";

    /// The format of a GGUF tensor type, or else the type's name.
    pub fn from_ggml(kind: u32) -> Result<Format, String> {
        let name = match kind {
            0 => return Ok(Format::F32),
            1 => return Ok(Format::F16),
            2 => return Ok(Format::Q4_0),
            3 => return Ok(Format::Q4_1),
            8 => return Ok(Format::Q8_0),
            12 => return Ok(Format::Q4K),
            14 => return Ok(Format::Q6K),
            30 => return Ok(Format::BF16),
            6 => "Q5_0",
            7 => "Q5_1",
            10 => "Q2_K",
            11 => "Q3_K",
            13 => "Q5_K",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            _ => return Err(format!("number {kind}")),
        };
        Err(name.into())
    }

    /// Elements and bytes of one block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Format::F32 => (1, 4),
            Format::F16 | Format::BF16 => (1, 2),
            Format::F8E4M3 => (1, 1),
            Format::Q8_0 => (32, 34),
            Format::Q4_0 => (32, 18),
            Format::Q4_1 => (32, 20),
            Format::Q4K => (256, 144),
            Format::Q6K => (256, 210),
        }
    }

    /// The dtype whose elements these are, if they are not packed into blocks.
    pub fn dtype(self) -> Option<DType> {
        match self {
            Format::F32 => Some(DType::F32),
            Format::F16 => Some(DType::F16),
            Format::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    /// Bytes of so many consecutive elements; `None` if they do not fill whole blocks or no memory could hold them.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        let (block_elements, block_bytes) = self.block();
        elements.is_multiple_of(block_elements).then(|| (elements / block_elements).checked_mul(block_bytes))?
    }

    /// One row, widened to f32.
    fn widen(self, row: &[u8], out: &mut [f32]) {
        let (block_elements, block_bytes) = self.block();
        let blocks = row.chunks_exact(block_bytes).zip(out.chunks_exact_mut(block_elements));
        match self {
            Format::F32 => blocks.for_each(|(b, out)| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Format::F16 => blocks.for_each(|(b, out)| out[0] = scale(b)),
            Format::BF16 => blocks.for_each(|(b, out)| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Format::F8E4M3 => unreachable!("8-bit floats are read with their scales"),
            Format::Q8_0 => blocks.for_each(|(b, out)| q8_0(b, out)),
            Format::Q4_0 => blocks.for_each(|(b, out)| q4_0(b, out)),
            Format::Q4_1 => blocks.for_each(|(b, out)| q4_1(b, out)),
            Format::Q4K => blocks.for_each(|(b, out)| q4_k(b, out)),
            Format::Q6K => blocks.for_each(|(b, out)| q6_k(b, out)),
        }
    }
}

/// Rows of `columns` elements converted to `dtype`; row i of the result is the stored row `stored_row(i)`.
///
/// `stored` holds whole rows only, and `columns` fills whole blocks.
pub fn convert_rows(
    format: Format,
    stored: &[u8],
    columns: usize,
    dtype: DType,
    stored_row: impl Fn(usize) -> usize + Sync,
) -> Vec<u8> {
    // A tensor without elements has no rows to visit.
    if stored.is_empty() {
        return Vec::new();
    }
    let row_bytes = format.bytes(columns).expect("rows of whole blocks");
    let out_bytes = columns * dtype.size();
    let mut out = vec![0; stored.len() / row_bytes * out_bytes];
    // Rows this short of a page are not worth a task each.
    let rows_per_task = 16384usize.div_ceil(out_bytes);
    out.par_chunks_mut(out_bytes).with_min_len(rows_per_task).enumerate().for_each_init(
        || vec![0.0; columns],
        |wide, (row, out)| {
            let stored = &stored[stored_row(row) * row_bytes..][..row_bytes];
            if format.dtype() == Some(dtype) {
                out.copy_from_slice(stored);
            } else {
                format.widen(stored, wide);
                narrow(wide, dtype, out);
            }
        },
    );
    out
}

fn narrow(row: &[f32], dtype: DType, out: &mut [u8]) {
    let elements = row.iter().zip(out.chunks_exact_mut(dtype.size()));
    match dtype {
        DType::F32 => elements.for_each(|(x, out)| out.copy_from_slice(&x.to_le_bytes())),
        DType::F16 => elements.for_each(|(x, out)| out.copy_from_slice(&f16::from_f32(*x).to_le_bytes())),
        DType::BF16 => elements.for_each(|(x, out)| out.copy_from_slice(&bf16::from_f32(*x).to_le_bytes())),
        DType::U32 => unreachable!("weights are never held as integers"),
    }
}

/// The f16 at the start of `bytes`.
fn scale(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block);
    for (out, &q) in out.iter_mut().zip(&block[2..34]) {
        *out = d * f32::from(q as i8);
    }
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block);
    let (low, high) = out.split_at_mut(16);
    for ((low, high), &q) in low.iter_mut().zip(high).zip(&block[2..18]) {
        *low = d * f32::from((q & 15) as i8 - 8);
        *high = d * f32::from((q >> 4) as i8 - 8);
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (scale(block), scale(&block[2..]));
    let (low, high) = out.split_at_mut(16);
    for ((low, high), &q) in low.iter_mut().zip(high).zip(&block[4..20]) {
        *low = d * f32::from(q & 15) + m;
        *high = d * f32::from(q >> 4) + m;
    }
}

/// Each 64 elements share 32 bytes: low nibbles are the first 32 (one scale), high nibbles the last 32 (the next).
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, m) = (scale(block), scale(&block[2..]));
    let scales = &block[4..16];
    for (pair, (out, q)) in out.chunks_exact_mut(64).zip(block[16..144].chunks_exact(32)).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let (low_scale, low_min) = q4_k_scale(scales, 2 * pair);
        let (high_scale, high_min) = q4_k_scale(scales, 2 * pair + 1);
        let (low_d, low_m) = (d * f32::from(low_scale), m * f32::from(low_min));
        let (high_d, high_m) = (d * f32::from(high_scale), m * f32::from(high_min));
        for ((low, high), &q) in low.iter_mut().zip(high).zip(q) {
            *low = low_d * f32::from(q & 15) - low_m;
            *high = high_d * f32::from(q >> 4) - high_m;
        }
    }
}

/// Scale and min number `i` of 8, of 6 bits each. The first four of each lie in the low 6 bits of bytes 0..4 (scales)
/// and 4..8 (mins); the others have their low 4 bits in bytes 8..12 and their high 2 bits on top of the first four.
fn q4_k_scale(bytes: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        (bytes[i] & 63, bytes[i + 4] & 63)
    } else {
        let low = bytes[i + 4];
        (low & 15 | (bytes[i - 4] >> 6) << 4, low >> 4 | (bytes[i] >> 6) << 4)
    }
}

/// Each 128 elements are four runs of 32. Runs 0 and 1 have the low nibbles of 64 bytes, runs 2 and 3 the high ones;
/// run r adds bits `2r` and `2r + 1` of 32 bytes on top.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(16);
    let d = scale(d);
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (half, run) = (i / 4, i % 4);
        let low = &low[64 * half + 32 * (run % 2)..][..32];
        let high = &high[32 * half..][..32];
        for (part, out) in out.chunks_exact_mut(16).enumerate() {
            let d = d * f32::from(scales[2 * i + part] as i8);
            let bytes = low[16 * part..].iter().zip(&high[16 * part..]);
            for (out, (low, high)) in out.iter_mut().zip(bytes) {
                let q = low >> (run / 2 * 4) & 15 | (high >> (2 * run) & 3) << 4;
                *out = d * f32::from(q as i8 - 32);
            }
        }
    }
}

#[cfg(test)]
mod tests;

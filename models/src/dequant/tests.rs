//! Block formats against one formula per element, in f64, written from the layout; and blocks worked out by hand.

use proptest::prelude::*;

use super::*;

const BLOCKED: [Format; 5] = [Format::Q8_0, Format::Q4_0, Format::Q4_1, Format::Q4K, Format::Q6K];

/// Element `i` of a block.
fn element(format: Format, block: &[u8], i: usize) -> f64 {
    let f16_at = |at: usize| f64::from(f16::from_bits(u16::from(block[at]) | u16::from(block[at + 1]) << 8));
    let bits = |at: usize, shift: usize, count: u32| f64::from(block[at] >> shift & ((1 << count) - 1));
    match format {
        Format::Q8_0 => f16_at(0) * f64::from(block[2 + i] as i8),
        Format::Q4_0 => f16_at(0) * (bits(2 + i % 16, i / 16 * 4, 4) - 8.0),
        Format::Q4_1 => f16_at(0) * bits(4 + i % 16, i / 16 * 4, 4) + f16_at(2),
        Format::Q4K => {
            let group = i / 32;
            // Sixteen numbers of six bits, scales then mins, as four bits and two bits that may lie apart.
            let six = |which: usize| match group {
                0..4 => bits(4 + 4 * which + group, 0, 6),
                _ => bits(12 + group - 4, 4 * which, 4) + 16.0 * bits(4 + 4 * which + group - 4, 6, 2),
            };
            let q = bits(16 + i / 64 * 32 + i % 32, group % 2 * 4, 4);
            f16_at(0) * six(0) * q - f16_at(2) * six(1)
        }
        Format::Q6K => {
            let (half, run, lane) = (i / 128, i / 32 % 4, i % 32);
            let low = bits(64 * half + run % 2 * 32 + lane, run / 2 * 4, 4);
            let high = bits(128 + 32 * half + lane, 2 * run, 2);
            f16_at(208) * f64::from(block[192 + i / 16] as i8) * (low + 16.0 * high - 32.0)
        }
        Format::F32 | Format::F16 | Format::BF16 | Format::F8E4M3 => unreachable!("not a block format"),
    }
}

/// Where a block keeps its f16 scales.
fn scales_at(format: Format) -> &'static [usize] {
    match format {
        Format::Q4_1 | Format::Q4K => &[0, 2],
        Format::Q6K => &[208],
        _ => &[0],
    }
}

fn as_f32(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

proptest! {
    #[test]
    fn blocks_equal_their_formula(
        which in 0..BLOCKED.len(),
        mut bytes in prop::collection::vec(any::<u8>(), 3 * 210),
        scales in prop::collection::vec(-4.0f32..4.0, 6),
    ) {
        let format = BLOCKED[which];
        let (elements, block_bytes) = format.block();
        bytes.truncate(3 * block_bytes);
        for (block, scales) in bytes.chunks_exact_mut(block_bytes).zip(scales.chunks_exact(2)) {
            for (&at, &scale) in scales_at(format).iter().zip(scales) {
                block[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            }
        }
        let got = as_f32(&convert_rows(format, &bytes, elements, DType::F32, |row| row));
        for (i, &got) in got.iter().enumerate() {
            let block = &bytes[i / elements * block_bytes..][..block_bytes];
            let expected = element(format, block, i % elements);
            // Two roundings of products as large as 4 * 63 * 32.
            prop_assert!((f64::from(got) - expected).abs() <= 2e-3, "{format:?} {i}: {got}, expected {expected}");
        }
        let narrowed = convert_rows(format, &bytes, elements, DType::BF16, |row| row);
        for (got, wide) in narrowed.chunks_exact(2).zip(&got) {
            prop_assert_eq!(bf16::from_le_bytes([got[0], got[1]]), bf16::from_f32(*wide));
        }
    }

    #[test]
    fn rows_come_in_the_order_asked_for(rows in 1usize..200, columns in 1usize..40, shift in 0usize..200) {
        let stored: Vec<u8> = (0..rows * columns).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let stored_row = |row: usize| (row + shift) % rows;
        let got = as_f32(&convert_rows(Format::F32, &stored, columns, DType::F32, stored_row));
        for (i, &x) in got.iter().enumerate() {
            prop_assert_eq!(x, (stored_row(i / columns) * columns + i % columns) as f32);
        }
    }
}

/// A block of these bytes at these offsets, zero elsewhere.
fn block(format: Format, bytes: &[(usize, &[u8])]) -> Vec<f32> {
    let mut block = vec![0; format.block().1];
    for (at, part) in bytes {
        block[*at..at + part.len()].copy_from_slice(part);
    }
    as_f32(&convert_rows(format, &block, format.block().0, DType::F32, |row| row))
}

const ONE: &[u8] = &[0x00, 0x3c];
const HALF: &[u8] = &[0x00, 0x38];

#[test]
fn blocks_worked_out_by_hand() {
    let q8_0 = block(Format::Q8_0, &[(0, HALF), (2, &[3, 0xff]), (33, &[0x80])]);
    assert_eq!((q8_0[0], q8_0[1], q8_0[2], q8_0[31]), (1.5, -0.5, 0.0, -64.0));

    let q4_0 = block(Format::Q4_0, &[(0, HALF), (2, &[0xf1])]);
    assert_eq!((q4_0[0], q4_0[16], q4_0[1], q4_0[31]), (-3.5, 3.5, -4.0, -4.0));

    let q4_1 = block(Format::Q4_1, &[(0, HALF), (2, ONE), (4, &[0xf1]), (19, &[0x20])]);
    assert_eq!((q4_1[0], q4_1[16], q4_1[15], q4_1[31]), (1.5, 8.5, 1.0, 2.0));

    // Group 1: scale 2, min 3. Group 5: scale 1 + 16 * 2, min 4 + 16 * 1.
    let scales: &[u8] = &[0, 2 | 2 << 6, 0, 0, 0, 3 | 1 << 6, 0, 0, 0, 1 | 4 << 4, 0, 0];
    let q4_k = block(Format::Q4K, &[(0, HALF), (2, ONE), (4, scales), (16, &[0x50]), (80, &[0x7f])]);
    assert_eq!((q4_k[0], q4_k[32], q4_k[33]), (0.0, 2.0, -3.0));
    assert_eq!((q4_k[128], q4_k[160], q4_k[161]), (0.0, 0.5 * 33.0 * 7.0 - 20.0, -20.0));

    // Element 0: low 5, high 1. Element 96 (run 3): low 10, high 3, scale 3. Element 255: everything zero, scale -1.
    let q6_k = block(
        Format::Q6K,
        &[(0, &[0x05]), (32, &[0xa0]), (128, &[0xc1]), (192, &[2]), (198, &[3]), (207, &[0xff]), (208, HALF)],
    );
    assert_eq!((q6_k[0], q6_k[96], q6_k[255], q6_k[16]), (-11.0, 39.0, 16.0, 0.0));
}

#[test]
fn rounding_is_to_nearest_even() {
    let half_up = f32::from_bits(0x3f80_8000);
    let odd_half = f32::from_bits(0x3f81_8000);
    let above_half = f32::from_bits(0x3f80_8001);
    let stored: Vec<u8> =
        [half_up, odd_half, above_half, f32::NAN, f32::MAX].iter().flat_map(|x| x.to_le_bytes()).collect();
    let got = convert_rows(Format::F32, &stored, 5, DType::BF16, |row| row);
    let got: Vec<u16> = got.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    assert_eq!(got[..3], [0x3f80, 0x3f82, 0x3f81]);
    assert!(bf16::from_bits(got[3]).is_nan());
    assert_eq!(bf16::from_bits(got[4]), bf16::INFINITY);
}

#[test]
fn half_precision_widens_exactly() {
    let stored: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for (format, value) in [
        (Format::F16, (|bits| f16::from_bits(bits).to_f64()) as fn(u16) -> f64),
        (Format::BF16, |bits| f64::from(f32::from_bits(u32::from(bits) << 16))),
    ] {
        let wide = as_f32(&convert_rows(format, &stored, 256, DType::F32, |row| row));
        for (bits, x) in (0..=u16::MAX).zip(wide) {
            let expected = value(bits);
            assert!(f64::from(x) == expected || x.is_nan() && expected.is_nan(), "{format:?} {bits:04x}");
        }
    }
}

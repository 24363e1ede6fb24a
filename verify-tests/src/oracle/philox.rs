//! Philox4x32-10, from its definition (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).
//!
//! A round multiplies two of the four counter words by two constants; the high halves, mixed with the key and the
//! other two words, and the low halves make the next counter. The key grows by two Weyl constants between rounds.
//!
//! The noise of a draw at a position, for a token, is a Gumbel variable made of word `token % 4` of the block with key
//! `seed` and counter `[token / 4, position, sample, 0]`: its upper 23 bits, centred in their interval of (0, 1).

const ROUNDS: usize = 10;
const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// The golden ratio and sqrt(3) - 1, as 32-bit fractions.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for round in 0..ROUNDS {
        if round > 0 {
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        let a = MULTIPLIERS[0] * u64::from(c[0]);
        let b = MULTIPLIERS[1] * u64::from(c[2]);
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
    }
    c
}

pub fn gumbel(seed: [u32; 2], sample: u32, position: u32, token: u32) -> f64 {
    let word = philox4x32([token / 4, position, sample, 0], seed)[(token % 4) as usize];
    let uniform = (f64::from(word >> 9) + 0.5) / f64::from(1 << 23);
    -(-uniform.ln()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean and variance of a standard Gumbel: Euler's constant and pi²/6.
    #[test]
    fn gumbels_have_their_moments() {
        let n = 100_000;
        let draws: Vec<f64> = (0..n).map(|t| gumbel([3, 4], 1, 2, t)).collect();
        let mean = draws.iter().sum::<f64>() / f64::from(n);
        let variance = draws.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / f64::from(n);
        assert!((mean - 0.577_216).abs() < 0.02, "mean {mean}");
        assert!((variance - 1.644_934).abs() < 0.05, "variance {variance}");
    }

    /// The known answers that the authors publish with their library.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}

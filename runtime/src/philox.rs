//! Noise that is a pure function of (seed, sample, position, token): Philox4x32-10 (Salmon et al., "Parallel random
//! numbers: as easy as 1, 2, 3", 2011).
//!
//! ```text
//! key     = seed                                  one block gives the words of four neighbouring tokens
//! counter = [token / 4, position, sample, 0]
//! word    = philox(counter, key)[token % 4]
//! u       = ((word >> 9) + 1/2) * 2^-23           exact in f32, never 0 or 1
//! gumbel  = -ln(-ln(u))                           -2.9 ..= MAX_GUMBEL
//! ```
//!
//! Every backend computes the same words. So that they also agree on the floats, [`ln`] is spelled out here, in
//! `shaders/wgsl/lib/philox.wgsl` and for CUDA as the same IEEE operations: the logarithm of a GPU has an absolute
//! error of up to 2^-21 near 1, and a large Gumbel is made there, of the logarithm of a number just below 1.

/// The largest value that [`gumbel`] takes: no token further than this below the best can still win a draw.
pub const MAX_GUMBEL: f32 = 16.635532;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// `N` blocks at once, word by word: `result[word][block]`. The loops over blocks become vector instructions.
fn philox<const N: usize>(counters: [[u32; N]; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counters;
    for _ in 0..10 {
        for i in 0..N {
            let (a, b) = (u64::from(MULTIPLIERS[0]) * u64::from(c0[i]), u64::from(MULTIPLIERS[1]) * u64::from(c2[i]));
            (c0[i], c2[i]) = ((b >> 32) as u32 ^ c1[i] ^ key[0], (a >> 32) as u32 ^ c3[i] ^ key[1]);
            (c1[i], c3[i]) = (b as u32, a as u32);
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    [c0, c1, c2, c3]
}

/// What the noise of one row depends on, besides the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoiseKey {
    pub seed: [u32; 2],
    pub sample: u32,
    pub position: u32,
}

impl NoiseKey {
    /// The noise word of one token.
    pub fn word(&self, token: u32) -> u32 {
        philox([[token / 4], [self.position], [self.sample], [0]], self.seed)[token as usize % 4][0]
    }

    /// The noise words of the 64 tokens `64 * chunk ..`.
    pub fn chunk(&self, chunk: usize) -> [u32; 64] {
        let blocks = std::array::from_fn(|i| (16 * chunk + i) as u32);
        let words = philox::<16>([blocks, [self.position; 16], [self.sample; 16], [0; 16]], self.seed);
        std::array::from_fn(|i| words[i % 4][i / 4])
    }
}

/// A standard Gumbel variable of a noise word. It never falls as the word grows.
#[inline]
pub fn gumbel(word: u32) -> f32 {
    let u = ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0);
    -ln(-ln(u))
}

/// The natural logarithm of a positive normal number, to 1 unit in the last place or so.
///
/// `x = 2^e (1 + f)` with `1 + f` in √½..√2, and `ln(1 + f) = f - f²/2 + f³ P(f)`, P fitted for least relative error.
#[inline]
pub fn ln(x: f32) -> f32 {
    const SQRT_HALF_BITS: u32 = 0x3F35_04F3;
    let bits = x.to_bits();
    let exponent = (bits.wrapping_sub(SQRT_HALF_BITS) as i32) >> 23;
    let f = f32::from_bits(bits.wrapping_sub((exponent << 23) as u32)) - 1.0;
    let mut p = -0.076_344_75;
    p = p * f + 0.127_615_7;
    p = p * f - 0.131_601_87;
    p = p * f + 0.142_017_59;
    p = p * f - 0.166_233_57;
    p = p * f + 0.200_012_27;
    p = p * f - 0.250_008_2;
    p = p * f + 0.333_333_3;
    exponent as f32 * std::f32::consts::LN_2 + (f + f * f * (f * p - 0.5))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published known answers of Random123.
    #[test]
    fn known_answers() {
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter.map(|c: u32| [c]), key).map(|[w]| w), expected);
        }
    }

    #[test]
    fn chunks_hold_the_words_of_their_tokens() {
        let key = NoiseKey { seed: [7, 9], sample: 3, position: 1000 };
        for chunk in [0, 5, 767] {
            let words = key.chunk(chunk);
            (0..64).for_each(|i| assert_eq!(words[i], key.word((64 * chunk + i) as u32)));
        }
    }

    #[test]
    fn every_part_of_the_key_changes_the_noise() {
        let key = NoiseKey { seed: [1, 2], sample: 3, position: 4 };
        let other = [
            NoiseKey { seed: [0, 2], ..key },
            NoiseKey { seed: [1, 0], ..key },
            NoiseKey { sample: 0, ..key },
            NoiseKey { position: 0, ..key },
        ];
        other.iter().for_each(|o| assert_ne!(o.word(5), key.word(5)));
    }

    #[test]
    fn the_logarithm_is_good_to_an_ulp_or_so() {
        let mut x = f32::MIN_POSITIVE;
        while x < 1e30 {
            let exact = f64::from(x).ln();
            let error = (f64::from(ln(x)) - exact).abs();
            assert!(error <= 1.5e-7 * exact.abs(), "ln({x}) is off by {error}");
            x *= 1.000_37;
        }
        assert_eq!(ln(1.0), 0.0);
    }

    /// All values that a Gumbel can take.
    #[test]
    fn gumbels_are_monotone_bounded_and_right_in_the_tail() {
        let mut largest = f32::MIN;
        for word in (0..1u32 << 23).map(|w| w << 9) {
            let g = gumbel(word);
            assert!(g >= largest, "word {word} gives {g}, a smaller word {largest}");
            largest = g;
        }
        assert_eq!(largest, MAX_GUMBEL);
        for from_the_top in 0..10_000u32 {
            let u = 1.0 - (f64::from(from_the_top) + 0.5) / 8_388_608.0;
            let error = f64::from(gumbel((0x7F_FFFF - from_the_top) << 9)) + (-u.ln()).ln();
            assert!(error.abs() < 3e-6, "{from_the_top} below the top: off by {error}");
        }
    }
}

//! Sixteen f32 lanes on whatever the processor offers, chosen once at run time.
//!
//! A [`Kernel`] is written once, in safe code, over a [`Lanes`] type; [`Isa::run`] compiles it for the baseline, for
//! AVX2 + FMA and for AVX-512, and calls the one that was detected. Every implementation has the same sixteen lanes and
//! folds them in the same order, so AVX2 and AVX-512 agree bit for bit; the baseline rounds products (it has no fused
//! multiply-add) and agrees closely.
//!
//! What makes this sound: the lane types are private to this file, so generic code meets them only inside
//! [`Isa::run`], and an [`Isa`] is only made by [`Isa::available`], which asks the processor. A kernel and all it calls
//! must be `#[inline(always)]`: a function left out of line would be compiled without the instruction set (slow, not
//! wrong).
#![allow(unsafe_code)]

use half::{bf16, f16};

/// Partial sums of one dot product. Fixed for all instruction sets: it fixes the order of additions.
pub const LANES: usize = 16;

/// Sixteen f32 values that live in registers.
pub trait Lanes: Copy {
    /// Rows and columns of the largest tile of accumulators that fits the registers.
    const TILE: usize;

    fn splat(value: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn load_bf16(from: &[bf16; LANES]) -> Self;
    fn load_f16(from: &[f16; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    /// Asks for the cache line of an address that need not be valid.
    fn prefetch<T>(address: *const T);
    /// `self + a * b`, rounded once where the processor can.
    fn add_product(self, a: Self, b: Self) -> Self;

    /// The sum of each accumulator's lanes, transposed. Order: halves are added until one value is left.
    #[inline(always)]
    fn sums<const R: usize, const C: usize>(acc: &[[Self; C]; R]) -> [[f32; R]; C] {
        let mut sums = [[0.0; R]; C];
        for r in 0..R {
            for c in 0..C {
                let mut lanes = [0.0; LANES];
                acc[r][c].store(&mut lanes);
                sums[c][r] = fold(lanes);
            }
        }
        sums
    }
}

/// The sum of sixteen values in the order that every accumulator uses.
#[inline(always)]
pub fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// An element of a weight or a cache.
pub trait Element: bytemuck::Pod + Send + Sync {
    const ZERO: Self;
    fn lanes<L: Lanes>(from: &[Self; LANES]) -> L;
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    const ZERO: f32 = 0.0;
    #[inline(always)]
    fn lanes<L: Lanes>(from: &[f32; LANES]) -> L {
        L::load(from)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const ZERO: bf16 = bf16::ZERO;
    #[inline(always)]
    fn lanes<L: Lanes>(from: &[bf16; LANES]) -> L {
        L::load_bf16(from)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

impl Element for f16 {
    const ZERO: f16 = f16::ZERO;
    #[inline(always)]
    fn lanes<L: Lanes>(from: &[f16; LANES]) -> L {
        L::load_f16(from)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f16 {
        f16::from_f32(value)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

/// Work that is compiled for each instruction set.
pub trait Kernel {
    fn run<L: Lanes>(self);
}

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// What this processor has, best last.
    pub fn available() -> Vec<Isa> {
        let mut list = vec![Isa(Set::Baseline)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                list.push(Isa(Set::Avx2));
            }
            // Not for its short vectors: without VL the compiler leaves half of the registers unused.
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                list.push(Isa(Set::Avx512));
            }
        }
        list
    }

    pub fn best() -> Isa {
        *Isa::available().last().expect("the baseline is always there")
    }

    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "AVX-512",
            Set::Baseline => "baseline instructions",
        }
    }

    /// Whether a product is added with one rounding. Instruction sets that do so agree bit for bit.
    #[cfg(test)]
    pub fn is_fused(self) -> bool {
        self.0 != Set::Baseline
    }

    #[inline]
    pub fn run(self, kernel: impl Kernel) {
        match self.0 {
            // SAFETY: `Isa::available` made this value, after it detected AVX2, FMA and F16C.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { x86::avx2(kernel) },
            // SAFETY: `Isa::available` made this value, after it detected AVX-512F and VL besides the above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { x86::avx512(kernel) },
            Set::Baseline => kernel.run::<Baseline>(),
        }
    }
}

/// Plain Rust, which the compiler turns into whatever the target always has (SSE2, NEON).
#[derive(Clone, Copy)]
struct Baseline([f32; LANES]);

impl Lanes for Baseline {
    const TILE: usize = 1;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Baseline([value; LANES])
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Baseline(*from)
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16; LANES]) -> Self {
        let mut lanes = [0.0; LANES];
        for i in 0..LANES {
            lanes[i] = f32::from_bits(u32::from(from[i].to_bits()) << 16);
        }
        Baseline(lanes)
    }
    #[inline(always)]
    fn load_f16(from: &[f16; LANES]) -> Self {
        let mut lanes = [0.0; LANES];
        for i in 0..LANES {
            lanes[i] = from[i].to_f32_const();
        }
        Baseline(lanes)
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }
    #[inline(always)]
    fn prefetch<T>(_address: *const T) {}
    /// Not `mul_add`: without the instruction that would call a slow library function.
    #[inline(always)]
    fn add_product(mut self, a: Self, b: Self) -> Self {
        for i in 0..LANES {
            self.0[i] += a.0[i] * b.0[i];
        }
        self
    }
}

/// The lanes in one AVX-512 or two AVX2 registers.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::{Kernel, LANES, Lanes};

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn avx2<K: Kernel>(kernel: K) {
        kernel.run::<Avx2>();
    }

    #[target_feature(enable = "avx512f,avx512vl,avx2,fma,f16c")]
    pub fn avx512<K: Kernel>(kernel: K) {
        kernel.run::<Avx512>();
    }

    // SAFETY of every block below: the instructions exist, because the types are private and meet generic code only in
    // `avx2` and `avx512` above; and pointers come from array references of just the size that is read or written, with
    // instructions that need no alignment.

    #[derive(Clone, Copy)]
    struct Avx512(__m512);

    impl Lanes for Avx512 {
        const TILE: usize = 4;

        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: see above.
            Avx512(unsafe { _mm512_set1_ps(value) })
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            // SAFETY: see above.
            Avx512(unsafe { _mm512_loadu_ps(from.as_ptr()) })
        }
        #[inline(always)]
        fn load_bf16(from: &[bf16; LANES]) -> Self {
            // SAFETY: see above.
            Avx512(unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))
            })
        }
        #[inline(always)]
        fn load_f16(from: &[f16; LANES]) -> Self {
            // SAFETY: see above.
            Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) })
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn prefetch<T>(address: *const T) {
            // SAFETY: see above; and a prefetch of an invalid address does nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
        }
        #[inline(always)]
        fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: see above.
            Avx512(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
        }

        /// All sixteen accumulators at once: each step adds the halves of two registers and packs them into one.
        #[inline(always)]
        fn sums<const R: usize, const C: usize>(acc: &[[Self; C]; R]) -> [[f32; R]; C] {
            assert!(R == 4 && C <= 4, "the tile of a wide instruction set");
            let mut sums = [[0.0; R]; C];
            // SAFETY: see above.
            unsafe {
                // Quarters of four lanes: [column 0, 1, 2, 3] of one weight row.
                let mut rows = [_mm512_setzero_ps(); 4];
                for r in 0..4 {
                    let mut a = [_mm512_setzero_ps(); 4];
                    for c in 0..C {
                        a[c] = acc[r][c].0;
                    }
                    let ab = _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x44), _mm512_shuffle_f32x4(a[0], a[1], 0xEE));
                    let cd = _mm512_add_ps(_mm512_shuffle_f32x4(a[2], a[3], 0x44), _mm512_shuffle_f32x4(a[2], a[3], 0xEE));
                    rows[r] = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
                }
                let pair = |a: __m512, b: __m512| {
                    let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
                    _mm512_add_ps(
                        _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                        _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)),
                    )
                };
                let (r01, r23) = (pair(rows[0], rows[1]), pair(rows[2], rows[3]));
                let all = _mm512_add_ps(_mm512_shuffle_ps(r01, r23, 0x88), _mm512_shuffle_ps(r01, r23, 0xDD));
                let mut flat = [0.0; LANES];
                _mm512_storeu_ps(flat.as_mut_ptr(), all);
                for c in 0..C {
                    sums[c].copy_from_slice(&flat[c * 4..c * 4 + 4]);
                }
            }
            sums
        }
    }

    #[derive(Clone, Copy)]
    struct Avx2(__m256, __m256);

    impl Lanes for Avx2 {
        const TILE: usize = 2;

        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: see above.
            unsafe { Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            // SAFETY: see above.
            unsafe { Avx2(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
        }
        #[inline(always)]
        fn load_bf16(from: &[bf16; LANES]) -> Self {
            // SAFETY: see above.
            unsafe {
                let half = |at: usize| {
                    let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().add(at).cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))
                };
                Avx2(half(0), half(8))
            }
        }
        #[inline(always)]
        fn load_f16(from: &[f16; LANES]) -> Self {
            // SAFETY: see above.
            unsafe {
                let half = |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().add(at).cast()));
                Avx2(half(0), half(8))
            }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            // SAFETY: see above.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
        }
        #[inline(always)]
        fn prefetch<T>(address: *const T) {
            // SAFETY: see above; and a prefetch of an invalid address does nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
        }
        #[inline(always)]
        fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: see above.
            unsafe { Avx2(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }
    }
}

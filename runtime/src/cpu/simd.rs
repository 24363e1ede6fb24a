//! Sixteen f32 lanes on whatever the processor offers, chosen once at run time.
//!
//! A [`Kernel`] is written once, in safe code, over a [`Lanes`] type; [`Isa::run`] compiles it for the baseline, for
//! AVX2 + FMA and for AVX-512, and calls the one that was detected. Every implementation has the same sixteen lanes and
//! folds them in the same order, so AVX2 and AVX-512 agree bit for bit; the baseline rounds products (it has no fused
//! multiply-add) and agrees closely.
//!
//! What makes this sound: the lane types are private to this file and `x86.rs`, so generic code meets them only inside
//! [`Isa::run`], and an [`Isa`] is only made by [`Isa::available`], which asks the processor. A kernel and all it calls
//! must be `#[inline(always)]`: a function left out of line would be compiled without the instruction set (slow, not
//! wrong).
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod x86;

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
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
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

    /// Whether sixteen lanes are one register.
    pub fn is_wide(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self.0, Set::Avx512);
        #[cfg(not(target_arch = "x86_64"))]
        return false;
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

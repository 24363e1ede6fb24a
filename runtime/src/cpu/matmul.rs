//! Products of weight rows with activation rows, `out[r][n] = x[r] · weight[n]`, on one thread.
//!
//! Each sum has sixteen partial sums over k (lane `i % 16`), folded in a fixed order: it depends on K alone, never on
//! how many rows are computed or which tile a row fell in. A tile of weight rows meets a tile of activation rows in
//! registers: for up to four activation rows each weight is loaded and widened once, and further rows find it in the
//! first-level cache. While a tile is used, the one after it is fetched: without that, two cores reach half of the
//! memory's bandwidth.
// Tiles are arrays of arrays of lanes: indices say which row meets which column.
#![allow(clippy::needless_range_loop)]

use super::simd::{Element, Isa, Kernel, LANES, Lanes};

/// Activations of one block stay in the second-level cache while all weights pass by.
const BLOCK_BYTES: usize = 512 << 10;
/// How far ahead weights are fetched, at least, so that they arrive in time.
const FETCH_BYTES: usize = 9 << 10;

/// All rows of `x` times all rows of `weight`.
pub struct Product<'a, W> {
    /// `[n, k]`
    pub weight: &'a [W],
    /// `[m, k]`
    pub x: &'a [f32],
    pub k: usize,
    /// `[m, stride]`, of which the first n of each row are written.
    pub out: &'a mut [f32],
    pub stride: usize,
}

impl<W: Element> Product<'_, W> {
    pub fn compute(self, isa: Isa) {
        isa.run(self);
    }
}

impl<W: Element> Kernel for Product<'_, W> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let block = (BLOCK_BYTES / (self.k * size_of::<f32>())).next_multiple_of(4);
        for (x, out) in self.x.chunks(block * self.k).zip(self.out.chunks_mut(block * self.stride)) {
            product::<L, W, true>(self.weight, x, self.k, out, self.stride);
        }
    }
}

/// See [`Product`]; for use inside a kernel. `FETCH` if the weights continue in memory and will be read next.
#[inline(always)]
pub fn product<L: Lanes, W: Element, const FETCH: bool>(
    weight: &[W],
    x: &[f32],
    k: usize,
    out: &mut [f32],
    stride: usize,
) {
    match L::TILE {
        4 => tiles::<L, W, 4, FETCH>(weight, x, k, out, stride),
        2 => tiles::<L, W, 2, FETCH>(weight, x, k, out, stride),
        _ => tiles::<L, W, 1, FETCH>(weight, x, k, out, stride),
    }
}

#[inline(always)]
fn tiles<L: Lanes, W: Element, const R: usize, const FETCH: bool>(
    weight: &[W],
    x: &[f32],
    k: usize,
    out: &mut [f32],
    stride: usize,
) {
    let (n, m) = (weight.len() / k, x.len() / k);
    for first in (0..n).step_by(R) {
        // Past the last row a tile repeats it, and drops the result.
        let mut rows = [&weight[..k]; R];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = &weight[(first + i).min(n - 1) * k..][..k];
        }
        let valid = R.min(n - first);
        // Only the first rows fetch; they are those that wait for memory.
        let mut at = group::<L, W, R, FETCH>(rows, x, k, &mut out[first..], stride, valid);
        while at < m {
            at += group::<L, W, R, false>(rows, &x[at * k..], k, &mut out[at * stride + first..], stride, valid);
        }
    }
}

/// One tile with the first rows of `x`, as many as it takes. Returns their number.
#[inline(always)]
fn group<L: Lanes, W: Element, const R: usize, const FETCH: bool>(
    weight: [&[W]; R],
    x: &[f32],
    k: usize,
    out: &mut [f32],
    stride: usize,
    valid: usize,
) -> usize {
    let columns = (x.len() / k).min(R);
    match columns {
        4 => tile::<L, W, R, 4, FETCH>(weight, x, k, out, stride, valid),
        3 => tile::<L, W, R, 3, FETCH>(weight, x, k, out, stride, valid),
        2 => tile::<L, W, R, 2, FETCH>(weight, x, k, out, stride, valid),
        _ => tile::<L, W, R, 1, FETCH>(weight, x, k, out, stride, valid),
    }
    columns
}

/// R weight rows times C activation rows; the first `valid` weight rows are written.
#[inline(always)]
fn tile<L: Lanes, W: Element, const R: usize, const C: usize, const FETCH: bool>(
    weight: [&[W]; R],
    x: &[f32],
    k: usize,
    out: &mut [f32],
    stride: usize,
    valid: usize,
) {
    // Slices of one known length: no bounds are checked in the loop.
    let steps = k / LANES;
    let mut w = [&weight[0].as_chunks().0[..steps]; R];
    for r in 0..R {
        w[r] = &weight[r].as_chunks().0[..steps];
    }
    let mut v = [&x.as_chunks().0[..steps]; C];
    for c in 0..C {
        v[c] = &x[c * k..].as_chunks().0[..steps];
    }
    let fetch = FETCH_BYTES.next_multiple_of(R * k * size_of::<W>());
    let mut acc = [[L::splat(0.0); C]; R];
    for i in 0..steps {
        step(&mut acc, |r| &w[r][i], |c| &v[c][i]);
        if FETCH {
            for r in 0..R {
                L::prefetch((&raw const w[r][i]).wrapping_byte_add(fetch));
            }
        }
    }
    if !k.is_multiple_of(LANES) {
        let mut w = [[W::ZERO; LANES]; R];
        for r in 0..R {
            w[r] = padded(&weight[r][steps * LANES..]);
        }
        let mut v = [[0.0; LANES]; C];
        for c in 0..C {
            v[c] = padded(&x[c * k + steps * LANES..(c + 1) * k]);
        }
        step(&mut acc, |r| &w[r], |c| &v[c]);
    }
    for (c, sums) in L::sums(&acc).iter().enumerate() {
        let out = &mut out[c * stride..];
        // A copy of a known length is one store.
        if valid == R { out[..R].copy_from_slice(sums) } else { out[..valid].copy_from_slice(&sums[..valid]) }
    }
}

/// Adds sixteen products to every accumulator.
#[inline(always)]
fn step<'a, L: Lanes, W: Element, const R: usize, const C: usize>(
    acc: &mut [[L; C]; R],
    weight: impl Fn(usize) -> &'a [W; LANES],
    x: impl Fn(usize) -> &'a [f32; LANES],
) {
    let mut w = [L::splat(0.0); R];
    for r in 0..R {
        w[r] = W::lanes(weight(r));
    }
    for c in 0..C {
        let v = L::load(x(c));
        for r in 0..R {
            acc[r][c] = acc[r][c].add_product(w[r], v);
        }
    }
}

/// The last, short step of a row: missing elements are zero.
#[inline(always)]
pub fn padded<W: Element>(rest: &[W]) -> [W; LANES] {
    let mut all = [W::ZERO; LANES];
    all[..rest.len()].copy_from_slice(rest);
    all
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::cpu::testing::Random;

    fn compute<W: Element>(isa: Isa, weight: &[W], x: &[f32], k: usize) -> Vec<f32> {
        let (n, m) = (weight.len() / k, x.len() / k);
        // A stride larger than n, and a poison that must not be overwritten.
        let mut out = vec![f32::NAN; m * (n + 1)];
        Product { weight, x, k, out: &mut out, stride: n + 1 }.compute(isa);
        assert!(out.chunks(n + 1).all(|row| row[n].is_nan()));
        out.chunks(n + 1).flat_map(|row| row[..n].to_vec()).collect()
    }

    fn check<W: Element>(n: usize, k: usize, m: usize) {
        let mut random = Random::new((n * 1000 + k * 10 + m) as u64);
        let weight: Vec<W> = (0..n * k).map(|_| W::from_f32(random.symmetric())).collect();
        let x: Vec<f32> = (0..m * k).map(|_| random.symmetric()).collect();
        let mut fused: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            let got = compute(isa, &weight, &x, k);
            for (r, x) in x.chunks(k).enumerate() {
                for (j, w) in weight.chunks(k).enumerate() {
                    let products = w.iter().zip(x).map(|(w, x)| f64::from(w.to_f32()) * f64::from(*x));
                    let (want, size): (f64, f64) = products.fold((0.0, 0.0), |(s, a), p| (s + p, a + p.abs()));
                    let error = (f64::from(got[r * n + j]) - want).abs();
                    assert!(error <= 1e-6 * size, "{isa:?} n={n} k={k} m={m} [{r}][{j}]: off by {error:e}");
                }
                let alone = compute(isa, &weight, x, k);
                assert_eq!(alone, got[r * n..][..n], "{isa:?} n={n} k={k}: row {r} of {m} differs from the row alone");
            }
            if isa.is_fused() {
                assert_eq!(fused.get_or_insert(got.clone()), &got, "{isa:?} n={n} k={k} m={m}: order of additions");
            }
        }
    }

    #[test]
    fn agrees_with_plain_loops_and_does_not_depend_on_the_number_of_rows() {
        for m in (1..=17).chain([31, 32, 33]) {
            check::<bf16>(7, 40, m);
            check::<f16>(9, 72, m);
            check::<f32>(5, 24, m);
        }
        for (n, k, m) in [(1, 8, 1), (3, 16, 2), (4, 576, 5), (6, 1536, 4), (13, 8, 6), (1, 200, 3)] {
            check::<bf16>(n, k, m);
            check::<f16>(n, k, m);
            check::<f32>(n, k, m);
        }
    }

    #[test]
    fn blocks_of_many_rows_agree_with_one_row() {
        let k = 1536;
        check::<bf16>(5, k, BLOCK_BYTES / (k * 4) + 9);
    }

    #[test]
    fn a_nan_stays_in_its_row() {
        let (n, k, m) = (9, 40, 5);
        let mut weight = vec![bf16::ONE; n * k];
        weight[3 * k + 39] = bf16::NAN;
        let mut x = vec![1.0; m * k];
        x[2 * k] = f32::NAN;
        for isa in Isa::available() {
            for (i, y) in compute(isa, &weight, &x, k).into_iter().enumerate() {
                assert_eq!(y.is_nan(), i / n == 2 || i % n == 3, "{isa:?} [{}][{}] is {y}", i / n, i % n);
            }
        }
    }
}

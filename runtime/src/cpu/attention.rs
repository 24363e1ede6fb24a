//! Attention of one row's query heads over its keys, in position order.
//!
//! The keys of a row are spans of consecutive cache slots: the pages of the committed prefix, then the slots of the row
//! and its ancestors. Everything that is summed is grouped by a key's position or by its dimension, never by where it
//! lies, so a token's result is the same, bit for bit, whether its context is committed or still a path of the tree.
//! Slots in no span are never read.

use treespark_kernel_gen::{CacheShape, Request, Row};

use super::math::exp;
use super::matmul::{padded, product};
use super::simd::{Element, Isa, Kernel, LANES, Lanes, fold};

/// Consecutive slots of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub page: usize,
    pub place: usize,
    pub len: usize,
}

/// The spans that hold the row's keys, in position order. `pages` are those of the row's request.
pub fn spans(row: &Row, request: &Request, pages: &[u32], page_size: usize) -> Vec<Span> {
    let prefix = request.prefix as usize;
    let mut spans: Vec<Span> = (0..prefix.div_ceil(page_size))
        .map(|i| Span { page: pages[i] as usize, place: 0, len: page_size.min(prefix - i * page_size) })
        .collect();
    let mut previous = None;
    for slot in row.path().map(|node| prefix + node) {
        let place = slot % page_size;
        match spans.last_mut() {
            Some(span) if place > 0 && previous == Some(slot - 1) => span.len += 1,
            _ => spans.push(Span { page: pages[slot / page_size] as usize, place, len: 1 }),
        }
        previous = Some(slot);
    }
    spans
}

/// The query heads of one row that share a kv head.
pub struct Attention<'a, T> {
    pub spans: &'a [Span],
    pub shape: CacheShape,
    pub layer: usize,
    pub kv_head: usize,
    pub scale: f32,
    pub keys: &'a [T],
    pub values: &'a [T],
    /// `[group, head_dim]`
    pub q: &'a [f32],
    /// `[group, head_dim]`
    pub out: &'a mut [f32],
    /// Working memory; holds nothing between calls.
    pub scores: &'a mut Vec<f32>,
}

impl<T: Element> Attention<'_, T> {
    pub fn compute(self, isa: Isa) {
        isa.run(self);
    }

    /// The rows of a span, `[len, head_dim]`.
    #[inline(always)]
    fn slots<'c>(&self, cache: &'c [T], span: &Span) -> &'c [T] {
        let start = self.shape.index(self.layer, span.page, self.kv_head, span.place);
        &cache[start..start + span.len * self.shape.head_dim]
    }
}

impl<T: Element> Kernel for Attention<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let dim = self.shape.head_dim;
        let n_keys: usize = self.spans.iter().map(|span| span.len).sum();
        let scores = std::mem::take(self.scores);
        let mut weights = scores;
        weights.resize(self.q.len() / dim * n_keys, 0.0);

        let mut at = 0;
        for span in self.spans {
            product::<L, T, false>(self.slots(self.keys, span), self.q, dim, &mut weights[at..], n_keys);
            at += span.len;
        }
        for weights in weights.chunks_exact_mut(n_keys) {
            softmax(weights, self.scale);
        }
        for (i, weights) in weights.chunks(4 * n_keys).enumerate() {
            match weights.len() / n_keys {
                4 => self.mix::<L, 4>(4 * i, weights),
                3 => self.mix::<L, 3>(4 * i, weights),
                2 => self.mix::<L, 2>(4 * i, weights),
                _ => self.mix::<L, 1>(4 * i, weights),
            }
        }
        *self.scores = weights;
    }
}

impl<T: Element> Attention<'_, T> {
    /// `out[first + h] = Σ weights[h][i] value[i]` for G heads.
    #[inline(always)]
    fn mix<L: Lanes, const G: usize>(&mut self, first: usize, weights: &[f32]) {
        let dim = self.shape.head_dim;
        let mut from = 0;
        while from < dim {
            from += match L::TILE {
                4 if dim - from >= 4 * LANES => self.mix_lanes::<L, G, 4>(first, weights, from),
                2.. if dim - from >= 2 * LANES => self.mix_lanes::<L, G, 2>(first, weights, from),
                _ => self.mix_lanes::<L, G, 1>(first, weights, from),
            };
        }
    }

    /// [`Self::mix`] for the dimensions `from..from + C * LANES`, or as many as there are. Returns their number.
    #[inline(always)]
    fn mix_lanes<L: Lanes, const G: usize, const C: usize>(&mut self, first: usize, weights: &[f32], from: usize) -> usize {
        let dim = self.shape.head_dim;
        let width = (C * LANES).min(dim - from);
        let n_keys = weights.len() / G;
        let mut acc = [[L::splat(0.0); C]; G];
        let mut key = 0;
        for span in self.spans {
            for value in self.slots(self.values, span).chunks_exact(dim) {
                let value = &value[from..from + width];
                let mut v = [L::splat(0.0); C];
                if width == C * LANES {
                    for c in 0..C {
                        v[c] = T::lanes(&value.as_chunks().0[c]);
                    }
                } else {
                    v[0] = T::lanes(&padded(value));
                }
                for h in 0..G {
                    let weight = L::splat(weights[h * n_keys + key]);
                    for c in 0..C {
                        acc[h][c] = acc[h][c].add_product(weight, v[c]);
                    }
                }
                key += 1;
            }
        }
        for h in 0..G {
            let mut lanes = [[0.0; LANES]; C];
            for c in 0..C {
                acc[h][c].store(&mut lanes[c]);
            }
            self.out[(first + h) * dim + from..][..width].copy_from_slice(&lanes.as_flattened()[..width]);
        }
        width
    }
}

/// `softmax(scores * scale)`, in place. Its sum adds up by position modulo the number of lanes.
#[inline(always)]
fn softmax(scores: &mut [f32], scale: f32) {
    let mut max = [f32::NEG_INFINITY; LANES];
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (vectors, rest) = scores.as_chunks::<LANES>();
    for vector in vectors {
        for i in 0..LANES {
            max[i] = larger(max[i], vector[i]);
        }
    }
    for (max, &x) in max.iter_mut().zip(rest) {
        *max = larger(*max, x);
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, larger);

    for x in scores.iter_mut() {
        *x = exp((*x - max) * scale);
    }
    let mut sum = [0.0; LANES];
    let (vectors, rest) = scores.as_chunks::<LANES>();
    for vector in vectors {
        for i in 0..LANES {
            sum[i] += vector[i];
        }
    }
    for (sum, &x) in sum.iter_mut().zip(rest) {
        *sum += x;
    }
    let inverse = 1.0 / fold(sum);
    for x in scores.iter_mut() {
        *x *= inverse;
    }
}

//! Attention of one row's query heads over its keys, in position order.
//!
//! The keys of a row are spans of consecutive cache slots: the pages of the committed prefix, then the slots of the row
//! and its ancestors. Everything that is summed is grouped by a key's position or by its dimension, never by where it
//! lies, so a token's result is the same, bit for bit, whether its context is committed or still a path of the tree.
//! Slots in no span are never read.
// Tiles are arrays of arrays of lanes: indices say which row meets which column.
#![allow(clippy::needless_range_loop)]

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
    let mut previous = prefix.checked_sub(1);
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
    /// Of the shape that keys have.
    pub values: &'a [T],
    /// As much of a value is used.
    pub value_dim: usize,
    /// `[group, head_dim]`
    pub q: &'a [f32],
    /// `[group, value_dim]`
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
        let dim = self.value_dim;
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
    fn mix_lanes<L: Lanes, const G: usize, const C: usize>(
        &mut self,
        first: usize,
        weights: &[f32],
        from: usize,
    ) -> usize {
        let dim = self.value_dim;
        let width = (C * LANES).min(dim - from);
        let n_keys = weights.len() / G;
        let mut acc = [[L::splat(0.0); C]; G];
        let mut key = 0;
        for span in self.spans {
            for value in self.slots(self.values, span).chunks_exact(self.shape.head_dim) {
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

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use treespark_kernel_gen::TreeShape;

    use super::*;
    use crate::cpu::testing::Random;

    const PAGES: [u32; 8] = [5, 2, 7, 0, 4, 1, 6, 3];

    /// Keys and values by slot, `[slot][kv_head][dim]`, laid out in pages between NaN.
    struct Cache<T> {
        shape: CacheShape,
        slots: Vec<Vec<Vec<[f32; 2]>>>,
        keys: Vec<T>,
        values: Vec<T>,
    }

    impl<T: Element> Cache<T> {
        fn new(shape: CacheShape, n_slots: usize, seed: u64) -> Cache<T> {
            let mut random = Random::new(seed);
            let mut number = || T::from_f32(random.symmetric()).to_f32();
            let mut head = || (0..shape.head_dim).map(|_| [number(), number()]).collect::<Vec<_>>();
            let slots = (0..n_slots).map(|_| (0..shape.kv_heads).map(|_| head()).collect()).collect();
            let nan = vec![T::from_f32(f32::NAN); shape.dims().iter().product()];
            let mut cache = Cache { shape, slots, keys: nan.clone(), values: nan };
            (0..n_slots).for_each(|slot| cache.lay(slot, slot));
            cache
        }

        /// Puts the content `from` at slot `to`.
        fn lay(&mut self, from: usize, to: usize) {
            let (page, place) = (PAGES[to / self.shape.page_size] as usize, to % self.shape.page_size);
            for (head, content) in self.slots[from].iter().enumerate() {
                let start = self.shape.index(1, page, head, place);
                for (i, &[key, value]) in content.iter().enumerate() {
                    (self.keys[start + i], self.values[start + i]) = (T::from_f32(key), T::from_f32(value));
                }
            }
        }

        fn attend(&self, isa: Isa, row: &Row, prefix: usize, kv_head: usize, q: &[f32]) -> Vec<f32> {
            let request = Request { prefix: prefix as u32, ..REQUEST };
            let spans = spans(row, &request, &PAGES, self.shape.page_size);
            let mut out = vec![f32::NAN; q.len()];
            let mut scores = vec![f32::NAN; 3];
            Attention {
                spans: &spans,
                shape: self.shape,
                layer: 1,
                kv_head,
                scale: 0.3,
                keys: &self.keys,
                values: &self.values,
                value_dim: self.shape.head_dim,
                q,
                out: &mut out,
                scores: &mut scores,
            }
            .compute(isa);
            out
        }

        /// The same over the contents of the given slots, by the definition.
        fn naive(&self, slots: &[usize], kv_head: usize, q: &[f32]) -> Vec<f64> {
            let dim = self.shape.head_dim;
            let dot = |slot: usize| {
                let key = self.slots[slot][kv_head].iter().map(|[key, _]| f64::from(*key));
                key.zip(q).map(|(key, &q)| key * f64::from(q)).sum::<f64>() * f64::from(0.3f32)
            };
            let weights: Vec<f64> = slots.iter().map(|&slot| dot(slot).exp()).collect();
            let total: f64 = weights.iter().sum();
            let value = |slot: usize, i: usize| f64::from(self.slots[slot][kv_head][i][1]);
            (0..dim).map(|i| slots.iter().zip(&weights).map(|(&slot, w)| w / total * value(slot, i)).sum()).collect()
        }
    }

    const REQUEST: Request = Request {
        prefix: 0,
        first_row: 0,
        n_rows: 0,
        sample: 0,
        seed: [0; 2],
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        given: 0,
    };

    fn row(tree: &TreeShape, node: usize, prefix: usize) -> Row {
        let position = (prefix + tree.depth(node)) as u32;
        Row { token: 0, position, request: 0, node: node as u32, ancestors: tree.ancestors(node) }
    }

    fn check<T: Element>(tree: &str, prefix: usize, page_size: usize, head_dim: usize, group: usize) {
        let tree: TreeShape = tree.parse().unwrap();
        let shape = CacheShape { layers: 2, pages: 8, kv_heads: 2, page_size, head_dim };
        let mut random = Random::new(head_dim as u64);
        let q: Vec<f32> = (0..group * head_dim).map(|_| random.symmetric()).collect();
        for node in 0..tree.len() {
            let path = tree.path(node);
            let slots: Vec<usize> = (0..prefix).chain(path.iter().map(|&n| prefix + n)).collect();
            let mut cache = Cache::<T>::new(shape, prefix + tree.len(), 7);
            // What is neither committed nor an ancestor must not matter.
            for unused in (prefix..prefix + tree.len()).filter(|slot| !slots.contains(slot)) {
                cache.slots[unused].iter_mut().flatten().for_each(|content| *content = [f32::NAN; 2]);
                cache.lay(unused, unused);
            }
            // The same context, committed but for the last token.
            let mut committed = Cache::<T>::new(shape, prefix + tree.len(), 7);
            slots.iter().enumerate().for_each(|(to, &from)| committed.lay(from, to));
            let last = row(&TreeShape::root(), 0, slots.len() - 1);
            for isa in Isa::available() {
                for kv_head in 0..2 {
                    let got = cache.attend(isa, &row(&tree, node, prefix), prefix, kv_head, &q);
                    for (h, q) in q.chunks(head_dim).enumerate() {
                        let want = cache.naive(&slots, kv_head, q);
                        for (got, want) in got[h * head_dim..].iter().zip(want) {
                            let error = (f64::from(*got) - want).abs();
                            assert!(error < 2e-6, "{isa:?} {tree} node {node} prefix {prefix}: {got}, not {want}");
                        }
                    }
                    let again = committed.attend(isa, &last, slots.len() - 1, kv_head, &q);
                    assert_eq!(got, again, "{isa:?} {tree} node {node} prefix {prefix}: tree and prefix differ");
                }
            }
        }
    }

    #[test]
    fn agrees_with_the_definition_wherever_the_context_lies() {
        for prefix in [0, 1, 3, 4, 7, 17] {
            check::<f32>("root", prefix, 4, 16, 1);
            check::<bf16>("2x2x1", prefix, 4, 64, 3);
            check::<f16>("chain:6", prefix, 8, 24, 5);
        }
        check::<bf16>("3x2", 40, 16, 128, 4);
        check::<f32>("4x1x1x1", 5, 4, 8, 7);
        check::<f32>("chain:12", 70, 16, 80, 9);
    }

    #[test]
    fn spans_end_at_pages_and_gaps() {
        let tree: TreeShape = "parents:0,0,0,1,3,4".parse().unwrap();
        let span = |page, place, len| Span { page, place, len };
        let of = |node, prefix| {
            let request = Request { prefix: prefix as u32, ..REQUEST };
            spans(&row(&tree, node, prefix), &request, &PAGES, 4)
        };
        // Path 0, 1, 3, 4, 5 behind six committed slots: 6, 7, 9, 10, 11.
        assert_eq!(of(5, 6), [span(5, 0, 4), span(2, 0, 4), span(7, 1, 3)]);
        assert_eq!(of(0, 8), [span(5, 0, 4), span(2, 0, 4), span(7, 0, 1)]);
        assert_eq!(of(2, 0), [span(5, 0, 1), span(5, 2, 1)]);
    }
}

//! The oracle's model layers: embed, qkv, tree attention, projections, head.

use treespark_kernel_gen::{Buf, Op};

use super::{Slot, Step};

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(super) fn rms_norm(x: &[f64], weight: &[f64], eps: f32) -> Vec<f64> {
    let mean_square = dot(x, x) / x.len() as f64;
    x.iter().zip(weight).map(|(x, w)| x / (mean_square + f64::from(eps)).sqrt() * w).collect()
}

/// Weights of the values of a softmax over `scores`.
pub(super) fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    scores.iter().map(|s| (s - max).exp() / sum).collect()
}

pub(super) fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

impl Step<'_> {
    pub(super) fn embed(&mut self, op: &Op) {
        let &Op::Embed { table, out, .. } = op else { unreachable!() };
        for r in 0..self.n_rows() {
            let embedding = self.row_of(table, self.row(r).token as usize);
            self.set_row(out, r, &embedding);
        }
    }

    pub(super) fn qkv(&mut self, op: &Op) {
        #[rustfmt::skip]
        let &Op::Qkv { layer, heads, kv_heads, eps, x, norm, weight, bias, q_norm, k_norm, rope, q, k_cache, v_cache, .. } =
            op
        else {
            unreachable!()
        };
        let dim = self.width(k_cache);
        for r in 0..self.n_rows() {
            let row = self.row(r);
            let slot = Slot { request: row.request, slot: self.prefix(row.request) + row.node };
            let mut y = self.product(weight, &rms_norm(&self.row_of(x, r), &self.all(norm), eps));
            if let Some(bias) = bias {
                y = y.iter().zip(self.all(bias)).map(|(y, b)| y + b).collect();
            }
            let head = |index: usize| &y[index * dim..(index + 1) * dim];
            let normed = |head: &[f64], norm: Option<Buf>| match norm {
                Some(norm) => rms_norm(head, &self.all(norm), eps),
                None => head.to_vec(),
            };
            let turn = |head: &[f64]| self.turned(head, rope, row.position);
            let queries: Vec<f64> = (0..heads).flat_map(|h| turn(&normed(head(h), q_norm))).collect();
            let keys: Vec<Vec<f64>> = (0..kv_heads).map(|h| turn(&normed(head(heads + h), k_norm))).collect();
            self.set_row(q, r, &queries);
            for (h, key) in keys.iter().enumerate() {
                self.set_cached(k_cache, layer, h, slot, key);
                self.set_cached(v_cache, layer, h, slot, head(heads + kv_heads + h));
            }
        }
    }

    pub(super) fn tree_attention(&mut self, op: &Op) {
        let &Op::TreeAttention { layer, heads, kv_heads, scale, q, k_cache, v_cache, out, .. } = op else {
            unreachable!()
        };
        let dim = self.width(k_cache);
        for r in 0..self.n_rows() {
            let row = self.row(r);
            let prefix = self.prefix(row.request);
            let slots: Vec<usize> = (0..prefix).chain(row.path.iter().map(|node| prefix + node)).collect();
            let mut result = Vec::new();
            for h in 0..heads {
                let kv_head = h / (heads / kv_heads);
                let vector = |cache: Buf, slot: usize| {
                    let at = self.cache_at(cache, layer, kv_head, Slot { request: row.request, slot });
                    self.slice(cache, at, dim)
                };
                let query = self.slice(q, (r * heads + h) * dim, dim);
                let scores: Vec<f64> =
                    slots.iter().map(|&s| dot(&query, &vector(k_cache, s)) * f64::from(scale)).collect();
                let mut sum = vec![0.0; dim];
                for (&slot, weight) in slots.iter().zip(softmax(&scores)) {
                    for (sum, v) in sum.iter_mut().zip(vector(v_cache, slot)) {
                        *sum += weight * v;
                    }
                }
                result.extend(sum);
            }
            self.set_row(out, r, &result);
        }
    }

    pub(super) fn project(&mut self, op: &Op) {
        let &Op::Project { add, x, weight, residual, .. } = op else { unreachable!() };
        for r in 0..self.n_rows() {
            let mut sum = self.product(weight, &self.row_of(x, r));
            if add {
                sum = self.row_of(residual, r).iter().zip(sum).map(|(a, b)| a + b).collect();
            }
            self.set_row(residual, r, &sum);
        }
    }

    pub(super) fn res_block(&mut self, op: &Op) {
        let &Op::ResBlock { states, weight, bias, out, .. } = op else { unreachable!() };
        let width = self.width(states);
        for r in 0..self.n_rows() {
            let row = self.row(r);
            let head = row.position - self.prefix(row.request);
            let state = self.row_of(states, row.node);
            let block = |e: usize| {
                let output = head * width + e;
                let x = dot(&self.row_of(weight, output), &state) + self.get(bias, output);
                state[e] + x / (1.0 + (-x).exp())
            };
            let result: Vec<f64> = (0..width).map(block).collect();
            self.set_row(out, r, &result);
        }
    }

    pub(super) fn norm(&mut self, op: &Op) {
        let &Op::Norm { eps, x, norm, out, .. } = op else { unreachable!() };
        for r in 0..self.n_rows() {
            let normed = rms_norm(&self.row_of(x, r), &self.all(norm), eps);
            self.set_row(out, r, &normed);
        }
    }

    pub(super) fn gather(&mut self, op: &Op) {
        let &Op::Gather { states, sources, out, .. } = op else { unreachable!() };
        for r in 0..self.n_rows() {
            let state = self.row_of(states, self.word(sources, r) as usize);
            self.set_row(out, r, &state);
        }
    }

    pub(super) fn gate_up(&mut self, op: &Op) {
        let &Op::GateUp { eps, x, norm, weight, out, .. } = op else { unreachable!() };
        for r in 0..self.n_rows() {
            let y = self.product(weight, &rms_norm(&self.row_of(x, r), &self.all(norm), eps));
            let (gate, up) = y.split_at(y.len() / 2);
            self.set_row(out, r, &swiglu(gate, up));
        }
    }

    pub(super) fn head(&mut self, op: &Op) {
        let &Op::Head { eps, x, norm, weight, logits, .. } = op else { unreachable!() };
        for r in 0..self.n_rows() {
            let y = self.product(weight, &rms_norm(&self.row_of(x, r), &self.all(norm), eps));
            self.set_row(logits, r, &y);
        }
    }

    pub(super) fn prefix(&self, request: usize) -> usize {
        self.request(request).prefix as usize
    }

    /// All numbers of a buffer.
    pub(super) fn all(&self, buf: Buf) -> Vec<f64> {
        self.slice(buf, 0, self.pass.buffer(buf).len())
    }

    /// `buf[row]`, whatever dimensions follow the first.
    pub(super) fn row_of(&self, buf: Buf, row: usize) -> Vec<f64> {
        let width = self.pass.buffer(buf).len() / self.pass.buffer(buf).shape[0];
        self.slice(buf, row * width, width)
    }

    pub(super) fn set_row(&mut self, buf: Buf, row: usize, values: &[f64]) {
        for (i, &value) in values.iter().enumerate() {
            self.set(buf, row * values.len() + i, value);
        }
    }

    /// `weight · x`
    pub(super) fn product(&self, weight: Buf, x: &[f64]) -> Vec<f64> {
        (0..self.pass.buffer(weight).shape[0]).map(|row| dot(&self.row_of(weight, row), x)).collect()
    }

    /// Rope: elements i and i + D/2 turn together, by the angle of the position.
    pub(super) fn turned(&self, head: &[f64], rope: Buf, position: usize) -> Vec<f64> {
        let half = head.len() / 2;
        let mut turned = vec![0.0; head.len()];
        for i in 0..half {
            let cos = self.get(rope, (position * half + i) * 2);
            let sin = self.get(rope, (position * half + i) * 2 + 1);
            turned[i] = head[i] * cos - head[i + half] * sin;
            turned[i + half] = head[i + half] * cos + head[i] * sin;
        }
        turned
    }

    pub(super) fn set_cached(&mut self, cache: Buf, layer: usize, head: usize, slot: Slot, vector: &[f64]) {
        let at = self.cache_at(cache, layer, head, slot);
        for (i, &value) in vector.iter().enumerate() {
            let rounded = self.rounded(cache, value);
            self.set(cache, at + i, rounded);
        }
    }
}

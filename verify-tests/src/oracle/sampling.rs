//! The oracle's mask, draw and top-k: sort everything, keep what the definition keeps, look at every token.

use treespark_kernel_gen::layout::NO_TOKEN;
use treespark_kernel_gen::{Op, Request};

use super::{RowView, Step, gumbel};

/// What a draw thinks of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    pub token: u32,
    /// The logit after the repetition penalty, divided by the temperature (if that is not 0).
    pub scaled: f64,
    /// Probability as a fraction of the most likely token's.
    pub relative: f64,
    /// `scaled` plus noise: the largest of the kept tokens is drawn.
    pub score: f64,
    pub kept: bool,
}

/// Scores of all tokens, in id order. `penalised(t)`: token t occurred.
pub fn scores(logits: &[f64], request: &Request, position: u32, penalised: impl Fn(u32) -> bool) -> Vec<Scored> {
    let penalty = f64::from(request.repetition_penalty);
    let greedy = request.temperature == 0.0;
    let temperature = if greedy { 1.0 } else { f64::from(request.temperature) };
    let scaled: Vec<f64> = (0..)
        .zip(logits)
        .map(|(token, &x)| match (penalised(token), x > 0.0) {
            (true, true) => x / penalty / temperature,
            (true, false) => x * penalty / temperature,
            _ => x / temperature,
        })
        .collect();
    // In descending order: the tokens larger than x are the first `rank` ones; `mass[i]` is the mass of the first i.
    let mut sorted = scaled.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let max = sorted[0];
    let rank = |x: f64| sorted.partition_point(|&y| y > x);
    let in_top_k = |x: f64| request.top_k == 0 || rank(x) < request.top_k as usize;
    let total: f64 = sorted.iter().filter(|&&x| in_top_k(x)).map(|x| (x - max).exp()).sum();
    let mut mass = vec![0.0];
    for x in &sorted {
        mass.push(mass[mass.len() - 1] + (x - max).exp() / total);
    }

    (0..scaled.len())
        .map(|t| {
            let rank = rank(scaled[t]);
            let relative = (scaled[t] - max).exp();
            let in_top_p = request.top_p >= 1.0 || mass[rank] < f64::from(request.top_p);
            let in_filters = in_top_k(scaled[t]) && in_top_p && relative >= f64::from(request.min_p);
            // Whatever the filters say, the most likely token stays.
            let kept = greedy || scaled[t] == max || in_filters;
            let noise = if greedy { 0.0 } else { gumbel(request.seed, request.sample, position, t as u32) };
            Scored { token: t as u32, scaled: scaled[t], relative, score: scaled[t] + noise, kept }
        })
        .collect()
}

/// The probability of each token: that of the kept ones, as fractions of their sum.
pub fn law(scored: &[Scored]) -> Vec<f64> {
    let masses: Vec<f64> = scored.iter().map(|s| if s.kept { s.relative } else { 0.0 }).collect();
    let total: f64 = masses.iter().sum();
    masses.iter().map(|mass| mass / total).collect()
}

/// The kept token with the largest score, ties to the lowest id.
pub fn draw(logits: &[f64], request: &Request, position: u32, penalised: impl Fn(u32) -> bool) -> u32 {
    if logits.iter().any(|x| x.is_nan()) {
        return NO_TOKEN;
    }
    let mut best: Option<Scored> = None;
    for s in scores(logits, request, position, penalised) {
        if s.kept && best.is_none_or(|b| s.score > b.score) {
            best = Some(s);
        }
    }
    best.map_or(NO_TOKEN, |b| b.token)
}

impl Step<'_> {
    pub(super) fn draw(&mut self, op: &Op) {
        let &Op::Draw { seen, logits, draws, .. } = op else { unreachable!() };
        let seen_width = self.width(seen);
        for r in 0..self.n_rows() {
            let row = self.row(r);
            let request = self.request(row.request);
            let on_path = |other: &RowView| other.request == row.request && row.path.contains(&other.node);
            let path: Vec<u32> = (0..self.n_rows()).map(|i| self.row(i)).filter(on_path).map(|r| r.token).collect();
            let penalised = |t: u32| {
                let word = self.word(seen, row.request * seen_width + t as usize / 32);
                word >> (t % 32) & 1 == 1 || path.contains(&t)
            };
            let token = draw(&self.row_of(logits, r), &request, row.position as u32, penalised);
            self.set_word(draws, r, token);
        }
    }

    pub(super) fn mask(&mut self, op: &Op) {
        let &Op::Mask { allowed, logits, .. } = op else { unreachable!() };
        let (words, vocab) = (self.width(allowed), self.width(logits));
        for r in 0..self.n_rows() {
            for t in 0..vocab {
                if self.word(allowed, r * words + t / 32) >> (t % 32) & 1 == 0 {
                    self.set(logits, r * vocab + t, f64::NEG_INFINITY);
                }
            }
        }
    }

    pub(super) fn perturb(&mut self, op: &Op) {
        let &Op::Perturb { logits, .. } = op else { unreachable!() };
        for r in 0..self.n_rows() {
            let row = self.row(r);
            let request = self.request(row.request);
            let scored = scores(&self.row_of(logits, r), &request, row.position as u32, |_| false);
            let width = self.width(logits);
            for (t, scored) in scored.iter().enumerate() {
                self.set(logits, r * width + t, scored.score);
            }
        }
    }

    pub(super) fn top_k(&mut self, op: &Op) {
        let &Op::TopK { logits, ids, values, .. } = op else { unreachable!() };
        let k = self.width(ids);
        for r in 0..self.n_rows() {
            let row = self.row_of(logits, r);
            let mut order: Vec<usize> = (0..row.len()).collect();
            // NaN ranks last; -0 ties with 0, and the sort keeps ties in id order.
            let rank = |t: usize| if row[t].is_nan() { f64::NEG_INFINITY } else { row[t] };
            order.sort_by(|&a, &b| rank(b).partial_cmp(&rank(a)).expect("no NaN is left"));
            for (i, &id) in order[..k].iter().enumerate() {
                self.set_word(ids, r * k + i, id as u32);
                self.set(values, r * k + i, row[id]);
            }
        }
    }
}

//! The oracle's mixture of experts: every row by itself.

use treespark_kernel_gen::op::{GroupScore, Routing, Scoring};
use treespark_kernel_gen::{Buf, Op};

use super::Step;
use super::layers::{dot, rms_norm, softmax, swiglu};

impl Step<'_> {
    pub(super) fn route(&mut self, op: &Op) {
        let &Op::Route { eps, ref routing, x, norm, weight, bias, experts, weights, .. } = op else { unreachable!() };
        let chosen = self.width(experts);
        for r in 0..self.n_rows() {
            let logits = self.product(weight, &rms_norm(&self.row_of(x, r), &self.all(norm), eps));
            let bias = bias.map_or(vec![0.0; logits.len()], |buf| self.all(buf));
            let choice = choose(routing, &logits, &bias, chosen);
            for (j, (expert, weight)) in choice.into_iter().enumerate() {
                self.set_word(experts, r * chosen + j, expert as u32);
                self.set(weights, r * chosen + j, weight);
            }
        }
    }

    pub(super) fn group_rows(&mut self, op: &Op) {
        let &Op::GroupRows { experts, groups, .. } = op else { unreachable!() };
        let entries = self.n_rows() * self.width(experts);
        let count = self.width(groups) - 1 - self.pass.buffer(experts).len();
        let mut at = 0;
        for expert in 0..count {
            self.set_word(groups, expert, at as u32);
            for entry in (0..entries).filter(|&entry| self.word(experts, entry) as usize == expert).collect::<Vec<_>>()
            {
                self.set_word(groups, count + 1 + at, entry as u32);
                at += 1;
            }
        }
        self.set_word(groups, count, at as u32);
    }

    pub(super) fn expert_gate_up(&mut self, op: &Op) {
        let &Op::ExpertGateUp { eps, x, norm, weight, groups, out, .. } = op else { unreachable!() };
        let [max_rows, chosen, ffn] = self.pass.buffer(out).shape[..] else { unreachable!() };
        for (expert, entry) in self.entries(groups, max_rows * chosen) {
            let x = rms_norm(&self.row_of(x, entry / chosen), &self.all(norm), eps);
            let half =
                |half: usize| (0..ffn).map(|i| dot(&self.row_of(weight, (2 * expert + half) * ffn + i), &x)).collect();
            let [gate, up]: [Vec<f64>; 2] = [0, 1].map(half);
            self.set_row(out, entry, &swiglu(&gate, &up));
        }
    }

    pub(super) fn expert_down(&mut self, op: &Op) {
        let &Op::ExpertDown { x, weight, groups, out, .. } = op else { unreachable!() };
        let [max_rows, chosen, hidden] = self.pass.buffer(out).shape[..] else { unreachable!() };
        let ffn = self.width(x);
        for (expert, entry) in self.entries(groups, max_rows * chosen) {
            let x = self.slice(x, entry * ffn, ffn);
            let y: Vec<f64> = (0..hidden).map(|i| dot(&self.row_of(weight, expert * hidden + i), &x)).collect();
            self.set_row(out, entry, &y);
        }
    }

    pub(super) fn combine(&mut self, op: &Op) {
        let &Op::Combine { x, weights, residual, .. } = op else { unreachable!() };
        let (chosen, hidden) = (self.width(weights), self.width(residual));
        for r in 0..self.n_rows() {
            let mut sum = self.row_of(residual, r);
            for j in 0..chosen {
                let weight = self.get(weights, r * chosen + j);
                let of_expert = self.slice(x, (r * chosen + j) * hidden, hidden);
                sum.iter_mut().zip(of_expert).for_each(|(sum, x)| *sum += weight * x);
            }
            self.set_row(residual, r, &sum);
        }
    }

    /// Which expert has which entries.
    fn entries(&self, groups: Buf, max_entries: usize) -> Vec<(usize, usize)> {
        let count = self.width(groups) - 1 - max_entries;
        let begin = |expert: usize| self.word(groups, expert) as usize;
        (0..count)
            .flat_map(|expert| (begin(expert)..begin(expert + 1)).map(move |at| (expert, at)))
            .map(|(expert, at)| (expert, self.word(groups, count + 1 + at) as usize))
            .collect()
    }
}

/// The chosen experts and their weights: sorted by what they are chosen by, best first.
fn choose(routing: &Routing, logits: &[f64], bias: &[f64], chosen: usize) -> Vec<(usize, f64)> {
    let scores: Vec<f64> = match routing.scoring {
        Scoring::Softmax => softmax(logits),
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
    };
    let ranked: Vec<f64> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
    let size = logits.len() / routing.groups;
    let descending = |values: &mut Vec<(usize, f64)>| values.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));

    let mut groups: Vec<(usize, f64)> = Vec::new();
    for (index, group) in ranked.chunks(size).enumerate() {
        let mut group: Vec<(usize, f64)> = group.iter().copied().enumerate().collect();
        descending(&mut group);
        let worth = match routing.group_score {
            GroupScore::Largest => group[0].1,
            GroupScore::TwoLargest if size > 1 => group[0].1 + group[1].1,
            GroupScore::TwoLargest => group[0].1,
        };
        groups.push((index, worth));
    }
    descending(&mut groups);
    let best: Vec<usize> = groups.iter().take(routing.top_groups).map(|(index, _)| *index).collect();

    let mut experts: Vec<(usize, f64)> =
        ranked.into_iter().enumerate().filter(|(expert, _)| best.contains(&(expert / size))).collect();
    descending(&mut experts);
    experts.truncate(chosen);
    let total: f64 = experts.iter().map(|(expert, _)| scores[*expert]).sum();
    let of_total = if routing.normalise { total + 1e-20 } else { 1.0 };
    experts.into_iter().map(|(expert, _)| (expert, scores[expert] / of_total * f64::from(routing.scale))).collect()
}

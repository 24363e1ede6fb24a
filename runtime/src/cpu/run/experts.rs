//! Mixture of experts: each chosen expert's weights are read once, for all rows that chose it.

use std::ops::Range;

use rayon::prelude::*;
use treespark_kernel_gen::{Buf, Op};

use super::Run;
use crate::cpu::linear;
use crate::cpu::math::SwiGlu;
use crate::cpu::routing;

/// Weight rows of a task.
const CHUNK: usize = 128;

/// Some weight rows of an expert, for all entries that chose it.
struct Task<'a> {
    expert: usize,
    rows: Range<usize>,
    /// `row * chosen + j`
    entries: &'a [u32],
}

impl Run<'_> {
    pub(super) fn route(&mut self, op: &Op) {
        let &Op::Route { eps, ref routing, x, norm, weight, bias, experts, weights, .. } = op else {
            unreachable!("{} does not route", op.name())
        };
        let logits = self.projected(x, norm, eps, weight);
        let (count, chosen) = (logits.len() / self.n_rows, self.width(experts));
        let mut ids = self.take(experts);
        self.writing(weights, |run, weights| {
            let bias = bias.map(|buf| run.floats(buf));
            let out = ids.chunks_exact_mut(chosen).zip(weights.chunks_exact_mut(chosen));
            out.zip(logits.chunks_exact(count)).for_each(|((ids, weights), logits)| {
                routing::choose(routing, logits, bias, ids, weights);
            });
        });
        self.put(experts, ids);
    }

    pub(super) fn group_rows(&mut self, experts: Buf, groups: Buf) {
        let entries = self.n_rows * self.width(experts);
        let mut out = self.take(groups);
        let chosen = &self.words(experts)[..entries];
        let count = out.len() - 1 - self.words(experts).len();
        let (begins, list) = out.split_at_mut(count + 1);
        let mut at = 0;
        for (expert, begin) in begins.iter_mut().enumerate() {
            *begin = at as u32;
            for entry in (0..entries).filter(|&entry| chosen[entry] as usize == expert) {
                list[at] = entry as u32;
                at += 1;
            }
        }
        self.put(groups, out);
    }

    pub(super) fn expert_gate_up(&mut self, op: &Op) {
        let &Op::ExpertGateUp { eps, x, norm, weight, groups, out, .. } = op else {
            unreachable!("{} has no experts", op.name())
        };
        let [chosen, ffn] = self.of_chosen(out);
        self.writing(out, |run, out| {
            let hidden = run.width(x);
            let x = linear::normed(run.rows(x), run.floats(norm), eps);
            let weight = run.matrix(weight);
            run.of_experts(groups, chosen, ffn, out, |task| {
                let entries = task.entries.iter().map(|&entry| entry as usize / chosen);
                let x: Vec<f32> = entries.flat_map(|row| &x[row * hidden..][..hidden]).copied().collect();
                let [mut gates, mut ups, mut out] = [(); 3].map(|()| vec![0.0; task.entries.len() * task.rows.len()]);
                for (half, products) in [&mut gates, &mut ups].into_iter().enumerate() {
                    let first = (2 * task.expert + half) * ffn;
                    weight.multiply(run.isa, first + task.rows.start..first + task.rows.end, &x, products);
                }
                run.isa.run(SwiGlu { gate: &gates, up: &ups, out: &mut out });
                out
            });
        });
    }

    pub(super) fn expert_down(&mut self, x: Buf, weight: Buf, groups: Buf, out: Buf) {
        let [chosen, hidden] = self.of_chosen(out);
        self.writing(out, |run, out| {
            let (weight, ffn) = (run.matrix(weight), run.width(x) / chosen);
            let x = run.rows(x);
            run.of_experts(groups, chosen, hidden, out, |task| {
                let rows = task.entries.iter().flat_map(|&entry| &x[entry as usize * ffn..][..ffn]);
                let x: Vec<f32> = rows.copied().collect();
                let mut products = vec![0.0; task.entries.len() * task.rows.len()];
                let first = task.expert * hidden;
                weight.multiply(run.isa, first + task.rows.start..first + task.rows.end, &x, &mut products);
                products
            });
        });
    }

    pub(super) fn combine(&mut self, x: Buf, weights: Buf, residual: Buf) {
        let hidden = self.width(residual);
        self.writing(residual, |run, residual| {
            let (x, chosen) = (run.rows(x), run.width(weights));
            let rows = residual.chunks_exact_mut(hidden).zip(x.chunks_exact(chosen * hidden));
            for ((residual, x), weights) in rows.zip(run.rows(weights).chunks_exact(chosen)) {
                for (i, residual) in residual.iter_mut().enumerate() {
                    *residual += weights.iter().zip(x[i..].iter().step_by(hidden)).map(|(w, x)| w * x).sum::<f32>();
                }
            }
        });
    }

    /// Elements of a row that each chosen expert has: `[R, chosen, width]`.
    fn of_chosen(&self, buf: Buf) -> [usize; 2] {
        let shape = &self.pass.buffer(buf).shape;
        [shape[1], shape[2]]
    }

    /// Computes `out`, `[entries, width]`: a task's result has a row for each of its entries.
    fn of_experts(
        &self,
        groups: Buf,
        chosen: usize,
        width: usize,
        out: &mut [f32],
        compute: impl Fn(&Task) -> Vec<f32> + Sync + Send,
    ) {
        let max_entries = self.pass.buffer(self.pass.ops[0].batch().rows).shape[0] * chosen;
        let words = self.words(groups);
        let (begins, entries) = words.split_at(words.len() - max_entries);
        let tasks = begins.windows(2).enumerate().filter(|(_, ends)| ends[0] < ends[1]).flat_map(|(expert, ends)| {
            let entries = &entries[ends[0] as usize..ends[1] as usize];
            (0..width).step_by(CHUNK).map(move |first| Task { expert, rows: first..width.min(first + CHUNK), entries })
        });
        let tasks: Vec<Task> = tasks.collect();
        let results: Vec<Vec<f32>> = tasks.par_iter().with_max_len(1).map(compute).collect();
        for (task, result) in tasks.iter().zip(&results) {
            for (&entry, result) in task.entries.iter().zip(result.chunks_exact(task.rows.len())) {
                out[entry as usize * width..][task.rows.clone()].copy_from_slice(result);
            }
        }
    }
}

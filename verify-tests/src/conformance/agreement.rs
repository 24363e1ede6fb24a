//! How closely numbers must agree: with the oracle's ([`Tolerance`]), and in two runs of one backend ([`Agreement`]).

use treespark_kernel_gen::{CacheShape, DType, cuda};

use super::{Property, same, same_bits};
use crate::bed::Outputs;
use crate::near_tie::{Verdict, classify};
use crate::tiny_model::Sizes;

/// How closely numbers must agree with the oracle's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Relative to the largest magnitude among the row's numbers.
    pub relative: f64,
}

impl Tolerance {
    /// One op on equal inputs, result in f32. The sums have at most a few hundred terms of order 1, each rounded to 24
    /// bits: an error of sqrt(500) * 2^-24 = 1.3e-6 of the row's scale is expected, 500 * 2^-24 = 3e-5 the worst. GPUs
    /// add a few units in the last place for `exp` and division.
    pub const OP: Tolerance = Tolerance { relative: 2e-5 };

    /// The same of an op with weights. Where CUDA has these in bf16, it takes activations as two halves of that type, which
    /// together have 16 bits; a row of few small results may be off by all of the last.
    pub fn op(backend: &str, sizes: &Sizes) -> Tolerance {
        let split = if backend == "cuda" && sizes.weights == DType::BF16 { 2f64.powi(-15) } else { 0.0 };
        Tolerance { relative: Self::OP.relative + split }
    }

    /// Keys and values are rounded to the cache's dtype: a value that f32 error moved across a rounding boundary is one
    /// unit in the last place off.
    pub fn cache(dtype: DType) -> Tolerance {
        Tolerance { relative: Self::OP.relative + unit_in_last_place(dtype) }
    }

    /// Attention alone. Tensor cores take queries and softmax weights in the cache's dtype. Rounding a query moves a
    /// score by half a unit in the last place times the score's own size, which is a few, and all weights with it;
    /// rounding a weight moves it by half a unit. Both average out over the keys as the values themselves do: a third of a
    /// unit of the result's largest number is what is usual, and 1.03 the most in ten million results on an H200.
    pub fn attention(backend: &str, sizes: &Sizes) -> Tolerance {
        let rounding = if uses_tensor_cores(backend, sizes) { 2.0 * unit_in_last_place(sizes.cache) } else { 0.0 };
        Tolerance { relative: Self::OP.relative + rounding }
    }

    /// Logits behind a few layers. Each op adds its error; and each cached value that falls to the other side of a
    /// rounding boundary one unit in the last place of its own, of which a softmax averages many: half a unit in all.
    pub fn logits(backend: &str, sizes: &Sizes) -> Tolerance {
        let cached = unit_in_last_place(sizes.cache) / 2.0;
        let attention = (Self::attention(backend, sizes).relative - Self::OP.relative) / 2.0;
        Tolerance { relative: 10.0 * Self::OP.relative + cached + sizes.layers as f64 * attention }
    }

    /// Compares the numbers of one row; NaN equals NaN.
    pub fn compare(&self, what: &str, got: &[f32], want: &[f32]) -> Property {
        let tolerance = self.absolute(want);
        for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
            let close = (f64::from(g) - f64::from(w)).abs() <= tolerance;
            if !close && g != w && !(g.is_nan() && w.is_nan()) {
                return Err(format!("{what}[{i}] is {g}, not {w} up to {tolerance} ({self:?})"));
            }
        }
        Ok(())
    }

    /// For each number of a row.
    fn absolute(&self, row: &[f32]) -> f64 {
        self.relative * row.iter().map(|x| f64::from(x.abs())).filter(|x| x.is_finite()).fold(0.0, f64::max)
    }
}

fn unit_in_last_place(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-10),
        DType::BF16 => 2f64.powi(-7),
        DType::F32 | DType::U32 => 0.0,
    }
}

/// Whether attention rounds its inputs to the cache's dtype, and cuts its sums where the pass has its blocks.
fn uses_tensor_cores(backend: &str, sizes: &Sizes) -> bool {
    let &Sizes { layers, kv_heads, page_size, head_dim, cache, .. } = sizes;
    let shape = CacheShape { layers, pages: sizes.pages(), kv_heads, page_size, head_dim };
    backend == "cuda" && cuda::is_tiled(&shape, cache)
}

/// What a backend promises of one row in two runs, among other rows or other nodes.
///
/// A row's sums are in an order that only the model's sizes and absolute positions decide, so the bits are equal. The
/// exception is attention on tensor cores, which cuts its sums where the pass has its blocks and takes the tree's
/// corner in the order of its nodes: what follows from it agrees up to rounding, and draws up to near-ties.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Agreement {
    Bits,
    Within(Tolerance),
}

impl Agreement {
    pub fn of(backend: &str, sizes: &Sizes) -> Agreement {
        match uses_tensor_cores(backend, sizes) {
            true => Agreement::Within(Tolerance::logits(backend, sizes)),
            false => Agreement::Bits,
        }
    }

    /// What the cache holds of a slot in two runs.
    pub fn slots(&self, what: &str, a: &[f32], b: &[f32], dtype: DType) -> Property {
        match self {
            Agreement::Bits => same_bits(what, a, b),
            Agreement::Within(logits) => {
                Tolerance { relative: logits.relative + unit_in_last_place(dtype) }.compare(what, a, b)
            }
        }
    }

    /// Draws of the same row in two runs, whose `logits` agree.
    pub fn draws(&self, draws: [u32; 2], runs: [(&Outputs, usize); 2]) -> Property {
        if draws[0] == draws[1] {
            return Ok(());
        }
        let [a, b] = runs.map(|(run, row)| run.logits[row].as_slice());
        let context = &runs[0].0.contexts[runs[0].1];
        let tolerance = match self {
            Agreement::Bits => 0.0,
            // Near-ties are counted in what a draw compares: logits after the penalty and the temperature.
            Agreement::Within(tolerance) => {
                let (temperature, penalty) = (context.request.temperature, context.request.repetition_penalty);
                let scale = if temperature > 0.0 { 1.0 / temperature } else { 1.0 } * penalty.max(1.0 / penalty);
                tolerance.absolute(b) * f64::from(scale)
            }
        };
        let divergence = classify(runs[0].1, draws, [a, b], context, tolerance);
        match (self, divergence.verdict) {
            (Agreement::Within(_), Verdict::NearTie) => Ok(()),
            _ => Err(format!("draws {draws:?}: {divergence}")),
        }
    }
}

/// `Err` unless row `a` of one run and row `b` of another, which are one row in other company, agree as the backend
/// promises.
pub fn same_row(what: &str, (run_a, a): (&Outputs, usize), (run_b, b): (&Outputs, usize)) -> Property {
    let Agreement::Within(tolerance) = run_a.agreement else { return equal_row(what, (run_a, a), (run_b, b)) };
    let what = format!("{what}: rows {a} and {b}");
    let (logits_a, logits_b) = (&run_a.logits[a], &run_b.logits[b]);
    tolerance.compare(&format!("{what}: logits"), logits_a, logits_b)?;
    let draws = run_a.agreement.draws([run_a.draws[a], run_b.draws[b]], [(run_a, a), (run_b, b)]);
    draws.map_err(|problem| format!("{what}: {problem}"))?;
    // The ranking of one run holds in the other, up to what the logits differ by.
    let ranked = |ids: &[u32]| ids.iter().map(|&id| logits_a[id as usize]).collect::<Vec<_>>();
    same(&format!("{what}: top values and logits"), &ranked(&run_a.top_ids[a]), &run_a.top_values[a])?;
    tolerance.compare(&format!("{what}: top values"), &run_b.top_values[b], &run_a.top_values[a])?;
    tolerance.compare(&format!("{what}: top ids"), &ranked(&run_b.top_ids[b]), &run_a.top_values[a])
}

/// `Err` unless the two rows are equal, bit for bit.
pub fn equal_row(what: &str, (run_a, a): (&Outputs, usize), (run_b, b): (&Outputs, usize)) -> Property {
    same_bits(&format!("{what}: logits of rows {a} and {b}"), &run_a.logits[a], &run_b.logits[b])?;
    same(&format!("{what}: draws of rows {a} and {b}"), run_a.draws[a], run_b.draws[b])?;
    same(&format!("{what}: top ids of rows {a} and {b}"), &run_a.top_ids[a], &run_b.top_ids[b])?;
    same_bits(&format!("{what}: top values of rows {a} and {b}"), &run_a.top_values[a], &run_b.top_values[b])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arb::HOUSE_MODELS;
    use crate::batch::{Batch, Member, Tree};

    /// The outputs of one greedy row.
    fn outputs(agreement: Agreement, logits: &[f32], draw: u32) -> Outputs {
        let batch = Batch { members: vec![Member::new(&[], Tree::chain(&[0]))] };
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        Outputs {
            contexts: batch.draw_contexts(),
            agreement,
            logits: vec![logits.to_vec()],
            draws: vec![draw],
            top_values: vec![ids.iter().map(|&id| logits[id as usize]).collect()],
            top_ids: vec![ids],
        }
    }

    fn agree(agreement: Agreement, a: (&[f32], u32), b: (&[f32], u32)) -> bool {
        same_row("", (&outputs(agreement, a.0, a.1), 0), (&outputs(agreement, b.0, b.1), 0)).is_ok()
    }

    #[test]
    fn only_tensor_cores_are_not_held_to_bits() {
        let tiled = HOUSE_MODELS.iter().filter(|sizes| Agreement::of("cuda", sizes) != Agreement::Bits).count();
        assert_eq!(tiled, 4);
        assert!(HOUSE_MODELS.iter().all(|sizes| Agreement::of("wgpu", sizes) == Agreement::Bits));
    }

    #[test]
    fn bits_are_bits_and_near_ties_are_no_more_than_that() {
        let within = Agreement::Within(Tolerance { relative: 0.01 });
        let (a, b): (&[f32], &[f32]) = (&[1.0, 2.001, 2.0], &[1.0, 2.0, 2.001]);
        assert!(agree(Agreement::Bits, (a, 1), (a, 1)) && !agree(Agreement::Bits, (a, 1), (b, 2)));
        assert!(agree(within, (a, 1), (b, 2)));
        assert!(!agree(within, (a, 1), (b, 0)), "a draw that is no near-tie");
        assert!(!agree(within, (a, 1), (&[1.0, 2.1, 2.0], 1)), "logits too far apart");
    }
}

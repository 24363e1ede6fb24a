//! Is a difference between two runs excusable? The checker of runs on two backends that ought to give equal tokens.
//!
//! Backends sum in different orders, so their logits differ in the last bits, and a draw between two tokens of nearly
//! equal score may fall either way. That is a *near-tie*, and it is reported, never ignored. A token is *plausible*
//! under a row of logits if moving every logit by less than the tolerance could have made it the draw. A first
//! divergence is a near-tie iff both rows agree within the tolerance and both tokens are plausible under both rows.
//! Anything after the first divergence has another context and is not compared.

use std::fmt;

use treespark::Sampling;
use treespark_kernel_gen::Request;

use crate::oracle::{Scored, scores};

/// How a request draws at one row: everything but the logits.
#[derive(Debug, Clone)]
pub struct DrawContext {
    pub request: Request,
    pub position: u32,
    /// Tokens that occurred: the prefix and the row's path.
    pub seen: Vec<u32>,
}

/// How the token behind this text was drawn by plain decoding.
pub fn draw_context(sampling: &Sampling, text: &[u32]) -> DrawContext {
    let &Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed, sample } = sampling;
    let seed = [seed as u32, (seed >> 32) as u32];
    let (prefix, first_row, n_rows) = (text.len() as u32 - 1, 0, 1);
    let request = Request {
        prefix,
        first_row,
        n_rows,
        sample,
        seed,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        given: 0,
    };
    DrawContext { request, position: prefix, seen: text.to_vec() }
}

/// The first difference of two runs, with what each backend thought of both tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// Index in the token sequences.
    pub at: usize,
    pub tokens: [u32; 2],
    /// `logits[run][token]`: run 0's logits of both tokens, run 1's.
    pub logits: [[f32; 2]; 2],
    /// `scores[run][token]`: scaled logit plus noise.
    pub scores: [[f64; 2]; 2],
    /// Largest difference between the runs' scaled logits.
    pub spread: f64,
    pub verdict: Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    NearTie,
    /// The logits themselves differ by more than rounding.
    LogitsDiffer,
    /// The logits agree, but a token was drawn that they do not allow.
    WrongDraw,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b] = self.tokens;
        writeln!(
            f,
            "{:?} at token {}: {a} against {b}; scaled logits differ by {:.2e}",
            self.verdict, self.at, self.spread
        )?;
        for run in 0..2 {
            let ([la, lb], [sa, sb]) = (self.logits[run], self.scores[run]);
            writeln!(f, "  run {run}: logits {la} and {lb}, scores {sa} and {sb}, margin {:.2e}", sa - sb)?;
        }
        Ok(())
    }
}

/// Compares two token sequences. `rows_at(i)` gives both runs' logits for token i and how it was drawn. A sequence that
/// ends early is cut: lengths are the caller's to compare.
pub fn first_divergence(
    runs: [&[u32]; 2],
    tolerance: f64,
    rows_at: impl FnOnce(usize) -> ([Vec<f32>; 2], DrawContext),
) -> Option<Divergence> {
    let at = runs[0].iter().zip(runs[1]).position(|(a, b)| a != b)?;
    let (rows, context) = rows_at(at);
    Some(classify(at, [runs[0][at], runs[1][at]], [&rows[0], &rows[1]], &context, tolerance))
}

/// Classifies one difference: run i drew `tokens[i]` from `rows[i]`.
pub fn classify(at: usize, tokens: [u32; 2], rows: [&[f32]; 2], context: &DrawContext, tolerance: f64) -> Divergence {
    let scored = rows.map(|row| {
        let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
        scores(&row, &context.request, context.position, |t| context.seen.contains(&t))
    });
    // Infinities of one sign do not differ.
    let difference = |(a, b): (&Scored, &Scored)| if a.scaled == b.scaled { 0.0 } else { (a.scaled - b.scaled).abs() };
    let spread = scored[0].iter().zip(&scored[1]).map(difference).fold(0.0, nan_max);
    let plausible = scored.iter().all(|s| tokens.iter().all(|&t| is_plausible(t, s, &context.request, tolerance)));
    let verdict = match (spread <= tolerance, plausible) {
        (false, _) => Verdict::LogitsDiffer,
        (true, false) => Verdict::WrongDraw,
        (true, true) => Verdict::NearTie,
    };
    let of_tokens = |run: usize| tokens.map(|t| rows[run].get(t as usize).copied().unwrap_or(f32::NAN));
    let scores_of = |run: usize| tokens.map(|t| scored[run].get(t as usize).map_or(f64::NAN, |s| s.score));
    let (logits, scores) = ([of_tokens(0), of_tokens(1)], [scores_of(0), scores_of(1)]);
    Divergence { at, tokens, logits, scores, spread, verdict }
}

/// The larger; a NaN counts as infinitely large.
fn nan_max(a: f64, b: f64) -> f64 {
    if b.is_nan() { f64::INFINITY } else { a.max(b) }
}

/// Could `token` have been drawn, had every scaled logit been moved by less than the tolerance?
pub fn is_plausible(token: u32, scored: &[Scored], request: &Request, tolerance: f64) -> bool {
    let Some(own) = scored.get(token as usize) else { return false };
    if request.temperature == 0.0 {
        return scored.iter().all(|s| own.score >= s.score - tolerance);
    }
    let lenient = Filters::new(scored, request, tolerance);
    let strict = Filters::new(scored, request, -tolerance);
    // It may have to beat only the tokens that no such move can drop.
    let mut rivals = scored.iter().filter(|s| strict.keep(s.scaled));
    lenient.keep(own.scaled) && rivals.all(|s| own.score >= s.score - tolerance)
}

/// Whether some token is kept or dropped by the filters as it happens: moving every scaled logit by less than the tolerance
/// could change it.
pub fn is_at_an_edge(scored: &[Scored], request: &Request, tolerance: f64) -> bool {
    let (lenient, strict) = (Filters::new(scored, request, tolerance), Filters::new(scored, request, -tolerance));
    scored.iter().any(|s| lenient.keep(s.scaled) != strict.keep(s.scaled))
}

/// The filters of a draw as they would be at their most lenient (`shift` > 0) or strictest (`shift` < 0), if every
/// scaled logit may move by `|shift|`: a token is above another if it is above by more than the shift.
struct Filters<'a> {
    request: &'a Request,
    shift: f64,
    /// Scaled logits, descending.
    sorted: Vec<f64>,
    /// The mass of the first i of them, not normalised.
    mass: Vec<f64>,
    /// Mass of what top-k keeps.
    total: f64,
}

impl<'a> Filters<'a> {
    fn new(scored: &[Scored], request: &'a Request, shift: f64) -> Filters<'a> {
        let mut sorted: Vec<f64> = scored.iter().map(|s| s.scaled).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let mut mass = vec![0.0];
        for x in &sorted {
            mass.push(mass[mass.len() - 1] + (x - sorted[0]).exp());
        }
        let mut filters = Filters { request, shift, sorted, mass, total: 0.0 };
        let in_top_k = filters.sorted.partition_point(|&x| filters.in_top_k(x));
        filters.total = filters.mass[in_top_k];
        filters
    }

    /// How many tokens are above one with this logit, itself not counted.
    fn above(&self, x: f64) -> usize {
        let itself = usize::from(self.shift < 0.0);
        self.sorted.partition_point(|&y| y > x + self.shift).saturating_sub(itself)
    }

    fn in_top_k(&self, x: f64) -> bool {
        self.request.top_k == 0 || self.above(x) < self.request.top_k as usize
    }

    fn keep(&self, x: f64) -> bool {
        let (top_p, min_p) = (f64::from(self.request.top_p), f64::from(self.request.min_p));
        let above = self.above(x);
        let mass_above = self.mass[above] / self.total;
        let in_top_p = top_p >= 1.0 || mass_above < top_p + self.shift;
        let in_min_p = x - self.sorted[0] >= min_p.ln() - self.shift;
        above == 0 || (self.in_top_k(x) && in_top_p && in_min_p)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, Member, Tree};

    fn context(sampling: Sampling) -> DrawContext {
        let member = Member { sampling, ..Member::new(&[], Tree::chain(&[0])) };
        let words = Batch { members: vec![member] }.request_words();
        DrawContext { request: Request::read(&words, 0), position: 3, seen: vec![] }
    }

    fn verdict(tokens: [u32; 2], rows: [&[f32]; 2], sampling: Sampling) -> Verdict {
        classify(0, tokens, rows, &context(sampling), 1e-3).verdict
    }

    #[test]
    fn greedy_near_ties_are_told_from_real_differences() {
        let tie: [&[f32]; 2] = [&[1.0, 2.0001, 2.0], &[1.0, 2.0, 2.0001]];
        assert_eq!(verdict([1, 2], tie, Sampling::default()), Verdict::NearTie);
        assert_eq!(verdict([1, 0], tie, Sampling::default()), Verdict::WrongDraw);
        let apart: [&[f32]; 2] = [&[1.0, 2.1, 2.0], &[1.0, 2.0, 2.1]];
        assert_eq!(verdict([1, 2], apart, Sampling::default()), Verdict::LogitsDiffer);
        let clear: [&[f32]; 2] = [&[1.0, 2.1, 2.0], &[1.0, 2.1, 2.0]];
        assert_eq!(verdict([1, 2], clear, Sampling::default()), Verdict::WrongDraw);
        let broken: [&[f32]; 2] = [&[1.0, f32::NAN, 2.0], &[1.0, 2.0, 2.0]];
        assert_eq!(verdict([1, 2], broken, Sampling::default()), Verdict::LogitsDiffer);
    }

    #[test]
    fn tokens_that_are_not_allowed_are_no_difference() {
        let never = f32::NEG_INFINITY;
        let tie: [&[f32]; 2] = [&[never, 2.0001, 2.0], &[never, 2.0, 2.0001]];
        assert_eq!(verdict([1, 2], tie, Sampling::default()), Verdict::NearTie);
        assert_eq!(verdict([1, 0], tie, Sampling::default()), Verdict::WrongDraw);
        let one_sided: [&[f32]; 2] = [&[never, 2.0, 2.0], &[-50.0, 2.0, 2.0]];
        assert_eq!(verdict([1, 2], one_sided, Sampling::default()), Verdict::LogitsDiffer);
    }

    #[test]
    fn a_token_at_a_filter_threshold_is_a_near_tie() {
        let keep_two = Sampling { temperature: 1.0, top_k: 2, ..Sampling::default() };
        let rows: [&[f32]; 2] = [&[3.0, 1.0002, 1.0, -20.0], &[3.0, 1.0, 1.0002, -20.0]];
        let ctx = context(keep_two.clone());
        let scored = scores(&rows[0].iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), &ctx.request, 3, |_| false);
        let keeps =
            |shift: f64| scored.iter().map(|s| Filters::new(&scored, &ctx.request, shift).keep(s.scaled)).collect();
        let (lenient, strict): (Vec<bool>, Vec<bool>) = (keeps(1e-3), keeps(-1e-3));
        assert_eq!(lenient, [true, true, true, false]);
        assert_eq!(strict, [true, false, false, false]);
    }

    /// The mass above a token jumps where two tokens tie, so either side of a tie may be right about top-p.
    #[test]
    fn a_tie_decides_what_top_p_keeps() {
        let narrow = Sampling { temperature: 1.0, top_p: 0.4, ..Sampling::default() };
        let ctx = context(narrow);
        let scored = scores(&[2.0, 2.0 - 1e-9, -9.0], &ctx.request, 3, |_| false);
        assert!(scored[0].kept && !scored[1].kept);
        assert!(Filters::new(&scored, &ctx.request, 1e-6).keep(scored[1].scaled));
        assert!(!Filters::new(&scored, &ctx.request, 1e-12).keep(scored[1].scaled));
    }

    #[test]
    fn the_first_difference_is_reported_with_both_logits() {
        let rows = |_| ([vec![0.5, 1.5], vec![0.5, 1.5]], context(Sampling::default()));
        assert!(first_divergence([&[1, 0, 1], &[1, 0]], 1e-3, rows).is_none());
        let found = first_divergence([&[1, 0, 1], &[1, 1, 0]], 1e-3, rows).expect("they differ");
        assert_eq!((found.at, found.tokens, found.logits[0]), (1, [0, 1], [0.5, 1.5]));
        assert_eq!(found.verdict, Verdict::WrongDraw);
        assert!(found.to_string().contains("0.5 and 1.5"), "{found}");
    }
}

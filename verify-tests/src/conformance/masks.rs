//! Masks of a grammar: alone, and between the head and the draw.

use treespark::backend::Backend;

use super::draws::{draw, excusable};
use super::{Property, for_cases, same, same_bits};
use crate::arb::{Case, cases};
use crate::bed::Bed;
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::tiny_model::{MAX_ROWS, compiled_rows};

/// Bits of each row's tokens: one, a few, half or nearly all of them. What is behind the last token is nobody's, and random.
fn masks(rows: usize, vocab: usize, rng: &mut Rng) -> Vec<u32> {
    let words = vocab.div_ceil(32);
    let mut masks = Vec::new();
    for _ in 0..rows {
        let kind = rng.below(4);
        let mut row: Vec<u32> = (0..words)
            .map(|_| match kind {
                0 => 0,
                1 => (0..4).fold(u32::MAX, |word, _| word & rng.word() as u32),
                2 => rng.word() as u32,
                _ => (0..4).fold(0, |word, _| word | rng.word() as u32),
            })
            .collect();
        let certain = rng.below(vocab);
        row[certain / 32] |= 1 << (certain % 32);
        if !vocab.is_multiple_of(32) {
            row[words - 1] ^= (rng.word() as u32) << (vocab % 32);
        }
        masks.extend(row);
    }
    masks
}

fn is_allowed(masks: &[u32], row: usize, token: usize, vocab: usize) -> bool {
    masks[row * vocab.div_ceil(32) + token / 32] >> (token % 32) & 1 == 1
}

/// What is allowed keeps its logit, bit for bit; all else of an active row is minus infinity; no other row is touched.
pub fn a_mask_leaves_what_it_allows(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 8, cases(), a_mask_leaves_what_it_allows_in_case)
}

pub fn a_mask_leaves_what_it_allows_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut rng = case.rng();
    let (rows, vocab) = (case.batch.rows(), case.model.sizes.vocab);
    let logits: Vec<f32> = (0..MAX_ROWS * vocab)
        .map(|_| match rng.below(40) {
            0 => f32::NAN,
            1 => f32::INFINITY,
            2 => -0.0,
            _ => 3.0 * rng.normal() as f32,
        })
        .collect();
    let masks = masks(MAX_ROWS, vocab, &mut rng);
    let mut bed = Bed::new(backend, case.model.clone());
    let pass = case.model.mask_pass(compiled_rows(rows));
    bed.prepare(&pass);
    bed.write_floats("logits", &logits);
    bed.write("allowed", &masks);
    bed.run(&pass, &case.batch);
    let got = bed.floats("logits", logits.len());
    for (row, (got, before)) in got.chunks(vocab).zip(logits.chunks(vocab)).enumerate() {
        let keeps = |token: usize| row >= rows || is_allowed(&masks, row, token, vocab);
        let want: Vec<f32> = (0..vocab).map(|t| if keeps(t) { before[t] } else { f32::NEG_INFINITY }).collect();
        same_bits(&format!("row {row} of {rows}"), got, &want)?;
    }
    Ok(())
}

/// Head, mask and draw in one pass: only what is allowed is drawn, and it is what the oracle draws from these logits.
pub fn a_masked_head_draws_what_is_allowed(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 8, cases(), a_masked_head_draws_what_is_allowed_in_case)
}

pub fn a_masked_head_draws_what_is_allowed_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut rng = case.rng();
    let (rows, vocab) = (case.batch.rows(), case.model.sizes.vocab);
    let states: Vec<f32> = (0..rows * case.model.sizes.hidden).map(|_| rng.normal() as f32).collect();
    let masks = masks(rows, vocab, &mut rng);
    let mut bed = Bed::new(backend, case.model.clone());
    let pass = case.model.masked_draw_pass(compiled_rows(rows));
    bed.prepare(&pass);
    bed.write_floats("x", &states);
    bed.write("allowed", &masks);
    bed.run(&pass, &case.batch);
    let (logits, draws) = (bed.floats("logits", rows * vocab), bed.words("draws", rows));
    drop(bed);
    for (row, logits) in logits.chunks(vocab).enumerate() {
        let is_finite: Vec<bool> = logits.iter().map(|x| x.is_finite()).collect();
        let allowed: Vec<bool> = (0..vocab).map(|token| is_allowed(&masks, row, token, vocab)).collect();
        same(&format!("finite logits of row {row}"), &is_finite, &allowed)?;
        let is_drawable = allowed.get(draws[row] as usize) == Some(&true);
        same(&format!("row {row} drew {}, which is allowed", draws[row]), is_drawable, true)?;
    }
    let want = draw(&mut Oracle::new(), &case.model, &case.batch, &logits);
    excusable(&case.batch, &logits, &draws, &want)
}

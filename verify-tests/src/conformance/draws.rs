//! Properties of the draw: against the oracle, against the distribution that it must have, and at its edges.

use treespark::Sampling;
use treespark::backend::Backend;
use treespark_kernel_gen::Request;
use treespark_kernel_gen::layout::NO_TOKEN;

use super::agreement::Tolerance;
use super::{Property, for_cases, same};
use crate::arb::{Case, HOUSE_MODELS, cases};
use crate::batch::{Batch, Member, Tree};
use crate::bed::Bed;
use crate::cases::is_software;
use crate::goodness::fit;
use crate::near_tie::{Verdict, classify};
use crate::oracle::{Oracle, law, scores};
use crate::rng::Rng;
use crate::tiny_model::{Sizes, TinyModel, compiled_rows};

/// On equal logits only the rounding of f32 scores, of exponentials and of their sums can tell two draws apart: a few
/// units in the last place of numbers up to 32.
const TOLERANCE: f64 = 2e-5;
/// A right law fits worse once in a billion times.
const LEAST_P: f64 = 1e-9;

/// `Err` unless all draws are equal or near-ties on the same logits.
pub(super) fn excusable(batch: &Batch, logits: &[f32], got: &[u32], want: &[u32]) -> Result<(), String> {
    let vocab = logits.len() / batch.rows();
    for (row, context) in batch.draw_contexts().iter().enumerate() {
        let logits = &logits[row * vocab..(row + 1) * vocab];
        if got[row] == want[row] {
            continue;
        }
        let divergence = classify(row, [got[row], want[row]], [logits, logits], context, TOLERANCE);
        if divergence.verdict != Verdict::NearTie {
            return Err(format!("the draw of row {row}: {divergence}{context:?}"));
        }
    }
    Ok(())
}

/// Runs the draw pass alone on these logits.
pub(super) fn draw(backend: &mut dyn Backend, model: &TinyModel, batch: &Batch, logits: &[f32]) -> Vec<u32> {
    let mut bed = Bed::new(backend, model.clone());
    let pass = model.draw_pass(batch.rows());
    bed.prepare(&pass);
    bed.write_floats("logits", logits);
    bed.run(&pass, batch);
    bed.words("draws", batch.rows())
}

/// Any logits, any parameters: the oracle's draws, but for near-ties on the same logits.
pub fn draws_equal_the_oracle(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 32, cases(), draws_equal_the_oracle_in_case)
}

pub fn draws_equal_the_oracle_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut rng = case.rng();
    // Coarse logits tie often; fine ones never.
    let coarse = rng.below(2) == 0;
    let logit = |rng: &mut Rng| 3.0 * rng.normal() as f32;
    let vocab = case.model.sizes.vocab;
    let mut logits: Vec<f32> = (0..case.batch.rows() * vocab)
        .map(|_| if coarse { logit(&mut rng).round() } else { logit(&mut rng) })
        .collect();
    // Of some rows only a few tokens are left, as under a grammar.
    for row in logits.chunks_mut(vocab) {
        if rng.below(3) == 0 {
            let left: Vec<usize> = (0..rng.below(7)).map(|_| rng.below(vocab)).collect();
            (0..vocab).filter(|token| !left.contains(token)).for_each(|token| row[token] = f32::NEG_INFINITY);
        }
    }
    let mut oracle = Oracle::new();
    let want = draw(&mut oracle, &case.model, &case.batch, &logits);
    let got = draw(backend, &case.model, &case.batch, &logits);
    excusable(&case.batch, &logits, &got, &want)
}

/// The same of a vocabulary of which no kernel keeps all tokens at hand, with few tokens left, with many, and with all.
pub fn a_large_vocabulary_draws_as_the_oracle_does(backend: &mut dyn Backend) -> Property {
    const VOCAB: usize = 9001;
    let base = Sampling { temperature: 0.9, seed: 5, ..Sampling::default() };
    let samplings = [
        Sampling { top_k: 12, ..base.clone() },
        Sampling { top_p: 0.95, repetition_penalty: 1.2, ..base.clone() },
        Sampling { top_k: 700, top_p: 0.9, min_p: 0.01, ..base },
    ];
    let model = TinyModel { sizes: Sizes { vocab: VOCAB, ..HOUSE_MODELS[0] }, seed: 4 };
    let member = |sampling| Member { sampling, ..Member::new(&[1, 2], Tree::chain(&[3; 5])) };
    let batch = Batch { members: samplings.into_iter().map(member).collect() };
    let mut rng = Rng::new(6);
    let mut logits = Vec::new();
    for row in 0..batch.rows() {
        let one_in = [1, 2, 40, 1000, VOCAB][row % 5];
        logits.extend((0..VOCAB).map(|_| if rng.below(one_in) == 0 { rng.normal() as f32 } else { f32::NEG_INFINITY }));
        logits[row * VOCAB + 17 * row] = 0.5;
    }
    let want = draw(&mut Oracle::new(), &model, &batch, &logits);
    let got = draw(backend, &model, &batch, &logits);
    excusable(&batch, &logits, &got, &want)
}

/// Perturbed logits are what the oracle's draws rank.
pub fn perturbed_logits_equal_the_oracle(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 8, cases(), perturbed_logits_equal_the_oracle_in_case)
}

pub fn perturbed_logits_equal_the_oracle_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut rng = case.rng();
    let (rows, vocab) = (case.batch.rows(), case.model.sizes.vocab);
    let logits: Vec<f32> = (0..rows * vocab).map(|_| 3.0 * rng.normal() as f32).collect();
    let mut oracle = Oracle::new();
    let [got, want] = [backend, &mut oracle as &mut dyn Backend].map(|backend| {
        let mut bed = Bed::new(backend, case.model.clone());
        let pass = case.model.perturb_pass(rows);
        bed.prepare(&pass);
        bed.write_floats("logits", &logits);
        bed.run(&pass, &case.batch);
        bed.floats("logits", rows * vocab)
    });
    got.chunks(vocab)
        .zip(want.chunks(vocab))
        .enumerate()
        .try_for_each(|(row, (got, want))| Tolerance::OP.compare(&format!("row {row}"), got, want))
}

/// Head, perturbation and top-k in one pass: logits are the oracle's, and the ranking is exactly that of those logits, where
/// they all tie and where they are no numbers, too.
pub fn a_head_ranks_what_it_leaves(backend: &mut dyn Backend) -> Property {
    const ZEROS: usize = 1;
    const NANS: usize = 2;
    for (seed, (vocab, k, perturb)) in
        [(97, 5, false), (1000, 8, true), (2500, 64, true), (3001, 40, false), (64, 64, true)].into_iter().enumerate()
    {
        let model = TinyModel { sizes: Sizes { vocab, ..HOUSE_MODELS[seed] }, seed: seed as u64 };
        let hot = Sampling { temperature: 0.8, seed: 3, ..Sampling::default() };
        let member = |sampling| Member { sampling, ..Member::new(&[1, 2], Tree::chain(&[0; 4])) };
        let batch = Batch { members: vec![member(hot), member(Sampling::default())] };
        let (pass, rows, hidden) =
            (model.rank_pass(compiled_rows(batch.rows()), k, perturb), batch.rows(), model.sizes.hidden);
        let mut rng = Rng::new(seed as u64);
        let mut states: Vec<f32> = (0..rows * hidden).map(|_| rng.normal() as f32).collect();
        for request in 0..2 {
            let row = |i: usize| (4 * request + i) * hidden..(4 * request + i + 1) * hidden;
            states[row(ZEROS)].fill(0.0);
            states[row(NANS)].fill(f32::NAN);
        }
        let mut oracle = Oracle::new();
        let [got, want] = [&mut *backend, &mut oracle as &mut dyn Backend].map(|backend| {
            let mut bed = Bed::new(backend, model.clone());
            bed.prepare(&pass);
            bed.write_floats("x", &states);
            bed.run(&pass, &batch);
            (bed.floats("logits", rows * vocab), bed.words("ids", rows * k), bed.floats("values", rows * k))
        });
        for row in 0..rows {
            let [got_logits, want_logits] = [&got.0, &want.0].map(|logits| &logits[row * vocab..(row + 1) * vocab]);
            let what = format!("vocabulary of {vocab}, {k} of row {row}");
            if row % 4 != NANS {
                Tolerance::OP.compare(&what, got_logits, want_logits)?;
            }
            let mut ranked: Vec<usize> = (0..vocab).collect();
            let key = |i: usize| if got_logits[i].is_nan() { f32::NEG_INFINITY } else { got_logits[i] };
            ranked.sort_by(|&a, &b| key(b).partial_cmp(&key(a)).expect("no NaN").then(a.cmp(&b)));
            let ids: Vec<u32> = ranked[..k].iter().map(|&id| id as u32).collect();
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
            let values: Vec<f32> = ranked[..k].iter().map(|&id| got_logits[id]).collect();
            same(&what, &got.1[row * k..(row + 1) * k], &ids)?;
            same(&what, &bits(&got.2[row * k..(row + 1) * k]), &bits(&values))?;
        }
    }
    Ok(())
}

/// Four thousand draws of one row of logits, over positions and sample indices, fit the distribution (chi-square),
/// and neighbouring positions draw independently.
pub fn draws_follow_their_distribution(backend: &mut dyn Backend) -> Property {
    let base = Sampling { temperature: 1.0, seed: 0x0123_4567_89AB_CDEF, ..Sampling::default() };
    // How many tokens are left, every so many of them; the others are not allowed.
    for (index, (sampling, one_in)) in [
        (base.clone(), 1),
        (Sampling { temperature: 0.7, top_k: 12, ..base.clone() }, 1),
        (Sampling { temperature: 1.5, top_p: 0.8, ..base.clone() }, 1),
        (Sampling { temperature: 1.0, min_p: 0.1, ..base.clone() }, 1),
        (base.clone(), 7),
        (Sampling { temperature: 1.5, top_k: 5, top_p: 0.95, min_p: 0.02, ..base.clone() }, 7),
    ]
    .into_iter()
    .enumerate()
    {
        let model = TinyModel { sizes: Sizes { vocab: 40, ..HOUSE_MODELS[2] }, seed: 1 };
        let mut rng = Rng::new(index as u64);
        let mut logits: Vec<f32> = (0..40).map(|_| 1.5 * rng.normal() as f32).collect();
        (0..40).filter(|token| token % one_in > 0).for_each(|token| logits[token] = f32::NEG_INFINITY);
        let (runs, rows) = (if is_software(backend.info()) { 4 } else { 16 }, 256);
        let mut draws = Vec::new();
        for sample in 0..runs {
            let sampling = Sampling { sample, ..sampling.clone() };
            let batch = Batch { members: vec![Member { sampling, ..Member::new(&[], Tree::chain(&[0; 256])) }] };
            draws.extend(draw(backend, &model, &batch, &logits.repeat(rows)));
        }
        let probabilities = probabilities(&logits, &sampling);
        fits(&draws, &probabilities).map_err(|problem| format!("{problem}, {sampling:?}"))?;
        let equal = draws.windows(2).filter(|w| w[0] == w[1]).count() as f64;
        let expected: f64 = probabilities.iter().map(|p| p * p).sum::<f64>() * (draws.len() - 1) as f64;
        if (equal - expected).abs() > 9.0 * expected.sqrt() {
            return Err(format!("neighbours are equal {equal} times, not {expected}, {sampling:?}"));
        }
    }
    Ok(())
}

/// The probabilities of a row's tokens after the filters.
fn probabilities(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
    let member = Member { sampling: sampling.clone(), ..Member::new(&[], Tree::chain(&[0])) };
    let request = Request::read(&Batch { members: vec![member] }.request_words(), 0);
    let logits: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    law(&scores(&logits, &request, 0, |_| false))
}

fn fits(draws: &[u32], probabilities: &[f64]) -> Property {
    let mut counts = vec![0; probabilities.len()];
    draws.iter().for_each(|&token| counts[token as usize] += 1);
    match fit(&counts, probabilities) {
        Some(fit) if fit.p < LEAST_P => Err(format!("{fit:?}, counts {counts:?}")),
        _ => Ok(()),
    }
}

/// Greedy draws and the ranking resolve equal logits to the lowest id, wherever in the vocabulary they are.
pub fn ties_go_to_the_lowest_id(backend: &mut dyn Backend) -> Property {
    let model = TinyModel { sizes: HOUSE_MODELS[0], seed: 2 };
    let vocab = model.sizes.vocab;
    let places = [(0, 1), (0, vocab - 1), (5, 69), (31, 32), (63, 64), (40, 41), (64, 96)];
    let mut logits = Vec::new();
    for (a, b) in places {
        let mut row = vec![-1.0; vocab];
        (row[a], row[b]) = (2.0, 2.0);
        logits.extend(row);
    }
    // All equal, zeros of both signs, all minus infinity but one.
    logits.extend(vec![0.5; vocab]);
    logits.extend((0..vocab).map(|t| if t % 2 == 0 { -0.0 } else { 0.0 }));
    logits.extend((0..vocab).map(|t| if t == 77 { -3.0 } else { f32::NEG_INFINITY }));
    let batch = Batch { members: vec![Member::new(&[], Tree::chain(&[0; 10]))] };
    let mut bed = Bed::new(backend, model.clone());
    let pass = model.draw_pass(batch.rows());
    bed.prepare(&pass);
    bed.write_floats("logits", &logits);
    bed.run(&pass, &batch);
    let outputs = bed.outputs(&batch);
    let expected: Vec<u32> = places.iter().map(|&(a, _)| a as u32).chain([0, 0, 77]).collect();
    same("draws", &outputs.draws, &expected)?;
    for (row, (a, b)) in places.into_iter().enumerate() {
        same("top ids", &outputs.top_ids[row][..2], &[a as u32, b as u32])?;
        same("top values", &outputs.top_values[row][..3], &[2.0, 2.0, -1.0])?;
    }
    same("top ids of equal logits", &outputs.top_ids[7][..], &[0, 1, 2, 3, 4])
}

/// One NaN anywhere in a row, and that row alone draws [`NO_TOKEN`]: greedy or not, whatever the filters.
pub fn a_nan_draws_no_token(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 12, cases(), a_nan_draws_no_token_in_case)
}

pub fn a_nan_draws_no_token_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut rng = case.rng();
    let vocab = case.model.sizes.vocab;
    let mut logits: Vec<f32> = (0..case.batch.rows() * vocab).map(|_| rng.normal() as f32).collect();
    let at = rng.below(logits.len());
    logits[at] = if rng.below(2) == 0 { -f32::NAN } else { f32::NAN };
    let draws = draw(backend, &case.model, &case.batch, &logits);
    (0..draws.len())
        .try_for_each(|row| same(&format!("row {row} draws nothing"), draws[row] == NO_TOKEN, row == at / vocab))
}

/// Tokens tied at a threshold are all kept: half of the vocabulary ties at the top, each filter has room for less than
/// half, and still each of these tokens, and no other, is drawn sooner or later.
pub fn filters_keep_ties_at_their_threshold(backend: &mut dyn Backend) -> Property {
    let model = TinyModel { sizes: HOUSE_MODELS[2], seed: 3 };
    let vocab = model.sizes.vocab;
    let base = Sampling { temperature: 1.0, seed: 9, ..Sampling::default() };
    for sampling in [
        Sampling { top_k: 1, ..base.clone() },
        Sampling { top_p: 0.01, ..base.clone() },
        Sampling { min_p: 1.0, ..base.clone() },
        Sampling { top_k: 2, top_p: 0.5, min_p: 0.9, ..base },
    ] {
        // The first half ties at the top, the second half is far enough below to be dropped by each filter.
        let row: Vec<f32> = (0..vocab).map(|t| if t < vocab / 2 { 1.25 } else { -1.0 }).collect();
        let members = vec![Member { sampling: sampling.clone(), ..Member::new(&[], Tree::chain(&[0; 256])) }];
        let draws = draw(backend, &model, &Batch { members }, &row.repeat(256));
        let mut drawn = draws;
        drawn.sort_unstable();
        drawn.dedup();
        same(&format!("tokens drawn with {sampling:?}"), drawn, (0..vocab as u32 / 2).collect())?;
    }
    Ok(())
}

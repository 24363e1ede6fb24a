//! The target's own token at a row, and the k best tokens of a row: what [`Op::Draw`] and [`Op::TopK`] mean, on a CPU.
//!
//! All filters keep a token by its logit alone, so together they are one number, the *floor*: a token is kept if its
//! penalised logit is at least the floor. The token drawn is then
//!
//! ```text
//! argmax over kept tokens of  logit * (1 / temperature) + gumbel(noise of the token)       ties: the lowest id
//! ```
//!
//! and no pass over the vocabulary is needed but the first: it leaves the maximum of every chunk of 64 logits, and a
//! chunk is looked at again only if its maximum could matter. That pruning is exact: rounded addition is monotone,
//! [`gumbel`] never falls as its word grows, and it never exceeds [`MAX_GUMBEL`]. Weights are f32, masses are summed in f64 in an order that the row alone decides.
//!
//! [`Op::Draw`]: treespark_kernel_gen::Op::Draw
//! [`Op::TopK`]: treespark_kernel_gen::Op::TopK

use treespark_kernel_gen::Request;
use treespark_kernel_gen::layout::NO_TOKEN;

use crate::philox::{MAX_GUMBEL, NoiseKey, gumbel, ln};

/// Tokens whose noise is made together, and whose maximum is kept.
const CHUNK: usize = 64;

/// Working memory, to be kept between rows. Its contents mean nothing between calls.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The row's logits, after the penalty.
    penalised: Vec<f32>,
    /// The largest logit of every chunk.
    maxima: Vec<f32>,
    /// Chunk maxima, then logits, among which the k-th largest is looked for.
    values: Vec<f32>,
    /// Logits and ids of candidates.
    ranked: Vec<(f32, u32)>,
}

/// The draw of one row. `seen` and `path` name the tokens to penalise: bit t of `seen` for token t, and the tokens of
/// the row and its ancestors. Gives [`NO_TOKEN`] if a logit is NaN.
pub fn draw(
    logits: &[f32],
    request: &Request,
    position: u32,
    seen: &[u32],
    path: impl IntoIterator<Item = u32>,
    scratch: &mut Scratch,
) -> u32 {
    let mut penalised = std::mem::take(&mut scratch.penalised);
    let row = if request.repetition_penalty == 1.0 {
        logits
    } else {
        penalise(logits, request.repetition_penalty, seen, path, &mut penalised);
        &penalised
    };
    let token = draw_penalised(row, request, position, scratch);
    scratch.penalised = penalised;
    token
}

fn draw_penalised(row: &[f32], request: &Request, position: u32, scratch: &mut Scratch) -> u32 {
    if chunk_maxima(row, &mut scratch.maxima) {
        return NO_TOKEN;
    }
    let max = scratch.maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let chunk = scratch.maxima.iter().position(|&m| m == max).expect("a vocabulary is not empty");
    let argmax = (chunk * CHUNK..row.len()).find(|&token| row[token] == max).expect("the chunk holds its maximum");
    // Temperature 0, or a logit that is infinite, outweighs any noise.
    let inverse_temperature = 1.0 / request.temperature;
    if !(max * inverse_temperature).is_finite() {
        return argmax as u32;
    }
    let floor = floor(row, max, request, scratch);
    let key = NoiseKey { seed: request.seed, sample: request.sample, position };
    loudest(row, &scratch.maxima, floor, inverse_temperature, &key, argmax)
}

/// Copies the logits; those of tokens in `seen` or `path` are divided by the penalty if positive, else multiplied.
fn penalise(logits: &[f32], penalty: f32, seen: &[u32], path: impl IntoIterator<Item = u32>, out: &mut Vec<f32>) {
    out.clear();
    out.extend_from_slice(logits);
    // Computed from the caller's logit, so that a token named twice is penalised once.
    let mut lower = |token: usize| {
        out[token] = if logits[token] > 0.0 { logits[token] / penalty } else { logits[token] * penalty };
    };
    for (word_index, &word) in seen.iter().enumerate() {
        let mut bits = word;
        while bits != 0 {
            lower(32 * word_index + bits.trailing_zeros() as usize);
            bits &= bits - 1;
        }
    }
    path.into_iter().for_each(|token| lower(token as usize));
}

/// The largest logit of every chunk, NaN passed over. True if there was a NaN.
fn chunk_maxima(row: &[f32], maxima: &mut Vec<f32>) -> bool {
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut nan = false;
    maxima.clear();
    maxima.extend(row.chunks(CHUNK).map(|chunk| {
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut nans = [0u32; LANES];
        let mut vectors = chunk.chunks_exact(LANES);
        for vector in &mut vectors {
            for lane in 0..LANES {
                max[lane] = larger(max[lane], vector[lane]);
                nans[lane] |= u32::from(vector[lane].is_nan());
            }
        }
        for (lane, &x) in vectors.remainder().iter().enumerate() {
            max[lane] = larger(max[lane], x);
            nans[lane] |= u32::from(x.is_nan());
        }
        nan |= nans.iter().any(|&n| n != 0);
        max.into_iter().fold(f32::NEG_INFINITY, larger)
    }));
    nan
}

/// The smallest logit that the request's filters keep. Never above `max`: the most likely token is always kept.
fn floor(row: &[f32], max: f32, request: &Request, scratch: &mut Scratch) -> f32 {
    let mut floor = f32::NEG_INFINITY;
    let k = request.top_k as usize;
    if k > 0 && k < row.len() {
        floor = kth_largest(row, k, scratch);
    }
    if request.top_p < 1.0 {
        floor = top_p_floor(row, floor, max, request, scratch);
    }
    if request.min_p > 0.0 {
        floor = floor.max(max + request.temperature * ln(request.min_p));
    }
    floor.min(max)
}

/// The k-th largest logit, ties counted one by one. NaN counts as absent.
fn kth_largest(row: &[f32], k: usize, scratch: &mut Scratch) -> f32 {
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let Scratch { maxima, values, .. } = scratch;
    // k chunks have a maximum of at least `bound`, so the k largest logits are among those of at least `bound`.
    let mut bound = f32::NEG_INFINITY;
    if k <= maxima.len() {
        values.clear();
        values.extend_from_slice(maxima);
        bound = *values.select_nth_unstable_by(k - 1, descending).1;
    }
    values.clear();
    values.extend(at_least(row, maxima, bound).map(|(x, _)| x));
    if k <= values.len() { *values.select_nth_unstable_by(k - 1, descending).1 } else { f32::NEG_INFINITY }
}

/// Logits of at least `bound`, with their ids, ascending by id.
fn at_least<'a>(row: &'a [f32], maxima: &'a [f32], bound: f32) -> impl Iterator<Item = (f32, u32)> + 'a {
    let chunks = row.chunks(CHUNK).zip(maxima).enumerate().filter(move |(_, (_, max))| **max >= bound);
    chunks.flat_map(move |(index, (chunk, _))| {
        let tokens = chunk.iter().enumerate().filter(move |(_, x)| **x >= bound);
        tokens.map(move |(i, &x)| (x, (index * CHUNK + i) as u32))
    })
}

/// The smallest logit among those of at least `floor` whose larger ones have less than `top_p` of the mass.
fn top_p_floor(row: &[f32], floor: f32, max: f32, request: &Request, scratch: &mut Scratch) -> f32 {
    let inverse = 1.0 / request.temperature;
    let weight = |x: f32| f64::from(((x - max) * inverse).exp());
    let total: f64 = at_least(row, &scratch.maxima, floor).map(|(x, _)| weight(x)).sum();
    let target = f64::from(request.top_p) * total;

    // Sort no more than needed: widen the band below the maximum until it holds the target.
    let Scratch { maxima, values, .. } = scratch;
    let mut width = 4.0;
    loop {
        let bound = (max - width * request.temperature).max(floor);
        values.clear();
        values.extend(at_least(row, maxima, bound).map(|(x, _)| x));
        if bound == floor || values.iter().map(|&x| weight(x)).sum::<f64>() >= target {
            break;
        }
        width *= 2.0;
    }
    values.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut larger = 0.0;
    let mut kept = max;
    for equal in values.chunk_by(|a, b| a == b) {
        if larger >= target {
            break;
        }
        kept = equal[0];
        larger += equal.len() as f64 * weight(kept);
    }
    kept
}

/// The argmax of `logit * inverse_temperature + gumbel` over logits of at least `floor`, starting from a likely winner.
fn loudest(row: &[f32], maxima: &[f32], floor: f32, inverse_temperature: f32, key: &NoiseKey, likely: usize) -> u32 {
    let mut best = row[likely] * inverse_temperature + gumbel(key.word(likely as u32));
    let mut token = likely as u32;
    for (index, (chunk, &max)) in row.chunks(CHUNK).zip(maxima).enumerate() {
        let score_at_most = |gumbel: f32| max * inverse_temperature + gumbel;
        if max < floor || score_at_most(MAX_GUMBEL) < best {
            continue;
        }
        let words = key.chunk(index);
        let loudest_word = words.into_iter().fold(0, u32::max);
        if score_at_most(gumbel(loudest_word)) < best {
            continue;
        }
        let noise = words.map(gumbel);
        for (i, (&x, g)) in chunk.iter().zip(noise).enumerate() {
            let (score, id) = (x * inverse_temperature + g, (index * CHUNK + i) as u32);
            if x >= floor && (score > best || (score == best && id < token)) {
                (best, token) = (score, id);
            }
        }
    }
    token
}

/// Minus infinity for every token t but where bit t of `allowed` is set.
pub fn mask(logits: &mut [f32], allowed: &[u32]) {
    for (tokens, word) in logits.chunks_mut(32).zip(allowed) {
        for (i, logit) in tokens.iter_mut().enumerate() {
            if word >> i & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// What [`draw`] ranks: `logit * (1 / temperature) + gumbel`. At temperature 0 the logits stay as they are.
pub fn perturb(logits: &mut [f32], request: &Request, position: u32) {
    let inverse_temperature = 1.0 / request.temperature;
    if !inverse_temperature.is_finite() {
        return;
    }
    let key = NoiseKey { seed: request.seed, sample: request.sample, position };
    for (index, chunk) in logits.chunks_mut(CHUNK).enumerate() {
        for (logit, word) in chunk.iter_mut().zip(key.chunk(index)) {
            *logit = *logit * inverse_temperature + gumbel(word);
        }
    }
}

/// The `ids.len()` largest logits, descending, ties to the lowest id. NaN ranks below everything.
pub fn top_k(logits: &[f32], ids: &mut [u32], values: &mut [f32], scratch: &mut Scratch) {
    let k = ids.len();
    assert!((1..=logits.len()).contains(&k), "top {k} of {} logits", logits.len());
    chunk_maxima(logits, &mut scratch.maxima);
    let bound = kth_largest(logits, k, scratch);
    let Scratch { maxima, ranked, .. } = scratch;
    ranked.clear();
    ranked.extend(at_least(logits, maxima, bound));
    if ranked.len() < k {
        ranked.extend((0..).zip(logits).filter(|(_, x)| x.is_nan()).map(|(id, &x)| (x, id)));
    }
    // `at_least` ascends by id and the sort is stable.
    ranked.sort_by(|(a, _), (b, _)| b.partial_cmp(a).unwrap_or(a.is_nan().cmp(&b.is_nan())));
    for (i, &(x, id)) in ranked[..k].iter().enumerate() {
        (ids[i], values[i]) = (id, x);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GREEDY: Request = Request {
        prefix: 0,
        first_row: 0,
        n_rows: 1,
        sample: 0,
        seed: [11, 22],
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        given: 0,
    };
    const SAMPLED: Request = Request { temperature: 1.0, ..GREEDY };

    fn draw_one(logits: &[f32], request: &Request, position: u32) -> u32 {
        draw(logits, request, position, &[], [], &mut Scratch::default())
    }

    /// The rule as it is documented at `Op::Draw`, without any shortcut.
    fn brute_force(logits: &[f32], request: &Request, position: u32, penalised: &[u32]) -> u32 {
        if logits.iter().any(|x| x.is_nan()) {
            return NO_TOKEN;
        }
        let penalty = request.repetition_penalty;
        let row: Vec<f32> = (0..)
            .zip(logits)
            .map(|(token, &x)| match penalised.contains(&token) {
                true if x > 0.0 => x / penalty,
                true => x * penalty,
                false => x,
            })
            .collect();
        let first_max = |scores: &[f32]| {
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            scores.iter().position(|&x| x == max).unwrap() as u32
        };
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if request.temperature == 0.0 || max.is_infinite() {
            return first_max(&row);
        }
        let larger = |x: f32| row.iter().filter(move |&&y| y > x);
        let in_top_k = |x: f32| request.top_k == 0 || larger(x).count() < request.top_k as usize;
        let mass = |tokens: &mut dyn Iterator<Item = &f32>| -> f64 {
            tokens.filter(|&&x| in_top_k(x)).map(|&x| f64::from((x - max) / request.temperature).exp()).sum()
        };
        let total = mass(&mut row.iter());
        let key = NoiseKey { seed: request.seed, sample: request.sample, position };
        let scores: Vec<f32> = (0..)
            .zip(&row)
            .map(|(token, &x)| {
                let in_top_p = request.top_p >= 1.0 || mass(&mut larger(x)) < f64::from(request.top_p) * total;
                let in_min_p = (f64::from(x - max) / f64::from(request.temperature)).exp() >= f64::from(request.min_p);
                let kept = x == max || (in_top_k(x) && in_top_p && in_min_p);
                if kept { x * (1.0 / request.temperature) + gumbel(key.word(token)) } else { f32::NEG_INFINITY }
            })
            .collect();
        first_max(&scores)
    }

    /// Coarse logits, so that ties abound.
    fn logits() -> impl Strategy<Value = Vec<f32>> {
        let logit = prop_oneof![
            60 => (-24i32..24).prop_map(|x| x as f32 * 0.37),
            2 => Just(f32::NEG_INFINITY),
            2 => Just(0.0),
            2 => Just(-0.0),
        ];
        // Now and then a grammar allows but a few.
        let allowed = prop_oneof![3 => Just(1u32), 1 => Just(20), 1 => Just(150)];
        (proptest::collection::vec((logit, any::<u32>()), 1..400), allowed).prop_map(|(logits, one_in)| {
            let masked = |(x, word): (f32, u32)| if word % one_in == 0 { x } else { f32::NEG_INFINITY };
            logits.into_iter().map(masked).collect()
        })
    }

    fn request() -> impl Strategy<Value = Request> {
        let temperature = prop_oneof![Just(0.0), Just(0.2f32), Just(0.7), Just(1.0), Just(1.5), Just(8.0)];
        let top_k = prop_oneof![Just(0u32), 1u32..12, 300u32..500];
        let top_p = prop_oneof![Just(1.0f32), Just(0.0), Just(1e-6), Just(0.5), Just(0.9), Just(0.99)];
        let min_p = prop_oneof![Just(0.0f32), Just(0.05), Just(0.37), Just(1.0)];
        let penalty = prop_oneof![Just(1.0f32), Just(1.3), Just(0.8)];
        (temperature, top_k, top_p, min_p, penalty, any::<[u32; 2]>(), any::<u32>()).prop_map(
            |(temperature, top_k, top_p, min_p, repetition_penalty, seed, sample)| Request {
                sample,
                seed,
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                ..GREEDY
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn agrees_with_brute_force(
            logits in logits(), request in request(), position in 0u32..5000, mask in any::<u64>(), nan in 0..50u32,
        ) {
            let mut logits = logits;
            if nan == 0 {
                let at = position as usize % logits.len();
                logits[at] = f32::NAN;
            }
            // Some tokens are penalised as seen, some as on the path, some as both.
            let penalised: Vec<u32> = (0..logits.len().min(64) as u32).filter(|t| mask >> t & 1 == 1).collect();
            let mut seen = vec![0u32; logits.len().div_ceil(32)];
            penalised.iter().filter(|&t| t % 3 != 0).for_each(|t| seen[*t as usize / 32] |= 1 << (t % 32));
            let path = penalised.iter().copied().filter(|t| t % 3 != 1);
            let drawn = draw(&logits, &request, position, &seen, path, &mut Scratch::default());
            prop_assert_eq!(drawn, brute_force(&logits, &request, position, &penalised));
        }

        #[test]
        fn top_k_is_a_stable_sort(logits in logits(), k in 1usize..80, nan in any::<prop::sample::Index>()) {
            let mut logits = logits;
            if k % 4 == 0 {
                let at = nan.index(logits.len());
                logits[at] = f32::NAN;
            }
            let k = k.min(logits.len());
            let rank = |x: f32| if x.is_nan() { (1, 0.0) } else { (0, -x) };
            let mut expected: Vec<u32> = (0..logits.len() as u32).collect();
            expected.sort_by(|&a, &b| rank(logits[a as usize]).partial_cmp(&rank(logits[b as usize])).unwrap());
            let (mut ids, mut values) = (vec![0; k], vec![0.0; k]);
            top_k(&logits, &mut ids, &mut values, &mut Scratch::default());
            prop_assert_eq!(&ids[..], &expected[..k]);
            (0..k).for_each(|i| assert_eq!(values[i].to_bits(), logits[ids[i] as usize].to_bits()));
        }
    }

    #[test]
    fn greedy_takes_the_first_of_equal_maxima_and_reports_nan() {
        let mut logits = vec![0.0; 1000];
        logits[777] = 3.0;
        logits[333] = 3.0;
        assert_eq!(draw_one(&logits, &GREEDY, 0), 333);
        logits[999] = f32::NAN;
        assert_eq!(draw_one(&logits, &GREEDY, 0), NO_TOKEN);
        assert_eq!(draw_one(&logits, &SAMPLED, 0), NO_TOKEN);
        assert_eq!(draw_one(&[f32::NEG_INFINITY; 9], &SAMPLED, 0), 0);
        assert_eq!(draw_one(&[0.0, f32::INFINITY, 0.0, f32::INFINITY], &SAMPLED, 0), 1);
        assert_eq!(draw_one(&[1.0, 3.0, 2.0], &Request { temperature: 1e-45, ..GREEDY }, 0), 1);
    }

    /// Whatever the filters, and however cold or hot it is, what is masked is not drawn.
    #[test]
    fn a_mask_leaves_what_it_allows() {
        let mut logits: Vec<f32> = (0..1000).map(|t| (t % 37) as f32 * 0.3).collect();
        let allowed = [3, 64, 517, 999];
        let mut words = [0u32; 32];
        allowed.iter().for_each(|&t| words[t / 32] |= 1 << (t % 32));
        let whole = logits.clone();
        mask(&mut logits, &words);
        for (t, (&x, &before)) in logits.iter().zip(&whole).enumerate() {
            assert_eq!(x, if allowed.contains(&t) { before } else { f32::NEG_INFINITY });
        }
        for temperature in [0.0, 1e-6, 0.7, 1e6] {
            for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (2, 1.0, 0.0), (50, 0.99, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.3)] {
                let request = Request { temperature, top_k, top_p, min_p, ..GREEDY };
                for position in 0..50 {
                    let token = draw_one(&logits, &request, position);
                    assert!(allowed.contains(&(token as usize)), "{token}: {request:?}");
                    assert_eq!(token, brute_force(&logits, &request, position, &[]), "{request:?}");
                }
            }
        }
    }

    /// 200 000 draws over five tokens follow the softmax: every count within five standard deviations.
    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.3, -1.2, 2.0, 1.1, -0.4];
        let mass: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let (n, mut counts) = (200_000, [0u32; 5]);
        let mut scratch = Scratch::default();
        for position in 0..n {
            counts[draw(&logits, &SAMPLED, position, &[], [], &mut scratch) as usize] += 1;
        }
        for (token, &x) in logits.iter().enumerate() {
            let p = f64::from(x).exp() / mass;
            let deviations = (f64::from(counts[token]) - p * f64::from(n)) / (p * (1.0 - p) * f64::from(n)).sqrt();
            assert!(deviations.abs() < 5.0, "token {token}: {deviations} standard deviations from {p}: {counts:?}");
        }
    }

    /// Same key, same draw; and at a large vocabulary the pruned search finds what the full one does.
    #[test]
    fn large_vocabulary() {
        let mut scratch = Scratch::default();
        let logits: Vec<f32> = (0..49_152u32).map(|t| (t.wrapping_mul(2_654_435_761) >> 16) as f32 * 4e-4).collect();
        let filters = [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (1000, 0.95, 0.05)];
        for (position, (top_k, top_p, min_p)) in (0..).zip(filters) {
            for temperature in [0.0, 0.3, 1.0, 3.0] {
                let request = Request { temperature, top_k, top_p: 1.0, min_p, ..GREEDY };
                let drawn = draw(&logits, &request, position, &[], [], &mut scratch);
                assert_eq!(drawn, draw(&logits, &request, position, &[], [], &mut scratch));
                // The brute force is quadratic where top-k or top-p is asked for: those rows are cut short.
                let short = if top_k > 0 { 3000 } else { logits.len() };
                let drawn = draw(&logits[..short], &request, position, &[], [], &mut scratch);
                assert_eq!(drawn, brute_force(&logits[..short], &request, position, &[]));
                let request = Request { top_p, ..request };
                let drawn = draw(&logits[..1000], &request, position, &[], [], &mut scratch);
                assert_eq!(drawn, brute_force(&logits[..1000], &request, position, &[]));
            }
        }
    }
}

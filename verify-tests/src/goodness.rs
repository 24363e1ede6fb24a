//! Do counts fit a law? Pearson's chi-square with its p-value, and total variation beside what chance alone would give.

use statrs::function::gamma::checked_gamma_ur;

/// Cells that are expected fewer times are taken together, as the test requires (Cochran, 1954).
const LEAST_EXPECTED: f64 = 5.0;

#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Fit {
    pub samples: u64,
    pub chi_square: f64,
    pub degrees: usize,
    /// Probability of a chi-square as large, if the law is right.
    pub p: f64,
    /// Half of the sum of differences between frequencies and the law.
    pub total_variation: f64,
    /// What that is on the average, if the law is right.
    pub by_chance: f64,
}

/// How well counts fit a law over the same outcomes; `None` where there are too few to say. What cannot happen and did has
/// p 0.
pub fn fit(counts: &[u64], law: &[f64]) -> Option<Fit> {
    let samples: u64 = counts.iter().sum();
    let n = samples as f64;
    let (mut cells, mut rare) = (Vec::new(), (0.0, 0.0));
    for (&count, p) in counts.iter().zip(law) {
        let (count, expected) = (count as f64, p * n);
        if expected >= LEAST_EXPECTED {
            cells.push((count, expected));
        } else {
            rare = (rare.0 + count, rare.1 + expected);
        }
    }
    let impossible = counts.iter().zip(law).any(|(&count, &p)| count > 0 && p == 0.0);
    if rare.1 >= LEAST_EXPECTED {
        cells.push(rare);
    } else if let Some(last) = cells.last_mut() {
        *last = (last.0 + rare.0, last.1 + rare.1);
    }
    if cells.len() < 2 && !impossible {
        return None;
    }
    let degrees = cells.len().max(2) - 1;
    let chi_square: f64 = cells.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
    let p = if impossible { 0.0 } else { upper_tail(chi_square, degrees) };
    let total_variation = counts.iter().zip(law).map(|(&count, p)| (count as f64 / n - p).abs()).sum::<f64>() / 2.0;
    // The mean of |x| of a normal with that variance.
    let by_chance = law.iter().map(|p| (2.0 * p * (1.0 - p) / (std::f64::consts::PI * n)).sqrt()).sum::<f64>() / 2.0;
    Some(Fit { samples, chi_square, degrees, p, total_variation, by_chance })
}

/// The chance that a chi-square of so many degrees of freedom is at least as large.
pub fn upper_tail(chi_square: f64, degrees: usize) -> f64 {
    if chi_square <= 0.0 { 1.0 } else { checked_gamma_ur(degrees as f64 / 2.0, chi_square / 2.0).unwrap_or(0.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn tails_are_those_of_tables() {
        for (chi_square, degrees, p) in [(3.841, 1, 0.05), (18.307, 10, 0.05), (23.209, 10, 0.01), (124.342, 100, 0.05)]
        {
            assert!((upper_tail(chi_square, degrees) - p).abs() < 1e-4, "{chi_square} of {degrees}");
        }
    }

    #[test]
    fn a_die_is_fair_or_not() {
        let mut rng = Rng::new(1);
        let fair = [1.0 / 6.0; 6];
        let mut counts = [0; 6];
        (0..60_000).for_each(|_| counts[rng.below(6)] += 1);
        let right = fit(&counts, &fair).unwrap();
        assert!(right.p > 1e-3 && right.total_variation < 3.0 * right.by_chance, "{right:?}");
        counts[0] += 600;
        assert!(fit(&counts, &fair).unwrap().p < 1e-6);
    }

    #[test]
    fn too_few_samples_say_nothing_and_the_impossible_all() {
        assert_eq!(fit(&[3, 2], &[0.5, 0.5]), None);
        assert_eq!(fit(&[100, 0, 1], &[1.0, 0.0, 0.0]).unwrap().p, 0.0);
    }
}

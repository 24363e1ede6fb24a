//! Every way that random choices can fall, one run for each: depth first, replaying the choices made so far.

use std::collections::BTreeMap;

use super::law::{is_positive, ratio};
use super::{Choose, Rational};

/// A choice of the current run.
struct Choice {
    law: Vec<Rational>,
    taken: usize,
    /// Probability of the run up to and including this choice.
    weight: Rational,
}

/// The exact law of what `run` returns. It must have no randomness but `choose`.
pub fn law_of<T: Ord>(mut run: impl FnMut(&mut Choose) -> T) -> BTreeMap<T, Rational> {
    let mut law = BTreeMap::new();
    let mut path: Vec<Choice> = vec![];
    loop {
        let mut made = 0;
        let outcome = run(&mut |law| {
            if made == path.len() {
                path.push(first(law, path.last()));
            }
            assert_eq!(path[made].law, law, "a run that does not repeat itself");
            made += 1;
            path[made - 1].taken
        });
        assert_eq!(made, path.len(), "a run that does not repeat itself");
        let weight = path.last().map_or(ratio(1, 1), |choice| choice.weight.clone());
        *law.entry(outcome).or_insert(ratio(0, 1)) += weight;
        if !advance(&mut path) {
            break;
        }
    }
    let total: Rational = law.values().sum();
    assert_eq!(total, ratio(1, 1), "a law sums to 1");
    law
}

fn first(law: &[Rational], before: Option<&Choice>) -> Choice {
    assert!(law.iter().all(|probability| !is_positive(&-probability)), "no probability is negative");
    assert_eq!(law.iter().sum::<Rational>(), ratio(1, 1), "a law sums to 1");
    let before = before.map_or(ratio(1, 1), |choice| choice.weight.clone());
    let taken = possible(law, 0).expect("something is possible");
    Choice { weight: before * &law[taken], law: law.to_vec(), taken }
}

/// The first index from `from` on that can occur.
fn possible(law: &[Rational], from: usize) -> Option<usize> {
    (from..law.len()).find(|&index| is_positive(&law[index]))
}

/// Takes the last choice that can fall another way that way. `false` if all have been seen.
fn advance(path: &mut Vec<Choice>) -> bool {
    while let Some(choice) = path.pop() {
        if let Some(taken) = possible(&choice.law, choice.taken + 1) {
            let before = path.last().map_or(ratio(1, 1), |choice| choice.weight.clone());
            path.push(Choice { weight: before * &choice.law[taken], taken, ..choice });
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_is_seen_with_its_weight() {
        let [third, rest] = [ratio(1, 3), ratio(2, 3)];
        // The second coin is tossed only if the first shows heads, and an impossible outcome is not tried.
        let law = law_of(|choose| {
            let heads = choose(&[ratio(0, 1), third.clone(), rest.clone()]) == 2;
            if heads { 2 + choose(&[third.clone(), rest.clone()]) } else { 1 }
        });
        assert_eq!(law, BTreeMap::from([(1, third), (2, ratio(2, 9)), (3, ratio(4, 9))]));
    }

    #[test]
    #[should_panic(expected = "does not repeat itself")]
    fn hidden_randomness_is_noticed() {
        let mut runs = 0;
        law_of(|choose| {
            runs += 1;
            choose(&[ratio(1, runs + 1), ratio(runs, runs + 1)])
        });
    }
}

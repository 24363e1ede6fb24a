//! Laws of one token, as fractions, and the arithmetic that all rules share.

use std::cmp::{Reverse, min};
use std::ops::Deref;

use super::Choose;

pub type Rational = num_rational::BigRational;

pub fn ratio(numerator: usize, denominator: usize) -> Rational {
    Rational::new(numerator.into(), denominator.into())
}

/// Cheaper than a comparison of fractions.
pub fn is_positive(number: &Rational) -> bool {
    *number.numer() > 0.into()
}

/// What every token of a vocabulary weighs. The weights sum to 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Law(Vec<Rational>);

impl Law {
    pub fn proportional_to(weights: Vec<Rational>) -> Law {
        let total: Rational = weights.iter().sum();
        assert!(is_positive(&total), "nothing is left to draw from");
        Law(weights.into_iter().map(|weight| weight / &total).collect())
    }

    /// The law given that it is not `token`; nothing if it can be no other.
    pub fn without(&self, token: usize) -> Option<Law> {
        let mut weights = self.0.clone();
        weights[token] = ratio(0, 1);
        weights.iter().any(is_positive).then(|| Law::proportional_to(weights))
    }

    /// What a target is still owed after a token that the draft drew was rejected.
    pub fn residual(&self, draft: &Law) -> Law {
        Law::proportional_to(excess(&ratio(1, 1), self, draft))
    }

    /// The tokens that can occur, the likeliest first; of equally likely ones the lowest.
    pub fn ranked(&self) -> Vec<usize> {
        let mut tokens: Vec<usize> = (0..self.len()).filter(|&token| is_positive(&self[token])).collect();
        tokens.sort_by_key(|&token| Reverse(&self[token]));
        tokens
    }
}

impl Deref for Law {
    type Target = [Rational];

    fn deref(&self) -> &[Rational] {
        &self.0
    }
}

/// Where a share of the target exceeds the draft, and by how much.
pub fn excess(share: &Rational, target: &Law, draft: &Law) -> Vec<Rational> {
    let positive = |difference: Rational| if is_positive(&difference) { difference } else { ratio(0, 1) };
    target.iter().zip(draft.iter()).map(|(target, draft)| positive(share * target - draft)).collect()
}

/// How likely a drafted token is kept.
pub fn acceptance(target: &Rational, draft: &Rational) -> Rational {
    min(ratio(1, 1), target / draft)
}

pub fn coin(heads: &Rational, choose: &mut Choose) -> bool {
    choose(&[ratio(1, 1) - heads, heads.clone()]) == 1
}

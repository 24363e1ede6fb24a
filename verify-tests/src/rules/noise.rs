//! Draws by noise that is keyed by position: whoever draws at a position draws with the same number.
//!
//! treespark draws with Gumbel noise, one number for each token of the vocabulary. Here it is one uniform number a
//! position, which picks the token whose part of the cumulated law it lies in. For two tokens the one is the other:
//! with exponential `e0`, `e1`, token 0 wins the race `e0 / p0 < e1 / p1` iff `e0 / (e0 + e1) < p0`, and that is a
//! uniform number. What is proved does not depend on which coupling it is: a tree may be any function of the noise.

use super::law::{Rational, ratio};
use super::model::CELLS;
use super::{Choose, Models};

/// The number of every position, as one of equal cells that no probability of a model cuts.
pub type Noise = Vec<usize>;

/// Of the first so many positions.
pub fn draw(positions: usize, choose: &mut Choose) -> Noise {
    let uniform = vec![ratio(1, CELLS); CELLS];
    (0..positions).map(|_| choose(&uniform)).collect()
}

/// Draws position by position from `from` on, with the noise of each.
pub fn draws(noise: &[usize], from: usize) -> impl FnMut(&[Rational]) -> usize {
    let mut cells = noise.iter().skip(from);
    move |law| {
        let below = ratio(*cells.next().expect("a position whose noise is known"), CELLS);
        let mut reached = ratio(0, 1);
        let covers = |probability: &Rational| {
            reached += probability;
            reached > below
        };
        law.iter().position(covers).expect("the law sums to 1")
    }
}

/// Draws with the noise of each position, and by choice where there is none: no drafter has seen it there.
pub fn draws_on(noise: &[usize], choose: &mut Choose) -> impl FnMut(&[Rational]) -> usize {
    let mut left = noise.len();
    let mut draw = draws(noise, 0);
    move |law| match left.checked_sub(1) {
        Some(less) => {
            left = less;
            draw(law)
        }
        None => choose(law),
    }
}

/// Goes on by plain decoding with the noise of the positions that follow, whatever a drafter has seen of it.
pub fn complete(models: &Models, mut text: Vec<usize>, noise: &[usize]) -> Vec<usize> {
    let mut draw = draws(noise, text.len());
    while text.len() < noise.len() {
        text.push(draw(models.target.after(&text)));
    }
    text
}

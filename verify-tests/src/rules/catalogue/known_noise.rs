//! Match with a drafter that knows the noise by which the target draws, as the product's does.

use std::slice;

use super::*;
use crate::rules::model::{CELLS, whim};
use crate::rules::noise::{self, Noise};
use crate::rules::proof::examine_on;
use crate::rules::{chain, growth, matching};

pub const NOISE: &[Claim] = &[
    lossless("match, a chain drawn by noise of its own", MODELS, |seed| {
        one(seed, |m, choose| {
            let drawn = chain::draw(&m.draft, m.depth, choose);
            matching::verify(&m.target, &Tree::chain(&drawn), choose)
        })
    }),
    lossless("match, a chain drawn by the target's noise", MODELS, |seed| new_noise(seed, same_noise_chain)),
    lossless("match, the same, then more by that noise", MODELS, |seed| same_noise(seed, same_noise_chain)),
    lossless("match, a tree in hindsight of all noise", MODELS, |seed| {
        same_noise(seed, |m, noise| hindsight_of_noise(m, noise, seed))
    }),
    lossless("match, a tree in hindsight of the target's draw", MODELS, |seed| same_noise(seed, peeking)),
    lossless("match, a tree grown by confidence and noise", MODELS, |seed| {
        let models = one_request(seed);
        by_noise(slice::from_ref(&models), models.depth, |requests, noises| {
            growth::by_noise(requests, &tree_rates(seed), noises)
        })
    }),
];

/// Match with a drafter that sees the target's noise. Later rounds draw with new noise.
pub fn new_noise(seed: u64, tree: impl Fn(&Models, &Noise) -> Tree) -> Verdict {
    one(seed, |m, choose| {
        let noise = noise::draw(m.horizon(), choose);
        matching::verify(&m.target, &tree(m, &noise), &mut noise::draws(&noise, 0))
    })
}

/// The same, and what follows is drawn with the noise of its positions.
fn same_noise(seed: u64, tree: impl Fn(&Models, &Noise) -> Tree) -> Verdict {
    let models = one_request(seed);
    by_noise(slice::from_ref(&models), models.horizon(), |requests, noises| vec![tree(&requests[0], &noises[0])])
}

/// The same of any requests. Their drafters see the noise of the first positions of all; behind them nobody has seen it.
pub fn by_noise(requests: &[Models], positions: usize, trees: impl Fn(&[Models], &[Noise]) -> Vec<Tree>) -> Verdict {
    examine_on(requests, |choose| {
        let noises: Vec<Noise> = requests.iter().map(|_| noise::draw(positions, choose)).collect();
        let trees = trees(requests, &noises);
        let mut tokens = 0;
        let mut text = |((m, tree), noise): ((&Models, &Tree), &Noise)| {
            let text = matching::verify(&m.target, tree, &mut noise::draws_on(noise, choose));
            tokens += text.len();
            noise::complete(m, text, noise)
        };
        let texts = requests.iter().zip(&trees).zip(&noises).map(&mut text).collect();
        (tokens, texts)
    })
}

fn same_noise_chain(m: &Models, noise: &Noise) -> Tree {
    Tree::chain(&chain::draw(&m.draft, m.depth, &mut noise::draws(noise, 0)))
}

/// A chain drawn by the same noise, cut and added to by whim of all the noise, of later positions and of the target.
pub fn hindsight_of_noise(m: &Models, noise: &Noise, seed: u64) -> Tree {
    let drawn = chain::draw(&m.draft, m.depth, &mut noise::draws(noise, 0));
    let mut rng = whim(seed, noise.iter().copied());
    let mut tree = Tree::chain(&drawn[..rng.below(drawn.len() + 1)]);
    tree.add_any(3, m.depth, m.vocab, &mut rng);
    tree
}

/// The target's own next token, but only if the position after it has high noise.
pub fn peeking(m: &Models, noise: &Noise) -> Tree {
    let token = noise::draws(noise, 0)(m.target.after(&[]));
    if noise[1] < CELLS / 2 { Tree::root() } else { Tree::chain(&[token]) }
}

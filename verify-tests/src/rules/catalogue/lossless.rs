//! Rounds that are lossless: every rule, each on trees of the kind that it holds for.

use std::slice;

use super::*;
use crate::rules::model::whim;
use crate::rules::without_replacement::{self, levels, likeliest_next, shape};
use crate::rules::{block, chain, growth, hybrid, matching};

/// The rule of the product, on trees from anywhere.
pub const MATCH: &[Claim] = &[
    lossless("match, every tree of 3 tokens, 2 levels", 2 * 729, |seed| every_tree(seed, 3, 2)),
    lossless("match, every tree of 2 tokens, 3 levels", 2 * 676, |seed| every_tree(seed, 2, 3)),
    // Of 389 million.
    lossless("match, some trees of 3 tokens, 3 levels", 1000, |seed| {
        let number = Rng::new(seed).word() % Tree::count(3, 3) as u64;
        static_tree(seed, &Tree::numbered(number as usize, 3, 3), 3, 3)
    }),
    lossless("match, a given tree, siblings alike among them", MODELS, |seed| {
        one(seed, |m, choose| matching::verify(&m.target, &any_tree(m, 8, &mut Rng::new(seed)), choose))
    }),
    // Spoiled in view of all that was sampled.
    lossless("match, a sampled tree cut and added to in hindsight", MODELS, |seed| {
        one(seed, |m, choose| {
            let drawn = chain::draw(&m.draft, m.depth, choose);
            let mut rng = whim(seed, drawn.iter().copied());
            let mut tree = Tree::chain(&drawn[..rng.below(drawn.len() + 1)]);
            tree.add_any(4, m.depth, m.vocab, &mut rng);
            matching::verify(&m.target, &tree, choose)
        })
    }),
];

/// Of one length each: token by token, then as a block.
pub const CHAINS: &[Claim] = &[
    lossless("a sampled chain, token by token", MODELS, |seed| {
        one(seed, |m, choose| chain::verify(m, &chain::draw(&m.draft, m.depth, choose), choose))
    }),
    lossless("a sampled chain, as a block", MODELS, |seed| {
        one(seed, |m, choose| block::verify(m, &chain::draw(&m.draft, m.depth, choose), choose))
    }),
];

pub const WITHOUT_REPLACEMENT: &[Claim] = &[
    lossless("without replacement, every shape 3 wide, 2 levels", 85, |seed| every_shape(seed, 3, 2)),
    lossless("without replacement, every shape 2 wide, 3 levels", 183, |seed| every_shape(seed, 2, 3)),
    lossless("without replacement, 2x2 and 2x1x1", MODELS, |seed| {
        grown(seed, |m, tree, open| levels(widths(m))(tree, open))
    }),
    lossless("without replacement, grown where the draft is likeliest", MODELS, |seed| {
        grown(seed, |m, tree, open| likeliest_next(m, 4)(tree, open))
    }),
    lossless("without replacement, grown by whim of what was drawn", MODELS, |seed| {
        grown(seed, |_, tree, open| {
            let mut rng = whim(seed, tree.words());
            (tree.len() <= 5 && !open.is_empty() && rng.below(8) > 0).then(|| rng.pick(open))
        })
    }),
    lossless("without replacement, grown by confidence", MODELS, |seed| {
        one(seed, |m, choose| {
            let tree = growth::drawn(slice::from_ref(m), &tree_rates(seed), choose).remove(0);
            without_replacement::verify(m, &tree, choose)
        })
    }),
];

pub const HYBRID: &[Claim] = &[
    lossless("hybrid, a spine beside every tree of 3 tokens, 2 levels", 729, |seed| {
        let branches = Tree::numbered(seed as usize, 3, 2);
        let models = Models::random(seed, 3, 2);
        examine_one(&models, |choose| {
            let spine = chain::draw(&models.draft, models.depth, choose);
            let mut tree = Tree::chain(&spine);
            tree.merge(&branches);
            hybrid::go_on(&models.target, &tree, chain::verify(&models, &spine, choose), choose)
        })
    }),
    lossless("hybrid, a spine token by token", MODELS, |seed| {
        one(seed, |m, choose| {
            let spine = chain::draw(&m.draft, m.depth, choose);
            let tree = with_branches(m, seed, Tree::chain(&spine));
            hybrid::go_on(&m.target, &tree, chain::verify(m, &spine, choose), choose)
        })
    }),
    lossless("hybrid, a spine as a block", MODELS, |seed| {
        one(seed, |m, choose| {
            let spine = chain::draw(&m.draft, m.depth, choose);
            let tree = with_branches(m, seed, Tree::chain(&spine));
            hybrid::go_on(&m.target, &tree, block::verify(m, &spine, choose), choose)
        })
    }),
    lossless("hybrid, a spine as long as Algorithm 1 says", MODELS, |seed| {
        one(seed, |m, choose| {
            let spine = schedule::admit(slice::from_ref(m), &rates(seed), choose).remove(0);
            let tree = with_branches(m, seed, Tree::chain(&spine));
            hybrid::go_on(&m.target, &tree, chain::verify(m, &spine, choose), choose)
        })
    }),
    lossless("hybrid, a tree without replacement", MODELS, |seed| {
        one(seed, |m, choose| {
            let drawn = without_replacement::draw(m, levels(widths(m)), choose);
            let tree = with_branches(m, seed, drawn.clone());
            hybrid::go_on(&m.target, &tree, without_replacement::verify(m, &drawn, choose), choose)
        })
    }),
];

/// Of each number twice, with models of its own.
fn every_tree(seed: u64, vocab: usize, depth: usize) -> Verdict {
    let number = seed as usize % Tree::count(vocab, depth);
    static_tree(seed, &Tree::numbered(number, vocab, depth), vocab, depth)
}

fn static_tree(seed: u64, tree: &Tree, vocab: usize, depth: usize) -> Verdict {
    let models = Models::random(seed, vocab, depth);
    examine_one(&models, |choose| matching::verify(&models.target, tree, choose))
}

/// A shape is a tree whose children hold the tokens 0, 1, ...: how many there are is all that it says.
fn every_shape(seed: u64, width: usize, depth: usize) -> Verdict {
    let is_shape = |tree: &Tree| {
        let in_turn = |node| tree.children(node).enumerate().all(|(i, child)| tree.token(child) == i);
        (0..tree.len()).all(in_turn)
    };
    let trees = (0..Tree::count(width, depth)).map(|number| Tree::numbered(number, width, depth));
    let given = trees.filter(is_shape).nth(seed as usize).expect("as many shapes as models");
    let models = Models::random(seed, width, depth);
    examine_one(&models, |choose| {
        let tree = without_replacement::draw(&models, shape(&given), choose);
        without_replacement::verify(&models, &tree, choose)
    })
}

/// Without replacement, each next child where `next` says.
fn grown(seed: u64, next: impl Fn(&Models, &Tree, &[usize]) -> Option<usize>) -> Verdict {
    one(seed, |m, choose| {
        let tree = without_replacement::draw(m, |tree, open| next(m, tree, open), choose);
        without_replacement::verify(m, &tree, choose)
    })
}

fn with_branches(m: &Models, seed: u64, mut tree: Tree) -> Tree {
    let mut rng = whim(seed, tree.words());
    tree.add_any(5, m.depth, m.vocab, &mut rng);
    tree
}

//! Acceptance rules are lossless, by exact enumeration.
//!
//! Models are random and tiny, with tokens that cannot occur, and every law is a sum of fractions: "lossless" means a
//! distance of exactly 0 on every model.

use treespark_verify_tests::rules::law::ratio;
use treespark_verify_tests::rules::proof::{Verdict, decimal, examine_one};
use treespark_verify_tests::rules::{Choose, Models, Rational};
use treespark_verify_tests::rules::{block, chain};

/// Vocabularies of 2 and 3 tokens, drafts of 2 and 3.
const SIZES: [(usize, usize); 4] = [(2, 2), (2, 3), (3, 2), (3, 3)];
const SEEDS: u64 = 32;

/// A round of one request; the number is the seed of its whims.
type Round<'a> = dyn Fn(&Models, u64, &mut Choose) -> Vec<usize> + 'a;

fn verdicts(round: &Round) -> Vec<Verdict> {
    let verdict = |seed| {
        let models = one_request(seed);
        examine_one(&models, |choose| round(&models, seed, choose))
    };
    (0..SEEDS).map(verdict).collect()
}

fn one_request(seed: u64) -> Models {
    let (vocab, depth) = SIZES[seed as usize % SIZES.len()];
    Models::random(seed, vocab, depth)
}

fn mean_tokens(verdicts: &[Verdict]) -> Rational {
    verdicts.iter().map(|verdict| &verdict.tokens).sum::<Rational>() / ratio(verdicts.len(), 1)
}

fn assert_lossless(rule: &str, verdicts: Vec<Verdict>) {
    println!("{rule:60} {} tokens a round", decimal(&mean_tokens(&verdicts)));
    assert_exact(rule, verdicts);
}

fn assert_exact(rule: &str, verdicts: Vec<Verdict>) {
    for (seed, verdict) in verdicts.iter().enumerate() {
        assert_eq!(verdict.distance, ratio(0, 1), "{rule}, seed {seed}");
    }
}

#[test]
fn chains() {
    let drawn = |m: &Models, choose: &mut Choose| chain::draw(&m.draft, m.depth, choose);
    let by_token = verdicts(&|m, _, choose| chain::verify(m, &drawn(m, choose), choose));
    let by_block = verdicts(&|m, _, choose| block::verify(m, &drawn(m, choose), choose));
    for (token, block) in by_token.iter().zip(&by_block) {
        assert!(block.tokens >= token.tokens, "a block is never shorter");
    }
    assert_lossless("a sampled chain, token by token", by_token);
    assert_lossless("a sampled chain, as a block", by_block);
}

//! Acceptance rules are lossless, by exact enumeration; known mistakes are not, and are rejected.
//!
//! What is claimed stands in [`treespark_verify_tests::rules::catalogue`]; `treespark-fuzz prove` prints the same.

use treespark_verify_tests::rules::catalogue::{Claim, Expected, batch, known_noise, lossless, rejected};
use treespark_verify_tests::rules::proof::{Verdict, decimal, largest, mean_tokens};

fn check(claims: &[Claim]) -> Vec<Vec<Verdict>> {
    claims.iter().map(check_one).collect()
}

fn check_one(claim: &Claim) -> Vec<Verdict> {
    let verdicts = claim.verdicts();
    let wrong = verdicts.iter().filter(|verdict| !verdict.is_lossless()).count();
    let found = decimal(largest(&verdicts));
    match claim.expected {
        Expected::Lossless => println!("{:60} {} tokens a round", claim.name, decimal(&mean_tokens(&verdicts))),
        Expected::Rejected(described) => println!(
            "{:60} expected {:>5}, found {found}, rejected on {wrong} of {}",
            claim.name,
            described.map_or("-".into(), |distance| format!("{distance:.3}")),
            verdicts.len()
        ),
    }
    let first = verdicts.iter().position(|verdict| !verdict.is_lossless());
    assert!(claim.holds(&verdicts), "{}: distance {found}, the first on model {first:?}", claim.name);
    verdicts
}

#[test]
fn match_on_any_tree() {
    check(lossless::MATCH);
}

#[test]
fn match_with_a_drafter_that_knows_the_noise() {
    check(known_noise::NOISE);
}

#[test]
fn chains_and_blocks_are_never_shorter() {
    let [by_token, by_block]: [Vec<Verdict>; 2] = check(lossless::CHAINS).try_into().expect("the two rules");
    for (token, block) in by_token.iter().zip(&by_block) {
        assert!(block.tokens >= token.tokens, "a block is never shorter");
    }
}

#[test]
fn trees_without_replacement() {
    check(lossless::WITHOUT_REPLACEMENT);
}

#[test]
fn hybrid_trees() {
    check(lossless::HYBRID);
}

#[test]
fn two_requests_that_share_a_budget() {
    check(batch::BATCH);
}

#[test]
fn the_requests_of_a_pair_do_depend_on_each_other() {
    let coupled = batch::coupled();
    println!("{coupled:?}");
    assert!(coupled[0] >= 8 && coupled[1] >= 8 && coupled[2] >= 3, "little would be proved: {coupled:?}");
}

/// `expected` is the distance that a mistake was described with, on one instance of three tokens; `found` is the largest
/// on the models here.
#[test]
fn known_mistakes_are_rejected() {
    check(rejected::MISTAKES);
}

#[test]
fn more_mistakes_are_rejected() {
    check(rejected::MORE_MISTAKES);
}

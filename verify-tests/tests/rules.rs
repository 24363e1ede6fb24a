//! Acceptance rules are lossless, by exact enumeration; known mistakes are not, and are rejected.
//!
//! Models are random and tiny, with tokens that cannot occur, and every law is a sum of fractions: "lossless" means a
//! distance of exactly 0 on every model. A mistake may be harmless on some models and must be rejected on one at least.

use std::slice;

use treespark_verify_tests::rng::Rng;
use treespark_verify_tests::rules::law::ratio;
use treespark_verify_tests::rules::model::{CELLS, whim};
use treespark_verify_tests::rules::noise::Noise;
use treespark_verify_tests::rules::proof::{Verdict, decimal, examine, examine_one};
use treespark_verify_tests::rules::replay::law_of;
use treespark_verify_tests::rules::without_replacement::{self, levels, likeliest_next};
use treespark_verify_tests::rules::{Choose, Models, Rational, Tree};
use treespark_verify_tests::rules::{block, chain, hybrid, matching, mistakes, noise, schedule};

/// Vocabularies of 2 and 3 tokens, drafts of 2 and 3.
const SIZES: [(usize, usize); 4] = [(2, 2), (2, 3), (3, 2), (3, 3)];
const SEEDS: u64 = 32;
/// Pairs of requests: each takes longer.
const PAIRS: u64 = 24;

/// A round of one request; the number is the seed of its whims.
type Round<'a> = dyn Fn(&Models, u64, &mut Choose) -> Vec<usize> + 'a;
/// A round of two requests.
type JointRound<'a> = dyn Fn(&[Models], u64, &mut Choose) -> Vec<Vec<usize>> + 'a;

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

fn joint_verdicts(depths: &[usize], round: &JointRound) -> Vec<Verdict> {
    let verdict = |seed| {
        let requests = two_requests(seed, depths);
        examine(&requests, |choose| round(&requests, seed, choose))
    };
    (0..PAIRS).map(verdict).collect()
}

/// Vocabularies of 2 and 3 tokens side by side, drafts of one of these depths.
fn two_requests(seed: u64, depths: &[usize]) -> [Models; 2] {
    let depth = depths[seed as usize / 2 % depths.len()];
    [0, 1].map(|i| Models::random(1000 + 2 * seed + i, 2 + (seed + i) as usize % 2, depth))
}

/// A staircase, as kernels have: the rate drops with every third row, to 50 to 89 % of what it was.
fn rates(seed: u64) -> Vec<Rational> {
    let mut rng = Rng::new(seed);
    let first = rng.below(3);
    let mut rate = ratio(1, 1);
    let rate_of = |rows: usize| {
        if rows % 3 == first {
            rate *= ratio(50 + rng.below(40), 100);
        }
        rate.clone()
    };
    (0..9).map(rate_of).collect()
}

fn largest(verdicts: &[Verdict]) -> Rational {
    verdicts.iter().map(|verdict| verdict.distance.clone()).max().expect("some models")
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

fn assert_rejected(mistake: &str, expected: &str, verdicts: Vec<Verdict>) {
    let rejected = verdicts.iter().filter(|verdict| verdict.distance > ratio(0, 1)).count();
    println!("{mistake:60} {expected:>8} {:>8} {rejected:>4} of {}", decimal(&largest(&verdicts)), verdicts.len());
    assert!(rejected > 0, "the proof lets this mistake pass: {mistake}");
}

fn any_tree(models: &Models, nodes: usize, rng: &mut Rng) -> Tree {
    let mut tree = Tree::root();
    tree.add_any(nodes, models.depth, models.vocab, rng);
    tree
}

/// The shapes whose siblings are drawn without replacement: small enough to enumerate.
fn widths(models: &Models) -> &'static [usize] {
    if models.depth == 2 { &[2, 2] } else { &[2, 1, 1] }
}

#[test]
fn match_on_any_tree() {
    let given: &Round = &|m, seed, choose| matching::verify(&m.target, &any_tree(m, 8, &mut Rng::new(seed)), choose);
    assert_lossless("match, a given tree", verdicts(given));
    // Sampled, and then spoiled in view of all that was sampled.
    let pruned: &Round = &|m, seed, choose| {
        let drawn = chain::draw(&m.draft, m.depth, choose);
        let mut rng = whim(seed, drawn.iter().copied());
        let mut tree = Tree::chain(&drawn[..rng.below(drawn.len() + 1)]);
        tree.add_any(4, m.depth, m.vocab, &mut rng);
        matching::verify(&m.target, &tree, choose)
    };
    assert_lossless("match, a sampled tree cut and added to in hindsight", verdicts(pruned));
}

/// What a drafter makes of the target's noise.
type TreeOf = fn(&Models, &Noise, u64) -> Tree;

/// Match with a drafter that sees the target's noise. Later rounds draw with new noise.
fn one_round(tree: TreeOf) -> Vec<Verdict> {
    verdicts(&|m, seed, choose| {
        let noise = noise::draw(m, choose);
        matching::verify(&m.target, &tree(m, &noise, seed), &mut noise::draws(&noise, 0))
    })
}

/// The same, and what follows is drawn with the noise of its positions.
fn all_rounds(tree: TreeOf) -> Vec<Verdict> {
    verdicts(&|m, seed, choose| {
        let noise = noise::draw(m, choose);
        let text = matching::verify(&m.target, &tree(m, &noise, seed), &mut noise::draws(&noise, 0));
        noise::complete(m, text, &noise)
    })
}

fn same_noise_chain(m: &Models, noise: &Noise, _: u64) -> Tree {
    Tree::chain(&chain::draw(&m.draft, m.depth, &mut noise::draws(noise, 0)))
}

/// A chain drawn by the same noise, cut and added to by whim of all the noise, of later positions and of the target.
fn hindsight_of_noise(m: &Models, noise: &Noise, seed: u64) -> Tree {
    let drawn = chain::draw(&m.draft, m.depth, &mut noise::draws(noise, 0));
    let mut rng = whim(seed, noise.iter().copied());
    let mut tree = Tree::chain(&drawn[..rng.below(drawn.len() + 1)]);
    tree.add_any(3, m.depth, m.vocab, &mut rng);
    tree
}

/// The target's own next token, but only if the position after it has high noise.
fn peeking(m: &Models, noise: &Noise, _: u64) -> Tree {
    let token = noise::draws(noise, 0)(m.target.after(&[]));
    if noise[1] < CELLS / 2 { Tree::root() } else { Tree::chain(&[token]) }
}

#[test]
fn match_with_a_drafter_that_knows_the_noise() {
    let drawn_apart: &Round = &|m, _, choose| {
        let drawn = chain::draw(&m.draft, m.depth, choose);
        matching::verify(&m.target, &Tree::chain(&drawn), choose)
    };
    assert_lossless("match, a chain drawn by noise of its own", verdicts(drawn_apart));
    assert_lossless("match, a chain drawn by the target's noise", one_round(same_noise_chain));
    assert_exact("match, a chain drawn by the target's noise, then more by that noise", all_rounds(same_noise_chain));
    assert_exact("match, a tree in hindsight of all noise", all_rounds(hindsight_of_noise));
    assert_exact("match, a tree in hindsight of the target's draw", all_rounds(peeking));
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

#[test]
fn trees_without_replacement() {
    let shape: &Round = &|m, _, choose| {
        let tree = without_replacement::draw(m, levels(widths(m)), choose);
        without_replacement::verify(m, &tree, choose)
    };
    assert_lossless("without replacement, 2x2 and 2x1x1", verdicts(shape));
    let all: &Round = &|m, _, choose| {
        let tree = without_replacement::draw(m, levels(&[3, 1, 0]), choose);
        without_replacement::verify(m, &tree, choose)
    };
    assert_lossless("without replacement, 3x1: every token that can be", verdicts(all));
    let likeliest: &Round = &|m, _, choose| {
        let tree = without_replacement::draw(m, likeliest_next(m, 4), choose);
        without_replacement::verify(m, &tree, choose)
    };
    assert_lossless("without replacement, grown where the draft is likeliest", verdicts(likeliest));
    let whims: &Round = &|m, seed, choose| {
        let next = |tree: &Tree, open: &[usize]| {
            let mut rng = whim(seed, tree.words());
            (tree.len() <= 5 && !open.is_empty() && rng.below(8) > 0).then(|| rng.pick(open))
        };
        let tree = without_replacement::draw(m, next, choose);
        without_replacement::verify(m, &tree, choose)
    };
    assert_lossless("without replacement, grown by whim of what was drawn", verdicts(whims));
}

#[test]
fn hybrid_trees() {
    let with_branches = |m: &Models, seed: u64, mut tree: Tree| {
        let mut rng = whim(seed, tree.words());
        tree.add_any(5, m.depth, m.vocab, &mut rng);
        tree
    };
    let by_token: &Round = &|m, seed, choose| {
        let spine = chain::draw(&m.draft, m.depth, choose);
        let tree = with_branches(m, seed, Tree::chain(&spine));
        let emitted = chain::verify(m, &spine, choose);
        hybrid::go_on(&m.target, &tree, emitted, choose)
    };
    assert_lossless("hybrid, a spine token by token", verdicts(by_token));
    let by_block: &Round = &|m, seed, choose| {
        let spine = chain::draw(&m.draft, m.depth, choose);
        let tree = with_branches(m, seed, Tree::chain(&spine));
        let emitted = block::verify(m, &spine, choose);
        hybrid::go_on(&m.target, &tree, emitted, choose)
    };
    assert_lossless("hybrid, a spine as a block", verdicts(by_block));
    let scheduled: &Round = &|m, seed, choose| {
        let spine = schedule::admit(slice::from_ref(m), &rates(seed), choose).remove(0);
        let tree = with_branches(m, seed, Tree::chain(&spine));
        let emitted = chain::verify(m, &spine, choose);
        hybrid::go_on(&m.target, &tree, emitted, choose)
    };
    assert_lossless("hybrid, a spine as long as Algorithm 1 says", verdicts(scheduled));
    let sampled_tree: &Round = &|m, seed, choose| {
        let drawn = without_replacement::draw(m, levels(widths(m)), choose);
        let tree = with_branches(m, seed, drawn.clone());
        let emitted = without_replacement::verify(m, &drawn, choose);
        hybrid::go_on(&m.target, &tree, emitted, choose)
    };
    assert_lossless("hybrid, a tree without replacement", verdicts(sampled_tree));
}

/// Verifies the chain of each request.
fn each(
    requests: &[Models],
    chains: Vec<Vec<usize>>,
    mut verify: impl FnMut(&Models, &[usize]) -> Vec<usize>,
) -> Vec<Vec<usize>> {
    requests.iter().zip(chains).map(|(m, chain)| verify(m, &chain)).collect()
}

#[test]
fn two_requests_that_share_a_budget() {
    let depends = |seed: &u64| {
        let requests = two_requests(*seed, &[2, 3]);
        let lengths = law_of(|choose| {
            let chains = schedule::admit(&requests, &rates(*seed), choose);
            chains.iter().map(Vec::len).collect::<Vec<_>>()
        });
        lengths.len() > 1
    };
    let coupled = (0..PAIRS).filter(depends).count();

    assert!(coupled >= 8, "lengths depend on tokens in {coupled} cases only: little would be proved");

    let by_token: &JointRound = &|requests, seed, choose| {
        let chains = schedule::admit(requests, &rates(seed), choose);
        each(requests, chains, |m, chain| chain::verify(m, chain, choose))
    };
    assert_lossless("two requests, Algorithm 1, token by token", joint_verdicts(&[2, 3], by_token));
    let by_block: &JointRound = &|requests, seed, choose| {
        let chains = schedule::admit(requests, &rates(seed), choose);
        each(requests, chains, |m, chain| block::verify(m, chain, choose))
    };
    assert_lossless("two requests, Algorithm 1, as blocks", joint_verdicts(&[2, 3], by_block));
    let rates = break_even_pairs();
    let hindsight: &JointRound = &|requests, seed, choose| {
        let chains = mistakes::lengths_in_hindsight(requests, &rates[seed as usize], choose);
        each(requests, chains, |m, chain| matching::verify(&m.target, &Tree::chain(chain), choose))
    };
    assert_lossless("two requests, lengths in hindsight, match", joint_verdicts(&[2, 3], hindsight));
    // Each request's tree by whim of what both draw with.
    let all_noise: &JointRound = &|requests, seed, choose| {
        let noises: Vec<Noise> = requests.iter().map(|m| noise::draw(m, choose)).collect();
        let seen = whim(seed, noises.concat()).word();
        let text = |(m, noise): (&Models, &Noise)| {
            let tree = hindsight_of_noise(m, noise, seen);
            let text = matching::verify(&m.target, &tree, &mut noise::draws(noise, 0));
            noise::complete(m, text, noise)
        };
        requests.iter().zip(&noises).map(text).collect()
    };
    assert_exact("two requests, trees in hindsight of both noises, match", joint_verdicts(&[1], all_noise));
}

/// Rates at which whole chains just pay in the mean, and parts of them cost as much.
fn break_even(requests: &[Models]) -> Vec<Rational> {
    let survivors = |models: &Models| -> Rational {
        let chains = law_of(|choose| chain::draw(&models.draft, models.depth, choose));
        chains.iter().map(|(tokens, weight)| schedule::survivors(models, tokens) * weight).sum()
    };
    let undrafted = ratio(requests.len(), 1);
    let drafted = requests.iter().map(survivors).sum::<Rational>() + &undrafted;
    let rows = requests.iter().map(|models| models.depth + 1).sum::<usize>();
    let mut rates = vec![undrafted / drafted; rows + 1];
    rates[requests.len()] = ratio(1, 1);
    rates
}

fn break_even_pairs() -> Vec<Vec<Rational>> {
    (0..PAIRS).map(|seed| break_even(&two_requests(seed, &[2, 3]))).collect()
}

/// `expected` is the distance that each mistake was described with, on one instance of three tokens; `found` is the
/// largest on the models here.
#[test]
fn known_mistakes_are_rejected() {
    println!("{:60} {:>8} {:>8} rejected on", "mistake", "expected", "found");
    let rates: Vec<Vec<Rational>> = (0..SEEDS).map(|seed| break_even(&[one_request(seed)])).collect();
    let table: [(&str, &str, &Round); 8] = [
        ("the likeliest chain, as a sampled one", "0.253", &|m, _, c| mistakes::greedy_chain(m, c)),
        ("the likeliest two children, as sampled ones", "0.203", &|m, _, c| mistakes::likeliest_siblings(m, c)),
        ("another law than was sampled from", "0.293", &|m, _, c| mistakes::another_draft_law(m, c)),
        ("the target's law instead of the residual", "0.131", &|m, _, c| mistakes::no_residual(m, c)),
        ("a chain's length in hindsight", "0.119", &|m, seed, c| {
            let tokens = mistakes::lengths_in_hindsight(slice::from_ref(m), &rates[seed as usize], c).remove(0);
            chain::verify(m, &tokens, c)
        }),
        ("the likelier of two samples, as the only one", "0.113", &|m, _, c| mistakes::better_of_two(m, c)),
        ("siblings sorted before they are verified", "0.113", &|m, _, c| mistakes::sorted_siblings(m, widths(m), c)),
        ("a drawn leaf dropped for being unlikely", "0.083", &|m, _, c| mistakes::dropped_leaf(m, 3, c)),
    ];
    for (mistake, expected, round) in table {
        assert_rejected(mistake, expected, verdicts(round));
    }
}

#[test]
fn more_mistakes_are_rejected() {
    let rates = break_even_pairs();
    let hindsight: &JointRound = &|requests, seed, choose| {
        let chains = mistakes::lengths_in_hindsight(requests, &rates[seed as usize], choose);
        each(requests, chains, |m, chain| chain::verify(m, chain, choose))
    };
    assert_rejected("two requests, lengths in hindsight", "0.167", joint_verdicts(&[2, 3], hindsight));
    let noise_twice: &Round = &|m, _, choose| mistakes::noise_used_twice(m, choose);
    assert_rejected("one noise for a draft and its replacement", "-", verdicts(noise_twice));
    assert_rejected("new noise after a tree that has seen the old", "-", one_round(peeking));
}

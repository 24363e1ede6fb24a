//! Two requests that share a budget: what the one has drafted decides what the other may.

use std::collections::BTreeSet;

use super::known_noise::{by_noise, hindsight_of_noise};
use super::*;
use crate::rules::model::whim;
use crate::rules::noise::{self, Noise};
use crate::rules::replay::law_of;
use crate::rules::{block, chain, growth, matching, mistakes, schedule, without_replacement};

pub const BATCH: &[Claim] = &[
    lossless("two requests, Algorithm 1, token by token", PAIRS, |seed| {
        two(seed, |requests, choose| {
            let chains = schedule::admit(requests, &rates(seed), choose);
            each(requests, chains, |m, chain| chain::verify(m, chain, choose))
        })
    }),
    lossless("two requests, Algorithm 1, as blocks", PAIRS, |seed| {
        two(seed, |requests, choose| {
            let chains = schedule::admit(requests, &rates(seed), choose);
            each(requests, chains, |m, chain| block::verify(m, chain, choose))
        })
    }),
    lossless("two requests, lengths in hindsight, match", PAIRS, |seed| {
        let rates = break_even(&two_requests(seed, &[2, 3]));
        two(seed, |requests, choose| {
            let chains = mistakes::lengths_in_hindsight(requests, &rates, choose);
            each(requests, chains, |m, chain| matching::verify(&m.target, &Tree::chain(chain), choose))
        })
    }),
    // Each request's tree by whim of what both draw with.
    lossless("two requests, trees in hindsight of both noises, match", PAIRS, |seed| {
        by_noise(&two_requests(seed, &[1]), 2, |requests, noises| {
            let seen = whim(seed, noises.concat()).word();
            requests.iter().zip(noises).map(|(m, noise)| hindsight_of_noise(m, noise, seen)).collect()
        })
    }),
    // With 4096 noises for each pair.
    lossless("two requests, trees grown by confidence and noise, match", 8, |seed| {
        by_noise(&two_requests(seed, &[2]), 2, |requests, noises| growth::by_noise(requests, &tree_rates(seed), noises))
    }),
    lossless("two requests, trees grown by confidence, no replacement", PAIRS, |seed| {
        two(seed, |requests, choose| {
            let trees = growth::drawn(requests, &tree_rates(seed), choose);
            each(requests, trees, |m, tree| without_replacement::verify(m, tree, choose))
        })
    }),
];

/// On how many of the pairs the one's draws decide how much the other drafts: chains, trees drawn, trees by noise. On the
/// rest little is proved.
pub fn coupled() -> [usize; 3] {
    let nodes = |tree: &Tree| (1..tree.len()).flat_map(|node| [tree.parent(node), tree.token(node)]).collect();
    let noises = |choose: &mut Choose| -> Vec<Noise> { [2, 2].map(|positions| noise::draw(positions, choose)).into() };
    [
        count(PAIRS, &[2, 3], |requests, seed, choose| schedule::admit(requests, &rates(seed), choose)),
        count(PAIRS, &[2, 3], |requests, seed, choose| {
            growth::drawn(requests, &tree_rates(seed), choose).iter().map(nodes).collect()
        }),
        count(8, &[2], |requests, seed, choose| {
            let noises = noises(choose);
            let trees = growth::by_noise(requests, &tree_rates(seed), &noises);
            noises.into_iter().zip(&trees).map(|(noise, tree)| [noise, nodes(tree)].concat()).collect()
        }),
    ]
}

/// What a request drafts is decided by its own draws and the other's. If it can end where it can also go on, by the
/// other's.
fn count(pairs: u64, depths: &[usize], drafts: impl Fn(&[Models], u64, &mut Choose) -> Vec<Vec<usize>>) -> usize {
    let depends = |seed: &u64| {
        let requests = two_requests(*seed, depths);
        let both: Vec<Vec<Vec<usize>>> = law_of(|choose| drafts(&requests, *seed, choose)).into_keys().collect();
        [0, 1].into_iter().any(|request| {
            let drafts: BTreeSet<&Vec<usize>> = both.iter().map(|drafts| &drafts[request]).collect();
            drafts.iter().zip(drafts.iter().skip(1)).any(|(draft, next)| next.starts_with(draft))
        })
    };
    (0..pairs).filter(depends).count()
}

//! Rounds that are not lossless: each known mistake, and what is right only under a condition, without it.

use std::slice;

use super::known_noise::{new_noise, peeking};
use super::*;
use crate::rules::{chain, mistakes};

pub const MISTAKES: &[Claim] = &[
    rejected("the likeliest chain, as a sampled one", Some(0.253), MODELS, |seed| one(seed, mistakes::greedy_chain)),
    rejected("the likeliest two children, as sampled ones", Some(0.203), MODELS, |seed| {
        one(seed, mistakes::likeliest_siblings)
    }),
    rejected("another law than was sampled from", Some(0.293), MODELS, |seed| one(seed, mistakes::another_draft_law)),
    rejected("the target's law instead of the residual", Some(0.131), MODELS, |seed| one(seed, mistakes::no_residual)),
    rejected("a chain's length in hindsight", Some(0.119), MODELS, |seed| {
        let rates = break_even(&[one_request(seed)]);
        one(seed, |m, choose| {
            let tokens = mistakes::lengths_in_hindsight(slice::from_ref(m), &rates, choose).remove(0);
            chain::verify(m, &tokens, choose)
        })
    }),
    rejected("the likelier of two samples, as the only one", Some(0.113), MODELS, |seed| {
        one(seed, mistakes::better_of_two)
    }),
    rejected("siblings sorted before they are verified", Some(0.113), MODELS, |seed| {
        one(seed, |m, choose| mistakes::sorted_siblings(m, widths(m), choose))
    }),
    rejected("a drawn leaf dropped for being unlikely", Some(0.083), MODELS, |seed| {
        one(seed, |m, choose| mistakes::dropped_leaf(m, 3, choose))
    }),
];

pub const MORE_MISTAKES: &[Claim] = &[
    rejected("two requests, lengths in hindsight", Some(0.167), PAIRS, |seed| {
        let rates = break_even(&two_requests(seed, &[2, 3]));
        two(seed, |requests, choose| {
            let chains = mistakes::lengths_in_hindsight(requests, &rates, choose);
            each(requests, chains, |m, chain| chain::verify(m, chain, choose))
        })
    }),
    rejected("one noise for a draft and its replacement", None, MODELS, |seed| one(seed, mistakes::noise_used_twice)),
    rejected("new noise after a tree that has seen the old", None, MODELS, |seed| new_noise(seed, peeking)),
];

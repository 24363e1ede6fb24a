//! Trees grown best first by confidence, all requests of a batch in one queue: [`super::schedule`], for trees.
//!
//! ```text
//! survival[root] = 1,  survival[child] = survival[parent] · chance that the child is accepted if its parent is
//! add the child that most likely survives, while (expected tokens) · rate[rows] grows; stop at the first drop
//! ```
//!
//! Whether a child is added is decided by its chance. In [`by_noise`] that is the chance of its very token, as in the
//! product: such trees are for match. In [`drawn`] the token is not known before, and siblings are drawn without
//! replacement.

use super::law::{Rational, ratio};
use super::noise::{self, Noise};
use super::schedule::confidence;
use super::{Choose, Models, Tree, without_replacement};

/// The next child of a node, if it is added.
struct Candidate {
    request: usize,
    parent: usize,
    survival: Rational,
}

/// Both functions are given a request, its tree and a node: how likely the node's next child is accepted, if it can
/// have one, and its token.
fn grow(
    requests: &[Models],
    rates: &[Rational],
    chance: impl Fn(usize, &Tree, usize) -> Option<Rational>,
    mut token: impl FnMut(usize, &Tree, usize) -> usize,
) -> Vec<Tree> {
    let mut trees = vec![Tree::root(); requests.len()];
    let mut survival = vec![vec![ratio(1, 1)]; requests.len()];
    let candidate = |trees: &[Tree], survival: &[Vec<Rational>], request: usize, parent: usize| {
        let tree: &Tree = &trees[request];
        let chance = if tree.depth(parent) < requests[request].depth { chance(request, tree, parent) } else { None };
        chance.map(|chance| Candidate { request, parent, survival: &survival[request][parent] * chance })
    };
    let mut queue: Vec<Candidate> =
        (0..requests.len()).filter_map(|request| candidate(&trees, &survival, request, 0)).collect();
    let mut rows = requests.len();
    let mut tokens = ratio(rows, 1);
    while rows + 1 < rates.len() {
        // Of equally likely ones the first that was found.
        let best = (0..queue.len()).max_by(|&a, &b| queue[a].survival.cmp(&queue[b].survival).then(b.cmp(&a)));
        let Some(best) = best else { break };
        let next = queue.remove(best);
        let expected = &tokens + &next.survival;
        if &expected * &rates[rows + 1] <= &tokens * &rates[rows] {
            break;
        }
        (tokens, rows) = (expected, rows + 1);
        let Candidate { request, parent, .. } = next;
        let token = token(request, &trees[request], parent);
        let node = trees[request].push(parent, token);
        survival[request].push(next.survival);
        queue.extend([node, parent].into_iter().filter_map(|node| candidate(&trees, &survival, request, node)));
    }
    trees
}

/// By the target's noise: first what the draft model draws with it, as likely as it is confident; the others share the
/// rest as the draft has them.
pub fn by_noise(requests: &[Models], rates: &[Rational], noises: &[Noise]) -> Vec<Tree> {
    let ranked = |request: usize, tree: &Tree, node: usize| {
        let text = tree.text(node);
        let draft = requests[request].draft.after(&text);
        let first = noise::draws(&noises[request], text.len())(draft);
        let others = draft.ranked().into_iter().filter(|&token| token != first);
        [first].into_iter().chain(others).collect::<Vec<usize>>()
    };
    let chance = |request: usize, tree: &Tree, node: usize| {
        let ranked = ranked(request, tree, node);
        let child = tree.children(node).count();
        let text = tree.text(node);
        let confidence = confidence(&requests[request], &text);
        let draft = requests[request].draft.after(&text);
        let all = ratio(1, 1);
        let &token = ranked.get(child)?;
        Some(if child == 0 { confidence } else { (&all - confidence) * &draft[token] / (&all - &draft[ranked[0]]) })
    };
    grow(requests, rates, chance, |request, tree, node| ranked(request, tree, node)[tree.children(node).count()])
}

/// Siblings drawn without replacement, each as likely to be accepted as the confidence says, if those before are not.
pub fn drawn(requests: &[Models], rates: &[Rational], choose: &mut Choose) -> Vec<Tree> {
    let left = |request: usize, tree: &Tree, node| without_replacement::left(&requests[request].draft, tree, node);
    let chance = |request: usize, tree: &Tree, node: usize| {
        left(request, tree, node)?;
        let confidence = confidence(&requests[request], &tree.text(node));
        let rejected: Rational = tree.children(node).map(|_| ratio(1, 1) - &confidence).product();
        Some(rejected * confidence)
    };
    grow(requests, rates, chance, |request, tree, node| choose(&left(request, tree, node).expect("a token is left")))
}

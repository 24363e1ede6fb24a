//! Known mistakes: rounds that look right and change the law. The proof must reject each on some models.
//!
//! All of them use a rule for something that it does not hold for, but for two that draw wrongly after a rejection.

use std::cmp::Reverse;

use super::law::{Rational, acceptance, coin, ratio};
use super::without_replacement::{self, levels, likeliest_next, reach};
use super::{Choose, Law, Models, Tree, chain, schedule};

/// A chain of the likeliest tokens, verified as if it had been sampled.
pub fn greedy_chain(models: &Models, choose: &mut Choose) -> Vec<usize> {
    let likeliest = &mut |law: &[Rational]| Law::proportional_to(law.to_vec()).ranked()[0];
    let tokens = chain::draw(&models.draft, models.depth, likeliest);
    chain::verify(models, &tokens, choose)
}

/// The two likeliest children of every node, verified as if they had been sampled without replacement.
pub fn likeliest_siblings(models: &Models, choose: &mut Choose) -> Vec<usize> {
    let mut tree = Tree::root();
    let mut node = 0;
    while node < tree.len() {
        if tree.depth(node) < models.depth {
            for &token in models.draft.after(&tree.text(node)).ranked().iter().take(2) {
                tree.push(node, token);
            }
        }
        node += 1;
    }
    without_replacement::verify(models, &tree, choose)
}

/// A chain sampled at half the temperature that the rule is told.
pub fn another_draft_law(models: &Models, choose: &mut Choose) -> Vec<usize> {
    let sharper =
        |law: &[Rational]| Law::proportional_to(law.iter().map(|probability| probability * probability).collect());
    let tokens = chain::draw(&models.draft, models.depth, &mut |law| choose(&sharper(law)));
    chain::verify(models, &tokens, choose)
}

/// After a rejection the target's own law, and not the residual.
pub fn no_residual(models: &Models, choose: &mut Choose) -> Vec<usize> {
    by_token(models, |target, _, _| target.clone(), choose)
}

/// The draw after a rejection by the very noise that drew the rejected token.
pub fn noise_used_twice(models: &Models, choose: &mut Choose) -> Vec<usize> {
    by_token(models, |target, draft, token| given_noise(&target.residual(draft), draft, token), choose)
}

/// [`chain::verify`] of a sampled chain, with another law to draw from in place of a rejected token.
fn by_token(models: &Models, instead: impl Fn(&Law, &Law, usize) -> Law, choose: &mut Choose) -> Vec<usize> {
    let mut text = vec![];
    for token in chain::draw(&models.draft, models.depth, choose) {
        let (target, draft) = models.after(&text);
        if !coin(&acceptance(&target[token], &draft[token]), choose) {
            text.push(choose(&instead(target, draft, token)));
            return text;
        }
        text.push(token);
    }
    text.push(choose(models.target.after(&text)));
    text
}

/// What a uniform number draws from `law` if it has drawn `token` from `draft`.
fn given_noise(law: &Law, draft: &Law, token: usize) -> Law {
    let part = |law: &Law, token: usize| -> [Rational; 2] { [law[..token].iter().sum(), law[..=token].iter().sum()] };
    let [from, to] = part(draft, token);
    let overlap = |token| {
        let [start, end] = part(law, token);
        (end.min(to.clone()) - start.max(from.clone())).max(ratio(0, 1))
    };
    Law::proportional_to((0..law.len()).map(overlap).collect())
}

/// Chains cut where throughput is best, in view of all their tokens.
pub fn lengths_in_hindsight(requests: &[Models], rates: &[Rational], choose: &mut Choose) -> Vec<Vec<usize>> {
    let mut chains: Vec<Vec<usize>> =
        requests.iter().map(|models| chain::draw(&models.draft, models.depth, choose)).collect();
    let throughput = |lengths: &Vec<usize>| {
        let kept = |request: usize| schedule::survivors(&requests[request], &chains[request][..lengths[request]]);
        let tokens = (0..requests.len()).map(kept).sum::<Rational>() + ratio(requests.len(), 1);
        tokens * &rates[requests.len() + lengths.iter().sum::<usize>()]
    };
    let best = all_lengths(requests).into_iter().max_by_key(throughput).expect("no drafts at all, at least");
    for (chain, length) in chains.iter_mut().zip(best) {
        chain.truncate(length);
    }
    chains
}

fn all_lengths(requests: &[Models]) -> Vec<Vec<usize>> {
    requests.iter().fold(vec![vec![]], |all, models| {
        let longer =
            |lengths: &Vec<usize>| (0..=models.depth).map(|length| [&lengths[..], &[length]].concat()).collect();
        all.iter().flat_map::<Vec<_>, _>(longer).collect()
    })
}

/// Two samples at every position, of which the likelier is verified as if it were the only one.
pub fn better_of_two(models: &Models, choose: &mut Choose) -> Vec<usize> {
    let likelier = &mut |law: &[Rational]| {
        let (first, second) = (choose(law), choose(law));
        if law[second] > law[first] { second } else { first }
    };
    let tokens = chain::draw(&models.draft, models.depth, likelier);
    chain::verify(models, &tokens, choose)
}

/// Siblings drawn without replacement and verified likeliest first.
pub fn sorted_siblings(models: &Models, widths: &[usize], choose: &mut Choose) -> Vec<usize> {
    let drawn = without_replacement::draw(models, levels(widths), choose);
    let mut sorted = Tree::root();
    let mut copies = vec![(0, 0)];
    while let Some((from, to)) = copies.pop() {
        let mut children: Vec<usize> = drawn.children(from).collect();
        let draft = models.draft.after(&drawn.text(from));
        children.sort_by_key(|&child| Reverse(&draft[drawn.token(child)]));
        copies.extend(children.into_iter().map(|child| (child, sorted.push(to, drawn.token(child)))));
    }
    without_replacement::verify(models, &sorted, choose)
}

/// A tree grown where the draft is likeliest, one node too many, of which the least likely leaf is then dropped.
pub fn dropped_leaf(models: &Models, nodes: usize, choose: &mut Choose) -> Vec<usize> {
    let drawn = without_replacement::draw(models, likeliest_next(models, nodes + 1), choose);
    let leaves = (1..drawn.len()).filter(|&node| drawn.children(node).next().is_none());
    let dropped = leaves.min_by(|&a, &b| reach(models, &drawn, a).cmp(&reach(models, &drawn, b)));
    let mut tree = Tree::root();
    let mut copy = vec![0];
    for node in 1..drawn.len() {
        let parent = copy[drawn.parent(node)];
        copy.push(if Some(node) == dropped { usize::MAX } else { tree.push(parent, drawn.token(node)) });
    }
    without_replacement::verify(models, &tree, choose)
}

//! A sampled tree whose siblings were drawn without replacement (Sequoia, Chen et al., 2024).
//!
//! At a node, in the order of drawing:
//!
//! ```text
//! keep x with probability min(1, target(x) / draft(x)) and go on below it
//! else  target = max(target - draft, 0), normalised;  draft = draft without x, normalised
//! no child kept: one token more is drawn from what is left of the target
//! ```
//!
//! Where the next child is drawn may depend on everything drawn so far, but what was drawn stays.

use std::cmp::Reverse;

use super::law::{Rational, acceptance, coin, ratio};
use super::model::Model;
use super::{Choose, Law, Models, Tree};

/// Draws node by node. `next` sees the tree and the nodes that can have another child, and names one, or none to end.
pub fn draw(models: &Models, mut next: impl FnMut(&Tree, &[usize]) -> Option<usize>, choose: &mut Choose) -> Tree {
    let mut tree = Tree::root();
    loop {
        let left: Vec<(usize, Law)> = (0..tree.len())
            .filter(|&node| tree.depth(node) < models.depth)
            .filter_map(|node| Some((node, left(&models.draft, &tree, node)?)))
            .collect();
        let open: Vec<usize> = left.iter().map(|(node, _)| *node).collect();
        let Some(parent) = next(&tree, &open) else { return tree };
        let (_, law) = left.iter().find(|(node, _)| *node == parent).expect("one of the open nodes");
        tree.push(parent, choose(law));
    }
}

pub fn verify(models: &Models, tree: &Tree, choose: &mut Choose) -> Vec<usize> {
    let mut node = 0;
    loop {
        let mut text = tree.text(node);
        let (target, draft) = models.after(&text);
        let (mut target, mut draft) = (target.clone(), Some(draft.clone()));
        let mut kept = None;
        for child in tree.children(node) {
            let token = tree.token(child);
            let law = draft.expect("a child that was drawn from it");
            if coin(&acceptance(&target[token], &law[token]), choose) {
                kept = Some(child);
                break;
            }
            target = target.residual(&law);
            draft = law.without(token);
        }
        match kept {
            Some(child) => node = child,
            None => {
                text.push(choose(&target));
                return text;
            }
        }
    }
}

/// A `next` that draws a fixed shape: how many children the nodes of each level have.
pub fn levels(widths: &[usize]) -> impl Fn(&Tree, &[usize]) -> Option<usize> {
    |tree, open| open.iter().copied().find(|&node| tree.children(node).count() < widths[tree.depth(node)])
}

/// A `next` that draws a given shape, whatever its tokens, as far as the draft has some.
pub fn shape(shape: &Tree) -> impl Fn(&Tree, &[usize]) -> Option<usize> {
    |tree, open| {
        let has_room = |&node: &usize| tree.children(node).count() < shape.children(place(shape, tree, node)).count();
        open.iter().copied().find(has_room)
    }
}

/// Where in a shape a drawn node stands: the first child that was drawn takes the place of the first, and so on.
fn place(shape: &Tree, tree: &Tree, node: usize) -> usize {
    if node == 0 {
        return 0;
    }
    let parent = tree.parent(node);
    let rank = tree.children(parent).position(|child| child == node).expect("its parent's child");
    shape.children(place(shape, tree, parent)).nth(rank).expect("a place for every drawn node")
}

/// A `next` that grows up to `nodes` drafted nodes where the draft is likeliest to go (DySpec, Xiong et al., 2024).
pub fn likeliest_next(models: &Models, nodes: usize) -> impl Fn(&Tree, &[usize]) -> Option<usize> {
    move |tree, open| {
        let value = |&node: &usize| {
            let draft = models.draft.after(&tree.text(node));
            let drawn: Rational = tree.children(node).map(|child| &draft[tree.token(child)]).sum();
            (reach(models, tree, node) * (ratio(1, 1) - drawn), Reverse(node))
        };
        if tree.len() > nodes { None } else { open.iter().copied().max_by_key(value) }
    }
}

/// How likely the draft goes through a node.
pub fn reach(models: &Models, tree: &Tree, node: usize) -> Rational {
    let text = tree.text(node);
    (0..text.len()).map(|i| models.draft.after(&text[..i])[text[i]].clone()).product()
}

/// The law of a node's next child, if the draft has a token left.
pub fn left(draft: &Model, tree: &Tree, node: usize) -> Option<Law> {
    let law = draft.after(&tree.text(node)).clone();
    tree.children(node).try_fold(law, |law, child| law.without(tree.token(child)))
}

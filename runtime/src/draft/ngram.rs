//! The n-gram drafter: what followed the last few tokens when they occurred before, in the prompt or in the generated
//! text. No weights. Several earlier occurrences are merged into one tree.
//!
//! Saxena, "Prompt Lookup Decoding" (2023), is the chain of one match; here every match adds a branch, and each node's
//! survival is estimated from measured hit rates by how long its match is.

use std::collections::{BinaryHeap, HashMap};

use treespark_kernel_gen::TreeShape;

use super::{Draft, Drafter, HitRates, Plan};
use crate::backend::Backend;
use crate::error::Result;
use crate::network::Network;
use crate::sequence::Sequence;
use crate::tree::Accepted;

/// Longest match that is told apart from longer ones.
const MAX_MATCH: usize = 12;
/// Earlier occurrences of the last token that are looked at, the latest first, and how many are followed.
const MAX_OCCURRENCES: usize = 512;
const MAX_FOLLOWED: usize = 32;
/// Tokens taken from one occurrence.
const MAX_DEPTH: usize = 24;
/// Nodes of a tree that the device drafts: more are seldom accepted, and the next larger pass costs more.
const NODES_ON_DEVICE: usize = 16;
/// Hit rates before anything is measured, by match class: first continuations, then further siblings.
const PRIORS: [f32; 2 * MATCH_CLASSES] = [0.08, 0.2, 0.35, 0.55, 0.7, 0.85, 0.04, 0.08, 0.12, 0.15, 0.15, 0.1];
const MATCH_CLASSES: usize = 6;

#[derive(Debug)]
pub struct NgramDrafter {
    /// By sequence.
    texts: HashMap<u64, Text>,
    rates: HitRates,
}

/// What is known of one sequence.
#[derive(Debug, Default)]
struct Text {
    /// Where each token was followed by something: index of that something, ascending.
    follows: HashMap<u32, Vec<usize>>,
    /// Tokens that are in the index.
    indexed: usize,
    /// Class of every node of the last proposal.
    classes: Vec<usize>,
}

impl Default for NgramDrafter {
    fn default() -> NgramDrafter {
        NgramDrafter { texts: HashMap::new(), rates: HitRates::new(&PRIORS) }
    }
}

/// A merged continuation, before nodes are chosen.
struct Trie {
    nodes: Vec<TrieNode>,
}

struct TrieNode {
    token: u32,
    class: usize,
    survival: f32,
    children: Vec<usize>,
}

/// Class of a node whose context, the path included, matches over `matched` tokens.
fn class(matched: usize, first: bool) -> usize {
    let by_length = match matched {
        0..=1 => 0,
        2 => 1,
        3 => 2,
        4..=5 => 3,
        6..=8 => 4,
        _ => 5,
    };
    if first { by_length } else { by_length + MATCH_CLASSES }
}

impl Text {
    /// Adds what is new.
    fn index(&mut self, context: &[u32]) {
        for at in self.indexed.max(1)..context.len() {
            self.follows.entry(context[at - 1]).or_default().push(at);
        }
        self.indexed = context.len();
    }

    /// Earlier occurrences of the context's end: (match length, index of what followed), longest and latest first.
    fn matches(&self, context: &[u32]) -> Vec<(usize, usize)> {
        let found = self.follows.get(&context[context.len() - 1]).map_or(&[][..], Vec::as_slice);
        let length = |at: usize| {
            let pairs = context[..at].iter().rev().zip(context.iter().rev());
            pairs.take(MAX_MATCH).take_while(|(a, b)| a == b).count()
        };
        let mut list: Vec<_> = found.iter().rev().take(MAX_OCCURRENCES).map(|&at| (length(at), at)).collect();
        list.sort_unstable_by_key(|&(length, at)| std::cmp::Reverse((length, at)));
        list.truncate(MAX_FOLLOWED);
        list
    }
}

impl NgramDrafter {
    /// What followed the end of a sequence's text before; the root is its last token. A text only grows.
    pub fn continue_text(&mut self, sequence: u64, text: &[u32], plan: &Plan) -> Result<Draft> {
        let mut known = self.texts.remove(&sequence).unwrap_or_default();
        known.index(text);
        let depth = plan.max_depth.min(plan.shape.as_ref().map_or(MAX_DEPTH, TreeShape::max_depth));
        let trie = self.merge(&known, text, depth);
        let mut draft = Draft::root(text[text.len() - 1]);
        known.classes = vec![0];
        match &plan.shape {
            Some(shape) => fill(&trie, &mut draft, &mut known.classes, shape, plan.max_depth)?,
            None => best_first(&trie, &mut draft, &mut known.classes, plan.max_nodes)?,
        }
        self.texts.insert(sequence, known);
        Ok(draft)
    }

    fn merge(&self, known: &Text, context: &[u32], depth: usize) -> Trie {
        let root = TrieNode { token: context[context.len() - 1], class: 0, survival: 1.0, children: Vec::new() };
        let mut trie = Trie { nodes: vec![root] };
        for (matched, at) in known.matches(context) {
            let mut continuation: Vec<u32> = Vec::with_capacity(depth);
            let mut node = 0;
            for i in 0..depth {
                // An occurrence that overlaps the context's end repeats itself.
                let token = *context.get(at + i).unwrap_or_else(|| &continuation[at + i - context.len()]);
                continuation.push(token);
                node = self.child(&mut trie, node, token, matched + i);
            }
        }
        trie
    }

    fn child(&self, trie: &mut Trie, parent: usize, token: u32, matched: usize) -> usize {
        let siblings = &trie.nodes[parent].children;
        if let Some(&known) = siblings.iter().find(|&&child| trie.nodes[child].token == token) {
            return known;
        }
        let class = class(matched, siblings.is_empty());
        let survival = trie.nodes[parent].survival * self.rates.rate(class);
        let node = trie.nodes.len();
        trie.nodes.push(TrieNode { token, class, survival, children: Vec::new() });
        trie.nodes[parent].children.push(node);
        node
    }
}

fn take(draft: &mut Draft, classes: &mut Vec<usize>, parent: usize, from: &TrieNode) -> Result<usize> {
    let node = draft.tree.push(parent, from.token)?;
    draft.survival.push(from.survival);
    classes.push(from.class);
    Ok(node)
}

/// The most likely nodes first. Ties go to the older node, so parents come before children.
fn best_first(trie: &Trie, draft: &mut Draft, classes: &mut Vec<usize>, max_nodes: usize) -> Result<()> {
    let key = |node: usize| (trie.nodes[node].survival.to_bits(), std::cmp::Reverse(node));
    let mut frontier = BinaryHeap::new();
    frontier.extend(trie.nodes[0].children.iter().map(|&child| (key(child), 0)));
    while let Some(((_, std::cmp::Reverse(node)), parent)) = frontier.pop() {
        if draft.tree.len() == max_nodes {
            break;
        }
        let taken = take(draft, classes, parent, &trie.nodes[node])?;
        frontier.extend(trie.nodes[node].children.iter().map(|&child| (key(child), taken)));
    }
    Ok(())
}

/// Fills a shape: its i-th child of a node takes the i-th continuation there. What has none is left out.
fn fill(trie: &Trie, draft: &mut Draft, classes: &mut Vec<usize>, shape: &TreeShape, max_depth: usize) -> Result<()> {
    // For every node of the shape: its trie node and its node in the draft.
    let mut placed: Vec<Option<(usize, usize)>> = vec![Some((0, 0))];
    let mut used = vec![0; shape.len()];
    for node in 1..shape.len() {
        let parent = shape.parent(node);
        let rank = used[parent];
        used[parent] += 1;
        let found = placed[parent]
            .and_then(|(at, drafted)| trie.nodes[at].children.get(rank).map(|&child| (child, drafted)))
            .filter(|_| shape.depth(node) <= max_depth);
        placed.push(match found {
            Some((child, drafted)) => Some((child, take(draft, classes, drafted, &trie.nodes[child])?)),
            None => None,
        });
    }
    Ok(())
}

impl Drafter for NgramDrafter {
    fn name(&self) -> &'static str {
        "ngram"
    }

    fn propose(&mut self, _: &mut dyn Backend, _: &mut Network, seq: &mut Sequence, plan: &Plan) -> Result<Draft> {
        self.continue_text(seq.id(), seq.tokens(), plan)
    }

    fn observe(&mut self, seq: &Sequence, draft: &Draft, accepted: &Accepted) {
        if let Some(known) = self.texts.get(&seq.id()) {
            self.rates.learn(&draft.tree, &known.classes, &accepted.tokens);
        }
    }

    fn forget(&mut self, seq: &Sequence) {
        self.texts.remove(&seq.id());
    }

    fn nodes_on_device(&self) -> Option<usize> {
        Some(NODES_ON_DEVICE)
    }
}

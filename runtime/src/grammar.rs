//! Grammars: an answer that is JSON, or matches an expression.
//!
//! Behind every text a grammar allows some tokens and forbids the others, whose logits the target's pass makes minus infinity
//! before it draws. What is allowed depends on nothing but the text behind which a node stands, so a node of a tree has the
//! very mask that plain decoding would have there: speculation changes no token. The crate `llguidance` computes the masks.
//!
//! It costs the host a mask for every node that is verified, tens of microseconds to a millisecond each (the larger the
//! vocabulary and the freer the grammar at that place), and the device `vocab / 8` bytes of it. Sequences without a grammar
//! pay nothing, unless they share a pass with one that has.

mod engine;
mod source;
mod walk;

pub use engine::GrammarEngine;
pub use source::GrammarSource;

use std::fmt;
use std::sync::Arc;

use llguidance::Matcher;

use crate::error::{Error, Result};
use crate::tree::TokenTree;
use walk::Walk;

/// A compiled grammar behind what a sequence has generated so far. A clone goes its own way.
#[derive(Clone)]
pub struct Grammar {
    state: Matcher,
    stop_tokens: Arc<[u32]>,
    vocab: usize,
    /// Why there is no mask for the next token.
    failure: Option<String>,
}

impl Grammar {
    /// Words of a mask.
    pub fn words(&self) -> usize {
        self.vocab.div_ceil(32)
    }

    /// The nodes of a drafted tree that the grammar allows, ascending; the others could never be accepted, nor what is below
    /// them. The root stands behind the text so far.
    pub fn allowed(&self, tree: &TokenTree) -> Vec<usize> {
        let mut walk = Walk::new(self, tree, 0);
        (0..tree.len()).filter(|&node| walk.allows(node)).collect()
    }

    /// Adds a mask for each node: bit t is set if token t may follow. The first `given` nodes end with the text so far, and only
    /// the last of these and what is below it is asked. A tree of which the grammar cannot tell everything is cut.
    pub fn masks(&mut self, tree: &mut TokenTree, given: usize, masks: &mut Vec<u32>) {
        let (root, words) = (given - 1, self.words());
        let mut walk = Walk::new(self, tree, root);
        let mut failure = None;
        let mut nodes = 0;
        for node in 0..tree.len() {
            // Behind a stop token nothing is drawn that anyone hears of.
            if node < root || (node > root && walk.is_stop(node)) {
                masks.resize(masks.len() + words, u32::MAX);
            } else {
                match walk.mask(node) {
                    Ok(mask) => masks.extend(&mask.as_slice()[..words]),
                    Err(why) if node == root => {
                        failure = Some(why);
                        masks.resize(masks.len() + words, u32::MAX);
                    }
                    // Plain decoding need never come here.
                    Err(_) => break,
                }
            }
            nodes += 1;
        }
        tree.truncate(nodes);
        self.failure = failure;
    }

    /// Goes on behind what was accepted, up to a stop token.
    pub fn advance(&mut self, tokens: &[u32]) -> Result<()> {
        if let Some(why) = self.failure.take() {
            return Err(Error::Grammar(why));
        }
        let text = tokens.split(|token| self.stop_tokens.contains(token)).next().unwrap_or_default();
        self.state.consume_tokens(text).map_err(|error| Error::Grammar(told(&error)))
    }

    fn is_stop(&self, token: u32) -> bool {
        self.stop_tokens.contains(&token)
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("vocab", &self.vocab).field("failure", &self.failure).finish_non_exhaustive()
    }
}

/// For people: without the library's remarks on how much it tells.
fn told(error: &impl ToString) -> String {
    let text = error.to_string();
    match text.trim_end_matches("<non-verbose/>").trim_end() {
        "NoExtensionBias" => "no token of the vocabulary goes on from here".to_string(),
        text => text.to_string(),
    }
}

#[cfg(test)]
mod tests;

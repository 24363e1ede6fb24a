//! A shape with a token per node, and what the target accepted of it.

use treespark_kernel_gen::{TreeShape, layout};

use crate::error::{Error, Result};

/// A speculation tree. Node 0 is the last committed token; every other node is a guess.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenTree {
    shape: TreeShape,
    tokens: Vec<u32>,
}

impl TokenTree {
    /// Only the root: plain decoding.
    pub fn root(token: u32) -> TokenTree {
        TokenTree { shape: TreeShape::root(), tokens: vec![token] }
    }

    /// A chain of tokens, the first being the root. A prompt is a chain that nobody doubts.
    pub fn chain(tokens: &[u32]) -> Result<TokenTree> {
        let shape = TreeShape::chain(tokens.len().saturating_sub(1)).map_err(Error::Shape)?;
        Ok(TokenTree { shape, tokens: tokens.to_vec() })
    }

    /// Adds a child and returns its node.
    pub fn push(&mut self, parent: usize, token: u32) -> Result<usize> {
        let node = self.shape.push(parent).map_err(Error::Shape)?;
        self.tokens.push(token);
        Ok(node)
    }

    /// The first `nodes` nodes, which are a tree themselves.
    pub fn truncate(&mut self, nodes: usize) {
        if nodes < self.len() {
            self.shape = self.shape.prefix(nodes);
            self.tokens.truncate(nodes);
        }
    }

    /// Number of nodes, root included.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn shape(&self) -> &TreeShape {
        &self.shape
    }

    pub fn token(&self, node: usize) -> u32 {
        self.tokens[node]
    }

    /// The child of `node` that holds `token`, lowest id first.
    pub fn child_with(&self, node: usize, token: u32) -> Option<usize> {
        (node + 1..self.len()).find(|&child| self.shape.parent(child) == node && self.tokens[child] == token)
    }
}

/// The path whose tokens are the target's own, and the draws along it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Accepted node ids, ascending, the root first.
    pub path: Vec<usize>,
    /// The target's draw at every node of the path: the accepted draft tokens, then exactly one bonus token.
    pub tokens: Vec<u32>,
}

impl Accepted {
    /// Reads one request's words of an `accepted` buffer (`layout::accepted_words`).
    pub fn from_words(words: &[u32], max_nodes: usize) -> Accepted {
        let n = words[0] as usize;
        let path = words[1..1 + n].iter().map(|&node| node as usize).collect();
        let tokens = words[1 + max_nodes..1 + max_nodes + n].to_vec();
        Accepted { path, tokens }
    }

    /// All nodes of a chain that nobody doubts; what follows it is not known.
    pub fn given(chain: &TokenTree) -> Accepted {
        Accepted { path: (0..chain.len()).collect(), tokens: chain.tokens.clone() }
    }

    /// The same, unless the target drew a token from logits that are no numbers. The path begins at position `prefix`.
    pub fn checked(self, prefix: usize) -> Result<Accepted> {
        match self.tokens.iter().position(|&token| token == layout::NO_TOKEN) {
            Some(depth) => Err(Error::NotANumber { position: prefix + depth }),
            None => Ok(self),
        }
    }

    /// Accepted draft tokens, the bonus token not counted.
    pub fn draft_len(&self) -> usize {
        self.path.len() - 1
    }

    /// How many of its rows already lie next to the prefix.
    pub fn in_place(&self) -> usize {
        self.path.iter().enumerate().take_while(|&(depth, &node)| depth == node).count()
    }
}

/// The words of one request in an `accepted` buffer of the size that every pass uses.
pub const ACCEPTED_WORDS: usize = layout::accepted_words(layout::MAX_NODES);

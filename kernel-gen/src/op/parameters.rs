//! What ops are told beside their buffers: trees, cache and block shapes, routing.

use crate::TreeShape;
use crate::pass::Buf;

/// Which trees a kernel is compiled for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TreeSpec {
    /// Any tree of up to this many nodes; ancestor words are read from the rows.
    Any(usize),
    /// Exactly this tree (or a prefix of its nodes); ancestor words are constants of the kernel.
    Static(TreeShape),
}

impl TreeSpec {
    pub fn max_nodes(&self) -> usize {
        match self {
            TreeSpec::Any(n) => *n,
            TreeSpec::Static(shape) => shape.len(),
        }
    }
}

/// Sizes of a paged cache buffer, `[layers, pages, kv_heads, page_size, head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheShape {
    pub layers: usize,
    pub pages: usize,
    pub kv_heads: usize,
    pub page_size: usize,
    pub head_dim: usize,
}

impl CacheShape {
    pub fn dims(&self) -> Vec<usize> {
        vec![self.layers, self.pages, self.kv_heads, self.page_size, self.head_dim]
    }

    /// Element index of `[layer, page, head, place, 0]`.
    pub fn index(&self, layer: usize, page: usize, head: usize, place: usize) -> usize {
        (((layer * self.pages + page) * self.kv_heads + head) * self.page_size + place) * self.head_dim
    }
}

/// The batch buffers that most ops read (see [`layout`](crate::layout)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// U32 `[R, Row::WORDS]`
    pub rows: Buf,
    /// U32 `[HEADER_WORDS + B * Request::WORDS]`
    pub requests: Buf,
    /// U32 `[B, pages_per_request]`
    pub pages: Buf,
}

/// The rows of a block that a parallel drafter fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockShape {
    pub rows: usize,
    /// The row that predicts depth 1: 0, or 1 where the first is dropped.
    pub first: usize,
    /// What the rows hold.
    pub fill: Fill,
}

/// What the rows of a block hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// The last token, then this one, each row seeing all (DSpark).
    Mask(u32),
    /// The last token; their node is the last accepted one's row in the round before, whose hidden state they read (Medusa).
    State,
}

impl BlockShape {
    /// Tokens that a block predicts.
    pub fn depth(&self) -> usize {
        self.rows - self.first
    }

    /// As many of its rows as predict so many tokens, if it has more.
    pub fn shortened(&self, depth: usize) -> BlockShape {
        BlockShape { rows: self.rows.min(self.first + depth.max(1)), ..*self }
    }
}

/// Most requests whose blocks are opened together: one thread looks at each.
pub const MAX_OPENED: usize = 1024;

/// How a router makes an expert's score of its logit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scoring {
    /// Over all experts (DeepSeek-V2).
    Softmax,
    /// Each by itself (DeepSeek-V3).
    Sigmoid,
}

/// What a group of experts is worth: of the scores that experts are chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GroupScore {
    /// The largest (DeepSeek-V2).
    Largest,
    /// The sum of the two largest (DeepSeek-V3).
    TwoLargest,
}

/// How a router chooses, for [`Op::Route`](super::Op::Route).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    pub scoring: Scoring,
    /// Experts come in so many groups of one size, and are chosen from the best `top_groups` of them.
    pub groups: usize,
    pub top_groups: usize,
    pub group_score: GroupScore,
    /// Weights of the chosen add up to `scale`; else each is its score times `scale`.
    pub normalise: bool,
    pub scale: f32,
}

/// Most experts of a router: one thread block holds them all.
pub const MAX_EXPERTS: usize = 512;
/// Most experts of a row.
pub const MAX_CHOSEN: usize = 16;

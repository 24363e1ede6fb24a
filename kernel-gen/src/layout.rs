//! How a batch lies in device memory: the words that Rust, WGSL and CUDA agree on.
//!
//! A pass works on *rows*. Prefill or decode, chain or tree, one request or many: a row is one token at one
//! position of one request, with the ancestor bits of its node. Everything is 32-bit words, so that no language's
//! padding rules matter.
//!
//! ```text
//! rows      [max_rows, Row::WORDS]
//! requests  [HEADER_WORDS + max_requests * Request::WORDS]   header: n_rows, n_requests, 0, 0
//! pages     [max_requests, pages_per_request]                page of the pool that holds slots p*PAGE .. (p+1)*PAGE
//! seen      [max_requests, ceil(vocab / 32)]                 bit t set: token t occurred (for the repetition penalty)
//! allowed   [rows of the logits, ceil(vocab / 32)]           bit t set: token t may be drawn at this row (under a grammar)
//! accepted  [max_requests, accepted_words(max_nodes)]        count, path node ids, emitted tokens
//! history   [max_requests, tokens]                           what an n-gram drafter on the device looks through
//! state     [max_requests, ..]                               what a drafter tells the host (RoundReport) and remembers
//! ```
//!
//! A request's committed prefix of length L fills cache slots 0..L; node n of its tree has slot L + n, and position
//! L + depth(n). Slot s lies in page `pages[request][s / PAGE]`, at place `s % PAGE`.

/// Largest tree (and largest prefill chunk of one request in one pass), in nodes.
pub const MAX_NODES: usize = 256;
/// Ancestor words a row carries: one bit per node.
pub const ANCESTOR_WORDS: usize = MAX_NODES / 32;
/// Words before the first [`Request`] in the `requests` buffer: `n_rows, n_requests, 0, 0`.
pub const HEADER_WORDS: usize = 4;
/// What a draw holds when the logits of its row contain a NaN. It equals no token.
pub const NO_TOKEN: u32 = u32::MAX;

/// One row of a pass: a token at a position, seeing the committed prefix and its own ancestors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub token: u32,
    /// Absolute position: prefix length + depth of the node. Rope and the noise of a draw use this.
    pub position: u32,
    /// Index of the request in the `requests` buffer.
    pub request: u32,
    /// Node index within the request's tree; the row's cache slot is `prefix + node`.
    pub node: u32,
    /// Bit j: the row sees node j, which in a tree is this node or an ancestor of it. Bit `node` is always set. In a block
    /// that a parallel drafter fills, all rows see all nodes, and node j stands at position `prefix + j`.
    pub ancestors: [u32; ANCESTOR_WORDS],
}

impl Row {
    pub const WORDS: usize = 4 + ANCESTOR_WORDS;

    pub fn to_words(&self) -> [u32; Self::WORDS] {
        let mut words = [0; Self::WORDS];
        words[..4].copy_from_slice(&[self.token, self.position, self.request, self.node]);
        words[4..].copy_from_slice(&self.ancestors);
        words
    }

    /// Reads row `index` of a `rows` buffer.
    pub fn read(rows: &[u32], index: usize) -> Row {
        let words = &rows[index * Self::WORDS..(index + 1) * Self::WORDS];
        let mut ancestors = [0; ANCESTOR_WORDS];
        ancestors.copy_from_slice(&words[4..]);
        Row { token: words[0], position: words[1], request: words[2], node: words[3], ancestors }
    }

    pub fn is_ancestor(&self, node: usize) -> bool {
        self.ancestors[node / 32] >> (node % 32) & 1 == 1
    }

    /// Node ids of the path root..=this node, ascending (parents come before children). The i-th has depth i.
    pub fn path(&self) -> impl Iterator<Item = usize> + '_ {
        (0..MAX_NODES).filter(|&node| self.is_ancestor(node))
    }
}

/// What a pass must know of one request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Request {
    /// Committed cache length L.
    pub prefix: u32,
    /// First row of this request in the `rows` buffer; its rows are consecutive, in node order.
    pub first_row: u32,
    /// Rows of this request in the pass.
    pub n_rows: u32,
    /// Which sample of the same prompt this is: part of the noise key.
    pub sample: u32,
    /// Seed of the noise, low and high word.
    pub seed: [u32; 2],
    /// 0 draws the argmax.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens with this mass; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of seen tokens; 1 does nothing.
    pub repetition_penalty: f32,
    /// The first so many nodes are a chain that is accepted whatever is drawn: a prompt, or a part of one.
    pub given: u32,
}

impl Request {
    pub const WORDS: usize = 12;

    /// The words, in field order.
    pub fn to_words(&self) -> [u32; Self::WORDS] {
        [
            self.prefix,
            self.first_row,
            self.n_rows,
            self.sample,
            self.seed[0],
            self.seed[1],
            self.temperature.to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.repetition_penalty.to_bits(),
            self.given,
        ]
    }

    /// Reads request `index` of a `requests` buffer (behind the header).
    pub fn read(requests: &[u32], index: usize) -> Request {
        let w = &requests[HEADER_WORDS + index * Self::WORDS..][..Self::WORDS];
        Request {
            prefix: w[0],
            first_row: w[1],
            n_rows: w[2],
            sample: w[3],
            seed: [w[4], w[5]],
            temperature: f32::from_bits(w[6]),
            top_k: w[7],
            top_p: f32::from_bits(w[8]),
            min_p: f32::from_bits(w[9]),
            repetition_penalty: f32::from_bits(w[10]),
            given: w[11],
        }
    }
}

/// Words of one request in the `accepted` buffer: `[n, path[max_nodes], tokens[max_nodes]]`.
/// `n` counts the accepted nodes, root included: 0 only if the request has no rows. `path[..n]` are their ids, ascending
/// from the root's, 0;
/// `tokens[i]` is what follows `path[i]`: the token of the next node of the path, which where it is not given is the target's
/// draw; behind the last, the draw. So `tokens[..n]` are the accepted tokens and the bonus token.
pub const fn accepted_words(max_nodes: usize) -> usize {
    1 + 2 * max_nodes
}

/// Words of one request in the `state` buffer of an n-gram drafter whose trees have up to so many nodes: the report, and
/// the drafter's hit rates. The host writes the first word: how many tokens the request's history may have.
pub const fn ngram_state_words(nodes: usize) -> usize {
    report_words(nodes) + NGRAM_RATE_WORDS
}

/// The nodes whose state has so many words.
pub const fn ngram_nodes(state_words: usize) -> usize {
    state_words.saturating_sub(NGRAM_RATE_WORDS + 4) / 4
}

/// Words of a [`RoundReport`].
pub const fn report_words(nodes: usize) -> usize {
    4 + 4 * nodes
}

/// Hits and trials of 12 classes of nodes.
const NGRAM_RATE_WORDS: usize = 2 * 12;

/// The first words of a request's state, as the host reads them after a round. The host writes the limit: how many tokens
/// the request may have. `[limit, nodes, rows, accepted, tokens[nodes], links[nodes], path[nodes], drawn[nodes]]`; the second
/// word is the n-gram drafter's own.
#[derive(Debug, Clone, Copy)]
pub struct RoundReport<'a> {
    words: &'a [u32],
    max_nodes: usize,
}

impl<'a> RoundReport<'a> {
    pub fn new(words: &'a [u32], max_nodes: usize) -> RoundReport<'a> {
        RoundReport { words: &words[..report_words(max_nodes)], max_nodes }
    }

    /// Nodes of the next tree that have a row; 0 where the history has reached its limit.
    pub fn rows(&self) -> usize {
        self.words[2] as usize
    }

    pub fn token(&self, node: usize) -> u32 {
        self.words[4 + node]
    }

    pub fn parent(&self, node: usize) -> usize {
        (self.words[4 + self.max_nodes + node] & 0xff) as usize
    }

    /// Node ids that the last round accepted, as in `accepted`.
    pub fn path(&self) -> &'a [u32] {
        &self.words[4 + 2 * self.max_nodes..][..self.words[3] as usize]
    }

    /// The draws along the path.
    pub fn drawn(&self) -> &'a [u32] {
        &self.words[4 + 3 * self.max_nodes..][..self.words[3] as usize]
    }
}

//! A ragged batch as a test states it, and the words it becomes. Depths and ancestors come from `parents` by walking
//! up, one node at a time.

use treespark::Sampling;
use treespark_kernel_gen::{ANCESTOR_WORDS, Request, Row};

use crate::near_tie::DrawContext;

/// A tree with a token per node: `parents[n] < n`, and `parents[0] == 0` is the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    pub parents: Vec<usize>,
    pub tokens: Vec<u32>,
}

impl Tree {
    /// Each token the child of the one before.
    pub fn chain(tokens: &[u32]) -> Tree {
        Tree { parents: (0..tokens.len()).map(|n| n.saturating_sub(1)).collect(), tokens: tokens.to_vec() }
    }

    pub fn nodes(&self) -> usize {
        self.parents.len()
    }

    /// The tree of the first `nodes` nodes.
    pub fn first(&self, nodes: usize) -> Tree {
        Tree { parents: self.parents[..nodes].to_vec(), tokens: self.tokens[..nodes].to_vec() }
    }

    /// Node ids from the root to `node`, both included.
    pub fn path(&self, node: usize) -> Vec<usize> {
        let mut path = vec![node];
        while path[path.len() - 1] != 0 {
            path.push(self.parents[path[path.len() - 1]]);
        }
        path.reverse();
        path
    }

    pub fn depth(&self, node: usize) -> usize {
        self.path(node).len() - 1
    }

    /// The tokens from the root to `node`.
    pub fn path_tokens(&self, node: usize) -> Vec<u32> {
        self.path(node).into_iter().map(|n| self.tokens[n]).collect()
    }

    pub fn ancestor_words(&self, node: usize) -> [u32; ANCESTOR_WORDS] {
        let mut words = [0; ANCESTOR_WORDS];
        for n in self.path(node) {
            words[n / 32] |= 1 << (n % 32);
        }
        words
    }

    /// This tree behind a chain: its first `given` nodes. The others keep their topology below the last of those.
    pub fn behind_a_chain(self, given: usize) -> Tree {
        let above = given.saturating_sub(1);
        let parent =
            |node: usize| if node <= above { node.saturating_sub(1) } else { self.parents[node - above] + above };
        Tree { parents: (0..self.nodes()).map(parent).collect(), tokens: self.tokens }
    }

    /// The same tree with its nodes in another order: node `order[i]` becomes node i. Parents must still come first.
    pub fn reordered(&self, order: &[usize]) -> Tree {
        let new_id = |old: usize| order.iter().position(|&o| o == old).expect("order is a permutation");
        let parents = order.iter().map(|&old| new_id(self.parents[old])).collect();
        Tree { parents, tokens: order.iter().map(|&old| self.tokens[old]).collect() }
    }
}

/// One request of a batch: the committed prefix (its tokens; they are in the cache already), the tree on top of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    pub prefix: Vec<u32>,
    pub tree: Tree,
    /// The first `done` nodes are in the cache already; the others are the rows of this run. 0 but while a tree grows.
    pub done: usize,
    /// The nodes, a chain, are a block that is filled at once: each row sees all of them.
    pub is_block: bool,
    /// The first `given` nodes, a chain, are accepted whatever is drawn; may be more than there are nodes.
    pub given: usize,
    pub sampling: Sampling,
}

impl Member {
    pub fn new(prefix: &[u32], tree: Tree) -> Member {
        Member { prefix: prefix.to_vec(), tree, done: 0, is_block: false, given: 0, sampling: Sampling::default() }
    }

    /// The words of what a row sees of the nodes.
    fn seen_nodes(&self, node: usize) -> [u32; ANCESTOR_WORDS] {
        self.tree.ancestor_words(if self.is_block { self.tree.nodes() - 1 } else { node })
    }

    /// Rows of the request.
    pub fn rows(&self) -> usize {
        self.tree.nodes() - self.done
    }

    /// Slots the request needs.
    pub fn slots(&self) -> usize {
        self.prefix.len() + self.tree.nodes()
    }
}

/// The requests of one run, each in its own slot of the batch: `members[i]` is request i.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    pub members: Vec<Member>,
}

impl Batch {
    pub fn rows(&self) -> usize {
        self.members.iter().map(Member::rows).sum()
    }

    /// First row of request `member`: that of its node `done`.
    pub fn first_row(&self, member: usize) -> usize {
        self.members[..member].iter().map(Member::rows).sum()
    }

    /// The batch as it is when one of its requests, each in turn, has ended since it was made: it has no rows.
    pub fn with_one_ended(&self) -> impl Iterator<Item = (usize, Batch)> {
        let requests = if self.members.len() > 1 { self.members.len() } else { 0 };
        (0..requests).map(|ended| {
            let mut batch = self.clone();
            batch.members[ended].done = batch.members[ended].tree.nodes();
            (ended, batch)
        })
    }

    /// Largest position + 1.
    pub fn keys(&self) -> usize {
        let deepest = |m: &Member| (0..m.tree.nodes()).map(|n| m.prefix.len() + m.tree.depth(n) + 1).max();
        self.members.iter().filter_map(deepest).max().unwrap_or(0)
    }

    pub fn row_words(&self) -> Vec<u32> {
        let mut words = Vec::new();
        for (request, m) in self.members.iter().enumerate() {
            for node in m.done..m.tree.nodes() {
                let row = Row {
                    token: m.tree.tokens[node],
                    position: (m.prefix.len() + m.tree.depth(node)) as u32,
                    request: request as u32,
                    node: node as u32,
                    ancestors: m.seen_nodes(node),
                };
                words.extend(row.to_words());
            }
        }
        words
    }

    /// The `requests` buffer, header included.
    pub fn request_words(&self) -> Vec<u32> {
        let mut words = vec![self.rows() as u32, self.members.len() as u32, 0, 0];
        for (i, m) in self.members.iter().enumerate() {
            let s = &m.sampling;
            let request = Request {
                prefix: m.prefix.len() as u32,
                first_row: self.first_row(i) as u32,
                n_rows: m.rows() as u32,
                sample: s.sample,
                seed: [s.seed as u32, (s.seed >> 32) as u32],
                temperature: s.temperature,
                top_k: s.top_k,
                top_p: s.top_p,
                min_p: s.min_p,
                repetition_penalty: s.repetition_penalty,
                given: m.given as u32,
            };
            words.extend(request.to_words());
        }
        words
    }

    /// How each row is drawn.
    pub fn draw_contexts(&self) -> Vec<DrawContext> {
        let words = self.request_words();
        let rows = self.members.iter().enumerate().flat_map(|(i, m)| (m.done..m.tree.nodes()).map(move |n| (i, m, n)));
        rows.map(|(i, member, node)| DrawContext {
            request: Request::read(&words, i),
            position: (member.prefix.len() + member.tree.depth(node)) as u32,
            seen: [member.prefix.clone(), member.tree.path_tokens(node)].concat(),
        })
        .collect()
    }

    /// The `seen` bits of every request: the tokens of its prefix.
    pub fn seen_words(&self, vocab: usize) -> Vec<u32> {
        let mut words = Vec::new();
        for m in &self.members {
            let mut bits = vec![0; vocab.div_ceil(32)];
            for &token in &m.prefix {
                bits[token as usize / 32] |= 1 << (token % 32);
            }
            words.extend(bits);
        }
        words
    }
}

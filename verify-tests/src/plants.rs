//! Known classes of bugs of tree verification, each planted in what goes into a backend or comes out of it.
//!
//! The numbers are those of a list of 23 classes that serving systems have shipped. Of these, seven live inside kernels and
//! cannot be planted here: [`NOT_PLANTED`].

use treespark_kernel_gen::layout::{HEADER_WORDS, NO_TOKEN, accepted_words};
use treespark_kernel_gen::{MAX_NODES, Op, Request, Row};

use crate::mutant::Mistake;

pub struct Plant {
    pub class: usize,
    pub what: &'static str,
    pub mistake: Mistake,
}

/// Classes that only a kernel's source can have, and why.
pub const NOT_PLANTED: [(usize, &str); 7] = [
    (7, "splits whose chunk is empty or all masked"),
    (9, "a first tile that is masked for a row"),
    (10, "overflow of 16-bit logits and partial sums"),
    (12, "32-bit overflow of addresses"),
    (17, "counters that a replay does not find at zero"),
    (21, "scales of a quantised cache: there is none"),
    (22, "subgroups, dispatch limits and uniformity of WGSL"),
];

pub const PLANTS: [Plant; 24] = [
    Plant { class: 1, what: "a node does not see itself", mistake: Mistake::Row(|row| set(row, row.node, false)) },
    Plant {
        class: 1,
        what: "a node sees its neighbour",
        mistake: Mistake::Row(|row| set(row, row.node.max(1) - 1, true)),
    },
    Plant { class: 1, what: "the parent is forgotten", mistake: Mistake::Row(forget_parent) },
    Plant {
        class: 2,
        what: "ancestor bits by depth, not by node",
        mistake: Mistake::Row(|row| sees(row, 0..row.path().count() as u32)),
    },
    Plant {
        class: 3,
        what: "all earlier nodes are seen, as in a chain",
        mistake: Mistake::Row(|row| sees(row, 0..row.node + 1)),
    },
    Plant { class: 4, what: "a prefix that ends one slot before a page is cut", mistake: Mistake::Request(page_end) },
    Plant { class: 5, what: "a request without a prefix is not run", mistake: Mistake::Request(no_prefix) },
    Plant { class: 5, what: "nodes from the 64th on lose ancestors", mistake: Mistake::Row(two_words) },
    Plant { class: 6, what: "all rows belong to the first request", mistake: Mistake::Row(|row| row.request = 0) },
    Plant {
        class: 8,
        what: "the rows end at a request without any",
        mistake: Mistake::Write("requests", end_at_empty),
    },
    Plant { class: 11, what: "scores are scaled twice", mistake: Mistake::Op(scale_twice) },
    Plant { class: 13, what: "the rows of the run before", mistake: Mistake::Once("rows") },
    Plant { class: 13, what: "the page table of the run before", mistake: Mistake::Once("pages") },
    Plant { class: 14, what: "two pages are one", mistake: Mistake::Write("pages", alias_pages) },
    Plant {
        class: 14,
        what: "accepted rows are not moved",
        mistake: Mistake::Op(|op| !matches!(op, Op::Commit { .. })),
    },
    Plant { class: 15, what: "positions by slot, not by depth", mistake: Mistake::Row(by_slot) },
    Plant {
        class: 16,
        what: "the page table of the neighbour",
        mistake: Mistake::Write("pages", |pages| pages.rotate_left(1)),
    },
    Plant {
        class: 18,
        what: "a prefix beyond 128 slots is cut",
        mistake: Mistake::Request(|r| r.prefix = r.prefix.min(128)),
    },
    Plant { class: 19, what: "acceptance ends one node early", mistake: Mistake::Read("accepted", one_less) },
    Plant {
        class: 19,
        what: "the bonus token is that of the node before",
        mistake: Mistake::Read("accepted", stale_bonus),
    },
    Plant { class: 20, what: "a NaN draws token 0", mistake: Mistake::Read("draws", nan_is_token) },
    Plant {
        class: 20,
        what: "the noise of a token is that of another seed",
        mistake: Mistake::Request(|r| r.seed.swap(0, 1)),
    },
    Plant { class: 20, what: "top-k keeps one more", mistake: Mistake::Request(|r| r.top_k += u32::from(r.top_k > 1)) },
    Plant {
        class: 23,
        what: "a request that has ended is run on",
        mistake: Mistake::Request(|r| r.n_rows = r.n_rows.max(1)),
    },
];

fn set(row: &mut Row, node: u32, seen: bool) {
    let (word, bit) = (node as usize / 32, 1 << (node % 32));
    if seen { row.ancestors[word] |= bit } else { row.ancestors[word] &= !bit }
}

fn sees(row: &mut Row, nodes: std::ops::Range<u32>) {
    row.ancestors.fill(0);
    nodes.for_each(|node| set(row, node, true));
}

fn forget_parent(row: &mut Row) {
    let parent = row.path().filter(|&node| node != row.node as usize).last();
    if let Some(parent) = parent.filter(|&parent| parent > 0) {
        set(row, parent as u32, false);
    }
}

fn two_words(row: &mut Row) {
    row.ancestors[2..].fill(0);
    set(row, row.node, true);
}

fn by_slot(row: &mut Row) {
    row.position = row.position - (row.path().count() as u32 - 1) + row.node;
}

fn page_end(request: &mut Request) {
    request.prefix -= u32::from(request.prefix % 16 == 15);
}

fn no_prefix(request: &mut Request) {
    if request.prefix == 0 {
        request.n_rows = 0;
    }
}

fn end_at_empty(words: &mut [u32]) {
    let empty = (0..words[1] as usize).find(|&i| words[HEADER_WORDS + i * Request::WORDS + 2] == 0);
    words[0] = empty.map_or(words[0], |i| words[HEADER_WORDS + i * Request::WORDS + 1]);
}

fn scale_twice(op: &mut Op) -> bool {
    if let Op::TreeAttention { scale, .. } = op {
        *scale *= *scale;
    }
    true
}

fn alias_pages(pages: &mut [u32]) {
    for pair in pages.chunks_exact_mut(2) {
        pair[1] = pair[0];
    }
}

fn one_less(words: &mut [u32]) {
    for request in words.chunks_mut(accepted_words(MAX_NODES)).filter(|request| request[0] > 1) {
        request[0] -= 1;
    }
}

fn stale_bonus(words: &mut [u32]) {
    for request in
        words.chunks_mut(accepted_words(MAX_NODES)).filter(|request| (2..=MAX_NODES as u32).contains(&request[0]))
    {
        let last = MAX_NODES + request[0] as usize;
        request[last] = request[last - 1];
    }
}

fn nan_is_token(draws: &mut [u32]) {
    draws.iter_mut().filter(|draw| **draw == NO_TOKEN).for_each(|draw| *draw = 0);
}

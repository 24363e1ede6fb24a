//! Known classes of bugs of tree verification, planted around a backend or into a kernel.
//!
//! The numbers are those of a list of 23 classes that serving systems have shipped. Two cannot be planted: [`NOT_PLANTED`].
//! Behind these, 24 is of latents and experts.

use treespark_kernel_gen::layout::{NO_TOKEN, accepted_words};
use treespark_kernel_gen::{MAX_NODES, Op, Request, Row};

use crate::mutant::Mistake;

pub struct Plant {
    pub class: usize,
    pub what: &'static str,
    pub bug: Bug,
}

#[derive(Clone, Copy)]
pub enum Bug {
    /// In what goes into a backend or comes out of it: the CPU's.
    Around(Mistake),
    /// In CUDA's kernels.
    Inside(Change),
}

/// A text that kernels have in one place, and what is put there.
#[derive(Clone, Copy)]
pub struct Change {
    pub replace: &'static str,
    pub by: &'static str,
}

/// Classes that nothing here can have, and why.
pub const NOT_PLANTED: [(usize, &str); 2] = [
    (21, "scales of a quantised cache: there is none"),
    (22, "subgroups of WGSL, which no kernel uses, and its limits, which no model of these sizes comes near"),
];

pub const PLANTS: [Plant; 33] = [
    around(1, "a node does not see itself", Mistake::Row(|row| set(row, row.node, false))),
    around(1, "a node sees its neighbour", Mistake::Row(|row| set(row, row.node.max(1) - 1, true))),
    around(1, "the parent is forgotten", Mistake::Row(forget_parent)),
    around(2, "ancestor bits by depth, not by node", Mistake::Row(|row| sees(row, 0..row.path().count() as u32))),
    around(3, "all earlier nodes are seen, as in a chain", Mistake::Row(|row| sees(row, 0..row.node + 1))),
    around(4, "a prefix that ends one slot before a page is cut", Mistake::Request(page_end)),
    around(5, "a request without a prefix is not run", Mistake::Request(no_prefix)),
    around(5, "nodes from the 64th on lose ancestors", Mistake::Row(two_words)),
    around(6, "all rows belong to the first request", Mistake::Row(|row| row.request = 0)),
    inside(
        7,
        "a split without keys divides by its sum",
        "const float inverse = acc.sum[i] > 0.0f ? reciprocal_approx(acc.sum[i]) : 0.0f;",
        "const float inverse = reciprocal_approx(acc.sum[i]);",
    ),
    around(8, "the batch ends at a request without rows", Mistake::Write("requests", end_at_empty)),
    inside(
        9,
        "a row that has seen no key yet subtracts its maximum",
        "const float base = MASKED && most == NEVER ? 0.0f : most;",
        "const float base = most;",
    ),
    inside(10, "scores overflow 16 bits before they are scaled", "float most = NEVER;", SCORES_OF_16_BITS),
    inside(
        10,
        "sums overflow 16 bits before they are divided",
        "return pack(x.x[2 * j] * inverse, x.x[2 * j + 1] * inverse);",
        SUMS_OF_16_BITS,
    ),
    around(11, "scores are scaled twice", Mistake::Op(scale_twice)),
    inside(
        12,
        "addresses of pages wrap at 16 bits",
        "const u64 block = cache_block(__shfl_sync(",
        "const u64 block = (u16)cache_block(__shfl_sync(",
    ),
    around(13, "the rows of the run before", Mistake::Once("rows")),
    around(13, "the page table of the run before", Mistake::Once("pages")),
    around(14, "two pages are one", Mistake::Write("pages", alias_pages)),
    around(14, "accepted rows are not moved", Mistake::Op(|op| !matches!(op, Op::Commit { .. }))),
    around(15, "positions by slot, not by depth", Mistake::Row(by_slot)),
    around(16, "the page table of the neighbour", Mistake::Write("pages", |pages| pages.rotate_left(1))),
    inside(17, "a counter is not left at zero", "if (shared.arrived == item.chunks - 1) *counter = 0;", ""),
    around(18, "a prefix beyond 128 slots is cut", Mistake::Request(|r| r.prefix = r.prefix.min(128))),
    around(19, "acceptance ends one node early", Mistake::Read("accepted", one_less)),
    around(19, "the bonus token is that of the node before", Mistake::Read("accepted", stale_bonus)),
    around(20, "a NaN draws token 0", Mistake::Read("draws", nan_is_token)),
    around(20, "the noise of a token is that of another seed", Mistake::Request(|r| r.seed.swap(0, 1))),
    around(20, "top-k keeps one more", Mistake::Request(|r| r.top_k += u32::from(r.top_k > 1))),
    around(23, "a request that has ended is run on", Mistake::Request(|r| r.n_rows = r.n_rows.max(1))),
    around(24, "a router ignores its correction bias", Mistake::Op(no_router_bias)),
    around(24, "experts are chosen from all groups", Mistake::Op(all_groups)),
    around(24, "scores of latents are scaled by another width", Mistake::Op(scale_of_latents)),
];

/// What is more than an f16 holds becomes infinite.
const SCORES_OF_16_BITS: &str = "
            for (u32 n = 0; n < WARP_KEYS / 8; n++)
                for (u32 j = 0; j < 4; j++)
                    if (score[n][j] * score[n][j] > 65504.0f * 65504.0f) score[n][j] *= __uint_as_float(0x7f800000u);
            float most = NEVER;";
const SUMS_OF_16_BITS: &str = "
                const auto narrow = [](float v) { return v * v > 65504.0f * 65504.0f ? v * __uint_as_float(0x7f800000u) : v; };
                return pack(narrow(x.x[2 * j]) * inverse, narrow(x.x[2 * j + 1]) * inverse);";

const fn around(class: usize, what: &'static str, mistake: Mistake) -> Plant {
    Plant { class, what, bug: Bug::Around(mistake) }
}

const fn inside(class: usize, what: &'static str, replace: &'static str, by: &'static str) -> Plant {
    Plant { class, what, bug: Bug::Inside(Change { replace, by }) }
}

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
    let requests = 0..words[1] as usize;
    if let Some(empty) = requests.map(|i| Request::read(words, i)).position(|request| request.n_rows == 0) {
        words[0] = Request::read(words, empty).first_row;
        words[1] = empty as u32;
    }
}

fn scale_twice(op: &mut Op) -> bool {
    if let Op::TreeAttention { scale, .. } = op {
        *scale *= *scale;
    }
    true
}

fn no_router_bias(op: &mut Op) -> bool {
    if let Op::Route { bias, .. } = op {
        *bias = None;
    }
    true
}

fn all_groups(op: &mut Op) -> bool {
    if let Op::Route { routing, .. } = op {
        routing.top_groups = routing.groups;
    }
    true
}

fn scale_of_latents(op: &mut Op) -> bool {
    if let Op::LatentAttention { scale, .. } = op {
        *scale *= 0.5;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda_on_cpu::places_in_kernels;

    #[test]
    fn every_change_of_a_kernel_has_its_place() {
        for plant in &PLANTS {
            if let Bug::Inside(change) = plant.bug {
                assert_eq!(places_in_kernels(change.replace), Ok(1), "{}", plant.what);
            }
        }
    }
}

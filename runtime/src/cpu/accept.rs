//! Which path of each request's tree the target itself would have produced: [`Op::Accept`] on a CPU.
//!
//! No walk is needed. Call a node *matched* if its token is what the target drew at its parent, or if it is given; the root
//! always is. A node is accepted iff all nodes of its path are matched, that is, iff `ancestors & !matched` has no bit. The deepest
//! accepted node, the one with most ancestor bits, ends the path that is kept.
//!
//! [`Op::Accept`]: treespark_kernel_gen::Op::Accept

use treespark_kernel_gen::layout::{HEADER_WORDS, NO_TOKEN, accepted_words};
use treespark_kernel_gen::{ANCESTOR_WORDS, MAX_NODES, Request, Row};

/// Fills `accepted` for every request of the batch; words behind the path's end are zeroed.
///
/// All arguments are buffers as [`layout`](treespark_kernel_gen::layout) has them.
pub fn accept(rows: &[u32], requests: &[u32], draws: &[u32], accepted: &mut [u32]) {
    let n_requests = requests[1] as usize;
    debug_assert!(requests.len() >= HEADER_WORDS + n_requests * Request::WORDS);
    for (index, out) in accepted.chunks_exact_mut(accepted_words(MAX_NODES)).take(n_requests).enumerate() {
        let request = Request::read(requests, index);
        let (first, n) = (request.first_row as usize, request.n_rows as usize);
        let tree: Vec<Row> = (first..first + n).map(|row| Row::read(rows, row)).collect();
        out.fill(0);
        accept_one(&tree, request.given as usize, &draws[first..first + n], out);
    }
}

/// One request: `tree[n]` is the row of node n, `draws[n]` the target's draw there. A request without rows in this
/// pass accepts nothing.
fn accept_one(tree: &[Row], given: usize, draws: &[u32], out: &mut [u32]) {
    let mut matched = [0u32; ANCESTOR_WORDS];
    for (node, row) in tree.iter().enumerate() {
        let is_matched = match parent(row, node) {
            None => true,
            Some(parent) => node < given || draws[parent] == row.token && row.token != NO_TOKEN,
        };
        matched[node / 32] |= u32::from(is_matched) << (node % 32);
    }

    let is_accepted = |row: &Row| row.ancestors.iter().zip(&matched).all(|(path, matched)| path & !matched == 0);
    let n_path = |row: &Row| row.ancestors.iter().map(|word| word.count_ones()).sum::<u32>();
    let mut deepest: Option<&Row> = None;
    for row in tree.iter().filter(|row| is_accepted(row)) {
        if deepest.is_none_or(|best| n_path(row) > n_path(best)) {
            deepest = Some(row);
        }
    }

    let Some(deepest) = deepest else { return };
    let (count, rest) = out.split_first_mut().expect("accepted words of one request");
    let (path, tokens) = rest.split_at_mut(MAX_NODES);
    *count = n_path(deepest);
    for (i, node) in deepest.path().enumerate() {
        (path[i], tokens[i]) = (node as u32, draws[node]);
        // Where a node is given, the draw before it may be another token.
        if i > 0 {
            tokens[i - 1] = tree[node].token;
        }
    }
}

/// The nearest ancestor: the highest bit below the node's own. `None` for the root.
fn parent(row: &Row, node: usize) -> Option<usize> {
    let words = row.ancestors;
    let below = words[node / 32] & ((1 << (node % 32)) - 1);
    if below != 0 {
        return Some(node / 32 * 32 + below.ilog2() as usize);
    }
    (0..node / 32).rev().find(|&word| words[word] != 0).map(|word| word * 32 + words[word].ilog2() as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use treespark_kernel_gen::TreeShape;

    use super::*;

    /// `rows, requests` of a batch whose requests have the given trees and tokens.
    fn batch(trees: &[(TreeShape, Vec<u32>)]) -> (Vec<u32>, Vec<u32>) {
        let (mut rows, mut requests) = (Vec::new(), vec![0, trees.len() as u32, 0, 0]);
        for (index, (shape, tokens)) in trees.iter().enumerate() {
            let request = Request {
                prefix: 10,
                first_row: (rows.len() / Row::WORDS) as u32,
                n_rows: shape.len() as u32,
                sample: 0,
                seed: [0; 2],
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                repetition_penalty: 1.0,
                given: 0,
            };
            requests.extend(request.to_words());
            for (node, &token) in tokens.iter().enumerate() {
                let position = 10 + shape.depth(node) as u32;
                let ancestors = shape.ancestors(node);
                rows.extend(Row { token, position, request: index as u32, node: node as u32, ancestors }.to_words());
            }
        }
        requests[0] = (rows.len() / Row::WORDS) as u32;
        (rows, requests)
    }

    /// The path and the tokens that each request accepts.
    fn accepted(trees: &[(TreeShape, Vec<u32>)], draws: &[u32]) -> Vec<(Vec<u32>, Vec<u32>)> {
        let (rows, requests) = batch(trees);
        let mut words = vec![9; trees.len() * accepted_words(MAX_NODES)];
        accept(&rows, &requests, draws, &mut words);
        let one = |out: &[u32]| {
            let n = out[0] as usize;
            (out[1..1 + n].to_vec(), out[1 + MAX_NODES..][..n].to_vec())
        };
        words.chunks(accepted_words(MAX_NODES)).map(one).collect()
    }

    fn shape(text: &str) -> TreeShape {
        text.parse().unwrap()
    }

    #[test]
    fn keeps_the_path_that_the_target_drew() {
        // Node: token.   0: 1
        //                ├─ 1: 2 ─ 3: 4
        //                └─ 2: 3 ─ 4: 5
        let tree = [(shape("parents:0,0,0,1,2"), vec![1, 2, 3, 4, 5])];
        assert_eq!(accepted(&tree, &[3, 0, 5, 0, 6]), [(vec![0, 2, 4], vec![3, 5, 6])]);
        // Node 4 matches its parent's draw, but the parent was not drawn.
        assert_eq!(accepted(&tree, &[2, 9, 5, 0, 6]), [(vec![0, 1], vec![2, 9])]);
        assert_eq!(accepted(&tree, &[7, 2, 3, 4, 5]), [(vec![0], vec![7])]);
    }

    #[test]
    fn equal_siblings_go_to_the_lowest_node() {
        assert_eq!(
            accepted(&[(shape("2x1"), vec![1, 2, 2, 3, 3])], &[2, 3, 3, 8, 8]),
            [(vec![0, 1, 3], vec![2, 3, 8])]
        );
        // Unless the other goes deeper.
        assert_eq!(
            accepted(&[(shape("2x1"), vec![1, 2, 2, 4, 3])], &[2, 3, 3, 8, 8]),
            [(vec![0, 2, 4], vec![2, 3, 8])]
        );
    }

    #[test]
    fn a_draw_of_no_token_matches_nothing() {
        let tree = (shape("chain:1"), vec![1, NO_TOKEN]);
        assert_eq!(accepted(&[tree], &[NO_TOKEN, 5]), [(vec![0], vec![NO_TOKEN])]);
    }

    #[test]
    fn what_is_given_is_accepted_whatever_was_drawn() {
        let (rows, mut requests) = batch(&[(shape("chain:3"), vec![1, 2, 3, 4])]);
        requests[HEADER_WORDS + Request::WORDS - 1] = 3;
        let mut words = vec![9; accepted_words(MAX_NODES)];
        accept(&rows, &requests, &[9, 9, 8, 7], &mut words);
        assert_eq!((&words[..4], &words[1 + MAX_NODES..][..3]), (&[3, 0, 1, 2][..], &[2, 3, 8][..]));
    }

    #[test]
    fn requests_do_not_mix() {
        let trees = [(shape("chain:2"), vec![1, 2, 3]), (shape("root"), vec![4]), (shape("2"), vec![5, 6, 7])];
        let expected = [(vec![0, 1, 2], vec![2, 3, 0]), (vec![0], vec![6]), (vec![0, 2], vec![7, 1])];
        assert_eq!(accepted(&trees, &[2, 3, 0, 6, 7, 0, 1]), expected);
    }

    proptest! {
        /// Random trees over two tokens, against a walk from the root.
        #[test]
        fn agrees_with_a_walk(
            choices in proptest::collection::vec(any::<prop::sample::Index>(), 0..MAX_NODES),
            tokens in proptest::collection::vec(0u32..2, MAX_NODES),
            draws in proptest::collection::vec(0u32..2, MAX_NODES),
        ) {
            let mut shape = TreeShape::root();
            choices.iter().for_each(|choice| { shape.push(choice.index(shape.len())).unwrap(); });
            let n = shape.len();
            let mut reached = vec![true; n];
            for node in 1..n {
                let parent = shape.parent(node);
                reached[node] = reached[parent] && tokens[node] == draws[parent];
            }
            let deepest = (0..n).filter(|&node| reached[node]).min_by_key(|&node| (MAX_NODES - shape.depth(node), node));
            let path: Vec<u32> = shape.path(deepest.unwrap()).iter().map(|&node| node as u32).collect();
            let drawn: Vec<u32> = path.iter().map(|&node| draws[node as usize]).collect();
            prop_assert_eq!(accepted(&[(shape, tokens[..n].to_vec())], &draws[..n]), [(path, drawn)]);
        }
    }
}

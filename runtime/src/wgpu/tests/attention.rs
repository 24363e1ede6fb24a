//! Tree attention, and that a row's arithmetic is its own.

use treespark_kernel_gen::{DType, Op, Role, TreeShape, TreeSpec};

use super::{Bench, Heads, Rng, assert_close, chains, gpu, rounded};

/// Attention of all rows; unused slots hold NaN. Returns the outputs after checking them.
fn check_attention(
    h: &Heads,
    requests: &[(usize, TreeShape)],
    spec: TreeSpec,
    binding_bytes: usize,
) -> Option<Vec<f32>> {
    let mut gpu = gpu(binding_bytes)?;
    let what = format!("{}/{} heads of {}, {:?}, {requests:?}", h.heads, h.kv_heads, h.dim, h.cache);
    let longest = requests.iter().map(|(prefix, tree)| prefix + tree.len()).max()?;
    let mut b = Bench::new(requests, 0, h.page_size, longest.div_ceil(h.page_size));
    let dim = h.dim;
    let len = 2 * b.pages.len() * h.kv_heads * h.page_size * dim;
    let (cache, k_cache, v_cache) = h.caches(&mut b, Some(vec![f32::NAN; len]));
    let used: Vec<(usize, usize)> =
        requests.iter().enumerate().map(|(r, (prefix, tree))| (r, prefix + tree.len())).collect();
    for (request, slots) in used {
        for slot in 0..slots {
            // What a slot holds depends on its place alone, so that different trees can be compared.
            let mut rng = Rng((request * 10_000 + slot) as u64);
            let (page, place) = b.slot(request, slot);
            for head in 0..h.kv_heads {
                let at = cache.index(1, page, head, place);
                for buf in [k_cache, v_cache] {
                    let numbers = rng.numbers(dim).into_iter().map(|x| rounded(h.cache, 2.0 * x));
                    b.held[buf.0].as_mut()?[at..at + dim].copy_from_slice(&numbers.collect::<Vec<_>>());
                }
            }
        }
    }
    let rows = b.rows.len();
    let queries = b.rows.iter().flat_map(|row| Rng(u64::from(row.position)).numbers(h.heads * dim)).collect();
    let q = b.buffer("q", Role::Scratch, DType::F32, &[rows, h.heads, dim], Some(queries));
    let out = b.buffer("out", Role::Scratch, DType::F32, &[rows, h.heads, dim], None);
    let scale = 1.0 / (dim as f32).sqrt();
    let (batch, heads, kv_heads) = (b.batch, h.heads, h.kv_heads);
    let op = Op::TreeAttention { batch, layer: 1, heads, kv_heads, scale, tree: spec, q, k_cache, v_cache, out };
    let held = b.run(&mut gpu, vec![op]);
    for (r, row) in b.rows.iter().enumerate() {
        let mut places: Vec<_> = (0..b.prefix(row)).map(|slot| b.slot(row.request as usize, slot)).collect();
        places.extend(row.path().map(|node| b.slot_of(row, node)));
        for head in 0..heads {
            let query = &b.numbers(q)[(r * heads + head) * dim..][..dim];
            let at = |(page, place): &(usize, usize)| cache.index(1, *page, head / (heads / kv_heads), *place);
            let dot = |from: usize| {
                let key = &b.numbers(k_cache)[from..from + dim];
                key.iter().zip(query).map(|(&k, &q)| f64::from(k) * f64::from(q)).sum::<f64>() * f64::from(scale)
            };
            let scores: Vec<f64> = places.iter().map(|p| dot(at(p)).exp()).collect();
            let sum: f64 = scores.iter().sum();
            let mut want = vec![0.0; dim];
            for (p, s) in places.iter().zip(&scores) {
                let value = &b.numbers(v_cache)[at(p)..][..dim];
                want.iter_mut().zip(value).for_each(|(w, &v)| *w += s / sum * f64::from(v));
            }
            assert_close(
                &format!("{what}: row {r} head {head}"),
                &held[out.0][(r * heads + head) * dim..],
                &want,
                2e-5,
            );
        }
    }
    Some(held[out.0].clone())
}

#[test]
fn attention_matches_plain_loops() {
    let tree = |text: &str| text.parse::<TreeShape>().unwrap();
    let cases = [
        (3, 1, 16, 4, DType::BF16, vec![(0, tree("root"))]),
        (3, 1, 64, 16, DType::BF16, vec![(300, tree("4x2x2x1"))]),
        (10, 2, 32, 4, DType::F16, vec![(0, tree("chain:40")), (129, tree("3x2")), (255, tree("root"))]),
        (2, 2, 64, 16, DType::F32, vec![(127, tree("2x2x2")), (0, tree("2x1x1x1"))]),
        (8, 1, 128, 16, DType::BF16, vec![(20, tree("4x4"))]),
        (4, 2, 256, 16, DType::BF16, vec![(513, tree("2x2"))]),
        (20, 1, 24, 8, DType::BF16, vec![(40, tree("2x3"))]),
        (1, 1, 32, 16, DType::BF16, vec![(100, tree("chain:255"))]),
    ];
    for (heads, kv_heads, dim, page_size, cache, requests) in cases {
        check_attention(&Heads { heads, kv_heads, dim, page_size, cache }, &requests, TreeSpec::Any(256), usize::MAX);
    }
}

/// Partial results that do not fit one binding are written and merged in turns.
#[test]
fn rows_in_turns_get_the_same_sums() {
    let h = Heads { heads: 3, kv_heads: 1, dim: 16, page_size: 4, cache: DType::BF16 };
    let requests = [(4, "4x2x2x1".parse().unwrap())];
    let at_once = check_attention(&h, &requests, TreeSpec::Any(64), usize::MAX);
    assert_eq!(at_once, check_attention(&h, &requests, TreeSpec::Any(64), 45 * 3 * 16 * 4));
}

#[test]
fn a_static_tree_adds_the_same_numbers() {
    let h = Heads { heads: 3, kv_heads: 1, dim: 32, page_size: 4, cache: DType::BF16 };
    let tree: TreeShape = "4x2x2x1".parse().unwrap();
    // A prefix of the nodes is a tree too.
    let requests = [(130, tree.clone()), (7, tree.prefix(9))];
    let any = check_attention(&h, &requests, TreeSpec::Any(64), usize::MAX);
    assert_eq!(any, check_attention(&h, &requests, TreeSpec::Static(tree), usize::MAX));
}

/// The same token at the same place gets the same bits, however many rows share the pass, and in a tree as in plain
/// decoding.
#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let h = Heads { heads: 3, kv_heads: 1, dim: 64, page_size: 16, cache: DType::BF16 };
    let size = 3 * 64;
    let Some(chain) = check_attention(&h, &[(250, TreeShape::chain(15).unwrap())], TreeSpec::Any(64), usize::MAX)
    else {
        return;
    };
    for depth in [0, 5, 6, 15] {
        let plain = check_attention(&h, &[(250 + depth, TreeShape::root())], TreeSpec::Any(64), usize::MAX).unwrap();
        assert_eq!(chain[depth * size..][..size], plain[..], "depth {depth}");
    }

    let product = |rows: usize| {
        let mut gpu = gpu(usize::MAX).unwrap();
        let mut b = Bench::new(&chains(&[rows - 1]), 0, 16, 4);
        let numbers = Rng(11).numbers(72);
        let x = b.buffer("x", Role::Scratch, DType::F32, &[rows, 72], Some(numbers.repeat(rows)));
        let gamma = b.buffer("norm", Role::Weight, DType::F32, &[72], Some(Rng(12).numbers(72)));
        let weight = b.buffer("weight", Role::Weight, DType::BF16, &[80, 72], Some(Rng(13).numbers(80 * 72)));
        let logits = b.buffer("logits", Role::Scratch, DType::F32, &[rows, 80], None);
        let held = b.run(&mut gpu, vec![Op::Head { batch: b.batch, eps: 1e-5, x, norm: gamma, weight, logits }]);
        held[logits.0].clone()
    };
    let one = product(1);
    for rows in [2, 3, 7, 16, 21] {
        for (r, row) in product(rows).chunks(80).enumerate() {
            assert_eq!(row, one, "row {r} of {rows}");
        }
    }
}

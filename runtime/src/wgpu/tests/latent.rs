//! Attention to latents, and that a row's arithmetic is its own.

use treespark_kernel_gen::{CacheShape, DType, Op, Role, TreeShape, TreeSpec};

use super::{Bench, Rng, assert_close, gpu, rounded};

struct Latents {
    heads: usize,
    dim: usize,
    latent: usize,
    page_size: usize,
    cache: DType,
}

/// Attention of all rows; unused slots hold NaN. Returns the outputs after checking them.
fn check_attention(l: &Latents, requests: &[(usize, TreeShape)], binding_bytes: usize) -> Option<Vec<f32>> {
    let mut gpu = gpu(binding_bytes)?;
    let &Latents { heads, dim, latent, page_size, cache: dtype } = l;
    let what = format!("{heads} heads of {latent} of {dim}, {dtype:?}, {requests:?}");
    let longest = requests.iter().map(|(prefix, tree)| prefix + tree.len()).max()?;
    let mut b = Bench::new(requests, 0, page_size, longest.div_ceil(page_size));
    let shape = CacheShape { layers: 2, pages: b.pages.len(), kv_heads: 1, page_size, head_dim: dim };
    let mut numbers = vec![f32::NAN; shape.dims().iter().product()];
    for (request, (prefix, tree)) in requests.iter().enumerate() {
        for slot in 0..prefix + tree.len() {
            let (page, place) = b.slot(request, slot);
            // What a slot holds depends on its place alone, so that different trees can be compared.
            let held = Rng((request * 10_000 + slot) as u64).numbers(dim).into_iter().map(|x| rounded(dtype, 2.0 * x));
            numbers[shape.index(1, page, 0, place)..][..dim].copy_from_slice(&held.collect::<Vec<_>>());
        }
    }
    let cache = b.buffer("cache", Role::Cache, dtype, &shape.dims(), Some(numbers));
    let rows = b.rows.len();
    let queries = b.rows.iter().flat_map(|row| Rng(u64::from(row.position)).numbers(heads * dim)).collect();
    let q = b.buffer("q", Role::Scratch, DType::F32, &[rows, heads, dim], Some(queries));
    let out = b.buffer("out", Role::Scratch, DType::F32, &[rows, heads, latent], None);
    let (batch, scale, tree) = (b.batch, 1.0 / (dim as f32).sqrt(), TreeSpec::Any(256));
    let held = b.run(&mut gpu, vec![Op::LatentAttention { batch, layer: 1, heads, scale, tree, q, cache, out }]);
    for (r, row) in b.rows.iter().enumerate() {
        let mut places: Vec<_> = (0..b.prefix(row)).map(|slot| b.slot(row.request as usize, slot)).collect();
        places.extend(row.path().map(|node| b.slot_of(row, node)));
        let keys: Vec<&[f32]> =
            places.iter().map(|&(page, place)| &b.numbers(cache)[shape.index(1, page, 0, place)..][..dim]).collect();
        for head in 0..heads {
            let query = &b.numbers(q)[(r * heads + head) * dim..][..dim];
            let dot = |key: &&[f32]| key.iter().zip(query).map(|(&k, &q)| f64::from(k) * f64::from(q)).sum::<f64>();
            let weights: Vec<f64> = keys.iter().map(|key| (dot(key) * f64::from(scale)).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let value = |i: usize| keys.iter().zip(&weights).map(|(key, w)| w / sum * f64::from(key[i])).sum::<f64>();
            let want: Vec<f64> = (0..latent).map(value).collect();
            assert_close(
                &format!("{what}: row {r} head {head}"),
                &held[out.0][(r * heads + head) * latent..],
                &want,
                2e-5,
            );
        }
    }
    Some(held[out.0].clone())
}

#[test]
fn latent_attention_matches_plain_loops() {
    let tree = |text: &str| text.parse::<TreeShape>().unwrap();
    let of = |heads, dim, latent, page_size, cache| Latents { heads, dim, latent, page_size, cache };
    // Tiles of 3, 16, 2 times 9 with one to spare; fewer threads than two groups of columns need.
    check_attention(&of(3, 40, 32, 4, DType::BF16), &[(0, tree("root")), (130, tree("3x2"))], usize::MAX);
    check_attention(&of(16, 576, 512, 16, DType::F16), &[(300, tree("2x2"))], usize::MAX);
    check_attention(&of(17, 64, 48, 64, DType::F32), &[(127, tree("4x2x1"))], usize::MAX);
    check_attention(&of(1, 576, 560, 16, DType::BF16), &[(5, tree("chain:140"))], usize::MAX);
}

/// Partial results that do not fit one binding are written and merged in turns.
#[test]
fn rows_in_turns_attend_alike() {
    let l = Latents { heads: 8, dim: 24, latent: 16, page_size: 4, cache: DType::BF16 };
    let requests = [(100, "4x2x2x1".parse().unwrap())];
    let at_once = check_attention(&l, &requests, usize::MAX);
    assert_eq!(at_once, check_attention(&l, &requests, 45 * 8 * 24 * 4));
}

/// The same token at the same place gets the same bits in a tree as in plain decoding.
#[test]
fn a_latent_row_does_not_depend_on_its_neighbours() {
    let l = Latents { heads: 5, dim: 72, latent: 64, page_size: 16, cache: DType::BF16 };
    let chain = check_attention(&l, &[(250, TreeShape::chain(15).unwrap())], usize::MAX);
    let Some(chain) = chain else { return };
    for depth in [0, 5, 6, 15] {
        let plain = check_attention(&l, &[(250 + depth, TreeShape::root())], usize::MAX).unwrap();
        assert_eq!(chain[depth * 5 * 64..][..5 * 64], plain[..], "depth {depth}");
    }
}

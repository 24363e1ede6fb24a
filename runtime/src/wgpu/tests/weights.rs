//! Embed, project, gate/up, head and qkv.

use treespark_kernel_gen::{Buf, DType, Op, Role, TreeShape};

use super::{Bench, Heads, Rng, assert_close, chains, gpu};

fn norm(x: &[f32], gamma: &[f32], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
    x.iter().zip(gamma).map(|(&v, &g)| f64::from(v) * f64::from(g) / (mean + eps).sqrt()).collect()
}

fn product(weight: &[f32], x: &[f64]) -> Vec<f64> {
    weight.chunks(x.len()).map(|row| row.iter().zip(x).map(|(&w, v)| f64::from(w) * v).sum()).collect()
}

const FORMATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

#[test]
fn embed_widens_the_tokens_rows() {
    for (dtype, binding_bytes) in FORMATS.into_iter().zip([usize::MAX, 800, 400]) {
        let Some(mut gpu) = gpu(binding_bytes.max(1024)) else { return };
        let mut b = Bench::new(&chains(&[4, 0]), 2, 4, 8);
        let table = Rng(1).numbers(64 * 24);
        let table = b.buffer("table", Role::Weight, dtype, &[64, 24], Some(table));
        let out = b.buffer("out", Role::Scratch, DType::F32, &[b.rows.len() + 2, 24], None);
        let held = b.run(&mut gpu, vec![Op::Embed { batch: b.batch, table, out }]);
        for (i, row) in b.rows.iter().enumerate() {
            let at = row.token as usize * 24;
            assert_eq!(held[out.0][i * 24..][..24], b.numbers(table)[at..at + 24], "{dtype:?} row {i}");
        }
        assert_eq!(held[out.0][b.rows.len() * 24..], [0.0; 48], "rows past the end are left alone");
    }
}

/// project, gate/up and head over odd sizes, row counts and banks.
#[test]
fn weight_ops_match_plain_loops() {
    let cases =
        [(72, 40, 0, DType::BF16), (24, 100, 2, DType::F32), (136, 33, 15, DType::F16), (64, 40, 16, DType::BF16)];
    for ((k, n, tree, dtype), binding_bytes) in cases.into_iter().zip([usize::MAX, 6000, 9000, 5440]) {
        let Some(mut gpu) = gpu(binding_bytes) else { return };
        let mut b = Bench::new(&chains(&[tree]), 0, 4, 16);
        let rows = b.rows.len();
        let mut rng = Rng(3);
        let x = b.buffer("x", Role::Scratch, DType::F32, &[rows, k], Some(rng.numbers(rows * k)));
        let gamma = b.buffer("norm", Role::Weight, DType::F32, &[k], Some(rng.numbers(k)));
        let weight = b.buffer("weight", Role::Weight, dtype, &[2 * n, k], Some(rng.numbers(2 * n * k)));
        let residual = b.buffer("residual", Role::Scratch, DType::F32, &[rows, 2 * n], Some(rng.numbers(rows * 2 * n)));
        let out = b.buffer("out", Role::Scratch, DType::F32, &[rows, n], None);
        let logits = b.buffer("logits", Role::Scratch, DType::F32, &[rows, 2 * n], None);
        let (batch, eps) = (b.batch, 1e-5);
        let ops = vec![
            Op::Project { batch, add: true, x, weight, residual },
            Op::GateUp { batch, eps, x, norm: gamma, weight, out },
            Op::Head { batch, eps, x, norm: gamma, weight, logits },
        ];
        let held = b.run(&mut gpu, ops);
        for r in 0..rows {
            let row = &b.numbers(x)[r * k..][..k];
            let plain: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
            let mut sum = product(b.numbers(weight), &plain);
            sum.iter_mut().zip(&b.numbers(residual)[r * 2 * n..]).for_each(|(s, &v)| *s += f64::from(v));
            assert_close(&format!("project {dtype:?} row {r}"), &held[residual.0][r * 2 * n..], &sum, 1e-5);
            let normed = product(b.numbers(weight), &norm(row, b.numbers(gamma), 1e-5));
            assert_close(&format!("head {dtype:?} row {r}"), &held[logits.0][r * 2 * n..], &normed, 1e-5);
            let gated: Vec<f64> = (0..n).map(|i| normed[i] / (1.0 + (-normed[i]).exp()) * normed[n + i]).collect();
            assert_close(&format!("gate_up {dtype:?} row {r}"), &held[out.0][r * n..], &gated, 1e-5);
        }
    }
}

fn check_qkv(h: Heads, bias: bool, head_norm: bool, tree: &str, binding_bytes: usize) {
    let Some(mut gpu) = gpu(binding_bytes) else { return };
    let what = format!("{}/{} heads of {}, {:?}, {tree}", h.heads, h.kv_heads, h.dim, h.cache);
    let mut b = Bench::new(&[(3, tree.parse().unwrap()), (9, TreeShape::root())], 1, h.page_size, 64 / h.page_size);
    let (rows, hidden, dim) = (b.rows.len() + 1, 40, h.dim);
    let all = h.heads + 2 * h.kv_heads;
    let mut rng = Rng(5);
    let (_, k_cache, v_cache) = h.caches(&mut b, None);
    let x = b.buffer("x", Role::Scratch, DType::F32, &[rows, hidden], Some(rng.numbers(rows * hidden)));
    let gamma = b.buffer("norm", Role::Weight, DType::F32, &[hidden], Some(rng.numbers(hidden)));
    let numbers = rng.numbers(all * dim * hidden);
    let weight = b.buffer("weight", Role::Weight, DType::BF16, &[all * dim, hidden], Some(numbers));
    let mut small = |name: &str, n: usize| b.buffer(name, Role::Weight, DType::F32, &[n], Some(rng.numbers(n)));
    let bias = bias.then(|| small("bias", all * dim));
    let q_norm = head_norm.then(|| small("q_norm", dim));
    let k_norm = head_norm.then(|| small("k_norm", dim));
    let rope = b.buffer("rope", Role::Weight, DType::F32, &[64, dim / 2, 2], Some(rng.numbers(64 * dim)));
    let q = b.buffer("q", Role::Scratch, DType::F32, &[rows, h.heads, dim], None);
    let (batch, layer, heads, kv_heads, eps) = (b.batch, 1, h.heads, h.kv_heads, 1e-5);
    let op = Op::Qkv {
        batch,
        layer,
        heads,
        kv_heads,
        eps,
        x,
        norm: gamma,
        weight,
        bias,
        q_norm,
        k_norm,
        rope,
        q,
        k_cache,
        v_cache,
    };
    let held = b.run(&mut gpu, vec![op]);

    let cache = b.pass.cache_shape(k_cache);
    let mut written = vec![false; b.pass.buffer(k_cache).len()];
    for (r, row) in b.rows.iter().enumerate() {
        let mut y = product(b.numbers(weight), &norm(&b.numbers(x)[r * hidden..][..hidden], b.numbers(gamma), 1e-5));
        if let Some(bias) = bias {
            y.iter_mut().zip(b.numbers(bias)).for_each(|(y, &b)| *y += f64::from(b));
        }
        for (head, y) in y.chunks_mut(dim).enumerate() {
            let weights = if head < heads { q_norm } else { k_norm };
            if let Some(weights) = weights.filter(|_| head < heads + kv_heads) {
                let rms = (y.iter().map(|v| v * v).sum::<f64>() / dim as f64 + 1e-5).sqrt();
                y.iter_mut().zip(b.numbers(weights)).for_each(|(y, &w)| *y *= f64::from(w) / rms);
            }
            if head < heads + kv_heads {
                for i in 0..dim / 2 {
                    let turn = &b.numbers(rope)[(row.position as usize * dim / 2 + i) * 2..][..2];
                    let (cos, sin) = (f64::from(turn[0]), f64::from(turn[1]));
                    (y[i], y[i + dim / 2]) = (y[i] * cos - y[i + dim / 2] * sin, y[i + dim / 2] * cos + y[i] * sin);
                }
            }
            if head < heads {
                assert_close(&format!("{what}: q row {r}"), &held[q.0][(r * heads + head) * dim..], y, 1e-5);
                continue;
            }
            let to = if head < heads + kv_heads { k_cache } else { v_cache };
            let (page, place) = b.slot_of(row, row.node as usize);
            let at = cache.index(layer, page, (head - heads) % kv_heads, place);
            let tolerance = if h.cache == DType::F32 { 1e-5 } else { 5e-3 };
            assert_close(&format!("{what}: cached row {r}"), &held[to.0][at..], y, tolerance);
            written[at..at + dim].fill(true);
        }
    }
    let untouched = |buf: Buf| held[buf.0].iter().zip(&written).all(|(v, written)| *written || *v == 0.0);
    assert!(untouched(k_cache) && untouched(v_cache), "{what}: a slot that is no row's was written");
}

#[test]
fn qkv_matches_plain_loops() {
    let heads = |heads, kv_heads, dim, page_size, cache| Heads { heads, kv_heads, dim, page_size, cache };
    check_qkv(heads(3, 1, 16, 4, DType::BF16), false, false, "4x2x2x1", usize::MAX);
    check_qkv(heads(5, 1, 64, 16, DType::F16), true, false, "root", usize::MAX);
    check_qkv(heads(2, 2, 32, 4, DType::F32), false, true, "2x2", usize::MAX);
    check_qkv(heads(6, 2, 24, 8, DType::BF16), true, true, "chain:20", usize::MAX);
    check_qkv(heads(6, 1, 16, 4, DType::BF16), true, false, "2x1", 6144);
}

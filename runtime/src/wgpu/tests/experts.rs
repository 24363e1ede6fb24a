//! Experts whose weights lie in several banks, which cut them anywhere.

use treespark_kernel_gen::{DType, Op, Role};

use super::{Bench, Rng, assert_close, chains, gpu};

fn dot(weight: &[f32], x: &[f64]) -> f64 {
    weight.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()
}

/// Rows choose experts 0, 3, 1, 4, .. of 5; the last is chosen by nobody where there is but one row.
fn check_experts(tree: usize, dtype: DType, [hidden, ffn]: [usize; 2], binding_bytes: usize) {
    const EXPERTS: usize = 5;
    const CHOSEN: usize = 2;
    let Some(mut gpu) = gpu(binding_bytes) else { return };
    let what = format!("{tree} below the root, {dtype:?}, {binding_bytes} bytes");
    let mut b = Bench::new(&chains(&[tree]), 1, 4, 16);
    let (rows, entries) = (b.rows.len() + 1, b.rows.len() * CHOSEN);
    let mut rng = Rng(9);
    let chosen: Vec<usize> = (0..rows * CHOSEN).map(|entry| entry * 3 % EXPERTS).collect();
    let words = chosen.iter().map(|&expert| f32::from_bits(expert as u32)).collect();
    let experts = b.buffer("experts", Role::Scratch, DType::U32, &[rows, CHOSEN], Some(words));
    let groups = b.buffer("groups", Role::Scratch, DType::U32, &[EXPERTS + 1 + rows * CHOSEN], None);
    let x = b.buffer("x", Role::Scratch, DType::F32, &[rows, hidden], Some(rng.numbers(rows * hidden)));
    let norm = b.buffer("norm", Role::Weight, DType::F32, &[hidden], Some(rng.numbers(hidden)));
    let mut matrix = |name: &str, shape: [usize; 2]| {
        b.buffer(name, Role::Weight, dtype, &shape, Some(rng.numbers(shape[0] * shape[1])))
    };
    let gate_up = matrix("gate_up", [EXPERTS * 2 * ffn, hidden]);
    let down = matrix("down", [EXPERTS * hidden, ffn]);
    let inner = b.buffer("inner", Role::Scratch, DType::F32, &[rows, CHOSEN, ffn], None);
    let out = b.buffer("out", Role::Scratch, DType::F32, &[rows, CHOSEN, hidden], None);
    let (batch, eps) = (b.batch, 1e-5);
    let held = b.run(
        &mut gpu,
        vec![
            Op::GroupRows { batch, experts, groups },
            Op::ExpertGateUp { batch, eps, x, norm, weight: gate_up, groups, out: inner },
            Op::ExpertDown { batch, x: inner, weight: down, groups, out },
        ],
    );
    for entry in 0..entries {
        let x = &b.numbers(x)[entry / CHOSEN * hidden..][..hidden];
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / hidden as f64;
        let x: Vec<f64> =
            x.iter().zip(b.numbers(norm)).map(|(&x, &g)| f64::from(x) * f64::from(g) / (mean + 1e-5).sqrt()).collect();
        let half = |half: usize, i: usize| {
            let row = (2 * chosen[entry] + half) * ffn + i;
            dot(&b.numbers(gate_up)[row * hidden..][..hidden], &x)
        };
        let gated: Vec<f64> =
            (0..ffn).map(|i| (half(0, i), half(1, i))).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        assert_close(&format!("{what}: gated entry {entry}"), &held[inner.0][entry * ffn..], &gated, 1e-5);
        let down = |i: usize| dot(&b.numbers(down)[(chosen[entry] * hidden + i) * ffn..][..ffn], &gated);
        let want: Vec<f64> = (0..hidden).map(down).collect();
        assert_close(&format!("{what}: entry {entry}"), &held[out.0][entry * hidden..], &want, 1e-5);
    }
    assert!(held[out.0][entries * hidden..].iter().all(|&x| x == 0.0), "{what}: rows past the end are left alone");
}

#[test]
fn experts_may_lie_in_any_banks() {
    check_experts(0, DType::BF16, [40, 24], usize::MAX);
    check_experts(20, DType::F32, [40, 24], usize::MAX);
    // Banks of 48 rows of 80 bytes, as many as an expert has; of 32 and of 16, so that gate and up rows are banks apart.
    for (tree, binding_bytes) in [(3, 3840), (3, 2560), (1, 1280)] {
        check_experts(tree, DType::BF16, [40, 24], binding_bytes);
    }
    check_experts(20, DType::F16, [24, 40], 7200);
}

//! Draw, top-k, accept and commit; and what goes wrong on a device.

use treespark_kernel_gen::layout::accepted_words;
use treespark_kernel_gen::{Buf, BufferDesc, DType, MAX_NODES, Op, Pass, Role, Row, TreeShape, TreeSpec};

use super::{Bench, Heads, MAX_REQUESTS, Rng, chains, gpu, place};
use crate::backend::{Backend, BufferId, Extent};
use crate::error::Error;
use crate::wgpu::WgpuBackend;

/// Greedy: the draws along the accepted path, and the cache moved together.
#[test]
fn draw_accept_and_commit_follow_the_draws() {
    for (binding_bytes, requests) in [(usize::MAX, 1), (6160, 2)] {
        let Some(mut gpu) = gpu(binding_bytes) else { return };
        let tree: TreeShape = "2x2".parse().unwrap();
        let mut b = Bench::new(&vec![(6, tree); requests], 0, 4, 16);
        let rows = b.rows.len();
        let vocab = 70;
        // Node 2 and its child 6 are what the target draws; so are the tokens of the other leaves, at the wrong parent.
        let tokens = [10, 11, 12, 13, 14, 15, 16];
        let drawn = [12, 13, 16, 1, 1, 1, 69];
        let mut logits = Rng(17).numbers(rows * vocab);
        for r in 0..rows {
            logits[r * vocab + drawn[r % 7]] = 9.0;
            b.rows[r].token = tokens[r % 7];
        }
        b.held[0] = Some(b.rows.iter().flat_map(Row::to_words).map(f32::from_bits).collect());
        let h = Heads { heads: 1, kv_heads: 1, dim: 16, page_size: 4, cache: DType::BF16 };
        let len = 2 * b.pages.len() * 4 * 16;
        let (cache, k_cache, v_cache) = h.caches(&mut b, Some(Rng(19).numbers(len)));
        let seen = b.buffer("seen", Role::Input, DType::U32, &[MAX_REQUESTS, 3], None);
        let logits = b.buffer("logits", Role::Scratch, DType::F32, &[rows, vocab], Some(logits));
        let draws = b.buffer("draws", Role::Output, DType::U32, &[rows], None);
        let ids = b.buffer("ids", Role::Output, DType::U32, &[rows, 3], None);
        let values = b.buffer("values", Role::Output, DType::F32, &[rows, 3], None);
        let accepted = b.buffer("accepted", Role::Output, DType::U32, &[MAX_REQUESTS, accepted_words(MAX_NODES)], None);
        let batch = b.batch;
        let ops = vec![
            Op::Draw { batch, seen, logits, draws },
            Op::TopK { batch, logits, ids, values },
            Op::Accept { batch, tree: TreeSpec::Any(64), draws, accepted },
            Op::Commit { batch, accepted, k_cache, v_cache: Some(v_cache) },
        ];
        let held = b.run(&mut gpu, ops);
        let word = |buf: Buf, i: usize| held[buf.0][i].to_bits();
        for request in 0..requests {
            let at = request * accepted_words(MAX_NODES);
            assert_eq!(word(accepted, at), 3);
            assert_eq!([0, 1, 2].map(|i| word(accepted, at + 1 + i)), [0, 2, 6]);
            assert_eq!([0, 1, 2].map(|i| word(accepted, at + 1 + MAX_NODES + i)), [12, 16, 69]);
            assert_eq!(word(ids, request * 7 * 3), 12);
            assert_eq!(held[values.0][request * 7 * 3], 9.0);
            for (depth, node) in [(1, 2), (2, 6)] {
                let index = |slot: usize, layer: usize| {
                    let (page, place) = b.slot(request, slot);
                    cache.index(layer, page, 0, place)
                };
                for (layer, buf) in [(0, k_cache), (1, v_cache)] {
                    let (to, source) = (index(6 + depth, layer), index(6 + node, layer));
                    assert_eq!(held[buf.0][to..to + 16], b.numbers(buf)[source..source + 16], "depth {depth}");
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_had_is_an_error_with_its_size() {
    assert!(matches!(WgpuBackend::new(99), Err(Error::NoDevice { .. })));
    let Some(mut gpu) = gpu(usize::MAX) else { return };
    let shape = vec![1 << 20, 1 << 20];
    let desc = BufferDesc { name: "logits".into(), role: Role::Scratch, dtype: DType::F32, shape };
    let error = gpu.alloc(&desc).unwrap_err();
    assert!(
        matches!(&error, Error::OutOfMemory { needed, what, .. } if *needed == 4 << 40 && what == "logits"),
        "{error}"
    );
    // The device is none the worse for it.
    let desc = BufferDesc { shape: vec![3], ..desc };
    let id = gpu.alloc(&desc).unwrap();
    gpu.write(id, 1, &[7]).unwrap();
    assert_eq!(gpu.read(id, 0, 3).unwrap(), [0, 7, 0]);
    // A freed buffer's pass must not run again; if it does, that is no panic.
    let Some(out) = check_stale_pass(&mut gpu) else { return };
    assert!(matches!(out, Error::Device(_)), "{out}");
}

fn check_stale_pass(gpu: &mut WgpuBackend) -> Option<Error> {
    let mut b = Bench::new(&chains(&[1]), 0, 4, 8);
    let table = b.buffer("table", Role::Weight, DType::F32, &[16, 24], Some(vec![0.0; 16 * 24]));
    let out = b.buffer("out", Role::Scratch, DType::F32, &[2, 24], None);
    let pass = Pass { ops: vec![Op::Embed { batch: b.batch, table, out }], ..b.pass.clone() };
    let ids: Vec<BufferId> =
        pass.buffers.iter().zip(&b.held).map(|(desc, numbers)| place(gpu, desc, numbers.as_deref())).collect();
    let compiled = gpu.compile(&pass, &ids).unwrap();
    gpu.free(ids[table.0]);
    gpu.run(compiled, Extent { rows: 2, requests: 1, keys: 7 }).err()
}

//! A model's logits on a backend, for whole sequences: what parity and the near-tie checker compare.

use treespark::backend::{Backend, Extent};
use treespark_kernel_gen::{DType, MAX_NODES, Role, TreeSpec};
use treespark_models::{Dims, Llama, Model};

use crate::batch::{Batch, Member, Tree};

/// The logits of every position of each sequence, computed in as few passes as hold it.
pub fn logits(
    backend: &mut dyn Backend,
    model: &Model,
    cache_dtype: DType,
    sequences: &[Vec<u32>],
) -> Vec<Vec<Vec<f32>>> {
    let (config, vocab) = (model.config(), model.config().vocab_size);
    let longest = sequences.iter().map(Vec::len).max().expect("there are sequences");
    let (page_size, pages) = (16, longest.div_ceil(16));
    let rows = longest.min(MAX_NODES);
    let dims = Dims {
        max_rows: rows,
        head_rows: rows,
        max_requests: 1,
        context: longest,
        page_size,
        pages,
        pages_per_request: pages,
        top_k: 1,
        cache_dtype,
        tree: TreeSpec::Any(MAX_NODES),
    };
    let mut weights = Vec::new();
    for item in model.weights(dims.context) {
        let (desc, parts) = item.unwrap();
        weights.push((backend.load(&desc, &parts).unwrap(), desc));
    }
    let pass = Llama::new(config, &dims).logits_pass(rows).unwrap();
    let buffers: Vec<_> = pass
        .buffers
        .iter()
        .map(|desc| match weights.iter().find(|(_, known)| known == desc) {
            Some((id, _)) => *id,
            None => {
                assert_ne!(desc.role, Role::Weight, "{} was not loaded", desc.name);
                backend.alloc(desc).unwrap()
            }
        })
        .collect();
    let buffer = |name: &str| buffers[pass.buffers.iter().position(|desc| desc.name == name).expect(name)];
    let compiled = backend.compile(&pass, &buffers).unwrap();
    backend.write(buffer("pages"), 0, &(0..pages as u32).collect::<Vec<_>>()).unwrap();
    let mut all = Vec::new();
    for tokens in sequences {
        let mut of_sequence = Vec::new();
        for (part, done) in tokens.chunks(rows).zip((0..).step_by(rows)) {
            let batch = Batch { members: vec![Member::new(&tokens[..done], Tree::chain(part))] };
            backend.write(buffer("rows"), 0, &batch.row_words()).unwrap();
            backend.write(buffer("requests"), 0, &batch.request_words()).unwrap();
            backend.run(compiled, Extent { rows: part.len(), requests: 1, keys: done + part.len() }).unwrap();
            let words = backend.read(buffer("logits"), 0, part.len() * vocab).unwrap();
            of_sequence.extend(words.chunks(vocab).map(|row| row.iter().map(|&w| f32::from_bits(w)).collect()));
        }
        all.push(of_sequence);
    }
    all
}

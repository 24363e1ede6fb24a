//! A model's logits on a backend, for whole sequences: what parity and the near-tie checker compare.

use treespark::backend::{Backend, BufferId, Extent, PassId};
use treespark_kernel_gen::{DType, MAX_NODES, Role, TreeSpec};
use treespark_models::{Dims, Llama, Model};

use crate::batch::{Batch, Member, Tree};

/// The logits of every position of each sequence.
pub fn logits(
    backend: &mut dyn Backend,
    model: &Model,
    cache_dtype: DType,
    sequences: &[Vec<u32>],
) -> Vec<Vec<Vec<f32>>> {
    let longest = sequences.iter().map(Vec::len).max().expect("there are sequences");
    let pass = LogitsPass::load(backend, model, cache_dtype, longest);
    sequences.iter().map(|tokens| pass.run(backend, tokens)).collect()
}

/// A model on a backend whose passes end at the logits, for sequences up to a length.
pub struct LogitsPass {
    compiled: PassId,
    rows: BufferId,
    requests: BufferId,
    logits: BufferId,
    max_rows: usize,
    vocab: usize,
}

impl LogitsPass {
    pub fn load(backend: &mut dyn Backend, model: &Model, cache_dtype: DType, longest: usize) -> LogitsPass {
        let (page_size, pages) = (16, longest.div_ceil(16));
        let max_rows = longest.min(MAX_NODES);
        let dims = Dims {
            max_rows,
            head_rows: max_rows,
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
        let pass = Llama::new(model.config(), &dims).logits_pass(max_rows).unwrap();
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
        let (rows, requests, logits) = (buffer("rows"), buffer("requests"), buffer("logits"));
        LogitsPass { compiled, rows, requests, logits, max_rows, vocab: model.config().vocab_size }
    }

    /// The logits at every position, computed in as few passes as hold them.
    pub fn run(&self, backend: &mut dyn Backend, tokens: &[u32]) -> Vec<Vec<f32>> {
        let mut all = Vec::new();
        for (part, done) in tokens.chunks(self.max_rows).zip((0..).step_by(self.max_rows)) {
            let batch = Batch { members: vec![Member::new(&tokens[..done], Tree::chain(part))] };
            backend.write(self.rows, 0, &batch.row_words()).unwrap();
            backend.write(self.requests, 0, &batch.request_words()).unwrap();
            let extent = Extent { rows: part.len(), requests: 1, keys: done + part.len() };
            backend.run(self.compiled, extent).unwrap();
            let words = backend.read(self.logits, 0, part.len() * self.vocab).unwrap();
            all.extend(
                words.chunks(self.vocab).map(|row| row.iter().map(|&w| f32::from_bits(w)).collect::<Vec<f32>>()),
            );
        }
        all
    }
}

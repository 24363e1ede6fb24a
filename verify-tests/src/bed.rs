//! A tiny model laid out on a backend: allocates and poisons its buffers, fills prefixes, runs passes, reads results.
//!
//! Everything that no pass has written holds NaN (or, in integer buffers, a word that is no valid id), and the unused
//! entries of the page table point at a page of NaN. What leaks shows.

use std::collections::HashMap;

use half::{bf16, f16};
use treespark::backend::{Backend, BufferId, Extent, PassId};
use treespark_kernel_gen::layout::accepted_words;
use treespark_kernel_gen::{BufferDesc, DType, MAX_NODES, Pass, Role, TreeSpec};

use crate::batch::{Batch, Member, Tree};
use crate::conformance::agreement::Agreement;
use crate::near_tie::DrawContext;
use crate::rng::Rng;
use crate::tiny_model::{MAX_REQUESTS, MAX_ROWS, MAX_SLOTS, Sizes, TOP_K, Tail, TinyModel};

/// What integer buffers hold before a pass writes them.
pub const POISON: u32 = 0xDEAD_BEEF;

/// Nodes of one prefill chunk.
const CHUNK: usize = 64;

pub struct Bed<'a> {
    pub backend: &'a mut dyn Backend,
    pub model: TinyModel,
    buffers: HashMap<String, (BufferDesc, BufferId)>,
    compiled: Vec<(Pass, PassId)>,
    pages: Vec<Vec<u32>>,
}

/// The result of a whole-model pass, by row.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// How each row was to be drawn.
    pub contexts: Vec<DrawContext>,
    /// How closely another run must agree.
    pub agreement: Agreement,
    pub logits: Vec<Vec<f32>>,
    pub draws: Vec<u32>,
    pub top_ids: Vec<Vec<u32>>,
    pub top_values: Vec<Vec<f32>>,
}

/// Keys and values of one slot, `[layer][k, v][kv_head][head_dim]`, flat, as the cache's own bits widened to f32.
pub type SlotValues = Vec<f32>;

/// An accepted path and the draws along it; empty for a request without rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    pub path: Vec<u32>,
    pub tokens: Vec<u32>,
}

impl<'a> Bed<'a> {
    pub fn new(backend: &'a mut dyn Backend, model: TinyModel) -> Bed<'a> {
        let pages = shuffled_pages(&model.sizes, model.seed);
        Bed { backend, model, buffers: HashMap::new(), compiled: Vec::new(), pages }
    }

    /// The buffer of this description: loaded if it is a weight, else poisoned.
    pub fn buffer(&mut self, desc: &BufferDesc) -> BufferId {
        if let Some((known, id)) = self.buffers.get(&desc.name) {
            assert_eq!((&known.shape, known.dtype), (&desc.shape, desc.dtype));
            return *id;
        }
        let id = if desc.role == Role::Weight {
            self.backend.load(desc, &[self.model.weight(desc)]).expect("load")
        } else {
            let id = self.backend.alloc(desc).expect("alloc");
            let poison = match desc.dtype {
                DType::F32 => f32::NAN.to_bits(),
                DType::F16 => u32::from(f16::NAN.to_bits()) * 0x1_0001,
                DType::BF16 => u32::from(bf16::NAN.to_bits()) * 0x1_0001,
                DType::U32 => POISON,
            };
            self.backend.write(id, 0, &vec![poison; desc.bytes() / 4]).expect("poison");
            id
        };
        self.buffers.insert(desc.name.clone(), (desc.clone(), id));
        id
    }

    /// Makes the buffers of a pass, so that they can be written.
    pub fn prepare(&mut self, pass: &Pass) {
        pass.buffers.iter().for_each(|desc| {
            self.buffer(desc);
        });
    }

    /// Makes the buffers of a pass and fills all but weights with zeros instead of poison.
    pub fn clear(&mut self, pass: &Pass) {
        self.prepare(pass);
        for desc in pass.buffers.iter().filter(|desc| desc.role != Role::Weight) {
            self.write(&desc.name, &vec![0; desc.bytes() / 4]);
        }
    }

    pub fn write(&mut self, name: &str, words: &[u32]) {
        let id = self.buffers[name].1;
        self.backend.write(id, 0, words).expect("write");
    }

    pub fn write_floats(&mut self, name: &str, values: &[f32]) {
        self.write(name, &values.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    }

    pub fn words(&mut self, name: &str, len: usize) -> Vec<u32> {
        let id = self.buffers[name].1;
        self.backend.read(id, 0, len).expect("read")
    }

    /// The first `len` elements of a buffer of floats, widened to f32 (exact).
    pub fn floats(&mut self, name: &str, len: usize) -> Vec<f32> {
        let (desc, id) = self.buffers[name].clone();
        let words = self.backend.read(id, 0, (len * desc.dtype.size()).div_ceil(4)).expect("read");
        let halves = || words.iter().flat_map(|w| [*w as u16, (w >> 16) as u16]);
        let values: Vec<f32> = match desc.dtype {
            DType::F32 => words.iter().map(|&w| f32::from_bits(w)).collect(),
            DType::F16 => halves().map(|h| f16::from_bits(h).to_f32()).collect(),
            DType::BF16 => halves().map(|h| bf16::from_bits(h).to_f32()).collect(),
            DType::U32 => panic!("{name} holds words"),
        };
        values[..len].to_vec()
    }

    /// Writes the batch and runs the pass on it.
    pub fn run(&mut self, pass: &Pass, batch: &Batch) {
        let compiled = self.compile(pass);
        self.write_batch(batch);
        let extent = Extent { rows: batch.rows(), requests: batch.members.len(), keys: batch.keys() };
        self.backend.run(compiled, extent).expect("run");
    }

    /// Runs the pass on the batch that is there; `batch` says how large it may be.
    pub fn run_as_it_is(&mut self, pass: &Pass, batch: &Batch) {
        let compiled = self.compile(pass);
        let extent = Extent { rows: pass.rows, requests: batch.members.len(), keys: batch.keys() + pass.rows };
        self.backend.run(compiled, extent).expect("run");
    }

    fn compile(&mut self, pass: &Pass) -> PassId {
        let ids: Vec<BufferId> = pass.buffers.iter().map(|desc| self.buffer(desc)).collect();
        if let Some((_, id)) = self.compiled.iter().find(|(known, _)| known == pass) {
            return *id;
        }
        let id = self.backend.compile(pass, &ids).expect("compile");
        self.compiled.push((pass.clone(), id));
        id
    }

    pub fn write_batch(&mut self, batch: &Batch) {
        assert!(batch.rows() <= MAX_ROWS && batch.members.len() <= MAX_REQUESTS, "batch too large for the bed");
        assert!(batch.members.iter().all(|m| m.slots() <= MAX_SLOTS), "request too long for the bed");
        self.write("rows", &batch.row_words());
        self.write("requests", &batch.request_words());
        let width = self.model.sizes.pages_per_request();
        let nobody = self.model.sizes.pages() as u32 - 1;
        let mut table = vec![nobody; MAX_REQUESTS * width];
        for (request, member) in batch.members.iter().enumerate() {
            let used = member.slots().div_ceil(self.model.sizes.page_size);
            table[request * width..][..used].copy_from_slice(&self.pages[request][..used]);
        }
        self.write("pages", &table);
        if self.buffers.contains_key("seen") {
            self.write("seen", &batch.seen_words(self.model.sizes.vocab));
        }
    }

    /// Computes the prefixes of all members into the cache, in chunks, as a prompt is. The pass is that of most trees: one
    /// of another size would be other kernels.
    pub fn prefill(&mut self, batch: &Batch) {
        let pass = self.model.pass(MAX_ROWS, &TreeSpec::Any(MAX_NODES), Tail::Draw);
        let longest = batch.members.iter().map(|m| m.prefix.len()).max().unwrap_or(0);
        for start in (0..longest).step_by(CHUNK) {
            // A request whose prefix is complete computes its first tree node, which its verify pass overwrites.
            let chunk = |m: &Member| match m.prefix.len() {
                len if len > start => {
                    Member::new(&m.prefix[..start], Tree::chain(&m.prefix[start..len.min(start + CHUNK)]))
                }
                _ => Member::new(&m.prefix, Tree::chain(&m.tree.tokens[..1])),
            };
            self.run(&pass, &Batch { members: batch.members.iter().map(chunk).collect() });
        }
    }

    /// Prefills, then runs the trees in a pass that is compiled for `rows` rows.
    pub fn verify(&mut self, batch: &Batch, rows: usize, tree: &TreeSpec) -> Outputs {
        self.prefill(batch);
        self.decode(batch, rows, tree)
    }

    /// Runs the trees on prefixes that are in the cache already.
    pub fn decode(&mut self, batch: &Batch, rows: usize, tree: &TreeSpec) -> Outputs {
        let pass = self.model.pass(rows, tree, Tail::Draw);
        self.run(&pass, batch);
        self.outputs(batch)
    }

    pub fn outputs(&mut self, batch: &Batch) -> Outputs {
        let (rows, vocab) = (batch.rows(), self.model.sizes.vocab);
        Outputs {
            contexts: batch.draw_contexts(),
            agreement: self.agreement(),
            logits: self.floats("logits", rows * vocab).chunks(vocab).map(<[f32]>::to_vec).collect(),
            draws: self.words("draws", rows),
            top_ids: self.words("top_ids", rows * TOP_K).chunks(TOP_K).map(<[u32]>::to_vec).collect(),
            top_values: self.floats("top_values", rows * TOP_K).chunks(TOP_K).map(<[f32]>::to_vec).collect(),
        }
    }

    /// How closely two runs on this backend agree about this model.
    pub fn agreement(&self) -> Agreement {
        Agreement::of(self.backend.info().backend, &self.model.sizes)
    }

    pub fn accepted(&mut self, request: usize) -> Accepted {
        let words = self.words("accepted", MAX_REQUESTS * accepted_words(MAX_NODES));
        let words = &words[request * accepted_words(MAX_NODES)..];
        let n = words[0] as usize;
        assert!(n <= MAX_NODES, "{n} accepted nodes");
        Accepted { path: words[1..=n].to_vec(), tokens: words[1 + MAX_NODES..][..n].to_vec() }
    }

    /// What the cache holds of a request in slots `0..slots`.
    pub fn cached(&mut self, request: usize, slots: usize) -> Vec<SlotValues> {
        let s = self.model.sizes;
        let len = s.layers * s.pages() * s.kv_heads * s.page_size * s.head_dim;
        let caches: Vec<_> = s.caches().iter().map(|name| self.floats(name, len)).collect();
        let one = |slot: usize| {
            let page = self.pages[request][slot / s.page_size] as usize;
            let mut values = Vec::new();
            for layer in 0..s.layers {
                for cache in &caches {
                    for head in 0..s.kv_heads {
                        let place = ((layer * s.pages() + page) * s.kv_heads + head) * s.page_size + slot % s.page_size;
                        values.extend(&cache[place * s.head_dim..(place + 1) * s.head_dim]);
                    }
                }
            }
            values
        };
        (0..slots).map(one).collect()
    }
}

impl Drop for Bed<'_> {
    fn drop(&mut self) {
        for (_, id) in self.buffers.values() {
            self.backend.free(*id);
        }
    }
}

/// Pages of the pool by request, in random order; the last page is nobody's.
fn shuffled_pages(sizes: &Sizes, seed: u64) -> Vec<Vec<u32>> {
    let mut pages: Vec<u32> = (0..sizes.pages() as u32 - 1).collect();
    Rng::new(seed).shuffle(&mut pages);
    pages.chunks(sizes.pages_per_request()).map(<[u32]>::to_vec).collect()
}

//! The naive f64 oracle: every op in the plainest loops, the definition that backends are compared with.
//!
//! It shares no code with any backend, keeps every number in f64 (a cache value is rounded to the cache's dtype when
//! it is written, as the op's definition says), and runs a pass when it is asked to, op by op, row by row. It is a
//! [`Backend`] too, so that the same properties are run on it: they must hold of the definition itself.

mod drafting;
mod experts;
mod growth;
mod latent;
mod layers;
mod philox;
mod sampling;
mod speculation;
mod trellis;

use half::{bf16, f16};
use treespark::Result;
use treespark::backend::{Backend, BufferId, DeviceInfo, Extent, PassCost, PassId};
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{Buf, BufferDesc, DType, MAX_NODES, Op, Pass, Request, Row};
use treespark_models::Tensor;

pub use philox::{gumbel, philox4x32};
pub use sampling::{Scored, draw, law, scores};

/// A buffer: words, or numbers in f64 that are encoded only when the host reads them.
#[derive(Debug)]
pub(crate) enum Memory {
    Words(Vec<u32>),
    Numbers { dtype: DType, values: Vec<f64> },
}

#[derive(Debug)]
pub struct Oracle {
    info: DeviceInfo,
    memory: Vec<Memory>,
    /// Each one or more, which run one after the other.
    passes: Vec<Vec<(Pass, Vec<BufferId>)>>,
}

impl Default for Oracle {
    fn default() -> Self {
        Self::new()
    }
}

impl Oracle {
    pub fn new() -> Oracle {
        let info = DeviceInfo {
            backend: "oracle",
            name: "the naive f64 oracle".into(),
            cost: PassCost::new(&[(1, 1.0), (2, 2.0)]),
            layer_bytes: 0,
        };
        Oracle { info, memory: Vec::new(), passes: Vec::new() }
    }
}

impl Backend for Oracle {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn drafts(&self) -> bool {
        true
    }

    fn load(&mut self, desc: &BufferDesc, parts: &[Tensor]) -> Result<BufferId> {
        let bytes: Vec<u8> = parts.iter().flat_map(|part| part.bytes.as_slice().iter().copied()).collect();
        let id = self.alloc(desc)?;
        let values = bytes.chunks(desc.dtype.size()).map(|b| decode(desc.dtype, b)).collect();
        self.memory[id.0] = Memory::Numbers { dtype: desc.dtype, values };
        Ok(id)
    }

    fn alloc(&mut self, desc: &BufferDesc) -> Result<BufferId> {
        self.memory.push(match desc.dtype {
            DType::U32 => Memory::Words(vec![0; desc.len()]),
            dtype => Memory::Numbers { dtype, values: vec![0.0; desc.len()] },
        });
        Ok(BufferId(self.memory.len() - 1))
    }

    fn free(&mut self, buffer: BufferId) {
        self.memory[buffer.0] = Memory::Words(Vec::new());
    }

    fn write(&mut self, buffer: BufferId, offset: usize, words: &[u32]) -> Result<()> {
        match &mut self.memory[buffer.0] {
            Memory::Words(to) => to[offset..offset + words.len()].copy_from_slice(words),
            Memory::Numbers { dtype, values } => {
                let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                let first = offset * 4 / dtype.size();
                for (i, element) in bytes.chunks(dtype.size()).enumerate() {
                    values[first + i] = decode(*dtype, element);
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: BufferId, offset: usize, len: usize) -> Result<Vec<u32>> {
        Ok(match &self.memory[buffer.0] {
            Memory::Words(from) => from[offset..offset + len].to_vec(),
            Memory::Numbers { dtype, values } => {
                let per_word = 4 / dtype.size();
                let elements = &values[offset * per_word..(offset + len) * per_word];
                let word = |word: &[f64]| word.iter().rev().fold(0, |word, &v| word << 16 | encode(*dtype, v));
                elements.chunks(per_word).map(word).collect()
            }
        })
    }

    fn compile(&mut self, pass: &Pass, buffers: &[BufferId]) -> Result<PassId> {
        self.passes.push(vec![(pass.clone(), buffers.to_vec())]);
        Ok(PassId(self.passes.len() - 1))
    }

    fn join(&mut self, passes: &[PassId]) -> Result<PassId> {
        self.passes.push(passes.iter().flat_map(|pass| self.passes[pass.0].clone()).collect());
        Ok(PassId(self.passes.len() - 1))
    }

    /// The extent is only a hint: everything is read from the batch buffers.
    fn run(&mut self, pass: PassId, _extent: Extent) -> Result<()> {
        let ops = self.passes[pass.0].iter().flat_map(|(pass, ids)| pass.ops.iter().map(move |op| (pass, ids, op)));
        for (pass, ids, op) in ops {
            let mut step = Step { pass, ids, memory: &mut self.memory, batch: *op.batch() };
            match op {
                Op::Embed { .. } => step.embed(op),
                Op::Qkv { .. } => step.qkv(op),
                Op::TreeAttention { .. } => step.tree_attention(op),
                Op::Project { .. } => step.project(op),
                Op::GateUp { .. } => step.gate_up(op),
                Op::Latent { .. } => step.latent(op),
                Op::LatentQueries { .. } => step.latent_queries(op),
                Op::PerHead { .. } => step.per_head(op),
                Op::LatentAttention { .. } => step.latent_attention(op),
                Op::Route { .. } => step.route(op),
                Op::GroupRows { .. } => step.group_rows(op),
                Op::ExpertGateUp { .. } => step.expert_gate_up(op),
                Op::ExpertDown { .. } => step.expert_down(op),
                Op::Combine { .. } => step.combine(op),
                Op::ResBlock { .. } => step.res_block(op),
                Op::Norm { .. } => step.norm(op),
                Op::Gather { .. } => step.gather(op),
                Op::Head { .. } => step.head(op),
                Op::Mask { .. } => step.mask(op),
                Op::Draw { .. } => step.draw(op),
                Op::Perturb { .. } => step.perturb(op),
                Op::TopK { .. } => step.top_k(op),
                Op::Accept { .. } => step.accept(op),
                Op::Commit { .. } => step.commit(op),
                Op::DraftNgram { .. } => step.draft_ngram(op),
                Op::Grow { .. } => step.grow(op),
                Op::OpenBlock { .. } => step.open_block(op),
                Op::Trellis { .. } => step.trellis(op),
                Op::GrowTrellis { .. } => step.grow_trellis(op),
            }
        }
        Ok(())
    }
}

/// One op of a pass being executed: access to its buffers, one number at a time.
pub(crate) struct Step<'a> {
    pub pass: &'a Pass,
    ids: &'a [BufferId],
    memory: &'a mut [Memory],
    batch: Batch,
}

/// A row of the batch, as the oracle sees it: its path is spelled out.
pub(crate) struct RowView {
    pub token: u32,
    pub position: usize,
    pub request: usize,
    pub node: usize,
    /// Node ids from the root to this node.
    pub path: Vec<usize>,
}

impl Step<'_> {
    fn memory(&self, buf: Buf) -> &Memory {
        &self.memory[self.ids[buf.0].0]
    }

    pub fn get(&self, buf: Buf, at: usize) -> f64 {
        match self.memory(buf) {
            Memory::Numbers { values, .. } => values[at],
            Memory::Words(_) => panic!("{} holds words", self.pass.buffer(buf).name),
        }
    }

    pub fn slice(&self, buf: Buf, at: usize, len: usize) -> Vec<f64> {
        (at..at + len).map(|i| self.get(buf, i)).collect()
    }

    pub fn set(&mut self, buf: Buf, at: usize, value: f64) {
        match &mut self.memory[self.ids[buf.0].0] {
            Memory::Numbers { values, .. } => values[at] = value,
            Memory::Words(_) => panic!("{} holds words", self.pass.buffer(buf).name),
        }
    }

    pub fn word(&self, buf: Buf, at: usize) -> u32 {
        match self.memory(buf) {
            Memory::Words(words) => words[at],
            Memory::Numbers { .. } => panic!("{} holds numbers", self.pass.buffer(buf).name),
        }
    }

    pub fn set_word(&mut self, buf: Buf, at: usize, word: u32) {
        match &mut self.memory[self.ids[buf.0].0] {
            Memory::Words(words) => words[at] = word,
            Memory::Numbers { .. } => panic!("{} holds numbers", self.pass.buffer(buf).name),
        }
    }

    /// Length of the last dimension.
    pub fn width(&self, buf: Buf) -> usize {
        *self.pass.buffer(buf).shape.last().expect("a buffer has dimensions")
    }

    pub fn n_rows(&self) -> usize {
        self.word(self.batch.requests, 0) as usize
    }

    pub fn n_requests(&self) -> usize {
        self.word(self.batch.requests, 1) as usize
    }

    pub fn row(&self, index: usize) -> RowView {
        let at = index * Row::WORDS;
        let word = |i: usize| self.word(self.batch.rows, at + i);
        let path = (0..MAX_NODES).filter(|j| word(4 + j / 32) >> (j % 32) & 1 == 1).collect();
        RowView { token: word(0), position: word(1) as usize, request: word(2) as usize, node: word(3) as usize, path }
    }

    pub fn request(&self, index: usize) -> Request {
        let Memory::Words(words) = self.memory(self.batch.requests) else { panic!("requests are words") };
        Request::read(words, index)
    }

    /// Element 0 of a cached head's vector at a slot of a request.
    pub fn cache_at(&self, cache: Buf, layer: usize, head: usize, slot: Slot) -> usize {
        let [_, pages, kv_heads, page_size, dim] = self.pass.buffer(cache).shape[..] else { panic!("not a cache") };
        let table_width = self.width(self.batch.pages);
        let page = self.word(self.batch.pages, slot.request * table_width + slot.slot / page_size) as usize;
        (((layer * pages + page) * kv_heads + head) * page_size + slot.slot % page_size) * dim
    }

    /// The value as the cache will hold it.
    pub fn rounded(&self, cache: Buf, value: f64) -> f64 {
        let dtype = self.pass.buffer(cache).dtype;
        decode(dtype, &encode(dtype, value).to_le_bytes())
    }
}

/// A cache slot of a request.
#[derive(Clone, Copy)]
pub(crate) struct Slot {
    pub request: usize,
    pub slot: usize,
}

fn decode(dtype: DType, bytes: &[u8]) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
        DType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        DType::BF16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        DType::U32 => panic!("words are not numbers"),
    }
}

/// The bits of an element: the low ones of a word.
fn encode(dtype: DType, value: f64) -> u32 {
    match dtype {
        DType::F32 => (value as f32).to_bits(),
        DType::F16 => u32::from(f16::from_f64(value).to_bits()),
        DType::BF16 => u32::from(bf16::from_f64(value).to_bits()),
        DType::U32 => panic!("words are not numbers"),
    }
}

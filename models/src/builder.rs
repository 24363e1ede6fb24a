//! What every architecture shares when it describes its passes: the sizes, the batch, the cache, and what follows the
//! logits. An architecture adds its weights and its layers.
//!
//! All passes of a model share their buffers by name, so a buffer is described in one place only: here, or for weights
//! in the list that the architecture gives ([`Weight`]).

use treespark_kernel_gen::layout::{HEADER_WORDS, accepted_words, ngram_state_words};
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{
    Buf, BufferDesc, CacheShape, DType, MAX_NODES, Op, Pass, PassError, Request, Role, Row, TreeShape, TreeSpec,
};

use crate::config::Config;
use crate::cut::Cut;

/// The constant sizes and formats of the buffers that a model's passes share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dims {
    /// Rows of the largest pass.
    pub max_rows: usize,
    /// Rows of the logits: the largest pass that has a head.
    pub head_rows: usize,
    pub max_requests: usize,
    /// Positions of the rope table: the longest request, tree included, in tokens.
    pub context: usize,
    /// Cache slots of a page, a power of two.
    pub page_size: usize,
    /// Pages in the pool.
    pub pages: usize,
    pub pages_per_request: usize,
    /// Candidates that a draft pass ranks for each row.
    pub top_k: usize,
    pub cache_dtype: DType,
    /// The trees that attention and acceptance are compiled for. Not bounded by the rows of a pass: a draft pass may
    /// run one level of a tree whose other nodes are in the cache.
    pub tree: TreeSpec,
}

/// Sizes of an n-gram drafter on the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NgramDims {
    /// Of a request's largest tree, root included; 1 drafts nothing: plain decoding.
    pub nodes: usize,
    /// Of a further row, relative to a pass of one.
    pub row_cost: f32,
}

/// A weight buffer, and what it is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    pub desc: BufferDesc,
    pub source: Source,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// Stacked along the first dimension.
    Stack(Vec<Part>),
    /// [`rope::table`](crate::rope::table)
    RopeTable,
}

/// A tensor of the checkpoint, or what is taken of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    pub tensor: String,
    /// As the checkpoint has it.
    pub shape: Vec<usize>,
    pub cut: Option<Cut>,
}

impl Source {
    pub(crate) fn parts(&self) -> &[Part] {
        match self {
            Source::Stack(parts) => parts,
            Source::RopeTable => &[],
        }
    }
}

/// Collects the weight buffers of a model. A part is a tensor's name and its rows.
pub(crate) struct WeightList {
    matrix_dtype: DType,
    weights: Vec<Weight>,
}

impl WeightList {
    pub fn new(matrix_dtype: DType) -> WeightList {
        WeightList { matrix_dtype, weights: Vec::new() }
    }

    pub fn matrix(&mut self, name: impl Into<String>, columns: usize, parts: Vec<(String, usize)>) {
        self.stack(name.into(), self.matrix_dtype, parts, &[columns]);
    }

    pub fn vector(&mut self, name: impl Into<String>, parts: Vec<(String, usize)>) {
        self.stack(name.into(), DType::F32, parts, &[]);
    }

    pub fn rope(&mut self, name: &str, positions: usize, rotated: usize) {
        self.add(name.to_string(), DType::F32, vec![positions, rotated / 2, 2], Source::RopeTable);
    }

    /// What is taken of matrices, `[rows, columns]` each.
    pub fn cut(&mut self, name: impl Into<String>, parts: Vec<(String, [usize; 2], Option<Cut>)>) {
        let cut = |shape, cut: &Option<Cut>| cut.as_ref().map_or(shape, |cut| cut.shape(shape));
        let shapes: Vec<[usize; 2]> = parts.iter().map(|(_, shape, how)| cut(*shape, how)).collect();
        let shape = vec![shapes.iter().map(|[rows, _]| rows).sum(), shapes[0][1]];
        let parts = parts.into_iter().map(|(tensor, shape, cut)| Part { tensor, shape: shape.to_vec(), cut });
        let source = Source::Stack(parts.collect());
        self.add(name.into(), self.matrix_dtype, shape, source);
    }

    pub fn finish(self) -> Vec<Weight> {
        self.weights
    }

    fn stack(&mut self, name: String, dtype: DType, parts: Vec<(String, usize)>, columns: &[usize]) {
        let shape = |rows| [&[rows], columns].concat();
        let total = parts.iter().map(|(_, rows)| rows).sum();
        let parts = parts.into_iter().map(|(tensor, rows)| Part { tensor, shape: shape(rows), cut: None }).collect();
        self.add(name, dtype, shape(total), Source::Stack(parts));
    }

    fn add(&mut self, name: String, dtype: DType, shape: Vec<usize>, source: Source) {
        self.weights.push(Weight { desc: BufferDesc { name, role: Role::Weight, dtype, shape }, source });
    }
}

/// A pass being described.
pub(crate) struct Builder<'a> {
    pub dims: &'a Dims,
    pub pass: Pass,
    pub batch: Batch,
    weights: Vec<Weight>,
    vocab: usize,
}

impl<'a> Builder<'a> {
    pub fn new(name: &str, dims: &'a Dims, rows: usize, vocab: usize, weights: Vec<Weight>) -> Builder<'a> {
        let mut pass = Pass::new(name, rows);
        let mut input = |name: &str, shape: &[usize]| pass.add(name, Role::Input, DType::U32, shape);
        let batch = Batch {
            rows: input("rows", &[dims.max_rows, Row::WORDS]),
            requests: input("requests", &[HEADER_WORDS + dims.max_requests * Request::WORDS]),
            pages: input("pages", &[dims.max_requests, dims.pages_per_request]),
        };
        Builder { dims, pass, batch, weights, vocab }
    }

    pub fn push(&mut self, op: Op) {
        self.pass.ops.push(op);
    }

    /// The checked pass.
    pub fn finish(self) -> Result<Pass, PassError> {
        self.pass.check()?;
        Ok(self.pass)
    }

    /// A weight that the architecture's list must have.
    pub fn weight(&mut self, name: &str) -> Buf {
        self.optional_weight(name).unwrap_or_else(|| panic!("no weight buffer is called {name}"))
    }

    pub fn optional_weight(&mut self, name: &str) -> Option<Buf> {
        let desc = &self.weights.iter().find(|weight| weight.desc.name == name)?.desc;
        Some(self.pass.add(name, desc.role, desc.dtype, &desc.shape))
    }

    /// F32 values for each row of the pass.
    pub fn scratch(&mut self, name: &str, row_shape: &[usize]) -> Buf {
        self.pass.add(name, Role::Scratch, DType::F32, &[&[self.dims.max_rows], row_shape].concat())
    }

    /// What a stack of layers whose buffers begin with `prefix` keeps: "cache.k" and "cache.v", or "cache" of latents.
    pub fn cache(&mut self, prefix: &str, name: &str, config: &Config) -> Buf {
        let Dims { pages, page_size, cache_dtype, .. } = *self.dims;
        let &Config { layers, kv_heads, head_dim, .. } = config;
        let shape = CacheShape { layers, pages, kv_heads, page_size, head_dim }.dims();
        self.pass.add(format!("{prefix}{name}"), Role::Cache, cache_dtype, &shape)
    }

    /// Words for each row of the pass.
    pub fn scratch_words(&mut self, name: &str, row_shape: &[usize]) -> Buf {
        self.pass.add(name, Role::Scratch, DType::U32, &[&[self.dims.max_rows], row_shape].concat())
    }

    /// Which rows each of so many experts has, where a row has `chosen`.
    pub fn expert_groups(&mut self, name: &str, experts: usize, chosen: usize) -> Buf {
        self.pass.add(name, Role::Scratch, DType::U32, &[experts + 1 + self.dims.max_rows * chosen])
    }

    pub fn logits(&mut self) -> Buf {
        self.pass.add("logits", Role::Output, DType::F32, &[self.dims.head_rows, self.vocab])
    }

    pub fn accepted(&mut self) -> Buf {
        let shape = [self.dims.max_requests, accepted_words(MAX_NODES)];
        self.pass.add("accepted", Role::Output, DType::U32, &shape)
    }

    /// Leaves each row the tokens that a grammar allows.
    pub fn mask(&mut self) {
        let (batch, logits) = (self.batch, self.logits());
        let shape = [self.dims.head_rows, self.vocab.div_ceil(32)];
        let allowed = self.pass.add("allowed", Role::Input, DType::U32, &shape);
        self.push(Op::Mask { batch, allowed, logits });
    }

    /// What ends a verify pass.
    pub fn draw_and_accept(&mut self) {
        let (batch, logits, tree, accepted) = (self.batch, self.logits(), self.dims.tree.clone(), self.accepted());
        let seen_shape = [self.dims.max_requests, self.vocab.div_ceil(32)];
        let seen = self.pass.add("seen", Role::Input, DType::U32, &seen_shape);
        let draws = self.pass.add("draws", Role::Output, DType::U32, &[self.dims.max_rows]);
        self.push(Op::Draw { batch, seen, logits, draws });
        self.push(Op::Accept { batch, tree, draws, accepted });
    }

    /// Drafts the next round on the device, of up to so many nodes for each request.
    pub fn draft_ngram(&mut self, drafter: NgramDims) {
        let (batch, accepted, &Dims { max_requests, context, .. }) = (self.batch, self.accepted(), self.dims);
        let NgramDims { nodes, row_cost } = drafter;
        let mut input = |name: &str, words: usize| self.pass.add(name, Role::Input, DType::U32, &[max_requests, words]);
        let (history, state) =
            (input("history", context.next_multiple_of(4)), input("state", ngram_state_words(nodes)));
        self.push(Op::DraftNgram { batch, accepted, history, state, row_cost });
    }

    /// What ends a draft pass.
    pub fn top_k(&mut self) {
        let (batch, logits, ids) = (self.batch, self.logits(), self.top_ids());
        let values = self.pass.add("top_values", Role::Output, DType::F32, &[self.dims.head_rows, self.dims.top_k]);
        self.push(Op::TopK { batch, logits, ids, values });
    }

    /// Grows trees by the shape's last level, from what a draft pass over the level above ranked.
    pub fn grow(&mut self, shape: TreeShape) {
        let (batch, ids) = (self.batch, self.top_ids());
        let tokens = self.pass.add("grown", Role::Output, DType::U32, &[self.dims.max_requests, MAX_NODES]);
        self.push(Op::Grow { batch, shape, ids, tokens });
    }

    fn top_ids(&mut self) -> Buf {
        self.pass.add("top_ids", Role::Output, DType::U32, &[self.dims.head_rows, self.dims.top_k])
    }
}

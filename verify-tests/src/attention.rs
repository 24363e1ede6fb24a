//! Tree attention alone, as plain data: random queries, keys and values for the trees of a case, and the oracle's answer. It
//! runs on a backend, or on somebody else's kernel (`foreign`), over longer prefixes than a whole model has time for.

use half::{bf16, f16};
use treespark::backend::{Backend, BufferId, Extent};
use treespark_kernel_gen::layout::HEADER_WORDS;
use treespark_kernel_gen::op::Batch as BatchBuffers;
use treespark_kernel_gen::{DType, MAX_NODES, Op, Pass, Request, Role, Row, TreeSpec};

use crate::arb::Case;
use crate::batch::Batch;
use crate::bed::POISON;
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::tiny_model::{MAX_REQUESTS, MAX_ROWS, MAX_SLOTS, Sizes, compiled_rows};

/// Slots of one request: those of a tiny model, or ten times as many.
const SLOTS: [usize; 2] = [MAX_SLOTS, 10 * MAX_SLOTS];

/// What queries, keys and values hold. Queries are multiples of an eighth, which tensor cores take as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// Of variance 1.
    Usual,
    /// A product of a query and a key is more than an f16 holds, and so is the sum of a few values. Not for bf16.
    Large,
}

/// One element of a query and of a key, of those that are large: their product is exact.
const LARGE_QUERY: f32 = 256.0;
const LARGE_KEY: f32 = 272.0;
const LARGE_VALUE: f32 = 20000.0;

impl Numbers {
    /// The largest score there may be, before it is scaled.
    pub fn largest_score(self) -> f32 {
        if self == Numbers::Large { LARGE_QUERY * LARGE_KEY } else { 0.0 }
    }

    fn usual(rng: &mut Rng) -> f32 {
        (8.0 * 3f32.sqrt() * (2.0 * rng.unit() as f32 - 1.0)).round() / 8.0
    }

    /// A vector of queries or keys, whose first element is `large` if any is.
    fn vector(self, len: usize, large: f32, rng: &mut Rng) -> Vec<f32> {
        let mut vector: Vec<f32> = (0..len).map(|_| Numbers::usual(rng)).collect();
        if self == Numbers::Large {
            vector[0] = large;
        }
        vector
    }

    fn values(self, len: usize, rng: &mut Rng) -> Vec<f32> {
        let (mean, spread) = if self == Numbers::Large { (LARGE_VALUE, LARGE_VALUE / 4.0) } else { (0.0, 1.0) };
        (0..len).map(|_| mean + spread * Numbers::usual(rng)).collect()
    }
}

/// Attention of the rows of some trees, each over its prefix and its own ancestors.
pub struct Attention {
    /// Of one layer.
    pub sizes: Sizes,
    pub rows: Vec<Row>,
    /// Committed slots of each request.
    pub prefix: Vec<u32>,
    pub scale: f32,
    /// `[rows, heads, head_dim]`
    pub q: Vec<f32>,
    /// `[pages, kv_heads, page_size, head_dim]`. What nothing has written is NaN.
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    pub pages_per_request: usize,
    /// `[requests, pages_per_request]`: slot s of a request lies in page `pages[s / page_size]`.
    pub pages: Vec<u32>,
    /// What is right, `[rows, heads, head_dim]`.
    pub out: Vec<f32>,
    requests: Vec<u32>,
}

impl Attention {
    /// Random queries, keys and values for a case, and the oracle's answer.
    pub fn of(case: &Case) -> Attention {
        Attention::new(case.model.sizes, &case.batch, Numbers::Usual, case.seed)
    }

    pub fn new(sizes: Sizes, batch: &Batch, numbers: Numbers, seed: u64) -> Attention {
        let (sizes, mut rng) = (Sizes { layers: 1, ..sizes }, Rng::new(seed));
        let longest = batch.members.iter().map(|member| member.slots()).max().unwrap_or(0);
        let slots = SLOTS.into_iter().find(|&slots| slots >= longest).expect("a case is not longer");
        let pages_per_request = slots.div_ceil(sizes.page_size);
        // One page more than the requests can own: what unused entries of the page table point at, full of NaN.
        let count = MAX_REQUESTS * pages_per_request + 1;
        let pages = page_table(&sizes, batch, pages_per_request, count, &mut rng);
        let words = batch.row_words();
        let rows: Vec<Row> = (0..batch.rows()).map(|row| Row::read(&words, row)).collect();
        let dim = sizes.head_dim;
        let q = (0..rows.len() * sizes.heads()).flat_map(|_| numbers.vector(dim, LARGE_QUERY, &mut rng)).collect();
        let [mut keys, mut values] = [0, 1].map(|_| vec![f32::NAN; count * sizes.kv_heads * sizes.page_size * dim]);
        for (request, member) in batch.members.iter().enumerate() {
            for (slot, head) in (0..member.slots()).flat_map(|slot| (0..sizes.kv_heads).map(move |head| (slot, head))) {
                let page = pages[request * pages_per_request + slot / sizes.page_size] as usize;
                let at = ((page * sizes.kv_heads + head) * sizes.page_size + slot % sizes.page_size) * dim;
                keys[at..][..dim].copy_from_slice(&numbers.vector(dim, LARGE_KEY, &mut rng));
                values[at..][..dim].copy_from_slice(&numbers.values(dim, &mut rng));
            }
        }
        let prefix = batch.members.iter().map(|member| member.prefix.len() as u32).collect();
        let scale = 1.0 / (dim as f32).sqrt();
        let (requests, out) = (batch.request_words(), Vec::new());
        let mut attention =
            Attention { sizes, rows, prefix, scale, q, keys, values, pages_per_request, pages, out, requests };
        attention.out = attention.run(&mut Oracle::new(), 1).remove(0);
        attention
    }

    /// Where an answer is wrong: the first row and head, and the element that is furthest off.
    pub fn problem(&self, out: &[f32], tolerance: f32) -> Option<String> {
        let dim = self.sizes.head_dim;
        for (at, (got, want)) in out.chunks(dim).zip(self.out.chunks(dim)).enumerate() {
            // A NaN is further off than any number.
            let off = |&d: &usize| (got[d] - want[d]).abs();
            let worst = (0..dim).max_by(|a, b| off(a).total_cmp(&off(b))).expect("a head has elements");
            let fits = off(&worst) <= tolerance;
            if !fits {
                let (place, got, want) = (self.place(at), got[worst], want[worst]);
                return Some(format!("{place}: element {worst} is {got}, not {want} up to {tolerance}"));
            }
        }
        None
    }

    /// Which head of which node the vector of this index is of.
    pub fn place(&self, at: usize) -> String {
        let Row { request, node, .. } = self.rows[at / self.sizes.heads()];
        format!("request {request}, node {node}, head {}", at % self.sizes.heads())
    }

    /// What a backend answers, so many times: whatever counts in it has to find its counters as they were.
    pub fn run(&self, backend: &mut dyn Backend, times: usize) -> Vec<Vec<f32>> {
        let pass = self.pass();
        let buffers: Vec<BufferId> = pass.buffers.iter().map(|desc| backend.alloc(desc).expect("alloc")).collect();
        let out = buffers[6];
        let contents = [
            self.rows.iter().flat_map(Row::to_words).collect(),
            self.requests.clone(),
            self.pages.clone(),
            self.q.iter().map(|x| x.to_bits()).collect(),
            encoded(self.sizes.cache, &self.keys),
            encoded(self.sizes.cache, &self.values),
        ];
        for (desc, (&id, mut words)) in pass.buffers.iter().zip(buffers.iter().zip(contents)) {
            words.resize(desc.bytes() / 4, POISON);
            backend.write(id, 0, &words).expect("write");
        }
        let compiled = backend.compile(&pass, &buffers).expect("compile");
        let keys = self.rows.iter().map(|row| row.position as usize + 1).max().unwrap_or(0);
        let extent = Extent { rows: self.rows.len(), requests: self.prefix.len(), keys };
        let mut once = || {
            backend.write(out, 0, &vec![f32::NAN.to_bits(); self.q.len()]).expect("write");
            backend.run(compiled, extent).expect("run");
            let words = backend.read(out, 0, self.q.len()).expect("read");
            words.into_iter().map(f32::from_bits).collect()
        };
        let answers = (0..times).map(|_| once()).collect();
        buffers.into_iter().for_each(|id| backend.free(id));
        answers
    }

    /// One op on seven buffers.
    fn pass(&self) -> Pass {
        let (s, per_request) = (self.sizes, self.pages_per_request);
        let mut pass = Pass::new("attention", compiled_rows(self.rows.len()));
        let request_words = HEADER_WORDS + MAX_REQUESTS * Request::WORDS;
        let batch = BatchBuffers {
            rows: pass.add("rows", Role::Input, DType::U32, &[MAX_ROWS, Row::WORDS]),
            requests: pass.add("requests", Role::Input, DType::U32, &[request_words]),
            pages: pass.add("pages", Role::Input, DType::U32, &[MAX_REQUESTS, per_request]),
        };
        let shape = [MAX_ROWS, s.heads(), s.head_dim];
        let q = pass.add("q", Role::Input, DType::F32, &shape);
        let cache = [1, MAX_REQUESTS * per_request + 1, s.kv_heads, s.page_size, s.head_dim];
        let [k_cache, v_cache] = ["k_cache", "v_cache"].map(|name| pass.add(name, Role::Cache, s.cache, &cache));
        let out = pass.add("attention", Role::Output, DType::F32, &shape);
        let tree = TreeSpec::Any(MAX_NODES);
        let (heads, kv_heads, scale) = (s.heads(), s.kv_heads, self.scale);
        pass.ops.push(Op::TreeAttention { batch, layer: 0, heads, kv_heads, scale, tree, q, k_cache, v_cache, out });
        pass.check().expect("attention alone is well formed");
        pass
    }
}

/// The words of a buffer of this type.
fn encoded(dtype: DType, values: &[f32]) -> Vec<u32> {
    let halves = |of: fn(f32) -> u16| {
        values
            .chunks(2)
            .map(|pair| u32::from(of(pair[0])) | u32::from(pair.get(1).map_or(0, |&x| of(x))) << 16)
            .collect()
    };
    match dtype {
        DType::F16 => halves(|x| f16::from_f32(x).to_bits()),
        DType::BF16 => halves(|x| bf16::from_f32(x).to_bits()),
        _ => values.iter().map(|x| x.to_bits()).collect(),
    }
}

/// `[requests, pages_per_request]`: pages of the pool in random order, and for what a request does not use the last one.
fn page_table(sizes: &Sizes, batch: &Batch, pages_per_request: usize, count: usize, rng: &mut Rng) -> Vec<u32> {
    let mut free: Vec<u32> = (0..count as u32 - 1).collect();
    rng.shuffle(&mut free);
    let mut pages = vec![count as u32 - 1; MAX_REQUESTS * pages_per_request];
    for (request, member) in batch.members.iter().enumerate() {
        let first = request * pages_per_request;
        let own = first..first + member.slots().div_ceil(sizes.page_size);
        pages[own.clone()].copy_from_slice(&free[own]);
    }
    pages
}

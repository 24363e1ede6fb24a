//! One run of a pass: each op finds its buffers and is computed for the active rows.
//!
//! A buffer that an op writes is taken out of the table while the op runs, so that others can be read beside it.

use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};
use rayon::prelude::*;
use treespark_kernel_gen::layout::accepted_words;
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{Buf, CacheShape, DType, MAX_NODES, Op, Pass, Request, Row};

mod experts;
mod latent;

use super::accept::accept;
use super::attention::{Attention, Span, spans};
use super::buffer::{Buffer, Matrix};
use super::linear::{self, Heads};
use super::simd::{Element, Isa};
use crate::backend::{BufferId, Extent};
use crate::draw::{Scratch, draw, mask, perturb, top_k};

/// Keys whose attention is computed by one thread before another is asked for help.
const MIN_KEYS: usize = 256;

pub struct Run<'a> {
    isa: Isa,
    pass: &'a Pass,
    ids: &'a [BufferId],
    buffers: &'a mut [Buffer],
    /// Active rows.
    n_rows: usize,
}

impl<'a> Run<'a> {
    pub fn new(isa: Isa, pass: &'a Pass, ids: &'a [BufferId], buffers: &'a mut [Buffer], extent: Extent) -> Run<'a> {
        assert!(extent.rows <= pass.rows, "{} rows in a pass for {}", extent.rows, pass.rows);
        Run { isa, pass, ids, buffers, n_rows: extent.rows }
    }

    pub fn all(mut self) {
        if self.n_rows > 0 {
            self.pass.ops.iter().for_each(|op| self.op(op));
        }
    }

    fn op(&mut self, op: &Op) {
        match op {
            Op::Embed { batch, table, out } => self.embed(batch, *table, *out),
            Op::Qkv { .. } => self.qkv(op),
            Op::TreeAttention { k_cache, .. } => match self.pass.buffer(*k_cache).dtype {
                DType::BF16 => self.attention::<bf16>(op),
                DType::F16 => self.attention::<f16>(op),
                DType::F32 => self.attention::<f32>(op),
                DType::U32 => unreachable!("a cache of words"),
            },
            Op::Project { add, x, weight, residual, .. } => self.writing(*residual, |run, residual| {
                let project = if *add { linear::project } else { linear::product };
                project(run.isa, run.matrix(*weight), run.rows(*x), residual);
            }),
            Op::GateUp { eps, x, norm, weight, out, .. } => self.writing(*out, |run, out| {
                let x = linear::normed(run.rows(*x), run.floats(*norm), *eps);
                linear::gate_up(run.isa, run.matrix(*weight), &x, out);
            }),
            Op::Latent { .. } => self.latent(op),
            Op::LatentQueries { .. } => self.latent_queries(op),
            Op::PerHead { heads, x, weight, out, .. } => self.per_head(*heads, *x, *weight, *out),
            Op::LatentAttention { cache, .. } => match self.pass.buffer(*cache).dtype {
                DType::BF16 => self.latent_attention::<bf16>(op),
                DType::F16 => self.latent_attention::<f16>(op),
                DType::F32 => self.latent_attention::<f32>(op),
                DType::U32 => unreachable!("a cache of words"),
            },
            Op::Route { .. } => self.route(op),
            Op::GroupRows { experts, groups, .. } => self.group_rows(*experts, *groups),
            Op::ExpertGateUp { .. } => self.expert_gate_up(op),
            Op::ExpertDown { x, weight, groups, out, .. } => self.expert_down(*x, *weight, *groups, *out),
            Op::Combine { x, weights, residual, .. } => self.combine(*x, *weights, *residual),
            Op::ResBlock { batch, states, weight, bias, out } => self.res_block(batch, [*states, *weight, *bias, *out]),
            Op::Norm { eps, x, norm, out, .. } => self.writing(*out, |run, out| {
                out.copy_from_slice(&linear::normed(run.rows(*x), run.floats(*norm), *eps));
            }),
            Op::Gather { states, sources, out, .. } => self.writing(*out, |run, out| {
                let (width, states) = (run.width(*states), run.floats(*states));
                for (out, &source) in out.chunks_exact_mut(width).zip(run.words(*sources)) {
                    out.copy_from_slice(&states[source as usize * width..][..width]);
                }
            }),
            Op::Head { eps, x, norm, weight, logits, .. } => self.writing(*logits, |run, logits| {
                let x = linear::normed(run.rows(*x), run.floats(*norm), *eps);
                linear::product(run.isa, run.matrix(*weight), &x, logits);
            }),
            Op::Mask { allowed, logits: buf, .. } => self.writing(*buf, |run, logits| {
                let allowed = run.words(*allowed).par_chunks_exact(run.width(*allowed));
                let rows = logits.par_chunks_exact_mut(run.width(*buf)).zip(allowed);
                rows.for_each(|(logits, allowed)| mask(logits, allowed));
            }),
            Op::Draw { batch, seen, logits, draws } => self.draw(batch, *seen, *logits, *draws),
            Op::Perturb { batch, logits: buf } => self.writing(*buf, |run, logits| {
                let vocab = run.width(*buf);
                let rows = run.batch_rows(batch);
                logits.par_chunks_exact_mut(vocab).zip(&rows).for_each(|(logits, row)| {
                    perturb(logits, &run.request(batch, row), row.position);
                });
            }),
            Op::TopK { logits, ids, values, .. } => self.top_k(*logits, *ids, *values),
            Op::Accept { batch, draws, accepted, .. } => {
                let mut out = self.take(*accepted);
                accept(self.words(batch.rows), self.words(batch.requests), self.words(*draws), &mut out);
                self.put(*accepted, out);
            }
            Op::Commit { batch, accepted, k_cache, v_cache } => {
                self.commit(batch, *accepted, *k_cache);
                v_cache.iter().for_each(|&v_cache| self.commit(batch, *accepted, v_cache));
            }
            Op::DraftNgram { .. }
            | Op::Grow { .. }
            | Op::OpenBlock { .. }
            | Op::Trellis { .. }
            | Op::GrowTrellis { .. } => unreachable!("`compile` refuses passes that draft"),
        }
    }

    fn embed(&mut self, batch: &Batch, table: Buf, out: Buf) {
        self.writing(out, |run, out| {
            let table = run.matrix(table);
            for (row, out) in run.batch_rows(batch).iter().zip(out.chunks_exact_mut(table.columns())) {
                table.widen_row(row.token as usize, out);
            }
        });
    }

    fn qkv(&mut self, op: &Op) {
        let &Op::Qkv {
            ref batch,
            layer,
            heads,
            kv_heads,
            eps,
            x,
            norm,
            weight,
            bias,
            q_norm,
            k_norm,
            rope,
            q,
            k_cache,
            v_cache,
        } = op
        else {
            unreachable!("{} is not qkv", op.name())
        };
        let shape = self.pass.cache_shape(k_cache);
        let rows = self.batch_rows(batch);
        let width = kv_heads * shape.head_dim;
        let mut kv = vec![0.0; self.n_rows * 2 * width];
        self.writing(q, |run, q| {
            let x = linear::normed(run.rows(x), run.floats(norm), eps);
            let heads = Heads {
                head_dim: shape.head_dim,
                heads,
                kv_heads,
                eps,
                bias: bias.map(|buf| run.floats(buf)),
                q_norm: q_norm.map(|buf| run.floats(buf)),
                k_norm: k_norm.map(|buf| run.floats(buf)),
                rope: run.floats(rope),
                rows: &rows,
            };
            heads.project(run.isa, run.matrix(weight), &x, q, &mut kv);
        });
        for (cache, from) in [(k_cache, 0), (v_cache, width)] {
            let values = kv.chunks_exact(2 * width).map(|kv| &kv[from..from + width]);
            self.keep(batch, cache, layer, &rows, values);
        }
    }

    /// Puts each row's heads into the cache at its slot.
    fn keep<'v>(
        &mut self,
        batch: &Batch,
        cache: Buf,
        layer: usize,
        rows: &[Row],
        values: impl Iterator<Item = &'v [f32]>,
    ) {
        let shape = self.pass.cache_shape(cache);
        let mut words = self.take(cache);
        for (row, values) in rows.iter().zip(values) {
            let slot = self.request(batch, row).prefix as usize + row.node as usize;
            let at = |head| self.slot(batch, &shape, row.request, slot, layer, head);
            let heads = values.chunks_exact(shape.head_dim).enumerate();
            match self.pass.buffer(cache).dtype {
                DType::BF16 => heads.for_each(|(head, values)| store::<bf16>(&mut words, at(head), values)),
                DType::F16 => heads.for_each(|(head, values)| store::<f16>(&mut words, at(head), values)),
                _ => heads.for_each(|(head, values)| store::<f32>(&mut words, at(head), values)),
            }
        }
        self.put(cache, words);
    }

    fn res_block(&mut self, batch: &Batch, [states, weight, bias, out]: [Buf; 4]) {
        self.writing(out, |run, out| {
            let width = run.width(states);
            for (row, out) in run.batch_rows(batch).iter().zip(out.chunks_exact_mut(width)) {
                let state = &run.floats(states)[row.node as usize * width..][..width];
                let head = (row.position - run.request(batch, row).prefix) as usize;
                run.matrix(weight).multiply(run.isa, head * width..(head + 1) * width, state, out);
                for ((out, bias), state) in out.iter_mut().zip(&run.floats(bias)[head * width..]).zip(state) {
                    let x = *out + bias;
                    *out = state + x / (1.0 + (-x).exp());
                }
            }
        });
    }

    fn attention<T: Element>(&mut self, op: &Op) {
        let &Op::TreeAttention { ref batch, layer, heads, kv_heads, scale, q, k_cache, v_cache, out, .. } = op else {
            unreachable!("{} is not attention", op.name())
        };
        self.attend::<T>(batch, layer, [heads, kv_heads], scale, q, [k_cache, v_cache], out);
    }

    /// Attention whose values are as wide as `out` says.
    #[allow(clippy::too_many_arguments)]
    fn attend<T: Element>(
        &mut self,
        batch: &Batch,
        layer: usize,
        [heads, kv_heads]: [usize; 2],
        scale: f32,
        q: Buf,
        [k_cache, v_cache]: [Buf; 2],
        out: Buf,
    ) {
        let shape = self.pass.cache_shape(k_cache);
        let (group, value_dim) = (heads / kv_heads, self.width(out) / heads);
        self.writing(out, |run, out| {
            let spans: Vec<Vec<Span>> = run.batch_rows(batch).iter().map(|row| run.spans(batch, &shape, row)).collect();
            let n_keys: usize = spans.iter().flatten().map(|span| span.len).sum();
            let (keys, values) = (cast_slice(run.words(k_cache)), cast_slice(run.words(v_cache)));
            // A task is a kv head of a row; the average row says how many make one worth sharing.
            let q = run.rows(q).par_chunks(group * shape.head_dim);
            let tasks = out.par_chunks_mut(group * value_dim).zip(q).enumerate();
            let min_tasks = (MIN_KEYS * spans.len()).div_ceil(n_keys);
            tasks.with_min_len(min_tasks).for_each_init(Vec::new, |scores, (i, (out, q))| {
                let (spans, kv_head) = (&spans[i / kv_heads], i % kv_heads);
                let of =
                    Attention::<T> { spans, shape, layer, kv_head, scale, keys, values, value_dim, q, out, scores };
                of.compute(run.isa);
            });
        });
    }

    fn draw(&mut self, batch: &Batch, seen: Buf, logits: Buf, draws: Buf) {
        let mut out = self.take(draws);
        let rows = self.batch_rows(batch);
        let (vocab, seen_words) = (self.width(logits), self.width(seen));
        let logits = self.rows(logits).par_chunks_exact(vocab);
        out[..self.n_rows].par_iter_mut().zip(logits).zip(&rows).for_each_init(
            Scratch::default,
            |scratch, ((out, logits), row)| {
                let request = self.request(batch, row);
                let seen = &self.words(seen)[row.request as usize * seen_words..][..seen_words];
                let tree = &rows[request.first_row as usize..][..request.n_rows as usize];
                let path = tree.iter().filter(|other| row.is_ancestor(other.node as usize)).map(|other| other.token);
                *out = draw(logits, &request, row.position, seen, path, scratch);
            },
        );
        self.put(draws, out);
    }

    fn top_k(&mut self, logits: Buf, ids: Buf, values: Buf) {
        let (vocab, k) = (self.width(logits), self.width(ids));
        let (mut top_ids, mut top_values) = (self.take(ids), self.take(values));
        let out = top_ids.par_chunks_exact_mut(k).zip(cast_slice_mut(&mut top_values).par_chunks_exact_mut(k));
        out.zip(self.rows(logits).par_chunks_exact(vocab))
            .for_each_init(Scratch::default, |scratch, ((ids, values), logits)| top_k(logits, ids, values, scratch));
        self.put(ids, top_ids);
        self.put(values, top_values);
    }

    fn commit(&mut self, batch: &Batch, accepted: Buf, cache: Buf) {
        let shape = self.pass.cache_shape(cache);
        let mut words = self.take(cache);
        let size = self.pass.buffer(cache).dtype.size();
        let bytes: &mut [u8] = cast_slice_mut(&mut words);
        let n_requests = self.words(batch.requests)[1];
        let accepted = self.words(accepted).chunks_exact(accepted_words(MAX_NODES));
        for (index, accepted) in (0..n_requests).zip(accepted) {
            let prefix = Request::read(self.words(batch.requests), index as usize).prefix as usize;
            let path = accepted[1..][..accepted[0] as usize].iter().map(|&node| node as usize);
            for (to, from) in path.enumerate().filter(|(to, from)| to != from) {
                for (layer, head) in
                    (0..shape.layers).flat_map(|layer| (0..shape.kv_heads).map(move |head| (layer, head)))
                {
                    let at = |slot| size * self.slot(batch, &shape, index, prefix + slot, layer, head);
                    bytes.copy_within(at(from)..at(from) + size * shape.head_dim, at(to));
                }
            }
        }
        self.put(cache, words);
    }

    /// Where slot `slot` of a request lies in a cache: an element index.
    fn slot(&self, batch: &Batch, shape: &CacheShape, request: u32, slot: usize, layer: usize, head: usize) -> usize {
        let page = self.pages(batch, request)[slot / shape.page_size] as usize;
        shape.index(layer, page, head, slot % shape.page_size)
    }

    fn spans(&self, batch: &Batch, shape: &CacheShape, row: &Row) -> Vec<Span> {
        spans(row, &self.request(batch, row), self.pages(batch, row.request), shape.page_size)
    }

    fn pages(&self, batch: &Batch, request: u32) -> &[u32] {
        let per_request = self.width(batch.pages);
        &self.words(batch.pages)[request as usize * per_request..][..per_request]
    }

    fn request(&self, batch: &Batch, row: &Row) -> Request {
        Request::read(self.words(batch.requests), row.request as usize)
    }

    /// The active rows of the batch.
    fn batch_rows(&self, batch: &Batch) -> Vec<Row> {
        (0..self.n_rows).map(|index| Row::read(self.words(batch.rows), index)).collect()
    }
}

/// Rounds values to the cache's dtype and puts them at an element index.
fn store<T: Element>(cache: &mut [u32], at: usize, values: &[f32]) {
    let cache: &mut [T] = cast_slice_mut(cache);
    for (element, &value) in cache[at..].iter_mut().zip(values) {
        *element = T::from_f32(value);
    }
}

/// Buffers by their place in the pass.
impl Run<'_> {
    /// Computes the active rows of an F32 buffer.
    fn writing(&mut self, buf: Buf, compute: impl FnOnce(&Self, &mut [f32])) {
        let mut words = self.take(buf);
        let active = self.n_rows * self.width(buf);
        compute(self, &mut cast_slice_mut(&mut words)[..active]);
        self.put(buf, words);
    }

    fn take(&mut self, buf: Buf) -> Vec<u32> {
        match &mut self.buffers[self.ids[buf.0].0] {
            Buffer::Words(words) => std::mem::take(words),
            Buffer::Matrix(_) => panic!("{} is a matrix, and is written", self.pass.buffer(buf).name),
        }
    }

    fn put(&mut self, buf: Buf, words: Vec<u32>) {
        self.buffers[self.ids[buf.0].0] = Buffer::Words(words);
    }

    fn words(&self, buf: Buf) -> &[u32] {
        match &self.buffers[self.ids[buf.0].0] {
            Buffer::Words(words) => words,
            Buffer::Matrix(_) => panic!("{} is a matrix, and is read as words", self.pass.buffer(buf).name),
        }
    }

    fn floats(&self, buf: Buf) -> &[f32] {
        cast_slice(self.words(buf))
    }

    fn matrix(&self, buf: Buf) -> &Matrix {
        match &self.buffers[self.ids[buf.0].0] {
            Buffer::Matrix(matrix) => matrix,
            Buffer::Words(_) => panic!("{} is no matrix", self.pass.buffer(buf).name),
        }
    }

    /// The active rows of an F32 buffer.
    fn rows(&self, buf: Buf) -> &[f32] {
        &self.floats(buf)[..self.n_rows * self.width(buf)]
    }

    /// Elements of a row: all dimensions but the first.
    fn width(&self, buf: Buf) -> usize {
        self.pass.buffer(buf).shape[1..].iter().product()
    }
}

//! Latent attention as WGSL calls: what the cache keeps, queries, products of each head, attention in spans of positions.

use super::attention::{SPAN, Turn};
use super::weights::{Bank, MAX_ROW_TILE};
use super::{Access, Axis, Binding, Grid, KernelCall, LowerError, Lowering, Source};
use crate::op::Op;
use crate::spec::KernelSpec;

/// Heads whose sums a thread keeps in registers.
const MAX_HEADS: usize = 16;

impl Lowering<'_> {
    /// The product first, as partial results; the norm of a latent needs all of it.
    pub(super) fn latent(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Latent { layer, eps, latent_eps, x, norm, weight, latent_norm, rope, compressed, cache, .. } = self.op
        else {
            unreachable!("lowering another op")
        };
        let y = |access| self.partial_rows(weight, access);
        let mut calls = self.normed_product(eps, [x, norm, weight], &y(Access::Write));
        let (shape, dtype) = (self.pass.cache_shape(cache), self.desc(cache).dtype);
        let (cached, base) = self.layer(cache, layer, Access::Write);
        let compressed_width = compressed.map_or(0, |buf| self.desc(buf).shape[1]);
        let compressed = match compressed {
            Some(buf) => self.rows(buf, Access::Write),
            // A model without it: room behind the partial results stands in, and is not written. A buffer may be bound
            // twice if both may write; therefore `y` may, too.
            None => {
                let begin = y(Access::Write).bytes.end.next_multiple_of(self.limits.offset_alignment);
                Binding { source: Source::Partials, access: Access::Write, bytes: begin..begin + 16 }
            }
        };
        calls.push(KernelCall {
            spec: KernelSpec::new("latent")
                .size("COMPRESSED", "q", compressed_width)
                .size("LATENT", "c", self.desc(latent_norm).len())
                .size("HEAD_DIM", "hd", shape.head_dim)
                .format("CACHE", dtype)
                .size("PAGE_SIZE", "p", shape.page_size)
                .with("HEAD_WORDS", shape.head_dim * dtype.size() / 4)
                .with("PAGES_PER_REQUEST", self.pages_per_request())
                .with("CACHE_BASE", base / 4)
                .with("EPS", latent_eps),
            bindings: vec![
                self.read(self.batch.rows),
                self.read(self.batch.requests),
                self.read(self.batch.pages),
                y(Access::Write),
                self.read(latent_norm),
                self.read(rope),
                compressed,
                cached,
            ],
            grid: Grid([Axis::Rows(1), Axis::Fixed(1), Axis::Fixed(1)]),
        });
        Ok(calls)
    }

    pub(super) fn latent_queries(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::LatentQueries { heads, eps, x, norm, weight, rope, nope, q, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let head = self.desc(weight).shape[0] / heads;
        let (nope_dim, rotated) = (self.desc(nope).shape[2], 2 * self.desc(rope).shape[1]);
        let call = |bank: &Bank| KernelCall {
            spec: self
                .matmul("latent_queries", weight, self.row_tile(MAX_ROW_TILE))
                .size("HEADS", "h", heads)
                .size("NOPE", "n", nope_dim)
                .size("ROTATED", "d", rotated)
                .with("Q_WIDTH", self.desc(q).shape[2])
                .with("EPS", eps)
                .with("GROUPS", self.groups())
                .with("BANK_BEGIN", bank.first_row / head)
                .size("BANK_HEADS", "w", bank.rows / head),
            bindings: vec![
                self.read(self.batch.rows),
                self.read(self.batch.requests),
                self.rows(x, Access::Read),
                self.read(norm),
                self.bank_binding(weight, bank),
                self.read(rope),
                self.rows(nope, Access::Write),
                self.rows(q, Access::Write),
            ],
            grid: self.matmul_grid((bank.rows / 2).div_ceil(self.groups()), MAX_ROW_TILE),
        };
        Ok(self.banks_of_heads(weight, head)?.iter().map(call).collect())
    }

    pub(super) fn per_head(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::PerHead { heads, x, weight, out, .. } = self.op else { unreachable!("lowering another op") };
        let call = |bank: Bank| KernelCall {
            spec: self
                .matmul("per_head", weight, self.row_tile(MAX_ROW_TILE))
                .size("HEADS", "h", heads)
                .with("OUT_ROWS", self.desc(weight).shape[0] / heads)
                .size("WIDTH", "o", self.desc(out).shape[2])
                .with("GROUPS", self.groups())
                .bank(bank.first_row, bank.rows),
            bindings: vec![
                self.read(self.batch.requests),
                self.rows(x, Access::Read),
                self.bank_binding(weight, &bank),
                self.rows(out, Access::Write),
            ],
            grid: self.matmul_grid(bank.rows.div_ceil(self.groups()), MAX_ROW_TILE),
        };
        Ok(self.weight_banks(weight).into_iter().map(call).collect())
    }

    /// The rows carry the tree: one kernel serves every shape.
    pub(super) fn latent_attention(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::LatentAttention { heads, cache, out, .. } = self.op else { unreachable!("lowering another op") };
        let latent = self.desc(out).shape[2];
        let turns = self.turns(heads, latent, cache);
        Ok(turns.iter().flat_map(|turn| [self.latent_partials(turn), self.merge(turn, heads, latent, out)]).collect())
    }

    fn latent_partials(&self, turn: &Turn) -> KernelCall {
        let &Op::LatentAttention { layer, heads, scale, q, cache, out, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let (shape, dtype) = (self.pass.cache_shape(cache), self.desc(cache).dtype);
        let tile = heads.div_ceil(heads.div_ceil(MAX_HEADS));
        let (keys, base) = self.layer(cache, layer, Access::Read);
        KernelCall {
            spec: KernelSpec::new("latent_attention")
                .size("HEAD_DIM", "hd", shape.head_dim)
                .size("LATENT", "c", self.desc(out).shape[2])
                .size("HEADS", "h", heads)
                .format("CACHE", dtype)
                .size("PAGE_SIZE", "p", shape.page_size)
                .with("TILE", tile)
                .with("HEAD_WORDS", shape.head_dim * dtype.size() / 4)
                .with("PAGES_PER_REQUEST", self.pages_per_request())
                .with("CACHE_BASE", base / 4)
                .with("SCALE", scale)
                .with("SPAN", SPAN)
                .with("SPANS", turn.spans)
                .turn(turn.rows.start, turn.end),
            bindings: vec![
                self.read(self.batch.rows),
                self.read(self.batch.requests),
                self.read(self.batch.pages),
                self.rows(q, Access::Read),
                keys.clone(),
                keys,
                turn.binding(Access::Write),
            ],
            grid: Grid([Axis::Keys(SPAN), Axis::Fixed(heads.div_ceil(tile)), self.rows_of(turn)]),
        }
    }
}

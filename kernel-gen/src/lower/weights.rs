//! The ops that read a weight: embed, qkv, project, gate/up, head.

use super::{Access, Axis, Grid, KernelCall, LowerError, Lowering};
use crate::op::Op;
use crate::pass::{Buf, DType};
use crate::spec::KernelSpec;

/// Most rows that share one load of a weight.
pub(super) const MAX_ROW_TILE: usize = 8;
/// Lanes that share a weight row, as in `lib/matmul.wgsl`.
const LANES: usize = 32;
/// Threads of a workgroup, at most.
const MAX_THREADS: usize = 256;
/// Groups of lanes where a workgroup owns a whole head.
const HEAD_NORM_GROUPS: usize = MAX_THREADS / LANES;
/// Floats of the staged outputs of a workgroup that owns a whole head.
const HEAD_NORM_FLOATS: usize = 1024;
/// Weight rows that a group works on at a time.
const PROJECT_OUTPUTS: usize = 1;
const HEAD_OUTPUTS: usize = 2;

/// The part of a matmul that one bank of its weight serves.
pub(super) struct Bank {
    pub index: usize,
    pub first_row: usize,
    pub rows: usize,
}

impl Lowering<'_> {
    pub(super) fn weight_banks(&self, weight: Buf) -> Vec<Bank> {
        let desc = self.desc(weight);
        let row_bytes = desc.bytes() / desc.shape[0];
        let banks = self.limits.banks(desc).into_iter().enumerate();
        banks
            .map(|(index, bytes)| Bank { index, first_row: bytes.start / row_bytes, rows: bytes.len() / row_bytes })
            .collect()
    }

    pub(super) fn bank_binding(&self, weight: Buf, bank: &Bank) -> super::Binding {
        let desc = self.desc(weight);
        self.bank(weight, bank.index, 0..bank.rows * desc.bytes() / desc.shape[0], Access::Read)
    }

    /// Banks of whole heads, of so many rows each.
    pub(super) fn banks_of_heads(&self, weight: Buf, head_dim: usize) -> Result<Vec<Bank>, LowerError> {
        let banks = self.weight_banks(weight);
        if banks.iter().any(|bank| !bank.first_row.is_multiple_of(head_dim)) {
            let buffer = self.desc(weight).name.clone();
            return Err(LowerError::HeadInTwoBanks { op: self.op.name(), buffer, head_dim });
        }
        Ok(banks)
    }

    fn columns(&self, weight: Buf) -> usize {
        self.desc(weight).shape[1]
    }

    /// Groups of lanes in a workgroup. Small workgroups finish sooner where each has little to do; chosen by timing.
    pub(super) fn groups(&self) -> usize {
        if self.row_tile(MAX_ROW_TILE) <= 4 { 1 } else { 2 }
    }

    /// Rows that share a weight's load: the pass's rows, rounded up to a power of two.
    pub(super) fn row_tile(&self, most: usize) -> usize {
        self.pass.rows.next_power_of_two().min(most)
    }

    pub(super) fn embed(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Embed { table, out, .. } = self.op else { unreachable!("lowering another op") };
        let columns = self.columns(table);
        let call = |bank: Bank| KernelCall {
            spec: KernelSpec::new("embed")
                .size("COLUMNS", "k", columns)
                .format("WEIGHT", self.desc(table).dtype)
                .bank(bank.first_row, bank.rows),
            bindings: vec![
                self.read(self.batch.rows),
                self.read(self.batch.requests),
                self.bank_binding(table, &bank),
                self.rows(out, Access::Write),
            ],
            grid: Grid([Axis::Fixed((columns / 8).div_ceil(64)), Axis::Rows(1), Axis::Fixed(1)]),
        };
        Ok(self.weight_banks(table).into_iter().map(call).collect())
    }

    pub(super) fn project(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Project { add, x, weight, residual, .. } = self.op else { unreachable!("lowering another op") };
        let call = |bank: Bank| KernelCall {
            spec: self
                .matmul("project", weight, self.row_tile(MAX_ROW_TILE))
                .flag("ADD", "add", add)
                .with("WIDTH", self.desc(residual).shape[1])
                .with("GROUPS", self.groups())
                .with("OUTPUTS", PROJECT_OUTPUTS)
                .bank(bank.first_row, bank.rows),
            bindings: vec![
                self.read(self.batch.requests),
                self.rows(x, Access::Read),
                self.bank_binding(weight, &bank),
                self.rows(residual, Access::Write),
            ],
            grid: self.matmul_grid(bank.rows.div_ceil(self.groups() * PROJECT_OUTPUTS), MAX_ROW_TILE),
        };
        Ok(self.weight_banks(weight).into_iter().map(call).collect())
    }

    pub(super) fn res_block(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::ResBlock { states, weight, bias, out, .. } = self.op else { unreachable!("lowering another op") };
        let call = |bank: Bank| KernelCall {
            spec: KernelSpec::new("res_block")
                .size("HIDDEN", "k", self.columns(weight))
                .format("WEIGHT", self.desc(weight).dtype)
                .bank(bank.first_row, bank.rows),
            bindings: vec![
                self.read(self.batch.rows),
                self.read(self.batch.requests),
                self.read(states),
                self.bank_binding(weight, &bank),
                self.read(bias),
                self.rows(out, Access::Write),
            ],
            grid: Grid([Axis::Fixed(bank.rows.div_ceil(64)), Axis::Rows(1), Axis::Fixed(1)]),
        };
        Ok(self.weight_banks(weight).into_iter().map(call).collect())
    }

    pub(super) fn norm(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Norm { eps, x, norm, out, .. } = self.op else { unreachable!("lowering another op") };
        Ok(vec![KernelCall {
            spec: KernelSpec::new("rms_norm").size("COLUMNS", "k", self.desc(norm).len()).with("EPS", eps),
            bindings: vec![
                self.read(self.batch.requests),
                self.rows(x, Access::Read),
                self.read(norm),
                self.rows(out, Access::Write),
            ],
            grid: Grid([Axis::Rows(1), Axis::Fixed(1), Axis::Fixed(1)]),
        }])
    }

    pub(super) fn head(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Head { eps, x, norm, weight, logits, .. } = self.op else { unreachable!("lowering another op") };
        Ok(self.normed_product(eps, [x, norm, weight], &self.rows(logits, Access::Write)))
    }

    /// `out[r] = rms_norm(x[r], norm, eps) · weightᵀ`
    pub(super) fn normed_product(
        &self,
        eps: f32,
        [x, norm, weight]: [Buf; 3],
        out: &super::Binding,
    ) -> Vec<KernelCall> {
        let call = |bank: Bank| KernelCall {
            spec: self
                .matmul("head", weight, self.row_tile(MAX_ROW_TILE))
                .size("WIDTH", "v", self.desc(weight).shape[0])
                .with("EPS", eps)
                .with("GROUPS", self.groups())
                .with("OUTPUTS", HEAD_OUTPUTS)
                .bank(bank.first_row, bank.rows),
            bindings: vec![
                self.read(self.batch.requests),
                self.rows(x, Access::Read),
                self.read(norm),
                self.bank_binding(weight, &bank),
                out.clone(),
            ],
            grid: self.matmul_grid(bank.rows.div_ceil(self.groups() * HEAD_OUTPUTS), MAX_ROW_TILE),
        };
        self.weight_banks(weight).into_iter().map(call).collect()
    }

    /// Gate row i and up row i may lie in different banks: one call for each run of outputs that lies in one of each.
    pub(super) fn gate_up(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::GateUp { eps, x, norm, weight, out, .. } = self.op else { unreachable!("lowering another op") };
        let width = self.desc(out).shape[1];
        let row_bytes = self.desc(weight).bytes() / self.desc(weight).shape[0];
        let banks = self.weight_banks(weight);
        let bank_of = |row: usize| banks.iter().rfind(|b| b.first_row <= row).expect("banks begin at row 0");
        let mut calls = Vec::new();
        let mut begin = 0;
        while begin < width {
            let (gate_bank, up_bank) = (bank_of(begin), bank_of(width + begin));
            let end = width.min(gate_bank.first_row + gate_bank.rows).min(up_bank.first_row + up_bank.rows - width);
            let part = |bank: &Bank, first: usize, last: usize| {
                let bytes = (first - bank.first_row) * row_bytes..(last - bank.first_row) * row_bytes;
                self.part(weight, bank.index, bytes, Access::Read)
            };
            let (gate, gate_base) = part(gate_bank, begin, end);
            let (up, up_base) = part(up_bank, width + begin, width + end);
            calls.push(KernelCall {
                spec: self
                    .matmul("gate_up", weight, self.row_tile(MAX_ROW_TILE))
                    .with("WIDTH", width)
                    .with("EPS", eps)
                    .with("GROUPS", self.groups())
                    .with("GATE_BASE", gate_base / 16)
                    .with("UP_BASE", up_base / 16)
                    .bank(begin, end - begin),
                bindings: vec![
                    self.read(self.batch.requests),
                    self.rows(x, Access::Read),
                    self.read(norm),
                    gate,
                    up,
                    self.rows(out, Access::Write),
                ],
                grid: self.matmul_grid((end - begin).div_ceil(self.groups()), MAX_ROW_TILE),
            });
            begin = end;
        }
        Ok(calls)
    }

    pub(super) fn qkv(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Qkv { weight, k_cache, q_norm, k_norm, .. } = self.op else { unreachable!("lowering another op") };
        let head_dim = self.pass.cache_shape(k_cache).head_dim;
        let banks = self.banks_of_heads(weight, head_dim)?;
        let owns_heads = q_norm.is_some() || k_norm.is_some();
        Ok(banks.iter().map(|bank| self.qkv_call(bank, head_dim, owns_heads)).collect())
    }

    fn qkv_call(&self, bank: &Bank, head_dim: usize, owns_heads: bool) -> KernelCall {
        let &Op::Qkv { layer, heads, kv_heads, eps, x, norm, weight, bias, q_norm, k_norm, rope, q, .. } = self.op
        else {
            unreachable!("lowering another op")
        };
        let &Op::Qkv { k_cache, v_cache, .. } = self.op else { unreachable!("lowering another op") };
        let cache = self.pass.cache_shape(k_cache);
        let (k, base) = self.layer(k_cache, layer, Access::Write);
        let (v, _) = self.layer(v_cache, layer, Access::Write);
        let (groups, pairs, most_rows) = if owns_heads {
            // Outputs are staged in workgroup memory: the tile shrinks for large heads.
            (HEAD_NORM_GROUPS, head_dim / 2, (HEAD_NORM_FLOATS / head_dim).clamp(1, 8))
        } else {
            // Two neighbouring elements of a 16-bit cache share a word: pairs come in twos.
            (2, 2, MAX_ROW_TILE)
        };
        let spec = self
            .matmul("qkv", weight, self.row_tile(most_rows))
            .size("HEAD_DIM", "hd", head_dim)
            .size("HEADS", "h", heads)
            .size("KV_HEADS", "kv", kv_heads)
            .format("CACHE", self.desc(k_cache).dtype)
            .size("PAGE_SIZE", "p", cache.page_size)
            .with("HEAD_WORDS", head_dim * self.desc(k_cache).dtype.size() / 4)
            .with("PAGES_PER_REQUEST", self.pages_per_request())
            .with("CACHE_BASE", base / 4)
            .with("EPS", eps)
            .flag("BIAS", "bias", bias.is_some())
            .with("BIAS_VECTORS", bias.map_or(1, |b| self.desc(b).len() / 4))
            .flag("Q_NORM", "qnorm", q_norm.is_some())
            .flag("K_NORM", "knorm", k_norm.is_some())
            .with("Q_NORM_VECTORS", q_norm.map_or(1, |b| self.desc(b).len() / 4))
            .with("K_NORM_VECTORS", k_norm.map_or(1, |b| self.desc(b).len() / 4))
            .with("REQUESTS", self.max_requests())
            .with("GROUPS", groups)
            .with("PAIRS", pairs)
            .with("BANK_BEGIN", bank.first_row / head_dim)
            .with("BANK_HEADS", bank.rows / head_dim);
        let uniform = |buf: Option<Buf>| match buf {
            Some(buf) => self.whole(buf, Access::Uniform),
            // A model without it: any uniform of four words stands in, and is not read.
            None => super::Binding { bytes: 0..16, ..self.whole(self.batch.requests, Access::Uniform) },
        };
        KernelCall {
            spec,
            bindings: vec![
                self.rows(self.batch.rows, Access::Uniform),
                uniform(Some(self.batch.requests)),
                uniform(bias),
                uniform(q_norm),
                uniform(k_norm),
                self.read(self.batch.pages),
                self.rows(x, Access::Read),
                self.read(norm),
                self.bank_binding(weight, bank),
                self.read(rope),
                self.rows(q, Access::Write),
                k,
                v,
            ],
            grid: self.matmul_grid((bank.rows / 2).div_ceil(pairs), most_rows),
        }
    }

    /// The constants of `lib/matmul.wgsl` and `lib/x_rows.wgsl`.
    pub(super) fn matmul(&self, stem: &'static str, weight: Buf, row_tile: usize) -> KernelSpec {
        self.product(stem, weight, row_tile).size("ROWS", "n", self.pass.rows)
    }

    /// The constants of `lib/matmul.wgsl` that all its kernels name.
    pub(super) fn product(&self, stem: &'static str, weight: Buf, row_tile: usize) -> KernelSpec {
        let dtype = self.desc(weight).dtype;
        debug_assert_ne!(dtype, DType::U32);
        KernelSpec::new(stem)
            .size("COLUMNS", "k", self.columns(weight))
            .format("WEIGHT", dtype)
            .size("ROW_TILE", "r", row_tile)
    }

    pub(super) fn matmul_grid(&self, workgroups: usize, most_rows: usize) -> Grid {
        Grid([Axis::Fixed(workgroups), Axis::Rows(self.row_tile(most_rows)), Axis::Fixed(1)])
    }
}

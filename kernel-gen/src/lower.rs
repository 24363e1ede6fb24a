//! From an op to kernel calls: which kernels, on which bytes of which buffers, over which grid.
//!
//! A device binds a limited number of bytes at once, so large weights and caches lie in *banks*, each a buffer of its
//! own, of whole rows (a weight) or whole layers (a cache); [`Limits::banks`] says where they are cut, for whoever
//! allocates as for whoever binds. A call names at most 8 storage buffers and 12 uniforms, uses at most 16 KiB of
//! workgroup memory and 256 invocations.

use std::ops::Range;

use crate::Request;
use crate::layout::HEADER_WORDS;
use crate::op::{Batch, Op};
use crate::pass::{Buf, BufferDesc, Pass, Role};
use crate::spec::KernelSpec;

mod acceptance;
mod attention;
mod experts;
mod latent;
mod weights;

/// What the device allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one binding, and of one bank.
    pub binding_bytes: usize,
    /// A binding begins at a multiple of this many bytes: a power of two.
    pub offset_alignment: usize,
}

/// What a uniform can hold on every device.
const UNIFORM_BYTES: usize = 64 << 10;
/// A bank has a multiple of this many rows where that fits: every usual head dimension divides it, so that no head
/// lies in two banks.
const BANK_ROWS: usize = 3840;
/// A bank's rows are at least a multiple of this, so that banks begin at whole words.
const MIN_BANK_ROWS: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    #[error("{op}: {buffer} needs {needed} bytes in one binding, the device allows {limit}: {advice}")]
    Binding { op: &'static str, buffer: String, needed: usize, limit: usize, advice: &'static str },
    #[error("{op}: {needed} workgroups along one dimension of the grid, devices allow {limit}")]
    Grid { op: &'static str, needed: usize, limit: usize },
    #[error("{op}: heads of {head_dim} do not fit the banks of {buffer}")]
    HeadInTwoBanks { op: &'static str, buffer: String, head_dim: usize },
    #[error("{op}: only CUDA has a kernel for it; draft on the host")]
    OnlyCuda { op: &'static str },
}

#[derive(Debug, Clone, PartialEq)]
pub struct KernelCall {
    pub spec: KernelSpec,
    /// In the order of the kernel's bindings.
    pub bindings: Vec<Binding>,
    pub grid: Grid,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    pub source: Source,
    pub access: Access,
    /// Bytes of the bank.
    pub bytes: Range<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A bank of a buffer of the pass.
    Buffer { buf: Buf, bank: usize },
    /// Partial results between two calls of one op; all ops may share the memory.
    Partials,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    Uniform,
    Read,
    Write,
}

/// Workgroups along x, y and z.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid(pub [Axis; 3]);

/// Workgroups along one dimension, by what a run needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    Fixed(usize),
    /// One for each so many rows.
    Rows(usize),
    /// So many for each row.
    PerRow(usize),
    /// One for each so many keys of the longest row.
    Keys(usize),
    Requests,
    /// One for each tile of query rows: `heads` a row, `tile` to a workgroup, no tile across two requests.
    Tiles {
        heads: usize,
        tile: usize,
    },
}

impl Grid {
    /// Workgroups for a run of so many rows and requests, whose longest row has so many keys.
    pub fn workgroups(&self, rows: usize, requests: usize, keys: usize) -> [u32; 3] {
        self.0.map(|axis| axis.workgroups(rows, requests, keys) as u32)
    }
}

impl Axis {
    fn workgroups(self, rows: usize, requests: usize, keys: usize) -> usize {
        match self {
            Axis::Fixed(n) => n,
            Axis::Rows(per) => rows.div_ceil(per),
            Axis::PerRow(n) => rows * n,
            Axis::Keys(per) => keys.div_ceil(per),
            Axis::Requests => requests,
            // Each request ends at most one tile early.
            Axis::Tiles { heads, tile } if requests > 1 => rows * heads / tile + requests,
            Axis::Tiles { heads, tile } => (rows * heads).div_ceil(tile),
        }
    }
}

impl Limits {
    /// Where a buffer is cut into banks: ranges of its bytes. Banks hold whole rows of the first dimension.
    pub fn banks(&self, desc: &BufferDesc) -> Vec<Range<usize>> {
        let bytes = desc.bytes();
        let cut = matches!(desc.role, Role::Weight | Role::Cache) && bytes > self.binding_bytes;
        let row_bytes = bytes / desc.shape[0].max(1);
        let rows = if cut { self.bank_rows(desc.role, row_bytes) } else { desc.shape[0] };
        let bank = (rows * row_bytes).max(1);
        (0..bytes.div_ceil(bank)).map(|i| i * bank..((i + 1) * bank).min(bytes)).collect()
    }

    /// Rows of a bank; at least one unit even if it is larger than a binding: the call that binds it is refused.
    fn bank_rows(&self, role: Role, row_bytes: usize) -> usize {
        let fit = self.binding_bytes / row_bytes.max(1);
        match role {
            Role::Cache => fit.max(1),
            _ if fit >= BANK_ROWS => fit / BANK_ROWS * BANK_ROWS,
            _ => (fit / MIN_BANK_ROWS * MIN_BANK_ROWS).max(MIN_BANK_ROWS),
        }
    }
}

impl Pass {
    /// Kernels that a run of the pass launches on a device with these limits.
    pub fn kernels(&self, limits: &Limits) -> Result<usize, LowerError> {
        self.ops.iter().map(|op| Ok(lower(op, self, limits)?.len())).sum()
    }
}

/// The calls that carry out `op`, an op of `pass` that `Op::check` accepted.
pub fn lower(op: &Op, pass: &Pass, limits: &Limits) -> Result<Vec<KernelCall>, LowerError> {
    let lowering = Lowering { op, pass, limits, batch: op.batch() };
    let calls = match op {
        Op::Embed { .. } => lowering.embed(),
        Op::Qkv { .. } => lowering.qkv(),
        Op::Project { .. } => lowering.project(),
        Op::GateUp { .. } => lowering.gate_up(),
        Op::ResBlock { .. } => lowering.res_block(),
        Op::Norm { .. } => lowering.norm(),
        Op::Gather { .. } => lowering.gather(),
        Op::Head { .. } => lowering.head(),
        Op::TreeAttention { .. } => lowering.tree_attention(),
        Op::Mask { .. } => lowering.mask(),
        Op::Draw { .. } => lowering.draw(),
        Op::Perturb { .. } => lowering.perturb(),
        Op::TopK { .. } => lowering.top_k(),
        Op::Accept { .. } => lowering.accept(),
        Op::Commit { .. } => lowering.commit(),
        Op::Latent { .. } => lowering.latent(),
        Op::LatentQueries { .. } => lowering.latent_queries(),
        Op::PerHead { .. } => lowering.per_head(),
        Op::LatentAttention { .. } => lowering.latent_attention(),
        Op::Route { .. } => lowering.route(),
        Op::GroupRows { .. } => lowering.group_rows(),
        Op::ExpertGateUp { .. } => lowering.expert_gate_up(),
        Op::ExpertDown { .. } => lowering.expert_down(),
        Op::Combine { .. } => lowering.combine(),
        Op::DraftNgram { .. }
        | Op::Grow { .. }
        | Op::OpenBlock { .. }
        | Op::Trellis { .. }
        | Op::GrowTrellis { .. } => Err(LowerError::OnlyCuda { op: op.name() }),
    }?;
    calls.iter().try_for_each(|call| lowering.check(call))?;
    Ok(calls)
}

/// One op being lowered.
struct Lowering<'a> {
    op: &'a Op,
    pass: &'a Pass,
    limits: &'a Limits,
    batch: &'a Batch,
}

impl Lowering<'_> {
    fn desc(&self, buf: Buf) -> &BufferDesc {
        self.pass.buffer(buf)
    }

    /// All of a buffer that lies in one bank.
    fn whole(&self, buf: Buf, access: Access) -> Binding {
        self.bank(buf, 0, self.limits.banks(self.desc(buf))[0].clone(), access)
    }

    fn read(&self, buf: Buf) -> Binding {
        self.whole(buf, Access::Read)
    }

    /// The rows that the pass is compiled for: `[pass.rows, ..]` of a larger buffer.
    fn rows(&self, buf: Buf, access: Access) -> Binding {
        let desc = self.desc(buf);
        let bytes = desc.bytes() / desc.shape[0] * self.pass.rows;
        Binding { source: Source::Buffer { buf, bank: 0 }, access, bytes: 0..bytes }
    }

    fn bank(&self, buf: Buf, bank: usize, bytes: Range<usize>, access: Access) -> Binding {
        Binding { source: Source::Buffer { buf, bank }, access, bytes: 0..bytes.len() }
    }

    /// Part of a bank. It begins up to an alignment early: also returns how many bytes.
    fn part(&self, buf: Buf, bank: usize, bytes: Range<usize>, access: Access) -> (Binding, usize) {
        let begin = bytes.start / self.limits.offset_alignment * self.limits.offset_alignment;
        let binding = Binding { source: Source::Buffer { buf, bank }, access, bytes: begin..bytes.end };
        (binding, bytes.start - begin)
    }

    /// One layer of a cache, and at which byte of the binding it begins.
    fn layer(&self, buf: Buf, layer: usize, access: Access) -> (Binding, usize) {
        let desc = self.desc(buf);
        let layer_bytes = desc.bytes() / desc.shape[0];
        let begin = layer * layer_bytes;
        let banks = self.limits.banks(desc);
        let bank = banks.iter().position(|b| b.contains(&begin)).expect("banks cover the buffer");
        let begin = begin - banks[bank].start;
        self.part(buf, bank, begin..begin + layer_bytes, access)
    }

    fn max_requests(&self) -> usize {
        (self.desc(self.batch.requests).len() - HEADER_WORDS) / Request::WORDS
    }

    fn pages_per_request(&self) -> usize {
        self.desc(self.batch.pages).shape[1]
    }

    /// What must hold for the device to accept the call.
    fn check(&self, call: &KernelCall) -> Result<(), LowerError> {
        for binding in &call.bindings {
            let limit = match binding.access {
                Access::Uniform => UNIFORM_BYTES,
                Access::Read | Access::Write => self.limits.binding_bytes,
            };
            if binding.bytes.len() > limit {
                let (buffer, advice) = match binding.source {
                    Source::Buffer { buf, .. } => (self.desc(buf).name.clone(), advice(self.desc(buf).role)),
                    Source::Partials => ("partial results".to_string(), "use a shorter context"),
                };
                let needed = binding.bytes.len();
                return Err(LowerError::Binding { op: self.op.name(), buffer, needed, limit, advice });
            }
        }
        let [rows, requests] = [self.pass.rows, self.max_requests()];
        let largest = call.grid.0.iter().map(|axis| axis.workgroups(rows, requests, 0)).max().unwrap_or(0);
        if largest > 65_535 {
            return Err(LowerError::Grid { op: self.op.name(), needed: largest, limit: 65_535 });
        }
        Ok(())
    }
}

fn advice(role: Role) -> &'static str {
    match role {
        Role::Cache => "use a shorter context",
        Role::Weight => "use a device with larger bindings",
        Role::Input | Role::Scratch | Role::Output => "use fewer rows in a pass: a smaller tree, or fewer requests",
    }
}

//! A pass: a straight line of ops on named buffers with constant sizes.
//!
//! Passes of one model share their buffers by name (same name, same description); only `rows`, the number of rows a
//! pass is compiled for, differs. A pass prints as readable text and counts its bytes.

use std::collections::BTreeMap;
use std::fmt;

use crate::op::{CacheShape, Op};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F16,
    BF16,
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::U32 => "u32",
        }
    }
}

/// What a buffer is for; decides who writes it and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Loaded once from a checkpoint.
    Weight,
    /// Keys or values, kept between passes.
    Cache,
    /// Written by the host before a pass, or by a pass that drafts.
    Input,
    /// Written and read within a pass; holds nothing between passes.
    Scratch,
    /// Read by the host, or by a later pass.
    Output,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BufferDesc {
    /// Unique among the buffers of a model, e.g. `layers.3.gate_up`.
    pub name: String,
    pub role: Role,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl BufferDesc {
    /// Number of elements.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }
}

/// A buffer of a pass: its place in [`Pass::buffers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Buf(pub usize);

#[derive(Debug, Clone, PartialEq)]
pub struct Pass {
    pub name: String,
    /// Rows the pass is compiled for; a run may use fewer.
    pub rows: usize,
    pub buffers: Vec<BufferDesc>,
    pub ops: Vec<Op>,
}

/// What [`Op::check`] found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("op {op}: {field} {problem}")]
pub struct PassError {
    pub op: &'static str,
    pub field: &'static str,
    pub problem: String,
}

impl Pass {
    pub fn new(name: impl Into<String>, rows: usize) -> Pass {
        Pass { name: name.into(), rows, buffers: Vec::new(), ops: Vec::new() }
    }

    /// The buffer of this name, added if it is new. Panics if the name is known with another description: that is
    /// a mistake in the code that describes the model.
    pub fn add(&mut self, name: impl Into<String>, role: Role, dtype: DType, shape: &[usize]) -> Buf {
        let desc = BufferDesc { name: name.into(), role, dtype, shape: shape.to_vec() };
        match self.buffers.iter().position(|b| b.name == desc.name) {
            Some(at) => {
                assert_eq!(self.buffers[at], desc, "buffer described twice");
                Buf(at)
            }
            None => {
                self.buffers.push(desc);
                Buf(self.buffers.len() - 1)
            }
        }
    }

    pub fn buffer(&self, buf: Buf) -> &BufferDesc {
        &self.buffers[buf.0]
    }

    /// The sizes of a cache buffer.
    pub fn cache_shape(&self, buf: Buf) -> CacheShape {
        let &[layers, pages, kv_heads, page_size, head_dim] = self.buffer(buf).shape.as_slice() else {
            panic!("{} is no cache", self.buffer(buf).name)
        };
        CacheShape { layers, pages, kv_heads, page_size, head_dim }
    }

    /// Checks every op.
    pub fn check(&self) -> Result<(), PassError> {
        self.ops.iter().try_for_each(|op| op.check(self))
    }

    /// Bytes of weights that a run of one row reads, but for the few rows that an embedding looks up: of experts, those that
    /// a row chooses.
    pub fn weight_bytes(&self) -> usize {
        let mut used: BTreeMap<usize, usize> = BTreeMap::new();
        for op in self.ops.iter().filter(|op| !matches!(op, Op::Embed { .. })) {
            let weights =
                op.operands().into_iter().map(|(_, buf)| buf).filter(|&buf| self.buffer(buf).role == Role::Weight);
            used.extend(weights.map(|buf| (buf.0, self.buffer(buf).bytes())));
            if let Op::ExpertGateUp { weight, groups, out, .. } | Op::ExpertDown { weight, groups, out, .. } = op {
                let [rows, chosen] = [0, 1].map(|dim| self.buffer(*out).shape[dim]);
                let experts = self.buffer(*groups).len() - 1 - rows * chosen;
                used.insert(weight.0, self.buffer(*weight).bytes() / experts * chosen);
            }
        }
        used.values().sum()
    }
}

impl fmt::Display for Pass {
    /// One line an op: `qkv layer=0  x:x norm:layers.0.attn_norm ...`, then the totals.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "pass {} ({} rows)", self.name, self.rows)?;
        for op in &self.ops {
            write!(f, "  {:<15}", op.name())?;
            for (field, buf) in op.operands().into_iter().skip(3) {
                let desc = self.buffer(buf);
                write!(f, " {field}={}:{}{:?}", desc.name, desc.dtype.name(), desc.shape)?;
            }
            writeln!(f)?;
        }
        writeln!(f, "  {} ops, {:.1} MB of weights", self.ops.len(), self.weight_bytes() as f64 / 1e6)
    }
}

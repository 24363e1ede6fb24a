//! What a device must do: hold buffers, compile passes, run them.
//!
//! Buffers and passes are named by handles, so a backend is an object (`dyn Backend`) and nothing above it is generic.
//! [`Op::check`](treespark_kernel_gen::Op::check) has validated every pass before `compile` sees it; backends do not
//! check again. Only [`Backend::read`] waits for the device.

use std::borrow::Cow;

use treespark_kernel_gen::{BufferDesc, Pass};
use treespark_models::Tensor;

use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferId(pub usize);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PassId(pub usize);

/// How much of a pass a run needs. Trims the launch; kernels read the exact values from the batch buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Active rows, at most `Pass::rows`.
    pub rows: usize,
    /// Active requests.
    pub requests: usize,
    /// Keys of the longest row: largest position + 1.
    pub keys: usize,
}

#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// `cpu`, `cuda` or `wgpu`.
    pub backend: &'static str,
    /// As a person would name it, e.g. `AMD EPYC 9B14, 2 threads, AVX2` or `NVIDIA H100 (Vulkan)`.
    pub name: String,
    pub cost: PassCost,
    /// What a pass waits for in a layer beside its weights, as bytes of weights that the device reads in that time.
    pub layer_bytes: usize,
}

/// What a pass costs by its rows, relative to a pass of one row: measured points, ascending, linear between them and
/// beyond. It says what a tree node must be worth on a device. A backend's own is a constant, which keeps the choice of trees
/// repeatable; a server measures its passes when it starts. Either changes the speed alone.
#[derive(Debug, Clone, PartialEq)]
pub struct PassCost(Cow<'static, [(usize, f32)]>);

impl PassCost {
    /// For whoever wants all nodes verified.
    pub const FREE_ROWS: PassCost = PassCost::new(&[(1, 1.0), (2, 1.0)]);

    /// At least two points.
    pub const fn new(points: &'static [(usize, f32)]) -> PassCost {
        PassCost(Cow::Borrowed(points))
    }

    /// Of what was measured: rows, ascending, and seconds, of which more rows never cost less; relative to `unit` seconds.
    pub fn measured(seconds: &[(usize, f64)], unit: f64) -> PassCost {
        let mut so_far = 0.0f64;
        let relative = seconds.iter().map(|&(rows, taken)| {
            so_far = so_far.max(taken);
            (rows, (so_far / unit) as f32)
        });
        PassCost(relative.collect())
    }

    /// The same for a model with experts, where weights are what a pass waits for, its own and what counts like them
    /// (`dense_bytes`): every row brings some `chosen` of `count` experts, of which a pass reads those that no other row
    /// brought. Rows are taken to choose independently.
    pub fn with_experts(&self, dense_bytes: usize, expert_bytes: usize, [chosen, count]: [usize; 2]) -> PassCost {
        let seconds = |rows: usize| {
            let missed = (1.0 - chosen as f64 / count as f64).powi(rows as i32);
            dense_bytes as f64 * f64::from(self.of(rows)) + expert_bytes as f64 * (1.0 - missed)
        };
        let points: Vec<(usize, f64)> = (0..=8).map(|power| (1 << power, seconds(1 << power))).collect();
        PassCost::measured(&points, seconds(1))
    }

    pub fn of(&self, rows: usize) -> f32 {
        let points = &self.0;
        if let [(_, only)] = points[..] {
            return only;
        }
        let next = points.iter().position(|&(at, _)| at >= rows).unwrap_or(points.len() - 1).max(1);
        let ((r0, c0), (r1, c1)) = (points[next - 1], points[next]);
        c0 + (c1 - c0) * (rows as f32 - r0 as f32) / (r1 - r0) as f32
    }

    /// What a row costs beside the first, on the average of a usual tree.
    pub fn of_a_row(&self) -> f32 {
        (self.of(16) - 1.0) / 15.0
    }
}

pub trait Backend {
    fn info(&self) -> &DeviceInfo;

    /// Whether it runs the ops that [draft](treespark_kernel_gen::Op::drafts), so that the host waits for a tree once or
    /// not at all.
    fn drafts(&self) -> bool {
        false
    }

    /// Bytes of the device's memory that nobody uses, if it can be known.
    fn free_bytes(&self) -> Option<usize> {
        None
    }

    /// A weight: the parts, stacked along the first dimension, are the buffer. Parts have the buffer's dtype.
    fn load(&mut self, desc: &BufferDesc, parts: &[Tensor]) -> Result<BufferId>;

    /// A zeroed buffer.
    fn alloc(&mut self, desc: &BufferDesc) -> Result<BufferId>;

    /// Gives the memory back. Passes that name the buffer must not run again.
    fn free(&mut self, buffer: BufferId);

    /// Overwrites words (4 bytes each) from `offset` words on. Not for weights.
    fn write(&mut self, buffer: BufferId, offset: usize, words: &[u32]) -> Result<()>;

    /// Reads `len` words from `offset` words on, after all enqueued work. The only call that waits.
    fn read(&mut self, buffer: BufferId, offset: usize, len: usize) -> Result<Vec<u32>>;

    /// Makes a checked pass ready to run; `buffers[i]` is the pass's buffer i.
    fn compile(&mut self, pass: &Pass, buffers: &[BufferId]) -> Result<PassId>;

    /// Where compiling takes long, does what it can for all these passes at once.
    fn prepare(&mut self, _: &[Pass]) -> Result<()> {
        Ok(())
    }

    /// A pass that runs these, one after the other. Only backends that [draft](Backend::drafts) are asked for one.
    fn join(&mut self, passes: &[PassId]) -> Result<PassId> {
        unreachable!("{} has no pass of {passes:?}: it leaves drafting to the host", self.info().backend)
    }

    /// Enqueues a pass.
    fn run(&mut self, pass: PassId, extent: Extent) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_costs_never_fall() {
        let cost = PassCost::measured(&[(1, 2.0), (2, 1.9), (4, 3.0)], 2.0);
        assert_eq!([1, 2, 4].map(|rows| cost.of(rows)), [1.0, 1.0, 1.5]);
        assert_eq!(PassCost::measured(&[(1, 1.0)], 2.0).of(9), 0.5);
    }

    #[test]
    fn costs_are_linear_between_points_and_beyond() {
        let cost = PassCost::new(&[(1, 1.0), (5, 1.4), (10, 3.4)]);
        for (rows, expected) in [(1, 1.0), (3, 1.2), (5, 1.4), (6, 1.8), (10, 3.4), (20, 7.4)] {
            assert!((cost.of(rows) - expected).abs() < 1e-6, "{rows} rows: {}", cost.of(rows));
        }
    }
}

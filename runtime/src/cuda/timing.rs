//! How long the device takes, by its own clock, without the host in between. For benches.

use super::device::{Event, OpenDevice};
use super::driver::{self, check};
use super::graph::Graph;
use super::launch::ReadyLaunch;
use super::{CudaBackend, gpus};
use crate::backend::PassId;
use crate::error::Result;

/// Large against every cache of a GPU.
const COPIED_BYTES: usize = 512 << 20;
const COPIES: usize = 21;

impl CudaBackend {
    /// Microseconds of each of `repeats` runs of these passes, one after the other in one graph. Passes that take turns
    /// on different buffers find nothing in the GPU's cache that a model of that size would not find.
    pub fn time(&mut self, passes: &[PassId], repeats: usize) -> Result<Vec<f64>> {
        self.device.enter()?;
        let launches: Vec<&ReadyLaunch> = passes.iter().flat_map(|pass| &self.passes[pass.0].launches).collect();
        let graph = Graph::capture(&self.device, &launches)?;
        time(&self.device, repeats, || graph.launch(&self.device))
    }

    /// Bytes read and written a second by a large copy within the GPU's memory, the median of several.
    pub fn copy_bandwidth(&mut self) -> Result<f64> {
        self.device.enter()?;
        let bytes = COPIED_BYTES.min(gpus::free_bytes()? / 4);
        let memory = [self.device.zeroed("a copy", bytes)?, self.device.zeroed("a copy", bytes)?];
        let [from, to] = memory.each_ref().map(|memory| memory.as_device_ptr().as_raw());
        let stream = self.device.stream;
        let mut times = time(&self.device, COPIES, || {
            // SAFETY: both addresses are of `bytes` bytes at least, which live until the end of this function, and `time` waits for the copies.
            check("copying", unsafe { driver::cuMemcpyDtoDAsync_v2(to, from, bytes, stream) })
        })?;
        times.sort_by(f64::total_cmp);
        Ok(2.0 * bytes as f64 / (times[COPIES / 2] * 1e-6))
    }
}

/// Microseconds of each repetition. All are enqueued before any is waited for, behind one that is not timed, so that the
/// device need not wait for the host.
fn time(device: &OpenDevice, repeats: usize, enqueue: impl Fn() -> Result<()>) -> Result<Vec<f64>> {
    let marks = (0..=repeats).map(|_| Event::new(driver::EVENT_TIMED)).collect::<Result<Vec<_>>>()?;
    enqueue()?;
    marks[0].record(device)?;
    for mark in &marks[1..] {
        enqueue()?;
        mark.record(device)?;
    }
    device.wait()?;
    marks.windows(2).map(|pair| pair[1].microseconds_since(&pair[0])).collect()
}

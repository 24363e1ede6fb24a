//! Launches captured once and replayed as one: a CUDA graph.

use std::ptr;

use super::device::OpenDevice;
use super::driver::{self, GraphExecHandle, GraphHandle, check};
use super::launch::ReadyLaunch;
use crate::error::Result;

pub(super) struct Graph {
    exec: GraphExecHandle,
}

impl Graph {
    /// Captures launches that run one after the other, each overlapping the one before it where the device can.
    pub fn capture(device: &OpenDevice, launches: &[&ReadyLaunch]) -> Result<Graph> {
        if device.gpu.device.has_clusters() {
            // Drivers before CUDA 12.3 capture no overlap: without it, the same launches do the same.
            if let Ok(graph) = Graph::capture_as(device, launches, true) {
                return Ok(graph);
            }
        }
        Graph::capture_as(device, launches, false)
    }

    fn capture_as(device: &OpenDevice, launches: &[&ReadyLaunch], overlap: bool) -> Result<Graph> {
        // SAFETY: the stream is alive, and this thread captures nothing else.
        check("capturing a pass", unsafe {
            driver::cuStreamBeginCapture_v2(device.stream, driver::CAPTURE_THREAD_LOCAL)
        })?;
        let mut launches = launches.iter().enumerate();
        let enqueued = launches.try_for_each(|(i, launch)| launch.enqueue(device, overlap && i > 0));
        let mut graph = GraphHandle(ptr::null_mut());
        // SAFETY: capturing began above; the driver writes the handle, null if the capture failed.
        let ended = check("capturing a pass", unsafe { driver::cuStreamEndCapture(device.stream, &mut graph) });
        let made = enqueued.and(ended).and_then(|()| Graph::instantiate(device, graph));
        if !graph.0.is_null() {
            // SAFETY: it was made above, and what is instantiated from it does not need it.
            unsafe { driver::cuGraphDestroy(graph) };
        }
        made
    }

    fn instantiate(device: &OpenDevice, graph: GraphHandle) -> Result<Graph> {
        let mut exec = GraphExecHandle(ptr::null_mut());
        // SAFETY: `graph` was captured by the caller; the driver writes the handle.
        check("making a graph ready", unsafe { driver::cuGraphInstantiateWithFlags(&mut exec, graph, 0) })?;
        let made = Graph { exec };
        // SAFETY: `exec` was just made. Uploading now keeps the first run from doing it.
        check("uploading a graph", unsafe { driver::cuGraphUpload(exec, device.stream) })?;
        Ok(made)
    }

    /// Enqueues all launches.
    pub fn launch(&self, device: &OpenDevice) -> Result<()> {
        // SAFETY: the graph is alive, and so is all that its launches name: see `ReadyLaunch::enqueue`.
        check("running a pass", unsafe { driver::cuGraphLaunch(self.exec, device.stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: nothing else holds the graph; the driver keeps it until its runs have ended.
        unsafe { driver::cuGraphExecDestroy(self.exec) };
    }
}

//! The open GPU: its context, the one stream that all work goes through, and marks in it.
//!
//! The driver keeps a current context for each thread. [`OpenDevice::enter`] sets it; whoever calls the driver for this
//! GPU, or drops what belongs to it, has entered it first.

use std::ffi::c_void;
use std::ptr;

use cust::context::Context;
use cust::device::Device;
use cust::error::CudaError;
use cust::memory::DeviceBuffer;

use super::driver::{self, EventHandle, StreamHandle, check, check_cust};
use super::gpus::{Gpu, gpus};
use crate::error::{Error, Result};

/// Waiting threads spin: a round waits for microseconds.
const SCHEDULE_SPIN: u32 = 1;

pub(super) struct OpenDevice {
    pub gpu: Gpu,
    pub stream: StreamHandle,
    /// Shared by all who open this GPU in this process.
    context: Context,
}

impl OpenDevice {
    /// Opens the GPU at this place in [`gpus`], and enters it.
    pub fn new(index: usize) -> Result<OpenDevice> {
        let mut list = gpus()?;
        if index >= list.len() {
            let why = format!("{} NVIDIA GPUs were found (see treespark devices)", list.len());
            return Err(Error::NoDevice { wanted: format!("cuda:{index}"), why });
        }
        let gpu = list.swap_remove(index);
        let device = check_cust("finding a GPU", Device::get_device(gpu.index))?;
        // SAFETY: `device` is one that the driver named. A driver that refuses waits in another way.
        unsafe { driver::cuDevicePrimaryCtxSetFlags_v2(device.as_raw(), SCHEDULE_SPIN) };
        let context = check_cust(&format!("opening {}", gpu.model), Context::new(device))?;
        let mut open = OpenDevice { gpu, stream: StreamHandle(ptr::null_mut()), context };
        open.enter()?;
        // SAFETY: the driver writes the handle; the context is current.
        check("making a stream", unsafe { driver::cuStreamCreate(&mut open.stream, driver::STREAM_NON_BLOCKING) })?;
        Ok(open)
    }

    /// Makes this thread's calls of the driver go to this GPU.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: `context` is retained as long as this lives.
        check("entering a GPU", unsafe { driver::cuCtxSetCurrent(self.context.as_raw() as *mut c_void) })
    }

    /// Waits until all enqueued work is done.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the stream lives as long as this.
        check(&format!("waiting for {}", self.gpu.model), unsafe { driver::cuStreamSynchronize(self.stream) })
    }

    /// Zeroed memory, zeroed before whatever is enqueued next. Its size is rounded up, so that vectors of four words cover it.
    pub fn zeroed(&self, what: &str, bytes: usize) -> Result<DeviceBuffer<u8>> {
        let size = bytes.next_multiple_of(16).max(16);
        // SAFETY: nobody reads it before it is zeroed: all work goes through the stream.
        let memory = unsafe { DeviceBuffer::<u8>::uninitialized(size) }.map_err(|error| match error {
            CudaError::OutOfMemory => {
                Error::OutOfMemory { needed: size as u64, what: what.into(), device: self.gpu.name() }
            }
            other => Error::Device(format!("{what}: CUDA error {other:?}")),
        })?;
        let address = memory.as_device_ptr().as_raw();
        // SAFETY: `size` bytes are allocated at `address`.
        check(what, unsafe { driver::cuMemsetD8Async(address, 0, size, self.stream) })?;
        Ok(memory)
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            // SAFETY: nothing else holds the stream; null where it was not made, which the driver refuses.
            unsafe { driver::cuStreamDestroy_v2(self.stream) };
        }
    }
}

/// A mark in the stream: when the device has come to it, and at what time.
pub(super) struct Event(EventHandle);

impl Event {
    /// `flags` is one of `driver::EVENT_*`.
    pub fn new(flags: u32) -> Result<Event> {
        let mut event = EventHandle(ptr::null_mut());
        // SAFETY: the driver writes the handle.
        check("making an event", unsafe { driver::cuEventCreate(&mut event, flags) })?;
        Ok(Event(event))
    }

    /// Puts the mark behind all that is enqueued.
    pub fn record(&self, device: &OpenDevice) -> Result<()> {
        // SAFETY: event and stream are alive, and of one context.
        check("recording an event", unsafe { driver::cuEventRecord(self.0, device.stream) })
    }

    /// Waits until the device has come to the mark. One that was never recorded is not waited for.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the event is alive.
        check("waiting for an event", unsafe { driver::cuEventSynchronize(self.0) })
    }

    pub fn microseconds_since(&self, start: &Event) -> Result<f64> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive; the driver writes one number.
        check("timing", unsafe { driver::cuEventElapsedTime(&mut milliseconds, start.0, self.0) })?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: nothing else holds the event.
        unsafe { driver::cuEventDestroy_v2(self.0) };
    }
}

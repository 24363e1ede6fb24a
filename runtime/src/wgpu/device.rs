//! The open device, and what went wrong on it.
//!
//! wgpu reports mistakes and a lost device through callbacks, and panics without them. Here they are kept, and every
//! call that talks to the device returns the first one as an [`Error`].

use std::sync::{Arc, Mutex, OnceLock};

use ::wgpu::{
    Adapter, Buffer, BufferDescriptor, BufferUsages, Device, DeviceDescriptor, ErrorFilter, Features, PollType, Queue,
};

use super::adapters;
use crate::error::{Error, Result};

/// What a uniform can hold on every device.
const UNIFORM_BYTES: u64 = 64 << 10;

pub(super) struct OpenDevice {
    pub device: Device,
    pub queue: Queue,
    pub name: String,
    pub software: bool,
    failure: Arc<OnceLock<String>>,
    /// What is mapped for reading; grows to the largest read.
    staging: Mutex<Option<Buffer>>,
}

impl OpenDevice {
    pub fn new(adapter: &Adapter) -> Result<OpenDevice> {
        let info = adapter.get_info();
        let name = adapters::name(&info);
        let descriptor = DeviceDescriptor {
            label: Some("treespark"),
            required_features: adapter.features() & Features::PIPELINE_CACHE,
            required_limits: adapter.limits(),
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|e| Error::NoDevice { wanted: format!("wgpu ({name})"), why: e.to_string() })?;

        let failure = Arc::new(OnceLock::new());
        let keep = failure.clone();
        device.on_uncaptured_error(Arc::new(move |error| drop(keep.set(error.to_string()))));
        let keep = failure.clone();
        device.set_device_lost_callback(move |reason, message| {
            drop(keep.set(format!("the device was lost ({reason:?}): {message}")));
        });
        let software = info.device_type == ::wgpu::DeviceType::Cpu;
        Ok(OpenDevice { device, queue, name, software, failure, staging: Mutex::new(None) })
    }

    /// The first failure, if there was one.
    pub fn check(&self) -> Result<()> {
        match self.failure.get() {
            Some(message) => Err(Error::Device(message.clone())),
            None => Ok(()),
        }
    }

    /// Runs `make`; what wgpu finds wrong with it becomes an error that names `what`.
    pub fn guarded<T>(&self, what: &str, make: impl FnOnce() -> T) -> Result<T> {
        let internal = self.device.push_error_scope(ErrorFilter::Internal);
        let validation = self.device.push_error_scope(ErrorFilter::Validation);
        let made = make();
        let errors = [pollster::block_on(validation.pop()), pollster::block_on(internal.pop())];
        match errors.into_iter().flatten().next() {
            Some(error) => Err(Error::Device(format!("{what}: {error}"))),
            None => Ok(made),
        }
    }

    /// A zeroed buffer, its size rounded up so that vectors of four words cover it.
    pub fn buffer(&self, what: &str, bytes: u64) -> Result<Buffer> {
        let size = bytes.next_multiple_of(16).max(16);
        let out_of_memory = || Error::OutOfMemory { needed: size, what: what.into(), device: self.name.clone() };
        if size > self.device.limits().max_buffer_size {
            return Err(out_of_memory());
        }
        let mut usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        if size <= UNIFORM_BYTES {
            usage |= BufferUsages::UNIFORM;
        }
        let scope = self.device.push_error_scope(ErrorFilter::OutOfMemory);
        let descriptor = BufferDescriptor { label: Some(what), size, usage, mapped_at_creation: false };
        let buffer = self.guarded(what, || self.device.create_buffer(&descriptor));
        match pollster::block_on(scope.pop()) {
            Some(_) => Err(out_of_memory()),
            None => buffer,
        }
    }

    /// Waits until all enqueued work is done.
    pub fn wait(&self) -> Result<()> {
        let polled = self.device.poll(PollType::wait_indefinitely());
        self.check()?;
        polled.map(drop).map_err(|e| Error::Device(format!("waiting for {}: {e}", self.name)))
    }

    /// The words in these places (a buffer, a byte offset, a size in bytes), one after the other.
    pub fn read(&self, places: &[(&Buffer, u64, u64)]) -> Result<Vec<u32>> {
        let bytes = places.iter().map(|(_, _, size)| size).sum();
        let mut staging = self.staging.lock().unwrap_or_else(|e| e.into_inner());
        if staging.as_ref().is_none_or(|buffer| buffer.size() < bytes) {
            let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
            let size = bytes.next_power_of_two();
            let descriptor = BufferDescriptor { label: Some("read"), size, usage, mapped_at_creation: false };
            *staging = Some(self.guarded("read", || self.device.create_buffer(&descriptor))?);
        }
        let staging = staging.as_ref().expect("made above");
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let mut to = 0;
        for &(buffer, from, size) in places {
            encoder.copy_buffer_to_buffer(buffer, from, staging, to, size);
            to += size;
        }
        self.queue.submit([encoder.finish()]);
        let mapped = Arc::new(OnceLock::new());
        let result = mapped.clone();
        staging.map_async(::wgpu::MapMode::Read, 0..bytes, move |r| drop(result.set(r)));
        self.wait()?;
        match mapped.get() {
            Some(Ok(())) => {}
            other => return Err(Error::Device(format!("mapping {bytes} bytes of {}: {other:?}", self.name))),
        }
        let view = staging.get_mapped_range(0..bytes).map_err(|e| Error::Device(format!("reading: {e}")))?;
        let words = view.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        drop(view);
        staging.unmap();
        Ok(words)
    }
}

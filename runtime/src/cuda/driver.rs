//! The functions of the driver that `cust` lacks, or would give a result type that cannot hold newer error codes.
//!
//! `cust` serves what is done once: devices, contexts, memory, modules. What a round does, and graphs and launches with
//! attributes, is declared here; every function returns the driver's code as a number, and [`check`] reads it.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;

use crate::error::{Error, Result};

macro_rules! handles {
    ($($name:ident: $what:literal)*) => {$(
        #[doc = $what]
        #[repr(transparent)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct $name(pub *mut c_void);
    )*};
}

handles! {
    StreamHandle: "Work in order."
    EventHandle: "A mark in a stream."
    GraphHandle: "Launches and what they wait for, as captured."
    GraphExecHandle: "A graph made ready to run."
    FunctionHandle: "A kernel of a loaded module."
}

pub const FUNCTION_SHARED_BYTES: i32 = 8;
pub const FUNCTION_LARGE_CLUSTERS: i32 = 14;

pub const DEVICE_MULTIPROCESSORS: i32 = 16;
pub const DEVICE_CAPABILITY_MAJOR: i32 = 75;
pub const DEVICE_CAPABILITY_MINOR: i32 = 76;
pub const DEVICE_SHARED_BYTES: i32 = 97;

/// The stream does not wait for the process's default stream, nor that one for it.
pub const STREAM_NON_BLOCKING: u32 = 1;
/// Other threads may call what they like while this one captures.
pub const CAPTURE_THREAD_LOCAL: i32 = 1;
pub const EVENT_TIMED: u32 = 0;
pub const EVENT_UNTIMED: u32 = 2;

/// `CUlaunchConfig`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LaunchConfig {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub stream: StreamHandle,
    pub attributes: *const LaunchAttribute,
    pub n_attributes: u32,
}

/// `CUlaunchAttribute`: an id, padding to 8 bytes, and a union of 64 bytes, of which the first words are used here.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LaunchAttribute {
    id: u32,
    padding: u32,
    value: [u32; 16],
}

const _: () = assert!(size_of::<LaunchConfig>() == 56 && size_of::<LaunchAttribute>() == 72);

impl LaunchAttribute {
    /// Blocks of a cluster, along x.
    pub fn cluster(blocks: u32) -> LaunchAttribute {
        LaunchAttribute::new(4, &[blocks, 1, 1])
    }

    /// The kernel may start before the one before it in the stream has ended.
    pub fn overlap() -> LaunchAttribute {
        LaunchAttribute::new(6, &[1])
    }

    fn new(id: u32, words: &[u32]) -> LaunchAttribute {
        let mut value = [0; 16];
        value[..words.len()].copy_from_slice(words);
        LaunchAttribute { id, padding: 0, value }
    }
}

#[allow(non_snake_case)]
unsafe extern "C" {
    pub fn cuInit(flags: u32) -> i32;
    pub fn cuDriverGetVersion(version: *mut i32) -> i32;
    pub fn cuDeviceGetAttribute(value: *mut i32, attribute: i32, device: i32) -> i32;
    pub fn cuDevicePrimaryCtxSetFlags_v2(device: i32, flags: u32) -> i32;
    pub fn cuCtxSetCurrent(context: *mut c_void) -> i32;
    fn cuGetErrorName(code: i32, name: *mut *const c_char) -> i32;

    pub fn cuStreamCreate(stream: *mut StreamHandle, flags: u32) -> i32;
    pub fn cuStreamDestroy_v2(stream: StreamHandle) -> i32;
    pub fn cuStreamSynchronize(stream: StreamHandle) -> i32;
    pub fn cuStreamBeginCapture_v2(stream: StreamHandle, mode: i32) -> i32;
    pub fn cuStreamEndCapture(stream: StreamHandle, graph: *mut GraphHandle) -> i32;

    pub fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: StreamHandle) -> i32;
    pub fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: StreamHandle) -> i32;
    pub fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: StreamHandle) -> i32;
    pub fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: StreamHandle) -> i32;

    pub fn cuEventCreate(event: *mut EventHandle, flags: u32) -> i32;
    pub fn cuEventDestroy_v2(event: EventHandle) -> i32;
    pub fn cuEventRecord(event: EventHandle, stream: StreamHandle) -> i32;
    pub fn cuEventSynchronize(event: EventHandle) -> i32;
    pub fn cuEventElapsedTime(milliseconds: *mut f32, start: EventHandle, end: EventHandle) -> i32;

    pub fn cuFuncSetAttribute(function: FunctionHandle, attribute: i32, value: i32) -> i32;
    pub fn cuLaunchKernel(
        function: FunctionHandle,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        shared_bytes: u32,
        stream: StreamHandle,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> i32;
    pub fn cuLaunchKernelEx(
        config: *const LaunchConfig,
        function: FunctionHandle,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> i32;

    pub fn cuGraphInstantiateWithFlags(exec: *mut GraphExecHandle, graph: GraphHandle, flags: u64) -> i32;
    pub fn cuGraphUpload(exec: GraphExecHandle, stream: StreamHandle) -> i32;
    pub fn cuGraphLaunch(exec: GraphExecHandle, stream: StreamHandle) -> i32;
    pub fn cuGraphExecDestroy(exec: GraphExecHandle) -> i32;
    pub fn cuGraphDestroy(graph: GraphHandle) -> i32;
}

/// What a driver function returned, as an error that says what was being done.
pub fn check(what: &str, code: i32) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(Error::Device(format!("{what}: {}", error_name(code)))) }
}

/// The same for what `cust` returns. Its `Display` asks the driver and panics where it fails, so it is not used.
pub fn check_cust<T>(what: &str, result: cust::error::CudaResult<T>) -> Result<T> {
    result.map_err(|error| Error::Device(format!("{what}: CUDA error {} ({error:?})", error as u32)))
}

fn error_name(code: i32) -> String {
    let mut name = ptr::null();
    // SAFETY: the driver sets `name` to a text that lives as long as the driver, or returns an error.
    let known = unsafe { cuGetErrorName(code, &mut name) } == 0 && !name.is_null();
    if !known {
        return format!("CUDA error {code}");
    }
    // SAFETY: as above: not null, and ends with a zero as the driver's texts do.
    let name = unsafe { CStr::from_ptr(name) };
    format!("CUDA error {code} ({})", name.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn launch_structures_lie_as_the_driver_reads_them() {
        assert_eq!(offset_of!(LaunchConfig, shared_bytes), 24);
        assert_eq!(offset_of!(LaunchConfig, stream), 32);
        assert_eq!(offset_of!(LaunchConfig, attributes), 40);
        assert_eq!(offset_of!(LaunchConfig, n_attributes), 48);
        assert_eq!(offset_of!(LaunchAttribute, value), 8);
        let LaunchAttribute { id, value, .. } = LaunchAttribute::cluster(4);
        assert_eq!((id, &value[..4]), (4, &[4, 1, 1, 0][..]));
    }
}

//! Compiles a kernel of this project's own without a counter in each loop.
//!
//! wgpu counts the turns of every loop, so that a loop without end is not undefined behaviour. The counters keep
//! drivers from unrolling, and what should be registers becomes memory. All other checks stay.
#![allow(unsafe_code)]

use ::wgpu::{Device, ShaderModule, ShaderModuleDescriptor, ShaderRuntimeChecks, ShaderSource};

pub(super) fn module(device: &Device, name: &str, source: &str) -> ShaderModule {
    let checks = ShaderRuntimeChecks { force_loop_bounding: false, ..ShaderRuntimeChecks::checked() };
    let descriptor = ShaderModuleDescriptor { label: Some(name), source: ShaderSource::Wgsl(source.into()) };
    // SAFETY: only loop counters are left out, and every loop in shaders/wgsl counts by a nonzero step to a bound that
    // the loop does not change, or strictly shrinks the word that it tests.
    unsafe { device.create_shader_module_trusted(descriptor, checks) }
}

//! A pass made ready: for each kernel call its pipeline, its bind group and its grid.
//!
//! A run records all calls into one command buffer, with one compute pass, and submits it once.

use ::wgpu::{BindGroup, BindGroupDescriptor, BindGroupEntry, BindingResource, Buffer, BufferBinding, BufferSize};
use treespark_kernel_gen::Pass;
use treespark_kernel_gen::lower::{Grid, KernelCall, Limits, Source, lower};

use super::buffers::Banked;
use super::device::OpenDevice;
use super::pipelines::{Pipeline, Pipelines};
use crate::backend::Extent;
use crate::error::{Error, Result};

pub(super) struct CompiledPass {
    calls: Vec<Call>,
}

struct Call {
    pipeline: Pipeline,
    bind_group: BindGroup,
    grid: Grid,
}

/// The calls of a pass, in order.
pub(super) fn lower_pass(pass: &Pass, limits: &Limits) -> Result<Vec<KernelCall>> {
    let calls = pass.ops.iter().map(|op| lower(op, pass, limits)).collect::<Result<Vec<_>, _>>();
    Ok(calls.map_err(|e| Error::Device(e.to_string()))?.concat())
}

/// Bytes of partial results that the calls need.
pub(super) fn partial_bytes(calls: &[KernelCall]) -> usize {
    let bindings = calls.iter().flat_map(|call| &call.bindings);
    bindings.filter(|b| b.source == Source::Partials).map(|b| b.bytes.end).max().unwrap_or(0)
}

impl CompiledPass {
    /// `buffers[i]` is the pass's buffer i; `partials` holds what the calls need.
    pub fn new(
        device: &OpenDevice,
        pipelines: &mut Pipelines,
        calls: &[KernelCall],
        buffers: &[&Banked],
        partials: &Buffer,
    ) -> Result<CompiledPass> {
        let mut made = Vec::with_capacity(calls.len());
        for call in calls {
            let pipeline = pipelines.get(device, call)?;
            let entries = call.bindings.iter().enumerate().map(|(i, binding)| {
                let buffer = match binding.source {
                    Source::Buffer { buf, bank } => &buffers[buf.0].banks[bank],
                    Source::Partials => partials,
                };
                // A binding begins where vectors of four words do; its end is rounded up to one, within the buffer.
                let size = (binding.bytes.len() as u64).next_multiple_of(16);
                let offset = binding.bytes.start as u64;
                let resource =
                    BufferBinding { buffer, offset, size: BufferSize::new(size.min(buffer.size() - offset)) };
                BindGroupEntry { binding: i as u32, resource: BindingResource::Buffer(resource) }
            });
            let entries: Vec<_> = entries.collect();
            let label = Some(call.spec.name());
            let descriptor = BindGroupDescriptor { label, layout: &pipeline.layout, entries: &entries };
            let bind_group = device
                .guarded(&format!("kernel {}", call.spec.name()), || device.device.create_bind_group(&descriptor))?;
            made.push(Call { pipeline, bind_group, grid: call.grid });
        }
        Ok(CompiledPass { calls: made })
    }

    pub fn run(&self, device: &OpenDevice, extent: Extent) -> Result<()> {
        let mut encoder = device.device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        for call in &self.calls {
            let [x, y, z] = call.grid.workgroups(extent.rows, extent.requests, extent.keys);
            pass.set_pipeline(&call.pipeline.pipeline);
            pass.set_bind_group(0, &call.bind_group, &[]);
            pass.dispatch_workgroups(x, y, z);
        }
        drop(pass);
        device.queue.submit([encoder.finish()]);
        device.check()
    }
}

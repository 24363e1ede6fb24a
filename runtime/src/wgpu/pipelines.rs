//! Kernels made ready to run. Equal sources share one pipeline: the layers of a model differ in their bindings only.

use std::collections::HashMap;

use ::wgpu::{
    BindGroupLayout, BindGroupLayoutDescriptor, BindGroupLayoutEntry, BindingType, BufferBindingType, ComputePipeline,
    ComputePipelineDescriptor, PipelineCompilationOptions, PipelineLayoutDescriptor, ShaderStages,
};
use treespark_kernel_gen::emit::{Lang, emit};
use treespark_kernel_gen::lower::{Access, KernelCall};

use super::device::OpenDevice;
use super::pipeline_cache::PipelineCacheFile;
use super::trusted;
use crate::error::{Error, Result};

/// Kernels that gather into workgroup memory, and count on it being zero at the start.
const ZEROED: [&str; 2] = ["accept", "draw"];

pub(super) struct Pipelines {
    by_source: HashMap<String, Pipeline>,
    cache: Option<PipelineCacheFile>,
}

#[derive(Clone)]
pub(super) struct Pipeline {
    pub pipeline: ComputePipeline,
    pub layout: BindGroupLayout,
}

impl Pipelines {
    pub fn new(cache: Option<PipelineCacheFile>) -> Pipelines {
        Pipelines { by_source: HashMap::new(), cache }
    }

    pub fn get(&mut self, device: &OpenDevice, call: &KernelCall) -> Result<Pipeline> {
        let name = call.spec.name();
        let source = emit(&call.spec, Lang::Wgsl).map_err(|e| Error::Device(format!("kernel {name}: {e}")))?;
        if let Some(known) = self.by_source.get(&source) {
            return Ok(known.clone());
        }
        let made = device.guarded(&format!("kernel {name}"), || self.make(device, call, &source))?;
        if let Some(cache) = &mut self.cache {
            cache.changed = true;
        }
        self.by_source.insert(source, made.clone());
        Ok(made)
    }

    /// Keeps what the driver compiled, for the next start.
    pub fn save(&mut self) {
        if let Some(cache) = &mut self.cache {
            cache.save();
        }
    }

    fn make(&self, device: &OpenDevice, call: &KernelCall, source: &str) -> Pipeline {
        let name = Some(call.spec.name());
        let device = &device.device;
        let entries: Vec<_> = call.bindings.iter().enumerate().map(|(i, b)| layout_entry(i as u32, b.access)).collect();
        let layout = device.create_bind_group_layout(&BindGroupLayoutDescriptor { label: name, entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&PipelineLayoutDescriptor {
            label: name,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = device.create_compute_pipeline(&ComputePipelineDescriptor {
            label: name,
            layout: Some(&pipeline_layout),
            module: &trusted::module(device, call.spec.name(), source),
            entry_point: Some("main"),
            compilation_options: PipelineCompilationOptions {
                zero_initialize_workgroup_memory: ZEROED.contains(&call.spec.stem()),
                ..Default::default()
            },
            cache: self.cache.as_ref().map(|cache| &cache.cache),
        });
        Pipeline { pipeline, layout }
    }
}

fn layout_entry(binding: u32, access: Access) -> BindGroupLayoutEntry {
    let ty = match access {
        Access::Uniform => BufferBindingType::Uniform,
        Access::Read => BufferBindingType::Storage { read_only: true },
        Access::Write => BufferBindingType::Storage { read_only: false },
    };
    BindGroupLayoutEntry {
        binding,
        visibility: ShaderStages::COMPUTE,
        ty: BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
        count: None,
    }
}

//! Which GPUs there are. Hardware comes before software rasterisers, in the order that the APIs report them.

use std::sync::OnceLock;

use ::wgpu::{Adapter, AdapterInfo, Backends, DeviceType, Instance, InstanceDescriptor};

/// One way to reach one device.
#[derive(Debug, Clone)]
pub struct Gpu {
    /// As a person would name it, with the API, e.g. `NVIDIA H100 (Vulkan)`.
    pub name: String,
    /// `vulkan`, `metal` or `dx12`.
    pub api: String,
    pub device_type: DeviceType,
    pub driver: String,
    /// A CPU that draws: correct, and slower than the CPU backend.
    pub software: bool,
    pub binding_bytes: u64,
    pub buffer_bytes: u64,
}

impl Gpu {
    fn new(adapter: &Adapter) -> Gpu {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        Gpu {
            name: name(&info),
            api: info.backend.to_str().to_string(),
            device_type: info.device_type,
            driver: [info.driver.as_str(), info.driver_info.as_str()].join(" ").trim().to_string(),
            software: info.device_type == DeviceType::Cpu,
            binding_bytes: limits.max_storage_buffer_binding_size,
            buffer_bytes: limits.max_buffer_size,
        }
    }

    /// API, type, driver and limits in one line.
    pub fn details(&self) -> String {
        let kind = match self.device_type {
            DeviceType::DiscreteGpu => "discrete GPU",
            DeviceType::IntegratedGpu => "integrated GPU",
            DeviceType::VirtualGpu => "virtual GPU",
            DeviceType::Cpu => "software rasteriser",
            DeviceType::Other => "unknown type",
        };
        let mib = |bytes: u64| bytes >> 20;
        let (bindings, buffers) = (mib(self.binding_bytes), mib(self.buffer_bytes));
        format!("{}, {kind}, driver {}, bindings of {bindings} MiB, buffers of {buffers} MiB", self.api, self.driver)
    }
}

pub(super) fn name(info: &AdapterInfo) -> String {
    let api = match info.backend {
        ::wgpu::Backend::Vulkan => "Vulkan",
        ::wgpu::Backend::Metal => "Metal",
        ::wgpu::Backend::Dx12 => "DirectX 12",
        other => other.to_str(),
    };
    format!("{} ({api})", info.name)
}

/// All GPUs; the place in this list is the number that `--backend wgpu:N` takes.
pub fn adapters() -> Vec<Gpu> {
    enumerate().iter().map(Gpu::new).collect()
}

/// The one way to the graphics APIs of the process: drivers are loaded once, and survive neither hundreds of instances
/// nor several that come and go at the same time.
static INSTANCE: OnceLock<Instance> = OnceLock::new();

pub(super) fn enumerate() -> Vec<Adapter> {
    let backends = Backends::VULKAN | Backends::METAL | Backends::DX12;
    let descriptor = || InstanceDescriptor { backends, ..InstanceDescriptor::new_without_display_handle() };
    let instance = INSTANCE.get_or_init(|| Instance::new(descriptor()));
    let mut adapters = pollster::block_on(instance.enumerate_adapters(backends));
    adapters.sort_by_key(|adapter| adapter.get_info().device_type == DeviceType::Cpu);
    adapters
}

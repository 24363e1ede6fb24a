//! What the driver compiled, kept on disk between runs, so that a second start compiles nothing.
//!
//! One file for each device and driver, in the folder `pipelines` of the cache. It saves time and nothing else: a file
//! that is missing, damaged or not writable is ignored.
#![allow(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use ::wgpu::{AdapterInfo, Device, Features, PipelineCache, PipelineCacheDescriptor, util};

use crate::cache_folder::replace;

pub(super) struct PipelineCacheFile {
    pub cache: PipelineCache,
    /// Whether there is more to keep than the file holds.
    pub changed: bool,
    path: PathBuf,
}

impl PipelineCacheFile {
    /// None where the device keeps nothing.
    pub fn open(device: &Device, info: &AdapterInfo, folder: &Path) -> Option<PipelineCacheFile> {
        if !device.features().contains(Features::PIPELINE_CACHE) {
            return None;
        }
        let path = folder.join(file_name(info)?);
        let data = fs::read(&path).ok();
        let descriptor = PipelineCacheDescriptor { label: Some("pipelines"), data: data.as_deref(), fallback: true };
        // SAFETY: the file was written by `save` from `PipelineCache::get_data`, under a name that holds the device and
        // its driver's version; wgpu and the driver check the header of what they get, and fall back to an empty cache.
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Some(PipelineCacheFile { cache, changed: false, path })
    }

    pub fn save(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        if let Some(data) = self.cache.get_data() {
            // On a full disk or in a read-only home nothing is kept: the next start compiles again.
            drop(replace(&self.path, &data));
        }
    }
}

/// Device and driver, as a file name.
fn file_name(info: &AdapterInfo) -> Option<String> {
    let text = format!("{}_{}_{}", util::pipeline_cache_key(info)?, info.driver, info.driver_info);
    Some(text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '_' }).collect())
}

#[cfg(test)]
mod tests {
    use ::wgpu::{ComputePipelineDescriptor, ShaderModuleDescriptor, ShaderSource};

    use super::*;
    use crate::wgpu::adapters::enumerate;
    use crate::wgpu::device::OpenDevice;

    const KERNEL: &str = "@compute @workgroup_size(1) fn main() {}";

    #[test]
    fn a_damaged_file_is_ignored_and_replaced() {
        let Some(adapter) = enumerate().into_iter().next() else { return };
        let (open, info) = (OpenDevice::new(&adapter).unwrap(), adapter.get_info());
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("pipelines");
        let Some(mut file) = PipelineCacheFile::open(&open.device, &info, &folder) else { return };
        file.save();
        assert!(!folder.exists(), "nothing has changed");

        fs::create_dir_all(&folder).unwrap();
        fs::write(&file.path, b"not what a driver wrote").unwrap();
        let mut file = PipelineCacheFile::open(&open.device, &info, &folder).unwrap();
        open.guarded("kernel", || {
            let source = ShaderSource::Wgsl(KERNEL.into());
            let module = &open.device.create_shader_module(ShaderModuleDescriptor { label: None, source });
            open.device.create_compute_pipeline(&ComputePipelineDescriptor {
                label: None,
                layout: None,
                module,
                entry_point: None,
                compilation_options: Default::default(),
                cache: Some(&file.cache),
            })
        })
        .unwrap();
        file.changed = true;
        file.save();
        assert_eq!(fs::read(&file.path).ok(), file.cache.get_data());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no half-written file is left");
        open.check().unwrap();
    }
}

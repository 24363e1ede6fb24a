//! The named buffers of one model on a device. Passes of a model share them by name.

use std::collections::HashMap;

use treespark_kernel_gen::{BufferDesc, Pass, Role};
use treespark_models::Tensor;

use crate::backend::{Backend, BufferId};
use crate::error::Result;

/// Bytes on the device, by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryUse {
    pub weights: usize,
    pub cache: usize,
    pub scratch: usize,
}

impl std::ops::Add for MemoryUse {
    type Output = MemoryUse;

    fn add(self, other: MemoryUse) -> MemoryUse {
        MemoryUse {
            weights: self.weights + other.weights,
            cache: self.cache + other.cache,
            scratch: self.scratch + other.scratch,
        }
    }
}

#[derive(Debug, Default)]
pub struct Memory {
    buffers: HashMap<String, (BufferId, BufferDesc)>,
}

impl Memory {
    pub fn load(&mut self, backend: &mut dyn Backend, desc: BufferDesc, parts: &[Tensor]) -> Result<()> {
        let id = backend.load(&desc, parts)?;
        self.buffers.insert(desc.name.clone(), (id, desc));
        Ok(())
    }

    /// The pass's buffers; those that do not exist yet are allocated. Weights must have been loaded.
    pub fn bind(&mut self, backend: &mut dyn Backend, pass: &Pass) -> Result<Vec<BufferId>> {
        pass.buffers.iter().map(|desc| self.find_or_alloc(backend, desc)).collect()
    }

    fn find_or_alloc(&mut self, backend: &mut dyn Backend, desc: &BufferDesc) -> Result<BufferId> {
        if let Some((id, known)) = self.buffers.get(&desc.name) {
            assert_eq!(known, desc, "passes of one model disagree about a buffer");
            return Ok(*id);
        }
        assert_ne!(desc.role, Role::Weight, "weight {} was not loaded", desc.name);
        let id = backend.alloc(desc)?;
        self.buffers.insert(desc.name.clone(), (id, desc.clone()));
        Ok(id)
    }

    /// A buffer that some pass has bound.
    pub fn get(&self, name: &str) -> BufferId {
        self.buffers[name].0
    }

    /// A buffer that some pass may have bound.
    pub fn find(&self, name: &str) -> Option<BufferId> {
        self.buffers.get(name).map(|(id, _)| *id)
    }

    pub fn usage(&self) -> MemoryUse {
        let mut usage = MemoryUse::default();
        for (_, desc) in self.buffers.values() {
            match desc.role {
                Role::Weight => usage.weights += desc.bytes(),
                Role::Cache => usage.cache += desc.bytes(),
                Role::Input | Role::Scratch | Role::Output => usage.scratch += desc.bytes(),
            }
        }
        usage
    }
}

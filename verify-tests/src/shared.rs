//! A backend that several engines use, one after the other or in turns. What an engine allocated is freed with it.

use std::cell::RefCell;
use std::rc::Rc;

use treespark::Result;
use treespark::backend::{Backend, BufferId, DeviceInfo, Extent, PassId};
use treespark_kernel_gen::{BufferDesc, Pass};
use treespark_models::Tensor;

pub struct Shared {
    inner: Rc<RefCell<Box<dyn Backend>>>,
    info: DeviceInfo,
    drafts: bool,
    mine: Vec<BufferId>,
}

impl Shared {
    pub fn new(backend: Box<dyn Backend>) -> Shared {
        let (info, drafts) = (backend.info().clone(), backend.drafts());
        Shared { inner: Rc::new(RefCell::new(backend)), info, drafts, mine: Vec::new() }
    }

    /// The same backend for somebody else.
    pub fn share(&self) -> Box<dyn Backend> {
        let (inner, info, drafts) = (self.inner.clone(), self.info.clone(), self.drafts);
        Box::new(Shared { inner, info, drafts, mine: Vec::new() })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.mine.iter().for_each(|&buffer| self.inner.borrow_mut().free(buffer));
    }
}

impl Backend for Shared {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn drafts(&self) -> bool {
        self.drafts
    }

    fn load(&mut self, desc: &BufferDesc, parts: &[Tensor]) -> Result<BufferId> {
        let id = self.inner.borrow_mut().load(desc, parts)?;
        self.mine.push(id);
        Ok(id)
    }

    fn alloc(&mut self, desc: &BufferDesc) -> Result<BufferId> {
        let id = self.inner.borrow_mut().alloc(desc)?;
        self.mine.push(id);
        Ok(id)
    }

    fn free(&mut self, buffer: BufferId) {
        self.mine.retain(|&mine| mine != buffer);
        self.inner.borrow_mut().free(buffer);
    }

    fn write(&mut self, buffer: BufferId, offset: usize, words: &[u32]) -> Result<()> {
        self.inner.borrow_mut().write(buffer, offset, words)
    }

    fn read(&mut self, buffer: BufferId, offset: usize, len: usize) -> Result<Vec<u32>> {
        self.inner.borrow_mut().read(buffer, offset, len)
    }

    fn compile(&mut self, pass: &Pass, buffers: &[BufferId]) -> Result<PassId> {
        self.inner.borrow_mut().compile(pass, buffers)
    }

    fn join(&mut self, passes: &[PassId]) -> Result<PassId> {
        self.inner.borrow_mut().join(passes)
    }

    fn run(&mut self, pass: PassId, extent: Extent) -> Result<()> {
        self.inner.borrow_mut().run(pass, extent)
    }
}

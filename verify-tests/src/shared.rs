//! A backend that several engines use, one after the other or in turns. What an engine allocated is freed with it. It counts
//! what was run on it.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use treespark::Result;
use treespark::backend::{Backend, BufferId, DeviceInfo, Extent, PassId};
use treespark_kernel_gen::{BufferDesc, Op, Pass};
use treespark_models::Tensor;

pub struct Shared {
    inner: Rc<RefCell<Box<dyn Backend>>>,
    log: Rc<RefCell<Log>>,
    info: DeviceInfo,
    drafts: bool,
    mine: Vec<BufferId>,
}

/// What was compiled and what was run.
#[derive(Default)]
struct Log {
    compiled: Vec<String>,
    ops: HashMap<PassId, Vec<&'static str>>,
    runs: BTreeMap<&'static str, u64>,
}

impl Shared {
    pub fn new(backend: Box<dyn Backend>) -> Shared {
        let (info, drafts) = (backend.info().clone(), backend.drafts());
        Shared { inner: Rc::new(RefCell::new(backend)), log: Rc::default(), info, drafts, mine: Vec::new() }
    }

    /// The same backend for somebody else.
    pub fn share(&self) -> Box<dyn Backend> {
        let (inner, log, info) = (self.inner.clone(), self.log.clone(), self.info.clone());
        Box::new(Shared { inner, log, info, drafts: self.drafts, mine: Vec::new() })
    }

    /// Names of all passes that were compiled.
    pub fn compiled(&self) -> Vec<String> {
        self.log.borrow().compiled.clone()
    }

    /// How often each op was run.
    pub fn runs(&self) -> BTreeMap<&'static str, u64> {
        self.log.borrow().runs.clone()
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
        let id = self.inner.borrow_mut().compile(pass, buffers)?;
        let log = &mut *self.log.borrow_mut();
        log.compiled.push(pass.name.clone());
        log.ops.insert(id, pass.ops.iter().map(Op::name).collect());
        Ok(id)
    }

    fn join(&mut self, passes: &[PassId]) -> Result<PassId> {
        let id = self.inner.borrow_mut().join(passes)?;
        let ops = &mut self.log.borrow_mut().ops;
        ops.insert(id, passes.iter().flat_map(|pass| ops[pass].clone()).collect());
        Ok(id)
    }

    fn run(&mut self, pass: PassId, extent: Extent) -> Result<()> {
        let Log { ops, runs, .. } = &mut *self.log.borrow_mut();
        ops[&pass].iter().for_each(|op| *runs.entry(op).or_default() += 1);
        self.inner.borrow_mut().run(pass, extent)
    }
}

//! A backend with a known mistake, planted into an otherwise right one: it spoils what goes in (words that the host writes,
//! ops of a pass) or comes out. What claims to find mistakes is tried on these.

use std::collections::{HashMap, HashSet};

use treespark::Result;
use treespark::backend::{Backend, BufferId, DeviceInfo, Extent, PassId};
use treespark_kernel_gen::layout::HEADER_WORDS;
use treespark_kernel_gen::{BufferDesc, Op, Pass, Request, Row};
use treespark_models::Tensor;

use crate::bed::POISON;

/// What a mistake does to one row of a batch.
pub type SpoilRow = fn(&mut Row);
pub type SpoilRequest = fn(&mut Request);
/// What it does to an op when a pass is compiled; `false` drops the op.
pub type SpoilOp = fn(&mut Op) -> bool;
/// What it does to the words that the host reads or writes of a buffer.
pub type SpoilWords = fn(&mut [u32]);

#[derive(Clone, Copy)]
pub enum Mistake {
    Row(SpoilRow),
    Request(SpoilRequest),
    Op(SpoilOp),
    /// Of the buffer of this name.
    Read(&'static str, SpoilWords),
    Write(&'static str, SpoilWords),
    /// The buffer of this name keeps what was written first.
    Once(&'static str),
}

pub struct Mutant {
    inner: Box<dyn Backend>,
    names: HashMap<BufferId, String>,
    /// Buffers that the host has written more than poison to.
    written: HashSet<BufferId>,
    mistake: Mistake,
}

impl Mutant {
    pub fn new(inner: Box<dyn Backend>, mistake: Mistake) -> Mutant {
        Mutant { inner, names: HashMap::new(), written: HashSet::new(), mistake }
    }
}

impl Backend for Mutant {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }

    fn drafts(&self) -> bool {
        self.inner.drafts()
    }

    fn load(&mut self, desc: &BufferDesc, parts: &[Tensor]) -> Result<BufferId> {
        self.inner.load(desc, parts)
    }

    fn alloc(&mut self, desc: &BufferDesc) -> Result<BufferId> {
        let id = self.inner.alloc(desc)?;
        self.names.insert(id, desc.name.clone());
        Ok(id)
    }

    fn free(&mut self, buffer: BufferId) {
        self.inner.free(buffer);
    }

    fn write(&mut self, buffer: BufferId, offset: usize, words: &[u32]) -> Result<()> {
        let mut words = words.to_vec();
        match (self.names[&buffer].as_str(), self.mistake) {
            ("rows", Mistake::Row(spoil)) => {
                for index in 0..words.len() / Row::WORDS {
                    let mut row = Row::read(&words, index);
                    if row.token == POISON {
                        continue;
                    }
                    spoil(&mut row);
                    words[index * Row::WORDS..][..Row::WORDS].copy_from_slice(&row.to_words());
                }
            }
            ("requests", Mistake::Request(spoil)) if words[1] != POISON => {
                for index in 0..words[1] as usize {
                    let mut request = Request::read(&words, index);
                    spoil(&mut request);
                    words[HEADER_WORDS + index * Request::WORDS..][..Request::WORDS]
                        .copy_from_slice(&request.to_words());
                }
            }
            (name, Mistake::Write(spoilt, spoil)) if name == spoilt && !is_poison(&words) => spoil(&mut words),
            (name, Mistake::Once(kept)) if name == kept && !is_poison(&words) && !self.written.insert(buffer) => {
                return Ok(());
            }
            _ => {}
        }
        self.inner.write(buffer, offset, &words)
    }

    fn read(&mut self, buffer: BufferId, offset: usize, len: usize) -> Result<Vec<u32>> {
        let mut words = self.inner.read(buffer, offset, len)?;
        match self.mistake {
            Mistake::Read(name, spoil) if self.names.get(&buffer).is_some_and(|n| n == name) => spoil(&mut words),
            _ => {}
        }
        Ok(words)
    }

    fn compile(&mut self, pass: &Pass, buffers: &[BufferId]) -> Result<PassId> {
        let mut pass = pass.clone();
        if let Mistake::Op(spoil) = self.mistake {
            pass.ops.retain_mut(spoil);
        }
        self.inner.compile(&pass, buffers)
    }

    fn join(&mut self, passes: &[PassId]) -> Result<PassId> {
        self.inner.join(passes)
    }

    fn run(&mut self, pass: PassId, extent: Extent) -> Result<()> {
        self.inner.run(pass, extent)
    }
}

/// What a test bed fills buffers with before anything is written.
fn is_poison(words: &[u32]) -> bool {
    words.iter().all(|&word| word == POISON)
}

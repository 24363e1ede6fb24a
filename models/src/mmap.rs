//! A file mapped read-only: the one `unsafe` of this crate.
//!
//! What must hold: nobody rewrites a checkpoint in place while it is in use. Every tool that makes checkpoints writes
//! a new file (and renames it), which leaves a mapping of the old one intact. Where the rule is broken by cutting a
//! file short, the operating system ends the process with a signal; it never reads past the mapping.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::{Error, Result};

#[derive(Debug)]
pub struct MappedFile {
    pub path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> Result<Arc<MappedFile>> {
        let io_error = |source| Error::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io_error)?;
        // SAFETY: the map is private to this type, read-only, and unmapped only when its last owner drops it; that the
        // file keeps its bytes meanwhile is the rule stated at the top of this module.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error)?;
        Ok(Arc::new(MappedFile { path: path.to_path_buf(), map }))
    }

    /// Tells the system that these bytes are not needed soon, so that what was read once does not count as this
    /// process's memory. They can still be read: the pages come back from the file.
    #[cfg(unix)]
    #[allow(unsafe_code)]
    pub fn release(&self, range: Range<usize>) {
        // SAFETY: the map is a shared, never written mapping of a file, so a dropped page holds nothing but the file's
        // bytes and the next read of it, by whoever else holds this map, faults the same bytes in again.
        let released =
            unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        // Advice that the system does not take costs memory, not correctness.
        released.ok();
    }

    #[cfg(not(unix))]
    pub fn release(&self, _range: Range<usize>) {}

    pub fn malformed(&self, problem: impl Into<String>) -> Error {
        Error::Malformed { path: self.path.clone(), problem: problem.into() }
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

//! Compiled kernels, kept on disk between runs, so that a second start compiles nothing.
//!
//! A file's name is the hash of all that went into its kernel, its content the hash of the kernel and the kernel. It saves
//! time and nothing else: a file that is missing, damaged or not writable is ignored.

use std::fs;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use crate::cache_folder::replace;

pub(super) struct CubinCache {
    /// None where this system has no place for it.
    folder: Option<PathBuf>,
}

const HASH_BYTES: usize = 32;

impl CubinCache {
    pub fn new(folder: Option<PathBuf>) -> CubinCache {
        CubinCache { folder }
    }

    /// What was kept under these parts.
    pub fn get(&self, parts: &[&str]) -> Option<Vec<u8>> {
        let mut file = fs::read(self.path(parts)?).ok()?;
        let kernel = file.split_off(HASH_BYTES.min(file.len()));
        (file == Sha256::digest(&kernel)[..]).then_some(kernel)
    }

    pub fn put(&self, parts: &[&str], kernel: &[u8]) {
        let Some(path) = self.path(parts) else { return };
        // On a full disk or in a read-only home nothing is kept: the next start compiles again.
        drop(replace(&path, &[&Sha256::digest(kernel)[..], kernel].concat()));
    }

    fn path(&self, parts: &[&str]) -> Option<PathBuf> {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Some(self.folder.as_ref()?.join(name).with_extension("cubin"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_tells_kernels_apart() {
        let root = tempfile::tempdir().unwrap();
        let cache = CubinCache::new(Some(root.path().join("cubins")));
        assert_eq!(cache.get(&["source", "sm_90a"]), None);
        cache.put(&["source", "sm_90a"], b"for 9.0");
        cache.put(&["source", "sm_80"], b"for 8.0");
        assert_eq!(cache.get(&["source", "sm_90a"]).as_deref(), Some(&b"for 9.0"[..]));
        assert_eq!(cache.get(&["source", "sm_80"]).as_deref(), Some(&b"for 8.0"[..]));
        assert_eq!(cache.get(&["sourcesm_", "80"]), None);
    }

    #[test]
    fn damaged_files_and_places_without_files_are_ignored() {
        let root = tempfile::tempdir().unwrap();
        let cache = CubinCache::new(Some(root.path().into()));
        let parts = ["source"];
        let path = cache.path(&parts).unwrap();
        cache.put(&parts, b"kernel");
        let whole = fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() - 1], &whole[..5], b""] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(cache.get(&parts), None);
        }
        cache.put(&parts, b"kernel");
        assert_eq!(cache.get(&parts).as_deref(), Some(&b"kernel"[..]), "it is replaced");

        let nowhere = CubinCache::new(None);
        nowhere.put(&parts, b"kernel");
        assert_eq!(nowhere.get(&parts), None);
        let below_a_file = CubinCache::new(Some(path.join("below")));
        below_a_file.put(&parts, b"kernel");
        assert_eq!(below_a_file.get(&parts), None);
    }
}

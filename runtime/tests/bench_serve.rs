//! `treespark bench-serve` against a server made up here, which fails where a prompt tells it to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

/// Tokens of every whole answer.
const TOKENS: usize = 6;

/// Answers on a port of its own until the test ends, a thread a connection, and keeps the bodies that it was sent.
struct FakeServer {
    url: String,
    bodies: Arc<Mutex<Vec<Value>>>,
}

impl FakeServer {
    fn start() -> FakeServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let kept = bodies.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let kept = kept.clone();
                // A client that was ended does not read its answer.
                std::thread::spawn(move || stream.and_then(|stream| serve(stream, &kept)));
            }
        });
        FakeServer { url, bodies }
    }

    /// What it was asked so far, by the warm-up too.
    fn bodies(&self) -> Vec<Value> {
        std::mem::take(&mut self.bodies.lock().unwrap())
    }
}

/// One request, one answer: the end of the connection is the end of the body.
fn serve(stream: TcpStream, bodies: &Mutex<Vec<Value>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut request, mut length) = (String::new(), 0);
    reader.read_line(&mut request)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    if request.starts_with("GET /v1/models") {
        return answer(stream, "200 OK", "application/json", &[json!({ "data": [{ "id": "fake" }] }).to_string()]);
    }
    let body: Value = serde_json::from_slice(&body).unwrap();
    bodies.lock().unwrap().push(body.clone());
    if request.starts_with("POST /v1/completions") {
        let text = |text: &str| json!({ "choices": [{ "text": text }] });
        return answer(stream, "200 OK", "text/event-stream", &events(&[text("a"), text("b")], true));
    }
    let prompt = body["messages"][0]["content"].as_str().unwrap();
    match prompt {
        "fail" => answer(stream, "503 Service Unavailable", "text/plain", &["no room".to_string()]),
        "page" => answer(stream, "200 OK", "text/html", &["<p>welcome".to_string()]),
        "garbage" => answer(stream, "200 OK", "text/event-stream", &["data: {\"choices\": [\n\n".to_string()]),
        "break" => answer(stream, "200 OK", "text/event-stream", &events(&chunks(&body)[..2], false)),
        "no usage" => {
            let mut chunks = chunks(&body);
            chunks.pop();
            answer(stream, "200 OK", "text/event-stream", &events(&chunks, true))
        }
        _ => answer(stream, "200 OK", "text/event-stream", &events(&chunks(&body), true)),
    }
}

/// With `fixed:1`, two tokens a chunk.
fn chunks(body: &Value) -> Vec<Value> {
    let (pieces, accepted) = if body["speculation"] == "fixed:1" { (TOKENS / 2, TOKENS / 2) } else { (TOKENS, 0) };
    let chunk = |delta: Value, reason: Value| json!({ "choices": [{ "delta": delta, "finish_reason": reason }] });
    let mut chunks = vec![chunk(json!({ "role": "assistant", "content": "" }), Value::Null)];
    chunks.extend((0..pieces).map(|_| chunk(json!({ "content": "word " }), Value::Null)));
    chunks.push(chunk(json!({}), json!("length")));
    let details = json!({ "accepted_prediction_tokens": accepted, "rejected_prediction_tokens": 1 });
    let usage = json!({ "prompt_tokens": 4, "completion_tokens": TOKENS, "completion_tokens_details": details });
    chunks.push(json!({ "choices": [], "usage": usage }));
    chunks
}

fn events(chunks: &[Value], done: bool) -> Vec<String> {
    let done = done.then(|| "data: [DONE]\n\n".to_string());
    chunks.iter().map(|chunk| format!("data: {chunk}\n\n")).chain(done).collect()
}

/// The parts go out one by one, with a known wait before each.
fn answer(mut stream: TcpStream, status: &str, kind: &str, parts: &[String]) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n")?;
    for part in parts {
        std::thread::sleep(Duration::from_millis(2));
        stream.write_all(part.as_bytes())?;
    }
    Ok(())
}

/// A set of these prompts, in a folder of its own.
struct Prompts(tempfile::TempDir);

impl Prompts {
    fn of(prompts: &[&str]) -> Prompts {
        let folder = tempfile::tempdir().unwrap();
        let lines = prompts.iter().map(|prompt| json!({ "turns": [prompt] }).to_string() + "\n");
        std::fs::write(folder.path().join("set.jsonl"), lines.collect::<String>()).unwrap();
        Prompts(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn bench(&self, url: &str, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_treespark"));
        command.args(["bench-serve", "--url", url, "--prompts"]).arg(self.path("set.jsonl"));
        command.args(more).output().unwrap()
    }

    /// The tables of a run that must succeed, and what it wrote.
    fn measured(&self, url: &str, more: &[&str]) -> (String, Value) {
        let json = self.path("points.json");
        let out = self.bench(url, &[more, &["--json", json.to_str().unwrap()]].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        (String::from_utf8(out.stdout).unwrap(), serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap())
    }

    /// The message of a run that must fail.
    fn refused(&self, url: &str, more: &[&str]) -> String {
        let out = self.bench(url, more);
        let message = String::from_utf8(out.stderr).unwrap();
        assert!(!out.status.success() && out.status.code() != Some(101), "{message}");
        message
    }
}

#[test]
fn policies_meet_the_same_requests_and_failures_are_counted() {
    let server = FakeServer::start();
    let prompts = Prompts::of(&["a", "b", "c", "fail", "d", "break", "garbage", "page", "no usage", "e"]);
    let svg = prompts.path("frontier.svg");
    let asked = ["--policy", "off,fixed:1", "--streams", "1,3", "--requests", "20", "--warmup", "0", "-n", "6"];
    let more = ["--ignore-eos", "--api-key", "secret", "--svg", svg.to_str().unwrap()];
    let (table, json) = prompts.measured(&server.url, &[&asked[..], &more].concat());

    assert_eq!(
        (&json["model"], &json["partial"], &json["treespark"]),
        (&json!("fake"), &json!(false), &json!("0.1.0"))
    );
    assert!(!json.to_string().contains("secret"), "{json}");
    let points = json["points"].as_array().unwrap();
    let names: Vec<String> =
        points.iter().map(|point| format!("{} {}", point["load"]["streams"], point["policy"])).collect();
    assert_eq!(names, ["1 \"off\"", "1 \"fixed:1\"", "3 \"off\"", "3 \"fixed:1\""]);
    for point in points {
        let number = |name: &str| point[name].as_f64().unwrap_or_else(|| panic!("no {name} in {point}"));
        let fixed = point["policy"] == "fixed:1";
        assert_eq!((number("requests"), number("failed"), number("guessed")), (20.0, 8.0, 2.0), "{point}");
        let failures = [("HTTP 503", 2), ("broken stream", 2), ("malformed stream", 4)];
        failures.iter().for_each(|(kind, count)| assert_eq!(point["failures"][kind]["requests"], *count, "{point}"));
        // Without a usage, chunks are counted: half as many of two tokens each.
        let tokens = 10 * TOKENS + 2 * if fixed { TOKENS / 2 } else { TOKENS };
        assert_eq!((number("tokens"), number("prompt_tokens")), (tokens as f64, 40.0));
        assert_eq!(number("accepted_per_request"), if fixed { 3.0 } else { 0.0 });
        assert!(number("tokens_per_second") > 0.0 && number("requests_per_second") > 0.0);
        let percentiles = ["p50", "p90", "p99"].map(|part| point["ttft_ms"][part].as_f64().unwrap());
        assert!(percentiles[0] >= 2.0 && percentiles.is_sorted(), "{point}");
        assert!(point["e2e_ms"]["p50"].as_f64() > point["ttft_ms"]["p50"].as_f64());
        let user = ["mean", "p10"].map(|name| point["user_tokens_per_second"][name].as_f64().unwrap());
        // One answer that stalls may draw the mean below the tenth percentile.
        assert!(user.iter().all(|&speed| 0.0 < speed && speed.is_finite()), "{point}");
        let ratio = &point["times_first_policy"]["tokens_per_second"];
        assert_eq!(ratio.is_f64(), fixed, "{point}");
    }

    let lines = |start: &str| table.lines().filter(|line| line.starts_with(start)).count();
    assert_eq!((lines("load "), lines("1 stream   "), lines("3 streams  ")), (2, 4, 4), "{table}");
    for words in ["3 streams, off: 2 failed: HTTP 503 (no room)", "got text/html", "2 without a usage", "frontier"] {
        assert!(table.contains(words), "no '{words}' in: {table}");
    }
    let svg = std::fs::read_to_string(svg).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("fixed:1"), "{svg}");

    let bodies = server.bodies();
    let asked = |policy: &str| {
        let of = bodies.iter().filter(|body| body["speculation"] == policy);
        let mut asked: Vec<String> = of.map(|body| format!("{} {}", body["messages"], body["seed"])).collect();
        asked.sort();
        asked
    };
    assert_eq!((bodies.len(), asked("off")), (80, asked("fixed:1")));
    assert!(bodies.iter().all(|body| body["ignore_eos"] == true && body["max_tokens"] == 6 && body["stream"] == true));
}

#[test]
fn open_loads_send_what_their_times_say() {
    let server = FakeServer::start();
    let prompts = Prompts::of(&["a", "b", "c"]);
    let (table, json) = prompts.measured(&server.url, &["--rate", "200", "--requests", "30", "--warmup", "2"]);
    let point = &json["points"][0];
    assert_eq!((&point["requests"], &point["failed"]), (&json!(30), &json!(0)), "{json}");
    assert_eq!((&point["policy"], &point["load"]), (&Value::Null, &json!({ "requests_per_second": 200.0 })));
    assert!(table.contains("200 requests/s") && !table.contains("ratio"), "{table}");
    let bodies = server.bodies();
    assert_eq!(bodies.iter().filter(|body| body["max_tokens"] == 32).count(), 2, "the warm-up");
    assert!(bodies.len() == 32 && bodies.iter().all(|body| body.get("speculation").is_none()));
}

#[test]
fn a_run_may_end_by_time_and_complete_raw_prompts() {
    let server = FakeServer::start();
    let prompts = Prompts::of(&["a", "b", "c"]);
    let (table, json) = prompts.measured(&server.url, &["--raw", "--streams", "2", "--duration", "200ms"]);
    let requests = json["points"][0]["requests"].as_u64().unwrap();
    assert_eq!((requests > 0, &json["points"][0]["guessed"]), (true, &json!(requests)), "{json}");
    assert!(table.contains("each chunk is counted as one token"), "{table}");
    assert!(server.bodies().iter().all(|body| body["prompt"].is_string()));
}

#[test]
fn servers_that_are_none() {
    let prompts = Prompts::of(&["fail"]);
    let closed = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let message = prompts.refused(&closed, &[]);
    assert!(message.contains(&closed) && message.contains("treespark serve"), "{message}");
    assert!(prompts.refused("https://127.0.0.1:1", &[]).contains("http alone"));
    assert!(prompts.refused("localhost:8080", &[]).contains("expected http://HOST:PORT"));
    assert!(prompts.refused("http://127.0.0.1:1", &["--svg", "no/such/folder/a.svg"]).contains("no/such/folder"));

    let server = FakeServer::start();
    let message = prompts.refused(&server.url, &["--streams", "1", "--requests", "2", "--warmup", "0"]);
    assert!(message.contains("no request succeeded"), "{message}");
}

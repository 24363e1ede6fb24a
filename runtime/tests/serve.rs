//! The server over HTTP: every endpoint, every error, and the very texts that the library generates.

mod whole_model;

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::broadcast::error::TryRecvError;
use tokio::sync::oneshot;
use treespark::devices::BackendChoice;
use treespark::server::{Server, ServerOptions};
use treespark::serving::{Service, ServiceOptions};
use treespark::{DrafterChoice, FinishReason, GenerateOptions, Llm, LlmOptions, Many, Message, Sampling};
use whole_model::whole_model;

/// Long enough that an answer takes far longer than a client takes to leave.
const CONTEXT: usize = 8192;
const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// The whole model, with a longer context.
fn model() -> tempfile::TempDir {
    let folder = whole_model();
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["max_position_embeddings"] = CONTEXT.into();
    std::fs::write(path, config.to_string()).unwrap();
    folder
}

fn load(model: &Path, drafter: DrafterChoice) -> Llm {
    let (model, context) = (model.to_str().unwrap().to_string(), Some(CONTEXT));
    let many = Some(Many { max_requests: Some(4), cache_tokens: None });
    let backend = BackendChoice::Cpu;
    Llm::load(&LlmOptions { model, drafter, context, backend, many, ..LlmOptions::default() }).unwrap()
}

/// A server of its own for a test.
struct Running {
    address: SocketAddr,
    service: Service,
    model: tempfile::TempDir,
    agent: ureq::Agent,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Running {
    fn start(options: ServerOptions, drafter: DrafterChoice) -> Running {
        Running::over(model(), options, drafter)
    }

    fn over(model: tempfile::TempDir, options: ServerOptions, drafter: DrafterChoice) -> Running {
        let path = model.path().to_path_buf();
        let service = Service::start(move || Ok(load(&path, drafter)), ServiceOptions::default()).unwrap();
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        let server = Server::new(service.clone(), options);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                server.run(listener, async { drop(stopped.await) }, Duration::from_secs(20)).await
            })
        });
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let address = told.recv().unwrap();
        Running { address, service, model, agent, stop: Some(stop), thread: Some(thread) }
    }

    fn plain() -> Running {
        Running::start(ServerOptions { model_name: "tiny".into(), ..ServerOptions::default() }, DrafterChoice::Ngram)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn get(&self, path: &str) -> (u16, String) {
        let mut response = self.agent.get(self.url(path)).call().unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    fn send(&self, path: &str, body: &str) -> (u16, Value) {
        let mut response = self.agent.post(self.url(path)).send(body).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (response.status().as_u16(), serde_json::from_str(&text).unwrap_or_else(|_| panic!("{body}: {text}")))
    }

    fn ask(&self, path: &str, body: &Value) -> Value {
        let (status, value) = self.send(path, &body.to_string());
        assert_eq!(status, 200, "{body}: {value}");
        value
    }

    /// A stream's chunks; they must end in `[DONE]`.
    fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut data: Vec<String> = self.lines(path, body).collect();
        assert_eq!(data.pop().as_deref(), Some("[DONE]"), "{data:?}");
        data.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
    }

    /// What a stream says, line by line.
    fn lines(&self, path: &str, body: &Value) -> impl Iterator<Item = String> + use<> {
        let body = with(body, "stream", json!(true));
        let response = self.agent.post(self.url(path)).send(body.to_string()).unwrap();
        let kind = response.headers()["content-type"].to_str().unwrap();
        assert_eq!((response.status().as_u16(), kind), (200, "text/event-stream"));
        let lines = BufReader::new(response.into_body().into_reader()).lines().map(Result::unwrap);
        lines.filter_map(|line| Some(line.strip_prefix("data: ")?.to_string()))
    }

    fn stop(&mut self) -> std::io::Result<()> {
        let _ = self.stop.take().unwrap().send(());
        self.thread.take().unwrap().join().unwrap()
    }
}

fn with(body: &Value, field: &str, value: Value) -> Value {
    let mut body = body.clone();
    body[field] = value;
    body
}

/// Text and end of one of a stream's answers, put together.
fn joined(chunks: &[Value], index: usize) -> (String, String) {
    let (mut text, mut reason) = (String::new(), String::new());
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        if choice["index"] == index {
            assert!(reason.is_empty(), "{choice} behind the end");
            text += choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            reason += choice["finish_reason"].as_str().unwrap_or_default();
        }
    }
    (text, reason)
}

/// Text and end of one of a whole response's answers.
fn whole(response: &Value, index: usize) -> (String, String) {
    let choice = &response["choices"][index];
    assert_eq!(choice["index"], index);
    let text = choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap();
    (text.to_string(), choice["finish_reason"].as_str().unwrap().to_string())
}

/// What the library generates: text, end and number of tokens.
fn generated(llm: &mut Llm, prompt: Vec<u32>, options: &GenerateOptions) -> ((String, String), usize) {
    let mut generation = llm.generate(prompt, options).unwrap();
    let text: String = (&mut generation).map(|step| step.unwrap().text).collect();
    let reason = match generation.finish_reason().unwrap() {
        FinishReason::Length | FinishReason::Context => "length",
        _ => "stop",
    };
    ((text, reason.to_string()), generation.tokens().len())
}

#[test]
fn streams_and_whole_answers_are_what_the_library_generates() {
    let running = Running::plain();
    let mut llm = load(running.model.path(), DrafterChoice::None);
    let text = "abc abc abc";
    let messages = json!([{"role": "user", "content": text}]);
    let mut ends = Vec::new();
    for seed in 0..6u64 {
        for (stop, temperature) in [(vec![], 1.0), (vec!["e", "Q7"], 0.9), (vec![], 0.0)] {
            let sampling = Sampling { temperature, top_p: 0.95, seed, ..Sampling::default() };
            let stop: Vec<String> = stop.into_iter().map(String::from).collect();
            let options = GenerateOptions { sampling, max_new_tokens: 60, stop: stop.clone(), grammar: None };
            let body = json!({
                "model": "tiny", "temperature": temperature, "top_p": 0.95, "seed": seed, "max_tokens": 60, "stop": stop,
                "stream_options": {"include_usage": true},
            });
            let prompts = [
                (CHAT, with(&body, "messages", messages.clone()), llm.chat_prompt(&[Message::user(text)]).unwrap()),
                (COMPLETIONS, with(&body, "prompt", json!(text)), llm.text_prompt(text).unwrap()),
            ];
            for (path, body, prompt) in prompts {
                let prompt_tokens = prompt.len();
                let (expected, tokens) = generated(&mut llm, prompt, &options);
                let response = running.ask(path, &body);
                assert_eq!(whole(&response, 0), expected, "{body}");
                let mut chunks = running.stream(path, &body);
                assert_eq!(joined(&chunks, 0), expected, "{body}");
                let last = chunks.pop().unwrap();
                assert_eq!(last["choices"], json!([]));
                for usage in [&response["usage"], &last["usage"]] {
                    let counts =
                        ["prompt_tokens", "completion_tokens", "total_tokens"].map(|name| usage[name].as_u64());
                    let expected = [prompt_tokens, tokens, prompt_tokens + tokens].map(|count| Some(count as u64));
                    assert_eq!(counts, expected, "{body}");
                }
                assert!(chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk["seed"] == seed), "{chunks:?}");
                ends.push(expected.1);
            }
        }
    }
    assert!(ends.contains(&"stop".to_string()) && ends.contains(&"length".to_string()), "{ends:?}");
}

#[test]
fn samples_of_one_request_differ_and_are_the_librarys() {
    let running = Running::plain();
    let mut llm = load(running.model.path(), DrafterChoice::None);
    let body = json!({"prompt": ["abc", "xyz"], "n": 3, "seed": 5, "max_tokens": 20});
    let (response, chunks) = (running.ask(COMPLETIONS, &body), running.stream(COMPLETIONS, &body));
    let mut texts = Vec::new();
    for (prompt, text) in ["abc", "xyz"].into_iter().enumerate() {
        for sample in 0..3 {
            let index = 3 * prompt + sample;
            let sampling = Sampling { temperature: 1.0, seed: 5, sample: sample as u32, ..Sampling::default() };
            let options = GenerateOptions { sampling, max_new_tokens: 20, ..GenerateOptions::default() };
            let tokens = llm.text_prompt(text).unwrap();
            let (expected, _) = generated(&mut llm, tokens, &options);
            assert_eq!((&whole(&response, index), &joined(&chunks, index)), (&expected, &expected));
            texts.push(expected.0);
        }
    }
    assert_eq!(response["usage"]["prompt_tokens"], 6, "a prompt counts once, however many samples it has");
    texts.sort();
    texts.dedup();
    assert_eq!(texts.len(), 6, "{texts:?}");
}

#[test]
fn prompts_are_texts_or_tokens() {
    let running = Running::plain();
    let tokens = load(running.model.path(), DrafterChoice::None).text_prompt("abc").unwrap();
    let text = |prompt: Value| {
        let body = json!({"prompt": prompt, "seed": 1});
        whole(&running.ask(COMPLETIONS, &body), 0)
    };
    let expected = text(json!("abc"));
    assert_eq!(expected.1, "length", "16 tokens unless more are wanted");
    assert_eq!(text(json!(["abc"])), expected);
    assert_eq!(text(json!(tokens)), expected);
    assert_eq!(text(json!([tokens])), expected);
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "abc"}]}]);
    let chat = json!({"messages": parts, "seed": 1, "max_completion_tokens": 16});
    assert_eq!(whole(&running.ask(CHAT, &chat), 0), expected);
}

#[test]
fn a_seed_is_chosen_and_told_where_none_is_given() {
    let running = Running::plain();
    let body = json!({"prompt": "abc", "max_tokens": 30, "ignore_eos": true, "speculation": "off"});
    let (one, other) = (running.ask(COMPLETIONS, &body), running.ask(COMPLETIONS, &body));
    assert_ne!(one["seed"], other["seed"]);
    assert_ne!(one["id"], other["id"]);
    assert_eq!(one["usage"]["completion_tokens"], 30);
    let again = running.ask(COMPLETIONS, &with(&body, "seed", one["seed"].clone()));
    assert_eq!(whole(&again, 0), whole(&one, 0));
}

#[test]
fn what_is_there_to_get() {
    let running = Running::plain();
    let parsed = |(status, text): (u16, String)| (status, serde_json::from_str::<Value>(&text).unwrap());
    assert_eq!(parsed(running.get("/health")), (200, json!({"status": "ok", "model": "tiny"})));
    let (_, list) = parsed(running.get("/v1/models"));
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("tiny")));
    assert_eq!(parsed(running.get("/v1/models/tiny")).1, list["data"][0]);
    assert_eq!(running.get("/").0, 200);

    running.ask(COMPLETIONS, &json!({"prompt": "abc"}));
    assert_eq!(running.get("/no/such/place").0, 404);
    let (status, metrics) = running.get("/metrics");
    assert_eq!(status, 200);
    for line in [
        "treespark_time_to_first_token_seconds_count 1",
        "treespark_answer_seconds_count 1",
        "treespark_http_requests_total{route=\"/v1/completions\",status=\"200\"} 1",
        "treespark_http_requests_total{route=\"other\",status=\"404\"} 1",
        "# TYPE treespark_running_requests gauge",
    ] {
        assert!(metrics.lines().any(|have| have == line), "no {line} in:\n{metrics}");
    }
}

#[test]
fn rounds_are_told_as_they_happen() {
    let running = Running::plain();
    let response = running.agent.get(running.url("/rounds")).call().unwrap();
    let mut lines = BufReader::new(response.into_body().into_reader()).lines().map(Result::unwrap);
    let mut event = |wanted: &str| -> Value {
        lines.find(|line| *line == format!("event: {wanted}")).expect("the event comes");
        serde_json::from_str(lines.next().unwrap().strip_prefix("data: ").unwrap()).unwrap()
    };
    let counters = event("counters");
    assert!(counters["running"].is_u64() && counters["seconds"].is_f64(), "{counters}");
    running.ask(COMPLETIONS, &json!({"prompt": "abc abc abc", "max_tokens": 50, "ignore_eos": true}));
    let round = event("round");
    let tree = &round["trees"][0];
    assert_eq!(tree["texts"].as_array().unwrap().len(), tree["tokens"].as_array().unwrap().len(), "{round}");
    assert!(tree["bonus_text"].is_string() && round["rows"].is_u64(), "{round}");
}

#[test]
fn what_is_wrong_is_said_as_openai_says_it() {
    let options = ServerOptions { model_name: "tiny".into(), max_body: 20_000, ..ServerOptions::default() };
    let running = Running::start(options, DrafterChoice::None);
    let refused = |path: &str, body: &str, status: u16, param: Option<&str>, words: &[&str]| {
        let (got, value) = running.send(path, body);
        let error = &value["error"];
        assert_eq!((got, error["param"].as_str()), (status, param), "{body:.200}: {value}");
        assert!(error["type"].is_string() && error.as_object().unwrap().contains_key("code"), "{value}");
        let message = error["message"].as_str().unwrap();
        assert!(words.iter().all(|word| message.contains(word)), "{body:.200}: {message}");
    };
    let user = json!([{"role": "user", "content": "abc"}]);
    let chat = |field: &str, value: Value, status, param: &str, words: &[&str]| {
        let body = with(&json!({ "messages": user }), field, value).to_string();
        refused(CHAT, &body, status, Some(param), words);
    };
    let completion = |field: &str, value: Value, param: &str, words: &[&str]| {
        let body = with(&json!({"prompt": "abc"}), field, value).to_string();
        refused(COMPLETIONS, &body, 400, Some(param), words);
    };

    for body in ["", "{", "not JSON", "{\"messages\": [", "\u{0}"] {
        refused(CHAT, body, 400, None, &["JSON"]);
    }
    refused(CHAT, "[1]", 400, None, &["object"]);
    refused(CHAT, "{}", 400, Some("messages"), &[]);
    refused(COMPLETIONS, "{}", 400, Some("prompt"), &[]);
    refused(COMPLETIONS, &json!({"prompt": "x".repeat(30_000)}).to_string(), 413, None, &["20000"]);

    chat("model", json!("gpt-5"), 404, "model", &["gpt-5", "tiny"]);
    chat("max_tokens", json!(0), 400, "max_tokens", &["0"]);
    chat("max_completion_tokens", json!(-1), 400, "max_completion_tokens", &["-1"]);
    chat("temperature", json!("hot"), 400, "temperature", &["hot"]);
    chat("temperature", json!(-0.5), 400, "temperature", &["-0.5"]);
    chat("top_p", json!(1.5), 400, "top_p", &[]);
    chat("presence_penalty", json!(1), 400, "presence_penalty", &["not supported"]);
    chat("response_format", json!({"type": "xml"}), 400, "response_format", &["xml", "json_object"]);
    chat("top_logprobs", json!(3), 400, "top_logprobs", &["logprobs"]);
    chat("tools", json!([{"type": "function"}]), 400, "tools", &["not supported"]);
    chat("speculation", json!("wild"), 400, "speculation", &["wild", "confidence"]);
    chat("n", json!(1000), 400, "n", &["1000"]);
    chat("messages", json!("abc"), 400, "messages", &[]);
    chat("messages", json!([{"role": "user", "content": ""}]), 400, "messages", &["empty"]);
    chat("messages", json!([{"role": "user", "content": "x".repeat(CONTEXT)}]), 400, "messages", &["8192 tokens"]);

    completion("prompt", json!("x".repeat(CONTEXT + 5)), "prompt", &["8197", "8192"]);
    completion("prompt", json!([]), "prompt", &[]);
    completion("prompt", json!([[]]), "prompt", &["empty"]);
    completion("prompt", json!([5, 168]), "prompt", &["168"]);
    completion("prompt", json!(vec!["a"; 1025]), "n", &["1025", "1024"]);
    completion("prompt", json!({"text": "abc"}), "prompt", &[]);
    completion("logprobs", json!(6), "logprobs", &["6"]);
    completion("echo", json!(true), "echo", &["not supported"]);

    // What is not there, and what is there for another method.
    refused("/v1/embeddings", "{}", 404, None, &["/v1/embeddings"]);
    refused("/health", "{}", 405, None, &["/health", "POST"]);
    assert_eq!(running.get(CHAT).0, 405);
    assert_eq!(running.get("/v1/models/other").0, 404);
    assert_eq!(running.get("/v1/models/org/name").0, 404);
    // After all that, it serves.
    running.ask(CHAT, &json!({"messages": user, "max_tokens": 2}));
}

#[test]
fn a_key_opens_all_but_the_health() {
    let options = ServerOptions { api_key: Some("secret".into()), ..ServerOptions::default() };
    let running = Running::start(options, DrafterChoice::None);
    assert_eq!((running.get("/health").0, running.get("/").0), (200, 200));
    for path in ["/v1/models", "/metrics", "/rounds"] {
        let (status, text) = running.get(path);
        assert!(status == 401 && text.contains("invalid_api_key"), "{path}: {status} {text}");
    }
    let with_key = |key: &str| {
        let request = running.agent.post(running.url(COMPLETIONS)).header("authorization", format!("Bearer {key}"));
        request.send(json!({"prompt": "abc"}).to_string()).unwrap().status().as_u16()
    };
    assert_eq!((with_key("secret"), with_key("wrong"), with_key("")), (200, 401, 401));
}

#[test]
fn a_page_of_the_named_origin_may_read() {
    let options = ServerOptions { cors: Some("http://localhost:3000".parse().unwrap()), ..ServerOptions::default() };
    let running = Running::start(options, DrafterChoice::None);
    let preflight = running.agent.options(running.url(CHAT)).call().unwrap();
    let get = running.agent.get(running.url("/health")).call().unwrap();
    assert_eq!((preflight.status().as_u16(), get.status().as_u16()), (204, 200));
    for response in [preflight, get] {
        assert_eq!(response.headers()["access-control-allow-origin"], "http://localhost:3000");
    }
}

/// How many rounds there are until there are none for a while.
fn rounds_until_quiet(
    rounds: &mut tokio::sync::broadcast::Receiver<std::sync::Arc<treespark::serving::RoundView>>,
) -> u64 {
    let (mut count, mut last) = (0, Instant::now());
    while last.elapsed() < Duration::from_millis(500) {
        match rounds.try_recv() {
            Ok(_) => count += 1,
            Err(TryRecvError::Lagged(missed)) => count += missed,
            Err(_) => {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
        }
        last = Instant::now();
    }
    count
}

#[test]
fn whoever_hangs_up_stops_the_answer() {
    let running = Running::start(ServerOptions::default(), DrafterChoice::None);
    let mut rounds = running.service.watch();
    let body = json!({"prompt": "abc", "max_tokens": CONTEXT, "ignore_eos": true});
    for stream in [true, false] {
        let body = with(&body, "stream", json!(stream)).to_string();
        let mut client = TcpStream::connect(running.address).unwrap();
        let length = body.len();
        write!(client, "POST {COMPLETIONS} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
        while rounds.try_recv().is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(client);
        let count = rounds_until_quiet(&mut rounds);
        assert!(count < CONTEXT as u64 * 3 / 4, "{count} rounds, stream: {stream}");
    }
    running.ask(COMPLETIONS, &json!({"prompt": "abc"}));
}

#[test]
fn a_server_that_stops_ends_what_it_began() {
    let mut running = Running::start(ServerOptions::default(), DrafterChoice::None);
    let body = json!({"prompt": "abc", "max_tokens": 1500, "ignore_eos": true});
    let answer = running.lines(COMPLETIONS, &body);
    let watcher = running.agent.get(running.url("/rounds")).call().unwrap();
    let reader = std::thread::spawn(move || answer.last().unwrap());
    let start = Instant::now();
    running.stop().unwrap();
    assert_eq!(reader.join().unwrap(), "[DONE]");
    assert!(start.elapsed() < Duration::from_secs(15), "who only watches is not waited for");
    drop(watcher);
    assert!(TcpStream::connect(running.address).is_err(), "nobody listens");
}

#[test]
fn a_draining_service_takes_nothing_more() {
    let running = Running::plain();
    running.service.drain();
    let (status, error) = running.send(COMPLETIONS, &json!({"prompt": "abc"}).to_string());
    assert_eq!((status, &error["error"]["type"]), (503, &json!("server_error")), "{error}");
    let (status, _) =
        running.send(CHAT, &json!({"messages": [{"role": "user", "content": "a"}], "stream": true}).to_string());
    assert_eq!(status, 503, "refused before a stream begins");
}

#[test]
fn a_failure_is_an_error_and_the_last_event_of_a_stream() {
    // The file ends in F32 weights: the last tensor is no number.
    let broken = || {
        let model = model();
        let path = model.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let from = bytes.len() - 256;
        bytes[from..].chunks_exact_mut(4).for_each(|value| value.copy_from_slice(&f32::NAN.to_le_bytes()));
        std::fs::write(path, bytes).unwrap();
        Running::over(model, ServerOptions::default(), DrafterChoice::None)
    };
    let body = json!({"messages": [{"role": "user", "content": "abc"}]});
    let (status, error) = broken().send(CHAT, &body.to_string());
    assert_eq!((status, &error["error"]["type"]), (500, &json!("server_error")), "{error}");
    let running = broken();
    let last: Value = serde_json::from_str(&running.lines(CHAT, &body).last().unwrap()).unwrap();
    assert_eq!(last["error"]["type"], "server_error", "{last}");
}

#[test]
fn many_clients_get_each_its_own_answer() {
    let running = Running::plain();
    let bodies: Vec<Value> =
        (0..8).map(|seed| json!({"prompt": format!("abc {seed}"), "seed": seed, "max_tokens": 40})).collect();
    let alone: Vec<_> = bodies.iter().map(|body| whole(&running.ask(COMPLETIONS, body), 0)).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> =
            bodies.iter().map(|body| scope.spawn(|| joined(&running.stream(COMPLETIONS, body), 0))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(together, alone);
}

//! The command line on bad input: a clear message on standard error, exit code other than 0, and no panic.

mod whole_model;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use whole_model::{tiny_llama, whole_model};

/// Runs `treespark`, with this standard input, on the CPU backend unless the arguments say otherwise.
fn treespark(args: &[&str], stdin: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_treespark"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The program may refuse its arguments before it reads anything.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

/// Expects failure, nothing on standard output, and all of these words in the message.
fn refused(args: &[&str], stdin: &[u8], words: &[&str]) {
    let out = treespark(args, stdin);
    let message = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success(), "{args:?} succeeded");
    assert!(out.stdout.is_empty(), "{args:?} wrote to standard output");
    assert!(!message.contains("panicked") && out.status.code() != Some(101), "{args:?} panicked: {message}");
    for word in words {
        assert!(message.contains(word), "{args:?}: no '{word}' in: {message}");
    }
}

/// The whole model with one of its files changed.
fn changed(name: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let folder = whole_model();
    let path = folder.path().join(name);
    let bytes = change(std::fs::read(&path).unwrap());
    std::fs::write(&path, bytes).unwrap();
    folder
}

fn generate<'a>(model: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["generate", "--backend", "cpu", "--model", model.to_str().unwrap()];
    args.extend(more);
    args
}

#[test]
fn models_that_cannot_be_loaded() {
    refused(&generate(Path::new("no/such/model"), &["-p", "x"]), b"", &["no/such/model"]);
    refused(&["generate", "-p", "x", "--model", "no-such-name"], b"", &["no-such-name", "smollm2-135m-instruct"]);
    refused(&["generate", "-p", "x", "--model", "someone/absent-model"], b"", &["hf download someone/absent-model"]);

    let truncated = changed("model.safetensors", |bytes| bytes[..bytes.len() / 2].to_vec());
    refused(&generate(truncated.path(), &["-p", "x"]), b"", &["model.safetensors"]);
    let gguf = truncated.path().join("broken.gguf");
    std::fs::write(&gguf, b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff").unwrap();
    refused(&generate(&gguf, &["-p", "x"]), b"", &["broken.gguf"]);
    // A whole checkpoint that lacks its tokenizer.
    refused(&generate(&tiny_llama(), &["-p", "x"]), b"", &["tokenizer"]);
    let wrong_shape =
        changed("config.json", |json| replace(&json, "\"intermediate_size\": 136", "\"intermediate_size\": 128"));
    refused(&generate(wrong_shape.path(), &["-p", "x"]), b"", &["mlp", "136", "128"]);
    let unknown = changed("config.json", |json| replace(&json, "LlamaForCausalLM", "GremlinForCausalLM"));
    refused(&generate(unknown.path(), &["-p", "x"]), b"", &["GremlinForCausalLM", "LlamaForCausalLM"]);
}

fn replace(text: &[u8], from: &str, to: &str) -> Vec<u8> {
    let text = std::str::from_utf8(text).unwrap();
    assert!(text.contains(from), "no {from} in: {text}");
    text.replace(from, to).into_bytes()
}

#[test]
fn weights_that_are_no_numbers() {
    // The file ends in F32 weights: the last tensor becomes NaN.
    let nan = changed("model.safetensors", |mut bytes| {
        let len = bytes.len();
        bytes[len - 256..].chunks_exact_mut(4).for_each(|value| value.copy_from_slice(&f32::NAN.to_le_bytes()));
        bytes
    });
    refused(&generate(nan.path(), &["-p", "x"]), b"", &["NaN"]);
}

#[test]
fn a_draft_model_with_another_tokenizer() {
    let target = whole_model();
    let other = changed("tokenizer.json", |json| replace(&json, "\"a\":64,\"b\":65", "\"a\":65,\"b\":64"));
    let drafter = format!("model:{}", other.path().display());
    refused(&generate(target.path(), &["-p", "x", "--drafter", &drafter]), b"", &["token"]);
}

#[test]
fn prompts_longer_than_the_context() {
    let model = whole_model();
    refused(&generate(model.path(), &["--context", "16", "-p", &"x".repeat(16)]), b"", &["17", "16"]);
    refused(&generate(model.path(), &["--context", "1000000", "-p", "x"]), b"", &["context"]);
}

/// Standard output of a run that must succeed.
fn generated(args: &[&str]) -> String {
    let out = treespark(args, b"");
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn a_generation_is_the_same_with_any_drafter_and_ends_where_asked() {
    let model = whole_model();
    let run = |more: &[&str]| generated(&generate(model.path(), &[&["-p", "abc abc abc", "-n", "40"], more].concat()));
    let plain = run(&["--drafter", "none"]);
    assert!(plain.len() >= 20, "{plain:?}");
    assert_eq!(run(&["--drafter", "ngram"]), plain);
    assert_eq!(run(&["--drafter", "ngram", "--tree", "4x2"]), plain);
    let itself = format!("model:{}", model.path().display());
    assert_eq!(run(&["--drafter", &itself, "--show-tree"]), plain);
    assert_eq!(run(&["--raw"]), plain, "the template adds nothing");

    // A stop string ends the text before it, wherever it lies in an accepted run.
    let stop: String = plain.chars().skip(7).take(3).collect();
    let before = &plain[..plain.find(&stop).unwrap()];
    assert_eq!(run(&["--drafter", &itself, "--stop", &stop]).trim_end_matches('\n'), before.trim_end_matches('\n'));

    let sampled = run(&["--drafter", "none", "--temperature", "1", "--seed", "3"]);
    assert_eq!(run(&["--drafter", &itself, "--temperature", "1", "--seed", "3"]), sampled);
    assert_ne!(run(&["--drafter", "none", "--temperature", "1", "--seed", "4"]), sampled);
}

#[test]
fn statistics_are_json_on_standard_error() {
    let model = whole_model();
    let out = treespark(&generate(model.path(), &["-p", "abc", "-n", "4", "--stats=json"]), b"");
    let text = String::from_utf8(out.stderr).unwrap();
    let line = text.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("no JSON in {text}"));
    let stats: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!((stats["new_tokens"].as_u64(), stats["finish_reason"].as_str()), (Some(4), Some("length")), "{line}");
    assert!(stats["tokens_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn chat_answers_line_by_line() {
    let model = whole_model();
    let args = ["chat", "--backend", "cpu", "-n", "5", "--model", model.path().to_str().unwrap()];
    let out = treespark(&args, b"abc\n\n/clear\nabc\n/exit\nnever read\n");
    let text = String::from_utf8(out.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(out.status.success() && lines.len() >= 2, "{text}");
    assert_eq!(lines[..lines.len() / 2], lines[lines.len() / 2..], "a cleared conversation answers alike");
}

/// Arguments of an evaluation of the whole model over a file of these lines, on the CPU.
fn eval<'a>(model: &'a Path, prompts: &'a Path, lines: &str, more: &[&'a str]) -> Vec<&'a str> {
    std::fs::write(prompts, lines).unwrap();
    let (model, prompts) = (model.to_str().unwrap(), prompts.to_str().unwrap());
    let mut args = vec!["eval", "--backend", "cpu", "--model", model, "--prompts", prompts, "-n", "24"];
    args.extend(more);
    args
}

#[test]
fn an_evaluation_measures_each_with_each_and_loses_nothing() {
    let model = whole_model();
    let [prompts, json, other] = ["two.jsonl", "report.json", "other.json"].map(|name| model.path().join(name));
    std::fs::write(&other, "{\"source\": \"a paper\", \"tokens_per_round\": {\"two\": 1.5}, \"drafter\": \"ngram\"}")
        .unwrap();
    let lines = "{\"turns\": [\"abc abc abc\", \"abd\"]}\n{\"turns\": [\"xyz\"]}\n";
    let (json_text, other) = (json.to_str().unwrap(), other.to_str().unwrap());
    let more = ["--drafter", "none,ngram", "--budget", "4,16", "--temperature", "0,1", "--turns", "all"];
    let files = ["--json", json_text, "--compare", other];
    let table = generated(&eval(model.path(), &prompts, lines, &[&more[..], &files].concat()));
    let count = |start: &str| table.lines().filter(|line| line.starts_with(start)).count();
    assert_eq!((count("set "), count("two "), count("mean over sets "), count("lowest of ")), (1, 6, 6, 4), "{table}");
    assert!(table.contains("reference: tokens per round by a paper") && !table.contains("partial"), "{table}");

    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!((report["partial"].as_bool(), report["treespark"].as_str()), (Some(false), Some("0.1.0")), "{report}");
    assert!(report["backend"].as_str().is_some_and(|name| !name.is_empty()), "{report}");
    let results = report["results"].as_array().unwrap();
    let setups: Vec<_> =
        results.iter().map(|r| (r["drafter"].as_str().unwrap(), r["budget"].as_str().unwrap())).collect();
    assert_eq!(setups, [[("none", "-"), ("ngram", "4"), ("ngram", "16")]; 2].concat());
    for result in &results[..] {
        let number = |name: &str| result[name].as_f64().unwrap_or_else(|| panic!("no {name} in {result}"));
        assert_eq!((number("prompts"), number("tokens")), (2.0, results[0]["tokens"].as_f64().unwrap()), "{result}");
        assert!(number("tokens_per_second") > 0.0 && number("tokens_per_round") >= 1.0);
        if result["drafter"] == "ngram" {
            assert_eq!((number("different_prompts"), &result["plain"]["tokens"]), (0.0, &result["tokens"]));
            assert!(
                (number("times_plain") * number("plain_tokens_per_second") / number("tokens_per_second") - 1.0).abs()
                    < 1e-9
            );
            let greedy = result["temperature"] == 0.0;
            assert_eq!(result["reference_tokens_per_round"].as_f64(), greedy.then_some(1.5), "{result}");
        }
    }
}

#[test]
fn an_evaluation_skips_what_does_not_fit_and_may_leave_plain_decoding_out() {
    let model = whole_model();
    let prompts = model.path().join("two.jsonl");
    let lines = format!("{{\"turns\": [\"{}\"]}}\n{{\"turns\": [\"abc\"]}}\n", "x".repeat(64));
    let more = ["--context", "64", "--drafter", "ngram", "--tree", "2x1", "--no-plain"];
    let table = generated(&eval(model.path(), &prompts, &lines, &more));
    assert!(table.contains("too long for the context: 1 of two"), "{table}");
    assert!(table.contains("ngram") && !table.contains("none") && !table.contains("times plain"), "{table}");
    let none_fits = eval(model.path(), &prompts, &lines, &["--context", "64", "--first", "1"]);
    let out = treespark(&none_fits, b"");
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("--context"));
}

#[test]
fn prompts_of_an_evaluation_that_are_none() {
    let model = whole_model();
    let prompts = model.path().join("set.jsonl");
    let bad = |lines: &str, more: &[&str], words: &[&str]| {
        refused(&eval(model.path(), &prompts, lines, more), b"", words);
    };
    let good = "{\"turns\": [\"abc\"]}\n";
    bad("", &[], &["set.jsonl:1", "no prompts"]);
    bad(&format!("{good}abc\n"), &[], &["set.jsonl:2", "JSON"]);
    bad(&format!("{good}\n{{\"text\": \"abc\"}}\n"), &[], &["set.jsonl:3", "turns"]);
    bad(good, &["--first", "0"], &["--first"]);
    bad(good, &["--budget", "8,257"], &["257", "256"]);
    bad(good, &["--temperature", "0,-1"], &["temperature", "-1"]);
    bad(good, &["--drafter", "ngram,dspark"], &["dspark"]);
    bad(good, &["--json", "no/such/folder/report.json"], &["no/such/folder"]);
    bad(good, &["--compare", "no/such/file.json"], &["no/such/file.json"]);
    let twice = prompts.to_str().unwrap();
    bad(good, &["--prompts", twice], &["same stem"]);
    refused(&["eval", "--prompts", "no/such.jsonl"], b"", &["no/such.jsonl"]);
    refused(&["eval"], b"", &["--prompts"]);
}

#[test]
fn trees_that_are_none() {
    refused(&["tree", "4xx2"], b"", &["4xx2"]);
    refused(&["tree", "chain:256"], b"", &["257", "256"]);
    refused(&["tree", "parents:0,0,5"], b"", &["5"]);
    refused(&["generate", "-p", "x", "--tree", "bush"], b"", &["bush"]);
}

#[test]
fn options_outside_their_range() {
    for temperature in ["-1", "NaN", "inf"] {
        refused(&["generate", "-p", "x", "--temperature", temperature], b"", &["temperature"]);
    }
    refused(&["generate", "-p", "x", "--top-p", "1.5"], b"", &["top_p"]);
    refused(&["generate", "-p", "x", "--min-p", "-0.1"], b"", &["min_p"]);
    refused(&["generate", "-p", "x", "--repetition-penalty", "0"], b"", &["repetition_penalty"]);
    refused(&["generate", "-p", "x", "--backend", "abacus"], b"", &["abacus", "cpu", "wgpu"]);
    refused(&["generate", "-p", "x", "--backend", "wgpu:99"], b"", &["99"]);
    refused(&["generate", "-p", "x", "--backend", "cuda:99"], b"", &["cuda:99", "--backend cpu"]);
    refused(&["generate", "-p", "x", "--drafter", "psychic"], b"", &["psychic", "ngram"]);
}

#[test]
fn prompts_that_are_none() {
    refused(&["generate", "-p", ""], b"", &["prompt is empty"]);
    refused(&["generate"], b" \n", &["prompt is empty"]);
    refused(&["generate"], b"good \xff bad", &["UTF-8", "offset 5"]);
}

#[test]
fn a_tree_is_drawn() {
    let out = treespark(&["tree", "2x1"], b"");
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("5 nodes, 2 deep, 2 leaves"), "{text}");
}

#[test]
fn devices_are_listed_and_one_is_taken() {
    let out = treespark(&["devices"], b"");
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("cpu"), "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("* ") && line.contains('(')).count(), 1, "{text}");
    assert_ne!(text.contains("cuda:0"), text.contains("no CUDA device: "), "there is one, or why not: {text}");
}

#[test]
#[cfg(all(feature = "cuda", target_os = "linux"))]
fn without_a_driver_the_same_binary_says_so() {
    let devices = Command::new(env!("CARGO_BIN_EXE_treespark"))
        .arg("devices")
        .env("TREESPARK_CUDA_DRIVER", "/no/such/libcuda.so.1")
        .output()
        .unwrap();
    let text = String::from_utf8(devices.stdout).unwrap();
    assert!(devices.status.success(), "{text}");
    assert!(text.contains("no CUDA device: no NVIDIA driver: /no/such/libcuda.so.1"), "{text}");
}

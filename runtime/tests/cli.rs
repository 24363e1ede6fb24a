//! The command line on bad input: a clear message on standard error, exit code other than 0, and no panic.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

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

/// The tiny Llama model of the parity fixtures; it has no tokenizer.
fn tiny_llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify-tests/fixtures/parity/tiny-llama")
}

/// A copy of it with its weights file changed.
fn damaged(change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(tiny_llama().join(name), folder.path().join(name)).unwrap();
    }
    let weights = folder.path().join("model.safetensors");
    let bytes = change(std::fs::read(&weights).unwrap());
    std::fs::write(&weights, bytes).unwrap();
    folder
}

fn generate<'a>(model: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["generate", "--backend", "cpu", "-n", "4", "--model", model.to_str().unwrap()];
    args.extend(more);
    args
}

#[test]
fn models_that_cannot_be_loaded() {
    refused(&generate(Path::new("no/such/model"), &["-p", "x"]), b"", &["no/such/model"]);
    refused(&["generate", "-p", "x", "--model", "no-such-name"], b"", &["no-such-name", "smollm2-135m-instruct"]);
    refused(&["generate", "-p", "x", "--model", "someone/absent-model"], b"", &["hf download someone/absent-model"]);

    let truncated = damaged(|bytes| bytes[..bytes.len() / 2].to_vec());
    refused(&generate(truncated.path(), &["-p", "x"]), b"", &["model.safetensors"]);
    let gguf = truncated.path().join("broken.gguf");
    std::fs::write(&gguf, b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff").unwrap();
    refused(&generate(&gguf, &["-p", "x"]), b"", &["broken.gguf"]);
    // A whole checkpoint that lacks its tokenizer.
    refused(&generate(&tiny_llama(), &["-p", "x"]), b"", &["tokenizer"]);
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
}

//! Files that somebody else wrote, damaged: every seed of the fuzzer (`verify-tests/fuzz/seeds/`) and some thousand
//! changes of them go through its parsers without a panic. The same changes every time; the fuzzer itself needs a nightly
//! compiler and looks for new ones.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

#[path = "../../verify-tests/fuzz/src/parsers.rs"]
mod parsers;

use parsers::{Files, PARSERS, Parser};

#[test]
fn safetensors() {
    check("safetensors", 500);
}

#[test]
fn shards() {
    check("shards", 500);
}

#[test]
fn gguf() {
    check("gguf", 500);
}

#[test]
fn gguf_vocabulary() {
    check("gguf_vocabulary", 100);
}

#[test]
fn target_config() {
    check("target_config", 500);
}

#[test]
fn drafter_config() {
    check("drafter_config", 500);
}

#[test]
fn tokenizer() {
    check("tokenizer", 200);
}

#[test]
fn tree() {
    check("tree", 2000);
}

#[test]
fn chat_template() {
    check("chat_template", 60);
}

/// Every parser is checked above, and states what it may allocate, which only the fuzzer counts.
#[test]
fn all_parsers() {
    let this = include_str!("hostile_files.rs");
    assert!(PARSERS.iter().all(|parser| this.contains(&format!("check(\"{}\", ", parser.name))));
    assert!(PARSERS.iter().all(|parser| parser.multiple <= 1024 && parser.fixed <= 512 << 20));
}

fn check(name: &str, changes: usize) {
    let parser = PARSERS.iter().find(|parser| parser.name == name).unwrap();
    // In memory where the system has such a folder: there are thousands of files to write.
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let files = Files::new(folder.path());
    let seeds = seeds(name);
    seeds.iter().for_each(|seed| run(parser, &files, seed));
    let mut random = Random(1);
    for _ in 0..changes {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        for _ in 0..=random.below(4) {
            change(&mut bytes, &seeds, &mut random);
        }
        run(parser, &files, &bytes);
    }
}

fn run(parser: &Parser, files: &Files, bytes: &[u8]) {
    let returned = catch_unwind(AssertUnwindSafe(|| (parser.run)(files, bytes)));
    assert!(returned.is_ok(), "{} panics on \"{}\"", parser.name, bytes.escape_ascii());
}

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify-tests/fuzz/seeds").join(name);
    let mut paths: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} holds no seeds", folder.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Numbers at which arithmetic goes wrong.
const NUMBERS: [&str; 8] =
    ["0", "-1", "1.5", "255", "4294967296", "9223372036854775807", "18446744073709551615", "1e400"];

fn change(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let at = random.below(bytes.len() + 1);
    let end = (at + random.below(9)).min(bytes.len());
    match random.below(6) {
        0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
        1 => drop(bytes.drain(at..end)),
        2 => drop(bytes.splice(at..end, [[0, 1, 0x7f, 0xff][random.below(4)]; 8])),
        3 => bytes.truncate(at),
        4 => {
            let other = &seeds[random.below(seeds.len())];
            let from = random.below(other.len() + 1);
            drop(bytes.splice(at..end, other[from..].iter().take(64).copied()));
        }
        _ => {
            let start = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit()).unwrap_or(at);
            let digits = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            drop(bytes.splice(start..start + digits, NUMBERS[random.below(NUMBERS.len())].bytes()));
        }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

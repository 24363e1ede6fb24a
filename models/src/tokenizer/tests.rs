//! A tiny byte-level vocabulary, built both ways; SentencePiece's spelling; and the real tokenizer where it is at hand.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::Checkpoint;
use crate::checkpoint::GgufVocabulary;

const TEXT: &str = "Hello hello, 2026! Grüße 北京 👩‍🚀🏔️\t\n  x'll 'LL  é";

/// `byte_of`, the other way.
fn char_of(byte: u8) -> char {
    ('!'..='\u{143}').find(|&c| byte_of(c) == Some(byte)).unwrap()
}

/// Every byte, a few merges, three special tokens and one user-defined token.
fn vocabulary(pre: &str) -> GgufVocabulary {
    let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from).to_vec();
    tokens.extend((0..=255).map(|byte| char_of(byte).to_string()));
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "2 0", "2 6", "20 26"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    tokens.push("<tool>".to_string());
    let mut token_types = vec![1; tokens.len()];
    token_types[..3].fill(3);
    *token_types.last_mut().unwrap() = 4;
    GgufVocabulary {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens,
        token_types,
        merges: merges.map(String::from).to_vec(),
        bos: Some(1),
        eos: Some(2),
        ..GgufVocabulary::default()
    }
}

fn gguf(pre: &str) -> Tokenizer {
    Tokenizer::open(&TokenizerSource::Gguf(vocabulary(pre))).unwrap()
}

/// The `smollm` vocabulary as a `tokenizer.json`.
fn tokenizer_json() -> Value {
    let vocabulary = vocabulary("smollm");
    let added = |(id, special): (usize, bool)| {
        json!({"id": id, "content": vocabulary.tokens[id], "special": special, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false})
    };
    let added = [(0, true), (1, true), (2, true), (vocabulary.tokens.len() - 1, false)].map(added);
    let ids: serde_json::Map<String, Value> =
        vocabulary.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let digits = json!({"type": "Digits", "individual_digits": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, bytes]},
        "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": ids,
            "merges": vocabulary.merges},
    })
}

fn from_json(json: &Value) -> Result<Tokenizer> {
    from_text(&json.to_string())
}

fn from_text(text: &str) -> Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, text).unwrap();
    Tokenizer::open(&TokenizerSource::Json(path))
}

fn streamed(tokenizer: &Tokenizer, tokens: &[u32]) -> (Vec<String>, String) {
    let mut stream = tokenizer.stream();
    let pieces = tokens.iter().map(|&token| stream.push(token)).collect();
    (pieces, stream.finish())
}

fn spellings(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let tokens = tokenizer.encode(text, true).unwrap();
    tokens.iter().map(|&token| tokenizer.decode(&[token])).collect()
}

#[test]
fn both_sources_give_the_same_tokenizer() {
    let (json, gguf) = (from_json(&tokenizer_json()).unwrap(), gguf("smollm"));
    let text = format!("<|im_start|>{TEXT}<|im_end|><tool>");
    assert_eq!(json.encode(&text, true).unwrap(), gguf.encode(&text, true).unwrap());
    assert_eq!(json.vocab_size(), 268);
    json.check_same(&gguf).unwrap();
}

#[test]
fn another_vocabulary_is_refused_for_a_draft_model() {
    let target = gguf("smollm");
    let refusal = |change: fn(&mut GgufVocabulary)| {
        let mut draft = vocabulary("smollm");
        change(&mut draft);
        Tokenizer::open(&TokenizerSource::Gguf(draft)).unwrap().check_same(&target).unwrap_err().to_string()
    };
    assert!(refusal(|draft| draft.tokens.push("new".into())).contains("has 269 tokens, the target's 268"));
    assert!(refusal(|draft| draft.tokens.swap(100, 101)).contains("token 100 of 268 is \"b\" to the draft"));
}

#[test]
fn a_bos_token_is_added_once() {
    let tokenizer = gguf("llama-bpe");
    let hello = tokenizer.token_id("hello").unwrap();
    assert_eq!(tokenizer.encode("hello", true).unwrap(), [1, hello]);
    assert_eq!(tokenizer.encode("<|im_start|>hello", true).unwrap(), [1, hello]);
    assert_eq!(tokenizer.encode("hello", false).unwrap(), [hello]);
}

#[test]
fn texts_come_back() {
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        let tokenizer = gguf(pre);
        let tokens = tokenizer.encode(TEXT, false).unwrap();
        assert_eq!(tokenizer.decode(&tokens), TEXT, "{pre}");
    }
}

#[test]
fn pretokenizers_cut_digits_their_own_way() {
    assert_eq!(spellings(&gguf("gpt-2"), " hello 2026"), [" hello", " ", "2026"]);
    assert_eq!(spellings(&gguf("smollm"), " hello 2026"), [" hello", " ", "2", "0", "2", "6"]);
    assert_eq!(spellings(&gguf("qwen2"), " hello 2026"), [" hello", " ", "2", "0", "2", "6"]);
    assert_eq!(spellings(&gguf("llama-bpe"), " hello 2026"), ["<|im_start|>", " hello", " ", "20", "2", "6"]);
    // Composed and decomposed text are one to Qwen2.
    let compose = |pre: &str| gguf(pre).encode("e\u{301}", false).unwrap().len();
    assert_eq!((compose("qwen2"), compose("smollm")), (2, 3));
}

#[test]
fn special_tokens_are_recognised_and_left_out_of_streams() {
    let tokenizer = gguf("smollm");
    let tokens = tokenizer.encode("<|im_start|>hello<tool><|im_end|>", false).unwrap();
    assert_eq!(tokens, [1, tokenizer.token_id("hello").unwrap(), 267, 2]);
    assert_eq!(tokenizer.decode(&tokens), "<|im_start|>hello<tool><|im_end|>");
    let (pieces, rest) = streamed(&tokenizer, &tokens);
    assert_eq!((pieces.concat(), rest), ("hello<tool>".to_string(), String::new()));
    assert_eq!(tokenizer.end_tokens().collect::<Vec<_>>(), [2, 0]);
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(267));
}

#[test]
fn a_stream_waits_for_whole_characters() {
    let tokenizer = gguf("smollm");
    let tokens = tokenizer.encode("a👩é", false).unwrap();
    assert_eq!(tokens.len(), 7);
    let (pieces, rest) = streamed(&tokenizer, &tokens);
    assert_eq!(pieces, ["a", "", "", "", "👩", "", "é"]);
    assert_eq!(rest, "");
    let (pieces, rest) = streamed(&tokenizer, &tokens[..3]);
    assert_eq!((pieces.concat().as_str(), rest.as_str()), ("a", "\u{fffd}"));
}

#[test]
fn ids_outside_the_vocabulary_are_no_text() {
    let tokenizer = gguf("smollm");
    assert_eq!(tokenizer.decode(&[3 + u32::from(b'a'), 268, 99_999]), "a");
}

#[test]
fn a_prompt_is_neither_cut_nor_filled_up() {
    let mut json = tokenizer_json();
    json["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 1u64 << 40}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"});
    let (changed, plain) = (from_json(&json).unwrap(), from_json(&tokenizer_json()).unwrap());
    assert_eq!(changed.encode("a longer text", true).unwrap(), plain.encode("a longer text", true).unwrap());
}

#[test]
fn sentencepiece_spelling() {
    let pieces = ["<unk>", "<s>", "</s>", "<0xF0>", "<0x9F>", "<0x91>", "<0xA9>", "▁", "a", "▁a"];
    let ids: serde_json::Map<String, Value> =
        pieces.iter().zip(0u32..).map(|(p, id)| (p.to_string(), id.into())).collect();
    let mut json = tokenizer_json();
    json["added_tokens"] = json!([]);
    json["pre_tokenizer"] = Value::Null;
    json["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    json["decoder"] = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    json["model"]["vocab"] = ids.into();
    json["model"]["merges"] = json!(["▁ a"]);
    json["model"]["byte_fallback"] = true.into();
    let tokenizer = from_json(&json).unwrap();
    let tokens = tokenizer.encode("a👩 a", false).unwrap();
    assert_eq!(tokens, [9, 3, 4, 5, 6, 9]);
    assert_eq!(tokenizer.decode(&tokens), "a👩 a");
    assert_eq!(streamed(&tokenizer, &tokens).0, ["a", "", "", "", "👩", " a"]);
}

#[test]
fn what_is_not_supported_is_named() {
    let message = |vocabulary| match Tokenizer::open(&TokenizerSource::Gguf(vocabulary)) {
        Ok(_) => panic!("was accepted"),
        Err(error) => error.to_string(),
    };
    assert!(message(vocabulary("tekken")).contains("pre-tokenizer tekken is not supported"));
    assert!(message(GgufVocabulary { model: "llama".into(), ..vocabulary("smollm") }).contains("\"llama\""));
    let no_bos = GgufVocabulary { bos: None, ..vocabulary("llama-bpe") };
    assert!(message(no_bos).contains("no token is named as bos"));
    let bad_merge = GgufVocabulary { merges: vec!["ab".into()], ..vocabulary("smollm") };
    assert!(message(bad_merge).contains("merge \"ab\" is no pair"));
    let mut json = tokenizer_json();
    json["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    assert!(from_json(&json).err().unwrap().to_string().contains("neither ByteLevel nor"));
    // The library panics where a decoder is no JSON.
    let torn = json.to_string().replace("\"decoder\":{", "\"decoder\":{?");
    assert!(from_text(&torn).err().unwrap().to_string().contains("tokenizer.json: the tokenizers library cannot cope"));
    assert!(from_json(&json!({"model": 1})).err().unwrap().to_string().contains("tokenizer.json"));
}

proptest! {
    /// Any bytes, valid or not, in pieces of any length: the stream says what decoding at once says.
    #[test]
    fn a_stream_equals_decoding_at_once(bytes in proptest::collection::vec(any::<u8>(), 0..24)) {
        let tokenizer = gguf("smollm");
        let tokens: Vec<u32> = bytes.iter().map(|&byte| 3 + u32::from(byte)).collect();
        let (pieces, rest) = streamed(&tokenizer, &tokens);
        prop_assert_eq!(pieces.concat() + &rest, String::from_utf8_lossy(&bytes));
    }
}

/// The prompts of the parity fixture, with the tokens that the Hugging Face tokenizer gave. Checks nothing on a machine
/// that has never fetched the default model.
#[test]
fn smollm2_equals_the_reference() {
    let Some(path) = default_model().filter(|path| path.exists()) else { return };
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tokenizer = Tokenizer::open(&checkpoint.tokenizer_source().unwrap()).unwrap();
    let fixture = "../verify-tests/fixtures/parity/smollm2-135m-instruct/prompts.json";
    let fixture = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(fixture)).unwrap();
    let prompts: Value = serde_json::from_slice(&fixture).unwrap();
    for prompt in prompts.as_array().unwrap() {
        let text = prompt["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(prompt["tokens"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{text}");
        assert_eq!(tokenizer.decode(&expected), text);
    }
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!(tokenizer.end_tokens().collect::<Vec<_>>(), [2, 0]);
}

/// `TREESPARK_TEST_MODEL`, or where the default model is kept once it has been fetched.
fn default_model() -> Option<PathBuf> {
    let folder = |variable| std::env::var_os(variable).map(PathBuf::from);
    folder("TREESPARK_TEST_MODEL").or_else(|| {
        let cache = folder("TREESPARK_CACHE")
            .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("treespark")))
            .or_else(|| Some(folder("HOME")?.join(".cache/treespark")))?;
        Some(cache.join("models").join(crate::hub::DEFAULT_MODEL).join("model.gguf"))
    })
}

#[test]
fn bytes_are_tokens_where_nothing_was_learned() {
    let tokenizer = Tokenizer::of_bytes(300).unwrap();
    let text = "añb\n";
    let tokens = tokenizer.encode(text, true).unwrap();
    assert_eq!(tokens.len(), text.len());
    assert_eq!(tokenizer.decode(&tokens), text);
    assert_eq!(tokenizer.decode(&[299]), "<299>");
    assert!(Tokenizer::of_bytes(255).is_err());
}

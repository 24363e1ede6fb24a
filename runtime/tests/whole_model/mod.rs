//! A model of random weights that a test can run as users do, in a fraction of a second.

use std::path::{Path, PathBuf};

/// The tiny Llama model of the parity fixtures; it has no tokenizer.
pub fn tiny_llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify-tests/fixtures/parity/tiny-llama")
}

/// A copy of it, made whole by a tokenizer that knows printable ASCII and a chat template.
pub fn whole_model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(tiny_llama().join(name), folder.path().join(name)).unwrap();
    }
    let printable = (b'!'..=b'~').map(char::from);
    let vocab: serde_json::Map<_, _> =
        printable.chain(['\u{120}', '\u{10a}']).zip(0..).map(|(c, id): (_, u32)| (c.to_string(), id.into())).collect();
    let byte_level =
        serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "truncation": null,
        "padding": null, "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = serde_json::json!({"chat_template": "{{ messages[0].content }}"});
    std::fs::write(folder.path().join("tokenizer_config.json"), template.to_string()).unwrap();
    folder
}

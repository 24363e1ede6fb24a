//! Text to tokens and back.
//!
//! Encoding is the `tokenizers` crate's. Decoding is ours: each token has bytes that depend on nothing but its id, and
//! a text is their concatenation, read as UTF-8. That makes a stream cost the same at every token, and makes it equal
//! to decoding all at once, wherever a character is split.

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::checkpoint::{GgufVocabulary, TokenizerSource};
use crate::error::{Error, Result};
use crate::gguf_tokenizer;

/// A vocabulary with its rules. Cloning copies no data.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    inner: tokenizers::Tokenizer,
    alphabet: Alphabet,
    /// Tokens that are matched in text before anything is merged: their ids and what they stand for.
    added: BTreeMap<u32, String>,
    /// Those of them that are no text: marks of turns, of ends, of padding.
    special: HashSet<u32>,
}

/// How a token's string spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alphabet {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` a byte, and a text's first space is dropped.
    Pieces,
}

/// Special tokens by which models of the supported families end a turn or a text.
const END_TOKENS: [&str; 7] =
    ["<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "</s>"];

impl Tokenizer {
    pub fn open(source: &TokenizerSource) -> Result<Tokenizer> {
        match source {
            TokenizerSource::Gguf(vocabulary) => Tokenizer::new(gguf_tokenizer::build(vocabulary)?),
            TokenizerSource::Json(path) => {
                let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.clone(), source })?;
                let named = |problem: String| Error::Tokenizer(format!("{}: {problem}", path.display()));
                let inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(named)?;
                Tokenizer::new(inner)
            }
        }
    }

    /// A token for each byte, and others that are no text: for a model that was not trained.
    pub fn of_bytes(vocab_size: usize) -> Result<Tokenizer> {
        let mut bytes: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        bytes.sort_unstable();
        if vocab_size < bytes.len() {
            return Err(Error::Tokenizer(format!("a vocabulary of {vocab_size} has no token for each byte")));
        }
        let others = (bytes.len()..vocab_size).map(|id| format!("<{id}>"));
        let tokens = bytes.iter().map(char::to_string).chain(others).collect();
        let (model, pre) = ("gpt2".to_string(), Some("gpt-2".to_string()));
        Tokenizer::new(gguf_tokenizer::build(&GgufVocabulary { model, pre, tokens, ..GgufVocabulary::default() })?)
    }

    fn new(mut inner: tokenizers::Tokenizer) -> Result<Tokenizer> {
        // A file may ask for texts cut or filled up to a length, any length: of use to who trains. A prompt is whole.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| Error::Tokenizer(error.to_string()))?;
        let alphabet = alphabet(inner.get_decoder())?;
        let tokens = inner.get_added_vocabulary().get_added_tokens_decoder();
        let added = tokens.iter().map(|(&id, token)| (id, token.content.clone())).collect();
        let special = tokens.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        Ok(Tokenizer { shared: Arc::new(Shared { inner, alphabet, added, special }) })
    }

    /// The tokens of a text. Special tokens that the text spells out are recognised. `add_special` adds what the model
    /// expects around a text (for some a bos token), except in front of a text that begins with it, as a rendered chat
    /// template may.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.shared.inner.encode_fast(text, add_special));
        let encoding = encoding.map_err(|problem| Error::Tokenizer(format!("text cannot be encoded: {problem}")))?;
        match *encoding.get_ids() {
            [first, second, ..] if add_special && first == second && self.is_special(first) => {
                Ok(encoding.get_ids()[1..].to_vec())
            }
            ref ids => Ok(ids.to_vec()),
        }
    }

    /// The text of all tokens, special ones included. Bytes that are no UTF-8 become U+FFFD; an id outside the
    /// vocabulary (a padded model may draw one) is no text.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&token| self.token_bytes(token)).collect();
        let bytes = bytes.strip_prefix(self.dropped_prefix()).unwrap_or(&bytes);
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// Decodes token by token, leaving special tokens out: what a person reads.
    pub fn stream(&self) -> TextStream {
        TextStream { tokenizer: self.clone(), pending: Vec::new(), at_start: true }
    }

    /// What a token stands for; not always whole characters.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        if let Some(text) = self.shared.added.get(&token) {
            return text.clone().into_bytes();
        }
        let Some(spelling) = self.shared.inner.id_to_token(token) else { return Vec::new() };
        match self.shared.alphabet {
            Alphabet::ByteLevel => {
                let bytes: Option<Vec<u8>> = spelling.chars().map(byte_of).collect();
                bytes.unwrap_or_else(|| spelling.into_bytes())
            }
            Alphabet::Pieces => match piece_byte(&spelling) {
                Some(byte) => vec![byte],
                None => spelling.replace('▁', " ").into_bytes(),
            },
        }
    }

    /// Number of ids: the largest plus one.
    pub fn vocab_size(&self) -> usize {
        let after_added = self.shared.added.last_key_value().map_or(0, |(&id, _)| id as usize + 1);
        after_added.max(self.shared.inner.get_vocab_size(false))
    }

    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.shared.inner.token_to_id(token)
    }

    pub fn is_special(&self, token: u32) -> bool {
        self.shared.special.contains(&token)
    }

    /// Special tokens by which a model of a supported family may end its answer, whatever its configuration names.
    pub fn end_tokens(&self) -> impl Iterator<Item = u32> {
        END_TOKENS.into_iter().filter_map(|token| self.token_id(token)).filter(|&id| self.is_special(id))
    }

    /// Proves that every id stands for the same token here and in the target: what a draft model needs.
    pub fn check_same(&self, target: &Tokenizer) -> Result<()> {
        let (own, theirs) = (self.vocab_size(), target.vocab_size());
        if own != theirs {
            return Err(Error::Tokenizer(format!(
                "the draft model's vocabulary has {own} tokens, the target's {theirs}: a draft model needs the \
                 target's own tokenizer"
            )));
        }
        let token = |tokenizer: &Tokenizer, id| tokenizer.shared.inner.id_to_token(id).unwrap_or_default();
        match (0..own as u32).find(|&id| token(self, id) != token(target, id)) {
            Some(id) => Err(Error::Tokenizer(format!(
                "token {id} of {own} is {:?} to the draft model and {:?} to the target: a draft model needs the \
                 target's own tokenizer",
                token(self, id),
                token(target, id)
            ))),
            None => Ok(()),
        }
    }

    /// What a text loses at its start.
    fn dropped_prefix(&self) -> &'static [u8] {
        match self.shared.alphabet {
            Alphabet::ByteLevel => b"",
            Alphabet::Pieces => b" ",
        }
    }
}

/// Text that arrives token by token. Only whole characters are given out; the first bytes of one wait for the rest.
pub struct TextStream {
    tokenizer: Tokenizer,
    pending: Vec<u8>,
    at_start: bool,
}

impl TextStream {
    /// The text that this token completes, possibly none.
    pub fn push(&mut self, token: u32) -> String {
        if self.tokenizer.is_special(token) {
            return String::new();
        }
        let bytes = self.tokenizer.token_bytes(token);
        let dropped = if self.at_start { self.tokenizer.dropped_prefix() } else { b"" };
        self.at_start &= bytes.is_empty();
        self.pending.extend_from_slice(bytes.strip_prefix(dropped).unwrap_or(&bytes));
        let whole = self.pending.len() - incomplete_suffix(&self.pending);
        let text = String::from_utf8_lossy(&self.pending[..whole]).into_owned();
        self.pending.drain(..whole);
        text
    }

    /// What is left at the end: U+FFFD if the last character never became whole.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&rest).into_owned()
    }
}

/// Length of the suffix that more bytes could turn into a character.
fn incomplete_suffix(bytes: &[u8]) -> usize {
    let from = bytes.len().saturating_sub(3);
    // Only the last lead byte can begin an unfinished character.
    let start = (from..bytes.len()).rfind(|&at| bytes[at] >= 0xc0);
    start.map_or(0, |at| match std::str::from_utf8(&bytes[at..]) {
        Err(error) if error.valid_up_to() == 0 && error.error_len().is_none() => bytes.len() - at,
        _ => 0,
    })
}

/// The tokenizers library panics on some of the files that it should refuse, and with some that it accepts on a text.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizers library cannot cope with this tokenizer".into()),
    }
}

fn alphabet(decoder: Option<&DecoderWrapper>) -> Result<Alphabet> {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => Ok(Alphabet::ByteLevel),
        Some(DecoderWrapper::Metaspace(_) | DecoderWrapper::ByteFallback(_)) => Ok(Alphabet::Pieces),
        Some(DecoderWrapper::Sequence(sequence)) => {
            let mut known = sequence.get_decoders().iter().filter_map(|step| alphabet(Some(step)).ok());
            known.next().ok_or_else(unknown_decoder)
        }
        _ => Err(unknown_decoder()),
    }
}

fn unknown_decoder() -> Error {
    Error::Tokenizer(
        "the tokenizer's decoder is neither ByteLevel nor SentencePiece's (Metaspace, ByteFallback)".into(),
    )
}

/// GPT-2's alphabet: a printable byte of Latin-1 is its own character, the others follow each other from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let byte = match u32::from(c) {
        c @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => c,
        c @ 0x100..=0x120 => c - 0x100,
        c @ 0x121..=0x142 => c - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The byte of a piece such as `<0x0A>`.
fn piece_byte(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

#[cfg(test)]
mod tests;

//! What an answer must be: plain decoding's tokens, cut where a stop token or a stop string ends them, and their text.

use treespark::{FinishReason, Sequence};
use treespark_models::Tokenizer;
use treespark_models::checkpoint::{GgufVocabulary, TokenizerSource};

/// What ends an answer, told by what plain decoding says without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    Nothing,
    /// The token at this place.
    Token(usize),
    /// The text of so many tokens from this place on.
    Text(usize, usize),
}

impl Stop {
    /// The stop token, if it is one.
    pub fn token(self, plain: &[u32]) -> Option<u32> {
        match self {
            Stop::Token(at) => plain.get(at % plain.len().max(1)).copied(),
            _ => None,
        }
    }

    /// The stop string, if it is one: whole characters.
    pub fn text(self, plain: &[u32], tokenizer: &Tokenizer) -> Option<String> {
        let Stop::Text(at, tokens) = self else { return None };
        let from = at % plain.len().max(1);
        let text = tokenizer.decode(&plain[from..(from + tokens).min(plain.len())]);
        let text = text.trim_matches(char::REPLACEMENT_CHARACTER);
        (!text.is_empty() && !text.contains(char::REPLACEMENT_CHARACTER)).then(|| text.to_string())
    }
}

/// What an answer is.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub tokens: Vec<u32>,
    pub text: String,
    pub why: FinishReason,
}

/// A vocabulary of a few letters, in which some tokens are equal, some are half a character and some begin others.
pub fn tokenizer(vocab: usize) -> Tokenizer {
    // In GPT-2's alphabet Ġ is a space, Ċ the end of a line, Ã¤ the two bytes of an umlaut.
    const SPELLINGS: [&str; 12] = ["a", "b", "ab", "Ġ", "ba", "Ã", "¤", "Ã¤", "Ċ", "ĠaÃ", "bb", "¤b"];
    let tokens = (0..vocab).map(|id| format!("{}{}", SPELLINGS[id % 12], "c".repeat(id / 12))).collect();
    let vocabulary = GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        token_types: vec![1; vocab],
        tokens,
        ..GgufVocabulary::default()
    };
    Tokenizer::open(&TokenizerSource::Gguf(vocabulary)).expect("a vocabulary of its own")
}

/// What an answer must be: plain decoding's, cut where it stops.
pub fn expected(plain: &Sequence, stop_tokens: &[u32], stop: &Option<String>, tokenizer: &Tokenizer) -> Answer {
    let (tokens, mut bytes) = (plain.generated(), Vec::new());
    for (i, token) in tokens.iter().enumerate() {
        if stop_tokens.contains(token) {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            return Answer { tokens: tokens[..=i].to_vec(), text, why: FinishReason::StopToken };
        }
        bytes.extend(tokenizer.token_bytes(*token));
        let text = String::from_utf8_lossy(&bytes);
        if let Some(at) = stop.as_ref().and_then(|stop| text.find(stop.as_str())) {
            return Answer { tokens: tokens[..=i].to_vec(), text: text[..at].into(), why: FinishReason::StopString };
        }
    }
    let why = plain.finished().expect("plain decoding has ended");
    Answer { tokens: tokens.to_vec(), text: String::from_utf8_lossy(&bytes).into_owned(), why }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vocabulary_has_halves_of_characters() {
        let tokenizer = tokenizer(40);
        assert_eq!(tokenizer.decode(&[0, 3, 5, 6, 9]), "a ä a\u{fffd}");
    }
}

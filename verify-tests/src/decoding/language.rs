//! What some answers must be: languages over the letters of the vocabulary.

use std::cell::RefCell;
use std::collections::HashMap;

use regex::bytes::Regex;
use treespark::{Grammar, GrammarEngine, GrammarSource};

use super::answer::tokenizer;

/// Some end soon, some never, some have characters that tokens cut in halves.
pub const LANGUAGES: [&str; 6] = ["[ab]{1,12}", "(ab|ba| )+", "(a|ä|\\n)*bb?", "(ab|ac){3}", " *(äa?)+", "a{5}"];

/// The token that ends an answer in a language.
pub fn end(vocab: usize) -> u32 {
    vocab as u32 - 1
}

/// At its start.
pub fn grammar(language: &str, vocab: usize) -> Grammar {
    thread_local!(static ENGINES: RefCell<HashMap<usize, GrammarEngine>> = RefCell::default());
    let engine = || GrammarEngine::new(&tokenizer(vocab), vocab, &[end(vocab)]);
    let engine = ENGINES.with_borrow_mut(|engines| engines.entry(vocab).or_insert_with(engine).clone());
    engine.compile(&GrammarSource::Regex(language.to_string())).expect("the languages have words of these letters")
}

/// Whether a text is in a language, said by another library.
pub fn contains(language: &str, text: &[u8]) -> bool {
    Regex::new(&format!("^(?:{language})$")).expect("the languages are expressions").is_match(text)
}

/// Makes what may not follow some tokens of an answer impossible.
pub fn forbid(language: &str, answer: &[u32], row: &mut [f32]) {
    let mut grammar = grammar(language, row.len());
    let mut mask = Vec::new();
    grammar.advance(answer).expect("an answer is in its language");
    grammar.masks(&mut treespark::tree::TokenTree::root(0), 1, &mut mask);
    let forbidden = |token: usize| mask[token / 32] >> (token % 32) & 1 == 0;
    (0..row.len()).filter(|&token| forbidden(token)).for_each(|token| row[token] = f32::NEG_INFINITY);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn languages_are_told_apart() {
        assert!(contains("(ab|ba| )+", b"ab ba") && !contains("(ab|ba| )+", b"aab"));
        let mut row = [0.0; 40];
        forbid("a{5}", &[0, 0], &mut row);
        assert_eq!((0..40).filter(|&token| row[token] == 0.0).collect::<Vec<_>>(), [0], "an a, and no end yet");
    }
}

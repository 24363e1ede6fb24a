//! An answer as it is read: tokens become text, up to a stop string.

use std::collections::VecDeque;
use std::sync::Arc;

use treespark_models::{TextStream, Tokenizer};

use super::error::ApiError;
use super::metrics::{Metrics, Stopwatch};
use crate::sequence::FinishReason;
use crate::serving::{Answer, Emitted, Event, Logprobs, Text, Usage};
use crate::stop::StopStrings;

/// What is new of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Piece {
    pub text: String,
    /// The tokens of this text, where log-probabilities were asked for.
    pub tokens: Vec<Scored>,
    /// Behind the last piece there is no other.
    pub end: Option<FinishReason>,
}

/// A token with its log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    pub token: u32,
    /// Where its text begins and ends within the answer's, in characters.
    pub start: usize,
    end: usize,
    pub logprobs: Logprobs,
}

/// What an answer took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    /// Up to the end of a stop string, or with the stop token.
    pub new_tokens: usize,
    /// Not known of an answer that a stop string ended: it was cancelled.
    pub usage: Option<Usage>,
}

/// Reads an answer. Dropping it cancels the answer.
pub struct Reader {
    answer: Option<Answer>,
    words: Words,
    usage: Option<Usage>,
    watch: Stopwatch,
}

impl Reader {
    pub fn new(answer: Answer, text: &Text, stop: &[String], ignore_stop_tokens: bool, to: Arc<Metrics>) -> Reader {
        let stop_tokens = if ignore_stop_tokens { Vec::new() } else { text.stop_tokens.clone() };
        let words = Words::new(&text.tokenizer, stop_tokens, stop);
        Reader { answer: Some(answer), words, usage: None, watch: Stopwatch::start(to) }
    }

    /// The next piece; `None` behind the end. A piece that is not the end holds something.
    pub async fn next(&mut self) -> Result<Option<Piece>, ApiError> {
        while let Some(answer) = &mut self.answer {
            let mut piece = Piece::default();
            match answer.next().await {
                Some(Event::Tokens(tokens)) => {
                    self.watch.first_token();
                    piece.end = self.words.push(tokens, &mut piece).then_some(FinishReason::StopString);
                }
                Some(Event::End(reason, usage)) => {
                    self.words.finish(&mut piece);
                    self.usage = Some(usage);
                    piece.end = Some(reason);
                }
                Some(Event::Failed(why)) => return Err(ApiError::failed(why)),
                None => return Err(ApiError::failed("the engine has stopped")),
            }
            if piece.end.is_some() {
                self.watch.end(self.words.tokens);
                self.answer = None;
            }
            if piece != Piece::default() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    /// All of it at once.
    pub async fn whole(mut self) -> Result<(Piece, Spent), ApiError> {
        let mut whole = Piece::default();
        while let Some(mut piece) = self.next().await? {
            whole.text += &piece.text;
            whole.tokens.append(&mut piece.tokens);
            whole.end = piece.end;
        }
        Ok((whole, self.spent()))
    }

    pub fn spent(&self) -> Spent {
        Spent { new_tokens: self.words.tokens, usage: self.usage }
    }
}

/// Tokens that become text. A half-known character, and what may be the beginning of a stop string, is held back; so are
/// the tokens that spell it.
struct Words {
    stream: TextStream,
    stop: StopStrings,
    /// Those that end an answer, and are no text of it.
    stop_tokens: Vec<u32>,
    held: VecDeque<Scored>,
    /// Characters that the tokens so far spell, and how many of them are out.
    spelled: usize,
    out: usize,
    tokens: usize,
}

impl Words {
    fn new(tokenizer: &Tokenizer, stop_tokens: Vec<u32>, stop: &[String]) -> Words {
        let (stream, stop) = (tokenizer.stream(), StopStrings::new(stop));
        Words { stream, stop, stop_tokens, held: VecDeque::new(), spelled: 0, out: 0, tokens: 0 }
    }

    /// True where a stop string ends the answer; what follows it is neither text nor counted.
    fn push(&mut self, tokens: Vec<Emitted>, piece: &mut Piece) -> bool {
        for Emitted { token, logprobs } in tokens {
            self.tokens += 1;
            if self.stop_tokens.contains(&token) {
                continue;
            }
            let start = self.spelled;
            let text = self.stream.push(token);
            self.spelled += text.chars().count();
            self.held.extend(logprobs.map(|logprobs| Scored { token, start, end: self.spelled, logprobs }));
            let text = self.stop.push(&text);
            self.give_out(&text, piece);
            if self.stop.found() {
                return true;
            }
        }
        false
    }

    /// The answer ended by itself: what was held back is part of it.
    fn finish(&mut self, piece: &mut Piece) {
        let rest = self.stream.finish();
        let rest = self.stop.push(&rest) + &self.stop.finish();
        piece.text += &rest;
        piece.tokens.extend(self.held.drain(..));
    }

    /// Tokens go out with the last of their text; a token that a stop string cuts in two with the first half.
    fn give_out(&mut self, text: &str, piece: &mut Piece) {
        self.out += text.chars().count();
        piece.text += text;
        let (stopped, out) = (self.stop.found(), self.out);
        while let Some(token) =
            self.held.pop_front_if(|token| if stopped { token.start < out } else { token.end <= out })
        {
            piece.tokens.push(token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use treespark_models::checkpoint::{GgufVocabulary, TokenizerSource};

    /// 0 to 3 are letters and two halves of an umlaut, 4 ends a turn.
    fn tokenizer() -> Tokenizer {
        let tokens: Vec<String> = ["a", "b", "Ã", "¤", "<|im_end|>", "ab"].map(String::from).to_vec();
        let token_types = vec![1, 1, 1, 1, 3, 1];
        let vocabulary = GgufVocabulary {
            model: "gpt2".into(),
            pre: Some("gpt-2".into()),
            tokens,
            token_types,
            ..GgufVocabulary::default()
        };
        Tokenizer::open(&TokenizerSource::Gguf(vocabulary)).unwrap()
    }

    fn emitted(tokens: &[u32]) -> Vec<Emitted> {
        let logprobs = |token| Some(Logprobs { token: -(token as f32), top: vec![] });
        tokens.iter().map(|&token| Emitted { token, logprobs: logprobs(token) }).collect()
    }

    /// Text, tokens with their places, and how many were counted, whatever the rounds.
    fn read(tokens: &[u32], stop: &[&str], stop_tokens: &[u32]) -> (String, Vec<(u32, usize)>, usize) {
        let stop: Vec<String> = stop.iter().map(|stop| stop.to_string()).collect();
        let results = (1..=tokens.len()).map(|size| {
            let mut words = Words::new(&tokenizer(), stop_tokens.to_vec(), &stop);
            let mut piece = Piece::default();
            if !tokens.chunks(size).any(|round| words.push(emitted(round), &mut piece)) {
                words.finish(&mut piece);
            }
            (piece.text, piece.tokens.iter().map(|token| (token.token, token.start)).collect(), words.tokens)
        });
        let mut results: Vec<_> = results.collect();
        results.dedup();
        assert_eq!(results.len(), 1, "rounds of another size read otherwise: {results:?}");
        results.remove(0)
    }

    #[test]
    fn tokens_become_text() {
        assert_eq!(read(&[0, 2, 3, 5], &[], &[]), ("aäab".into(), vec![(0, 0), (2, 1), (3, 1), (5, 2)], 4));
        assert_eq!(read(&[0, 2], &[], &[]), ("a\u{fffd}".into(), vec![(0, 0), (2, 1)], 2));
    }

    #[test]
    fn a_stop_token_is_counted_and_is_no_text() {
        assert_eq!(read(&[0, 1, 4], &[], &[4]), ("ab".into(), vec![(0, 0), (1, 1)], 3));
        assert_eq!(read(&[0, 4, 1], &[], &[]), ("ab".into(), vec![(0, 0), (4, 1), (1, 1)], 3), "gone beyond");
    }

    #[test]
    fn a_stop_string_takes_its_tokens_with_it() {
        assert_eq!(read(&[0, 1, 0, 0, 1], &["ba"], &[]), ("a".into(), vec![(0, 0)], 3));
        assert_eq!(read(&[0, 5, 0, 0], &["ba"], &[]), ("aa".into(), vec![(0, 0), (5, 1)], 3), "cut in two");
        assert_eq!(read(&[0, 1, 1], &["bba"], &[]), ("abb".into(), vec![(0, 0), (1, 1), (1, 2)], 3));
    }

    #[test]
    fn what_may_begin_a_stop_string_waits() {
        let mut words = Words::new(&tokenizer(), vec![], &["bb".to_string()]);
        let mut piece = Piece::default();
        assert!(!words.push(emitted(&[0, 1]), &mut piece));
        assert_eq!((piece.text.as_str(), piece.tokens.len()), ("a", 1));
        assert!(!words.push(emitted(&[0]), &mut piece));
        assert_eq!((piece.text.as_str(), piece.tokens.len()), ("aba", 3));
    }
}

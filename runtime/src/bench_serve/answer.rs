//! One answer as it streams in: when its chunks came, and what the server says it took.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;

/// What became of one request. Times are seconds since the measurement began.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Of a closed load: which client sent it. 0 in an open load.
    pub stream: usize,
    pub sent: f64,
    /// When chunks with text came.
    pub chunks: Vec<f64>,
    pub end: f64,
    pub outcome: Result<Counts, Failure>,
}

/// What an answer took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub tokens: usize,
    /// The server told no usage: each chunk is taken for a token.
    pub guessed: bool,
    pub prompt_tokens: Option<usize>,
    /// Draft tokens that were accepted, and that were not.
    pub accepted: Option<usize>,
    pub rejected: Option<usize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    Connection,
    Timeout,
    Status(u16),
    /// The server said in its stream that it failed.
    Server,
    /// The stream ended before the answer did.
    Broken,
    /// What came is no stream of chunks.
    Malformed,
}

#[derive(Default)]
pub struct Answer {
    pub chunks: Vec<f64>,
    /// The server gave a reason for the end, or said that it was done.
    pub finished: bool,
    usage: Option<Usage>,
}

/// The parts of a chunk that are looked at, of chat and plain completions.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Option<Delta>,
    text: Option<String>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<usize>,
    completion_tokens: usize,
    completion_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    accepted_prediction_tokens: Option<usize>,
    rejected_prediction_tokens: Option<usize>,
}

impl Answer {
    /// Takes the data of an event that came at `time`; true if it was the last.
    pub fn take(&mut self, data: &[u8], time: f64) -> Result<bool, Failure> {
        if data == b"[DONE]" {
            self.finished = true;
            return Ok(true);
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|error| {
            let data = brief(&String::from_utf8_lossy(data));
            Failure { kind: FailureKind::Malformed, message: format!("{error}, in: {data}") }
        })?;
        if let Some(error) = chunk.error {
            let message = error["message"].as_str().map_or_else(|| error.to_string(), str::to_string);
            return Err(Failure { kind: FailureKind::Server, message: brief(&message) });
        }
        if chunk.choices.iter().any(Choice::has_text) {
            self.chunks.push(time);
        }
        self.finished |= chunk.choices.iter().any(|choice| choice.finish_reason.is_some());
        // Some servers tell the usage so far with every chunk: the last one holds.
        self.usage = chunk.usage.or(self.usage.take());
        Ok(false)
    }

    pub fn counts(&self) -> Counts {
        let Some(usage) = &self.usage else {
            return Counts { tokens: self.chunks.len(), guessed: true, ..Counts::default() };
        };
        let details = usage.completion_tokens_details.as_ref();
        Counts {
            tokens: usage.completion_tokens,
            guessed: false,
            prompt_tokens: usage.prompt_tokens,
            accepted: details.and_then(|details| details.accepted_prediction_tokens),
            rejected: details.and_then(|details| details.rejected_prediction_tokens),
        }
    }
}

impl Choice {
    /// Whether this chunk brings text: the first names only a role, the last only a reason.
    fn has_text(&self) -> bool {
        let delta = self.delta.iter().flat_map(|delta| [&delta.content, &delta.reasoning_content]);
        delta.chain([&self.text]).flatten().any(|text| !text.is_empty())
    }
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FailureKind::Connection => write!(f, "no connection"),
            FailureKind::Timeout => write!(f, "timeout"),
            FailureKind::Status(status) => write!(f, "HTTP {status}"),
            FailureKind::Server => write!(f, "error in the stream"),
            FailureKind::Broken => write!(f, "broken stream"),
            FailureKind::Malformed => write!(f, "malformed stream"),
        }
    }
}

/// As much of a text as fits a line.
pub fn brief(text: &str) -> String {
    const LONG: usize = 160;
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((cut, _)) = line.char_indices().nth(LONG) {
        line.truncate(cut);
        line += " ...";
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(events: &[&str]) -> Result<Answer, Failure> {
        let mut answer = Answer::default();
        for (time, event) in events.iter().enumerate() {
            answer.take(event.as_bytes(), time as f64)?;
        }
        Ok(answer)
    }

    #[test]
    fn chunks_are_timed_where_they_bring_text_and_counted_by_usage() {
        let chat = answer(&[
            r#"{"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}"#,
            r#"{"choices": [{"delta": {"content": "two tokens"}}], "usage": null}"#,
            r#"{"choices": [{"delta": {"reasoning_content": "three of them"}}]}"#,
            r#"{"choices": [{"delta": {}, "finish_reason": "length"}]}"#,
            r#"{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5,
                "completion_tokens_details": {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}}}"#,
            "[DONE]",
        ])
        .unwrap();
        let (accepted, rejected) = (Some(3), Some(1));
        let counts = Counts { tokens: 5, guessed: false, prompt_tokens: Some(9), accepted, rejected };
        assert_eq!((chat.chunks.as_slice(), chat.finished, chat.counts()), (&[1.0, 2.0][..], true, counts));

        let plain = answer(&[r#"{"choices": [{"text": "a"}]}"#, r#"{"choices": [{"text": "b"}]}"#]).unwrap();
        let counts = Counts { tokens: 2, guessed: true, ..Counts::default() };
        assert_eq!((plain.chunks.len(), plain.finished, plain.counts()), (2, false, counts));
    }

    #[test]
    fn failures_are_told_apart() {
        let failure = |event| answer(&[event]).err().unwrap();
        let server = failure(r#"{"error": {"message": "out of\nmemory", "code": 500}}"#);
        assert_eq!((server.kind, server.message.as_str()), (FailureKind::Server, "out of memory"));
        let malformed = failure("{\"choices\": [");
        assert!(malformed.kind == FailureKind::Malformed && malformed.message.contains("in: {\"choices\""));
        assert_eq!(brief(&"é".repeat(200)).chars().count(), 160 + 4);
    }
}

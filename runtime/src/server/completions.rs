//! `POST /v1/completions`: texts as they are, to be continued.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::task::spawn_blocking;
use treespark_models::Tokenizer;

use super::Server;
use super::answer::Scored;
use super::chat::LEAST_LOGPROB;
use super::error::ApiError;
use super::request::{Body, Wish, within};
use super::respond::{Order, Wording, respond};
use crate::error::Error;

const MAX_LOGPROBS: i64 = 5;

#[derive(Debug, Deserialize)]
struct Fields {
    prompt: Option<Prompt>,
    logprobs: Option<i64>,
    echo: Option<bool>,
    suffix: Option<String>,
    best_of: Option<i64>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected a string, a list of strings, a list of token ids, or a list of such lists")]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    Lists(Vec<Vec<u32>>),
}

pub async fn completions(State(server): State<Arc<Server>>, body: Body) -> Result<Response, ApiError> {
    let wish = Wish::read(&body, &server)?;
    let fields: Fields = body.read()?;
    fields.refuse_unsupported(wish.samples)?;
    let logprobs = fields.logprobs.map(|top| within("logprobs", top, 0, MAX_LOGPROBS)).transpose()?;
    let prompt = fields.prompt.ok_or_else(|| ApiError::field("prompt", "missing"))?;
    let texts = server.clone();
    let prompts = spawn_blocking(move || prompt.tokens(&texts.service.text().tokenizer)).await;
    let prompts = prompts.map_err(|error| ApiError::failed(error.to_string()))??;
    let logprobs = logprobs.map(|top| top as usize);
    respond::<Completion>(server, Order { prompts, wish, logprobs }).await
}

impl Fields {
    fn refuse_unsupported(&self, samples: u32) -> Result<(), ApiError> {
        if self.echo == Some(true) {
            return Err(ApiError::field("echo", "not supported"));
        }
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::field("suffix", "not supported"));
        }
        if self.best_of.is_some_and(|best| best != i64::from(samples)) {
            return Err(ApiError::field("best_of", "not supported, unless it equals n"));
        }
        Ok(())
    }
}

impl Prompt {
    fn tokens(self, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, ApiError> {
        let encode = |text: &String| Ok(tokenizer.encode(text, true).map_err(Error::from)?);
        let prompts = match self {
            Prompt::Text(text) => vec![encode(&text)?],
            Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, ApiError>>()?,
            Prompt::Tokens(tokens) => vec![tokens],
            Prompt::Lists(lists) => lists,
        };
        if prompts.is_empty() { Err(ApiError::field("prompt", "there is none in the list")) } else { Ok(prompts) }
    }
}

struct Completion;

impl Wording for Completion {
    const ID: &str = "cmpl";
    const OBJECT: &str = "text_completion";
    const CHUNK: &str = "text_completion";
    const MAX_TOKENS: usize = 16;
    const PROMPT: &str = "prompt";

    fn choice(index: usize, text: &str, logprobs: Value, reason: &str) -> Value {
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
    }

    fn opening(_: usize) -> Option<Value> {
        None
    }

    fn delta(index: usize, text: &str, logprobs: Value) -> Value {
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": null})
    }

    fn closing(index: usize, reason: &str) -> Value {
        Completion::choice(index, "", Value::Null, reason)
    }

    /// A token that is not among the likeliest stands beside them.
    fn logprobs(tokens: &[Scored], tokenizer: &Tokenizer) -> Value {
        let text = |token: u32| String::from_utf8_lossy(&tokenizer.token_bytes(token)).into_owned();
        let told = |logprob: f32| json!(logprob.max(LEAST_LOGPROB));
        let top = |scored: &Scored| {
            let mut top: Map<String, Value> =
                scored.logprobs.top.iter().map(|&(token, logprob)| (text(token), told(logprob))).collect();
            top.entry(text(scored.token)).or_insert_with(|| told(scored.logprobs.token));
            Value::from(top)
        };
        json!({
            "tokens": tokens.iter().map(|scored| text(scored.token)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|scored| told(scored.logprobs.token)).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": tokens.iter().map(|scored| scored.start).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_come_in_four_forms() {
        let prompt = |value: Value| Body::from(json!({ "prompt": value })).read::<Fields>().map(|f| f.prompt.unwrap());
        assert_eq!(prompt(json!("a")), Ok(Prompt::Text("a".into())));
        assert_eq!(prompt(json!(["a", "b"])), Ok(Prompt::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(prompt(json!([1, 2])), Ok(Prompt::Tokens(vec![1, 2])));
        assert_eq!(prompt(json!([[1], [2, 3]])), Ok(Prompt::Lists(vec![vec![1], vec![2, 3]])));
        for bad in [json!(1), json!([1, "a"]), json!([-1]), json!([1.5]), json!({}), json!([1u64 << 32])] {
            let error = prompt(bad.clone()).unwrap_err().to_json();
            assert_eq!(error["error"]["param"], "prompt", "{bad}");
        }
    }

    #[test]
    fn what_is_not_done_is_refused() {
        let refused = |value: Value| Body::from(value).read::<Fields>().unwrap().refuse_unsupported(2).is_err();
        assert!(refused(json!({"echo": true})) && refused(json!({"suffix": "x"})) && refused(json!({"best_of": 3})));
        assert!(!refused(json!({"echo": false, "suffix": "", "best_of": 2})));
    }
}

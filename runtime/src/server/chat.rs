//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use treespark_models::{Message, Tokenizer};

use super::Server;
use super::answer::Scored;
use super::error::ApiError;
use super::request::{Body, Wish, within};
use super::respond::{Order, Wording, respond};
use crate::error::Error;
use crate::serving::Text;

const MAX_TOP_LOGPROBS: i64 = 20;
/// What stands for no chance at all, as JSON has no infinity.
pub const LEAST_LOGPROB: f32 = -9999.0;

#[derive(Debug, Deserialize)]
struct Fields {
    #[serde(default)]
    messages: Vec<Turn>,
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    tools: Option<Vec<IgnoredAny>>,
}

#[derive(Debug, Deserialize)]
struct Turn {
    role: String,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of text parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

pub async fn chat(State(server): State<Arc<Server>>, body: Body) -> Result<Response, ApiError> {
    let wish = Wish::read(&body, &server)?;
    let fields: Fields = body.read()?;
    let logprobs = fields.logprobs()?;
    let messages = fields.messages()?;
    // A long conversation takes a while to become tokens; other connections go on meanwhile.
    let texts = server.clone();
    let prompt = spawn_blocking(move || prompt(texts.service.text(), &messages)).await;
    let prompt = prompt.map_err(|error| ApiError::failed(error.to_string()))??;
    respond::<Chat>(server, Order { prompts: vec![prompt], wish, logprobs }).await
}

fn prompt(text: &Text, messages: &[Message]) -> Result<Vec<u32>, ApiError> {
    let template = text.template.as_ref();
    let template = template.ok_or_else(|| ApiError::bad("the model has no chat template: use /v1/completions"))?;
    let rendered = template.render(messages, true).map_err(Error::from)?;
    Ok(text.tokenizer.encode(&rendered, false).map_err(Error::from)?)
}

impl Fields {
    fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        let top = within("top_logprobs", self.top_logprobs.unwrap_or(0), 0, MAX_TOP_LOGPROBS)?;
        match self.logprobs {
            Some(true) => Ok(Some(top as usize)),
            _ if top > 0 => Err(ApiError::field("top_logprobs", "wants \"logprobs\": true beside it")),
            _ => Ok(None),
        }
    }

    fn messages(self) -> Result<Vec<Message>, ApiError> {
        if self.tools.is_some_and(|tools| !tools.is_empty()) {
            return Err(ApiError::field("tools", "not supported"));
        }
        if self.messages.is_empty() {
            return Err(ApiError::field("messages", "there is none; give at least one"));
        }
        self.messages.into_iter().enumerate().map(|(i, turn)| turn.message(i)).collect()
    }
}

impl Turn {
    fn message(self, index: usize) -> Result<Message, ApiError> {
        let at = |field: &str| format!("messages[{index}].{field}");
        let role = match self.role.as_str() {
            role @ ("system" | "user" | "assistant") => role.to_string(),
            // OpenAI's newer name for it, which templates do not know.
            "developer" => "system".to_string(),
            other => {
                let problem = format!("'{other}', expected system, developer, user or assistant");
                return Err(ApiError::field(at("role"), problem));
            }
        };
        let content = match self.content {
            None => return Err(ApiError::field(at("content"), "missing, expected a string or a list of text parts")),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let text = |part: Part| match (part.kind.as_str(), part.text) {
                    ("text", Some(text)) => Ok(text),
                    (kind, _) => Err(ApiError::field(at("content"), format!("a part of type '{kind}' is no text"))),
                };
                parts.into_iter().map(text).collect::<Result<Vec<_>, _>>()?.join("\n")
            }
        };
        Ok(Message { role, content })
    }
}

struct Chat;

impl Wording for Chat {
    const ID: &str = "chatcmpl";
    const OBJECT: &str = "chat.completion";
    const CHUNK: &str = "chat.completion.chunk";
    const MAX_TOKENS: usize = usize::MAX;
    const PROMPT: &str = "messages";

    fn choice(index: usize, text: &str, logprobs: Value, reason: &str) -> Value {
        let message = json!({"role": "assistant", "content": text, "refusal": null});
        json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    }

    fn opening(index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        Some(json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null}))
    }

    fn delta(index: usize, text: &str, logprobs: Value) -> Value {
        json!({"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": null})
    }

    fn closing(index: usize, reason: &str) -> Value {
        json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": reason})
    }

    fn logprobs(tokens: &[Scored], tokenizer: &Tokenizer) -> Value {
        let told = |token: u32, logprob: f32| {
            let bytes = tokenizer.token_bytes(token);
            let text = String::from_utf8_lossy(&bytes);
            json!({"token": text, "logprob": logprob.max(LEAST_LOGPROB), "bytes": bytes})
        };
        let content = tokens.iter().map(|scored| {
            let mut one = told(scored.token, scored.logprobs.token);
            one["top_logprobs"] = scored.logprobs.top.iter().map(|&(token, logprob)| told(token, logprob)).collect();
            one
        });
        json!({"content": content.collect::<Value>(), "refusal": null})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: Value) -> Result<Fields, ApiError> {
        Body::from(value).read()
    }

    #[test]
    fn content_is_text_or_parts_of_it() {
        let fields = fields(json!({"messages": [
            {"role": "developer", "content": "Be brief.", "name": "me"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]}));
        assert_eq!(fields.unwrap().messages().unwrap(), [Message::system("Be brief."), Message::user("a\nb")]);
    }

    #[test]
    fn messages_that_are_none_are_named() {
        for (messages, param) in [
            (json!([]), "messages"),
            (json!([{"role": "robot", "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user", "content": "x"}, {"role": "user", "content": null}]), "messages[1].content"),
            (json!([{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content"),
            (json!([{"role": "user", "content": 3}]), "messages[0].content"),
            (json!([{"content": "x"}]), "messages[0]"),
            (json!("x"), "messages"),
        ] {
            let error = fields(json!({ "messages": messages })).and_then(Fields::messages).unwrap_err().to_json();
            assert_eq!(error["error"]["param"], param, "{error}");
        }
    }

    #[test]
    fn log_probabilities_are_asked_for_twice() {
        let asked = |value: Value| fields(value).unwrap().logprobs();
        assert_eq!(asked(json!({"logprobs": true, "top_logprobs": 20})), Ok(Some(20)));
        assert_eq!(asked(json!({"logprobs": true})), Ok(Some(0)));
        assert_eq!(asked(json!({"logprobs": false})), Ok(None));
        assert!(asked(json!({"logprobs": true, "top_logprobs": 21})).is_err());
        assert!(asked(json!({"top_logprobs": 1})).is_err());
    }
}

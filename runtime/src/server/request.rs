//! What both kinds of completion take: read from JSON, checked, and filled with OpenAI's defaults.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::{Server, random};
use crate::grammar::GrammarSource;
use crate::sampling::Sampling;
use crate::scheduler::Policy;

/// A client that has not sent its body after this long is given up.
const BODY_PATIENCE: Duration = Duration::from_secs(30);
const MAX_SAMPLES: i64 = 128;
/// Text is held back for stop strings, and each is looked for at every token.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// Seeds that we choose are numbers to JavaScript, too.
const SEED_BITS: u32 = 53;

/// The JSON object that a request brought.
pub struct Body(Value);

impl FromRequest<Arc<Server>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, server: &Arc<Server>) -> Result<Body, ApiError> {
        let bytes = tokio::time::timeout(BODY_PATIENCE, Bytes::from_request(request, server)).await;
        let late = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive");
        let bytes = bytes.map_err(late)?.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                let limit = server.options.max_body;
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is larger than {limit} bytes"))
            }
            status => ApiError::new(status, rejection.body_text()),
        })?;
        Body::parse(&bytes)
    }
}

impl Body {
    fn parse(bytes: &[u8]) -> Result<Body, ApiError> {
        let body: Value =
            serde_json::from_slice(bytes).map_err(|error| ApiError::bad(format!("the body is not JSON: {error}")))?;
        if body.is_object() { Ok(Body(body)) } else { Err(ApiError::bad("the body is JSON, but not an object")) }
    }

    /// Some of its fields; others are ignored.
    pub fn read<'a, T: Deserialize<'a>>(&'a self) -> Result<T, ApiError> {
        serde_path_to_error::deserialize(&self.0).map_err(|error| match error.path().to_string() {
            path if path == "." => ApiError::bad(error.into_inner().to_string()),
            path => ApiError::field(path, error.into_inner()),
        })
    }
}

#[cfg(test)]
impl From<Value> for Body {
    fn from(value: Value) -> Body {
        Body(value)
    }
}

#[derive(Debug, Default, Deserialize)]
struct Fields {
    model: Option<String>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    temperature: Option<f32>,
    top_k: Option<i64>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<Map<String, Value>>,
    n: Option<i64>,
    /// Wide enough for all signed and all unsigned numbers of 64 bits.
    seed: Option<i128>,
    stop: Option<Stop>,
    ignore_eos: Option<bool>,
    speculation: Option<String>,
    response_format: Option<Value>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// What answers shall be like.
#[derive(Debug, Clone)]
pub struct Wish {
    pub samples: u32,
    pub sampling: Sampling,
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    pub ignore_stop_tokens: bool,
    pub policy: Option<Policy>,
    pub grammar: Option<GrammarSource>,
    pub stream: bool,
    pub include_usage: bool,
}

impl Wish {
    pub fn read(body: &Body, server: &Server) -> Result<Wish, ApiError> {
        let fields: Fields = body.read()?;
        if let Some(model) = &fields.model {
            server.check_model(model)?;
        }
        Wish::from_fields(fields)
    }

    fn from_fields(fields: Fields) -> Result<Wish, ApiError> {
        refuse_unsupported(&fields)?;
        let grammar = constraint(fields.response_format.as_ref())?;
        let max_tokens = match (fields.max_completion_tokens, fields.max_tokens) {
            (Some(tokens), _) => Some(within("max_completion_tokens", tokens, 1, i64::MAX)?),
            (None, Some(tokens)) => Some(within("max_tokens", tokens, 1, i64::MAX)?),
            (None, None) => None,
        };
        let policy = fields.speculation.as_deref().map(|text| text.parse::<Policy>());
        let stream = fields.stream.unwrap_or(false);
        Ok(Wish {
            samples: within("n", fields.n.unwrap_or(1), 1, MAX_SAMPLES)? as u32,
            sampling: sampling(&fields)?,
            max_tokens: max_tokens.map(|tokens| tokens as usize),
            ignore_stop_tokens: fields.ignore_eos.unwrap_or(false),
            policy: policy.transpose().map_err(|problem| ApiError::field("speculation", problem))?,
            grammar,
            stream,
            include_usage: stream && fields.stream_options.is_some_and(|options| options.include_usage == Some(true)),
            stop: stop_strings(fields.stop)?,
        })
    }
}

/// With OpenAI's defaults, and a seed of its own where none is given.
fn sampling(fields: &Fields) -> Result<Sampling, ApiError> {
    let defaults = Sampling { temperature: 1.0, ..Sampling::default() };
    // Some clients say -1 for all tokens.
    let top_k = within("top_k", fields.top_k.unwrap_or(0), -1, i64::from(u32::MAX))?;
    let sampling = Sampling {
        temperature: fields.temperature.unwrap_or(defaults.temperature),
        top_k: top_k.max(0) as u32,
        top_p: fields.top_p.unwrap_or(defaults.top_p),
        min_p: fields.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: fields.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        seed: fields.seed.map_or_else(|| random() >> (64 - SEED_BITS), |seed| seed as u64),
        sample: 0,
    };
    sampling.check()?;
    Ok(sampling)
}

fn stop_strings(stop: Option<Stop>) -> Result<Vec<String>, ApiError> {
    let stop = match stop {
        None => Vec::new(),
        Some(Stop::One(text)) => vec![text],
        Some(Stop::Many(texts)) => texts,
    };
    if stop.len() > MAX_STOPS || stop.iter().any(|text| text.len() > MAX_STOP_BYTES) {
        let problem = format!("at most {MAX_STOPS} stop strings, of at most {MAX_STOP_BYTES} bytes each");
        return Err(ApiError::field("stop", problem));
    }
    Ok(stop)
}

/// What would change an answer, and is not done here, is refused rather than ignored.
fn refuse_unsupported(fields: &Fields) -> Result<(), ApiError> {
    let zero = |value: Option<f32>| value.is_none_or(|value| value == 0.0);
    let problem = "not supported; only 0 is, and repetition_penalty does the like";
    if !zero(fields.presence_penalty) {
        return Err(ApiError::field("presence_penalty", problem));
    }
    if !zero(fields.frequency_penalty) {
        return Err(ApiError::field("frequency_penalty", problem));
    }
    if fields.logit_bias.as_ref().is_some_and(|bias| !bias.is_empty()) {
        return Err(ApiError::field("logit_bias", "not supported"));
    }
    Ok(())
}

/// What an answer is held to by `response_format`.
fn constraint(format: Option<&Value>) -> Result<Option<GrammarSource>, ApiError> {
    let format = format.unwrap_or(&Value::Null);
    GrammarSource::from_response_format(format).map_err(|problem| ApiError::field("response_format", problem))
}

pub fn within(param: &str, value: i64, least: i64, most: i64) -> Result<i64, ApiError> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    let most = if most == i64::MAX { "more".to_string() } else { most.to_string() };
    Err(ApiError::field(param, format!("{value}, expected {least} to {most}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wish(body: Value) -> Result<Wish, ApiError> {
        Wish::from_fields(Body::parse(body.to_string().as_bytes())?.read()?)
    }

    /// The field that an error names.
    fn refused(body: Value) -> String {
        let error = wish(body.clone()).expect_err(&body.to_string()).to_json();
        error["error"]["param"].as_str().unwrap_or_else(|| panic!("{body}: {error}")).to_string()
    }

    #[test]
    fn defaults_are_those_of_openai() {
        let wish = wish(json!({"unknown": [1], "user": "me", "n": null, "presence_penalty": 0})).unwrap();
        let Sampling { temperature, top_k, top_p, seed, .. } = wish.sampling;
        assert_eq!((temperature, top_k, top_p, wish.samples, wish.max_tokens), (1.0, 0, 1.0, 1, None));
        assert!(!wish.stream && !wish.include_usage && !wish.ignore_stop_tokens && wish.stop.is_empty());
        assert!(seed < 1 << SEED_BITS);
    }

    #[test]
    fn fields_mean_what_they_say() {
        let wish = wish(json!({
            "max_tokens": 5, "max_completion_tokens": 7, "seed": -1, "stop": "a", "top_k": -1, "n": 3, "stream": true,
            "stream_options": {"include_usage": true}, "speculation": "fixed:4", "response_format": {"type": "text"},
        }))
        .unwrap();
        assert_eq!((wish.max_tokens, wish.samples, wish.sampling.seed), (Some(7), 3, u64::MAX));
        assert!(wish.stream && wish.include_usage);
        assert_eq!((wish.stop, wish.policy), (vec!["a".to_string()], Some("fixed:4".parse().unwrap())));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (field, value) in [
            ("max_tokens", json!(0)),
            ("max_tokens", json!(-3)),
            ("max_completion_tokens", json!(1.5)),
            ("temperature", json!("hot")),
            ("temperature", json!(-1)),
            ("top_p", json!(2)),
            ("min_p", json!(1e300)),
            ("n", json!(0)),
            ("n", json!(1u64 << 40)),
            ("top_k", json!(-2)),
            ("seed", json!("x")),
            ("seed", json!(1e30)),
            ("stop", json!([1])),
            ("stop", json!(vec!["x"; 17])),
            ("presence_penalty", json!(0.1)),
            ("frequency_penalty", json!(-0.1)),
            ("logit_bias", json!({"5": 1})),
            ("speculation", json!("much")),
            ("response_format", json!({"type": "xml"})),
            ("stream", json!("yes")),
        ] {
            assert_eq!(refused(json!({ field: value })), field);
        }
        assert_eq!(refused(json!({"stream_options": {"include_usage": 1}})), "stream_options.include_usage");
    }

    #[test]
    fn bodies_that_are_none() {
        let deep = "[".repeat(100_000);
        for body in ["", "{", "[]", "3", "null", "{\"a\": 1e999}", "\u{0}", &deep] {
            assert!(Body::parse(body.as_bytes()).is_err(), "{body:.20}");
        }
    }
}

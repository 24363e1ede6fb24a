//! Why a request has no answer, in the shape of OpenAI's API.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::json_response;
use crate::error::Error;
use crate::serving::Refusal;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    /// The field that is wrong.
    param: Option<String>,
    code: Option<&'static str>,
}

/// Seconds after which a client may try again that was told that the queue is full.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None }
    }

    pub fn bad(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    /// The message names the field, too: many clients show nothing else.
    pub fn field(param: impl Into<String>, problem: impl std::fmt::Display) -> ApiError {
        let param = param.into();
        ApiError { param: Some(param.clone()), ..ApiError::bad(format!("{param}: {problem}")) }
    }

    pub fn no_model(name: &str, served: &str) -> ApiError {
        let message = format!("there is no model '{name}' here; this server has '{served}'");
        ApiError {
            param: Some("model".to_string()),
            code: Some("model_not_found"),
            ..ApiError::new(StatusCode::NOT_FOUND, message)
        }
    }

    pub fn too_long(param: &str, tokens: usize, context: usize) -> ApiError {
        let problem = format!("the prompt has {tokens} tokens; {context} fit, of which one is to be generated");
        ApiError { code: Some("context_length_exceeded"), ..ApiError::field(param, problem) }
    }

    pub fn no_key() -> ApiError {
        let message = "this server wants its API key, as the header 'Authorization: Bearer KEY'";
        ApiError { code: Some("invalid_api_key"), ..ApiError::new(StatusCode::UNAUTHORIZED, message) }
    }

    /// Ours, not the client's.
    pub fn failed(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    pub fn to_json(&self) -> Value {
        let kind = match self.status.as_u16() {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(&self.to_json());
        *response.status_mut() = self.status;
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => drop(response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER)),
            StatusCode::UNAUTHORIZED => {
                let scheme = HeaderValue::from_static("Bearer");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
            }
            _ => {}
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        let (status, code) = match refusal {
            Refusal::Busy { .. } => (StatusCode::TOO_MANY_REQUESTS, Some("queue_full")),
            Refusal::Draining => (StatusCode::SERVICE_UNAVAILABLE, None),
            Refusal::Bad(_) => (StatusCode::BAD_REQUEST, None),
            Refusal::Stopped(_) => (StatusCode::INTERNAL_SERVER_ERROR, None),
        };
        ApiError { code, ..ApiError::new(status, refusal.to_string()) }
    }
}

/// Of what a client asked for: sampling that is none, a template that refuses the conversation.
impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        match error {
            Error::Parameter { parameter, value, expected } => {
                ApiError::field(parameter, format!("{value}, expected {expected}"))
            }
            other => ApiError::bad(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_have_the_status_that_clients_act_on() {
        let response = |refusal: Refusal| ApiError::from(refusal).into_response();
        let busy = response(Refusal::Busy { waiting: 7 });
        assert_eq!((busy.status().as_u16(), busy.headers()[header::RETRY_AFTER].as_bytes()), (429, &b"1"[..]));
        assert_eq!(response(Refusal::Draining).status(), 503);
        assert_eq!(response(Refusal::Bad("x".into())).status(), 400);
        assert_eq!(response(Refusal::Stopped("x".into())).status(), 500);
        let error = ApiError::from(Refusal::Busy { waiting: 7 }).to_json();
        assert!(error["error"]["message"].as_str().unwrap().contains('7'), "{error}");
        assert_eq!(error["error"]["type"], "rate_limit_error");
    }

    #[test]
    fn a_field_is_named_twice() {
        let error = ApiError::field("n", "too many").to_json();
        assert_eq!(
            error,
            json!({"error": {
                "message": "n: too many", "type": "invalid_request_error", "param": "n", "code": null,
            }})
        );
    }
}

//! Who may ask: the API key, and pages of another origin.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Server;
use super::error::ApiError;

/// Lets through who has the key, and says which pages may read the answer. A browser asks before it sends a key along.
pub async fn guard(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let origin = server.options.cors.as_ref();
    let open = matches!(request.uri().path(), "/" | "/health");
    let mut response = if origin.is_some() && request.method() == Method::OPTIONS {
        StatusCode::NO_CONTENT.into_response()
    } else if open || has_key(request.headers(), server.options.api_key.as_deref()) {
        next.run(request).await
    } else {
        ApiError::no_key().into_response()
    };
    if let Some(origin) = origin {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
        // The star names all but the key; OpenAI's own client sends some of its own.
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("authorization, *"));
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

fn has_key(headers: &HeaderMap, key: Option<&str>) -> bool {
    let Some(key) = key else { return true };
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().split_at_checked(7));
    given.is_some_and(|(scheme, given)| scheme.eq_ignore_ascii_case(b"Bearer ") && same(given, key.as_bytes()))
}

/// Takes as long wherever the first difference is, so that a key cannot be found byte by byte.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_key_opens() {
        let given =
            |value: &'static str| HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(value))]);
        assert!(has_key(&given("Bearer secret"), Some("secret")) && has_key(&given("bearer secret"), Some("secret")));
        for wrong in ["Bearer secre", "Bearer secretive", "Bearer Secret", "secret", "Basic secret", ""] {
            assert!(!has_key(&given(wrong), Some("secret")), "{wrong}");
        }
        assert!(!has_key(&HeaderMap::new(), Some("secret")) && has_key(&HeaderMap::new(), None));
    }
}

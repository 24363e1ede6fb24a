//! HTTP in front of a [`Service`], in the words of OpenAI's API.
//!
//! A body is read and checked (`request`), becomes prompts (`chat`, `completions`) and asks; the tokens of their answers
//! become text again (`answer`), which goes out whole or streamed (`respond`). Whoever hangs up drops the future or the
//! stream that holds the answers, and so cancels them. A slow reader holds nobody up: an answer's events wait for it in
//! memory, and there are no more of them than the answer may have tokens.

mod access;
mod answer;
mod chat;
mod completions;
mod error;
mod live;
mod metrics;
mod request;
mod respond;

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Router, middleware};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::serving::Service;
use error::ApiError;
use metrics::Metrics;

/// How a service is offered.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// What clients call the model.
    pub model_name: String,
    /// Without it, whoever reaches the port is served.
    pub api_key: Option<String>,
    /// Bytes of a request's body.
    pub max_body: usize,
    /// Tokens of an answer to a request that names no limit; `None` is what fits the context, and 16 for a completion.
    pub max_tokens_default: Option<usize>,
    /// Pages of this origin may read the answers, in a browser.
    pub cors: Option<HeaderValue>,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            model_name: "treespark".to_string(),
            api_key: None,
            max_body: 4 << 20,
            max_tokens_default: None,
            cors: None,
        }
    }
}

/// What every request sees.
pub struct Server {
    service: Service,
    options: ServerOptions,
    metrics: Arc<Metrics>,
    /// Seconds since 1970.
    started: u64,
    stopping: watch::Sender<bool>,
}

impl Server {
    pub fn new(service: Service, options: ServerOptions) -> Server {
        let (metrics, stopping) = (Arc::default(), watch::Sender::new(false));
        Server { service, options, metrics, started: now(), stopping }
    }

    /// Serves until `stop` is ready and what runs then is answered, or that has taken longer than `patience`.
    pub async fn run(
        self,
        listener: TcpListener,
        stop: impl Future<Output = ()> + Send + 'static,
        patience: Duration,
    ) -> io::Result<()> {
        let server = Arc::new(self);
        let (told, mut stopping) = (server.clone(), server.stopping.subscribe());
        let stop = async move {
            stop.await;
            told.service.drain();
            told.stopping.send_replace(true);
        };
        // A token goes out when it is there, not when a packet is full.
        let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
        let serving = axum::serve(listener, router(server)).with_graceful_shutdown(stop);
        let too_long = async {
            let _ = stopping.wait_for(|&stopping| stopping).await;
            tokio::time::sleep(patience).await;
        };
        tokio::select! {
            ended = serving.into_future() => ended,
            () = too_long => Ok(()),
        }
    }
}

fn router(server: Arc<Server>) -> Router {
    let limit = DefaultBodyLimit::max(server.options.max_body);
    Router::new()
        .route("/", get(live::page))
        .route("/rounds", get(live::rounds))
        .route("/health", get(health))
        .route("/metrics", get(metrics::metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(limit)
        .layer(middleware::from_fn_with_state(server.clone(), access::guard))
        .layer(middleware::from_fn_with_state(server.clone(), metrics::count))
        .with_state(server)
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is nothing at {}", uri.path()))
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} does not take {method}", uri.path()))
}

async fn health(State(server): State<Arc<Server>>) -> Result<Response, ApiError> {
    if let Some(why) = server.service.failure() {
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, format!("the engine has stopped: {why}")));
    }
    Ok(json_response(&json!({"status": "ok", "model": server.options.model_name})))
}

async fn models(State(server): State<Arc<Server>>) -> Response {
    json_response(&json!({"object": "list", "data": [server.model()]}))
}

async fn model(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    server.check_model(&id)?;
    Ok(json_response(&server.model()))
}

impl Server {
    fn model(&self) -> Value {
        let context = self.service.facts().context;
        json!({
            "id": self.options.model_name, "object": "model", "created": self.started, "owned_by": "treespark",
            "max_model_len": context,
        })
    }

    fn check_model(&self, name: &str) -> Result<(), ApiError> {
        let served = &self.options.model_name;
        if name == served { Ok(()) } else { Err(ApiError::no_model(name, served)) }
    }
}

fn json_response(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// A number that nobody can guess the next of: the standard library seeds its hash maps so.
fn random() -> u64 {
    RandomState::new().hash_one(())
}

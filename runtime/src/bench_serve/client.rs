//! One server, over plain HTTP: finds it, and sends it a request at a time.

use std::error::Error as _;
use std::time::{Duration, Instant};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use reqwest::{RequestBuilder, Response, Url};
use serde_json::Value;

use super::answer::{Answer, Failure, FailureKind, Record, brief};
use super::sse::Events;
use super::{Error, Plan};

/// A server that does not say its models' names by then is not there.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Client {
    http: reqwest::Client,
    url: String,
    endpoint: &'static str,
    api_key: Option<String>,
    timeout: Duration,
    /// The plan's, or the server's first.
    pub model: String,
}

impl Client {
    /// Finds the server, and a model where the plan names none.
    pub async fn connect(plan: &Plan) -> Result<Client, Error> {
        let url = plan.url.trim_end_matches('/').trim_end_matches("/v1").to_string();
        let problem = |problem: &str| Error::Url { url: url.clone(), problem: problem.to_string() };
        match Url::parse(&url) {
            Ok(parsed) if parsed.scheme() == "http" && parsed.has_host() => {}
            Ok(parsed) if parsed.scheme() == "https" => return Err(problem("this speaks http alone, without TLS")),
            Ok(_) => return Err(problem("expected http://HOST:PORT")),
            Err(error) => return Err(problem(&error.to_string())),
        }
        // A proxy would be measured, too.
        let http = reqwest::Client::builder().no_proxy().build().map_err(|error| problem(&causes(&error)))?;
        let endpoint = if plan.raw { "/v1/completions" } else { "/v1/chat/completions" };
        let (api_key, timeout) = (plan.api_key.clone(), plan.timeout);
        let mut client = Client { http, url, endpoint, api_key, timeout, model: String::new() };
        let named = client.first_model().await;
        client.model = match (&plan.model, named) {
            // Whoever answers at all is a server; not every one lists its models.
            (Some(model), Ok(_) | Err(Error::NoModel { .. })) => model.clone(),
            (_, named) => named?,
        };
        Ok(client)
    }

    async fn first_model(&self) -> Result<String, Error> {
        let url = self.url.clone();
        let request = self.http.get(format!("{url}/v1/models")).timeout(PATIENCE);
        let response = match self.authorised(request).send().await {
            Ok(response) => response,
            Err(error) => return Err(Error::Unreachable { url, problem: causes(&error) }),
        };
        let status = response.status();
        let body = response.bytes().await.unwrap_or_default();
        let models: Value = serde_json::from_slice(&body).unwrap_or_default();
        let name = models["data"][0]["id"].as_str().map(str::to_string);
        name.ok_or_else(|| Error::NoModel { url, problem: format!("HTTP {status}") })
    }

    fn authorised(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.api_key {
            Some(key) => request.header(AUTHORIZATION, format!("Bearer {key}")),
            None => request,
        }
    }

    /// Sends one request and reads its answer to the end; times are on this clock.
    pub async fn ask(&self, body: &Value, clock: Instant, stream: usize) -> Record {
        let body = body.to_string();
        let mut answer = Answer::default();
        let sent = clock.elapsed().as_secs_f64();
        let outcome = self.receive(body, clock, &mut answer).await;
        let end = outcome.as_ref().map_or_else(|_| clock.elapsed().as_secs_f64(), |&end| end);
        let outcome = outcome.map(|_| answer.counts());
        Record { stream, sent, chunks: answer.chunks, end, outcome }
    }

    /// When the answer ended.
    async fn receive(&self, body: String, clock: Instant, answer: &mut Answer) -> Result<f64, Failure> {
        let request = self.http.post(format!("{}{}", self.url, self.endpoint)).timeout(self.timeout);
        let request = self.authorised(request).header(CONTENT_TYPE, "application/json").body(body);
        let mut response = checked(request.send().await.map_err(|error| failure(&error))?).await?;
        let mut events = Events::default();
        while let Some(bytes) = response.chunk().await.map_err(|error| failure(&error))? {
            let time = clock.elapsed().as_secs_f64();
            for data in events.push(&bytes) {
                if answer.take(&data, time)? {
                    // The connection can be used again once its body is read to the end.
                    while let Ok(Some(_)) = response.chunk().await {}
                    return Ok(time);
                }
            }
        }
        let message = format!("it ended after {} chunks, without a reason or [DONE]", answer.chunks.len());
        let broken = Failure { kind: FailureKind::Broken, message };
        if answer.finished { Ok(clock.elapsed().as_secs_f64()) } else { Err(broken) }
    }
}

/// The response, if it is a stream of events.
async fn checked(response: Response) -> Result<Response, Failure> {
    let status = response.status();
    if !status.is_success() {
        let message = brief(&response.text().await.unwrap_or_default());
        return Err(Failure { kind: FailureKind::Status(status.as_u16()), message });
    }
    let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("nothing");
    if !kind.starts_with("text/event-stream") {
        let message = format!("expected text/event-stream, got {kind}");
        return Err(Failure { kind: FailureKind::Malformed, message });
    }
    Ok(response)
}

fn failure(error: &reqwest::Error) -> Failure {
    let kind = match () {
        () if error.is_timeout() => FailureKind::Timeout,
        () if error.is_body() || error.is_decode() => FailureKind::Broken,
        () => FailureKind::Connection,
    };
    Failure { kind, message: causes(error) }
}

/// The last cause says what happened; those before it say that something did.
fn causes(error: &reqwest::Error) -> String {
    let last = std::iter::successors(error.source(), |&error| error.source()).last();
    brief(&last.map_or_else(|| error.to_string(), |cause| cause.to_string()))
}

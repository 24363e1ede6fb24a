//! From prompts to a response: one ask for every sample of every prompt, all at once; whole answers, or a stream.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::future::try_join_all;
use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use serde_json::{Value, json};
use treespark_models::Tokenizer;

use super::answer::{Piece, Reader, Scored, Spent};
use super::error::ApiError;
use super::request::Wish;
use super::{Server, json_response, now, random};
use crate::sampling::Sampling;
use crate::sequence::FinishReason;
use crate::serving::Ask;

/// Prompts times samples that one request may want.
const MAX_CHOICES: usize = 1024;
/// A comment goes out after so long without news, so that nobody on the way takes the connection for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How an endpoint words what all of them have to say.
pub trait Wording: Send + 'static {
    const ID: &str;
    const OBJECT: &str;
    const CHUNK: &str;
    /// Tokens of an answer where neither client nor server has a limit.
    const MAX_TOKENS: usize;
    /// The field that holds the prompt.
    const PROMPT: &str;

    fn choice(index: usize, text: &str, logprobs: Value, reason: &str) -> Value;
    /// What stands before an answer's text in a stream.
    fn opening(index: usize) -> Option<Value>;
    fn delta(index: usize, text: &str, logprobs: Value) -> Value;
    fn closing(index: usize, reason: &str) -> Value;
    fn logprobs(tokens: &[Scored], tokenizer: &Tokenizer) -> Value;
}

/// What is asked of the service.
pub struct Order {
    pub prompts: Vec<Vec<u32>>,
    pub wish: Wish,
    /// So many of the likeliest tokens beside each.
    pub logprobs: Option<usize>,
}

pub async fn respond<W: Wording>(server: Arc<Server>, order: Order) -> Result<Response, ApiError> {
    let readers = ask::<W>(&server, &order)?;
    let head = Head::new::<W>(&server, &order);
    if order.wish.stream {
        return Ok(stream::<W>(server, order, head, readers));
    }
    let answers = try_join_all(readers.into_iter().map(Reader::whole)).await?;
    let choice = |(index, (piece, _)): (usize, &(Piece, Spent))| {
        let logprobs = head.logprobs::<W>(&piece.tokens);
        W::choice(index, &piece.text, logprobs, reason(piece.end))
    };
    let choices: Vec<Value> = answers.iter().enumerate().map(choice).collect();
    let spent: Vec<Spent> = answers.iter().map(|&(_, spent)| spent).collect();
    Ok(json_response(&head.response(W::OBJECT, choices, Some(usage(&order, &spent)))))
}

/// All or none: where one ask is refused, the others are dropped, and so cancelled.
fn ask<W: Wording>(server: &Server, order: &Order) -> Result<Vec<Reader>, ApiError> {
    let Order { prompts, wish, logprobs } = order;
    let choices = prompts.len().saturating_mul(wish.samples as usize);
    if choices > MAX_CHOICES {
        return Err(ApiError::field("n", format!("{choices} answers wanted, expected at most {MAX_CHOICES}")));
    }
    prompts.iter().try_for_each(|prompt| check_prompt(server, W::PROMPT, prompt))?;
    let facts = server.service.facts();
    let limit = wish.max_tokens.or(server.options.max_tokens_default).unwrap_or(W::MAX_TOKENS);
    let asks = prompts.iter().flat_map(|prompt| (0..wish.samples).map(move |sample| (prompt, sample)));
    asks.map(|(prompt, sample)| {
        let answer = server.service.ask(Ask {
            prompt: prompt.clone(),
            sampling: Sampling { sample, ..wish.sampling.clone() },
            max_new_tokens: limit.min(facts.context - prompt.len()),
            ignore_stop_tokens: wish.ignore_stop_tokens,
            logprobs: *logprobs,
            policy: wish.policy,
            grammar: wish.grammar.clone(),
        })?;
        let (text, metrics) = (server.service.text(), server.metrics.clone());
        Ok(Reader::new(answer, text, &wish.stop, wish.ignore_stop_tokens, metrics))
    })
    .collect()
}

fn check_prompt(server: &Server, param: &str, prompt: &[u32]) -> Result<(), ApiError> {
    let facts = server.service.facts();
    match prompt.len() {
        0 => return Err(ApiError::field(param, "the prompt is empty: give at least one token")),
        n if n >= facts.context => return Err(ApiError::too_long(param, n, facts.context)),
        _ => {}
    }
    match prompt.iter().find(|&&token| token as usize >= facts.vocab) {
        Some(token) => {
            Err(ApiError::field(param, format!("token {token} is outside the vocabulary of {}", facts.vocab)))
        }
        None => Ok(()),
    }
}

/// What every response and every chunk of one request repeats.
struct Head {
    fields: Value,
    /// Where log-probabilities were asked for.
    tokenizer: Option<Tokenizer>,
}

impl Head {
    fn new<W: Wording>(server: &Server, order: &Order) -> Head {
        let device = &server.service.facts().device;
        let fields = json!({
            "id": format!("{}-{:016x}", W::ID, random()),
            "object": "",
            "created": now(),
            "model": server.options.model_name,
            "system_fingerprint": format!("treespark {}, {device}", env!("CARGO_PKG_VERSION")),
            "seed": order.wish.sampling.seed,
        });
        Head { fields, tokenizer: order.logprobs.map(|_| server.service.text().tokenizer.clone()) }
    }

    fn response(&self, object: &str, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let mut response = self.fields.clone();
        response["object"] = object.into();
        response["choices"] = choices.into();
        if let Some(usage) = usage {
            response["usage"] = usage;
        }
        response
    }

    fn logprobs<W: Wording>(&self, tokens: &[Scored]) -> Value {
        self.tokenizer.as_ref().map_or(Value::Null, |tokenizer| W::logprobs(tokens, tokenizer))
    }
}

fn stream<W: Wording>(server: Arc<Server>, order: Order, head: Head, readers: Vec<Reader>) -> Response {
    let answers = readers.into_iter().enumerate().map(|(index, reader)| pieces(index, reader).boxed());
    let chunks = Chunks::<W>::new(order, head, stream::select_all(answers));
    // The server stays while it has something to say.
    let events = stream::unfold((chunks, server), |(mut chunks, server)| async {
        let chunk = chunks.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(chunk)), (chunks, server)))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

type Pieces = (usize, Result<(Piece, Spent), ApiError>);

/// An answer's pieces, the last with what it took. An error is the last, too.
fn pieces(index: usize, reader: Reader) -> impl stream::Stream<Item = Pieces> + Send {
    stream::unfold(Some(reader), move |reader| async move {
        let mut reader = reader?;
        match reader.next().await {
            Ok(Some(piece)) => Some(((index, Ok((piece, reader.spent()))), Some(reader))),
            Ok(None) => None,
            Err(error) => Some(((index, Err(error)), None)),
        }
    })
}

/// A stream's chunks as text, `[DONE]` included.
struct Chunks<W> {
    order: Order,
    head: Head,
    answers: SelectAll<BoxStream<'static, Pieces>>,
    /// What is ready to go out.
    ready: VecDeque<String>,
    spent: Vec<Spent>,
    ended: bool,
    wording: std::marker::PhantomData<W>,
}

impl<W: Wording> Chunks<W> {
    fn new(order: Order, head: Head, answers: SelectAll<BoxStream<'static, Pieces>>) -> Chunks<W> {
        let spent = vec![Spent::default(); answers.len()];
        let ready = VecDeque::new();
        let mut chunks = Chunks { order, head, answers, ready, spent, ended: false, wording: std::marker::PhantomData };
        (0..chunks.spent.len()).filter_map(W::opening).for_each(|choice| chunks.push(choice));
        chunks
    }

    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() && !self.ended {
            match self.answers.next().await {
                Some((index, Ok((piece, spent)))) => self.push_piece(index, &piece, spent),
                Some((_, Err(error))) => {
                    self.ready.push_back(error.to_json().to_string());
                    self.ended = true;
                }
                None => {
                    if self.order.wish.include_usage {
                        let usage = usage(&self.order, &self.spent);
                        self.ready.push_back(self.head.response(W::CHUNK, vec![], Some(usage)).to_string());
                    }
                    self.ready.push_back("[DONE]".to_string());
                    self.ended = true;
                }
            }
        }
        self.ready.pop_front()
    }

    fn push_piece(&mut self, index: usize, piece: &Piece, spent: Spent) {
        if !piece.text.is_empty() || !piece.tokens.is_empty() {
            self.push(W::delta(index, &piece.text, self.head.logprobs::<W>(&piece.tokens)));
        }
        if piece.end.is_some() {
            self.spent[index] = spent;
            self.push(W::closing(index, reason(piece.end)));
        }
    }

    /// With usage wanted, chunks before the last say that theirs is not known.
    fn push(&mut self, choice: Value) {
        let usage = self.order.wish.include_usage.then_some(Value::Null);
        self.ready.push_back(self.head.response(W::CHUNK, vec![choice], usage).to_string());
    }
}

fn reason(end: Option<FinishReason>) -> &'static str {
    match end {
        Some(FinishReason::Length | FinishReason::Context) => "length",
        Some(FinishReason::StopToken | FinishReason::StopString | FinishReason::Cancelled) | None => "stop",
    }
}

/// Samples share their prompt, so it counts once. Details are left out where they are not known of every answer.
fn usage(order: &Order, spent: &[Spent]) -> Value {
    let prompt_tokens: usize = order.prompts.iter().map(Vec::len).sum();
    let new_tokens: usize = spent.iter().map(|spent| spent.new_tokens).sum();
    let mut usage = json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    });
    let known: Option<Vec<_>> = spent.iter().map(|spent| spent.usage).collect();
    if let Some(known) = known {
        let first_samples = known.iter().step_by(order.wish.samples as usize);
        let cached: usize = first_samples.map(|usage| usage.cached_tokens).sum();
        let accepted: usize = known.iter().map(|usage| usage.accepted).sum();
        let drafted: usize = known.iter().map(|usage| usage.drafted).sum();
        usage["prompt_tokens_details"] = json!({"cached_tokens": cached});
        usage["completion_tokens_details"] = json!({
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted.saturating_sub(accepted),
        });
    }
    usage
}

//! For whoever watches: rounds as they happen.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::response::sse::{Event, Sse};
use axum::response::{Html, IntoResponse, Response};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;
use tokio::time::{Interval, MissedTickBehavior};
use treespark_models::Tokenizer;

use super::Server;
use crate::serving::RoundView;

/// A round is sent at most so often.
const ROUND_INTERVAL: Duration = Duration::from_millis(50);
/// Ticks of that from one report of the counters to the next.
const COUNTER_TICKS: u64 = 20;

/// What a browser shows of a running server.
pub async fn page() -> Html<&'static str> {
    Html(include_str!("page.html"))
}

/// Server-sent events: `round`, with the text of every token, and `counters`, once a second, with the seconds since the
/// first event, so that a rate does not depend on when a browser gets to read.
pub async fn rounds(State(server): State<Arc<Server>>) -> Response {
    let mut stopping = server.stopping.subscribe();
    let events = stream::unfold(Watch::new(server), |mut watch| async {
        let events = watch.tick().await;
        Some((stream::iter(events.into_iter().map(Ok::<_, Infallible>)), watch))
    });
    let stopped = async move { drop(stopping.wait_for(|&stopping| stopping).await) };
    Sse::new(events.flatten().take_until(Box::pin(stopped))).into_response()
}

struct Watch {
    server: Arc<Server>,
    rounds: Receiver<Arc<RoundView>>,
    interval: Interval,
    ticks: u64,
    start: Instant,
}

impl Watch {
    fn new(server: Arc<Server>) -> Watch {
        let mut interval = tokio::time::interval(ROUND_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Watch { rounds: server.service.watch(), server, interval, ticks: 0, start: Instant::now() }
    }

    async fn tick(&mut self) -> Vec<Event> {
        self.interval.tick().await;
        let event = |name: &str, value: Value| Event::default().event(name).data(value.to_string());
        let mut events = Vec::new();
        if let Some(round) = newest(&mut self.rounds) {
            events.push(event("round", told(&round, &self.server.service.text().tokenizer)));
        }
        if self.ticks.is_multiple_of(COUNTER_TICKS) {
            let mut counters = json!(self.server.service.counters());
            counters["seconds"] = self.start.elapsed().as_secs_f64().into();
            events.push(event("counters", counters));
        }
        self.ticks += 1;
        events
    }
}

/// The last of the rounds that were not looked at, if there are any.
fn newest(rounds: &mut Receiver<Arc<RoundView>>) -> Option<Arc<RoundView>> {
    let mut newest = None;
    loop {
        match rounds.try_recv() {
            Ok(round) => newest = Some(round),
            Err(TryRecvError::Lagged(_)) => {}
            Err(TryRecvError::Empty | TryRecvError::Closed) => return newest,
        }
    }
}

/// The round as JSON, with the text of every token beside it.
fn told(round: &RoundView, tokenizer: &Tokenizer) -> Value {
    let text = |token: u32| String::from_utf8_lossy(&tokenizer.token_bytes(token)).into_owned();
    let mut value = json!(round);
    for (i, tree) in round.trees.iter().enumerate() {
        let value = &mut value["trees"][i];
        value["texts"] = tree.tokens.iter().map(|&token| text(token)).collect();
        value["bonus_text"] = text(tree.bonus).into();
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::broadcast;

    #[test]
    fn who_comes_late_sees_the_newest() {
        let (send, mut rounds) = broadcast::channel(4);
        assert!(newest(&mut rounds).is_none());
        for rows in 0..9 {
            let view = RoundView { trees: vec![], rows, running: 1, waiting: 0, seconds: 0.0 };
            send.send(Arc::new(view)).unwrap();
        }
        assert_eq!(newest(&mut rounds).map(|round| round.rows), Some(8));
        assert!(newest(&mut rounds).is_none());
    }
}

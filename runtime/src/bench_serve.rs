//! Load on a server that speaks OpenAI's protocol, and how it bears it: what `treespark bench-serve` runs.
//!
//! A load is closed (so many streams, each of which always has one request running) or open (so many requests a second
//! with Poisson arrivals, whatever the server does). Request i is the same for every server, load and policy: prompt,
//! seed and time of arrival follow from the run's seed and i. Policies take turns at every load, another one first each
//! time, so that whatever drifts meets all of them.
//!
//! ```text
//! TTFT        ms from sending a request to the first chunk with text
//! TPOT        ms (last chunk - first chunk) / (tokens - 1), of one request: the tokens of a chunk share its wait
//! user        tokens/s, 1000 / TPOT: how fast one reader sees text appear
//! E2E         ms from sending a request to the end of its stream
//! tokens/s    of all requests together, within the steady window
//! ```
//!
//! The steady window of a closed load begins when every stream has had the first chunk of its first request, and ends
//! when the first stream is out of work. That of an open load reaches from the first chunk of all to the last arrival.
//! Where there is no such time (fewer requests than streams, say) the window is the whole run, and the report says so.
//! A request counts in the window by the share of its chunks that came in it; a failed one counts nowhere.

pub mod plan;
pub mod requests;
pub mod run;
pub mod client;
pub mod answer;
pub mod sse;
pub mod window;
pub mod figures;
pub mod report;
pub mod table;
pub mod plot;

pub use plan::{End, Load, Plan, Policy};
pub use report::Report;
pub use run::{Event, run};

/// Why a run cannot begin, or its plot not be drawn. What befalls single requests is counted, in the report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{url} is no URL of a server: {problem}")]
    Url { url: String, problem: String },
    #[error(
        "no server answers at {url}: {problem} (start one, say with `treespark serve`, or name another with --url)"
    )]
    Unreachable { url: String, problem: String },
    #[error("{url}/v1/models names no model: {problem} (name one with --model)")]
    NoModel { url: String, problem: String },
    #[error("the plot could not be drawn: {0}")]
    Plot(String),
    #[error("threads for the clients could not be started: {0}")]
    Threads(std::io::Error),
}

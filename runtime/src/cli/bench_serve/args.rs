//! What `treespark bench-serve` takes.

use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args as ClapArgs;
use treespark::bench_serve::{End, Load, Policy};

const NOTES: &str = "Examples:
  treespark bench-serve --prompts mt-bench.jsonl
  treespark bench-serve --prompts mt-bench.jsonl --streams 1,4,16,64,128 --duration 60s
  treespark bench-serve --prompts gsm8k.jsonl --policy off,fixed:1,confidence --svg frontier.svg
  treespark bench-serve --prompts gsm8k.jsonl,mt-bench.jsonl -n 512 --json points.json
  treespark bench-serve --prompts gsm8k.jsonl --rate 2,8,32 --requests 200 --seed 1
  treespark bench-serve --url http://127.0.0.1:8000 --prompts gsm8k.jsonl --ignore-eos -n 512

Any server that speaks OpenAI's protocol will do; --policy needs one with the field `speculation`,
such as `treespark serve`. Request i has the same prompt, seed and time of arrival for every server,
load and policy. The policies take turns at every load, another one first each time: a server that
keeps the prompts it has read favours whoever comes later. Columns:
  tokens/s       of all requests, in the steady window: from when every stream has had a first
                 chunk until the first is out of work; with --rate, to the last arrival
  user tokens/s  (tokens - 1) over the seconds from first to last chunk: mean of the requests, and
                 p10, which nine of ten exceed
  ratio          the column before, or the mean, over the first policy's at the same load
  frontier       * where no other point is better for all together or for each and as good for both
  accepted       draft tokens a request, as the server tells
  TTFT, TPOT     milliseconds to the first chunk, and per token behind it
  E2E            milliseconds to the end of the answer
Requests that fail are counted and named; no figure includes them. Ctrl-C ends early and prints what
is there.";

#[derive(ClapArgs)]
#[command(after_help = NOTES)]
pub struct BenchServeArgs {
    /// Sets of prompts: JSON lines with "turns", of which the first is asked; all sets are shuffled together
    #[arg(short, long, required = true, num_args = 1.., value_delimiter = ',', value_name = "FILE")]
    pub prompts: Vec<PathBuf>,
    #[command(flatten)]
    pub server: ServerArgs,
    #[command(flatten)]
    pub load: LoadArgs,
    #[command(flatten)]
    pub request: RequestArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(ClapArgs)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Where it listens; plain HTTP
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// The model to ask [default: the first that the server names]
    #[arg(short, long, value_name = "NAME")]
    pub model: Option<String>,
    /// Sent as a bearer token
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// How to speculate: off, fixed:N, confidence, ...; several by commas, each measured at every load
    #[arg(long, value_delimiter = ',', value_name = "POLICY", value_parser = parse_policy)]
    pub policy: Vec<Policy>,
}

#[derive(ClapArgs)]
#[command(next_help_heading = "Load")]
pub struct LoadArgs {
    /// Closed loop: clients that always have one request running; several by commas
    #[arg(long, default_value = "1,4,16,64", value_delimiter = ',', value_name = "N")]
    pub streams: Vec<NonZeroUsize>,
    /// Open loop: requests a second, at random times; several by commas
    #[arg(long, value_delimiter = ',', value_name = "R", value_parser = parse_rate, conflicts_with = "streams")]
    pub rate: Vec<f64>,
    /// Measure so many requests at each point
    #[arg(long, value_name = "N", conflicts_with = "duration")]
    pub requests: Option<NonZeroUsize>,
    /// Measure as many requests as begin in this time: 30s, 2m
    #[arg(long, default_value = "30s", value_name = "TIME", value_parser = parse_duration)]
    pub duration: Duration,
    /// Requests before each measurement, of up to 32 tokens, that count for nothing [default: one a stream]
    #[arg(long, value_name = "N")]
    pub warmup: Option<usize>,
    /// A request that takes longer has failed
    #[arg(long, default_value = "10m", value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Duration,
}

#[derive(ClapArgs)]
#[command(next_help_heading = "Requests")]
pub struct RequestArgs {
    /// Most tokens of an answer: a number, or A-B for another one out of these for each request
    #[arg(short = 'n', long, default_value = "256", value_name = "N|A-B", value_parser = parse_lengths)]
    pub max_tokens: RangeInclusive<usize>,
    /// 0 is greedy
    #[arg(long, default_value = "0", value_name = "T", value_parser = parse_temperature, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Of the order of the prompts, the seeds of the requests, and their times of arrival
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Have every answer go on to --max-tokens, where the server knows how
    #[arg(long)]
    pub ignore_eos: bool,
    /// Have the prompts completed as they are (/v1/completions), without the model's chat template
    #[arg(long)]
    pub raw: bool,
}

#[derive(ClapArgs)]
#[command(next_help_heading = "Output (tables, to standard output)")]
pub struct OutputArgs {
    /// Write all that was measured there too, as one JSON document
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw tokens/s of all against those of one user there
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

impl LoadArgs {
    /// Each once.
    pub fn loads(&self) -> Vec<Load> {
        let streams = self.streams.iter().map(|streams| Load::Streams(streams.get()));
        let rates = self.rate.iter().map(|&rate| Load::Rate(rate));
        if self.rate.is_empty() { once(streams) } else { once(rates) }
    }

    pub fn end(&self) -> End {
        self.requests.map_or(End::After(self.duration), |requests| End::Requests(requests.get()))
    }
}

impl ServerArgs {
    /// Each once; without any, the server does as it likes.
    pub fn policies(&self) -> Vec<Policy> {
        let policies = once(self.policy.iter().cloned());
        if policies.is_empty() { vec![Policy(None)] } else { policies }
    }
}

fn once<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut kept = Vec::new();
    items.for_each(|item| {
        if !kept.contains(&item) {
            kept.push(item);
        }
    });
    kept
}

fn parse_policy(text: &str) -> Result<Policy, String> {
    let text = text.trim();
    if text.is_empty() { Err("a policy has a name".to_string()) } else { Ok(Policy(Some(text.to_string()))) }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| "expected requests a second, more than 0".to_string())
}

/// `256`, or `64-256`.
fn parse_lengths(text: &str) -> Result<RangeInclusive<usize>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let length = |text: &str| text.trim().parse::<usize>().ok().filter(|&length| length > 0);
    let lengths = length(first).zip(length(last)).filter(|(first, last)| first <= last);
    lengths.map(|(first, last)| first..=last).ok_or_else(|| "expected a number above 0, or a range like 64-256".into())
}

fn parse_temperature(text: &str) -> Result<f64, String> {
    let temperature = text.parse().ok().filter(|temperature: &f64| temperature.is_finite() && *temperature >= 0.0);
    temperature.ok_or_else(|| "expected a number, 0 or more".to_string())
}

/// `30s`, `1.5m`, `500ms`; a number alone is seconds.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let units = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("", 1.0)];
    let (number, unit) =
        units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit))).expect("the last one fits all");
    let seconds = number.trim().parse().ok().filter(|number: &f64| *number > 0.0).map(|number| number * unit);
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    duration.ok_or_else(|| "expected a time, like 30s or 2m".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        args: BenchServeArgs,
    }

    fn parsed(more: &[&str]) -> Option<BenchServeArgs> {
        Only::try_parse_from([&["bench-serve", "--prompts", "a.jsonl"], more].concat()).ok().map(|only| only.args)
    }

    #[test]
    fn a_load_is_closed_or_open_and_ends_by_number_or_time() {
        let args = parsed(&[]).unwrap();
        assert_eq!(args.load.loads(), [1, 4, 16, 64].map(Load::Streams));
        assert_eq!(
            (args.load.end(), args.server.policies()),
            (End::After(Duration::from_secs(30)), vec![Policy(None)])
        );
        let args =
            parsed(&["--rate", "2,0.5,2", "--requests", "9", "--policy", "off,fixed:1", "--policy", "off"]).unwrap();
        assert_eq!((args.load.loads(), args.load.end()), (vec![Load::Rate(2.0), Load::Rate(0.5)], End::Requests(9)));
        assert_eq!(args.server.policies(), ["off", "fixed:1"].map(|policy| Policy(Some(policy.to_string()))));
        for bad in [
            &["--rate", "2", "--streams", "4"][..],
            &["--rate", "0"],
            &["--streams", "0"],
            &["--requests", "4", "--duration", "30s"],
            &["--temperature", "-1"],
            &["--policy", "off,"],
        ] {
            assert!(parsed(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn lengths_are_a_number_or_a_range() {
        assert_eq!(parse_lengths("256"), Ok(256..=256));
        assert_eq!(parse_lengths("64-256"), Ok(64..=256));
        for wrong in ["0", "", "0-3", "4-3", "-3", "3-", "a", "1-2-3"] {
            assert!(parse_lengths(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_have_units() {
        for (text, ms) in [("30s", 30_000), ("1.5m", 90_000), ("500ms", 500), ("2h", 7_200_000), ("7", 7_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "0s", "-1s", "soon", "NaN", "1e99h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}

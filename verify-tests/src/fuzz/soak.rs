//! A service under random load for as long as one likes: clients that come and go, leave in the middle, ask again what was
//! asked before. No wrong token, no page lost, no memory that grows.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use treespark::backend::Backend;
use treespark::devices::{self, BackendChoice};
use treespark::scheduler::Policy;
use treespark::serving::{Answer, Ask, Event, Refusal, Service, ServiceOptions};
use treespark::{DrafterChoice, GenerateOptions, Llm, LlmOptions, Many, Sampling};
use treespark_kernel_gen::DType;
use treespark_models::{Model, hub};
use treespark_verify_tests::cases::samplings;
use treespark_verify_tests::logits::LogitsPass;
use treespark_verify_tests::near_tie::{Verdict, draw_context, first_divergence};
use treespark_verify_tests::rng::Rng;

pub const HELP: &str = "Examples:
  treespark-fuzz soak --seconds 60
  treespark-fuzz soak --backend cuda --seconds 600 --max-requests 64 --clients 96";

#[derive(clap::Args)]
pub struct Args {
    /// A model as `treespark generate` takes it
    #[arg(short, long, default_value = hub::DEFAULT_MODEL)]
    model: String,
    #[arg(short, long, default_value = "auto")]
    drafter: DrafterChoice,
    #[arg(short, long, default_value = "cpu")]
    backend: BackendChoice,
    #[arg(short, long, default_value_t = 60)]
    seconds: u64,
    /// Clients that ask at the same time
    #[arg(long, default_value_t = 12)]
    clients: usize,
    /// Sequences that run at once
    #[arg(long, default_value_t = 8)]
    max_requests: usize,
    /// Tokens that the cache holds: few, so that pages run out
    #[arg(long, default_value_t = 2048)]
    cache_tokens: usize,
    /// Different questions
    #[arg(long, default_value_t = 48)]
    asks: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 48)]
    tokens: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

const CONTEXT: usize = 512;
/// Of scaled logits on CUDA, as in the tests of the default model.
const TOLERANCE: f64 = 0.35;
/// Memory that a process may gain once it is warm, in MB.
const GROWTH_MB: f64 = 64.0;

/// A question, and what plain decoding answers alone.
struct Known {
    ask: Ask,
    truth: Vec<u32>,
}

#[derive(Debug, Default, Clone)]
struct Tally {
    answers: u64,
    left: u64,
    refused: u64,
    /// Which questions were answered otherwise than alone, and how.
    differing: BTreeSet<(usize, Vec<u32>)>,
    wrong: Vec<String>,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { answers, left, refused, differing, wrong } = self;
        let (differing, wrong) = (differing.len(), wrong.len());
        write!(
            f,
            "{answers} answers, {differing} different ones, {left} clients left, {refused} refused, {wrong} failed"
        )
    }
}

pub fn run(args: &Args) -> Result<bool> {
    let known = answer_alone(args).context("answering alone")?;
    let many = Many { max_requests: Some(args.max_requests), cache_tokens: Some(args.cache_tokens) };
    let options = LlmOptions { many: Some(many), ..llm(args) };
    let service = Service::start(move || Llm::load(&options), ServiceOptions { max_queue: 4, ..Default::default() })?;
    println!("{}, drafter {}, {} clients", service.facts().device, service.facts().drafter, args.clients);
    let tally = Mutex::new(Tally::default());
    let (start, seconds) = (Instant::now(), Duration::from_secs(args.seconds));
    let mut memory = Vec::new();
    std::thread::scope(|scope| {
        for client in 0..args.clients {
            let (service, known, tally) = (&service, &known, &tally);
            let mut rng = Rng::new(args.seed ^ (client as u64 + 1) << 32);
            scope.spawn(move || {
                while start.elapsed() < seconds {
                    visit(service, known, &mut rng, tally);
                    std::thread::sleep(Duration::from_millis(rng.below(200) as u64));
                }
            });
        }
        while start.elapsed() < seconds {
            std::thread::sleep((seconds - start.elapsed().min(seconds)).min(Duration::from_secs(10)));
            let counters = service.counters();
            memory.extend(resident_mb());
            let now = memory.last().map_or("unknown".to_string(), |mb| format!("{mb:.0} MB"));
            println!(
                "{:>6.0} s: {}; {} preempted, {} of {} prompt tokens shared; memory {now}",
                start.elapsed().as_secs_f64(),
                tally.lock().expect("no client panicked"),
                counters.preempted,
                counters.cached_tokens,
                counters.prompt_tokens,
            );
        }
    });
    let mut tally = tally.into_inner().expect("no client panicked");
    let is_clean = is_clean(&service, &memory)?;
    if !tally.differing.is_empty() {
        let model = Model::open(&hub::resolve(&args.model, &mut |_| {})?)?;
        let mut backend = devices::open(&args.backend)?;
        let pass = LogitsPass::load(&mut *backend, &model, DType::BF16, CONTEXT);
        let excuses = tally.differing.iter().map(|(ask, tokens)| excuse(&mut *backend, &pass, &known[*ask], tokens));
        let wrong: Vec<String> = excuses.filter_map(|excuse| excuse.err().map(|error| format!("{error:#}"))).collect();
        println!("{} of the different answers are near-ties", tally.differing.len() - wrong.len());
        tally.wrong.extend(wrong);
    }
    tally.wrong.iter().for_each(|wrong| println!("WRONG: {wrong}"));
    Ok(is_clean && tally.wrong.is_empty())
}

fn llm(args: &Args) -> LlmOptions {
    LlmOptions {
        model: args.model.clone(),
        drafter: args.drafter.clone(),
        backend: args.backend,
        context: Some(CONTEXT),
        ..LlmOptions::default()
    }
}

/// What each question's answer is, of a sequence that has the device for itself, without drafts.
fn answer_alone(args: &Args) -> Result<Vec<Known>> {
    let mut plain = Llm::load(&LlmOptions { drafter: DrafterChoice::None, ..llm(args) })?;
    let mut rng = Rng::new(args.seed);
    let samplings = samplings();
    let known = (0..args.asks).map(|i| {
        // Prompts that begin alike share pages.
        let text =
            format!("{} {}", BEGINNINGS[i % BEGINNINGS.len()], ENDS[rng.below(ENDS.len())].repeat(1 + rng.below(6)));
        let prompt = plain.text_prompt(&text)?;
        let sampling = Sampling { seed: i as u64, ..samplings[i % samplings.len()].1.clone() };
        let max_new_tokens = 1 + rng.below(args.tokens);
        let options = GenerateOptions { sampling: sampling.clone(), max_new_tokens, ..GenerateOptions::default() };
        let mut generation = plain.generate(prompt.clone(), &options)?;
        generation.by_ref().try_for_each(|step| step.map(drop))?;
        let truth = generation.tokens().to_vec();
        let ask = Ask {
            prompt,
            sampling,
            max_new_tokens,
            ignore_stop_tokens: false,
            logprobs: None,
            policy: None,
            grammar: None,
        };
        Ok(Known { ask, truth })
    });
    known.collect()
}

const BEGINNINGS: [&str; 3] = [
    "The following is a long list of things that everybody should know about the sea, the wind, the sky and the stars, written down \
     in the order in which they came to mind:",
    "Once upon a time",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return",
];
const ENDS: [&str; 4] = ["the waves rise and fall, ", "x = x + 1\n", "and so on, ", "1 2 3 4 5 6 "];

/// One client: asks, listens, and perhaps leaves.
fn visit(service: &Service, known: &[Known], rng: &mut Rng, tally: &Mutex<Tally>) {
    let which = rng.below(known.len());
    let known = &known[which];
    let policy = ["confidence", "confidence", "off", "fixed:4", "chain"][rng.below(5)];
    let policy: Option<Policy> = Some(policy.parse().expect("a policy"));
    let note = |what: &dyn Fn(&mut Tally)| what(&mut tally.lock().expect("no client panicked"));
    let answer = match service.ask(Ask { policy, ..known.ask.clone() }) {
        Ok(answer) => answer,
        Err(Refusal::Busy { .. }) => return note(&|tally| tally.refused += 1),
        Err(refusal) => return note(&|tally| tally.wrong.push(refusal.to_string())),
    };
    let patience = if rng.below(3) == 0 { rng.below(6) } else { usize::MAX };
    match listen(answer, patience) {
        Ok(None) => note(&|tally| tally.left += 1),
        Ok(Some(tokens)) if tokens == known.truth => note(&|tally| tally.answers += 1),
        Ok(Some(tokens)) => note(&|tally| {
            tally.answers += 1;
            tally.differing.insert((which, tokens.clone()));
        }),
        Err(error) => note(&|tally| tally.wrong.push(error.clone())),
    }
}

/// The tokens of an answer; none if patience, in events, ran out.
fn listen(mut answer: Answer, patience: usize) -> Result<Option<Vec<u32>>, String> {
    let mut tokens = Vec::new();
    for _ in 0..patience {
        match answer.wait() {
            Some(Event::Tokens(emitted)) => tokens.extend(emitted.iter().map(|emitted| emitted.token)),
            Some(Event::End(..)) => return Ok(Some(tokens)),
            Some(Event::Failed(error)) => return Err(error),
            None => return Err("an answer without an end".to_string()),
        }
    }
    Ok(None)
}

/// Only a near-tie is an excuse for an answer that differs, and only on CUDA.
fn excuse(backend: &mut dyn Backend, pass: &LogitsPass, known: &Known, tokens: &[u32]) -> Result<()> {
    let is_cuda = backend.info().backend == "cuda";
    let whole = |tokens: &[u32]| [&known.ask.prompt[..], tokens].concat();
    let runs = [whole(&known.truth), whole(tokens)];
    let found = first_divergence([&runs[0], &runs[1]], TOLERANCE, |at| {
        let row = pass.run(backend, &runs[0][..at]).pop();
        let row = row.expect("a prompt has a token");
        ([row.clone(), row], draw_context(&known.ask.sampling, &runs[0][..at]))
    });
    match found {
        Some(found) if is_cuda && found.verdict == Verdict::NearTie => Ok(()),
        Some(found) => bail!("{:?}: {found}", known.ask.sampling),
        None => bail!("{} tokens where {} were due", tokens.len(), known.truth.len()),
    }
}

/// Nothing is left behind.
fn is_clean(service: &Service, memory: &[f64]) -> Result<bool> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while service.counters().running + service.counters().waiting > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    let counters = service.counters();
    if let Some(failure) = service.failure() {
        bail!("the engine failed: {failure}");
    }
    println!(
        "{} rounds, {} tokens, {} cancelled, {} preempted; {} of {} pages in use at the end",
        counters.rounds,
        counters.new_tokens,
        counters.cancelled,
        counters.preempted,
        counters.pages_used,
        counters.pages
    );
    // The first half warms up.
    let growth = match memory {
        [.., last] => last - memory[memory.len() / 2],
        [] => 0.0,
    };
    println!("memory grew by {growth:.1} MB in the second half");
    Ok(counters.pages_used == 0 && counters.running == 0 && growth < GROWTH_MB)
}

/// What this process holds, if the system tells.
fn resident_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let fields: HashMap<&str, &str> = status.lines().filter_map(|line| line.split_once(':')).collect();
    fields.get("VmRSS")?.trim().strip_suffix(" kB")?.parse::<f64>().ok().map(|kb| kb / 1e3)
}

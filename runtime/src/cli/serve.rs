//! `treespark serve`: a model behind HTTP, until Ctrl-C or SIGTERM.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::http::HeaderValue;
use clap::Args as ClapArgs;
use tokio::net::TcpListener;
use treespark::scheduler::Policy;
use treespark::server::{Server, ServerOptions};
use treespark::serving::{Service, ServiceOptions};
use treespark::{Llm, LlmOptions, LoadProgress, Many};

use super::args::ModelArgs;
use super::progress::LoadBar;
use super::{Interrupt, Outcome};

/// Answers that run when the server is told to stop have this long to end. A second Ctrl-C ends them at once.
const PATIENCE: Duration = Duration::from_secs(30);
/// How soon a signal, or the engine's failure, is seen.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

#[derive(ClapArgs)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub server: ServerArgs,
}

#[derive(ClapArgs)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Address to listen at; 0.0.0.0 lets other machines in
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// 0 takes any that is free
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// What clients must send as 'Authorization: Bearer KEY'
    #[arg(long, value_name = "KEY", env = "TREESPARK_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// What clients call the model [default: as --model does]
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Sequences that run at once, at least 2 [default: as many as the device serves well]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_requests: Option<usize>,
    /// Tokens that the cache holds, of all sequences together [default: what they may need, as far as memory goes]
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one)]
    cache_tokens: Option<usize>,
    /// How much of a draft is verified, where a request does not say ("speculation"): confidence, fixed:N, chain, chain:N, off
    #[arg(long, value_name = "POLICY", default_value = "confidence")]
    speculation: Policy,
    /// Requests that may wait; more are told to come again
    #[arg(long, value_name = "N", default_value_t = ServiceOptions::default().max_queue)]
    max_queue: usize,
    /// Most tokens of an answer to a request that names no limit [default: what fits, and 16 for a completion]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_tokens_default: Option<usize>,
    /// Largest body of a request
    #[arg(long, value_name = "BYTES", default_value_t = ServerOptions::default().max_body)]
    max_body: usize,
    /// Let web pages of this origin read the answers; * is any
    #[arg(long, value_name = "ORIGIN")]
    cors: Option<HeaderValue>,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a number of at least 1".to_string())
}

pub fn run(args: &ServeArgs, interrupt: &Interrupt) -> Result<Outcome> {
    let server = &args.server;
    let model = LlmOptions { many: Some(server.many()), ..args.model.options() };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // A port that is taken shows before the long load.
    let address = (server.host.as_str(), server.port);
    let listener = runtime.block_on(TcpListener::bind(address));
    let listener = listener.with_context(|| format!("listening at {}:{}", server.host, server.port))?;

    let (options, service_options) = (server.options(&model), server.service_options());
    let service = Service::start(move || load(&model), service_options)?;
    announce(&listener, &options, &service)?;
    let (watched, interrupt) = (service.clone(), interrupt.clone());
    let stop = async move {
        while !interrupt.requested() && watched.failure().is_none() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    let ended = runtime.block_on(Server::new(service.clone(), options).run(listener, stop, PATIENCE));
    // Whoever is still connected has had its time.
    runtime.shutdown_background();
    ended.context("serving")?;
    match service.failure() {
        Some(why) => bail!("the engine has stopped: {why}"),
        None => Ok(Outcome::Done),
    }
}

fn load(options: &LlmOptions) -> treespark::Result<Llm> {
    let mut bar = LoadBar::new();
    let mut plan = None;
    let llm = Llm::load_with_progress(options, &mut |progress| match progress {
        LoadProgress::Memory(planned) => plan = Some(planned),
        progress => bar.update(progress),
    });
    bar.finish();
    if let Some(plan) = plan.filter(|_| llm.is_ok()) {
        eprintln!("memory: {plan}");
    }
    llm
}

/// One line that can be tried at once.
fn announce(listener: &TcpListener, options: &ServerOptions, service: &Service) -> Result<()> {
    let address = listener.local_addr()?;
    if options.api_key.is_none() && !address.ip().is_loopback() {
        eprintln!("note: without --api-key, whoever reaches {address} is served");
    }
    let key = if options.api_key.is_some() { " -H \"Authorization: Bearer $TREESPARK_API_KEY\"" } else { "" };
    let (name, device) = (&options.model_name, &service.facts().device);
    eprintln!(
        "serving {name} on {device} at http://{address} (try: curl http://{address}/v1/chat/completions{key} -d \
         '{{\"messages\": [{{\"role\": \"user\", \"content\": \"Why is the sky blue?\"}}]}}')"
    );
    Ok(())
}

impl ServerArgs {
    fn options(&self, model: &LlmOptions) -> ServerOptions {
        ServerOptions {
            model_name: self.model_name.clone().unwrap_or_else(|| served_name(&model.model)),
            // An empty variable counts as unset.
            api_key: self.api_key.clone().filter(|key| !key.is_empty()),
            max_body: self.max_body,
            max_tokens_default: self.max_tokens_default,
            cors: self.cors.clone(),
        }
    }

    fn service_options(&self) -> ServiceOptions {
        ServiceOptions { max_queue: self.max_queue, policy: self.speculation }
    }

    fn many(&self) -> Many {
        Many { max_requests: self.max_requests, cache_tokens: self.cache_tokens }
    }
}

/// A name as it is, a path without its folders and without `.gguf`.
fn served_name(model: &str) -> String {
    let path = Path::new(model);
    let name = path.file_name().filter(|_| path.exists()).and_then(|name| name.to_str()).unwrap_or(model);
    name.strip_suffix(".gguf").unwrap_or(name).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_called_by_its_name() {
        assert_eq!(served_name("org/name"), "org/name");
        assert_eq!(served_name(concat!(env!("CARGO_MANIFEST_DIR"), "/src/cli")), "cli");
        let file = tempfile::NamedTempFile::with_suffix(".gguf").unwrap();
        let path = file.path();
        assert_eq!(served_name(path.to_str().unwrap()), path.file_stem().unwrap().to_str().unwrap());
    }
}

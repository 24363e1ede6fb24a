//! Runs a plan: one measurement after the other, each with as many tasks as it has streams or requests.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Builder;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, sleep_until};

use super::answer::Record;
use super::client::Client;
use super::requests::Requests;
use super::{End, Error, Load, Plan, Policy, Report};

/// The server may run on the same machine: it needs the cores more.
const THREADS: usize = 2;
/// Streams that warm a server up for an open load.
const WARM_UP_STREAMS: usize = 8;
/// A stream whose request failed waits so long, lest a server that refuses be asked a thousand times a second.
const PAUSE: Duration = Duration::from_millis(20);
/// How often whoever watches is heard, at least.
const TICK: Duration = Duration::from_millis(100);

/// What a run is doing.
pub enum Event<'a> {
    Measurement {
        load: Load,
        policy: &'a Policy,
    },
    /// A request that counts has ended.
    Request {
        failed: bool,
    },
    Tick,
    Measured,
}

/// Hears of every event; its answer says whether to go on.
pub type Watch<'a> = dyn FnMut(Event<'_>) -> ControlFlow<()> + 'a;

/// Runs all of it into the report, which holds the finished measurements even where this is ended early; it is partial
/// then.
pub fn run(plan: &Arc<Plan>, report: &mut Report, watch: &mut Watch<'_>) -> Result<(), Error> {
    report.partial = true;
    let threads = Builder::new_multi_thread().worker_threads(THREADS).enable_all().build().map_err(Error::Threads)?;
    threads.block_on(async {
        let client = Arc::new(Client::connect(plan).await?);
        let requests = Arc::new(Requests::new(plan.clone(), &client.model));
        report.model = client.model.clone();
        for (load, policy) in plan.measurements() {
            if watch(Event::Measurement { load, policy: &policy }).is_break() {
                return Ok(());
            }
            let setting = Setting { client: client.clone(), requests: requests.clone(), policy: policy.clone() };
            let ControlFlow::Continue(records) = measure(setting, load, watch).await else { return Ok(()) };
            report.add(load, policy, &records);
            if watch(Event::Measured).is_break() {
                return Ok(());
            }
        }
        report.partial = false;
        Ok(())
    })
}

/// Whom a measurement asks, and for what.
#[derive(Clone)]
struct Setting {
    client: Arc<Client>,
    requests: Arc<Requests>,
    policy: Policy,
}

async fn measure(setting: Setting, load: Load, watch: &mut Watch<'_>) -> ControlFlow<(), Vec<Record>> {
    let plan = setting.requests.plan.clone();
    let streams = match load {
        Load::Streams(streams) => streams,
        Load::Rate(_) => WARM_UP_STREAMS,
    };
    let warm_up = plan.warm_up.unwrap_or(streams);
    let phase = Phase::new(setting.clone(), true, End::Requests(warm_up));
    phase.closed(streams.min(warm_up)).collect(&mut |_| watch(Event::Tick)).await?;

    let phase = Phase::new(setting, false, plan.end);
    let running = match load {
        Load::Streams(streams) => phase.closed(streams),
        Load::Rate(rate) => phase.open(rate),
    };
    running.collect(watch).await
}

/// What the tasks of a load share: warming up is a load of its own.
struct Phase {
    setting: Setting,
    warms_up: bool,
    end: End,
    clock: Instant,
    asked: AtomicUsize,
}

impl Phase {
    fn new(setting: Setting, warms_up: bool, end: End) -> Arc<Phase> {
        Arc::new(Phase { setting, warms_up, end, clock: Instant::now(), asked: AtomicUsize::new(0) })
    }

    fn closed(self: Arc<Phase>, streams: usize) -> Running {
        let (sender, records) = unbounded_channel();
        let mut tasks = JoinSet::new();
        for stream in 0..streams {
            let (phase, sender) = (self.clone(), sender.clone());
            tasks.spawn(async move {
                while let Some(index) = phase.next() {
                    let record = phase.ask(index, stream).await;
                    let failed = record.outcome.is_err();
                    // Nobody listens any more once the run was ended.
                    if sender.send(record).is_err() {
                        return;
                    }
                    if failed {
                        sleep(PAUSE).await;
                    }
                }
            });
        }
        Running { tasks, records }
    }

    fn open(self: Arc<Phase>, rate: f64) -> Running {
        let (sender, records) = unbounded_channel();
        let mut tasks = JoinSet::new();
        for (index, time) in self.setting.requests.arrivals(rate).into_iter().enumerate() {
            let (phase, sender) = (self.clone(), sender.clone());
            tasks.spawn(async move {
                sleep_until((phase.clock + time).into()).await;
                // Nobody listens any more once the run was ended.
                let _ = sender.send(phase.ask(index, 0).await);
            });
        }
        Running { tasks, records }
    }

    /// The next request that a stream is to send, if there is one left.
    fn next(&self) -> Option<usize> {
        let index = self.asked.fetch_add(1, Ordering::Relaxed);
        let more = match self.end {
            End::Requests(requests) => index < requests,
            End::After(end) => self.clock.elapsed() < end,
        };
        more.then_some(index)
    }

    async fn ask(&self, index: usize, stream: usize) -> Record {
        let Setting { client, requests, policy } = &self.setting;
        let body = if self.warms_up { requests.warm_up_body(index, policy) } else { requests.body(index, policy) };
        client.ask(&body, self.clock, stream).await
    }
}

/// A load that is on. Dropping it ends its requests.
struct Running {
    tasks: JoinSet<()>,
    records: UnboundedReceiver<Record>,
}

impl Running {
    async fn collect(mut self, watch: &mut Watch<'_>) -> ControlFlow<(), Vec<Record>> {
        let mut records = Vec::new();
        let mut ticks = interval(TICK);
        loop {
            let event = tokio::select! {
                _ = ticks.tick() => Event::Tick,
                record = self.records.recv() => {
                    let Some(record) = record else { break };
                    let failed = record.outcome.is_err();
                    records.push(record);
                    Event::Request { failed }
                }
            };
            watch(event)?;
        }
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("a task of a load does not panic");
        }
        ControlFlow::Continue(records)
    }
}

//! Rounds in which the device drafts, on CUDA without a GPU: the drafter's op proposes what the oracle does, a draft model's
//! tree is the one that the host would grow, and whatever is proposed, the tokens are those of plain decoding.

#![cfg(feature = "cuda")]

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Mutex;

use treespark::backend::{Backend, BufferId, DeviceInfo, Extent, PassCost, PassId};
use treespark::draft::block::BlockDrafter;
use treespark::draft::model::ModelDrafter;
use treespark::draft::ngram::NgramDrafter;
use treespark::draft::{Drafter, NoDrafter};
use treespark::network::{Limits, Network};
use treespark::scheduler::Scheduler;
use treespark::{Engine, FinishReason, Round, Sampling, Sequence, Statistics};
use treespark_kernel_gen::layout::{HEADER_WORDS, accepted_words, ngram_state_words};
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{BufferDesc, DType, MAX_NODES, Op, Pass, Request, Role, Row, TreeShape};
use treespark_models::dspark::MarkovKind;
use treespark_models::{Model, Speculator, Tensor};
use treespark_verify_tests::cases::{cuda_on_cpu, samplings, tiny_models};
use treespark_verify_tests::decoding::Guesser;
use treespark_verify_tests::oracle::Oracle;
use treespark_verify_tests::rng::Rng;

/// The emulation uses all cores.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const CONTEXT: usize = 96;

struct Job {
    prompt: Vec<u32>,
    sampling: Sampling,
    max_new_tokens: usize,
    stop_tokens: Vec<u32>,
}

impl Job {
    fn sequence(&self, engine: &Engine) -> Sequence {
        let Job { prompt, sampling, max_new_tokens, stop_tokens } = self;
        let vocab = engine.target().config().vocab_size;
        Sequence::new(prompt.clone(), sampling.clone(), *max_new_tokens, stop_tokens.clone(), CONTEXT, vocab)
    }

    fn run(&self, engine: &mut Engine) -> Done {
        let mut seq = self.sequence(engine);
        let (mut stats, mut rounds) = (Statistics::default(), Vec::new());
        engine.prefill(&mut seq, &mut stats, &mut |_| {}).unwrap();
        while seq.finished().is_none() {
            rounds.push(engine.round(&mut seq, &mut stats).unwrap());
        }
        engine.release(&mut seq);
        Done { tokens: seq.tokens().to_vec(), why: seq.finished().unwrap(), rounds }
    }
}

struct Done {
    tokens: Vec<u32>,
    why: FinishReason,
    rounds: Vec<Round>,
}

/// An engine on the emulation. With a shape the host drafts.
fn engine(model: &Model, drafter: Box<dyn Drafter>, shape: Option<TreeShape>) -> Option<Engine> {
    let mut backend = cuda_on_cpu(0)?;
    let limits = Limits::new(CONTEXT, 16);
    let target = Network::load(backend.as_mut(), model, limits, &mut |_, _| {}).unwrap();
    let scheduler = Scheduler::new(shape, 16, PassCost::new(&[(1, 1.0), (2, 1.001)]));
    Some(Engine::new(backend, target, drafter, scheduler, CONTEXT))
}

/// Plain decoding as the host drives it, on the device, and with the device's n-gram trees.
fn engines(model: &Model) -> Option<[Engine; 3]> {
    Some([
        engine(model, Box::new(NoDrafter), Some(TreeShape::root()))?,
        engine(model, Box::new(NoDrafter), None)?,
        engine(model, Box::new(NgramDrafter::default()), None)?,
    ])
}

/// A phrase of one to four tokens, over and over: models of random weights often answer with one of their own.
fn prompt(seed: u64, len: usize, vocab: u32) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    let phrase: Vec<u32> = (0..1 + seed % 4).map(|_| rng.below(vocab as usize) as u32).collect();
    phrase.into_iter().cycle().take(len).collect()
}

#[test]
fn what_the_device_drafts_changes_no_token() {
    let _guard = ONE_AT_A_TIME.lock();
    let (mut accepted, mut branches, mut sizes) = (0, 0, Vec::new());
    for path in tiny_models() {
        let model = Model::open(&path).unwrap();
        let vocab = model.config().vocab_size as u32;
        let Some([mut by_host, mut plain, mut ngram]) = engines(&model) else { return };
        // The host drafts where there is a penalty. Prompts are chosen so that guesses are accepted.
        let samplings = samplings().into_iter().filter(|(_, sampling)| sampling.repetition_penalty == 1.0);
        for (i, ((name, sampling), seed)) in samplings.zip([11, 6, 7, 10]).enumerate() {
            let job = Job { prompt: prompt(seed, 24, vocab), sampling, max_new_tokens: 24, stop_tokens: vec![] };
            let expected = job.run(&mut by_host).tokens;
            let done = job.run(&mut ngram);
            assert_eq!(done.tokens, expected, "{}, {name}", path.display());
            if i < 2 {
                assert_eq!(job.run(&mut plain).tokens, expected, "{}, {name}, no drafts", path.display());
            }
            accepted += done.rounds.iter().map(|round| round.accepted.draft_len()).sum::<usize>();
            branches += done.rounds.iter().filter(|round| !round.tree.shape().is_chain()).count();
            sizes.extend(done.rounds.iter().map(|round| round.tree.len()));
        }
    }
    println!("{accepted} drafts accepted, {branches} trees with branches");
    // The comparison would be empty without: drafts that are right, trees that are no chains, rounds without a draft, and
    // rounds of the largest pass. How many there are depends on what a row costs.
    assert!(accepted > 40 && branches > 0, "{accepted} accepted, {branches} branches");
    assert!(sizes.contains(&1) && sizes.iter().any(|&nodes| nodes > 4), "{sizes:?}");
}

/// A stop token inside a path, and every way to run out of tokens.
#[test]
fn sequences_end_where_plain_decoding_ends_them() {
    let _guard = ONE_AT_A_TIME.lock();
    let model = Model::open(&tiny_models()[0]).unwrap();
    let vocab = model.config().vocab_size as u32;
    let Some([mut by_host, mut plain, mut ngram]) = engines(&model) else { return };
    let job = |len: usize, max_new_tokens: usize, stop_tokens: &[u32]| {
        let sampling = Sampling::default();
        Job { prompt: prompt(3, len, vocab), sampling, max_new_tokens, stop_tokens: stop_tokens.to_vec() }
    };
    let long = job(40, 40, &[]).run(&mut by_host).tokens;
    let first_of = |at: usize| long[40..].iter().position(|token| *token == long[40 + at]).unwrap();
    for (job, why) in [
        (job(40, 40, &[long[40 + first_of(7)]]), FinishReason::StopToken),
        (job(40, 40, &[long[40 + first_of(12)]]), FinishReason::StopToken),
        (job(40, 1, &[]), FinishReason::Length),
        (job(40, 2, &[]), FinishReason::Length),
        (job(40, 9, &[]), FinishReason::Length),
        (job(1, 9, &[]), FinishReason::Length),
        (job(CONTEXT - 1, 9, &[]), FinishReason::Context),
        (job(CONTEXT - 9, 40, &[]), FinishReason::Context),
    ] {
        let expected = job.run(&mut by_host);
        assert_eq!(expected.why, why);
        for engine in [&mut plain, &mut ngram] {
            let done = job.run(engine);
            assert_eq!((done.tokens, done.why), (expected.tokens.clone(), why));
        }
    }
}

/// What lies on the device is one sequence's: others that come between are told of again.
#[test]
fn sequences_may_take_turns() {
    let _guard = ONE_AT_A_TIME.lock();
    let model = Model::open(&tiny_models()[1]).unwrap();
    let vocab = model.config().vocab_size as u32;
    let Some(mut engine) = engine(&model, Box::new(NgramDrafter::default()), None) else { return };
    let penalty = Sampling { repetition_penalty: 1.3, ..Sampling::default() };
    let jobs: Vec<Job> = [Sampling::default(), penalty, Sampling { temperature: 0.7, ..Sampling::default() }]
        .into_iter()
        .enumerate()
        .map(|(i, sampling)| Job {
            prompt: prompt(i as u64, 15, vocab),
            sampling,
            max_new_tokens: 12,
            stop_tokens: vec![],
        })
        .collect();
    let alone: Vec<Vec<u32>> = jobs.iter().map(|job| job.run(&mut engine).tokens).collect();

    let mut stats = Statistics::default();
    let mut sequences: Vec<Sequence> = jobs.iter().map(|job| job.sequence(&engine)).collect();
    for seq in &mut sequences {
        engine.prefill(seq, &mut stats, &mut |_| {}).unwrap();
    }
    while sequences.iter().any(|seq| seq.finished().is_none()) {
        for seq in sequences.iter_mut().filter(|seq| seq.finished().is_none()) {
            engine.round(seq, &mut stats).unwrap();
        }
    }
    let together: Vec<Vec<u32>> = sequences.iter().map(|seq| seq.tokens().to_vec()).collect();
    assert_eq!(together, alone);
}

/// A backend that may be told not to draft, and how often the host has waited for it.
struct Watched {
    inner: Box<dyn Backend>,
    drafts: bool,
    waits: Rc<Cell<usize>>,
}

impl Backend for Watched {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }

    fn drafts(&self) -> bool {
        self.drafts
    }

    fn load(&mut self, desc: &BufferDesc, parts: &[Tensor]) -> treespark::Result<BufferId> {
        self.inner.load(desc, parts)
    }

    fn alloc(&mut self, desc: &BufferDesc) -> treespark::Result<BufferId> {
        self.inner.alloc(desc)
    }

    fn free(&mut self, buffer: BufferId) {
        self.inner.free(buffer);
    }

    fn write(&mut self, buffer: BufferId, offset: usize, words: &[u32]) -> treespark::Result<()> {
        self.inner.write(buffer, offset, words)
    }

    fn read(&mut self, buffer: BufferId, offset: usize, len: usize) -> treespark::Result<Vec<u32>> {
        self.waits.set(self.waits.get() + 1);
        self.inner.read(buffer, offset, len)
    }

    fn compile(&mut self, pass: &Pass, buffers: &[BufferId]) -> treespark::Result<PassId> {
        self.inner.compile(pass, buffers)
    }

    fn join(&mut self, passes: &[PassId]) -> treespark::Result<PassId> {
        self.inner.join(passes)
    }

    fn run(&mut self, pass: PassId, extent: Extent) -> treespark::Result<()> {
        self.inner.run(pass, extent)
    }
}

/// An engine whose draft model is its target, and how often it has waited.
fn with_draft_model(model: &Model, shape: Option<&TreeShape>, drafts: bool) -> Option<(Engine, Rc<Cell<usize>>)> {
    let waits = Rc::new(Cell::new(0));
    let mut backend: Box<dyn Backend> = Box::new(Watched { inner: cuda_on_cpu(0)?, drafts, waits: waits.clone() });
    let max_nodes = shape.map_or(16, TreeShape::len);
    let limits = Limits::new(CONTEXT, max_nodes);
    let target = Network::load(backend.as_mut(), model, limits, &mut |_, _| {}).unwrap();
    let vocab = model.config().vocab_size;
    let drafter = ModelDrafter::load(backend.as_mut(), model, vocab, limits, &mut |_, _| {}).unwrap();
    let scheduler = Scheduler::new(shape.cloned(), max_nodes, PassCost::new(&[(1, 1.0), (2, 1.001)]));
    Some((Engine::new(backend, target, Box::new(drafter), scheduler, CONTEXT), waits))
}

/// Trees of every kind, cut where few tokens are left, accepted whole and in part: they are equal, and so is the end.
#[test]
fn a_draft_model_grows_the_same_trees_with_one_wait() {
    let _guard = ONE_AT_A_TIME.lock();
    // More nodes than a mask word has bits; levels that are no ranges of nodes; none: the drafter's own, cut to 16 nodes.
    let shapes = ["2x2x2x2x2", "parents:0,0,1,2,3,0,5,1,2,8", "chain:5", "20"].map(Some).into_iter().chain([None]);
    for (i, text) in shapes.enumerate() {
        let model = Model::open(&tiny_models()[i % 3]).unwrap();
        let vocab = model.config().vocab_size as u32;
        let shape: Option<TreeShape> = text.map(|text| text.parse().unwrap());
        let Some((mut device, waits)) = with_draft_model(&model, shape.as_ref(), true) else { return };
        let (mut host, waits_by_host) = with_draft_model(&model, shape.as_ref(), false).unwrap();
        let mut levels = 0;
        for (temperature, seed) in [(0.0, 0), (0.5, 1)] {
            let sampling = Sampling { temperature, seed, ..Sampling::default() };
            let job = Job { prompt: prompt(i as u64, 20, vocab), sampling, max_new_tokens: 10, stop_tokens: vec![] };
            let (before, before_by_host) = (waits.get(), waits_by_host.get());
            let [got, want] = [&mut device, &mut host].map(|engine| job.run(engine));
            for (round, (got, want)) in got.rounds.iter().zip(&want.rounds).enumerate() {
                let what = format!("{text:?}, temperature {temperature}, round {round}");
                assert_eq!((&got.tree, &got.accepted), (&want.tree, &want.accepted), "{what}");
            }
            assert_eq!(got.tokens, want.tokens);
            let (waited, by_host) = (waits.get() - before, waits_by_host.get() - before_by_host);
            // Once for the prompt, then once for the draft and once for the target.
            let at_most = 1 + 2 * got.rounds.len();
            assert!(waited <= at_most && waited <= by_host, "{waited} waits, by the host {by_host}");
            levels += by_host - waited;
            let accepted: Vec<usize> = got.rounds.iter().map(|round| round.accepted.draft_len()).collect();
            println!("{text:?}: {accepted:?} accepted, {waited} waits, by the host {by_host}");
        }
        assert_eq!(levels == 0, text == Some("20"), "only a star has one level");
    }
}

const REQUESTS: usize = 4;
const HISTORY: usize = 192;

/// The drafter's op alone on one backend, between rounds that the test makes up.
struct Drafting {
    backend: Box<dyn Backend>,
    pass: PassId,
    buffers: Vec<BufferId>,
    sizes: Vec<usize>,
}

/// Places of the buffers in the pass.
const ROWS: usize = 0;
const REQUEST_WORDS: usize = 1;
const ACCEPTED: usize = 3;
const HISTORIES: usize = 4;
const STATES: usize = 5;

impl Drafting {
    fn new(mut backend: Box<dyn Backend>, nodes: usize, row_cost: f32) -> Drafting {
        let mut pass = Pass::new("draft", 1);
        let mut add = |name: &str, shape: &[usize]| pass.add(name, Role::Input, DType::U32, shape);
        let batch = Batch {
            rows: add("rows", &[REQUESTS * nodes, Row::WORDS]),
            requests: add("requests", &[HEADER_WORDS + REQUESTS * Request::WORDS]),
            pages: add("pages", &[REQUESTS, 1]),
        };
        let accepted = add("accepted", &[REQUESTS, accepted_words(MAX_NODES)]);
        let history = add("history", &[REQUESTS, HISTORY]);
        let state = add("state", &[REQUESTS, ngram_state_words(nodes)]);
        pass.ops.push(Op::DraftNgram { batch, accepted, history, state, row_cost });
        pass.check().unwrap();
        let buffers: Vec<BufferId> = pass.buffers.iter().map(|desc| backend.alloc(desc).unwrap()).collect();
        let sizes = pass.buffers.iter().map(|desc| desc.len()).collect();
        Drafting { pass: backend.compile(&pass, &buffers).unwrap(), backend, buffers, sizes }
    }

    fn write(&mut self, buffer: usize, offset: usize, words: &[u32]) {
        self.backend.write(self.buffers[buffer], offset, words).unwrap();
    }

    fn run(&mut self) -> Vec<Vec<u32>> {
        self.backend.run(self.pass, Extent { rows: 0, requests: REQUESTS, keys: 0 }).unwrap();
        [ROWS, REQUEST_WORDS, HISTORIES, STATES]
            .map(|buffer| self.backend.read(self.buffers[buffer], 0, self.sizes[buffer]).unwrap())
            .to_vec()
    }
}

/// What a target might accept of a request's tree: at each node a child's token, or another.
fn made_up_round(rows: &[Row], alphabet: usize, rng: &mut Rng) -> Vec<u32> {
    let mut words = vec![0; accepted_words(MAX_NODES)];
    let (mut node, mut n) = (0, 0);
    while let Some(at) = rows.iter().find(|row| row.node == node) {
        let depth = at.path().count();
        let is_child = |row: &&Row| row.is_ancestor(node as usize) && row.path().count() == depth + 1;
        let children: Vec<&Row> = rows.iter().filter(is_child).collect();
        let hit = !children.is_empty() && rng.below(4) > 0;
        let token = if hit { rng.pick(&children).token } else { rng.below(alphabet) as u32 };
        (words[1 + n], words[1 + MAX_NODES + n]) = (node, token);
        n += 1;
        let Some(child) = children.iter().find(|row| row.token == token) else { break };
        node = child.node;
    }
    words[0] = n as u32;
    words
}

#[test]
fn the_device_drafts_what_the_oracle_drafts() {
    let _guard = ONE_AT_A_TIME.lock();
    for (seed, (nodes, alphabet, row_cost)) in
        [(16, 3, 0.001f32), (16, 12, 0.02), (64, 4, 0.0), (5, 2, 0.3), (1, 3, 0.01)].into_iter().enumerate()
    {
        let Some(cuda) = cuda_on_cpu(0) else { return };
        let mut both = [cuda, Box::new(Oracle::new()) as Box<dyn Backend>].map(|b| Drafting::new(b, nodes, row_cost));
        let mut rng = Rng::new(seed as u64);
        // One request is stopped from the start, one is at its limit but for a token.
        let mut requests = vec![0, REQUESTS as u32, 0, 0];
        for request in 0..REQUESTS {
            let len = 1 + rng.below(60);
            let limit = [HISTORY, 0, len + 1, 90][request] as u32;
            let history: Vec<u32> = (0..len).map(|_| rng.below(alphabet) as u32).collect();
            requests.extend([&[len as u32 - 1, 0, 0][..], &[7; Request::WORDS - 3]].concat());
            for drafting in &mut both {
                drafting.write(HISTORIES, request * HISTORY, &history);
                drafting.write(STATES, request * ngram_state_words(nodes), &[limit]);
            }
        }
        both.iter_mut().for_each(|drafting| drafting.write(REQUEST_WORDS, 0, &requests));
        let (mut largest, mut stopped) = (0, 0);
        for round in 0..60 {
            let [got, want] = both.each_mut().map(Drafting::run);
            for (name, i) in [("rows", 0), ("requests", 1), ("history", 2), ("state", 3)] {
                let differ = (0..want[i].len()).find(|&at| got[i][at] != want[i][at]);
                let values = differ.map(|at| (at, got[i][at], want[i][at]));
                assert_eq!(values, None, "{name} (place, CUDA, oracle), round {round}, up to {nodes} nodes");
            }
            for request in 0..REQUESTS {
                let Request { first_row, n_rows, .. } = Request::read(&want[1], request);
                let rows: Vec<Row> =
                    (first_row..first_row + n_rows).map(|row| Row::read(&want[0], row as usize)).collect();
                (largest, stopped) = (largest.max(rows.len()), stopped + usize::from(rows.is_empty()));
                let accepted = made_up_round(&rows, alphabet, &mut rng);
                for drafting in &mut both {
                    drafting.write(ACCEPTED, request * accepted_words(MAX_NODES), &accepted);
                }
            }
        }
        println!("up to {nodes} nodes: {largest} rows at most, {stopped} times none");
        assert!(stopped > 60 && (nodes == 1 || largest > 2), "{stopped} {largest}");
    }
}

/// Trees of many sequences, as the device grows them from a confidence head: those that the host would grow.
#[test]
fn trees_of_many_are_as_confident_as_the_hosts() {
    let _guard = ONE_AT_A_TIME.lock();
    let path = tiny_models().into_iter().next().unwrap();
    let model = Model::open(&path).unwrap();
    let config = model.config().clone();
    let guesser = Guesser::Dspark {
        layers: 1,
        block: 4,
        first: 0,
        markov: Some((MarkovKind::Vanilla, 8)),
        confidence: Some(true),
        own: false,
    };
    let drafter = guesser.speculator(&config).unwrap();
    let speculator = Speculator::random(drafter.clone(), &config, 5);
    let rounds = |on_the_host: bool| {
        let mut backend = cuda_on_cpu(0)?;
        let limits = Limits::new(CONTEXT, 16).for_many(2, drafter.block().rows, true).unwrap();
        let target =
            Network::load_with_speculator(backend.as_mut(), &model, Some(&speculator), limits, &mut |_, _| {}).unwrap();
        let by_blocks = Box::new(BlockDrafter::load(&speculator).unwrap());
        let scheduler = Scheduler::new(None, 16, PassCost::new(&[(1, 1.0), (2, 1.001)]));
        let engine = Engine::new(backend, target, by_blocks, scheduler, CONTEXT);
        let mut engine = if on_the_host { engine.drafting_on_the_host() } else { engine };
        let jobs = [1, 2].map(|seed| Job {
            prompt: prompt(seed, 12, config.vocab_size as u32),
            sampling: Sampling::default(),
            max_new_tokens: 12,
            stop_tokens: vec![],
        });
        let mut seqs = jobs.map(|job| job.sequence(&engine));
        let mut done = Vec::new();
        while seqs.iter().any(|seq| seq.finished().is_none()) {
            let mut going: Vec<&mut Sequence> = seqs.iter_mut().filter(|seq| seq.finished().is_none()).collect();
            for (_, round) in engine.rounds(&mut going, &mut Statistics::default()).unwrap() {
                done.push(round.unwrap());
            }
        }
        Some(done)
    };
    let Some(by_device) = rounds(false) else { return };
    let by_host = rounds(true).unwrap();
    assert_eq!(by_device.len(), by_host.len());
    for (device, host) in by_device.iter().zip(&by_host) {
        // The device stops where no further node can pay.
        assert!(device.tree.len() <= host.tree.len(), "{:?} for {:?}", device.survival, host.survival);
        let pairs = device.survival.iter().zip(&host.survival);
        assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 1e-4), "{:?} for {:?}", device.survival, host.survival);
    }
    let branches = by_device.iter().filter(|round| !round.tree.shape().is_chain()).count();
    assert!(branches > 4, "{branches} trees with branches");
}

//! A target's own MTP module: what it guesses is what the Hugging Face implementation guesses (see `fixtures/parity/README.md`),
//! and speculation with it is plain decoding, sooner.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use treespark::backend::{Backend, PassCost};
use treespark::cpu::CpuBackend;
use treespark::draft::mtp::MtpDrafter;
use treespark::draft::{Drafter, NoDrafter, Plan};
use treespark::network::{Limits, Network};
use treespark::scheduler::Scheduler;
use treespark::{Engine, Sampling, Sequence, Statistics};
use treespark_kernel_gen::TreeShape;
use treespark_models::{Model, Speculator};
use treespark_verify_tests::cases::{self, samplings};
use treespark_verify_tests::oracle::Oracle;
use treespark_verify_tests::shared::Shared;

const CONTEXT: usize = 160;
const TOP_K: usize = 8;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/parity/tiny-deepseek-v3-mtp")
}

fn words(file: &SafeTensors, name: &str) -> Vec<u32> {
    let bytes = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data().to_vec();
    bytes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn sequence(tokens: &[u32], sampling: &Sampling, new: usize, vocab: usize) -> Sequence {
    Sequence::new(tokens.to_vec(), sampling.clone(), new, vec![], CONTEXT, vocab)
}

/// Chains of guesses behind texts of several lengths.
fn guesses_agree(backend: &mut dyn Backend) {
    let model = Model::open(&fixture()).unwrap();
    let speculator = Speculator::of_target(&model).unwrap();
    let bytes = std::fs::read(fixture().join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let chain = TreeShape::chain(4).unwrap();
    let plan = Plan { shape: Some(chain), max_nodes: 64, max_depth: 64, reach: 64 };
    let limits = Limits { top_k: TOP_K, ..Limits::new(CONTEXT, 16) };
    let mut target = Network::load_with_speculator(backend, &model, Some(&speculator), limits, &mut |_, _| {}).unwrap();
    for i in 0..2 {
        let tokens = words(&file, &format!("tokens.{i}"));
        let lengths = words(&file, &format!("mtp.lengths.{i}"));
        for (length, want) in lengths.into_iter().zip(words(&file, &format!("mtp.chain.{i}")).chunks(4)) {
            let text = &tokens[..=length as usize];
            let mut seq = sequence(text, &Sampling::default(), 40, model.config().vocab_size);
            target.extend(backend, &mut seq.kv, &text[..text.len() - 1], &mut |_| {}).unwrap();
            target.note_prompt(&mut seq, text.len() - 1);
            let draft = MtpDrafter::new().unwrap().propose(backend, &mut target, &mut seq, &plan).unwrap();
            let got: Vec<u32> = (1..draft.tree.len()).map(|node| draft.tree.token(node)).collect();
            assert_eq!(got, want, "sequence {i}, behind {length} tokens");
            target.release(&mut seq.kv);
        }
    }
}

#[test]
fn guesses_are_those_of_the_reference() {
    guesses_agree(&mut CpuBackend::new(None));
}

#[cfg(feature = "wgpu")]
#[test]
fn guesses_on_wgpu_are_those_of_the_reference() {
    if let Some(mut backend) = cases::gpu() {
        guesses_agree(&mut *backend);
    }
}

#[cfg(feature = "cuda")]
#[test]
fn guesses_on_cuda_are_those_of_the_reference() {
    if let Some(mut backend) = cases::cuda_on_cpu(0) {
        guesses_agree(&mut *backend);
    }
}

fn engine(model: &Model, with_mtp: bool, shape: Option<&TreeShape>) -> Engine {
    engine_on(Box::new(CpuBackend::new(None)), model, with_mtp, shape)
}

fn engine_on(mut backend: Box<dyn Backend>, model: &Model, with_mtp: bool, shape: Option<&TreeShape>) -> Engine {
    let limits = Limits { top_k: TOP_K, ..Limits::new(CONTEXT, shape.map_or(64, TreeShape::len)) };
    let speculator = with_mtp.then(|| Speculator::of_target(model).unwrap());
    let target =
        Network::load_with_speculator(backend.as_mut(), model, speculator.as_ref(), limits, &mut |_, _| {}).unwrap();
    let scheduler = Scheduler::new(shape.cloned(), 64, PassCost::new(&[(1, 1.0), (2, 1.001)]));
    let drafter: Box<dyn Drafter> = if with_mtp { Box::new(MtpDrafter::new().unwrap()) } else { Box::new(NoDrafter) };
    Engine::new(backend, target, drafter, scheduler, CONTEXT)
}

/// Where the device can draft, and so has kernels that take time to compile.
#[test]
fn nothing_of_the_module_is_compiled_once_a_prompt_has_come() {
    let model = Model::open(&fixture()).unwrap();
    let vocab = model.config().vocab_size;
    for shape in [None, Some("4x2x1")] {
        let backend = Shared::new(Box::new(Oracle::new()));
        let tree: Option<TreeShape> = shape.map(|text| text.parse().unwrap());
        let mut engine = engine_on(backend.share(), &model, true, tree.as_ref());
        let of_module = || backend.compiled().iter().filter(|name| ["keep pairs", "guess"].contains(&&***name)).count();
        engine.prepare().unwrap();
        let prepared = of_module();
        let mut seq = sequence(&[3, 1, 4, 1, 5, 9], &Sampling::default(), 12, vocab);
        let mut stats = Statistics::default();
        engine.generate(&mut seq, &mut stats).unwrap();
        assert!(backend.runs()["gather"] > stats.rounds as u64, "the module has guessed");
        assert_eq!(of_module(), prepared, "tree {shape:?}: {:?}", backend.compiled());
    }
}

#[test]
fn speculation_equals_plain_decoding() {
    let model = Model::open(&fixture()).unwrap();
    let vocab = model.config().vocab_size;
    let prompt: Vec<u32> = (0..30).map(|i| (i * i * 7 + i % 5) % vocab as u32).collect();
    for (name, sampling) in samplings() {
        let generate = |mut engine: Engine| {
            let mut seq = sequence(&prompt, &sampling, 60, vocab);
            let mut stats = Statistics::default();
            engine.generate(&mut seq, &mut stats).unwrap();
            (seq.tokens().to_vec(), stats)
        };
        let (plain, _) = generate(engine(&model, false, None));
        for shape in [None, Some("chain:1"), Some("chain:4"), Some("4x2x1"), Some("parents:0,0,1,2,3,0,5,1,2,8")] {
            let tree: Option<TreeShape> = shape.map(|text| text.parse().unwrap());
            let (got, stats) = generate(engine(&model, true, tree.as_ref()));
            assert_eq!(got, plain, "{name}, tree {shape:?}");
            assert!(stats.rounds > 0);
        }
    }
}

/// Sequences that come and go share passes: prompts in parts, trees, and pairs of all that was accepted.
#[test]
fn sequences_together_say_what_each_says_alone() {
    let model = Model::open(&fixture()).unwrap();
    let vocab = model.config().vocab_size;
    let asks: Vec<(Vec<u32>, Sampling)> = [1, 5, 30, 47, 18]
        .into_iter()
        .zip(samplings())
        .map(|(n, (_, sampling))| ((0..n).map(|i| (i * i * 5 + n) % vocab as u32).collect(), sampling))
        .collect();
    let alone: Vec<Vec<u32>> = asks
        .iter()
        .map(|(prompt, sampling)| {
            let mut seq = sequence(prompt, sampling, 40, vocab);
            engine(&model, false, None).generate(&mut seq, &mut Statistics::default()).unwrap();
            seq.tokens().to_vec()
        })
        .collect();

    let mut backend = CpuBackend::new(None);
    let limits = Limits { top_k: TOP_K, ..Limits::new(CONTEXT, 16) }.for_many(4, 1, false).unwrap();
    let speculator = Speculator::of_target(&model).unwrap();
    let target =
        Network::load_with_speculator(&mut backend, &model, Some(&speculator), limits, &mut |_, _| {}).unwrap();
    let scheduler = Scheduler::new(Some("4x2x1".parse().unwrap()), 16, PassCost::new(&[(1, 1.0), (2, 1.001)]));
    let drafter = Box::new(MtpDrafter::new().unwrap());
    let mut engine = Engine::new(Box::new(backend), target, drafter, scheduler, CONTEXT);
    engine.serve_many(&mut |_, _| {}).unwrap();

    let mut waiting: Vec<(usize, Sequence)> =
        asks.iter().map(|(prompt, sampling)| sequence(prompt, sampling, 40, vocab)).enumerate().rev().collect();
    let (mut running, mut stats) = (Vec::<(usize, Sequence)>::new(), Statistics::default());
    while !running.is_empty() || !waiting.is_empty() {
        // One joins a round, up to four at once.
        if running.len() < 4 {
            running.extend(waiting.pop());
        }
        let mut seqs: Vec<&mut Sequence> = running.iter_mut().map(|(_, seq)| seq).collect();
        for (_, round) in engine.rounds(&mut seqs, &mut stats).unwrap() {
            round.unwrap();
        }
        for at in (0..running.len()).rev().filter(|&at| running[at].1.finished().is_some()).collect::<Vec<_>>() {
            let (which, mut seq) = running.remove(at);
            assert_eq!(seq.tokens(), alone[which], "sequence {which}");
            engine.release(&mut seq);
        }
    }
}

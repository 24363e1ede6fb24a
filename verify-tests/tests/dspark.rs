//! DSpark drafters against DeepSpec's own classes, on fixtures that they made (see `fixtures/deepspec/README.md`).

#[cfg(feature = "cuda")]
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;
use treespark::backend::{Backend, PassCost};
use treespark::cpu::CpuBackend;
use treespark::draft::block::BlockDrafter;
use treespark::draft::{Drafter, NoDrafter};
use treespark::network::{Limits, Network};
use treespark::scheduler::Scheduler;
use treespark::{Engine, Sampling, Sequence, Statistics};
use treespark_kernel_gen::DType;
use treespark_models::{Config, MarkovState, Model, Speculator};
#[cfg(feature = "wgpu")]
use treespark_verify_tests::cases;
use treespark_verify_tests::cases::samplings;
use treespark_verify_tests::oracle::Oracle;
use treespark_verify_tests::shared::Shared;

const TOLERANCE: f32 = 1e-4;
const CONTEXT: usize = 128;
const LIMITS: Limits = Limits::new(CONTEXT, 16);

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/deepspec").join(name)
}

fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let bytes = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data();
    bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect()
}

fn close(what: &str, got: f32, want: f32) {
    assert!((got - want).abs() < TOLERANCE, "{what}: {got}, not {want}");
}

/// Hidden states, logits of the parallel stage, Markov logits and confidences of three rounds.
fn rounds_agree(backend: &mut dyn Backend, name: &str) {
    let model = Model::open(&fixture(name).join("target")).unwrap();
    let speculator = Speculator::open(&fixture(name).join("draft"), model.config()).unwrap();
    let heads = speculator.sequential_heads().unwrap();
    let mut network =
        Network::load_with_speculator(backend, &model, Some(&speculator), LIMITS, &mut |_, _| {}).unwrap();

    let json: Value = serde_json::from_slice(&std::fs::read(fixture(name).join("expected.json")).unwrap()).unwrap();
    let bytes = std::fs::read(fixture(name).join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (text, prompt) = (tokens(&json["plain"]), tokens(&json["prompt"]).len());
    for round in 0..3 {
        // Nothing is ever accepted: each round begins one token later. Once in one go, once token by token.
        let start = prompt + round;
        let mut seq =
            Sequence::new(text[..=start].to_vec(), Sampling::default(), 40, vec![], CONTEXT, model.config().vocab_size);
        network.extend(backend, &mut seq.kv, &text[..prompt], &mut |_| {}).unwrap();
        for token in &text[prompt..start] {
            network.extend(backend, &mut seq.kv, &[*token], &mut |_| {}).unwrap();
        }
        let block = network.draft_blocks(backend, &mut [&mut seq], usize::MAX).unwrap().remove(0);
        let rows = |kind: &str| floats(&file, &format!("round{round}.{kind}"));
        let (hidden, base, logits) = (rows("hidden"), rows("base"), rows("logits"));
        let mut previous = text[start];
        let mut state = MarkovState::default();
        assert_eq!(block.hidden.len(), 5);
        for row in 0..5 {
            let what = |of: &str| format!("{name}, round {round}, row {row}, {of}");
            for (i, got) in block.hidden[row].iter().enumerate() {
                close(&what("hidden"), *got, hidden[row * 64 + i]);
            }
            let of_row = |all: &[f32], token: u32| all[row * 256 + token as usize];
            for &(token, score) in &block.candidates[row] {
                close(&what("base"), score, of_row(&base, token));
            }
            let worst = block.candidates[row].last().unwrap().1;
            let larger = (0..256).filter(|&token| of_row(&base, token) > worst + TOLERANCE).count();
            assert!(larger < block.candidates[row].len(), "{}", what("candidates"));

            let step = heads.step(row + 1, previous, &block.hidden[row], &state);
            for token in 0..256 {
                let got = of_row(&base, token) + heads.bias(&step, token);
                close(&what("Markov logits"), got, of_row(&logits, token));
            }
            if name != "dflash" {
                close(&what("confidence"), step.confidence.unwrap(), rows("confidence")[row]);
            }
            let argmax = (0..256).max_by(|&a, &b| of_row(&logits, a).total_cmp(&of_row(&logits, b)));
            (previous, state) = (argmax.unwrap(), step.state);
        }
        network.release(&mut seq.kv);
    }
}

/// Whole generations with chains of five: every round's draft, and the text, which is that of plain decoding.
fn generations_agree(backend: Box<dyn Backend>, name: &str) {
    let model = Model::open(&fixture(name).join("target")).unwrap();
    let speculator = Speculator::open(&fixture(name).join("draft"), model.config()).unwrap();
    let json: Value = serde_json::from_slice(&std::fs::read(fixture(name).join("expected.json")).unwrap()).unwrap();
    let (text, prompt) = (tokens(&json["plain"]), tokens(&json["prompt"]));

    let mut backend = backend;
    let network = Network::load_with_speculator(backend.as_mut(), &model, Some(&speculator), LIMITS, &mut |_, _| {});
    let scheduler = Scheduler::new(Some("chain:5".parse().unwrap()), 16, PassCost::new(&[(1, 1.0), (2, 1.001)]));
    let drafter = Box::new(BlockDrafter::load(&speculator).unwrap());
    let mut engine = Engine::new(backend, network.unwrap(), drafter, scheduler, CONTEXT);
    // The first anchor is part of the prompt here.
    let new_tokens = text.len() - prompt.len() - 1;
    let vocab = model.config().vocab_size;
    let mut seq =
        Sequence::new(text[..=prompt.len()].to_vec(), Sampling::default(), new_tokens, vec![], CONTEXT, vocab);
    let mut stats = Statistics::default();
    engine.prefill(&mut seq, &mut stats, &mut |_| {}).unwrap();
    for expected in json["rounds"].as_array().unwrap() {
        if seq.finished().is_some() {
            break;
        }
        let round = engine.round(&mut seq, &mut stats).unwrap();
        let drafted: Vec<u32> = (1..round.tree.len()).map(|node| round.tree.token(node)).collect();
        // The last rounds are cut to the tokens that may still come.
        let want = tokens(&expected["draft_tokens"]);
        assert_eq!(drafted, want[..drafted.len()], "{name}, round {}", stats.rounds);
    }
    assert_eq!(seq.tokens(), text, "{name}");
}

#[test]
fn drafters_agree_on_the_oracle() {
    ["vanilla", "rnn", "dflash"].into_iter().for_each(|name| rounds_agree(&mut Oracle::new(), name));
}

#[test]
fn drafters_agree_on_the_cpu() {
    for name in ["vanilla", "rnn", "dflash"] {
        rounds_agree(&mut CpuBackend::new(None), name);
        generations_agree(Box::new(CpuBackend::new(None)), name);
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn drafters_agree_on_wgpu() {
    for name in ["vanilla", "rnn", "dflash"] {
        let Some(mut backend) = cases::gpu() else { return };
        rounds_agree(&mut *backend, name);
        generations_agree(backend, name);
    }
}

/// Where the device drafts: rounds emit what plain decoding does, and their trees are those that the host would grow.
#[cfg(feature = "cuda")]
#[test]
fn drafters_agree_where_the_device_drafts() {
    use treespark_kernel_gen::MAX_NODES;
    use treespark_verify_tests::cases::cuda_on_cpu;

    for name in ["vanilla", "dflash"] {
        let Some(mut backend) = cuda_on_cpu(0) else { return };
        rounds_agree(&mut *backend, name);
        let json: Value = serde_json::from_slice(&std::fs::read(fixture(name).join("expected.json")).unwrap()).unwrap();
        let (text, prompt) = (tokens(&json["plain"]), tokens(&json["prompt"]));
        let engine = |mut backend: Box<dyn Backend>| {
            let model = Model::open(&fixture(name).join("target")).unwrap();
            let speculator = Speculator::open(&fixture(name).join("draft"), model.config()).unwrap();
            let limits = Limits { max_nodes: MAX_NODES, ..LIMITS };
            let network =
                Network::load_with_speculator(backend.as_mut(), &model, Some(&speculator), limits, &mut |_, _| {});
            let scheduler = Scheduler::new(None, 64, PassCost::new(&[(1, 1.0), (2, 1.0)]));
            let drafter = Box::new(BlockDrafter::load(&speculator).unwrap());
            Engine::new(backend, network.unwrap(), drafter, scheduler, CONTEXT)
        };
        let mut engines = [engine(backend), engine(Box::new(CpuBackend::new(None)))];
        // Rounds by where they began: the device verifies other numbers of nodes than the host.
        let rounds = engines.each_mut().map(|engine| {
            let mut seq = Sequence::new(prompt.clone(), Sampling::default(), 12, vec![], CONTEXT, 256);
            let (mut stats, mut rounds) = (Statistics::default(), HashMap::new());
            engine.prefill(&mut seq, &mut stats, &mut |_| {}).unwrap();
            while seq.finished().is_none() {
                rounds.insert(seq.tokens().len(), engine.round(&mut seq, &mut stats).unwrap());
            }
            assert_eq!(seq.tokens(), &text[..prompt.len() + 12], "{name}");
            rounds
        });
        let mut drafted = 0;
        for (start, by_device) in &rounds[0] {
            let Some(by_host) = rounds[1].get(start) else { continue };
            let nodes = by_device.tree.len().min(by_host.tree.len());
            for node in 1..nodes {
                let place = |round: &treespark::Round| (round.tree.token(node), round.tree.shape().parent(node));
                assert_eq!(place(by_device), place(by_host), "{name}, node {node} of {nodes}");
                drafted += 1;
            }
        }
        assert!(drafted > 10, "{name}: {drafted} nodes were drafted");
    }
}

/// Random latents and experts, of the sizes that DeepSpec's drafters here read.
fn deepseek_target() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/parity/tiny-deepseek-v3/config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, size) in [("hidden_size", 64), ("vocab_size", 256), ("num_hidden_layers", 6)] {
        json[key] = size.into();
    }
    Model::random(Config::from_json(&json, DType::F32, &path).unwrap(), 1)
}

/// What an engine says with each sampling, and in how many rounds.
fn answers(engine: &mut Engine, samplings: &[Sampling]) -> (Vec<Vec<u32>>, usize) {
    let mut stats = Statistics::default();
    let answer = |sampling: &Sampling| {
        let prompt = (0..17).map(|i| (i * i * 7 + i % 5) % 256).collect();
        let mut seq = Sequence::new(prompt, sampling.clone(), 30, vec![], CONTEXT, 256);
        engine.generate(&mut seq, &mut stats).unwrap();
        seq.tokens().to_vec()
    };
    (samplings.iter().map(answer).collect(), stats.rounds)
}

/// Over latents and experts, drafts change nothing but the number of rounds. The drafters were made for another target, and
/// this one is random: some of many guesses are right.
fn drafts_over_latents_are_lossless(
    backend: Shared,
    drafters: &[&str],
    trees: &[Option<&str>],
    samplings: &[Sampling],
) {
    let model = deepseek_target();
    let engine = |speculator: Option<&Speculator>, tree: Option<&str>| {
        let (mut backend, limits) = (backend.share(), Limits::new(CONTEXT, 64));
        let network = Network::load_with_speculator(backend.as_mut(), &model, speculator, limits, &mut |_, _| {});
        let shape = tree.map(|text| text.parse().unwrap());
        let scheduler = Scheduler::new(shape, 64, PassCost::new(&[(1, 1.0), (2, 1.001)]));
        let drafter: Box<dyn Drafter> = match speculator {
            Some(speculator) => Box::new(BlockDrafter::load(speculator).unwrap()),
            None => Box::new(NoDrafter),
        };
        Engine::new(backend, network.unwrap(), drafter, scheduler, CONTEXT)
    };
    let (plain, of_plain) = answers(&mut engine(None, None), samplings);
    for name in drafters {
        let speculator = Speculator::open(&fixture(name).join("draft"), model.config()).unwrap();
        for tree in trees {
            let (got, rounds) = answers(&mut engine(Some(&speculator), *tree), samplings);
            assert_eq!(got, plain, "{name}, tree {tree:?}");
            assert!(rounds < of_plain, "{name}, tree {tree:?}: no draft was right in {rounds} rounds");
        }
    }
}

#[test]
fn drafts_over_latents_are_lossless_on_the_cpu() {
    let backend = Shared::new(Box::new(CpuBackend::new(Some(1))));
    let samplings: Vec<Sampling> = samplings().into_iter().step_by(2).map(|(_, sampling)| sampling).collect();
    drafts_over_latents_are_lossless(
        backend,
        &["vanilla", "rnn", "dflash"],
        &[None, Some("12x2x1"), Some("7x1"), Some("4x2"), Some("12")],
        &samplings,
    );
}

#[cfg(feature = "wgpu")]
#[test]
fn drafts_over_latents_are_lossless_on_wgpu() {
    if let Some(backend) = cases::gpu() {
        // Greedy, and at a temperature.
        let samplings = [0, 4].map(|which| samplings()[which].1.clone());
        drafts_over_latents_are_lossless(Shared::new(backend), &["vanilla"], &[Some("7x1")], &samplings);
    }
}

/// What does not fit the target is refused, with both values named.
#[test]
fn a_drafter_for_another_target_is_refused() {
    let model = Model::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/parity/tiny-qwen3")).unwrap();
    let refused = Speculator::open(&fixture("vanilla/draft"), model.config()).map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("hidden_size is 64, the target's 72"), "{refused}");
}

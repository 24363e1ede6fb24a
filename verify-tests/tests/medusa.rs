//! Medusa heads against PyTorch, on fixtures of the project's own (see `fixtures/medusa/README.md`).

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use treespark::backend::{Backend, PassCost};
use treespark::batch::Entry;
use treespark::cpu::CpuBackend;
use treespark::draft::NoDrafter;
use treespark::draft::block::BlockDrafter;
use treespark::network::{Limits, Network};
use treespark::scheduler::Scheduler;
use treespark::tree::TokenTree;
use treespark::{Engine, Sampling, Sequence, Statistics};
use treespark_models::{Model, Speculator};
use treespark_verify_tests::cases::samplings;
use treespark_verify_tests::oracle::Oracle;

const TOLERANCE: f32 = 1e-4;
const CONTEXT: usize = 128;
const LIMITS: Limits = Limits::new(CONTEXT, 64);

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn target() -> Model {
    Model::open(&fixture("parity/tiny-llama")).unwrap()
}

fn words(file: &SafeTensors, name: &str) -> Vec<u32> {
    let bytes = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data();
    bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect()
}

/// What the heads say behind a prompt.
fn heads_agree(backend: &mut dyn Backend, name: &str) {
    let model = target();
    let vocab = model.config().vocab_size;
    let speculator = Speculator::open(&fixture("medusa").join(name), model.config()).unwrap();
    let bytes = std::fs::read(fixture("medusa").join(format!("{name}.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name| words(&file, name).into_iter().map(f32::from_bits).collect::<Vec<f32>>();
    let (tokens, logits) = (words(&file, "tokens"), floats("logits"));

    let mut network =
        Network::load_with_speculator(backend, &model, Some(&speculator), LIMITS, &mut |_, _| {}).unwrap();
    let mut seq = Sequence::new(tokens.clone(), Sampling::default(), 8, vec![], CONTEXT, vocab);
    network.extend(backend, &mut seq.kv, &tokens[..tokens.len() - 1], &mut |_| {}).unwrap();
    let root = TokenTree::root(seq.last());
    let mut entries = [Entry::of_tree(&mut seq, root)];
    network.verify(backend, &mut entries).unwrap();
    let accepted = network.outcomes(backend, &mut entries, None).unwrap().remove(0).accepted;
    seq.kv.commit(accepted.path.len());
    seq.push(&accepted.tokens);
    let block = network.draft_blocks(backend, &mut [&mut seq], usize::MAX).unwrap().remove(0);
    assert_eq!(block.candidates.len(), 4);
    for (head, (candidates, logits)) in block.candidates.iter().zip(logits.chunks(vocab)).enumerate() {
        for &(token, score) in candidates {
            let want = logits[token as usize];
            assert!((score - want).abs() < TOLERANCE, "{name}, head {head}: {score}, not {want}");
        }
        let worst = candidates.last().unwrap().1;
        let larger = logits.iter().filter(|&&x| x > worst + TOLERANCE).count();
        assert!(larger < candidates.len(), "{name}, head {head}: better tokens are missing");
    }
}

#[test]
fn heads_agree_on_the_oracle() {
    ["shared", "own"].into_iter().for_each(|name| heads_agree(&mut Oracle::new(), name));
}

#[test]
fn heads_agree_on_the_cpu() {
    ["shared", "own"].into_iter().for_each(|name| heads_agree(&mut CpuBackend::new(None), name));
}

#[cfg(feature = "wgpu")]
#[test]
fn heads_agree_on_wgpu() {
    for name in ["shared", "own"] {
        let Some(mut backend) = treespark_verify_tests::cases::gpu() else { return };
        heads_agree(&mut *backend, name);
    }
}

/// Rounds with the heads' trees emit what plain decoding does.
fn rounds_change_no_token(open: impl Fn() -> Option<Box<dyn Backend>>, names: &[&str], new_tokens: usize) {
    let model = target();
    let vocab = model.config().vocab_size;
    for (sampling_name, sampling) in samplings() {
        let run = |name: Option<&str>| {
            let mut backend = open()?;
            let speculator = name.map(|name| Speculator::open(&fixture("medusa").join(name), model.config()).unwrap());
            let beside = speculator.as_ref();
            let network =
                Network::load_with_speculator(backend.as_mut(), &model, beside, LIMITS, &mut |_, _| {}).unwrap();
            let scheduler = Scheduler::new(None, 64, PassCost::FREE_ROWS);
            let mut engine = match &speculator {
                Some(speculator) => {
                    let drafter = Box::new(BlockDrafter::load(speculator).unwrap());
                    Engine::new(backend, network, drafter, scheduler, CONTEXT)
                }
                None => Engine::new(backend, network, Box::new(NoDrafter), scheduler, CONTEXT),
            };
            let prompt = (0..20).map(|i| (i * i * 7 + i % 5) % vocab as u32).collect();
            let mut seq = Sequence::new(prompt, sampling.clone(), new_tokens, vec![], CONTEXT, vocab);
            let mut stats = Statistics::default();
            engine.generate(&mut seq, &mut stats).unwrap();
            Some((seq.tokens().to_vec(), stats))
        };
        let Some((plain, _)) = run(None) else { return };
        for name in names {
            let (tokens, stats) = run(Some(name)).expect("there was a device");
            assert_eq!(tokens, plain, "{name}, {sampling_name}");
            assert!(stats.verified_rows > stats.rounds, "{name}, {sampling_name}: nothing was drafted");
        }
    }
}

#[test]
fn rounds_change_no_token_on_the_cpu() {
    rounds_change_no_token(|| Some(Box::new(CpuBackend::new(None))), &["shared", "own"], 30);
}

/// Where the device grows the trees.
#[cfg(feature = "cuda")]
#[test]
fn rounds_change_no_token_where_the_device_drafts() {
    rounds_change_no_token(|| treespark_verify_tests::cases::cuda_on_cpu(0), &["shared"], 6);
}

#[test]
fn heads_for_another_target_are_refused() {
    let model = Model::open(&fixture("parity/tiny-qwen3")).unwrap();
    let refused = Speculator::open(&fixture("medusa/shared"), model.config()).map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("hidden size is 96, the target's 72"), "{refused}");
}

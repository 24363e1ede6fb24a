//! Speculative equals plain on a real model, SmolLM2-135M-Instruct: every drafter, ten trees, greedy and sampled.

use std::path::Path;
use std::sync::Mutex;

use treespark::devices::BackendChoice;
use treespark::{DrafterChoice, GenerateOptions, Llm, LlmOptions, Message, Sampling};
use treespark_verify_tests::cases::{SHAPES, default_model, samplings};

/// One model at a time: each test fills memory and all cores.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const PROMPT: &str = "Quote this sentence three times: the quick brown fox jumps over the lazy dog.";

fn load(path: &Path, drafter: DrafterChoice, tree: Option<&str>, backend: BackendChoice) -> Llm {
    let tree = tree.map(|text| text.parse().unwrap());
    let model = path.to_str().unwrap().to_string();
    Llm::load(&LlmOptions { model, drafter, tree, backend, context: Some(512) }).unwrap()
}

/// The tokens of one answer, and tokens per round.
fn answer(llm: &mut Llm, sampling: &Sampling, max_new_tokens: usize) -> (Vec<u32>, f64) {
    let prompt = llm.chat_prompt(&[Message::user(PROMPT)]).unwrap();
    let options = GenerateOptions { sampling: sampling.clone(), max_new_tokens, stop: vec![] };
    let mut generation = llm.generate(prompt, &options).unwrap();
    for step in &mut generation {
        step.unwrap();
    }
    (generation.tokens().to_vec(), generation.statistics().tokens_per_round())
}

#[test]
fn speculative_equals_plain_on_the_cpu() {
    let _guard = ONE_AT_A_TIME.lock();
    let Some(path) = default_model() else { return };
    const TOKENS: usize = 40;
    let mut plain = load(&path, DrafterChoice::None, None, BackendChoice::Cpu);
    let expected: Vec<_> = samplings().iter().map(|(_, sampling)| answer(&mut plain, sampling, TOKENS).0).collect();
    drop(plain);

    let itself = DrafterChoice::Model(path.to_str().unwrap().to_string());
    for drafter in [DrafterChoice::Ngram, itself] {
        let trees = SHAPES.iter().map(|&shape| Some(shape)).chain([None]);
        for (i, tree) in trees.enumerate() {
            let mut llm = load(&path, drafter.clone(), tree, BackendChoice::Cpu);
            // Each tree meets two of the samplings; together they meet all.
            for j in [i, i + 3].map(|j| j % expected.len()) {
                let (name, sampling) = &samplings()[j];
                let (got, per_round) = answer(&mut llm, sampling, TOKENS);
                assert_eq!(got, expected[j], "{drafter:?}, tree {tree:?}, {name}");
                println!("{drafter:?} {tree:?} {name}: {per_round:.2} tokens per round");
            }
        }
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn speculative_equals_plain_on_wgpu() {
    let _guard = ONE_AT_A_TIME.lock();
    let Some(path) = default_model() else { return };
    if treespark_verify_tests::cases::gpu().is_none() {
        return;
    }
    const TOKENS: usize = 12;
    let sampled = &samplings()[5].1;
    let backend = BackendChoice::Wgpu(None);
    let mut plain = load(&path, DrafterChoice::None, None, backend);
    let expected = [&Sampling::default(), sampled].map(|sampling| answer(&mut plain, sampling, TOKENS).0);
    drop(plain);
    let mut llm = load(&path, DrafterChoice::Ngram, Some("2x2x1"), backend);
    let got = [&Sampling::default(), sampled].map(|sampling| answer(&mut llm, sampling, TOKENS).0);
    assert_eq!(got, expected);
}

//! Speculative equals plain on a real model, SmolLM2-135M-Instruct: every drafter, ten trees, greedy and sampled.

use std::path::Path;
use std::sync::Mutex;

use serde_json::{Value, json};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use treespark::backend::Backend;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use treespark::cpu::CpuBackend;
use treespark::devices::BackendChoice;
use treespark::{DrafterChoice, FinishReason, GenerateOptions, GrammarSource, Llm, LlmOptions, Message, Sampling};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use treespark_kernel_gen::DType;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use treespark_models::Model;
use treespark_models::pretrained;
use treespark_verify_tests::cases::{SHAPES, default_model, samplings};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use treespark_verify_tests::{
    logits::logits,
    near_tie::{Verdict, draw_context, first_divergence},
};

/// One model at a time: each test fills memory and all cores.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const PROMPT: &str = "Quote this sentence three times: the quick brown fox jumps over the lazy dog.";

fn load(path: &Path, drafter: DrafterChoice, tree: Option<&str>, backend: BackendChoice) -> Llm {
    let tree = tree.map(|text| text.parse().unwrap());
    let model = path.to_str().unwrap().to_string();
    Llm::load(&LlmOptions { model, drafter, tree, backend, context: Some(512), ..LlmOptions::default() }).unwrap()
}

/// The tokens of one answer, and tokens per round.
fn answer(llm: &mut Llm, sampling: &Sampling, max_new_tokens: usize) -> (Vec<u32>, f64) {
    let prompt = llm.chat_prompt(&[Message::user(PROMPT)]).unwrap();
    let options = GenerateOptions { sampling: sampling.clone(), max_new_tokens, ..GenerateOptions::default() };
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
    const TOKENS: usize = 24;
    let mut plain = load(&path, DrafterChoice::None, None, BackendChoice::Cpu);
    let expected: Vec<_> = samplings().iter().map(|(_, sampling)| answer(&mut plain, sampling, TOKENS).0).collect();
    drop(plain);

    let itself = DrafterChoice::Path(path.to_str().unwrap().to_string());
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

/// A drafter that is shipped with the project.
fn shipped(name: &str) -> DrafterChoice {
    let folder = pretrained::find("smollm2-135m-instruct", name).unwrap();
    DrafterChoice::Path(folder.to_str().unwrap().to_string())
}

/// The shipped drafters: no token changes, and enough of what they guess is right, at temperatures too.
#[test]
fn shipped_drafters_are_lossless_and_of_use() {
    let _guard = ONE_AT_A_TIME.lock();
    let Some(path) = default_model() else { return };
    const TOKENS: usize = 40;
    let sampled = Sampling { temperature: 0.8, seed: 5, ..Sampling::default() };
    let samplings = [Sampling::default(), sampled, samplings()[4].1.clone()];
    let mut plain = load(&path, DrafterChoice::None, None, BackendChoice::Cpu);
    let expected = samplings.each_ref().map(|sampling| answer(&mut plain, sampling, TOKENS).0);
    drop(plain);
    for (name, least) in [("dspark", 1.8), ("medusa", 1.2), ("model", 1.8)] {
        for tree in [Some("4x2x2x1"), None] {
            let mut llm = load(&path, shipped(name), tree, BackendChoice::Cpu);
            for (i, sampling) in samplings.iter().enumerate() {
                let (got, per_round) = answer(&mut llm, sampling, TOKENS);
                assert_eq!(got, expected[i], "{name}, tree {tree:?}, {sampling:?}");
                println!("{name} {tree:?} temperature {}: {per_round:.2} tokens per round", sampling.temperature);
                assert!(per_round > least || i > 0 || tree.is_none(), "{name}: {per_round} tokens per round");
            }
        }
    }
}

/// JSON that a schema describes: the same with and without drafts, and it parses.
#[test]
fn an_answer_under_a_grammar_is_the_same_with_drafts() {
    let _guard = ONE_AT_A_TIME.lock();
    let Some(path) = default_model() else { return };
    let schema = json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 30}},
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let sampled = Sampling { temperature: 0.8, seed: 5, ..Sampling::default() };
    let answers = |drafter: DrafterChoice, tree: Option<&str>| {
        let mut llm = load(&path, drafter, tree, BackendChoice::Cpu);
        let prompt = llm.chat_prompt(&[Message::user("Describe a cat as JSON: its name and its age.")]).unwrap();
        [&Sampling::default(), &sampled].map(|sampling| {
            let grammar = Some(GrammarSource::JsonSchema(schema.clone()));
            let options = GenerateOptions { sampling: sampling.clone(), grammar, ..GenerateOptions::default() };
            let mut generation = llm.generate(prompt.clone(), &options).unwrap();
            let text: String = generation.by_ref().map(|step| step.unwrap().text).collect();
            assert_eq!(generation.finish_reason(), Some(FinishReason::StopToken), "{text}");
            (text, generation.statistics().tokens_per_round())
        })
    };
    let plain = answers(DrafterChoice::None, None);
    for (text, _) in &plain {
        let cat: Value = serde_json::from_str(text).unwrap();
        assert!(cat["name"].is_string() && cat["age"].as_u64().unwrap() <= 30, "{text}");
    }
    for (drafter, tree) in
        [(DrafterChoice::Ngram, None), (shipped("dspark"), None), (shipped("dspark"), Some("4x2x2x1"))]
    {
        for ((text, per_round), (expected, _)) in answers(drafter.clone(), tree).into_iter().zip(&plain) {
            assert_eq!(&text, expected, "{drafter:?}, tree {tree:?}");
            println!("{drafter:?} {tree:?}: {per_round:.2} tokens per round: {text}");
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

#[cfg(any(feature = "cuda", feature = "wgpu"))]
const PROMPTS: [&str; 21] = [
    "Write a Python function that reverses a list.",
    "What is 17 times 3?",
    "Write a haiku about rain.",
    "Explain gravity to a child.",
    "List five uses of a brick.",
    "Who wrote Hamlet?",
    "Why do cats purr?",
    "Give me a recipe for pancakes.",
    "Repeat after me, three times: the cat sat on the mat.",
    "Count from one to thirty in words.",
    "Write a C function that adds two vectors.",
    "Translate to French: good morning, my friend.",
    "Name the planets, the largest first.",
    "What makes bread rise?",
    "Tell me a short story about a lighthouse.",
    "How do I tie a bowline?",
    "Summarize the plot of Romeo and Juliet.",
    "Write a SQL query that counts the users of each country.",
    "Which is heavier, a kilogram of iron or of feathers?",
    "Give three reasons to learn Rust.",
    "Why is the sky blue?",
];

/// One of two runs that ought to agree: who answers, and a device of the same kind to ask for logits.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
struct Side {
    llm: Llm,
    backend: Box<dyn Backend>,
}

/// Every prompt, greedy and sampled: answers differ at near-ties only, of scaled logits within the tolerance.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn check_agreement(path: &Path, mut sides: [Side; 2], prompts: &[&str], max_new_tokens: usize, tolerance: f64) {
    let model = Model::open(path).unwrap();
    let (mut differing, mut spread) = (0, 0.0f64);
    for prompt in prompts {
        for sampling in [Sampling::default(), Sampling { temperature: 0.8, seed: 9, ..Sampling::default() }] {
            let runs = sides.each_mut().map(|Side { llm, .. }| {
                let mut text = llm.chat_prompt(&[Message::user(*prompt)]).unwrap();
                let options =
                    GenerateOptions { sampling: sampling.clone(), max_new_tokens, ..GenerateOptions::default() };
                let mut generation = llm.generate(text.clone(), &options).unwrap();
                generation.by_ref().for_each(|step| drop(step.unwrap()));
                text.extend(generation.tokens());
                text
            });
            let divergence = first_divergence([&runs[0], &runs[1]], tolerance, |at| {
                let text = [runs[0][..at].to_vec()];
                let last_row =
                    |side: &mut Side| logits(side.backend.as_mut(), &model, DType::BF16, &text).remove(0).pop();
                let rows = sides.each_mut().map(|side| last_row(side).expect("the text is not empty"));
                (rows, draw_context(&sampling, &runs[0][..at]))
            });
            if let Some(divergence) = divergence {
                println!("{prompt}, temperature {}: {divergence}", sampling.temperature);
                assert_eq!(divergence.verdict, Verdict::NearTie, "{prompt}: {divergence}");
                (differing, spread) = (differing + 1, spread.max(divergence.spread));
            } else {
                assert_eq!(runs[0].len(), runs[1].len(), "{prompt}: one ends early");
            }
        }
    }
    println!("{differing} of {} answers differ, all at near-ties; largest spread {spread:.3}", 2 * prompts.len());
}

/// On a real GPU long answers to many prompts, on a software rasteriser short answers to a few.
#[cfg(feature = "wgpu")]
#[test]
fn backends_agree_up_to_near_ties() {
    // Of scaled logits: keys and values are rounded to bf16, and a rounding may fall either way.
    const TOLERANCE: f64 = 0.2;
    let _guard = ONE_AT_A_TIME.lock();
    let Some(path) = default_model() else { return };
    let Some(gpu) = treespark_verify_tests::cases::gpu() else { return };
    let (prompts, max_new_tokens) =
        if treespark_verify_tests::cases::is_software(gpu.info()) { (2, 16) } else { (8, 128) };
    let side = |choice, backend| Side { llm: load(&path, DrafterChoice::Ngram, None, choice), backend };
    let sides = [side(BackendChoice::Cpu, Box::new(CpuBackend::new(None))), side(BackendChoice::Wgpu(None), gpu)];
    check_agreement(&path, sides, &PROMPTS[..prompts], max_new_tokens, TOLERANCE);
}

/// CUDA's attention rounds queries and the weights of a softmax to bf16, beside keys and values.
#[cfg(feature = "cuda")]
const CUDA_TOLERANCE: f64 = 0.35;
#[cfg(feature = "cuda")]
const CUDA_TOKENS: usize = 256;

#[cfg(feature = "cuda")]
#[test]
fn cuda_and_the_cpu_agree_up_to_near_ties() {
    let _guard = ONE_AT_A_TIME.lock();
    let Some(gpu) = treespark_verify_tests::cases::nvidia() else { return };
    let Some(path) = default_model() else { return };
    let side = |choice, backend| Side { llm: load(&path, DrafterChoice::Ngram, None, choice), backend };
    let sides = [side(BackendChoice::Cpu, Box::new(CpuBackend::new(None))), side(BackendChoice::Cuda(None), gpu)];
    check_agreement(&path, sides, &PROMPTS, CUDA_TOKENS, CUDA_TOLERANCE);
}

/// The tree corner of CUDA's attention may group sums otherwise than the prefix: a near-tie may fall either way.
#[cfg(feature = "cuda")]
#[test]
fn speculative_equals_plain_on_cuda_up_to_near_ties() {
    let _guard = ONE_AT_A_TIME.lock();
    let Some(path) = default_model() else { return };
    let drafters = ["dspark", "medusa", "model"].map(|name| (shipped(name), None));
    let ngram = [None, Some("4x2x2x1")].map(|tree| (DrafterChoice::Ngram, tree));
    for (drafter, tree) in drafters.into_iter().chain(ngram) {
        println!("{drafter:?}, tree {tree:?}");
        let plain = (DrafterChoice::None, None);
        let mut sides = Vec::new();
        for (drafter, tree) in [plain, (drafter, tree)] {
            let Some(backend) = treespark_verify_tests::cases::nvidia() else { return };
            sides.push(Side { llm: load(&path, drafter, tree, BackendChoice::Cuda(None)), backend });
        }
        let Ok(sides) = <[Side; 2]>::try_from(sides) else { unreachable!("two were pushed") };
        check_agreement(&path, sides, &PROMPTS, CUDA_TOKENS, CUDA_TOLERANCE);
    }
}

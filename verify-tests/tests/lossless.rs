//! Speculative equals plain, token for token: whatever the drafter, the tree, the sampling or the backend.
//!
//! On the CPU backend, and between speculative and plain on the wgpu backend, equality is exact: a row's sums do not
//! depend on its neighbours. Random tiny models are covered here; SmolLM2 in `smollm2.rs`.

use std::path::PathBuf;

use treespark::backend::{Backend, PassCost};
use treespark::cpu::CpuBackend;
use treespark::draft::model::{MAX_CHILDREN, ModelDrafter};
use treespark::draft::ngram::NgramDrafter;
use treespark::draft::{Drafter, NoDrafter};
use treespark::network::{Limits, Network};
use treespark::scheduler::Scheduler;
use treespark::{Engine, Sampling, Sequence, Statistics};
#[cfg(feature = "wgpu")]
use treespark_kernel_gen::DType;
use treespark_kernel_gen::TreeShape;
use treespark_models::Model;
use treespark_verify_tests::cases::{SHAPES, samplings, tiny_deepseeks, tiny_models};
use treespark_verify_tests::half_right::HalfRight;
use treespark_verify_tests::rng::Rng;
#[cfg(feature = "wgpu")]
use treespark_verify_tests::{
    cases::is_software,
    logits::logits,
    near_tie::{Verdict, draw_context, first_divergence},
};

const CONTEXT: usize = 160;
const NEW_TOKENS: usize = 60;

type OpenBackend = fn() -> Box<dyn Backend>;

struct Setup<'a> {
    model: &'a Model,
    open: OpenBackend,
}

impl Setup<'_> {
    fn limits(shape: Option<&TreeShape>) -> Limits {
        Limits::new(CONTEXT, shape.map_or(64, TreeShape::len))
    }

    fn run(
        &self,
        drafter: impl FnOnce(&mut dyn Backend) -> Box<dyn Drafter>,
        shape: Option<&TreeShape>,
        sampling: &Sampling,
    ) -> (Vec<u32>, Statistics) {
        let mut backend = (self.open)();
        let target = Network::load(backend.as_mut(), self.model, Self::limits(shape), &mut |_, _| {}).unwrap();
        let drafter = drafter(backend.as_mut());
        // Rows as good as free, so that the scheduler drafts freely.
        let scheduler = Scheduler::new(shape.cloned(), 64, PassCost::new(&[(1, 1.0), (2, 1.001)]));
        let mut engine = Engine::new(backend, target, drafter, scheduler, CONTEXT);
        let vocab = self.model.config().vocab_size;
        let prompt = (0..40).map(|i| (i * i * 7 + i % 5) % vocab as u32).collect();
        let mut seq = Sequence::new(prompt, sampling.clone(), NEW_TOKENS, vec![], CONTEXT, vocab);
        let mut stats = Statistics::default();
        engine.generate(&mut seq, &mut stats).unwrap();
        (seq.tokens().to_vec(), stats)
    }

    fn draft_model(&self, backend: &mut dyn Backend, shape: Option<&TreeShape>) -> Box<dyn Drafter> {
        let limits = Limits { top_k: MAX_CHILDREN, ..Self::limits(shape) };
        let vocab = self.model.config().vocab_size;
        Box::new(ModelDrafter::load(backend, self.model, vocab, limits, &mut |_, _| {}).unwrap())
    }
}

/// Each sampling with so many of the models and of the shapes, in turn.
fn check_all(open: OpenBackend, paths: &[PathBuf], shapes: &[&str], [models, each]: [usize; 2]) {
    for (at, path) in paths.iter().enumerate() {
        let model = Model::open(path).unwrap();
        let setup = Setup { model: &model, open };
        let vocab = model.config().vocab_size;
        let (mut rounds, mut tokens) = (0, 0);
        let meets = |turn: &usize| (turn + at) % paths.len() < models;
        for (turn, (name, sampling)) in samplings().into_iter().enumerate().filter(|(turn, _)| meets(turn)) {
            let (plain, _) = setup.run(|_| Box::new(NoDrafter), None, &sampling);
            assert_eq!(plain.len(), 40 + NEW_TOKENS);
            for (i, text) in shapes.iter().cycle().skip(turn + turn / shapes.len()).take(each).enumerate() {
                let shape: TreeShape = text.parse().unwrap();
                let check = |drafter: &str, (got, stats): (Vec<u32>, Statistics)| {
                    assert_eq!(got, plain, "{}: {drafter}, tree {text}, {name}", path.display());
                    (stats.rounds, stats.new_tokens)
                };
                let half = HalfRight { truths: vec![plain.clone()], vocab, rng: Rng::new(i as u64) };
                let (r, t) = check("half right", setup.run(|_| Box::new(half), Some(&shape), &sampling));
                (rounds, tokens) = (rounds + r, tokens + t);
                check("ngram", setup.run(|_| Box::new(NgramDrafter::default()), Some(&shape), &sampling));
                check("model", setup.run(|backend| setup.draft_model(backend, Some(&shape)), Some(&shape), &sampling));
            }
            let auto = setup.run(|_| Box::new(NgramDrafter::default()), None, &sampling);
            assert_eq!(auto.0, plain, "{}: ngram, auto, {name}", path.display());
        }
        // The comparison would be empty if nothing were ever accepted.
        assert!(tokens > rounds * 3 / 2, "{tokens} tokens in {rounds} rounds: the trees were hardly accepted");
    }
}

#[test]
fn speculative_equals_plain_on_the_cpu() {
    let open = || Box::new(CpuBackend::new(None)) as Box<dyn Backend>;
    check_all(open, &tiny_models(), &SHAPES, [tiny_models().len(), SHAPES.len()]);
    check_all(open, &tiny_deepseeks(), &SHAPES, [tiny_deepseeks().len(), SHAPES.len() / 2]);
}

#[cfg(feature = "wgpu")]
#[test]
fn speculative_equals_plain_on_wgpu() {
    let Some(gpu) = treespark_verify_tests::cases::gpu() else { return };
    // On a software rasteriser a run takes seconds. No kernel knows both the model's kind and the sampling.
    let models = if is_software(gpu.info()) { 1 } else { tiny_models().len() };
    let open = || treespark_verify_tests::cases::gpu().expect("found before");
    check_all(open, &tiny_models(), &SHAPES[3..6], [models, 1]);
}

/// Backends sum in different orders: tokens may differ at a near-tie, and nowhere else.
#[cfg(feature = "wgpu")]
#[test]
fn backends_agree_up_to_near_ties() {
    // Of scaled logits; at temperature 0.2 they are five times the logits.
    const TOLERANCE: f64 = 1e-3;
    let Some(mut gpu) = treespark_verify_tests::cases::gpu() else { return };
    for path in tiny_models() {
        let model = Model::open(&path).unwrap();
        let open_gpu: OpenBackend = || treespark_verify_tests::cases::gpu().expect("found before");
        for (name, sampling) in samplings() {
            let plain =
                |open: OpenBackend| Setup { model: &model, open }.run(|_| Box::new(NoDrafter), None, &sampling).0;
            let runs = [plain(|| Box::new(CpuBackend::new(None))), plain(open_gpu)];
            let divergence = first_divergence([&runs[0], &runs[1]], TOLERANCE, |at| {
                let text = [runs[0][..at].to_vec()];
                let last_row = |backend: &mut dyn Backend| {
                    let mut rows = logits(backend, &model, DType::F32, &text).remove(0);
                    rows.pop().expect("the prompt is not empty")
                };
                let rows = [last_row(&mut CpuBackend::new(None)), last_row(gpu.as_mut())];
                (rows, draw_context(&sampling, &runs[0][..at]))
            });
            if let Some(divergence) = divergence {
                println!("{}, {name}: {divergence}", path.display());
                assert_eq!(divergence.verdict, Verdict::NearTie, "{}, {name}: {divergence}", path.display());
            }
        }
    }
}

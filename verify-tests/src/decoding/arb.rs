//! Generators of decodings.

use proptest::prelude::*;
use proptest::sample::select;
use treespark_kernel_gen::TreeShape;
use treespark_models::dspark::MarkovKind;

use super::language::LANGUAGES;
use super::{Ask, Decoding, Guesser, Stop, Way};
use crate::arb::{self, Family, Topology};
use crate::cases::SHAPES;
use crate::rng::Rng;

/// Of any models of a family, or of a few, for which a backend compiles few kernels; of a drafter by its name.
pub fn decodings(family: Family, wild: bool, guesser: &str) -> BoxedStrategy<Decoding> {
    // Of these, too, a backend has kernels of their own.
    let (contexts, nodes) =
        if wild { (vec![16usize, 40, 96, 160], vec![1usize, 4, 16, 64]) } else { (vec![40, 160], vec![4, 64]) };
    (family.sizes(wild), any::<u64>(), guessers(guesser, wild), select(contexts))
        .prop_flat_map(move |(sizes, seed, guesser, context)| {
            let asks = (prop::collection::vec(asks(sizes.vocab, context), 1..=4), any::<bool>()).prop_map(alike);
            let trees = (shapes(wild), select(nodes.clone()));
            (asks, trees, ways()).prop_map(move |(asks, (shape, max_nodes), way)| Decoding {
                sizes,
                seed,
                guesser: guesser.clone(),
                shape,
                max_nodes,
                context,
                asks,
                way,
            })
        })
        .boxed()
}

fn ways() -> impl Strategy<Value = Way> {
    let together = (2usize..=3, any::<bool>(), any::<bool>())
        .prop_map(|(places, few_pages, one_leaves)| Way::Together { places, few_pages, one_leaves });
    prop_oneof![1 => Just(Way::Alone), 1 => Just(Way::InTurns), 2 => together]
}

/// Drafters of one of the [`super::GUESSERS`].
fn guessers(name: &str, wild: bool) -> BoxedStrategy<Guesser> {
    match name {
        "ngram" => Just(Guesser::Ngram).boxed(),
        "half right" => Just(Guesser::HalfRight).boxed(),
        "mtp" => Just(Guesser::Mtp).boxed(),
        "model" => any::<bool>().prop_map(|itself| Guesser::Model { itself }).boxed(),
        "medusa" if wild => (1usize..=4, any::<bool>()).prop_map(|(heads, own)| Guesser::Medusa { heads, own }).boxed(),
        "medusa" => any::<bool>().prop_map(|own| Guesser::Medusa { heads: 3, own }).boxed(),
        "dflash" => dspark(vec![None], wild).boxed(),
        "dspark" => {
            use MarkovKind::*;
            dspark([(Vanilla, 8), (Vanilla, 16), (Gated, 8), (Rnn, 5)].map(Some).to_vec(), wild).boxed()
        }
        _ => panic!("no drafter is called {name}"),
    }
}

fn dspark(markov: Vec<Option<(MarkovKind, usize)>>, wild: bool) -> impl Strategy<Value = Guesser> {
    let confidence = select(vec![None, Some(false), Some(true)]);
    let (layers, depths) = if wild { (1..=2, 1..=5) } else { (1..=1usize, 4..=4usize) };
    (layers, 0usize..=1, depths, select(markov), confidence, any::<bool>()).prop_map(
        |(layers, first, depth, markov, confidence, own)| Guesser::Dspark {
            layers,
            block: first + depth,
            first,
            markov,
            confidence: confidence.map(|with_markov| with_markov && markov.is_some()),
            own,
        },
    )
}

/// The drafter's own choice, a usual shape, or any.
fn shapes(wild: bool) -> BoxedStrategy<Option<TreeShape>> {
    let usual = select(SHAPES.to_vec()).prop_map(|text| text.parse().expect("the shapes are trees"));
    let any =
        (arb::topologies(), 1usize..=40, any::<u64>()).prop_map(|(topology, nodes, seed)| shape(topology, nodes, seed));
    if wild {
        prop_oneof![2 => Just(None), 1 => usual.prop_map(Some), 1 => any.prop_map(Some)].boxed()
    } else {
        prop_oneof![1 => Just(None), 1 => usual.prop_map(Some)].boxed()
    }
}

fn shape(topology: Topology, nodes: usize, seed: u64) -> TreeShape {
    let parents: Vec<u32> = topology.parents(nodes, &mut Rng::new(seed)).iter().map(|&parent| parent as u32).collect();
    TreeShape::from_parents(&parents).expect("parents come first")
}

/// Whose prompts begin with the first's, if they are alike.
fn alike((mut asks, alike): (Vec<Ask>, bool)) -> Vec<Ask> {
    let first = asks[0].prompt.clone();
    for ask in asks.iter_mut().skip(1).filter(|_| alike) {
        let common = first.len().min(ask.prompt.len().saturating_sub(1));
        ask.prompt[..common].copy_from_slice(&first[..common]);
    }
    asks
}

fn asks(vocab: usize, context: usize) -> impl Strategy<Value = Ask> {
    let stops = prop_oneof![
        2 => Just(Stop::Nothing),
        1 => any::<usize>().prop_map(Stop::Token),
        2 => (any::<usize>(), 1usize..=3).prop_map(|(at, tokens)| Stop::Text(at, tokens)),
    ];
    let new_tokens = prop_oneof![1 => 0usize..=3, 4 => 4usize..=60];
    let languages = prop_oneof![2 => Just(None), 1 => select(LANGUAGES.to_vec()).prop_map(Some)];
    ((1..context, any::<u64>(), any::<bool>()), new_tokens, stops, arb::samplings(), languages).prop_map(
        move |((len, seed, repeats), max_new_tokens, stop, sampling, language)| {
            let mut rng = Rng::new(seed);
            // Models of random weights often answer a phrase that repeats with one that does.
            let phrase = if repeats { 1 + rng.below(4) } else { len };
            let phrase: Vec<u32> = (0..phrase).map(|_| rng.below(vocab) as u32).collect();
            let prompt = phrase.into_iter().cycle().take(len).collect();
            Ask { prompt, sampling, max_new_tokens, stop, language }
        },
    )
}

//! Random targets and drafters, small enough that every text can be listed.

use std::collections::BTreeMap;

use super::Law;
use super::law::ratio;
use crate::rng::Rng;

/// Every probability of a model is a multiple of 1/8.
pub const CELLS: usize = 8;

/// A table of laws: what follows a text, by its length and its last few tokens.
#[derive(Debug, Clone)]
pub struct Model {
    /// How many tokens it looks back.
    memory: usize,
    /// Keyed by the text's length and the tokens that are looked at.
    rows: BTreeMap<(usize, Vec<usize>), Law>,
}

impl Model {
    /// Knows texts of at most `depth` tokens.
    fn random(rng: &mut Rng, vocab: usize, depth: usize, memory: usize) -> Model {
        let mut rows = BTreeMap::new();
        let mut tails = vec![vec![]];
        for length in 0..=depth {
            rows.extend(tails.iter().map(|tail: &Vec<usize>| ((length, tail.clone()), random_law(rng, vocab))));
            if length < memory {
                let longer = |tail: &Vec<usize>| (0..vocab).map(|token| [&tail[..], &[token]].concat()).collect();
                tails = tails.iter().flat_map::<Vec<_>, _>(longer).collect();
            }
        }
        Model { memory, rows }
    }

    /// The law of the token that follows a text.
    pub fn after(&self, text: &[usize]) -> &Law {
        let tail = text[text.len() - self.memory.min(text.len())..].to_vec();
        &self.rows[&(text.len(), tail)]
    }
}

/// A target, which remembers everything, and a draft model, which knows the position and the last token: a Markov head.
#[derive(Debug, Clone)]
pub struct Models {
    pub vocab: usize,
    /// How many tokens a draft may be long.
    pub depth: usize,
    pub target: Model,
    pub draft: Model,
}

impl Models {
    pub fn random(seed: u64, vocab: usize, depth: usize) -> Models {
        let mut rng = Rng::new(seed);
        let target = Model::random(&mut rng, vocab, depth, depth);
        let draft = Model::random(&mut rng, vocab, depth, 1);
        Models { vocab, depth, target, draft }
    }

    /// The longest text that a round can emit: a whole draft and one token more.
    pub fn horizon(&self) -> usize {
        self.depth + 1
    }

    /// The target's law and the draft's.
    pub fn after(&self, text: &[usize]) -> (&Law, &Law) {
        (self.target.after(text), self.draft.after(text))
    }
}

/// A sixth of the tokens cannot occur; the others share the cells, one at least each.
fn random_law(rng: &mut Rng, vocab: usize) -> Law {
    let mut tokens: Vec<usize> = (0..vocab).filter(|_| rng.below(6) > 0).collect();
    if tokens.is_empty() {
        tokens.push(rng.below(vocab));
    }
    let mut cuts: Vec<usize> = (1..CELLS).collect();
    rng.shuffle(&mut cuts);
    cuts.truncate(tokens.len() - 1);
    cuts.extend([0, CELLS]);
    cuts.sort();
    let mut cells = vec![0; vocab];
    for (&token, cut) in tokens.iter().zip(cuts.windows(2)) {
        cells[token] = cut[1] - cut[0];
    }
    Law::proportional_to(cells.into_iter().map(|cells| ratio(cells, CELLS)).collect())
}

/// A decision that nobody can foresee: random, but always the same for what was seen.
pub fn whim(seed: u64, seen: impl IntoIterator<Item = usize>) -> Rng {
    seen.into_iter().fold(Rng::new(seed), |mut rng, word| Rng::new(rng.word() ^ word as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::law::is_positive;

    #[test]
    fn some_tokens_cannot_occur_and_some_texts_go_on_in_one_way() {
        let models: Vec<Models> = (0..20).map(|seed| Models::random(seed, 3, 2)).collect();
        for laws in [|m: &Models| m.target.after(&[]).clone(), |m: &Models| m.draft.after(&[]).clone()] {
            let possible = models.iter().map(|m| laws(m).iter().filter(|p| is_positive(p)).count());
            let seen: std::collections::BTreeSet<usize> = possible.collect();
            assert_eq!(seen, [1, 2, 3].into());
        }
    }
}

//! A drafter that knows what plain decoding produced and proposes it in part, among wrong branches: trees are accepted
//! whole, in part and not at all.

use treespark::Result;
use treespark::backend::Backend;
use treespark::draft::{Draft, Drafter, Plan};
use treespark::network::Network;
use treespark::sequence::Sequence;
use treespark_kernel_gen::TreeShape;

use crate::rng::Rng;

pub struct HalfRight {
    /// What plain decoding gives to each prompt, with the prompt.
    pub truths: Vec<Vec<u32>>,
    pub vocab: usize,
    pub rng: Rng,
}

impl HalfRight {
    /// What comes behind a text by plain decoding, if it is the beginning of a known one.
    fn next(&self, text: &[u32]) -> Vec<u32> {
        let truth = self.truths.iter().find(|truth| truth.starts_with(text));
        truth.map_or(Vec::new(), |truth| truth[text.len()..].to_vec())
    }
}

impl Drafter for HalfRight {
    fn name(&self) -> &'static str {
        "half right"
    }

    fn propose(&mut self, _: &mut dyn Backend, _: &mut Network, seq: &mut Sequence, plan: &Plan) -> Result<Draft> {
        let own = || TreeShape::chain(3.min(plan.max_nodes - 1)).expect("a short chain is a tree");
        let shape = plan.shape.clone().unwrap_or_else(own);
        let (next, mut draft) = (self.next(seq.tokens()), Draft::root(seq.last()));
        let mut right = vec![true]; // whether the path to a node is the truth's
        let mut taken = vec![false]; // whether a node already has the right child
        for node in 1..shape.len() {
            let parent = shape.parent(node);
            let last_chance = shape.children(parent).last() == Some(node);
            let hit = right[parent] && !taken[parent] && self.rng.below(10) < if last_chance { 8 } else { 4 };
            let token = match next.get(shape.depth(parent)) {
                Some(&token) if hit => token,
                _ => self.rng.below(self.vocab) as u32,
            };
            taken[parent] |= hit;
            right.push(hit && shape.depth(parent) < next.len());
            taken.push(false);
            draft.push(parent, token, 0.5)?;
        }
        Ok(draft)
    }
}

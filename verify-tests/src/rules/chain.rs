//! A sampled chain, verified token by token (Leviathan et al., 2023; Chen et al., 2023).
//!
//! ```text
//! keep x with probability min(1, target(x) / draft(x)); stop at the first that is not kept
//! one token more:  after a rejection from max(target - draft, 0), normalised; after the whole chain from the target
//! ```
//!
//! It holds for tokens that were drawn from `draft`, all of them, and if whether to draw one was decided before it was
//! seen.

use super::law::{acceptance, coin};
use super::model::Model;
use super::{Choose, Models};

pub fn draw(draft: &Model, length: usize, choose: &mut Choose) -> Vec<usize> {
    let mut chain = vec![];
    for _ in 0..length {
        chain.push(choose(draft.after(&chain)));
    }
    chain
}

pub fn verify(models: &Models, chain: &[usize], choose: &mut Choose) -> Vec<usize> {
    let mut text = vec![];
    for &token in chain {
        let (target, draft) = models.after(&text);
        if !coin(&acceptance(&target[token], &draft[token]), choose) {
            text.push(choose(&target.residual(draft)));
            return text;
        }
        text.push(token);
    }
    text.push(choose(models.target.after(&text)));
    text
}

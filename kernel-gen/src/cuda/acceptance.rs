//! Embedding, and what follows the logits: draw, top-k, accept, commit.

use super::{Launch, Lowering};

impl Lowering<'_> {
    pub(super) fn embed(&self) -> Vec<Launch> {
        todo!()
    }

    pub(super) fn draw(&self) -> Vec<Launch> {
        todo!()
    }

    pub(super) fn top_k(&self) -> Vec<Launch> {
        todo!()
    }

    pub(super) fn accept(&self) -> Vec<Launch> {
        todo!()
    }

    pub(super) fn commit(&self) -> Vec<Launch> {
        todo!()
    }
}

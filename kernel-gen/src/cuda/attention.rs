//! Tree attention.

use super::{Launch, Lowering};

impl Lowering<'_> {
    pub(super) fn tree_attention(&self) -> Vec<Launch> {
        todo!()
    }
}

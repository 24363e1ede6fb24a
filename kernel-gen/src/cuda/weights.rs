//! The ops that read a weight: qkv, project, gate/up, head.

use super::{Launch, Lowering};

impl Lowering<'_> {
    pub(super) fn qkv(&self) -> Vec<Launch> {
        todo!()
    }

    pub(super) fn project(&self) -> Vec<Launch> {
        todo!()
    }

    pub(super) fn gate_up(&self) -> Vec<Launch> {
        todo!()
    }

    pub(super) fn head(&self) -> Vec<Launch> {
        todo!()
    }
}

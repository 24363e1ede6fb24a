//! The topology of a speculation tree.
//!
//! One invariant: `parents[i] < i` for every node but the root, node 0, which is its own parent. Everything else is
//! derived: depths, children, leaves, ancestor bits. Hence every prefix of the nodes is itself a tree.

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TreeShape {
    parents: Vec<u32>,
}

impl TreeShape {
    /// Number of nodes, root included.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.parents.len()
    }
}

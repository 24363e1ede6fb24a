//! The topology of a speculation tree.
//!
//! One invariant: `parents[i] < i` for every node but the root, node 0, which is its own parent. Everything else is
//! derived: depths, children, leaves, ancestor bits. Hence every prefix of the nodes is itself a tree.
//!
//! Node 0 holds the last committed token; the nodes below it are drafted. As text:
//!
//! ```text
//! root                 node 0 alone: plain decoding
//! chain:8              8 drafted nodes in a line below the root (9 nodes)
//! 4x2x2x1              levels: the root has 4 children, each of those 2, ... (1+4+8+16+16 = 45 nodes, breadth first)
//! parents:0,0,0,1,1    the parent of every node; the root's own 0 comes first
//! paths:0;0.0;1        child ranks from the root down, one path a node, in any order ("choices" in Medusa)
//! ```

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::layout::{ANCESTOR_WORDS, MAX_NODES};

/// A tree of at most [`MAX_NODES`] nodes, parents before children.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TreeShape {
    parents: Vec<u32>,
}

/// Why something is not a tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    #[error("a tree of {nodes} nodes (root included) is too large: at most {MAX_NODES} are possible")]
    TooManyNodes { nodes: usize },
    #[error("level {level} brings the tree to {nodes} nodes (root included): at most {MAX_NODES} are possible")]
    LevelTooWide { level: usize, nodes: usize },
    #[error("level {level} has 0 children a node: leave it out, or give at least 1")]
    EmptyLevel { level: usize },
    #[error("no nodes: a tree has at least its root")]
    NoRoot,
    #[error("node {node} has parent {parent}: {}", rule(*.node))]
    Parent { node: usize, parent: usize },
    #[error("path {path} lacks {missing}: every node needs its parent and its elder siblings")]
    MissingPath { path: String, missing: String },
    #[error("path {path} is given twice")]
    RepeatedPath { path: String },
    #[error("path number {index} is empty: the root needs no path")]
    EmptyPath { index: usize },
    #[error(
        "`{text}` is not a tree: `{part}` is not understood; \
         write root, chain:8, 4x2x2x1, parents:0,0,0,1,1 or paths:0;0.0;1"
    )]
    Syntax { text: String, part: String },
}

fn rule(node: usize) -> &'static str {
    if node == 0 { "the root is its own parent, 0" } else { "a parent comes before its children" }
}

impl TreeShape {
    /// The root alone, to which [`TreeShape::push`] adds.
    pub fn root() -> TreeShape {
        TreeShape { parents: vec![0] }
    }

    /// `n` nodes in a line below the root.
    pub fn chain(n: usize) -> Result<TreeShape, ShapeError> {
        check_len(n.saturating_add(1))?;
        Ok(TreeShape { parents: (0..=n as u32).map(|node| node.saturating_sub(1)).collect() })
    }

    /// Every node of depth d has `children[d]` children; nodes are in breadth-first order.
    pub fn levels(children: &[usize]) -> Result<TreeShape, ShapeError> {
        let mut parents = vec![0];
        let mut level_start = 0;
        for (level, &n) in children.iter().enumerate() {
            let width = parents.len() - level_start;
            let nodes = width.saturating_mul(n).saturating_add(parents.len());
            if n == 0 {
                return Err(ShapeError::EmptyLevel { level });
            }
            if nodes > MAX_NODES {
                return Err(ShapeError::LevelTooWide { level, nodes });
            }
            let level_end = parents.len();
            for parent in level_start..level_end {
                parents.extend(std::iter::repeat_n(parent as u32, n));
            }
            level_start = level_end;
        }
        Ok(TreeShape { parents })
    }

    /// The parent of every node; `parents[0]` is the root's own 0.
    pub fn from_parents(parents: &[u32]) -> Result<TreeShape, ShapeError> {
        let Some((&root, below)) = parents.split_first() else { return Err(ShapeError::NoRoot) };
        check_len(parents.len())?;
        if root != 0 {
            return Err(ShapeError::Parent { node: 0, parent: root as usize });
        }
        let mut shape = TreeShape::root();
        below.iter().try_for_each(|&parent| shape.push(parent as usize).map(|_| ()))?;
        Ok(shape)
    }

    /// Each path lists child ranks from the root down to one node. The order of the paths does not matter: nodes are
    /// numbered breadth first. A shape holds no ranks of its own, the i-th child has rank i; so ranks may have no gaps.
    pub fn from_paths(paths: &[Vec<u32>]) -> Result<TreeShape, ShapeError> {
        check_len(paths.len().saturating_add(1))?;
        if let Some(index) = paths.iter().position(Vec::is_empty) {
            return Err(ShapeError::EmptyPath { index });
        }
        // By length, then by ranks: a parent comes before its children, an elder sibling before the next.
        let mut sorted: Vec<&[u32]> = paths.iter().map(Vec::as_slice).collect();
        sorted.sort_by_key(|path| (path.len(), *path));
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ShapeError::RepeatedPath { path: path_text(twice[0]) });
        }

        let mut shape = TreeShape::root();
        for path in &sorted {
            let node_of = |path: &[u32]| sorted.iter().position(|other| *other == path).map(|i| i + 1);
            let need = |needed: &[u32]| {
                let missing = || ShapeError::MissingPath { path: path_text(path), missing: path_text(needed) };
                node_of(needed).ok_or_else(missing)
            };
            let (&rank, prefix) = path.split_last().expect("no path is empty");
            let parent = if prefix.is_empty() { 0 } else { need(prefix)? };
            if rank > 0 {
                need(&[prefix, &[rank - 1]].concat())?;
            }
            shape.push(parent)?;
        }
        Ok(shape)
    }

    /// Adds a child of `parent`, after its other children, and returns the new node.
    pub fn push(&mut self, parent: usize) -> Result<usize, ShapeError> {
        let node = self.len();
        check_len(node + 1)?;
        if parent >= node {
            return Err(ShapeError::Parent { node, parent });
        }
        self.parents.push(parent as u32);
        Ok(node)
    }

    /// The first `n` nodes, which are a tree too. Panics unless `1 <= n <= len`.
    pub fn prefix(&self, n: usize) -> TreeShape {
        assert!((1..=self.len()).contains(&n), "prefix of {n} nodes of a tree of {}", self.len());
        TreeShape { parents: self.parents[..n].to_vec() }
    }

    /// Number of nodes, root included.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.parents.len()
    }

    /// The parent of every node, the root's own 0 first.
    pub fn parents(&self) -> &[u32] {
        &self.parents
    }

    /// The root is its own parent.
    pub fn parent(&self, node: usize) -> usize {
        self.parents[node] as usize
    }

    /// Edges between the root and the node.
    pub fn depth(&self, node: usize) -> usize {
        std::iter::successors(Some(node), |&n| (n > 0).then(|| self.parent(n))).count() - 1
    }

    /// The depth of every node.
    pub fn depths(&self) -> Vec<usize> {
        let mut depths = vec![0; self.len()];
        for node in 1..self.len() {
            depths[node] = depths[self.parent(node)] + 1;
        }
        depths
    }

    pub fn max_depth(&self) -> usize {
        self.depths().into_iter().max().expect("a tree has a root")
    }

    /// Whether nodes are in order of their depth, so that every level is a range of them.
    pub fn is_level_by_level(&self) -> bool {
        self.depths().is_sorted()
    }

    /// The nodes of one depth, if the shape [is level by level](TreeShape::is_level_by_level).
    pub fn level(&self, depth: usize) -> Range<usize> {
        let depths = self.depths();
        let begin_of = |depth: usize| depths.partition_point(|&d| d < depth);
        begin_of(depth)..begin_of(depth + 1)
    }

    /// How many elder siblings every node has.
    pub fn ranks(&self) -> Vec<usize> {
        let mut children = vec![0; self.len()];
        let mut ranks = vec![0];
        for node in 1..self.len() {
            let seen = &mut children[self.parent(node)];
            ranks.push(*seen);
            *seen += 1;
        }
        ranks
    }

    /// Ascending.
    pub fn children(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        (node + 1..self.len()).filter(move |&child| self.parent(child) == node)
    }

    /// Nodes without children, ascending.
    pub fn leaves(&self) -> Vec<usize> {
        let mut leaf = vec![true; self.len()];
        (1..self.len()).for_each(|node| leaf[self.parent(node)] = false);
        (0..self.len()).filter(|&node| leaf[node]).collect()
    }

    /// Bit j: node j is `node` itself or an ancestor of it. The words a [`Row`](crate::Row) carries.
    pub fn ancestors(&self, node: usize) -> [u32; ANCESTOR_WORDS] {
        let mut words = [0; ANCESTOR_WORDS];
        for ancestor in self.path(node) {
            words[ancestor / 32] |= 1 << (ancestor % 32);
        }
        words
    }

    /// Node ids from the root to `node`, both included, ascending. The i-th has depth i.
    pub fn path(&self, node: usize) -> Vec<usize> {
        let mut path: Vec<usize> = std::iter::successors(Some(node), |&n| (n > 0).then(|| self.parent(n))).collect();
        path.reverse();
        path
    }

    /// True if no node has two children. The root alone is a chain.
    pub fn is_chain(&self) -> bool {
        (1..self.len()).all(|node| self.parent(node) == node - 1)
    }

    /// The argument of [`TreeShape::levels`] that makes this shape, if there is one.
    fn as_levels(&self) -> Option<Vec<usize>> {
        let mut widths = vec![0; self.max_depth() + 1];
        self.depths().into_iter().for_each(|depth| widths[depth] += 1);
        let children: Vec<usize> = widths.windows(2).map(|pair| pair[1] / pair[0]).collect();
        (TreeShape::levels(&children).as_ref() == Ok(self)).then_some(children)
    }
}

fn check_len(nodes: usize) -> Result<(), ShapeError> {
    if nodes > MAX_NODES { Err(ShapeError::TooManyNodes { nodes }) } else { Ok(()) }
}

fn path_text(path: &[u32]) -> String {
    join(path, ".")
}

fn join<T: ToString>(items: &[T], separator: &str) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(separator)
}

impl fmt::Display for TreeShape {
    /// The shortest text form: `root`, a chain, levels, or else all parents.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.len() == 1 {
            f.write_str("root")
        } else if self.is_chain() {
            write!(f, "chain:{}", self.len() - 1)
        } else if let Some(children) = self.as_levels() {
            f.write_str(&join(&children, "x"))
        } else {
            write!(f, "parents:{}", join(&self.parents, ","))
        }
    }
}

impl FromStr for TreeShape {
    type Err = ShapeError;

    fn from_str(text: &str) -> Result<TreeShape, ShapeError> {
        let text = text.trim();
        match text.split_once(':') {
            None if text == "root" => Ok(TreeShape::root()),
            None => TreeShape::levels(&numbers(text, text, 'x')?),
            Some(("chain", n)) => TreeShape::chain(number(text, n)?),
            Some(("parents", list)) => TreeShape::from_parents(&numbers(text, list, ',')?),
            Some(("paths", list)) => {
                let paths: Result<Vec<_>, _> = list.split(';').map(|path| numbers(text, path, '.')).collect();
                TreeShape::from_paths(&paths?)
            }
            Some((kind, _)) => Err(ShapeError::Syntax { text: text.to_string(), part: kind.to_string() }),
        }
    }
}

fn numbers<T: FromStr>(text: &str, list: &str, separator: char) -> Result<Vec<T>, ShapeError> {
    list.split(separator).map(|part| number(text, part)).collect()
}

/// Digits only: `str::parse` alone would also take `+1`.
fn number<T: FromStr>(text: &str, part: &str) -> Result<T, ShapeError> {
    let digits = part.bytes().all(|byte| byte.is_ascii_digit());
    let error = || ShapeError::Syntax { text: text.to_string(), part: part.to_string() };
    part.parse().ok().filter(|_| digits).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_shape() -> impl Strategy<Value = TreeShape> {
        proptest::collection::vec(any::<prop::sample::Index>(), 0..MAX_NODES).prop_map(|choices| {
            let mut shape = TreeShape::root();
            for choice in choices {
                shape.push(choice.index(shape.len())).unwrap();
            }
            shape
        })
    }

    fn parse(text: &str) -> Result<TreeShape, ShapeError> {
        text.parse()
    }

    fn message(text: &str) -> String {
        parse(text).expect_err(text).to_string()
    }

    #[test]
    fn text_forms() {
        for (text, nodes, printed) in [
            ("root", 1, "root"),
            ("chain:0", 1, "root"),
            ("chain:8", 9, "chain:8"),
            ("chain:255", 256, "chain:255"),
            ("4x2x2x1", 45, "4x2x2x1"),
            ("255", 256, "255"),
            ("1x1x1", 4, "chain:3"),
            (" 2x2 ", 7, "2x2"),
            ("parents:0", 1, "root"),
            ("parents:0,0,0,1,1", 5, "parents:0,0,0,1,1"),
            ("parents:0,0,0,1,1,2,2", 7, "2x2"),
            ("paths:1;0.0;0", 4, "parents:0,0,0,1"),
            ("paths:0;0.0", 3, "chain:2"),
        ] {
            let shape = parse(text).unwrap();
            assert_eq!((shape.len(), shape.to_string().as_str()), (nodes, printed), "{text}");
            assert_eq!(parse(printed).unwrap(), shape, "{text}");
        }
    }

    #[test]
    fn a_levels_tree_in_another_order_is_not_printed_as_levels() {
        let depth_first = TreeShape::from_parents(&[0, 0, 1, 1, 0, 4, 4]).unwrap();
        assert_eq!(depth_first.to_string(), "parents:0,0,1,1,0,4,4");
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (text, parts) in [
            ("chain:256", &["257 nodes", "256"][..]),
            ("256", &["level 0", "257 nodes", "256"]),
            ("4x4x4x4", &["level 3", "341 nodes", "256"]),
            ("2x0x2", &["level 1"]),
            ("parents:0,0,2", &["node 2", "parent 2"]),
            ("parents:1,0", &["node 0", "parent 1"]),
            ("paths:0.0", &["path 0.0 lacks 0"]),
            ("paths:0;2", &["path 2 lacks 1"]),
            ("paths:0;0.1", &["path 0.1 lacks 0.0"]),
            ("paths:0;0", &["path 0 is given twice"]),
            ("4x2y2", &["`4x2y2`", "`2y2`", "chain:8"]),
            ("", &["``"]),
            ("chain:", &["`chain:`"]),
            ("chain:+3", &["`+3`"]),
            ("chain:-1", &["`-1`"]),
            ("chain:18446744073709551615", &["18446744073709551615 nodes"]),
            ("4x18446744073709551615", &["level 1"]),
            ("ring:4", &["`ring`"]),
        ] {
            let message = message(text);
            parts.iter().for_each(|part| assert!(message.contains(part), "{text}: {message} lacks {part}"));
        }
        assert_eq!(TreeShape::from_parents(&[]), Err(ShapeError::NoRoot));
        assert_eq!(TreeShape::from_parents(&[0; 257]), Err(ShapeError::TooManyNodes { nodes: 257 }));
        assert_eq!(TreeShape::from_paths(&[vec![0], vec![]]), Err(ShapeError::EmptyPath { index: 1 }));
        let mut full = TreeShape::chain(255).unwrap();
        assert_eq!(full.push(0), Err(ShapeError::TooManyNodes { nodes: 257 }));
        assert_eq!(TreeShape::root().push(1), Err(ShapeError::Parent { node: 1, parent: 1 }));
    }

    #[test]
    fn levels_are_ranges_and_siblings_are_ranked() {
        let shape = parse("parents:0,0,0,0,1,1,3,5").unwrap();
        assert!(shape.is_level_by_level());
        assert_eq!([0, 1, 2, 3, 4].map(|depth| shape.level(depth)), [0..1, 1..4, 4..7, 7..8, 8..8]);
        assert_eq!(shape.ranks(), [0, 0, 1, 2, 0, 1, 0, 0]);
        assert!(!parse("parents:0,0,1,1,0").unwrap().is_level_by_level());
        assert_eq!(parse("parents:0,0,1,1,0").unwrap().ranks(), [0, 0, 0, 1, 1]);
    }

    proptest! {
        #[test]
        fn print_and_parse_round_trip(shape in any_shape()) {
            prop_assert_eq!(parse(&shape.to_string()).unwrap(), shape.clone());
            prop_assert_eq!(TreeShape::from_parents(shape.parents()).unwrap(), shape);
        }

        #[test]
        fn every_levels_tree_prints_as_levels(children in proptest::collection::vec(1usize..5, 1..5)) {
            if let Ok(shape) = TreeShape::levels(&children) {
                prop_assert_eq!(shape.as_levels(), Some(children.clone()));
                let mut width = 1;
                let nodes = 1 + children.iter().map(|n| { width *= n; width }).sum::<usize>();
                prop_assert_eq!(shape.len(), nodes);
            }
        }

        #[test]
        fn paths_in_any_order_make_the_breadth_first_tree(shape in any_shape(), seed in any::<u64>()) {
            let ranks = |node: usize| -> Vec<u32> {
                let rank = |&n: &usize| shape.children(shape.parent(n)).position(|c| c == n).unwrap() as u32;
                shape.path(node)[1..].iter().map(rank).collect()
            };
            let mut paths: Vec<Vec<u32>> = (1..shape.len()).map(ranks).collect();
            paths.sort_by_key(|path| path.iter().fold(seed, |h, &r| (h ^ u64::from(r)).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            let built = TreeShape::from_paths(&paths).unwrap();
            prop_assert!(built.depths().is_sorted());
            let again: Vec<Vec<u32>> = (1..built.len())
                .map(|node| built.path(node)[1..].iter()
                    .map(|&n| built.children(built.parent(n)).position(|c| c == n).unwrap() as u32).collect())
                .collect();
            paths.sort_by_key(|path| (path.len(), path.clone()));
            prop_assert_eq!(again, paths);
        }

        #[test]
        fn derived_facts_agree(shape in any_shape()) {
            let depths = shape.depths();
            for node in 0..shape.len() {
                let (path, bits) = (shape.path(node), shape.ancestors(node));
                prop_assert!(path.is_sorted() && path[0] == 0 && path[path.len() - 1] == node);
                prop_assert_eq!(path.len() - 1, shape.depth(node));
                prop_assert_eq!(depths[node], shape.depth(node));
                // Closure: a node's bits are its parent's and its own, nothing else.
                let mut expected = if node == 0 { [0; ANCESTOR_WORDS] } else { shape.ancestors(shape.parent(node)) };
                expected[node / 32] |= 1 << (node % 32);
                prop_assert_eq!(bits, expected);
                prop_assert!(shape.children(node).all(|child| shape.parent(child) == node));
                prop_assert_eq!(shape.leaves().contains(&node), shape.children(node).next().is_none());
            }
            prop_assert_eq!((0..shape.len()).map(|n| shape.children(n).count()).sum::<usize>(), shape.len() - 1);
            prop_assert_eq!(shape.is_chain(), shape.max_depth() + 1 == shape.len());
        }

        #[test]
        fn every_prefix_is_a_tree(shape in any_shape(), at in any::<prop::sample::Index>()) {
            let n = at.index(shape.len()) + 1;
            let prefix = shape.prefix(n);
            prop_assert_eq!(prefix.len(), n);
            prop_assert_eq!(TreeShape::from_parents(prefix.parents()).unwrap(), prefix.clone());
            (0..n).for_each(|node| assert_eq!(prefix.ancestors(node), shape.ancestors(node)));
        }
    }
}

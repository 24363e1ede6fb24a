//! A tree as text, for kernel headers, test failures and the command line.
//!
//! An only child continues its parent's line, so a chain is one line; several children hang below the line that their
//! parent ends:
//!
//! ```text
//! 0
//! ├─ 1
//! │  ├─ 3 ─ 5
//! │  └─ 4
//! └─ 2
//! ```

use crate::shape::TreeShape;

/// Draws the tree with `label` for each node. Lines end in a newline; labels should not contain any.
pub fn draw(shape: &TreeShape, mut label: impl FnMut(usize) -> String) -> String {
    let mut out = String::new();
    draw_below(shape, 0, "", &mut label, &mut out);
    out
}

/// Appends `node` to the current line and everything below it, where `indent` is what its children's lines begin with.
fn draw_below(
    shape: &TreeShape,
    mut node: usize,
    indent: &str,
    label: &mut impl FnMut(usize) -> String,
    out: &mut String,
) {
    out.push_str(&label(node));
    let mut children: Vec<usize> = shape.children(node).collect();
    while let [only] = children[..] {
        node = only;
        out.push_str(" ─ ");
        out.push_str(&label(node));
        children = shape.children(node).collect();
    }
    out.push('\n');
    for &child in &children {
        let last = children.last() == Some(&child);
        out.push_str(indent);
        out.push_str(if last { "└─ " } else { "├─ " });
        draw_below(shape, child, &format!("{indent}{}", if last { "   " } else { "│  " }), label, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_children_continue_the_line() {
        let shape = TreeShape::from_parents(&[0, 0, 0, 1, 1, 3]).unwrap();
        let drawn = draw(&shape, |node| node.to_string());
        assert_eq!(drawn, "0\n├─ 1\n│  ├─ 3 ─ 5\n│  └─ 4\n└─ 2\n");
        assert_eq!(draw(&TreeShape::chain(3).unwrap(), |node| format!("n{node}")), "n0 ─ n1 ─ n2 ─ n3\n");
        assert_eq!(draw(&TreeShape::root(), |_| "the".to_string()), "the\n");
    }

    #[test]
    fn children_below_a_continued_line_hang_from_its_start() {
        let shape = TreeShape::from_parents(&[0, 0, 0, 1, 3, 3]).unwrap();
        let drawn = draw(&shape, |node| node.to_string());
        assert_eq!(drawn, "0\n├─ 1 ─ 3\n│  ├─ 4\n│  └─ 5\n└─ 2\n");
    }

    #[test]
    fn every_node_is_drawn_once_in_depth_first_order() {
        let shape = TreeShape::levels(&[4, 2, 2, 1]).unwrap();
        let mut seen = Vec::new();
        let drawn = draw(&shape, |node| {
            seen.push(node);
            format!("<{node}>")
        });
        assert_eq!(seen[..6], [0, 1, 5, 13, 29, 14]);
        (0..shape.len()).for_each(|node| assert_eq!(drawn.matches(&format!("<{node}>")).count(), 1, "{drawn}"));
    }
}

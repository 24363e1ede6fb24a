//! Trees for people: a shape, and a round's tree with what became of every token.

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use treespark::Round;
use treespark_kernel_gen::{TreeShape, draw};
use treespark_models::Tokenizer;

use super::Outcome;

const ACCEPTED: Style = AnsiColor::Green.on_default().bold();
const REJECTED: Style = AnsiColor::Red.on_default().dimmed();
const BONUS: Style = AnsiColor::Yellow.on_default().bold();

/// `treespark tree SHAPE`
pub fn draw_shape(shape: &TreeShape) -> Result<Outcome> {
    println!("{shape}: {} nodes, {} deep, {} leaves", shape.len(), shape.max_depth(), shape.leaves().len());
    print!("{}", draw::draw(shape, |node| node.to_string()));
    Ok(Outcome::Done)
}

/// One round on standard error: accepted, rejected and bonus tokens, coloured where colours show.
pub fn show_round(tokenizer: &Tokenizer, round: &Round) {
    let text = |token: u32| format!("{:?}", tokenizer.decode(&[token]));
    let paint = |style: Style, label: String| format!("{}{label}{}", style.render(), style.render_reset());
    let last = round.accepted.path[round.accepted.path.len() - 1];
    let bonus = round.accepted.tokens[round.accepted.tokens.len() - 1];
    let label = |node: usize| {
        let token = text(round.tree.token(node));
        let label = match round.accepted.path.contains(&node) {
            true if node == 0 => token,
            true => paint(ACCEPTED, format!("{token} accepted")),
            false => paint(REJECTED, format!("{token} rejected")),
        };
        if node == last { format!("{label}  {}", paint(BONUS, format!("+ {} bonus", text(bonus)))) } else { label }
    };
    anstream::eprint!("{}", draw::draw(round.tree.shape(), label));
}

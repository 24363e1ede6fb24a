use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::json;
use treespark_models::Tokenizer;
use treespark_models::checkpoint::{GgufVocabulary, TokenizerSource};

use super::*;
use crate::draft::{Draft, Proposal};

/// In GPT-2's alphabet Ġ is a space, Ã¤ the two bytes of an umlaut. The last two are special.
const TOKENS: [&str; 24] = [
    "a", "b", "ab", "ba", "{", "}", "{\"", "\":", "\"", ":", ",", "1", "12", "true", "Ġ", "Ã", "¤", "Ã¤", "bÃ", "¤a",
    "c", "<", "<|turn|>", "<|end|>",
];
const C: u32 = 20;
const TURN: u32 = 22;
const END: u32 = 23;
/// The model has more logits than the tokenizer tokens.
const VOCAB: usize = 40;

fn tokenizer() -> Tokenizer {
    let vocabulary = GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        token_types: (0..TOKENS.len() as u32).map(|id| if id < TURN { 1 } else { 3 }).collect(),
        tokens: TOKENS.map(String::from).to_vec(),
        ..GgufVocabulary::default()
    };
    Tokenizer::open(&TokenizerSource::Gguf(vocabulary)).unwrap()
}

fn compile(source: &GrammarSource) -> Result<Grammar> {
    static ENGINE: LazyLock<GrammarEngine> = LazyLock::new(|| GrammarEngine::new(&tokenizer(), VOCAB, &[END, C]));
    ENGINE.compile(source)
}

fn regex(expression: &str) -> Grammar {
    compile(&GrammarSource::Regex(expression.to_string())).unwrap()
}

fn schema(schema: serde_json::Value) -> Grammar {
    compile(&GrammarSource::JsonSchema(schema)).unwrap()
}

fn id(token: &str) -> u32 {
    TOKENS.iter().position(|t| *t == token).expect(token) as u32
}

/// The masks of a tree's nodes, as names of tokens.
fn masks(grammar: &mut Grammar, tree: &mut TokenTree, given: usize) -> Vec<Vec<&'static str>> {
    let mut words = Vec::new();
    grammar.masks(tree, given, &mut words);
    assert_eq!(words.len(), tree.len() * grammar.words());
    let names =
        |mask: &[u32]| (0..TOKENS.len()).filter(|t| mask[t / 32] >> (t % 32) & 1 == 1).map(|t| TOKENS[t]).collect();
    words.chunks(grammar.words()).map(names).collect()
}

/// What may follow some tokens.
fn behind(grammar: &Grammar, tokens: &[&str]) -> Vec<&'static str> {
    let mut grammar = grammar.clone();
    grammar.advance(&tokens.iter().map(|token| id(token)).collect::<Vec<_>>()).unwrap();
    masks(&mut grammar, &mut TokenTree::root(0), 1).remove(0)
}

#[test]
fn tokens_may_be_cut_anywhere_and_the_end_is_a_stop_token() {
    let grammar = regex("(ab|ba)+");
    assert_eq!(behind(&grammar, &[]), ["a", "b", "ab", "ba"]);
    assert_eq!(behind(&grammar, &["a"]), ["b", "ba"]);
    assert_eq!(behind(&grammar, &["ab"]), ["a", "b", "ab", "ba", "c", "<|end|>"], "every stop token ends it");
    assert_eq!(behind(&regex("ab"), &["a", "b"]), ["c", "<|end|>"], "nothing else is left");
}

#[test]
fn a_character_may_be_cut_in_halves() {
    let grammar = regex("b?ä+a?");
    assert_eq!(behind(&grammar, &[]), ["b", "Ã", "Ã¤", "bÃ"]);
    assert_eq!(behind(&grammar, &["bÃ"]), ["¤", "¤a"]);
    assert_eq!(behind(&grammar, &["bÃ", "¤"]), ["a", "Ã", "Ã¤", "c", "<|end|>"]);
}

#[test]
fn a_schema_is_kept_to_and_marks_are_no_text() {
    let object = schema(json!({
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a", "b"],
        "additionalProperties": false,
    }));
    assert_eq!(behind(&object, &[]), ["{", "{\""]);
    assert_eq!(behind(&object, &["{\""]), ["a"]);
    assert_eq!(behind(&object, &["{\"", "a", "\":"]), ["1", "12", "Ġ"]);
    assert_eq!(behind(&object, &["{\"", "a", "\":", "12", ",", "\"", "b", "\":"]), ["true", "Ġ"]);
    let text = behind(&schema(json!({"type": "string"})), &["\"", "<"]);
    assert!(text.contains(&"<") && !text.contains(&"<|turn|>") && !text.contains(&"<|end|>"), "{text:?}");
    assert_eq!(behind(&compile(&GrammarSource::JsonObject).unwrap(), &["{"]), ["}", "\":", "\"", "Ġ"]);
}

#[test]
fn a_tree_is_cut_to_what_may_be_accepted() {
    let grammar = regex("(ab|ba)+");
    let mut draft = Draft::root(id("1"));
    let a = draft.push(0, id("a"), 0.9).unwrap();
    let forbidden = draft.push(0, id("true"), 0.8).unwrap();
    draft.push(forbidden, id("b"), 0.7).unwrap();
    let b = draft.push(a, id("b"), 0.6).unwrap();
    draft.push(a, END, 0.5).unwrap();
    let end = draft.push(b, END, 0.4).unwrap();
    draft.push(end, id("a"), 0.3).unwrap();
    let proposal = Proposal::new(draft, Some(&grammar), false);
    assert_eq!(proposal.draft.tree.shape().parents(), [0, 0, 1, 2]);
    assert_eq!((0..4).map(|node| proposal.draft.tree.token(node)).collect::<Vec<_>>(), [id("1"), 0, 1, END]);
    assert_eq!(proposal.draft.survival, [1.0, 0.9, 0.6, 0.4]);
}

#[test]
fn only_what_is_not_given_is_asked() {
    let mut tree = TokenTree::chain(&[id("1"), id("{"), id("a"), id("b")]).unwrap();
    let masks = masks(&mut regex("ba"), &mut tree, 3);
    assert_eq!(masks[..2], [TOKENS, TOKENS]);
    assert_eq!(masks[2], ["b", "ba"]);
    assert_eq!(masks[3], ["a"]);
}

#[test]
fn a_dead_end_is_told_when_the_text_comes_there_and_no_sooner() {
    // No token begins with a d.
    let mut grammar = regex("a(b|c)?d");
    let mut tree = TokenTree::chain(&[id("1"), id("a"), id("b")]).unwrap();
    assert_eq!(masks(&mut grammar, &mut tree, 1), [vec!["a", "ab"], vec!["b"]], "behind the b there is no mask");
    grammar.advance(&[id("a")]).unwrap();
    grammar.advance(&[id("b")]).unwrap();
    assert_eq!(masks(&mut grammar, &mut TokenTree::root(0), 1).len(), 1);
    let error = grammar.advance(&[0]).unwrap_err().to_string();
    assert_eq!(error, "grammar: no token of the vocabulary goes on from here");
}

#[test]
fn what_is_no_grammar_is_told() {
    let told = |source: &GrammarSource| compile(source).unwrap_err().to_string();
    assert!(told(&GrammarSource::Regex("(a".into())).contains("regex"));
    assert!(told(&GrammarSource::Regex("d".into())).contains("no token of the vocabulary"));
    assert!(told(&GrammarSource::JsonSchema(json!({"type": "strange"}))).contains("strange"));
    assert!(told(&GrammarSource::Lark("start: nothing".into())).contains("nothing"));
    assert!(told(&GrammarSource::Lark("start: x\nx[max_tokens=3]: /a+/".into())).contains("max_tokens"));
    let endless = GrammarEngine::new(&tokenizer(), VOCAB, &[]).compile(&GrammarSource::JsonObject);
    assert!(endless.unwrap_err().to_string().contains("stop token"));
}

#[test]
fn any_thread_may_compile() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<GrammarEngine>();
    sent::<Grammar>();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A node's mask is the one of plain decoding behind the same text, whatever branches stand beside it.
    #[test]
    fn a_node_has_the_mask_of_its_text(nodes in prop::collection::vec((any::<u32>(), any::<u32>()), 1..40), which in 0..4usize) {
        let mut grammar = match which {
            0 => regex("(ab|ba)+1*"),
            1 => regex("[abä ]{2,12}c?"),
            2 => schema(json!({"type": "object", "additionalProperties": {"type": "integer"}})),
            _ => compile(&GrammarSource::Lark("start: \"(\"? x+\nx: \"a\" x \"b\" | \"1\"".into())).unwrap(),
        };
        // Each node is one of the tokens that its parent's mask allows, or any.
        let mut draft = Draft::root(0);
        for (parent, token) in nodes {
            let parent = parent as usize % draft.tree.len();
            let path = draft.tree.shape().path(parent).split_off(1);
            let mut plain = grammar.clone();
            let text: Vec<u32> = path.iter().map(|&node| draft.tree.token(node)).collect();
            let may = match plain.advance(&text) {
                Ok(()) if token % 8 > 0 => masks(&mut plain, &mut TokenTree::root(0), 1).remove(0),
                _ => TOKENS.to_vec(),
            };
            draft.push(parent, id(may[token as usize / 8 % may.len()]), 0.5).unwrap();
        }
        let mut tree = Proposal::new(draft, Some(&grammar), false).draft.tree;
        let found = masks(&mut grammar, &mut tree, 1);
        for (node, mask) in found.into_iter().enumerate() {
            let text: Vec<u32> = tree.shape().path(node)[1..].iter().map(|&node| tree.token(node)).collect();
            if text.last().is_some_and(|&token| token == END || token == C) {
                continue;
            }
            let mut plain = grammar.clone();
            plain.advance(&text).unwrap();
            prop_assert_eq!(mask, masks(&mut plain, &mut TokenTree::root(0), 1).remove(0), "{:?}", text);
        }
    }
}

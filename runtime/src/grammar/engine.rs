//! Grammars for the tokens of one model.

use std::sync::{Arc, OnceLock};

use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use treespark_models::Tokenizer;

use super::{Grammar, GrammarSource, told};
use crate::error::{Error, Result};

/// Longer tokens are in no grammar: the library has no room for them.
const LONGEST_TOKEN: usize = 1000;

/// Makes grammars for a model. Any thread may; cloning copies no data.
#[derive(Clone)]
pub struct GrammarEngine {
    shared: Arc<Shared>,
}

struct Shared {
    tokenizer: Tokenizer,
    vocab: usize,
    stop_tokens: Arc<[u32]>,
    /// The vocabulary as a tree of bytes: made when a grammar first needs it, once.
    factory: OnceLock<Result<ParserFactory, String>>,
}

impl GrammarEngine {
    /// For a model with `vocab` logits a row, whose answers end with one of the stop tokens.
    pub fn new(tokenizer: &Tokenizer, vocab: usize, stop_tokens: &[u32]) -> GrammarEngine {
        let stop_tokens = stop_tokens.iter().copied().filter(|&token| (token as usize) < vocab).collect();
        let shared = Shared { tokenizer: tokenizer.clone(), vocab, stop_tokens, factory: OnceLock::new() };
        GrammarEngine { shared: Arc::new(shared) }
    }

    /// A grammar at its start. What cannot be one is told so that a person can act on it.
    pub fn compile(&self, source: &GrammarSource) -> Result<Grammar> {
        let Shared { vocab, stop_tokens, factory, .. } = &*self.shared;
        let factory = factory.get_or_init(|| self.shared.factory()).as_ref();
        let factory = factory.map_err(|why| Error::Grammar(why.clone()))?;
        let parser = factory.create_parser(source.top_level()).map_err(|error| Error::Grammar(told(&error)))?;
        if !parser.parser.grammar().lexer_spec().can_rollback() {
            let what =
                "max_tokens= and stop= of a Lark rule cannot be taken back, as rejected drafts are (use suffix=)";
            return Err(Error::Grammar(what.to_string()));
        }
        let state = Matcher::new(Ok(parser));
        let grammar = Grammar { state, stop_tokens: stop_tokens.clone(), vocab: *vocab, failure: None };
        // One that allows nothing is found now, not in the midst of others' rounds.
        grammar.state.clone().compute_mask_or_eos().map_err(|error| Error::Grammar(told(&error)))?;
        Ok(grammar)
    }
}

impl Shared {
    fn factory(&self) -> Result<ParserFactory, String> {
        let Some(&stop) = self.stop_tokens.first() else {
            return Err("the model names no stop token, and an answer could not end".to_string());
        };
        let words: Vec<Vec<u8>> = (0..self.vocab as u32).map(|token| self.word(token)).collect();
        let trie = TokTrie::from(&TokRxInfo::new(self.vocab as u32, stop), &words);
        // The target chooses how a text is cut into tokens; the library never forces its own choice.
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(&self.stop_tokens)));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| told(&error))?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(factory)
    }

    /// What a token stands for in a text; special tokens, and those that end it, carry a mark that no text has.
    fn word(&self, token: u32) -> Vec<u8> {
        let mut word = self.tokenizer.token_bytes(token);
        if word.len() > LONGEST_TOKEN {
            word.clear();
        }
        if self.tokenizer.is_special(token) || self.stop_tokens.contains(&token) {
            word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        }
        word
    }
}

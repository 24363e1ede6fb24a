//! A byte-level BPE tokenizer built from the vocabulary in a GGUF file.
//!
//! The file holds tokens and merges, but of the pre-tokenizer only a name. The table here says what the names that we
//! support stand for; another one is refused, since a guess would split some texts differently from the training data.

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, Tokenizer, decoders, normalizers};

use crate::checkpoint::GgufVocabulary;
use crate::error::{Error, Result};

/// Token types of GGUF.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// What the name of a pre-tokenizer stands for.
struct Recipe {
    /// How text is cut into words, in the dialect of `tokenizer.json`; each word is then merged on its own.
    split: Value,
    /// The byte-level step cuts by GPT-2's own expression.
    gpt2_split: bool,
    /// Text is composed (Unicode NFC) first.
    compose: bool,
    /// A word that is itself a token is not merged up from its bytes.
    ignore_merges: bool,
    /// Text begins with the bos token unless the file says otherwise.
    add_bos: bool,
}

fn recipe(pre: &str) -> Result<Recipe> {
    let plain = Recipe { split: Value::Null, gpt2_split: false, compose: false, ignore_merges: false, add_bos: false };
    let by_regex =
        |regex| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    match pre {
        "gpt-2" => Ok(Recipe { gpt2_split: true, ..plain }),
        "smollm" => {
            Ok(Recipe { split: json!({"type": "Digits", "individual_digits": true}), gpt2_split: true, ..plain })
        }
        "llama-bpe" => Ok(Recipe { split: by_regex(LLAMA3), ignore_merges: true, add_bos: true, ..plain }),
        "qwen2" => Ok(Recipe { split: by_regex(QWEN2), compose: true, ..plain }),
        other => Err(Error::Tokenizer(format!(
            "pre-tokenizer {other} is not supported; supported in a GGUF file: gpt-2, smollm, llama-bpe, qwen2 (a \
             Hugging Face folder with its tokenizer.json works with any)"
        ))),
    }
}

/// Contractions, words with what precedes them, up to three digits, punctuation, line ends, spaces.
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// The same with single digits.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

pub fn build(vocabulary: &GgufVocabulary) -> Result<Tokenizer> {
    if vocabulary.model != "gpt2" {
        return Err(Error::Tokenizer(format!(
            "vocabulary model {:?} is not supported in a GGUF file; supported: gpt2 (a Hugging Face folder with its \
             tokenizer.json works with any)",
            vocabulary.model
        )));
    }
    let recipe = recipe(vocabulary.pre.as_deref().unwrap_or("(none named)"))?;
    let mut tokenizer = Tokenizer::new(bpe(vocabulary, recipe.ignore_merges)?);
    tokenizer.with_decoder(Some(decoders::byte_level::ByteLevel::default()));
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer(&recipe)?));
    if recipe.compose {
        tokenizer.with_normalizer(Some(normalizers::NFC)).map_err(refused)?;
    }
    let of_type = |wanted: i64| {
        let typed = vocabulary.tokens.iter().zip(&vocabulary.token_types);
        typed.filter(move |&(_, &kind)| kind == wanted).map(|(token, _)| token.clone())
    };
    tokenizer.add_special_tokens(of_type(CONTROL).map(|token| AddedToken::from(token, true))).map_err(refused)?;
    let user_defined = of_type(USER_DEFINED).map(|token| AddedToken::from(token, false).normalized(false));
    tokenizer.add_tokens(user_defined).map_err(refused)?;
    if vocabulary.add_bos.unwrap_or(recipe.add_bos) {
        tokenizer.with_post_processor(Some(bos_processor(vocabulary)?));
    }
    Ok(tokenizer)
}

fn bpe(vocabulary: &GgufVocabulary, ignore_merges: bool) -> Result<BPE> {
    let ids: Vocab = vocabulary.tokens.iter().cloned().zip(0..).collect();
    let pair = |merge: &String| {
        let (left, right) =
            merge.split_once(' ').ok_or_else(|| refused(format!("merge {merge:?} is no pair").into()))?;
        Ok((left.to_string(), right.to_string()))
    };
    let merges = vocabulary.merges.iter().map(pair).collect::<Result<Vec<_>>>()?;
    BPE::builder().vocab_and_merges(ids, merges).ignore_merges(ignore_merges).build().map_err(refused)
}

fn pre_tokenizer(recipe: &Recipe) -> Result<tokenizers::PreTokenizerWrapper> {
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": recipe.gpt2_split});
    let steps = [recipe.split.clone(), bytes].into_iter().filter(|step| !step.is_null()).collect::<Vec<_>>();
    let sequence = json!({"type": "Sequence", "pretokenizers": steps});
    serde_json::from_value(sequence).map_err(|error| refused(error.into()))
}

fn bos_processor(vocabulary: &GgufVocabulary) -> Result<tokenizers::PostProcessorWrapper> {
    let token = vocabulary.bos.and_then(|id| Some((id, vocabulary.tokens.get(id as usize)?)));
    let Some((id, token)) = token else {
        return Err(refused("a text begins with bos, but no token is named as bos".into()));
    };
    let bos = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let sequence = |letter: &str| json!({"Sequence": {"id": letter, "type_id": 0}});
    let template = json!({
        "type": "TemplateProcessing",
        "single": [bos, sequence("A")],
        "pair": [bos, sequence("A"), bos, sequence("B")],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    });
    serde_json::from_value(template).map_err(|error| refused(error.into()))
}

fn refused(error: tokenizers::Error) -> Error {
    Error::Tokenizer(format!("GGUF vocabulary: {error}"))
}

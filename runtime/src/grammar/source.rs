//! What a grammar is written in.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

/// What an answer must be.
#[derive(Debug, Clone, PartialEq)]
pub enum GrammarSource {
    /// JSON that a schema describes. Its key `x-guidance` takes llguidance's options.
    JsonSchema(Value),
    /// Any JSON object.
    JsonObject,
    /// All of the answer matches an expression, in the syntax of the crate `regex`.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark.
    Lark(String),
}

impl GrammarSource {
    /// What OpenAI's `response_format` asks for; `None` is any text.
    pub fn from_response_format(format: &Value) -> Result<Option<GrammarSource>, String> {
        if format.is_null() {
            return Ok(None);
        }
        match format["type"].as_str() {
            Some("text") => Ok(None),
            Some("json_object") => Ok(Some(GrammarSource::JsonObject)),
            Some("json_schema") => match &format["json_schema"]["schema"] {
                schema @ (Value::Object(_) | Value::Bool(_)) => Ok(Some(GrammarSource::JsonSchema(schema.clone()))),
                _ => Err("response_format.json_schema.schema is no JSON schema: give an object".to_string()),
            },
            Some(other) => Err(format!("response_format.type is '{other}'; there are: text, json_object, json_schema")),
            None => Err("response_format has no type; there are: text, json_object, json_schema".to_string()),
        }
    }

    pub(super) fn top_level(&self) -> TopLevelGrammar {
        match self {
            GrammarSource::JsonSchema(schema) => TopLevelGrammar::from_json_schema(schema.clone()),
            GrammarSource::JsonObject => TopLevelGrammar::from_json_schema(json!({"type": "object"})),
            GrammarSource::Regex(expression) => TopLevelGrammar::from_regex(expression),
            GrammarSource::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_format_becomes_a_grammar() {
        let of = |format: Value| GrammarSource::from_response_format(&format);
        assert_eq!(of(Value::Null), Ok(None));
        assert_eq!(of(json!({"type": "text"})), Ok(None));
        assert_eq!(of(json!({"type": "json_object"})), Ok(Some(GrammarSource::JsonObject)));
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}});
        assert_eq!(of(format), Ok(Some(GrammarSource::JsonSchema(schema))));
    }

    #[test]
    fn a_response_format_that_is_none_is_told() {
        let of = |format: Value| GrammarSource::from_response_format(&format).unwrap_err();
        assert!(of(json!({"type": "xml"})).contains("'xml'; there are: text, json_object, json_schema"));
        assert!(of(json!({})).contains("no type"));
        assert!(of(json!("json_object")).contains("no type"));
        assert!(of(json!({"type": "json_schema", "json_schema": {"name": "x"}})).contains("json_schema.schema"));
    }
}

//! A set of prompts: a file of JSON lines, each an object whose `turns` lists what a user says, one turn after the other.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::InputError;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptSet {
    /// The file's stem.
    pub name: String,
    pub path: PathBuf,
    pub prompts: Vec<Prompt>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Of the file, from 1.
    pub line: usize,
    pub turns: Vec<String>,
}

impl PromptSet {
    /// The first prompts of a file, all of which must be well-formed.
    pub fn read(path: &Path, first: usize) -> Result<PromptSet, InputError> {
        let bytes = std::fs::read(path).map_err(|source| InputError::Io { path: path.into(), source })?;
        let at_line = |line, problem| InputError::Line { path: path.into(), line, problem };
        let text = String::from_utf8(bytes).map_err(|error| {
            let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            at_line(good.iter().filter(|&&byte| byte == b'\n').count() + 1, "not UTF-8 text".to_string())
        })?;
        let mut prompts = parse(&text).map_err(|(line, problem)| at_line(line, problem))?;
        if prompts.is_empty() {
            return Err(InputError::NoPrompts { path: path.into() });
        }
        prompts.truncate(first);
        let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok(PromptSet { name, path: path.into(), prompts })
    }
}

/// Every line's turns; blank lines are skipped. An error is a line, from 1, and what is wrong with it.
fn parse(text: &str) -> Result<Vec<Prompt>, (usize, String)> {
    let lines = (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty());
    lines.map(|(line, text)| Ok(Prompt { line, turns: turns(text).map_err(|problem| (line, problem))? })).collect()
}

fn turns(line: &str) -> Result<Vec<String>, String> {
    let value: Value = serde_json::from_str(line)
        .map_err(|error| format!("not a JSON object on one line: {error} (the file must be JSON lines)"))?;
    let turns = value.get("turns").and_then(Value::as_array).ok_or("no \"turns\": expected a list of user turns")?;
    if turns.is_empty() {
        return Err("\"turns\" is empty: expected at least one user turn".to_string());
    }
    let text = |(turn, value): (usize, &Value)| match value.as_str() {
        Some(text) if !text.trim().is_empty() => Ok(text.to_string()),
        Some(_) => Err(format!("turn {turn} is empty")),
        None => Err(format!("turn {turn} is no text: {value}")),
    };
    (1..).zip(turns).map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_prompts_and_blank_lines_are_none() {
        let prompts = parse("{\"turns\": [\"a\", \"b\"], \"id\": 7}\n\n{\"turns\": [\"c\"]}").unwrap();
        let of = |line, turns: &[&str]| Prompt { line, turns: turns.iter().map(|turn| turn.to_string()).collect() };
        assert_eq!(prompts, [of(1, &["a", "b"]), of(3, &["c"])]);
    }

    #[test]
    fn bad_lines_are_named() {
        let good = "{\"turns\": [\"a\"]}\n";
        for (bad, words) in [
            ("plain text", "JSON"),
            ("{\"turns\": [\"a\"", "JSON"),
            ("{\"prompt\": \"a\"}", "no \"turns\""),
            ("[\"a\"]", "no \"turns\""),
            ("{\"turns\": \"a\"}", "no \"turns\""),
            ("{\"turns\": []}", "empty"),
            ("{\"turns\": [\"a\", 3]}", "turn 2 is no text: 3"),
            ("{\"turns\": [\" \"]}", "turn 1 is empty"),
        ] {
            let (line, problem) = parse(&format!("{good}{bad}\n{good}")).unwrap_err();
            assert!(line == 2 && problem.contains(words), "{bad}: {line}: {problem}");
        }
    }

    #[test]
    fn files_are_cut_and_named_by_their_stem() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.one.jsonl");
        std::fs::write(&path, "{\"turns\": [\"a\"]}\n".repeat(3)).unwrap();
        let set = PromptSet::read(&path, 2).unwrap();
        assert_eq!((set.name.as_str(), set.prompts.len()), ("set.one", 2));
        std::fs::write(&path, "\n").unwrap();
        assert!(PromptSet::read(&path, 2).unwrap_err().to_string().contains("set.one.jsonl:1: no prompts"));
        std::fs::write(&path, b"{\"turns\": [\"a\"]}\n\xff").unwrap();
        assert!(PromptSet::read(&path, 2).unwrap_err().to_string().contains("set.one.jsonl:2: not UTF-8"));
    }
}

//! Chat templates: messages become the text that a model was trained on.
//!
//! Templates are Jinja, written for Python: `trim_blocks` and `lstrip_blocks` are on, as in Hugging Face's renderer,
//! and Python's string, list and dict methods work. A template may call `raise_exception(message)`, and
//! `strftime_now(format)` for the date of today in UTC: the only thing here that depends on the clock.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;

use crate::error::{Error, Result};

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    pub content: String,
}

impl Message {
    pub fn system(content: impl Into<String>) -> Message {
        Message { role: "system".into(), content: content.into() }
    }

    pub fn user(content: impl Into<String>) -> Message {
        Message { role: "user".into(), content: content.into() }
    }

    pub fn assistant(content: impl Into<String>) -> Message {
        Message { role: "assistant".into(), content: content.into() }
    }
}

/// A parsed template with the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

const NAME: &str = "chat_template";

/// What one rendering may cost: an instruction is one, and so are 64 bytes of data. Ten thousand messages need a fraction.
const FUEL: u64 = 1 << 22;

impl ChatTemplate {
    /// Parses a template. A special token that the model does not have is the empty string, as in Python.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<ChatTemplate> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_global("bos_token", bos_token.unwrap_or_default().to_string());
        environment.add_global("eos_token", eos_token.unwrap_or_default().to_string());
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
            strftime(&format, now).map_err(|problem| minijinja::Error::new(ErrorKind::InvalidOperation, problem))
        });
        environment.add_template_owned(NAME, source.to_string()).map_err(failed)?;
        Ok(ChatTemplate { environment })
    }

    /// The prompt's text. `add_generation_prompt` appends what opens the assistant's answer.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        // `tools` and `documents` are none rather than undefined, which is what templates were tested with.
        let context = context! {
            messages => Serde(messages),
            add_generation_prompt,
            tools => (),
            documents => (),
        };
        self.environment.get_template(NAME).and_then(|template| template.render(context)).map_err(failed)
    }
}

fn failed(error: minijinja::Error) -> Error {
    Error::ChatTemplate(format!("chat template: {error}"))
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// C's strftime, as far as templates use it, for `seconds` since 1970-01-01 00:00 UTC (a Thursday).
fn strftime(format: &str, seconds: u64) -> Result<String, String> {
    let days = seconds / 86400;
    let (year, month, day) = date(days);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", seconds / 3600 % 24),
            Some('M') => out += &format!("{:02}", seconds / 60 % 60),
            Some('S') => out += &format!("{:02}", seconds % 60),
            Some('%') => out.push('%'),
            other => return Err(format!("strftime_now: %{} is not supported", other.unwrap_or(' '))),
        }
    }
    Ok(out)
}

/// Year, month and day of the month, both from 1.
fn date(mut days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SmolLM2's own template, as its checkpoint ships it.
    const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}\
        {% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        ChatTemplate::new(source, Some("<s>"), None)?.render(messages, true)
    }

    #[test]
    fn smollm2_gets_its_system_message_unless_one_is_given() {
        let template = ChatTemplate::new(SMOLLM2, None, None).unwrap();
        let user = Message::user("Hi <there>");
        assert_eq!(
            template.render(std::slice::from_ref(&user), true).unwrap(),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
             <|im_start|>user\nHi <there><|im_end|>\n<|im_start|>assistant\n"
        );
        let system = Message::system("Be brief.");
        assert_eq!(
            template.render(&[system, user], false).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <there><|im_end|>\n"
        );
    }

    #[test]
    fn templates_behave_as_in_python() {
        let messages = [Message::user("  hello  ")];
        let cases = [
            // Python methods, special tokens, an absent special token.
            ("{{ bos_token }}{{ messages[0]['content'].strip().upper() }}{{ eos_token }}", "<s>HELLO"),
            // trim_blocks and lstrip_blocks: lines that hold only a block leave nothing behind.
            ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
            ("{% if tools is none and documents is not defined %}a{% else %}b{% endif %}", "b"),
            ("{% if undefined_name is defined %}a{% else %}b{% endif %}", "b"),
            ("{% for m in messages %}{% if loop.last %}{{ m.role }}{% break %}{% endif %}{% endfor %}", "user"),
        ];
        for (source, expected) in cases {
            assert_eq!(render(source, &messages).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn errors_say_what_the_template_says() {
        let cases = [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{{ strftime_now('%Q') }}", "%Q is not supported"),
            ("{% if %}", "syntax error"),
        ];
        for (source, expected) in cases {
            let message = render(source, &[]).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn a_template_that_would_not_end_is_an_error() {
        let forever = "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
        for source in [forever, "{{ 'x' * 1000000000 }}"] {
            let message = render(source, &[]).unwrap_err().to_string();
            assert!(message.contains("fuel"), "{message}");
        }
        let messages = vec![Message::user("What is the time? ".repeat(8)); 10_000];
        assert!(ChatTemplate::new(SMOLLM2, None, None).unwrap().render(&messages, true).is_ok());
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let cases = [
            (0, "Thu Thursday 01 Jan 1970 00:00:00"),
            (951_827_696, "Tue Tuesday 29 Feb 2000 12:34:56"),
            (1_735_689_599, "Tue Tuesday 31 Dec 2024 23:59:59"),
            (4_107_542_400, "Mon Monday 01 Mar 2100 00:00:00"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(strftime("%a %A %d %b %Y %H:%M:%S", seconds).unwrap(), expected);
        }
        assert_eq!(strftime("%y-%m %B 100%%", 0).unwrap(), "70-01 January 100%");
    }
}

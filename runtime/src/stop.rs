//! Stop strings over streamed text: what might be the beginning of one is held back until it is known.

#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    found: bool,
}

impl StopStrings {
    /// Empty stop strings are ignored: they would stop everything.
    pub fn new(stops: &[String]) -> StopStrings {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        StopStrings { stops, held: String::new(), found: false }
    }

    /// Takes new text and returns what surely stands before any stop string.
    pub fn push(&mut self, text: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let safe = self.held.len() - self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(safe);
        std::mem::replace(&mut self.held, rest)
    }

    /// The text ended without a stop string: what was held back is part of it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    pub fn found(&self) -> bool {
        self.found
    }
}

/// Bytes of the longest end of `text` that begins `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len().min(text.len() + 1))
        .rev()
        .find(|&n| stop.is_char_boundary(n) && text.as_bytes().ends_with(&stop.as_bytes()[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Streams the text in pieces of every size; whatever the cuts, the same text must come out.
    fn check(stops: &[&str], text: &str, expected: &str) {
        let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
        let chars: Vec<char> = text.chars().collect();
        for size in 1..=chars.len().max(1) {
            let mut stop = StopStrings::new(&stops);
            let mut out: String =
                chars.chunks(size).map(|piece| stop.push(&piece.iter().collect::<String>())).collect();
            if !stop.found() {
                out += &stop.finish();
            }
            assert_eq!(out, expected, "pieces of {size}");
        }
    }

    #[test]
    fn text_ends_before_the_first_stop_string() {
        check(&["\n\n"], "one\ntwo\n\nthree", "one\ntwo");
        check(&["END", "two"], "one two END", "one ");
        check(&["aab"], "aaaab", "aa");
        check(&["\u{1F600}!"], "smile \u{1F600}\u{1F600}! more", "smile \u{1F600}");
    }

    #[test]
    fn nothing_is_lost_without_one() {
        check(&["END"], "an EN", "an EN");
        check(&[""], "text", "text");
        check(&[], "text", "text");
    }
}

//! The framing of server-sent events: out of bytes, cut anywhere, the data of whole events. Lines end in LF or CRLF; an
//! event's `data` lines are joined, an empty line ends it, and comments and other fields say nothing to us.

#[derive(Default)]
pub struct Events {
    /// A line that has not ended yet.
    line: Vec<u8>,
    /// Data of an event that has not ended yet.
    data: Option<Vec<u8>>,
}

impl Events {
    /// The data of the events that end in these bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut events = Vec::new();
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.line.extend(part);
            if let Some(line) = self.line.strip_suffix(b"\n") {
                let line = line.strip_suffix(b"\r").unwrap_or(line);
                if line.is_empty() {
                    events.extend(self.data.take());
                } else if let Some(data) = line.strip_prefix(b"data:") {
                    let data = data.strip_prefix(b" ").unwrap_or(data);
                    match &mut self.data {
                        Some(whole) => whole.extend([b"\n", data].concat()),
                        None => self.data = Some(data.to_vec()),
                    }
                }
                self.line.clear();
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_wherever_bytes_are_cut() {
        let stream =
            b": a comment\r\nevent: x\r\ndata: {\"a\":1}\r\n\r\ndata:b\ndata: c\n\n\n\ndata: [DONE]\n\ndata: cut";
        let expected = ["{\"a\":1}", "b\nc", "[DONE]"].map(|data| data.as_bytes().to_vec());
        for step in 1..stream.len() {
            let mut events = Events::default();
            let got: Vec<Vec<u8>> = stream.chunks(step).flat_map(|bytes| events.push(bytes)).collect();
            assert_eq!(got, expected, "in steps of {step}");
        }
    }
}

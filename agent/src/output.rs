//! What the app prints: byte for byte to the agent's own stdout and stderr, where the platform's logging reads it, and as
//! numbered lines into a bounded ring, for `rrun logs` and for saying what a version printed that never got ready.
//!
//! The ring holds text for other people's terminals: of control sequences only colours (SGR) survive there. It is not a
//! log store; what is older than its limits is gone, which the gap in the numbers shows.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anstyle_parse::{DefaultCharAccumulator, Params, Parser, Perform};
use futures_util::{Stream, stream};
use rrun_protocol::Stream as Source;
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::watch,
};

/// Lines that the ring holds.
pub const MAX_LINES_KEPT: usize = 10_000;
/// Bytes of text that the ring holds.
pub const MAX_BYTES_KEPT: usize = 4 << 20;
/// Longest line; what is longer goes on in the next one.
pub const MAX_LINE_BYTES: usize = 16 << 10;
/// What is read from the app at once.
const CHUNK_BYTES: usize = 16 << 10;

/// A line that an app printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OutputLine {
    /// Rises by one with every line since the agent started.
    pub seq: u64,
    /// The generation that printed it.
    pub generation: u64,
    /// Where it printed it.
    pub stream: Source,
    /// Without its line end.
    pub text: String,
}

/// The output of all generations; clones share it.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

struct Shared {
    ring: Mutex<Ring>,
    /// Number of the next line.
    next: watch::Sender<u64>,
    stdout: Sink,
    stderr: Sink,
}

type Sink = tokio::sync::Mutex<Box<dyn AsyncWrite + Send + Unpin>>;

#[derive(Default)]
struct Ring {
    lines: VecDeque<OutputLine>,
    bytes: usize,
    next: u64,
}

impl Output {
    /// Passes on to the agent's own stdout and stderr.
    pub fn new() -> Self {
        Self::to(tokio::io::stdout(), tokio::io::stderr())
    }

    /// Passes on to somewhere else.
    pub fn to(
        stdout: impl AsyncWrite + Send + Unpin + 'static,
        stderr: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Self {
        Self(Arc::new(Shared {
            ring: Mutex::default(),
            next: watch::Sender::new(0),
            stdout: Sink::new(Box::new(stdout)),
            stderr: Sink::new(Box::new(stderr)),
        }))
    }

    /// All lines that are still there, oldest first.
    pub fn recent(&self) -> Vec<OutputLine> {
        self.since(0)
    }

    /// All lines that are still there, then every new one. Whoever reads too slowly misses lines; the numbers show it.
    pub fn follow(&self) -> impl Stream<Item = OutputLine> + Send + 'static {
        let shared = self.clone();
        let changes = self.0.next.subscribe();
        let start = (shared, changes, VecDeque::new(), 0);
        stream::unfold(
            start,
            |(output, mut changes, mut lines, mut next)| async move {
                while lines.is_empty() {
                    changes.wait_for(|newest| *newest > next).await.ok()?;
                    lines = output.since(next).into();
                }
                let line: OutputLine = lines.pop_front()?;
                next = line.seq + 1;
                Some((line, (output, changes, lines, next)))
            },
        )
    }

    /// The last lines of one generation, oldest first.
    pub fn of_generation(&self, generation: u64, last: usize) -> Vec<OutputLine> {
        self.of_generation_since(generation, 0, last)
    }

    /// The same, without lines before number `since`.
    pub(crate) fn of_generation_since(
        &self,
        generation: u64,
        since: u64,
        last: usize,
    ) -> Vec<OutputLine> {
        let ring = self.ring();
        let newest_first = ring
            .lines
            .iter()
            .rev()
            .take_while(|line| line.seq >= since)
            .filter(|line| line.generation == generation);
        let mut lines: Vec<_> = newest_first.take(last).cloned().collect();
        lines.reverse();
        lines
    }

    /// Number of the next line.
    pub(crate) fn position(&self) -> u64 {
        self.ring().next
    }

    /// Passes on everything that comes out of `pipe` until its end.
    pub(crate) async fn pump(
        self,
        generation: u64,
        source: Source,
        mut pipe: impl AsyncRead + Unpin,
    ) {
        let mut lines = Lines::default();
        let mut chunk = vec![0; CHUNK_BYTES];
        // A broken pipe is an end like any other.
        while let Ok(length @ 1..) = pipe.read(&mut chunk).await {
            let chunk = &chunk[..length];
            self.pass_on(source, chunk).await;
            let texts = lines.take(chunk);
            self.keep(generation, source, texts);
        }
        self.keep(generation, source, lines.finish());
    }

    async fn pass_on(&self, source: Source, chunk: &[u8]) {
        let sink = match source {
            Source::Stdout => &self.0.stdout,
            Source::Stderr => &self.0.stderr,
        };
        let mut sink = sink.lock().await;
        let written = async {
            sink.write_all(chunk).await?;
            sink.flush().await
        };
        if let Err(error) = written.await {
            // Nobody reads the agent's output; the app goes on.
            tracing::debug!("the app's output could not be passed on: {error}");
        }
    }

    fn keep(&self, generation: u64, stream: Source, texts: Vec<String>) {
        if texts.is_empty() {
            return;
        }
        let mut ring = self.ring();
        for text in texts {
            ring.push(generation, stream, text);
        }
        self.0.next.send_replace(ring.next);
    }

    fn since(&self, seq: u64) -> Vec<OutputLine> {
        let ring = self.ring();
        let start = ring.lines.partition_point(|line| line.seq < seq);
        ring.lines.range(start..).cloned().collect()
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.0.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Output {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Output").finish_non_exhaustive()
    }
}

impl Ring {
    fn push(&mut self, generation: u64, stream: Source, text: String) {
        self.bytes += text.len();
        self.lines.push_back(OutputLine {
            seq: self.next,
            generation,
            stream,
            text,
        });
        self.next += 1;
        while self.lines.len() > MAX_LINES_KEPT || self.bytes > MAX_BYTES_KEPT {
            let Some(oldest) = self.lines.pop_front() else {
                return;
            };
            self.bytes -= oldest.text.len();
        }
    }
}

/// Cuts a byte stream into lines of text without control sequences other than colours.
#[derive(Default)]
struct Lines {
    parser: Parser<DefaultCharAccumulator>,
    text: Text,
}

/// What the parser found since the last call.
#[derive(Default)]
struct Text {
    line: String,
    done: Vec<String>,
}

impl Lines {
    fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        for byte in bytes {
            self.parser.advance(&mut self.text, *byte);
        }
        std::mem::take(&mut self.text.done)
    }

    fn finish(mut self) -> Vec<String> {
        if !self.text.line.is_empty() {
            self.text.end_line();
        }
        self.text.done
    }
}

impl Text {
    fn push(&mut self, text: &str) {
        if self.line.len() + text.len() > MAX_LINE_BYTES {
            self.end_line();
        }
        self.line.push_str(text);
    }

    fn end_line(&mut self) {
        self.done.push(std::mem::take(&mut self.line));
    }
}

impl Perform for Text {
    fn print(&mut self, character: char) {
        // C1 controls arrive as characters of UTF-8.
        if !character.is_control() {
            self.push(character.encode_utf8(&mut [0; 4]));
        }
    }

    fn execute(&mut self, byte: u8) {
        match byte {
            b'\n' => self.end_line(),
            b'\t' => self.push("\t"),
            _ => {}
        }
    }

    fn csi_dispatch(&mut self, params: &Params, intermediates: &[u8], ignore: bool, action: u8) {
        if action != b'm' || ignore || !intermediates.is_empty() {
            return;
        }
        let numbers = params
            .iter()
            .map(|sub| sub.iter().map(u16::to_string).collect::<Vec<_>>().join(":"))
            .collect::<Vec<_>>()
            .join(";");
        self.push(&format!("\x1b[{numbers}m"));
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    fn lines(bytes: &[u8]) -> Vec<String> {
        let mut lines = Lines::default();
        let mut done = Vec::new();
        // Byte by byte: no sequence may depend on where a read ended.
        for byte in bytes {
            done.extend(lines.take(&[*byte]));
        }
        done.extend(lines.finish());
        done
    }

    #[test]
    fn only_colours_survive() {
        let sent = b"\x1b[1;31mred\x1b[0m\x1b[2J\x1b[H\x1b]0;title\x07\x1bP1;2qdata\x1b\\ plain\ttab\r\n\x1b[?25lnext\x07\xc2\x9b31m";
        assert_eq!(lines(sent), ["\x1b[1;31mred\x1b[0m plain\ttab", "next31m"]);
    }

    #[test]
    fn text_that_is_not_utf8_is_kept_readable() {
        assert_eq!(
            lines("gr\u{fc}n \u{1f980}\n".as_bytes()),
            ["gr\u{fc}n \u{1f980}"]
        );
        assert!(lines(b"a\xffb\n")[0].starts_with('a'));
        assert!(lines(b"a\xffb\n")[0].ends_with('b'));
    }

    #[test]
    fn an_endless_line_is_cut() {
        let cut = lines(&vec![b'x'; MAX_LINE_BYTES * 2 + 1]);
        let lengths: Vec<_> = cut.iter().map(String::len).collect();
        assert_eq!(lengths, [MAX_LINE_BYTES, MAX_LINE_BYTES, 1]);
    }

    #[tokio::test]
    async fn every_byte_is_passed_on_and_the_ring_stays_bounded() {
        let (sink, mut passed) = tokio::io::duplex(1 << 20);
        let output = Output::to(sink, tokio::io::sink());
        let count = MAX_LINES_KEPT + 10;
        let sent: Vec<u8> = (0..count)
            .flat_map(|number| format!("\x1b[2J{number}\r\n").into_bytes())
            .collect();
        output.clone().pump(7, Source::Stdout, &sent[..]).await;

        let mut received = vec![0; sent.len()];
        passed.read_exact(&mut received).await.unwrap();
        assert_eq!(received, sent);

        let kept = output.recent();
        assert_eq!(kept.len(), MAX_LINES_KEPT);
        assert_eq!(kept[0].seq, 10);
        assert_eq!(kept[0].text, "10");
        let last = output.of_generation(7, 2);
        assert_eq!(last[1].text, (count - 1).to_string());
        assert_eq!(output.of_generation(8, 2), []);
    }

    #[tokio::test]
    async fn who_follows_gets_the_ring_and_then_what_is_new() {
        let output = Output::to(tokio::io::sink(), tokio::io::sink());
        output.keep(1, Source::Stdout, vec!["old".into()]);
        let mut follow = Box::pin(output.follow());
        assert_eq!(follow.next().await.unwrap().text, "old");
        assert!(futures_util::poll!(follow.next()).is_pending());
        output.keep(1, Source::Stderr, vec!["new".into()]);
        let line = follow.next().await.unwrap();
        assert_eq!((line.seq, line.text.as_str()), (1, "new"));
    }
}

//! Shows what happens. The only file that prints.
//!
//! stdout is data: results, lists, logs, or JSON lines. stderr is talk: cargo's log, warnings, hints, errors. Colours go where a terminal
//! is or where they are forced, never into a pipe by themselves; a reader that is gone is no error. It decides nothing.

use std::{
    cell::RefCell,
    fmt::{self, Display},
    io::{self, IsTerminal as _, Write},
};

use anstream::AutoStream;
use clap::builder::{
    StyledStr,
    styling::{AnsiColor, Style as Paint},
};
use indicatif::{ProgressBar, ProgressStyle};
use rrun_protocol::{Event, EventKind, HistoryEntry, Outcome, Status, Stream};
use serde::Serialize;
use serde_json::json;

use crate::{
    account::{StageTimes, Summary},
    problem::Problem,
    scan::Listed,
};

const ERROR: Paint = AnsiColor::BrightRed.on_default().bold();
const WARNING: Paint = AnsiColor::BrightYellow.on_default().bold();
const HINT: Paint = AnsiColor::BrightCyan.on_default().bold();
const GOOD: Paint = AnsiColor::BrightGreen.on_default().bold();
const FAINT: Paint = Paint::new().dimmed();

/// For whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    People,
    /// One JSON object a line on stdout.
    Json,
}

impl Style {
    pub(crate) fn from_json(json: bool) -> Self {
        if json { Self::Json } else { Self::People }
    }
}

/// Both outputs, and cargo's progress line between them.
pub(crate) struct Render {
    style: Style,
    outputs: RefCell<Outputs>,
}

struct Outputs {
    data: Box<dyn Write>,
    talk: Box<dyn Write>,
    /// Only where stderr is a terminal.
    progress: Option<ProgressBar>,
}

impl Render {
    /// Writes to the process's own outputs.
    pub(crate) fn new(style: Style) -> Self {
        let progress = (style == Style::People && io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(template) = ProgressStyle::with_template("{wide_msg}") {
                bar.set_style(template);
            }
            bar
        });
        Self {
            style,
            outputs: RefCell::new(Outputs {
                data: Box::new(AutoStream::auto(io::stdout())),
                talk: Box::new(AutoStream::auto(io::stderr())),
                progress,
            }),
        }
    }

    /// One event of a push.
    pub(crate) fn event(&self, event: &Event) {
        match self.style {
            // The laptop adds to the terminal event what only it knows, and shows it then.
            Style::Json if event.kind.outcome().is_some() => {}
            Style::Json => self.json(event),
            Style::People => self.event_for_people(&event.kind),
        }
    }

    fn event_for_people(&self, event: &EventKind) {
        match event {
            EventKind::Progress { text } => self.progress(text),
            EventKind::Log { text } => self.talk(text),
            EventKind::Waiting { reason } => {
                self.talk(format_args!("{FAINT}waiting: {reason}{FAINT:#}"))
            }
            EventKind::App { stream, text } => {
                let stream = match stream {
                    Stream::Stdout => "stdout",
                    Stream::Stderr => "stderr",
                };
                self.talk(format_args!("{FAINT}app {stream} |{FAINT:#} {text}"));
            }
            EventKind::Warning { text, hint } => self.warning(text, hint.as_deref()),
            EventKind::Received { .. }
            | EventKind::Applied { .. }
            | EventKind::Building { .. }
            | EventKind::Built { .. }
            | EventKind::Starting { .. }
            | EventKind::Heartbeat
            | EventKind::Finished(_) => {}
        }
    }

    /// The end of a command that ends with a terminal event.
    pub(crate) fn finished(&self, summary: &Summary) {
        self.end_progress();
        let line = result_line(summary);
        if self.style == Style::Json {
            self.terminal(summary);
        }
        let problem = failure(summary);
        match (&problem, self.style) {
            (None, Style::People) => self.data(line),
            (None, Style::Json) => {}
            (Some(problem), style) => {
                self.error(&problem.0);
                if let Some(hint) = &problem.1 {
                    self.hint(hint);
                }
                if style == Style::People {
                    self.talk(line);
                }
            }
        }
        if let (None, Some(hint), Style::People) = (&problem, &summary.hint, self.style) {
            self.hint(hint);
        }
    }

    /// The end of such a command that no agent reported.
    pub(crate) fn ended_by(&self, summary: &Summary, problem: &Problem) {
        if self.style == Style::Json {
            self.terminal(summary);
        }
        self.problem(problem);
    }

    /// The terminal event of a push that could not even start.
    pub(crate) fn unstarted(&self, problem: &Problem) {
        if self.style == Style::Json {
            let account = crate::account::Account::new(std::time::Instant::now());
            self.terminal(&account.ended_by(problem));
        }
    }

    /// An error that ends a command, and what to do next.
    pub(crate) fn problem(&self, problem: &Problem) {
        self.end_progress();
        self.error(&problem.error);
        if let Some(hint) = &problem.hint {
            self.hint(hint);
        }
    }

    /// Something that the user should know.
    pub(crate) fn warning(&self, text: &str, hint: Option<&str>) {
        self.remark("warning", WARNING, text, hint);
    }

    /// Something that the user may like to know.
    pub(crate) fn note(&self, text: &str, hint: Option<&str>) {
        self.remark("note", FAINT, text, hint);
    }

    /// A push that takes a while to send.
    pub(crate) fn sending(&self, files: usize, packed: u64, unpacked: u64) {
        let (files, packed, unpacked) = (count(files as u64, "file"), size(packed), size(unpacked));
        self.note(
            &format!("sending {files}, {packed} ({unpacked} unpacked)"),
            None,
        );
    }

    /// What to do next.
    pub(crate) fn hint(&self, text: impl Display) {
        self.talk(format_args!("{HINT}hint{HINT:#}: {text}"));
    }

    /// A line of data.
    pub(crate) fn line(&self, text: impl Display) {
        self.data(text);
    }

    /// Data as it comes. Says whether somebody still reads it.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> bool {
        let data = &mut self.outputs.borrow_mut().data;
        data.write_all(bytes).and_then(|()| data.flush()).is_ok()
    }

    /// A value as one line of JSON.
    pub(crate) fn json(&self, value: &impl Serialize) {
        if let Ok(line) = serde_json::to_string(value) {
            self.data(line);
        }
    }

    /// What clap says of a command line.
    pub(crate) fn command_line(&self, text: &StyledStr, is_error: bool) {
        let text = text.ansi().to_string();
        match (is_error, self.style) {
            (true, _) => self.talk(text.trim_end()),
            (false, _) => self.data(text.trim_end()),
        }
    }

    /// What a push would send.
    pub(crate) fn listing(&self, listing: &[Listed], push: &DryRun) {
        match self.style {
            Style::Json => {
                for file in listing {
                    self.json(&json!({
                        "event": "file", "path": file.path, "size": file.size, "rule": file.rule, "sent": file.sent,
                    }));
                }
                self.json(&json!({
                    "event": "dry_run", "tree": push.tree, "files": push.files, "bytes": push.bytes,
                }));
            }
            Style::People => {
                let width = listing.iter().map(|file| file.path.chars().count()).max();
                for file in listing {
                    self.data(ListedLine(file, width.unwrap_or_default().min(60)));
                }
                self.data(format_args!(
                    "{}, {} in all",
                    count(push.files as u64, "file"),
                    size(push.bytes)
                ));
            }
        }
    }

    /// What the agent runs.
    pub(crate) fn status(&self, url: &str, status: &Status) {
        match self.style {
            Style::Json => self.json(status),
            Style::People => self.data(status_lines(url, status)),
        }
    }

    /// What was pushed.
    pub(crate) fn history(&self, entries: &[HistoryEntry]) {
        for entry in entries {
            match self.style {
                Style::Json => self.json(entry),
                Style::People => self.data(history_line(entry)),
            }
        }
    }

    fn terminal(&self, summary: &Summary) {
        #[derive(Serialize)]
        struct Terminal<'a> {
            event: &'static str,
            #[serde(flatten)]
            summary: &'a Summary,
        }
        self.json(&Terminal {
            event: "finished",
            summary,
        });
    }

    fn error(&self, text: &str) {
        self.talk(format_args!("{ERROR}error{ERROR:#}: {text}"));
    }

    fn remark(&self, word: &str, paint: Paint, text: &str, hint: Option<&str>) {
        match self.style {
            Style::Json => self.json(&json!({"event": word, "text": text, "hint": hint})),
            Style::People => {
                self.talk(format_args!("{paint}{word}{paint:#}: {text}"));
                if let Some(hint) = hint {
                    self.hint(hint);
                }
            }
        }
    }

    fn progress(&self, text: &str) {
        if let Some(bar) = &self.outputs.borrow().progress {
            bar.set_message(text.trim().to_owned());
            bar.tick();
        }
    }

    fn end_progress(&self) {
        if let Some(bar) = &self.outputs.borrow().progress {
            bar.finish_and_clear();
        }
    }

    fn data(&self, line: impl Display) {
        self.write(|outputs| &mut outputs.data, line);
    }

    fn talk(&self, line: impl Display) {
        self.write(|outputs| &mut outputs.talk, line);
    }

    /// Writes one line. That nobody reads it any more ends nothing: the push goes on.
    fn write(&self, output: impl Fn(&mut Outputs) -> &mut Box<dyn Write>, line: impl Display) {
        let mut outputs = self.outputs.borrow_mut();
        let bar = outputs.progress.clone();
        let mut write = || {
            let output = output(&mut outputs);
            let _ = writeln!(output, "{line}").and_then(|()| output.flush());
        };
        match bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

/// What a push would send, in numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DryRun {
    pub(crate) tree: rrun_protocol::TreeDigest,
    pub(crate) files: usize,
    pub(crate) bytes: u64,
}

/// One file of a dry run.
struct ListedLine<'a>(&'a Listed, usize);

impl Display for ListedLine<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(file, width) = self;
        let (paint, word) = if file.sent {
            (GOOD, "sent")
        } else {
            (FAINT, "left out")
        };
        write!(
            formatter,
            "{paint}{word:8}{paint:#}  {:>9}  {:width$}  {FAINT}{}{FAINT:#}",
            size(file.size),
            file.path,
            file.rule,
        )
    }
}

/// Why a push that ended badly did, and what to do; `None` if it ended well.
fn failure(summary: &Summary) -> Option<(String, Option<String>)> {
    let default = match summary.outcome {
        Outcome::Live | Outcome::Unchanged | Outcome::Applied | Outcome::HandedOver => return None,
        Outcome::BuildFailed => "it did not compile".to_owned(),
        Outcome::NotReady => "the new version never became ready".to_owned(),
        Outcome::Superseded => match summary.superseded_by {
            Some(newer) => format!("push {newer} took its place"),
            None => "a newer push took its place".to_owned(),
        },
        Outcome::Cancelled => "cancelled".to_owned(),
        Outcome::Refused => "the agent refused the push".to_owned(),
        Outcome::Failed => "the agent failed".to_owned(),
    };
    let reason = summary.reason.clone().unwrap_or(default);
    Some((reason, summary.hint.clone()))
}

/// The line that a push ends with.
fn result_line(summary: &Summary) -> String {
    let (paint, word) = match summary.outcome {
        Outcome::Live => (GOOD, "live"),
        Outcome::Unchanged => (GOOD, "unchanged"),
        Outcome::Applied => (GOOD, "applied"),
        Outcome::HandedOver => (GOOD, "handed over"),
        Outcome::BuildFailed => (ERROR, "not compiled"),
        Outcome::NotReady => (ERROR, "not ready"),
        Outcome::Superseded => (WARNING, "superseded"),
        Outcome::Cancelled => (WARNING, "cancelled"),
        Outcome::Refused => (ERROR, "refused"),
        Outcome::Failed => (ERROR, "failed"),
    };
    let mut parts = vec![format!("{paint}{word}{paint:#}")];
    parts.extend(summary.url.clone());
    let is_new = matches!(
        summary.outcome,
        Outcome::Live | Outcome::Unchanged | Outcome::HandedOver
    );
    parts.extend(summary.generation.map(|generation| match is_new {
        true => format!("generation {generation}"),
        false => format!("generation {generation} still serves"),
    }));
    let up = format!("{} up", size(summary.traffic.bytes_up));
    let trips = count(summary.traffic.round_trips, "round trip");
    parts.push(match summary.files {
        Some(files) => format!("{}, {up}, {trips}", count(files as u64, "file")),
        None => format!("{up}, {trips}"),
    });
    parts.push(stages(&summary.timings_ms));
    parts.join("  ")
}

fn stages(times: &StageTimes) -> String {
    let stages = [
        ("scan", times.scan),
        ("pack", times.pack.filter(|millis| *millis > 0)),
        ("send", times.send),
        ("apply", times.agent.apply),
        ("build", times.agent.build),
        ("ready", times.agent.ready),
        ("swap", times.agent.swap),
        ("total", Some(times.total)),
    ];
    let shown: Vec<String> = stages
        .into_iter()
        .filter_map(|(stage, millis)| Some(format!("{stage} {}", time(millis?))))
        .collect();
    shown.join(" · ")
}

fn time(millis: u64) -> String {
    match millis {
        0..10_000 => format!("{millis} ms"),
        _ => format!("{}.{} s", millis / 1000, millis % 1000 / 100),
    }
}

/// A number of bytes as people read it, in powers of 1000.
fn size(bytes: u64) -> String {
    let tenths = |unit: u64| format!("{}.{}", bytes / unit, bytes % unit / (unit / 10));
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{} kB", tenths(1_000)),
        _ => format!("{} MB", tenths(1_000_000)),
    }
}

fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

fn status_lines(url: &str, status: &Status) -> String {
    let app = match (status.generation, status.process) {
        (Some(generation), Some(process)) => format!(
            "{}, generation {generation}, process {process}, {}",
            status.state,
            count(u64::from(status.restarts), "restart")
        ),
        (Some(generation), None) => format!("{}, generation {generation}", status.state),
        (None, _) => status.state.clone(),
    };
    let built = match (status.needs_build, status.serving_tree) {
        (true, _) => ", waits for a build",
        (false, Some(serving)) if serving != status.tree => ", not what serves",
        _ => "",
    };
    let kept: Vec<String> = status.kept.iter().map(u64::to_string).collect();
    let rows = [
        ("service", url.to_owned()),
        ("agent", format!("{}, boot {}", status.version, status.boot)),
        (
            "toolchain",
            status
                .toolchain
                .clone()
                .unwrap_or_else(|| "none".to_owned()),
        ),
        (
            "tree",
            format!(
                "{}, {}{built}",
                status.tree.short(),
                count(status.files as u64, "file")
            ),
        ),
        ("app", app),
        (
            "push",
            status
                .push
                .map_or_else(|| "none under way".to_owned(), |push| push.to_string()),
        ),
        (
            "kept",
            if kept.is_empty() {
                "no earlier generation".to_owned()
            } else {
                format!("generation {}", kept.join(", "))
            },
        ),
    ];
    rows.map(|(name, value)| format!("{FAINT}{name:9}{FAINT:#}  {value}"))
        .join("\n")
}

fn history_line(entry: &HistoryEntry) -> String {
    let outcome = serde_json::to_value(entry.outcome)
        .ok()
        .and_then(|word| Some(word.as_str()?.replace('_', " ")))
        .unwrap_or_default();
    let generation = entry.generation.map_or_else(String::new, |generation| {
        format!("  generation {generation}")
    });
    let when = std::time::UNIX_EPOCH + std::time::Duration::from_secs(entry.time);
    format!(
        "{}  {outcome:12}  {}  tree {}  {}  {}{generation}",
        humantime::format_rfc3339_seconds(when),
        entry.push,
        entry.tree.short(),
        time(entry.millis),
        entry.by,
    )
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc, time::Instant};

    use rrun_protocol::{Manifest, PushId, Report, Timings};

    use super::*;
    use crate::account::Account;

    #[derive(Clone, Default)]
    struct Shared(Rc<RefCell<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.borrow_mut().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What `show` writes, as a pipe gets it: stdout, a line, stderr.
    fn shown(style: Style, show: impl Fn(&Render)) -> String {
        let (data, talk) = (Shared::default(), Shared::default());
        let render = Render {
            style,
            outputs: RefCell::new(Outputs {
                data: Box::new(data.clone()),
                talk: Box::new(talk.clone()),
                progress: None,
            }),
        };
        show(&render);
        let text = |output: &Shared| {
            let stripped = anstream::adapter::strip_bytes(&output.0.borrow()).into_vec();
            String::from_utf8(stripped).unwrap()
        };
        format!("{}---\n{}", text(&data), text(&talk))
    }

    fn summary(outcome: Outcome) -> Summary {
        let mut account = Account::new(Instant::now());
        account.url = Some("http://127.0.0.1:8080".to_owned());
        account.push = Some(PushId::from_random(*b"push-push"));
        account.files = Some(1);
        account.traffic.bytes_up = 331;
        account.traffic.bytes_down = 2048;
        account.traffic.round_trips = 1;
        let mut summary = account.reported(Report {
            outcome,
            tree: Manifest::default().tree_digest(),
            generation: Some(2),
            reason: None,
            hint: None,
            superseded_by: None,
            timings_ms: Timings {
                apply: Some(1),
                build: Some(402),
                ready: Some(8),
                swap: Some(0),
            },
        });
        summary.timings_ms.scan = Some(2);
        summary.timings_ms.pack = Some(0);
        summary.timings_ms.send = Some(1);
        summary.timings_ms.total = 421;
        summary
    }

    #[test]
    fn a_push_that_is_live_ends_with_one_line_on_stdout() {
        let text = shown(Style::People, |render| {
            render.finished(&summary(Outcome::Live));
        });
        insta::assert_snapshot!(text, @r"
        live  http://127.0.0.1:8080  generation 2  1 file, 331 B up, 1 round trip  scan 2 ms · send 1 ms · apply 1 ms · build 402 ms · ready 8 ms · swap 0 ms · total 421 ms
        ---
        ");
    }

    #[test]
    fn a_push_that_fails_says_why_and_what_still_serves_on_stderr() {
        let mut summary = summary(Outcome::NotReady);
        summary.reason = Some("listens on 3000, not on $PORT (41233)".to_owned());
        summary.hint = Some("read the port from the environment".to_owned());
        summary.files = Some(2);
        summary.traffic.bytes_up = 12_345;
        summary.traffic.round_trips = 3;
        summary.timings_ms.agent.swap = None;
        let text = shown(Style::People, |render| render.finished(&summary));
        insta::assert_snapshot!(text, @r"
        ---
        error: listens on 3000, not on $PORT (41233)
        hint: read the port from the environment
        not ready  http://127.0.0.1:8080  generation 2 still serves  2 files, 12.3 kB up, 3 round trips  scan 2 ms · send 1 ms · apply 1 ms · build 402 ms · ready 8 ms · total 421 ms
        ");
    }

    #[test]
    fn the_talk_of_a_push_goes_to_stderr() {
        let events = [
            EventKind::Waiting {
                reason: "another push is being applied".to_owned(),
            },
            EventKind::Log {
                text: "\u{1b}[32m   Compiling\u{1b}[0m app v0.1.0".to_owned(),
            },
            EventKind::Progress {
                text: "Building [==> ] 1/2".to_owned(),
            },
            EventKind::App {
                stream: Stream::Stderr,
                text: "thread 'main' panicked".to_owned(),
            },
            EventKind::Warning {
                text: "listens on 127.0.0.1 only".to_owned(),
                hint: Some("listen on 0.0.0.0".to_owned()),
            },
            EventKind::Heartbeat,
        ];
        let text = shown(Style::People, |render| {
            for kind in events.clone() {
                render.event(&Event { seq: 1, kind });
            }
        });
        insta::assert_snapshot!(text, @r"
        ---
        waiting: another push is being applied
           Compiling app v0.1.0
        app stderr | thread 'main' panicked
        warning: listens on 127.0.0.1 only
        hint: listen on 0.0.0.0
        ");
    }

    #[test]
    fn json_lines_end_with_the_terminal_event() {
        let text = shown(Style::Json, |render| {
            render.event(&Event {
                seq: 1,
                kind: EventKind::Heartbeat,
            });
            render.finished(&summary(Outcome::Live));
        });
        let text = text.replace(&Manifest::default().tree_digest().to_string(), "TREE");
        insta::assert_snapshot!(text, @r#"
        {"seq":1,"event":"heartbeat"}
        {"event":"finished","outcome":"live","url":"http://127.0.0.1:8080","push":"cHVzaC1wdXNo","tree":"TREE","generation":2,"files":1,"bytes_up":331,"bytes_down":2048,"round_trips":1,"timings_ms":{"scan":2,"pack":0,"send":1,"apply":1,"build":402,"ready":8,"swap":0,"total":421},"exit_code":0}
        ---
        "#);
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        let render = Render {
            style: Style::People,
            outputs: RefCell::new(Outputs {
                data: Box::new(Gone),
                talk: Box::new(Gone),
                progress: None,
            }),
        };
        render.finished(&summary(Outcome::Failed));
        render.finished(&summary(Outcome::Live));
        assert!(!render.bytes(b"log"));
    }

    #[test]
    fn a_dry_run_lists_each_file_with_its_rule() {
        let listing = [
            Listed {
                path: "src/main.rs".to_owned(),
                size: 1234,
                rule: "package `app`".to_owned(),
                sent: true,
            },
            Listed {
                path: "target/".to_owned(),
                size: 0,
                rule: "the target directory".to_owned(),
                sent: false,
            },
        ];
        let push = DryRun {
            tree: Manifest::default().tree_digest(),
            files: 1,
            bytes: 1234,
        };
        let text = shown(Style::People, |render| render.listing(&listing, &push));
        insta::assert_snapshot!(text, @r"
        sent         1.2 kB  src/main.rs  package `app`
        left out        0 B  target/      the target directory
        1 file, 1.2 kB in all
        ---
        ");
    }
}

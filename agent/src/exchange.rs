//! One exchange under way: where its events go, what stops it, and how it ends.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use rrun_protocol::{EventKind, Outcome, PushId, Timings, TreeDigest};
use tokio_util::sync::CancellationToken;

use crate::{
    compile::BuildLog,
    output::OutputLine,
    shared::{Events, Log},
};

/// Lines of the app's output that are shown when it did not become ready.
const SHOWN_OUTPUT: usize = 50;

/// Stops a piece of work, with the reason.
#[derive(Default)]
pub(crate) struct Stop {
    pub(crate) token: CancellationToken,
    pub(crate) superseded_by: OnceLock<PushId>,
    /// Cancelled when the agent itself ends.
    pub(crate) shutdown: CancellationToken,
}

impl Stop {
    /// Stops the work for something newer, which is named if it is a push.
    pub(crate) fn give_way_to(&self, newer: Option<PushId>) {
        if let Some(newer) = newer {
            let _ = self.superseded_by.set(newer);
        }
        self.token.cancel();
    }
}

/// One exchange under way: where its events go, and what its report will say.
pub(crate) struct Exchange<'s> {
    pub(crate) events: Events,
    pub(crate) id: PushId,
    pub(crate) by: String,
    pub(crate) tree: TreeDigest,
    pub(crate) started: Instant,
    pub(crate) timings: Timings,
    pub(crate) stop: &'s Stop,
}

/// How an exchange ends, before it is dressed up as a report.
pub(crate) struct Ending {
    pub(crate) outcome: Outcome,
    pub(crate) reason: Option<String>,
    pub(crate) hint: Option<String>,
}

impl Ending {
    pub(crate) fn of(outcome: Outcome) -> Self {
        Self {
            outcome,
            reason: None,
            hint: None,
        }
    }

    pub(crate) fn because(outcome: Outcome, reason: impl Into<String>) -> Self {
        Self {
            outcome,
            reason: Some(reason.into()),
            hint: None,
        }
    }
}

impl Exchange<'_> {
    pub(crate) fn tell(&self, event: EventKind) {
        self.events.append(event);
    }

    pub(crate) fn warn(&self, text: String, hint: Option<String>) {
        self.tell(EventKind::Warning { text, hint });
    }

    /// The end of work that was stopped.
    pub(crate) fn stopped(&self) -> Ending {
        match self.stop.superseded_by.get() {
            Some(_) => Ending::because(Outcome::Superseded, "a newer push took its place"),
            None if self.stop.shutdown.is_cancelled() => {
                Ending::because(Outcome::Cancelled, "the agent was told to end")
            }
            None => Ending::of(Outcome::Cancelled),
        }
    }
}

impl Exchange<'_> {
    /// Shows the last that the app printed.
    pub(crate) fn show_output(&self, output: &[OutputLine]) {
        for line in &output[output.len().saturating_sub(SHOWN_OUTPUT)..] {
            self.tell(EventKind::App {
                stream: line.stream,
                text: line.text.clone(),
            });
        }
    }
}

/// A build's lines go to its own log, and with everything else to the push's events.
pub(crate) struct Tee<'a> {
    pub(crate) events: &'a Events,
    pub(crate) log: &'a Log,
}

impl BuildLog for Tee<'_> {
    fn tell(&self, event: EventKind) {
        match &event {
            EventKind::Progress { .. } => return self.events.show(event),
            EventKind::Log { text } | EventKind::Warning { text, .. } => {
                self.log.append(text.clone())
            }
            _ => {}
        }
        self.events.append(event);
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn millis_since(start: Instant) -> u64 {
    millis(start.elapsed())
}

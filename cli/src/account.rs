//! What a push came to and what it cost: the terminal event, as the laptop tells it.
//!
//! Filled in while the push proceeds, so that there is a whole answer however it ends. It measures nothing itself.

use std::time::{Duration, Instant};

use rrun_protocol::{ExitCode, Outcome, PushId, Report, Timings, TreeDigest};
use serde::Serialize;

use crate::{connection::Traffic, problem::Problem};

/// Running notes about one command that ends with a terminal event.
#[derive(Debug)]
pub(crate) struct Account {
    started: Instant,
    /// Where it goes.
    pub(crate) url: Option<String>,
    pub(crate) push: Option<PushId>,
    pub(crate) tree: Option<TreeDigest>,
    /// Files changed, added and deleted; `None` if the command sends no files.
    pub(crate) files: Option<usize>,
    pub(crate) scan: Option<Duration>,
    pub(crate) pack: Option<Duration>,
    pub(crate) send: Option<Duration>,
    pub(crate) traffic: Traffic,
    /// What to do next, if it ends well.
    pub(crate) hint: Option<String>,
}

/// The terminal event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub(crate) outcome: Outcome,
    pub(crate) url: Option<String>,
    pub(crate) push: Option<PushId>,
    pub(crate) tree: Option<TreeDigest>,
    pub(crate) generation: Option<u64>,
    pub(crate) files: Option<usize>,
    #[serde(flatten)]
    pub(crate) traffic: Traffic,
    pub(crate) timings_ms: StageTimes,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) superseded_by: Option<PushId>,
    #[serde(rename = "exit_code", serialize_with = "as_number")]
    pub(crate) code: ExitCode,
}

/// Time by stage in milliseconds; `None` for a stage that was not reached or not needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct StageTimes {
    /// Finding the project and reading what changed.
    pub(crate) scan: Option<u64>,
    pub(crate) pack: Option<u64>,
    /// From the first byte until the agent's first event.
    pub(crate) send: Option<u64>,
    #[serde(flatten)]
    pub(crate) agent: Timings,
    /// The whole process, since it started.
    pub(crate) total: u64,
}

impl Account {
    pub(crate) fn new(started: Instant) -> Self {
        Self {
            started,
            url: None,
            push: None,
            tree: None,
            files: None,
            scan: None,
            pack: None,
            send: None,
            traffic: Traffic::default(),
            hint: None,
        }
    }

    /// The end that the agent reported.
    pub(crate) fn reported(&self, report: Report) -> Summary {
        Summary {
            outcome: report.outcome,
            tree: Some(report.tree),
            generation: report.generation,
            reason: report.reason,
            hint: report.hint.or_else(|| self.hint.clone()),
            superseded_by: report.superseded_by,
            code: report.outcome.exit_code(),
            ..self.summary(report.timings_ms)
        }
    }

    /// The end when none was reported.
    pub(crate) fn ended_by(&self, problem: &Problem) -> Summary {
        Summary {
            outcome: problem.outcome,
            reason: Some(problem.error.clone()),
            hint: problem.hint.clone(),
            code: problem.code,
            ..self.summary(Timings::default())
        }
    }

    fn summary(&self, agent: Timings) -> Summary {
        Summary {
            outcome: Outcome::Failed,
            url: self.url.clone(),
            push: self.push,
            tree: self.tree,
            generation: None,
            files: self.files,
            traffic: self.traffic,
            timings_ms: StageTimes {
                scan: self.scan.map(millis),
                pack: self.pack.map(millis),
                send: self.send.map(millis),
                agent,
                total: millis(self.started.elapsed()),
            },
            reason: None,
            hint: None,
            superseded_by: None,
            code: ExitCode::Unexpected,
        }
    }
}

impl Summary {
    /// The command exits otherwise than the outcome alone would say.
    pub(crate) fn exit_with(&mut self, code: ExitCode) {
        self.code = code;
    }
}

fn as_number<S: serde::Serializer>(code: &ExitCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u8(*code as u8)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account() -> Account {
        Account::new(Instant::now())
    }

    #[test]
    fn every_end_has_the_exit_code_of_the_table() {
        for (problem, code) in [
            (Problem::usage("a"), 2),
            (Problem::unreachable("a"), 3),
            (Problem::refused("a"), 3),
            (Problem::unexpected("a"), 1),
            (Problem::cancelled("a"), 130),
        ] {
            assert_eq!(account().ended_by(&problem).code as u8, code);
        }
        for (outcome, code) in [
            (Outcome::Live, 0),
            (Outcome::Unchanged, 0),
            (Outcome::Applied, 0),
            (Outcome::HandedOver, 0),
            (Outcome::BuildFailed, 101),
            (Outcome::NotReady, 4),
            (Outcome::Superseded, 5),
            (Outcome::Cancelled, 130),
            (Outcome::Refused, 3),
            (Outcome::Failed, 1),
        ] {
            let report = Report {
                outcome,
                tree: rrun_protocol::Manifest::default().tree_digest(),
                generation: None,
                reason: None,
                hint: None,
                superseded_by: None,
                timings_ms: Timings::default(),
            };
            assert_eq!(account().reported(report).code as u8, code, "{outcome:?}");
        }
    }

    #[test]
    fn a_terminal_event_has_all_fields_even_when_nothing_was_reached() {
        let summary = account().ended_by(&Problem::unreachable("no agent"));
        let json = serde_json::to_value(summary).unwrap();
        for field in [
            "outcome",
            "push",
            "tree",
            "generation",
            "files",
            "bytes_up",
            "bytes_down",
            "round_trips",
        ] {
            assert!(json.get(field).is_some(), "{field}");
        }
        for stage in [
            "scan", "pack", "send", "apply", "build", "ready", "swap", "total",
        ] {
            assert!(json["timings_ms"].get(stage).is_some(), "{stage}");
        }
    }
}

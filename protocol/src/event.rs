//! What the agent tells while a push is under way: one JSON object a line, numbered, ended by exactly one terminal event.

use serde::{Deserialize, Serialize};

use crate::{
    digest::TreeDigest,
    id::PushId,
    outcome::{Outcome, Report},
    path::TreePath,
};

/// One line of an event stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Rises by one from 1 within a push; a broken stream is taken up at the last one seen. Heartbeats and progress repeat the last one.
    pub seq: u64,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// The push arrived whole and is checked. The first event.
    Received {
        /// The push's id.
        push: PushId,
        /// The tree it will make.
        tree: TreeDigest,
        /// Files changed and added.
        changed: usize,
        /// Files deleted.
        deleted: usize,
    },
    /// It waits until a previous push or build has ended.
    Waiting {
        /// What for: a lower-case fragment.
        reason: String,
    },
    /// The tree on the agent is the pushed one.
    Applied {
        /// Files that the build had changed in the tree and that were put back first.
        restored: Vec<TreePath>,
        /// Time it took in milliseconds.
        millis: u64,
    },
    /// Cargo starts.
    Building {
        /// Id of the build, for `GET /_rrun/builds/{id}/log`.
        build: u64,
        /// The command, for people.
        command: String,
    },
    /// Cargo's progress line. Not kept: a later one replaces it.
    Progress {
        /// As cargo prints it.
        text: String,
    },
    /// A line of the build log, with cargo's and rustc's colours.
    Log {
        /// Without its line end.
        text: String,
    },
    /// Cargo ended.
    Built {
        /// Whether it succeeded.
        success: bool,
        /// Units that cargo compiled, and build scripts that it ran.
        compiled: usize,
        /// Units that cargo found up to date.
        fresh: usize,
        /// Time it took in milliseconds.
        millis: u64,
    },
    /// A generation's process was started.
    Starting {
        /// Its number.
        generation: u64,
    },
    /// What the app printed while it was getting ready, shown when it did not.
    App {
        /// Where it printed it.
        stream: Stream,
        /// Without its line end.
        text: String,
    },
    /// Something the user should know that does not end the push.
    Warning {
        /// A lower-case fragment.
        text: String,
        /// What to do next.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
    /// Nothing happened for a while; the connection stands.
    Heartbeat,
    /// The end.
    Finished(Report),
}

/// One of a process's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Time that each stage took, in milliseconds; `None` for a stage that was not reached or not needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Making the agent's tree the pushed one.
    pub apply: Option<u64>,
    /// Cargo, and what was read before and published after it.
    pub build: Option<u64>,
    /// From the start of the new process until it was ready.
    pub ready: Option<u64>,
    /// From ready until every new request went to the new version.
    pub swap: Option<u64>,
}

impl EventKind {
    /// The end of the push, if this is it.
    pub fn outcome(&self) -> Option<Outcome> {
        match self {
            Self::Finished(report) => Some(report.outcome),
            _ => None,
        }
    }

    /// Whether somebody who takes the stream up later has to see it too.
    pub fn is_kept(&self) -> bool {
        !matches!(self, Self::Progress { .. } | Self::Heartbeat)
    }
}

//! How a push ends, and the exit code that each end has.

use serde::{Deserialize, Serialize};

use crate::{digest::TreeDigest, event::Timings, id::PushId};

/// The one end of a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The pushed tree serves.
    Live,
    /// It served already.
    Unchanged,
    /// Applied without a build, as asked for.
    Applied,
    /// The agent's process became the app.
    HandedOver,
    /// It did not compile; the old version serves.
    BuildFailed,
    /// It compiled and never became ready; the old version serves.
    NotReady,
    /// A newer push took its place.
    Superseded,
    /// Somebody cancelled it.
    Cancelled,
    /// The agent did not take it; nothing was applied.
    Refused,
    /// Something else went wrong on the agent's side.
    Failed,
}

/// Exit codes of `rrun`, the only table of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Live, unchanged, applied or handed over.
    Success = 0,
    /// Unexpected: the project is not at fault.
    Unexpected = 1,
    /// Usage or settings.
    Usage = 2,
    /// The agent cannot be reached, or refused.
    Agent = 3,
    /// Built but never ready; the old version was kept.
    NotReady = 4,
    /// A newer push took its place.
    Superseded = 5,
    /// Did not compile. Cargo's own code for it.
    BuildFailed = 101,
    /// Cancelled, as by SIGINT.
    Cancelled = 130,
}

impl Outcome {
    /// The exit code of a push that ends so.
    pub fn exit_code(self) -> ExitCode {
        match self {
            Self::Live | Self::Unchanged | Self::Applied | Self::HandedOver => ExitCode::Success,
            Self::BuildFailed => ExitCode::BuildFailed,
            Self::NotReady => ExitCode::NotReady,
            Self::Superseded => ExitCode::Superseded,
            Self::Cancelled => ExitCode::Cancelled,
            Self::Refused => ExitCode::Agent,
            Self::Failed => ExitCode::Unexpected,
        }
    }
}

/// What the terminal event says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// The tree that the push announced.
    pub tree: TreeDigest,
    /// The generation that serves after the push, if any.
    pub generation: Option<u64>,
    /// Why, where the outcome alone does not say: a lower-case fragment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The push that took this one's place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub superseded_by: Option<PushId>,
    /// Time by stage on the agent's side.
    pub timings_ms: Timings,
}

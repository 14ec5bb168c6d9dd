//! What the agent answers to plain questions, and how it says no.

use serde::{Deserialize, Serialize};

use crate::{
    digest::TreeDigest,
    id::{BootId, PushId},
    outcome::Outcome,
};

/// Answer of `GET /_rrun/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Drawn when the agent started.
    pub boot: BootId,
    /// `rustc --version` of the agent's toolchain, if it has one.
    pub toolchain: Option<String>,
    /// The tree that lies on the agent.
    pub tree: TreeDigest,
    /// How many files it has.
    pub files: usize,
    /// Whether the tree waits for a build that succeeds.
    pub needs_build: bool,
    /// The generation that serves, if any.
    pub generation: Option<u64>,
    /// The tree that it was built from.
    pub serving_tree: Option<TreeDigest>,
    /// What it is doing: `serving`, `restarting`, `nothing`.
    pub state: String,
    /// Process id of the app.
    pub process: Option<u32>,
    /// The push under way, if any.
    pub push: Option<PushId>,
    /// How often the app died since it went live.
    pub restarts: u32,
    /// Generations that a rollback can go back to, newest first.
    pub kept: Vec<u64>,
}

/// One line of `GET /_rrun/history`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// The push.
    pub push: PushId,
    /// Who signed it.
    pub by: String,
    /// When it ended, in seconds since 1970 by the agent's clock.
    pub time: u64,
    /// The tree it announced.
    pub tree: TreeDigest,
    /// How it ended.
    pub outcome: Outcome,
    /// The generation that served after it.
    pub generation: Option<u64>,
    /// Time from the received body to the end, in milliseconds.
    pub millis: u64,
}

/// Body of every answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Why: a lower-case fragment.
    pub error: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// With 401: what a signature has to be made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootId>,
    /// With 401: the agent's clock, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<u64>,
    /// With 409: the tree that lies on the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<TreeDigest>,
}

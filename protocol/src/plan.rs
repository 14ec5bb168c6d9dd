//! What to build and how to run it: the part of a push that is not files.
//!
//! The laptop resolves a plan from the project's metadata and its settings ([`crate::Settings`]); `rrun-agent warm` and a
//! whole-tree push without a client resolve the same plan from the tree itself.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{digest::Digest, path::TreePath};

/// Everything besides the tree that decides what serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// What cargo is asked for.
    pub build: BuildPlan,
    /// How the result is run.
    pub run: RunPlan,
}

/// What cargo is asked for. Two pushes with equal build plans share the target directory's artefacts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildPlan {
    /// Folder of the cargo workspace's root manifest in the tree; `None` is the tree's root.
    pub directory: Option<TreePath>,
    /// Package that holds the binary.
    pub package: String,
    /// Name of the binary target.
    pub bin: String,
    /// Cargo profile, `dev` or `release` or one of the project's own.
    pub profile: String,
    /// Features to switch on, as `--features` takes them.
    pub features: Vec<String>,
    /// Whether the default features are switched off.
    pub no_default_features: bool,
    /// Environment of the build on top of the agent's fixed allow-list.
    pub environment: BTreeMap<String, String>,
}

/// How the app is run, judged ready and replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunPlan {
    /// Arguments of the app; `$PORT` and `${PORT}` stand for the port it has to listen on.
    pub args: Vec<String>,
    /// Environment of the app on top of the container's; values expand like `args`.
    pub environment: BTreeMap<String, String>,
    /// Folder in the tree whose layout the app's working directory copies; assets keep their paths below it.
    pub working_directory: Option<TreePath>,
    /// Files and folders in the tree that the app reads at run time.
    pub assets: Vec<TreePath>,
    /// Path that has to answer below 500 before the app counts as ready; `None`: listening is enough.
    pub ready_path: Option<String>,
    /// How long a new version may take until it is ready.
    pub ready_timeout: Duration,
    /// How long requests under way in the old version may take.
    pub drain_limit: Duration,
    /// The same for upgraded connections and event streams.
    pub stream_drain_limit: Duration,
    /// How the new version takes over.
    pub swap: SwapMode,
}

/// How the new version takes over from the old one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SwapMode {
    /// Start the new one, switch when it is ready, drain the old one.
    #[default]
    Hot,
    /// Stop the old one first, for apps that cannot run twice at once; requests are held meanwhile.
    Restart,
    /// Prove the new one ready, then replace the agent's process by it.
    Exec,
}

impl Default for RunPlan {
    fn default() -> Self {
        Self {
            args: Vec::new(),
            environment: BTreeMap::new(),
            working_directory: None,
            assets: Vec::new(),
            ready_path: None,
            ready_timeout: Duration::from_secs(60),
            drain_limit: Duration::from_secs(30),
            stream_drain_limit: Duration::from_secs(5 * 60),
            swap: SwapMode::Hot,
        }
    }
}

impl BuildPlan {
    /// Names the build plan: builds with equal digests keep each other's artefacts fresh.
    pub fn digest(&self) -> Digest {
        digest_of(self)
    }
}

fn digest_of(value: &impl Serialize) -> Digest {
    Digest::of(&postcard::to_stdvec(value).expect("plain values into memory always serialize"))
}

impl Plan {
    /// Names the plan: two pushes of one tree with the same digest here serve the same.
    ///
    /// Limits and swap mode decide how a version takes over, not what it is, and are left out.
    pub fn digest(&self) -> Digest {
        let RunPlan {
            args,
            environment,
            working_directory,
            assets,
            ..
        } = &self.run;
        let named = (&self.build, args, environment, working_directory, assets);
        digest_of(&named)
    }
}

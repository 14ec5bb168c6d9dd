//! What to build and how to run it: the part of a push that is not files.
//!
//! The laptop resolves a plan from the project's metadata and its settings ([`crate::Settings`]); `rrun-agent warm` and a
//! whole-tree push without a client resolve the same plan from the tree itself.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    limits::{MAX_ASSETS, MAX_PLAN_NAME_BYTES},
    manifest::Manifest,
    path::TreePath,
};

/// Names of this form are rrun's own: no build and no app gets one.
const OWN_VARIABLES: &str = "RRUN_";

/// Build environment that would move what cargo writes out of the agent's workspace.
const PLACES_OF_CARGO_S_OUTPUT: [&str; 3] = [
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_BUILD_BUILD_DIR",
];

/// A value of a plan that could make cargo or the app do something else than it names.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("refused the plan's {what} {value:?}: {why}")]
pub struct WrongPlan {
    what: &'static str,
    value: String,
    why: &'static str,
}

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

impl BuildPlan {
    fn check(&self) -> Result<(), WrongPlan> {
        check_name("package", &self.package)?;
        check_name("profile", &self.profile)?;
        check_argument("binary", &self.bin)?;
        if self.bin.contains(['*', '?', '[', ']', '/', '\\']) {
            return Err(wrong("binary", &self.bin, "it names more than one file"));
        }
        for feature in &self.features {
            check_argument("feature", feature)?;
        }
        for (name, value) in &self.environment {
            check_variable("build environment", name, value)?;
            if PLACES_OF_CARGO_S_OUTPUT.contains(&name.as_str()) {
                let why = "the agent has a target directory of its own";
                return Err(wrong("build environment", name, why));
            }
        }
        Ok(())
    }
}

impl RunPlan {
    fn check(&self) -> Result<(), WrongPlan> {
        if let Some(argument) = self.args.iter().find(|argument| argument.contains('\0')) {
            return Err(wrong("argument", argument, HAS_NUL));
        }
        for (name, value) in &self.environment {
            check_variable("environment", name, value)?;
        }
        if self.assets.len() > MAX_ASSETS {
            let why = "there are more assets than can be looked up; name folders";
            return Err(wrong("asset", self.assets[MAX_ASSETS].as_str(), why));
        }
        match &self.ready_path {
            Some(path) if !path.starts_with('/') => {
                Err(wrong("ready path", path, "it does not start with `/`"))
            }
            Some(path) if !path.bytes().all(|byte| byte.is_ascii_graphic()) => {
                let why = "it holds what has to be percent-encoded in a request";
                Err(wrong("ready path", path, why))
            }
            _ => Ok(()),
        }
    }
}

const HAS_NUL: &str = "it holds a NUL";

fn wrong(what: &'static str, value: &str, why: &'static str) -> WrongPlan {
    let value = value.chars().take(MAX_PLAN_NAME_BYTES).collect();
    WrongPlan { what, value, why }
}

/// A package or a profile: what cargo takes as such a name, and no pattern, address or option.
fn check_name(what: &'static str, name: &str) -> Result<(), WrongPlan> {
    check_argument(what, name)?;
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '-' || letter == '_';
    if name.chars().all(is_part) {
        Ok(())
    } else {
        Err(wrong(what, name, "it is not a name"))
    }
}

/// What becomes the value of one of cargo's options.
fn check_argument(what: &'static str, value: &str) -> Result<(), WrongPlan> {
    if value.is_empty() {
        return Err(wrong(what, value, "it is empty"));
    }
    if value.len() > MAX_PLAN_NAME_BYTES {
        return Err(wrong(what, value, "it is too long"));
    }
    if value.starts_with('-') {
        return Err(wrong(what, value, "it would be an option of cargo's"));
    }
    if value.chars().any(char::is_control) {
        return Err(wrong(what, value, "it holds a control character"));
    }
    Ok(())
}

fn check_variable(what: &'static str, name: &str, value: &str) -> Result<(), WrongPlan> {
    if name.is_empty() || name.contains('=') || name.chars().any(char::is_control) {
        return Err(wrong(what, name, "it is no name of a variable"));
    }
    if name.starts_with(OWN_VARIABLES) {
        return Err(wrong(what, name, "such names are rrun's own"));
    }
    if value.contains('\0') {
        return Err(wrong(what, name, HAS_NUL));
    }
    Ok(())
}

fn digest_of(value: &impl Serialize) -> Digest {
    Digest::of(&postcard::to_stdvec(value).expect("plain values into memory always serialize"))
}

impl Plan {
    /// Checks every value that becomes an argument, a variable or a request.
    ///
    /// A plan comes from somebody who may run any code here. It is checked all the same, so that each value means what it
    /// says: a package named `--manifest-path=…` would be an option of cargo's.
    pub fn check(&self) -> Result<(), WrongPlan> {
        self.build.check()?;
        self.run.check()
    }

    /// Checks that the folder to build in has a manifest of its own in `tree`. Without one, cargo would look for it in the
    /// folders above, also outside of the tree.
    pub fn check_folder(&self, tree: &Manifest) -> Result<(), WrongPlan> {
        let folder = self.build.directory.as_ref();
        let manifest = match folder {
            Some(folder) => format!("{folder}/Cargo.toml"),
            None => "Cargo.toml".to_owned(),
        };
        match tree.get(&manifest) {
            Some(_) => Ok(()),
            None => Err(wrong(
                "folder",
                folder.map_or(".", TreePath::as_str),
                "there is no Cargo.toml in it",
            )),
        }
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Entry, Kind};

    fn plan() -> Plan {
        let build = BuildPlan {
            directory: None,
            package: "app".to_owned(),
            bin: "app".to_owned(),
            profile: "dev".to_owned(),
            features: vec!["one".to_owned(), "dep/two?".to_owned()],
            no_default_features: false,
            environment: BTreeMap::from([("RUSTFLAGS".to_owned(), "-C debuginfo=0".to_owned())]),
        };
        let run = RunPlan {
            args: vec!["--listen=$PORT".to_owned(), String::new()],
            environment: BTreeMap::from([("EMPTY".to_owned(), String::new())]),
            ready_path: Some("/ready?full=%C3%BC".to_owned()),
            ..RunPlan::default()
        };
        Plan { build, run }
    }

    #[test]
    fn an_ordinary_plan_passes() {
        assert_eq!(plan().check(), Ok(()));
        for name in ["größe", "a_b-c", "0x"] {
            let mut unusual = plan();
            unusual.build.package = name.to_owned();
            unusual.build.bin = format!("{name}.bin");
            assert_eq!(unusual.check(), Ok(()));
        }
    }

    #[test]
    fn what_cargo_or_the_system_would_read_as_something_else_is_refused_by_name() {
        type Change = fn(&mut Plan, &str);
        let package: Change = |plan, value| plan.build.package = value.to_owned();
        let bin: Change = |plan, value| plan.build.bin = value.to_owned();
        let profile: Change = |plan, value| plan.build.profile = value.to_owned();
        let feature: Change = |plan, value| plan.build.features.push(value.to_owned());
        let build_variable: Change = |plan, name| {
            plan.build
                .environment
                .insert(name.to_owned(), "1".to_owned());
        };
        let variable: Change = |plan, name| {
            plan.run.environment.insert(name.to_owned(), "1".to_owned());
        };
        let value: Change = |plan, value| {
            plan.run
                .environment
                .insert("A".to_owned(), value.to_owned());
        };
        let argument: Change = |plan, value| plan.run.args.push(value.to_owned());
        let ready_path: Change = |plan, value| plan.run.ready_path = Some(value.to_owned());
        let long = "n".repeat(MAX_PLAN_NAME_BYTES + 1);
        let cases = [
            (package, "--manifest-path=/etc/Cargo.toml"),
            (package, "-Zunstable"),
            (package, "app*"),
            (package, "path+file:///etc#app"),
            (package, "app@1.0.0"),
            (package, ""),
            (package, &long),
            (bin, "--config=build.rustc='/bin/sh'"),
            (bin, "a*"),
            (bin, "../app"),
            (bin, "a\0b"),
            (profile, "--config"),
            (profile, "dev\"]\n[profile.release"),
            (feature, "--config=net.offline=true"),
            (feature, "a\u{1b}[2J"),
            (build_variable, "A=B"),
            (build_variable, ""),
            (build_variable, "A\0"),
            (build_variable, "RRUN_AUTHORIZED_KEYS"),
            (build_variable, "CARGO_TARGET_DIR"),
            (build_variable, "CARGO_BUILD_TARGET_DIR"),
            (variable, "RRUN_KEY_FILE"),
            (variable, "A=B"),
            (value, "a\0b"),
            (argument, "a\0b"),
            (ready_path, "healthz"),
            (ready_path, "http://169.254.169.254/"),
            (ready_path, "/a b"),
            (ready_path, "/a\r\nhost: x"),
        ];
        for (change, value) in cases {
            let mut bad = plan();
            change(&mut bad, value);
            let error = bad.check().expect_err(value).to_string();
            assert!(!error.contains(char::is_control), "{error:?}");
            assert!(error.len() < 2 * MAX_PLAN_NAME_BYTES, "{error}");
        }
    }

    #[test]
    fn more_assets_than_can_be_looked_up_are_refused() {
        let mut bad = plan();
        bad.run.assets = vec![TreePath::new("a").unwrap(); MAX_ASSETS];
        assert_eq!(bad.check(), Ok(()));
        bad.run.assets.push(TreePath::new("b").unwrap());
        assert!(bad.check().unwrap_err().to_string().contains("asset \"b\""));
    }

    #[test]
    fn a_folder_without_a_manifest_is_refused() {
        let file = |path: &str| (TreePath::new(path).unwrap(), Entry::of(Kind::File, b""));
        let tree = Manifest::new([file("Cargo.toml"), file("a/src/main.rs")]).unwrap();
        let mut plan = plan();
        assert_eq!(plan.check_folder(&tree), Ok(()));
        plan.build.directory = Some(TreePath::new("a").unwrap());
        let error = plan.check_folder(&tree).unwrap_err().to_string();
        assert!(
            error.contains("\"a\"") && error.contains("Cargo.toml"),
            "{error}"
        );
        assert!(plan.check_folder(&Manifest::default()).is_err());
    }
}

//! How cargo is called: one recipe for the image's warm build and for every push, because another flag, environment or folder
//! would build everything anew.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

use rrun_protocol::{BuildPlan, TreePath};
use tokio::io::AsyncReadExt as _;

use crate::{child, layout::Layout};

/// Environment that a build gets if the agent has it: what finds the toolchain, the network and C libraries. Everything else
/// comes from `build-env`, so that a build does not depend on how the agent was started.
const PASSED_ON: [&str; 31] = [
    "PATH",
    "HOME",
    "USER",
    "TMPDIR",
    "LANG",
    "LC_ALL",
    "CARGO_HOME",
    "RUSTUP_HOME",
    "CARGO_HTTP_CAINFO",
    "CARGO_HTTP_PROXY",
    "CARGO_NET_GIT_FETCH_WITH_CLI",
    "CARGO_NET_OFFLINE",
    "CARGO_NET_RETRY",
    "CARGO_REGISTRIES_CRATES_IO_PROTOCOL",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
    "CC",
    "CXX",
    "AR",
    "PKG_CONFIG_PATH",
    "OPENSSL_DIR",
    "LIBCLANG_PATH",
    "PROTOC",
    "SQLX_OFFLINE",
];

/// Environment that a build gets always.
///
/// Lines for backtraces and no more: less debug information to write and link saves a fifth of an incremental build.
/// Incremental is said out loud because cargo turns it off where `CI` is set.
/// A toolchain that the image does not have is an error, not a download into the instance's memory at each push.
const ALWAYS: [(&str, &str); 6] = [
    ("CARGO_INCREMENTAL", "1"),
    ("CARGO_PROFILE_DEV_DEBUG", "line-tables-only"),
    ("CARGO_TERM_COLOR", "always"),
    ("CARGO_TERM_PROGRESS_WHEN", "always"),
    ("CARGO_TERM_PROGRESS_WIDTH", "80"),
    ("RUSTUP_AUTO_INSTALL", "0"),
];

/// Names cargo's target directory, and so whose build a process belongs to.
const TARGET_DIRECTORY: &str = "CARGO_TARGET_DIR";

/// A call of cargo or rustc.
#[derive(Clone, Debug)]
pub(crate) struct Command {
    program: &'static str,
    arguments: Vec<OsString>,
    folder: PathBuf,
    environment: Vec<(OsString, OsString)>,
}

impl Command {
    fn new(program: &'static str, folder: &Path, environment: Vec<(OsString, OsString)>) -> Self {
        Self {
            program,
            arguments: Vec::new(),
            folder: folder.to_owned(),
            environment,
        }
    }

    fn arguments(mut self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Starts it in a process group of its own.
    pub(crate) async fn start(&self) -> io::Result<child::Started> {
        let spec = child::Spec {
            executable: Path::new(self.program),
            arguments: self.arguments.clone(),
            directory: &self.folder,
            environment: self.environment.clone(),
            known_by: TARGET_DIRECTORY,
        };
        child::start(&spec).await
    }

    /// Runs it to its end and gives what it printed.
    ///
    /// # Errors
    ///
    /// It could not be started, or ended with another code than 0; then the error is what it said.
    pub(crate) async fn output(&self) -> io::Result<Vec<u8>> {
        let mut started = self.start().await?;
        let (mut output, mut talk) = (Vec::new(), Vec::new());
        let mut stdout = started
            .child
            .stdout
            .take()
            .ok_or(io::ErrorKind::BrokenPipe)?;
        let mut stderr = started
            .child
            .stderr
            .take()
            .ok_or(io::ErrorKind::BrokenPipe)?;
        tokio::try_join!(
            stdout.read_to_end(&mut output),
            stderr.read_to_end(&mut talk)
        )?;
        if started.child.wait().await?.success() {
            return Ok(output);
        }
        Err(io::Error::other(
            String::from_utf8_lossy(&talk).trim().to_owned(),
        ))
    }
}

/// The environment for cargo, without the plan's own.
fn base_environment() -> Vec<(OsString, OsString)> {
    let passed = PASSED_ON
        .iter()
        .filter_map(|name| Some((OsString::from(name), std::env::var_os(name)?)));
    passed
        .chain(
            ALWAYS
                .iter()
                .map(|(name, value)| (name.into(), value.into())),
        )
        .collect()
}

/// `cargo build` for `plan`.
pub(crate) fn build(layout: &Layout, plan: &BuildPlan) -> Command {
    let mut command =
        cargo(layout, plan).arguments(["build", "--message-format=json-diagnostic-rendered-ansi"]);
    // In one word with its option, no value can be taken for an option of its own.
    command = command.arguments([
        format!("--package={}", plan.package),
        format!("--bin={}", plan.bin),
    ]);
    // Dependencies do not change from push to push, and nobody steps through them there.
    command = command.arguments(["--config", "profile.dev.package.\"*\".debug=false"]);
    if plan.profile != "dev" {
        command = command.arguments([format!("--profile={}", plan.profile)]);
    }
    if !plan.features.is_empty() {
        command = command.arguments([format!("--features={}", plan.features.join(","))]);
    }
    if plan.no_default_features {
        command = command.arguments(["--no-default-features"]);
    }
    command
}

/// `cargo clean` for one package of `plan`'s workspace.
pub(crate) fn clean(layout: &Layout, plan: &BuildPlan, package: &str) -> Command {
    cargo(layout, plan).arguments([
        "clean".to_owned(),
        format!("--package={package}"),
        format!("--profile={}", plan.profile),
    ])
}

/// `cargo metadata` for the cargo workspace in `folder`.
pub(crate) fn metadata(folder: &Path) -> Command {
    let command = Command::new("cargo", folder, base_environment());
    command.arguments(["metadata", "--no-deps", "--format-version", "1"])
}

/// `rustc --version` as a toolchain file in the tree selects it.
pub(crate) fn toolchain(layout: &Layout, directory: Option<&TreePath>) -> Command {
    Command::new("rustc", &folder(layout, directory), base_environment()).arguments(["--version"])
}

/// A folder of the tree; `None` is its root.
fn folder(layout: &Layout, directory: Option<&TreePath>) -> PathBuf {
    match directory {
        Some(directory) => layout.tree().join(directory),
        None => layout.tree(),
    }
}

fn cargo(layout: &Layout, plan: &BuildPlan) -> Command {
    let folder = folder(layout, plan.directory.as_ref());
    let mut environment = base_environment();
    environment.push((TARGET_DIRECTORY.into(), layout.target().into()));
    environment.extend(
        plan.environment
            .iter()
            .map(|(name, value)| (name.into(), value.into())),
    );
    Command::new("cargo", &folder, environment)
}

/// The command as people would type it.
pub(crate) fn for_people(plan: &BuildPlan) -> String {
    let mut text = format!("cargo build -p {} --bin {}", plan.package, plan.bin);
    match plan.profile.as_str() {
        "dev" => {}
        "release" => text += " --release",
        profile => text += &format!(" --profile {profile}"),
    }
    if !plan.features.is_empty() {
        text += &format!(" --features {}", plan.features.join(","));
    }
    text
}

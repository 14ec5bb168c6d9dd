//! Cargo, run and watched: the build log as it comes, and an executable that is surely built from the present tree.
//!
//! "Surely" is the point. Cargo decides by file times; should it ever call a unit fresh although one of its files was touched
//! since it was built, the executable is not used: the packages concerned are cleaned and built again, and that is said.
//!
//! Does not change the tree, and does not know what the executable is for.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use cargo_metadata::{CompilerMessage, Message, PackageId, diagnostic::DiagnosticLevel};
use futures_util::{FutureExt as _, future::FusedFuture as _};
use rrun_protocol::{BuildPlan, EventKind, MAX_EVENT_TEXT_BYTES, TreePath};
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::running_timeout, fault::fault_point, freshness::Units, layout::Layout, recipe,
    room::tells_full, tree::TouchedFiles,
};

/// How long cargo and its compilers may take to end after SIGINT. Killing them is safe too, only less tidy.
const CANCEL_GRACE: Duration = Duration::from_secs(2);

/// How long the rest of its output may take after its group has ended.
const REST_OF_OUTPUT_LIMIT: Duration = Duration::from_millis(500);

/// Longest line of cargo's JSON: one diagnostic with its rendered text.
const MAX_MESSAGE_BYTES: usize = 8 << 20;

/// What a successful build gave.
#[derive(Debug)]
pub(crate) struct Built {
    /// The executable in the target directory.
    pub executable: PathBuf,
    /// Units that it found up to date.
    pub fresh: usize,
}

/// Why there is no executable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompileError {
    /// Cargo says no; its reasons are in the log.
    #[error("{error}")]
    Failed {
        /// Cargo's own first error: a lower-case fragment.
        error: String,
        /// Ids of the packages that a broken target directory could be to blame for; none if no code was refused.
        packages: BTreeSet<String>,
    },
    /// Stopped, and all its processes are gone.
    #[error("the build was cancelled")]
    Cancelled,
    /// Cargo calls something fresh that is not, even after it was cleaned.
    #[error("cargo calls `{0}` up to date although it was cleaned")]
    Stale(String),
    /// There was no room for what it makes; its log says where exactly.
    #[error("there is no room to build in: `{}` is full", .0.display())]
    NoRoom(PathBuf),
    /// Cargo could not be run or understood.
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

/// Where a build's log goes.
pub(crate) trait BuildLog {
    /// Takes a line of the log, a progress line or a warning.
    fn tell(&self, event: EventKind);
}

/// One build of the present tree.
pub(crate) struct Build<'a, L> {
    /// Where tree and target directory lie.
    pub layout: &'a Layout,
    /// What to build.
    pub plan: &'a BuildPlan,
    /// Files written or deleted since the plan last succeeded.
    pub touched: &'a TouchedFiles,
    /// Whether the build before this one was killed, so that what it left may be broken.
    pub after_interruption: bool,
    /// Where the log goes.
    pub log: &'a L,
    /// Stops it.
    pub cancel: &'a CancellationToken,
}

impl<L: BuildLog> Build<'_, L> {
    /// Runs cargo, and again where its result cannot be trusted.
    ///
    /// `compiled` gets the units that were compiled, also if the build as a whole does not succeed.
    pub(crate) async fn compile(
        &self,
        compiled: &mut BTreeSet<String>,
    ) -> Result<Built, CompileError> {
        let finished = match self.run(compiled).await {
            Err(CompileError::Failed { packages, .. })
                if self.after_interruption && !packages.is_empty() =>
            {
                for package in &packages {
                    let why = "does not compile after a build that was interrupted";
                    self.clean(package, why).await?;
                }
                self.run(compiled).await?
            }
            result => result?,
        };
        let stale = self.stale(&finished)?;
        if stale.is_empty() {
            return Ok(finished.built);
        }
        for (package, path) in &stale {
            let why = format!("was called up to date by cargo although `{path}` changed");
            self.clean(package, &why).await?;
        }
        let again = self.run(compiled).await?;
        match self.stale(&again)?.into_iter().next() {
            None => Ok(again.built),
            Some((package, _)) => Err(CompileError::Stale(package)),
        }
    }

    fn stale(&self, finished: &Finished) -> Result<BTreeSet<(String, TreePath)>, CompileError> {
        let executable = &finished.built.executable;
        let stale = finished
            .units
            .stale(&self.layout.tree(), executable, self.touched);
        let dep_info = || format!("cannot read the dep-info of `{}`", executable.display());
        Ok(stale.with_context(dep_info)?)
    }

    /// Removes what cargo made of `package`, and says why.
    async fn clean(&self, package: &str, why: &str) -> Result<(), CompileError> {
        let text = format!("`{package}` {why}; cleaning and building it again");
        self.log.tell(EventKind::Warning { text, hint: None });
        let cleaned = recipe::clean(self.layout, self.plan, package)
            .output()
            .await;
        cleaned.with_context(|| format!("cannot clean `{package}`"))?;
        Ok(())
    }

    /// One run of cargo.
    async fn run(&self, compiled: &mut BTreeSet<String>) -> Result<Finished, CompileError> {
        let command = recipe::build(self.layout, self.plan);
        let mut started = command.start().await.context("cannot start cargo")?;
        fault_point!("building");
        let child = &mut started.child;
        let stdout = child.stdout.take();
        let stdout = stdout.context("cargo has no standard output")?;
        let stderr = child.stderr.take();
        let stderr = stderr.context("cargo has no standard error")?;
        let mut heard = Heard {
            units: Units::new(),
            failed: BTreeSet::new(),
        };
        let mut error = None;
        let log = Watched::new(self.log, self.layout.target());
        let status = {
            let messages = read_messages(stdout, &mut heard, &log);
            let talk = read_talk(stderr, &mut error, &log);
            let mut reading = pin!(async { tokio::try_join!(messages, talk) }.fuse());
            let status = loop {
                tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => break None,
                    read = &mut reading => read.map(drop).context("cannot read what cargo prints")?,
                    status = started.child.wait() => break Some(status.context("cannot wait for cargo")?),
                }
            };
            // A build script may have left something running, which may hold cargo's outputs open.
            let first = if status.is_some() {
                Signal::TERM
            } else {
                Signal::INT
            };
            started.end(first, CANCEL_GRACE).await;
            if !reading.is_terminated() {
                // What is not there by now belongs to somebody else.
                let _ = running_timeout(REST_OF_OUTPUT_LIMIT, reading).await.is_ok();
            }
            status
        };
        compiled.extend(heard.units.made());
        match status {
            None => Err(CompileError::Cancelled),
            Some(status) if !status.success() && log.no_room.load(Ordering::Relaxed) => {
                Err(CompileError::NoRoom(self.layout.target()))
            }
            Some(status) if !status.success() => {
                let packages = heard.suspects(&self.layout.tree());
                let error = error.unwrap_or_else(|| format!("cargo ended with {status}"));
                Err(CompileError::Failed { error, packages })
            }
            Some(_) => heard.finished(),
        }
    }
}

/// Passes a log on, and notes whether anybody complains there that the disk is full.
struct Watched<'l, L> {
    log: &'l L,
    target: PathBuf,
    no_room: AtomicBool,
}

impl<'l, L> Watched<'l, L> {
    fn new(log: &'l L, target: PathBuf) -> Self {
        Self {
            log,
            target,
            no_room: AtomicBool::new(false),
        }
    }
}

impl<L: BuildLog> BuildLog for Watched<'_, L> {
    fn tell(&self, event: EventKind) {
        if matches!(&event, EventKind::Log { text } if tells_full(text, &self.target)) {
            self.no_room.store(true, Ordering::Relaxed);
        }
        self.log.tell(event);
    }
}

/// What cargo said.
struct Heard {
    units: Units,
    /// Packages with errors.
    failed: BTreeSet<String>,
}

/// A run of cargo that succeeded.
struct Finished {
    built: Built,
    units: Units,
}

impl Heard {
    /// The packages with errors, and those of the tree that were not compiled now: errors may come from what is left of them.
    fn suspects(self, tree: &Path) -> BTreeSet<String> {
        let mut suspects = self.failed;
        // A build script that was compiled and whose run is not told of has failed.
        let scripts = self
            .units
            .artifacts
            .iter()
            .filter(|artifact| artifact.target.is_custom_build());
        let ran = |package: &PackageId| {
            self.units
                .scripts
                .iter()
                .any(|script| script.package_id == *package)
        };
        let failed_scripts = scripts.filter(|script| !ran(&script.package_id));
        suspects.extend(failed_scripts.map(|script| script.package_id.repr.clone()));
        if !suspects.is_empty() {
            let artifacts = self.units.artifacts.iter();
            let reused = artifacts.filter(|artifact| artifact.fresh);
            let of_tree = reused.filter(|artifact| artifact.manifest_path.starts_with(tree));
            suspects.extend(of_tree.map(|artifact| artifact.package_id.repr.clone()));
        }
        suspects
    }

    fn finished(self) -> Result<Finished, CompileError> {
        let artifacts = &self.units.artifacts;
        let executable = artifacts
            .iter()
            .rev()
            .find_map(|artifact| artifact.executable.clone());
        let executable = executable
            .context("cargo made no executable")?
            .into_std_path_buf();
        let fresh = artifacts.iter().filter(|artifact| artifact.fresh).count();
        let built = Built { executable, fresh };
        Ok(Finished {
            built,
            units: self.units,
        })
    }
}

/// Cargo's standard output: one JSON message a line. What is no message, as from a build script, is part of the log.
async fn read_messages(
    stdout: impl AsyncRead + Unpin,
    heard: &mut Heard,
    log: &impl BuildLog,
) -> io::Result<()> {
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    while read_until_any(&mut lines, b"\n", &mut line)
        .await?
        .is_some()
    {
        match serde_json::from_slice::<Message>(&line) {
            Ok(Message::CompilerArtifact(artifact)) => heard.units.artifacts.push(artifact),
            Ok(Message::BuildScriptExecuted(script)) => heard.units.scripts.push(script),
            Ok(Message::CompilerMessage(CompilerMessage {
                message,
                package_id,
                ..
            })) => {
                if message.level == DiagnosticLevel::Error {
                    heard.failed.insert(package_id.repr);
                }
                tell_lines(log, &message.rendered.unwrap_or_default());
            }
            Ok(_) => {}
            Err(_) => tell_lines(log, &String::from_utf8_lossy(&line)),
        }
    }
    Ok(())
}

/// Cargo's standard error: log lines, and between them a progress line that ends with a carriage return.
async fn read_talk(
    stderr: impl AsyncRead + Unpin,
    error: &mut Option<String>,
    log: &impl BuildLog,
) -> io::Result<()> {
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    while let Some(end) = read_until_any(&mut lines, b"\n\r", &mut line).await? {
        let text = String::from_utf8_lossy(&line);
        // Cargo clears the rest of the line before and after each progress line.
        let text = text.trim_start_matches("\u{1b}[K");
        match end {
            b'\r' if !text.is_empty() => log.tell(EventKind::Progress { text: cut(text) }),
            b'\r' => {}
            _ => {
                if error.is_none() {
                    *error = cargo_error(text);
                }
                log.tell(EventKind::Log { text: cut(text) });
            }
        }
    }
    Ok(())
}

/// What follows `error: ` if that is how a line of cargo's talk begins.
fn cargo_error(line: &str) -> Option<String> {
    let plain = anstream::adapter::strip_str(line).to_string();
    plain.strip_prefix("error: ").map(cut)
}

/// Reads up to one of `ends` and gives which it was, `None` at the end of the input. What is beyond the limit is dropped.
async fn read_until_any(
    reader: &mut BufReader<impl AsyncRead + Unpin>,
    ends: &[u8],
    line: &mut Vec<u8>,
) -> io::Result<Option<u8>> {
    line.clear();
    loop {
        let buffer = reader.fill_buf().await?;
        if buffer.is_empty() {
            return Ok((!line.is_empty()).then_some(b'\n'));
        }
        let end = buffer.iter().position(|byte| ends.contains(byte));
        let taken = end.unwrap_or(buffer.len());
        let room = MAX_MESSAGE_BYTES.saturating_sub(line.len());
        line.extend_from_slice(&buffer[..taken.min(room)]);
        let found = end.map(|end| buffer[end]);
        reader.consume(taken + usize::from(end.is_some()));
        if found.is_some() {
            return Ok(found);
        }
    }
}

fn tell_lines(log: &impl BuildLog, text: &str) {
    text.lines()
        .for_each(|line| log.tell(EventKind::Log { text: cut(line) }));
}

fn cut(line: &str) -> String {
    let mut end = line.len().min(MAX_EVENT_TEXT_BYTES);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_and_progress_are_told_apart_and_long_ones_cut() {
        let text = [
            &b"one\rtwo\n"[..],
            &vec![b'x'; MAX_MESSAGE_BYTES + 10],
            b"\nend",
        ]
        .concat();
        let mut reader = BufReader::new(text.as_slice());
        let mut line = Vec::new();
        let mut seen = Vec::new();
        while let Some(end) = read_until_any(&mut reader, b"\n\r", &mut line)
            .await
            .unwrap()
        {
            seen.push((end, line.len()));
        }
        assert_eq!(
            seen,
            [
                (b'\r', 3),
                (b'\n', 3),
                (b'\n', MAX_MESSAGE_BYTES),
                (b'\n', 3)
            ]
        );
    }
}

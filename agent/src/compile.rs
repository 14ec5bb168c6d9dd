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
    process::ExitStatus,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use cargo_metadata::{Artifact, Message};
use rrun_protocol::{BuildPlan, EventKind, MAX_EVENT_TEXT_BYTES, TreePath};
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio_util::sync::CancellationToken;

use crate::{
    fault::fault_point,
    layout::Layout,
    recipe::{self, Command},
    room::FULL,
    tree::TouchedFiles,
};

/// How long cargo and its compilers may take to end after SIGINT. Killing them is safe too, only less tidy.
const CANCEL_GRACE: Duration = Duration::from_secs(2);

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
    #[error("cargo ended with {0}")]
    Failed(ExitStatus),
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

/// Builds `plan` from the present tree. `touched` are the files written or deleted since it last succeeded.
///
/// `compiled` gets the units that were compiled, also if the build as a whole does not succeed.
pub(crate) async fn compile(
    layout: &Layout,
    plan: &BuildPlan,
    touched: &TouchedFiles,
    compiled: &mut BTreeSet<String>,
    log: &impl BuildLog,
    cancel: &CancellationToken,
) -> Result<Built, CompileError> {
    let log = &Watched {
        log,
        no_room: AtomicBool::new(false),
    };
    let told = compile_watched(layout, plan, touched, compiled, log, cancel).await;
    match told {
        Err(CompileError::Failed(_)) if log.no_room.load(Ordering::Relaxed) => {
            Err(CompileError::NoRoom(layout.target()))
        }
        told => told,
    }
}

/// Notes whether anybody complains that the disk is full.
struct Watched<'l, L> {
    log: &'l L,
    no_room: AtomicBool,
}

impl<L: BuildLog> BuildLog for Watched<'_, L> {
    fn tell(&self, event: EventKind) {
        if matches!(&event, EventKind::Log { text } if text.contains(FULL)) {
            self.no_room.store(true, Ordering::Relaxed);
        }
        self.log.tell(event);
    }
}

async fn compile_watched(
    layout: &Layout,
    plan: &BuildPlan,
    touched: &TouchedFiles,
    compiled: &mut BTreeSet<String>,
    log: &impl BuildLog,
    cancel: &CancellationToken,
) -> Result<Built, CompileError> {
    let command = recipe::build(layout, plan);
    let finished = run(&command, compiled, log, cancel).await?;
    let stale = stale_packages(layout, &finished, touched)?;
    if stale.is_empty() {
        return Ok(finished.built);
    }
    for (package, path) in &stale {
        let text = format!(
            "cargo called `{package}` up to date although `{path}` changed; cleaning and building it again"
        );
        log.tell(EventKind::Warning { text, hint: None });
        recipe::clean(layout, plan, package)
            .output()
            .await
            .with_context(|| format!("cannot clean `{package}`"))?;
    }
    let again = run(&command, compiled, log, cancel).await?;
    match stale_packages(layout, &again, touched)?.into_iter().next() {
        None => Ok(again.built),
        Some((package, _)) => Err(CompileError::Stale(package)),
    }
}

/// One run of cargo: what it gave, and what it said of each unit.
struct Finished {
    built: Built,
    artifacts: Vec<Artifact>,
}

async fn run(
    command: &Command,
    compiled: &mut BTreeSet<String>,
    log: &impl BuildLog,
    cancel: &CancellationToken,
) -> Result<Finished, CompileError> {
    let mut started = command.start().await.context("cannot start cargo")?;
    fault_point!("building");
    let child = &mut started.child;
    let stdout = child
        .stdout
        .take()
        .context("cargo has no standard output")?;
    let stderr = child.stderr.take().context("cargo has no standard error")?;
    let mut artifacts = Vec::new();
    let reading = async {
        tokio::try_join!(
            read_messages(stdout, &mut artifacts, log),
            read_talk(stderr, log)
        )?;
        child.wait().await
    };
    let status = tokio::select! {
        status = reading => Some(status.context("cannot read what cargo prints")?),
        () = cancel.cancelled() => None,
    };
    compiled.extend(
        artifacts
            .iter()
            .filter(|artifact| !artifact.fresh)
            .map(unit),
    );
    let Some(status) = status else {
        started.end(Signal::INT, CANCEL_GRACE).await;
        return Err(CompileError::Cancelled);
    };
    // A build script may have left something running.
    started.end(Signal::TERM, CANCEL_GRACE).await;
    if !status.success() {
        return Err(CompileError::Failed(status));
    }
    let executable = artifacts
        .iter()
        .rev()
        .find_map(|artifact| artifact.executable.clone());
    let executable = executable
        .context("cargo made no executable")?
        .into_std_path_buf();
    let fresh = artifacts.iter().filter(|artifact| artifact.fresh).count();
    Ok(Finished {
        built: Built { executable, fresh },
        artifacts,
    })
}

/// Cargo's standard output: one JSON message a line. What is no message, as from a build script, is part of the log.
async fn read_messages(
    stdout: impl AsyncRead + Unpin,
    artifacts: &mut Vec<Artifact>,
    log: &impl BuildLog,
) -> io::Result<()> {
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    while read_until_any(&mut lines, b"\n", &mut line)
        .await?
        .is_some()
    {
        match serde_json::from_slice::<Message>(&line) {
            Ok(Message::CompilerArtifact(artifact)) => artifacts.push(artifact),
            Ok(Message::CompilerMessage(message)) => {
                tell_lines(log, &message.message.rendered.unwrap_or_default())
            }
            Ok(_) => {}
            Err(_) => tell_lines(log, &String::from_utf8_lossy(&line)),
        }
    }
    Ok(())
}

/// Cargo's standard error: log lines, and between them a progress line that ends with a carriage return.
async fn read_talk(stderr: impl AsyncRead + Unpin, log: &impl BuildLog) -> io::Result<()> {
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    while let Some(end) = read_until_any(&mut lines, b"\n\r", &mut line).await? {
        let text = String::from_utf8_lossy(&line);
        // Cargo clears the rest of the line before and after each progress line.
        let text = text.trim_start_matches("\u{1b}[K");
        match end {
            b'\r' if !text.is_empty() => log.tell(EventKind::Progress { text: cut(text) }),
            b'\r' => {}
            _ => log.tell(EventKind::Log { text: cut(text) }),
        }
    }
    Ok(())
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

/// Packages that cargo calls fresh although one of their files was touched, each with such a file.
///
/// The dep-info beside the executable names every source and build script input of the executable and of the path
/// dependencies in it. Whose file it is follows from the folder that it lies in.
fn stale_packages(
    layout: &Layout,
    finished: &Finished,
    touched: &TouchedFiles,
) -> Result<BTreeSet<(String, TreePath)>, CompileError> {
    if touched.is_empty() {
        return Ok(BTreeSet::new());
    }
    let dep_info = finished.built.executable.with_extension("d");
    let text = std::fs::read_to_string(&dep_info)
        .with_context(|| format!("cannot read cargo's dep-info `{}`", dep_info.display()))?;
    let inputs = inputs(&text);
    let tree = layout.tree();
    let executable = finished
        .artifacts
        .iter()
        .rev()
        .find(|artifact| artifact.executable.is_some());
    let mut stale = BTreeSet::new();
    for (path, compiled_since) in touched {
        let file = tree.join(path);
        if !inputs.contains(&file) {
            continue;
        }
        let owner =
            owner(&finished.artifacts, &file).filter(|owner| is_fresh(&finished.artifacts, owner));
        let executable = executable.filter(|executable| executable.fresh);
        for artifact in [owner, executable].into_iter().flatten() {
            if !compiled_since.contains(&unit(artifact)) {
                stale.insert((artifact.package_id.repr.clone(), path.clone()));
            }
        }
    }
    Ok(stale)
}

/// An artifact of the package whose folder holds `file`, the innermost if packages lie in each other.
fn owner<'a>(artifacts: &'a [Artifact], file: &Path) -> Option<&'a Artifact> {
    let folder = |artifact: &Artifact| {
        artifact
            .manifest_path
            .parent()
            .map(|folder| folder.as_std_path().to_owned())
    };
    artifacts
        .iter()
        .filter(|artifact| folder(artifact).is_some_and(|folder| file.starts_with(folder)))
        .max_by_key(|artifact| artifact.manifest_path.as_str().len())
}

/// Whether cargo compiled nothing of the artifact's package. Its build script counts only where there is nothing else.
fn is_fresh(artifacts: &[Artifact], owner: &Artifact) -> bool {
    artifacts
        .iter()
        .filter(|artifact| artifact.package_id == owner.package_id)
        .all(|artifact| artifact.fresh)
}

/// Names what an artifact is: the executable, or something of its package.
fn unit(artifact: &Artifact) -> String {
    match &artifact.executable {
        Some(executable) => executable.to_string(),
        None => artifact.package_id.repr.clone(),
    }
}

/// The files on the right side of a dep-info's rules, which has make's form with `\ ` for a space.
fn inputs(dep_info: &str) -> BTreeSet<PathBuf> {
    let mut inputs = BTreeSet::new();
    for line in dep_info.lines() {
        let Some((_, files)) = line.split_once(": ") else {
            continue;
        };
        let mut file = String::new();
        let mut letters = files.chars();
        loop {
            match letters.next() {
                Some('\\') => file.extend(letters.next()),
                Some(letter) if letter != ' ' => file.push(letter),
                end => {
                    if !file.is_empty() {
                        inputs.insert(PathBuf::from(std::mem::take(&mut file)));
                    }
                    if end.is_none() {
                        break;
                    }
                }
            }
        }
    }
    inputs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dep_info_is_read_with_spaces_and_several_rules() {
        let text = "/t/debug/app: /w/a\\ b/main.rs /w/lib.rs\n\n/t/debug/other: /w/x.rs\n";
        let expected = ["/w/a b/main.rs", "/w/lib.rs", "/w/x.rs"].map(PathBuf::from);
        assert_eq!(inputs(text), BTreeSet::from(expected));
    }

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

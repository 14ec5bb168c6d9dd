//! The one place where processes are started.
//!
//! Everyone who starts one says in which directory and with which environment. Each gets a process group of its own, no
//! input, and pipes for its output. What the agent starts itself is registered, so that orphans which it adopts (as
//! process 1 or as subreaper) can be told from it and reaped, without ever taking an exit code from who waits for it.

use std::{
    collections::HashSet,
    ffi::OsString,
    io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::Stdio,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::{Pid, WaitOptions, waitpid};
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use crate::platform;

/// How often a start is tried while the executable is still open for writing somewhere: a process that was just forked
/// from another thread holds a copy of its descriptor until it executes.
const BUSY_TRIES: u32 = 50;
/// Pause between these tries.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// Numbers of the processes that the agent started and waits for itself.
static STARTED: Mutex<Option<HashSet<u32>>> = Mutex::new(None);

/// What to start.
#[derive(Debug)]
pub(crate) struct Spec<'a> {
    pub(crate) executable: &'a Path,
    pub(crate) arguments: Vec<OsString>,
    pub(crate) directory: &'a Path,
    pub(crate) environment: Vec<(OsString, OsString)>,
}

/// A process that was started, and its number for as long as somebody may still wait for it.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) child: Child,
    process: u32,
}

impl Started {
    /// Its process id, which is its group's too.
    pub(crate) fn process(&self) -> u32 {
        self.process
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // From now on whoever reaps orphans may reap it.
        started().get_or_insert_default().remove(&self.process);
    }
}

/// Starts a process in a group of its own.
pub(crate) async fn start(spec: &Spec<'_>) -> io::Result<Started> {
    let mut tries = 0;
    loop {
        match spawn(spec) {
            Err(error)
                if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES =>
            {
                tries += 1;
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}

fn spawn(spec: &Spec<'_>) -> io::Result<Started> {
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    let mut command = Command::new(spec.executable);
    command
        .args(&spec.arguments)
        .current_dir(spec.directory)
        .env_clear()
        .envs(spec.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    // Held until the number is known, so that nobody reaps in between.
    let mut started = started();
    let child = command.spawn()?;
    let process = child
        .id()
        .expect("nobody has waited for it yet, so it has a number");
    started.get_or_insert_default().insert(process);
    Ok(Started { child, process })
}

/// Replaces this process by another program. Returns only if that fails.
pub(crate) fn exec(spec: &Spec<'_>) -> io::Error {
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    let mut command = std::process::Command::new(spec.executable);
    command
        .args(&spec.arguments)
        .current_dir(spec.directory)
        .env_clear()
        .envs(spec.environment.iter().map(|(name, value)| (name, value)))
        .exec()
}

/// Adopts orphans and reaps them until dropped.
pub(crate) async fn reap_orphans() {
    platform::adopt_orphans();
    let Ok(mut ended) = signal(SignalKind::child()) else {
        return;
    };
    while ended.recv().await.is_some() {
        // Never fails: the closure does not panic.
        let _ = tokio::task::spawn_blocking(reap).await.is_ok();
    }
}

fn reap() {
    let started = started();
    for process in platform::dead_children() {
        let ours = started
            .as_ref()
            .is_some_and(|started| started.contains(&process));
        if let (false, Some(pid)) = (ours, i32::try_from(process).ok().and_then(Pid::from_raw)) {
            // Whoever else reaped it, it is gone.
            let _ = waitpid(Some(pid), WaitOptions::NOHANG).is_ok();
        }
    }
}

fn started() -> MutexGuard<'static, Option<HashSet<u32>>> {
    STARTED.lock().unwrap_or_else(PoisonError::into_inner)
}

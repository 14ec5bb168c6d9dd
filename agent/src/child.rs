//! The one place where processes are started.
//!
//! Everyone who starts one says in which directory and with which environment. Each gets a process group of its own, no
//! input, and pipes for its output. What the agent starts itself is registered, so that orphans which it adopts (as
//! process 1 or as subreaper) can be told from it and reaped, without ever taking an exit code from who waits for it.
//!
//! The register is also on disk: an agent that is killed takes nothing along, and the next one ends what is left before it
//! touches anything that it may still write to.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::Stdio,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::bail;
use rustix::process::{Pid, Signal, WaitOptions, waitpid};
use serde::{Deserialize, Serialize};
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use crate::{
    layout::Layout,
    platform::{self, Descendant},
};

/// How often a start is tried while the executable is still open for writing somewhere: a process that was just forked
/// from another thread holds a copy of its descriptor until it executes.
const BUSY_TRIES: u32 = 50;
/// Pause between these tries.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// Pause between two looks whether processes have ended.
const GONE_EVERY: Duration = Duration::from_millis(5);
/// Time between SIGTERM and SIGKILL for what an earlier agent left: nobody waits for its answers any more.
const LEFTOVER_GRACE: Duration = Duration::from_secs(1);
/// How long processes may take to go after SIGKILL. Only one that hangs in the kernel takes longer.
const KILLED_LIMIT: Duration = Duration::from_secs(10);

/// State file: what runs.
const REGISTER: &str = "processes";

/// What the agent started and waits for itself.
static REGISTERED: Mutex<Register> = Mutex::new(Register {
    layout: None,
    next: 0,
    running: BTreeMap::new(),
});

struct Register {
    /// Where it is written down; nowhere before [`end_leftovers`].
    layout: Option<Layout>,
    next: u64,
    running: BTreeMap<u64, Registered>,
}

/// A process as the next agent will know it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Registered {
    /// Number and identity, once it has them.
    pub(crate) process: Option<(u32, u64)>,
    /// A line of its environment that tells what it started from everything else.
    pub(crate) mark: Option<Vec<u8>>,
}

/// The register on disk.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Leftovers {
    /// The machine's boot: numbers and start times mean nothing in another one.
    pub(crate) boot: String,
    /// Identity of the agent that wrote it, which everything it started is younger than.
    pub(crate) since: u64,
    pub(crate) processes: Vec<Registered>,
}

/// What to start.
#[derive(Debug)]
pub(crate) struct Spec<'a> {
    pub(crate) executable: &'a Path,
    pub(crate) arguments: Vec<OsString>,
    pub(crate) directory: &'a Path,
    pub(crate) environment: Vec<(OsString, OsString)>,
    /// The variable of that environment whose value nothing else has: what it starts inherits it, wherever it goes.
    pub(crate) known_by: &'static str,
}

impl Spec<'_> {
    fn mark(&self) -> Option<Vec<u8>> {
        let set = |(name, _): &&(OsString, OsString)| name == self.known_by;
        let (name, value) = self.environment.iter().rfind(set)?;
        Some([name.as_encoded_bytes(), b"=", value.as_encoded_bytes()].concat())
    }
}

/// A process that was started, and its number for as long as somebody may still wait for it.
///
/// Dropping it kills it with everything it started, unless that is known to be gone.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) child: Child,
    gone: bool,
    process: u32,
    mark: Option<Vec<u8>>,
    entry: u64,
}

impl Started {
    /// Its process id, which is its group's too.
    pub(crate) fn process(&self) -> u32 {
        self.process
    }

    /// Ends it with everything it started, also what left its group: `first`, after `grace` SIGKILL, until nothing is left.
    pub(crate) async fn end(mut self, first: Signal, grace: Duration) {
        let mut known = self.descendants();
        if known.is_empty() && !platform::group_is_alive(self.process) {
            self.ended(&known).await;
            return self.all_gone();
        }
        platform::signal_group(self.process, first);
        known.iter().for_each(|descendant| descendant.send(first));
        // By the clock: a container that was frozen meanwhile kills them sooner, which is only less tidy.
        let _ = tokio::time::timeout(grace, self.ended(&known))
            .await
            .is_ok();
        // Again and again, even if all is gone by then: what was just being started was not listed yet.
        loop {
            self.kill(&known);
            self.ended(&known).await;
            known = self.descendants();
            if known.is_empty() {
                return self.all_gone();
            }
        }
    }

    /// Whoever ended it knows that nothing of it is left.
    pub(crate) fn all_gone(&mut self) {
        self.gone = true;
    }

    /// Looks for everything that it started; reads all of `/proc`, so not for the async threads.
    pub(crate) fn look(&self) -> impl FnOnce() -> Vec<Descendant> + Send + 'static {
        let (process, mark) = (self.process, self.mark.clone());
        move || platform::descendants(process, mark.as_deref())
    }

    /// Kills everything that it started, also what is only just being started; not for the async threads.
    pub(crate) fn kill_until_gone(&self) -> impl FnOnce() + Send + 'static {
        let (process, mark) = (self.process, self.mark.clone());
        move || platform::kill_descendants(process, mark.as_deref())
    }

    fn descendants(&self) -> Vec<Descendant> {
        self.look()()
    }

    async fn ended(&mut self, known: &[Descendant]) {
        // An error means that somebody else reaped it, so it has ended.
        let _ = self.child.wait().await.is_ok();
        while platform::group_is_alive(self.process) || known.iter().any(|known| known.is_alive()) {
            tokio::time::sleep(GONE_EVERY).await;
        }
    }

    fn kill(&self, known: &[Descendant]) {
        platform::signal_group(self.process, Signal::KILL);
        known
            .iter()
            .for_each(|descendant| descendant.send(Signal::KILL));
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if !self.gone {
            let known = self.descendants();
            // Nothing has the leader's number while it is not waited for or has company in its group.
            if self.child.id().is_some() || !known.is_empty() {
                self.kill(&known);
            }
        }
        // From now on whoever reaps orphans may reap it.
        registered().running.remove(&self.entry);
    }
}

/// Kills all that is still registered, with everything it started: the last thing that an agent does.
pub(crate) fn kill_rest() {
    let rest: Vec<Registered> = registered().running.values().cloned().collect();
    for Registered { process, mark } in rest {
        if let Some((process, _)) = process {
            platform::signal_group(process, Signal::KILL);
            platform::kill_descendants(process, mark.as_deref());
        }
    }
}

/// Ends what an earlier agent of this workspace left running, and keeps the register there from now on.
///
/// # Errors
///
/// Something does not end even after SIGKILL.
pub(crate) async fn end_leftovers(layout: &Layout) -> anyhow::Result<()> {
    let leftovers: Leftovers = layout.load(REGISTER).unwrap_or_default();
    registered().layout = Some(layout.clone());
    let started = Instant::now();
    let mut signal = Signal::TERM;
    let mut signalled = Vec::new();
    loop {
        let left = platform::leftovers(&leftovers);
        if left.is_empty() {
            return Ok(());
        }
        if signalled.is_empty() {
            tracing::warn!(
                processes = left.len(),
                "ending what an earlier agent left running"
            );
        }
        if signal == Signal::TERM && started.elapsed() >= LEFTOVER_GRACE {
            signal = Signal::KILL;
        }
        for process in &left {
            if !signalled.contains(&(*process, signal)) {
                process.send(signal);
                signalled.push((*process, signal));
            }
        }
        if started.elapsed() >= LEFTOVER_GRACE + KILLED_LIMIT {
            bail!("what an earlier agent left running does not end: {left:?}");
        }
        tokio::time::sleep(GONE_EVERY).await;
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
    // Held until the number is known, so that nobody reaps in between. Written down before it starts, so that there is no
    // moment at which nobody would know it.
    let mut registered = registered();
    let mark = spec.mark();
    let entry = registered.add(mark.clone());
    let child = command.spawn().inspect_err(|_| {
        registered.running.remove(&entry);
    })?;
    let process = child
        .id()
        .expect("nobody has waited for it yet, so it has a number");
    registered.name(entry, process);
    Ok(Started {
        child,
        gone: false,
        process,
        mark,
        entry,
    })
}

impl Register {
    fn add(&mut self, mark: Option<Vec<u8>>) -> u64 {
        let entry = self.next;
        self.next += 1;
        let process = None;
        self.running.insert(entry, Registered { process, mark });
        self.write();
        entry
    }

    fn name(&mut self, entry: u64, process: u32) {
        if let Some(registered) = self.running.get_mut(&entry) {
            registered.process = Some((process, platform::identity(process).unwrap_or_default()));
            self.write();
        }
    }

    /// Whether the agent waits for this process itself.
    fn holds(&self, process: u32) -> bool {
        let held =
            |registered: &Registered| registered.process.is_some_and(|(it, _)| it == process);
        self.running.values().any(held)
    }

    fn write(&self) {
        let Some(layout) = &self.layout else { return };
        let leftovers = Leftovers {
            boot: platform::boot(),
            since: platform::identity(std::process::id()).unwrap_or_default(),
            processes: self.running.values().cloned().collect(),
        };
        if let Err(error) = layout.store(REGISTER, &leftovers) {
            // On a full disk the old version has to start all the same.
            tracing::warn!("{error:#}");
        }
    }
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

/// Runs a program of the system to its end, and gives what it printed.
#[cfg(not(target_os = "linux"))]
pub(crate) fn ask(program: &str, arguments: &[&str]) -> Option<Vec<u8>> {
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    let mut command = std::process::Command::new(program);
    let output = command
        .args(arguments)
        .current_dir("/")
        .env_clear()
        .output();
    Some(output.ok()?.stdout).filter(|printed| !printed.is_empty())
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
    let registered = registered();
    for process in platform::dead_children() {
        let ours = registered.holds(process);
        if let (false, Some(pid)) = (ours, i32::try_from(process).ok().and_then(Pid::from_raw)) {
            // Whoever else reaped it, it is gone.
            let _ = waitpid(Some(pid), WaitOptions::NOHANG).is_ok();
        }
    }
}

fn registered() -> MutexGuard<'static, Register> {
    REGISTERED.lock().unwrap_or_else(PoisonError::into_inner)
}

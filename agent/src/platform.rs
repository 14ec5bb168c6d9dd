//! The one file for what differs between Linux and macOS: who listens where, and which processes belong to whom.
//!
//! Linux is asked through `/proc`, which knows descendants that left their process group. macOS is asked for process
//! groups alone; there the agent is a developer's tool and never process 1.

use std::{
    collections::{HashMap, HashSet},
    net::{SocketAddr, TcpListener},
    sync::OnceLock,
    time::Duration,
};

use listeners::{Protocol, SocketState};
use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group};

use crate::child::Leftovers;
#[cfg(target_os = "linux")]
use crate::child::Registered;

/// How often what is left is killed: about two seconds, in which the kernel is done with anything it can end.
const KILL_ROUNDS: u32 = 500;
/// Pause between these rounds.
const KILL_PAUSE: Duration = Duration::from_millis(4);

/// Listening TCP sockets, as seen from one process group.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// Those of the group and of descendants that left it.
    pub(crate) own: Vec<SocketAddr>,
    /// Those of everybody else.
    pub(crate) foreign: Vec<SocketAddr>,
}

/// All listening sockets. Reads as many files as there are open ones on the machine: not for the async threads.
pub(crate) fn listening_sockets(group: u32) -> Sockets {
    let mut sockets = Sockets::default();
    let processes = processes();
    let mut known = HashMap::new();
    for listener in listeners::get_all().unwrap_or_default() {
        if listener.protocol != Protocol::TCP || listener.state != SocketState::Listen {
            continue;
        }
        let process = listener.process.pid;
        let own = *known
            .entry(process)
            .or_insert_with(|| belongs(&processes, process, group));
        let side = if own {
            &mut sockets.own
        } else {
            &mut sockets.foreign
        };
        side.push(listener.socket);
    }
    sockets
}

/// Whether this machine tells at all who listens where; some sandboxes do not. Asked once, with a socket of our own.
pub(crate) fn tells_listeners() -> bool {
    static TELLS: OnceLock<bool> = OnceLock::new();
    *TELLS.get_or_init(|| {
        let Ok(listener) = TcpListener::bind(("127.0.0.1", 0)) else {
            return false;
        };
        let address = listener.local_addr().ok();
        listeners::get_all().is_ok_and(|all| {
            all.iter().any(|listener| {
                listener.process.pid == std::process::id() && Some(listener.socket) == address
            })
        })
    })
}

fn belongs(processes: &HashMap<u32, Process>, process: u32, group: u32) -> bool {
    let in_group = i32::try_from(process)
        .ok()
        .and_then(Pid::from_raw)
        .is_some_and(|pid| {
            getpgid(Some(pid)).is_ok_and(|of| of.as_raw_nonzero().get() as u32 == group)
        });
    in_group || descends(processes, process, &HashSet::from([group]))
}

fn descends(processes: &HashMap<u32, Process>, process: u32, roots: &HashSet<u32>) -> bool {
    let mut seen = HashSet::new();
    let mut at = process;
    while seen.insert(at) {
        if roots.contains(&at) {
            return true;
        }
        match processes.get(&at) {
            Some(process) => at = process.parent,
            None => return false,
        }
    }
    false
}

/// Sends a signal to every process of a group.
pub(crate) fn signal_group(group: u32, signal: Signal) {
    if let Some(group) = pid(group) {
        // Fails only if nobody is left.
        let _ = kill_process_group(group, signal).is_ok();
    }
}

/// Sends a signal to one process.
pub(crate) fn signal(process: u32, signal: Signal) {
    if let Some(pid) = pid(process) {
        // It may have ended by now.
        let _ = kill_process(pid, signal).is_ok();
    }
}

/// A process that may have left its group, and when it started: numbers are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Descendant {
    process: u32,
    started: u64,
}

impl Descendant {
    /// Sends it a signal, if it is still the same process.
    pub(crate) fn send(self, signal: Signal) {
        let same = identity(self.process) == Some(self.started);
        if let (true, Some(pid)) = (same, pid(self.process)) {
            // It may have ended by now. Where descendants cannot be listed, only leaders of groups are known.
            let _ = if cfg!(target_os = "linux") {
                kill_process(pid, signal).is_ok()
            } else {
                kill_process_group(pid, signal).is_ok()
            };
        }
    }

    /// Whether it is still there and runs.
    pub(crate) fn is_alive(self) -> bool {
        process(self.process).is_some_and(|now| now.started == self.started && !now.dead)
    }
}

fn pid(process: u32) -> Option<Pid> {
    i32::try_from(process).ok().and_then(Pid::from_raw)
}

/// What is known of a process.
#[derive(Clone, Copy, Debug)]
struct Process {
    parent: u32,
    group: u32,
    started: u64,
    dead: bool,
}

/// Everything alive that started in `group`: its members, processes whose parents are gone and whose environment holds
/// `mark`, and all descendants of these.
#[cfg(target_os = "linux")]
pub(crate) fn descendants(group: u32, mark: Option<&[u8]>) -> Vec<Descendant> {
    let processes = processes();
    let adopters = line_of_parents(&processes);
    let is_root = |number: u32, process: &Process| {
        process.group == group
            || number == group
            || adopters.contains(&process.parent)
                && mark.is_some_and(|mark| has_in_environment(number, mark))
    };
    let roots = roots(&processes, &adopters, is_root);
    found(&processes, &roots)
}

/// The agent and everything above it: orphans below the agent are adopted by one of these.
#[cfg(target_os = "linux")]
fn line_of_parents(processes: &HashMap<u32, Process>) -> HashSet<u32> {
    let mut line = HashSet::new();
    let mut at = std::process::id();
    while line.insert(at) {
        match processes.get(&at) {
            Some(process) => at = process.parent,
            None => break,
        }
    }
    line
}

#[cfg(target_os = "linux")]
fn has_in_environment(process: u32, mark: &[u8]) -> bool {
    std::fs::read(format!("/proc/{process}/environ")).is_ok_and(|environment| {
        environment
            .split(|byte| *byte == 0)
            .any(|line| line == mark)
    })
}

/// Processes that are meant, the agent and what is above it never among them.
#[cfg(target_os = "linux")]
fn roots(
    processes: &HashMap<u32, Process>,
    adopters: &HashSet<u32>,
    is_root: impl Fn(u32, &Process) -> bool,
) -> HashSet<u32> {
    processes
        .iter()
        .filter(|(number, process)| !adopters.contains(number) && is_root(**number, process))
        .map(|(number, _)| *number)
        .collect()
}

/// What is alive of `roots` and their descendants.
#[cfg(target_os = "linux")]
fn found(processes: &HashMap<u32, Process>, roots: &HashSet<u32>) -> Vec<Descendant> {
    processes
        .iter()
        .filter(|(number, process)| !process.dead && descends(processes, **number, roots))
        .map(|(number, process)| Descendant {
            process: *number,
            started: process.started,
        })
        .collect()
}

/// Kills everything that started in `group` until nothing is left, which may have been about to start more.
pub(crate) fn kill_descendants(group: u32, mark: Option<&[u8]>) {
    for _ in 0..KILL_ROUNDS {
        let left = descendants(group, mark);
        if left.is_empty() {
            return;
        }
        for descendant in left {
            descendant.send(Signal::KILL);
        }
        std::thread::sleep(KILL_PAUSE);
    }
}

/// The group's members cannot be listed here; they are reached by signals to the group.
#[cfg(not(target_os = "linux"))]
pub(crate) fn descendants(_group: u32, _mark: Option<&[u8]>) -> Vec<Descendant> {
    Vec::new()
}

/// What is left of the processes that an earlier agent registered, and of what they started.
///
/// A number alone proves nothing, as it is used again. The leader of a group is known by its start time. Where it has ended,
/// its group is known by the mark in its members' environment, and who left the group by that and by having been adopted.
#[cfg(target_os = "linux")]
pub(crate) fn leftovers(left: &Leftovers) -> Vec<Descendant> {
    let same_boot = left.boot == boot();
    if left.processes.is_empty() || !same_boot {
        return Vec::new();
    }
    let processes = processes();
    let adopters = line_of_parents(&processes);
    let leader_lives = |number: u32, started: u64| {
        let now = processes.get(&number);
        now.is_some_and(|now| now.started == started && !now.dead)
    };
    let is_left = |number: u32, process: &Process, registered: &Registered| {
        let has_mark = || {
            let mark = registered.mark.as_deref();
            mark.is_some_and(|mark| has_in_environment(number, mark))
        };
        match registered.process {
            Some((leader, started)) if leader_lives(leader, started) && process.group == leader => {
                true
            }
            Some((leader, _)) if process.group == leader => has_mark(),
            _ => adopters.contains(&process.parent) && has_mark(),
        }
    };
    let roots = roots(&processes, &adopters, |number, process| {
        let mut registered = left.processes.iter();
        process.started >= left.since
            && registered.any(|registered| is_left(number, process, registered))
    });
    found(&processes, &roots)
}

/// The groups' leaders: what left a group cannot be found here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn leftovers(left: &Leftovers) -> Vec<Descendant> {
    let leaders = left.processes.iter().filter_map(|left| left.process);
    leaders
        .map(|(process, started)| Descendant { process, started })
        .filter(|leader| identity(leader.process) == Some(leader.started))
        .collect()
}

/// What tells a process from every other one that ever had its number: its start time.
#[cfg(target_os = "linux")]
pub(crate) fn identity(number: u32) -> Option<u64> {
    Some(process(number)?.started)
}

/// What tells a process from every other one that ever had its number: its start time, as `ps` tells it.
#[cfg(not(target_os = "linux"))]
pub(crate) fn identity(number: u32) -> Option<u64> {
    use sha2::{Digest as _, Sha256};
    let started = crate::child::ask("/bin/ps", &["-o", "lstart=", "-p", &number.to_string()])?;
    let digest: [u8; 32] = Sha256::digest(started).into();
    let (first, _) = digest.split_first_chunk()?;
    Some(u64::from_be_bytes(*first))
}

/// The machine's boot; nothing where it cannot be told.
pub(crate) fn boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// Whether a process of the group still runs; one that ended and waits for its parent does not count.
pub(crate) fn group_is_alive(group: u32) -> bool {
    let Some(pid) = pid(group) else { return false };
    if rustix::process::test_kill_process_group(pid).is_err() {
        return false;
    }
    if cfg!(target_os = "linux") {
        processes()
            .values()
            .any(|process| process.group == group && !process.dead)
    } else {
        true
    }
}

/// Makes the agent the parent of orphans below it, so that it can find and reap them.
pub(crate) fn adopt_orphans() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
        tracing::debug!("orphans cannot be adopted: {error}");
    }
}

/// Children of this process that ended and wait to be reaped.
#[cfg(target_os = "linux")]
pub(crate) fn dead_children() -> Vec<u32> {
    let own = std::process::id();
    processes()
        .into_iter()
        .filter(|(_, process)| process.dead && process.parent == own)
        .map(|(number, _)| number)
        .collect()
}

/// Nobody is adopted here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn dead_children() -> Vec<u32> {
    Vec::new()
}

#[cfg(target_os = "linux")]
fn processes() -> HashMap<u32, Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return HashMap::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|number| Some((number, process(number)?)))
        .collect()
}

#[cfg(not(target_os = "linux"))]
fn processes() -> HashMap<u32, Process> {
    HashMap::new()
}

#[cfg(target_os = "linux")]
fn process(number: u32) -> Option<Process> {
    let stat = std::fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
    // The name in parentheses may hold anything, spaces and parentheses included.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(Process {
        dead: matches!(*fields.first()?, "Z" | "X"),
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

#[cfg(not(target_os = "linux"))]
fn process(_number: u32) -> Option<Process> {
    None
}

//! The agent on this machine: found again, started, replaced and ended; one for each project.
//!
//! An agent writes where it listens into a file in the user's state folder. A push trusts that file at first, as it can only be
//! answered by the boot that the file names; if nobody answers so, the agent is looked for properly, under a lock, and started.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use hyper::Method;
use rrun_protocol::{BootId, CONTROL_PREFIX};
use serde::Deserialize;

use crate::{
    arguments::KeyFile,
    ask::{Agent, AskError},
    checkout,
    commands::Here,
    connection::{Connection, ServiceUrl},
    folders::make_private,
    keys::Key,
    problem::{Context as _, Problem},
    process, service,
    service::Place,
};

const DEFAULT_PORT: u16 = 8080;
/// How long a new agent may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long an agent may take to answer or to end: it stops its app first, which has 5 s.
const END_LIMIT: Duration = Duration::from_secs(20);
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const POLL_EVERY: Duration = Duration::from_millis(5);
/// Lines of an agent's log that are shown when it does not start.
const LOG_LINES: usize = 10;

/// What a running agent says about itself in its file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Announced {
    pid: u32,
    port: u16,
    version: String,
    boot: BootId,
}

/// Where the agent of a project keeps what.
struct Files {
    state: PathBuf,
    announced: PathBuf,
    log: PathBuf,
}

/// An agent on this machine that a push can go to.
pub(crate) struct Reached {
    pub(crate) agent: Agent,
    /// Whether it was started for this push.
    pub(crate) is_new: bool,
}

impl Files {
    fn of(here: &Here, place: &Place) -> Self {
        let state = here.folders.project_state(&place.id);
        Self {
            announced: state.join("agent.json"),
            log: state.join("agent.log"),
            state,
        }
    }

    /// Keeps every other rrun from starting or ending this agent until it is dropped.
    async fn lock(&self) -> Result<File, Problem> {
        loop {
            match checkout::try_lock(&self.state, "agent.lock") {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) => tokio::time::sleep(POLL_EVERY).await,
                Err(error) => return Err(error).or_cannot("lock the agent's state"),
            }
        }
    }

    /// What the file says, if its process runs.
    fn announced(&self) -> Option<Announced> {
        read(&self.announced).filter(|announced| process::is_running(announced.pid))
    }
}

fn read(file: &Path) -> Option<Announced> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

impl Announced {
    /// Whether it is what a push wants.
    fn suits(&self, port: Option<u16>) -> bool {
        self.version == env!("CARGO_PKG_VERSION") && port.is_none_or(|port| port == self.port)
    }

    /// Says why it has to go; it does not suit.
    fn why_replaced(&self) -> String {
        if self.version == env!("CARGO_PKG_VERSION") {
            format!("moving the agent from port {}", self.port)
        } else {
            format!("replacing an agent of version {}", self.version)
        }
    }

    fn agent(&self, here: &Here, place: &Place, key: Key) -> Result<Agent, Problem> {
        let name = format!("local {}", place.id.as_str());
        let signer = service::signer(here, key, &name)?;
        signer.set_boot(self.boot);
        let connection = Connection::new(ServiceUrl::loopback(self.port))?;
        Ok(Agent::new(connection, signer).pinned())
    }
}

/// The project's agent as its file says, without asking whether it is there; `None` if one has to be started.
pub(crate) fn presumed(
    here: &Here,
    place: &Place,
    key: &KeyFile,
    port: Option<u16>,
) -> Result<Option<Reached>, Problem> {
    let announced = Files::of(here, place).announced();
    match announced.filter(|announced| announced.suits(port)) {
        Some(announced) => Ok(Some(Reached {
            agent: announced.agent(here, place, service::key(here, key)?)?,
            is_new: false,
        })),
        None => Ok(None),
    }
}

/// The project's agent, surely there: found, or started, or put in place of one that does not suit.
pub(crate) async fn ensure(
    here: &Here,
    place: &Place,
    key: &KeyFile,
    port: Option<u16>,
) -> Result<Reached, Problem> {
    if cfg!(not(unix)) {
        return Err(Problem::usage("an agent runs on Linux and macOS only")
            .hint("push to a service with `--url`".to_owned()));
    }
    let files = Files::of(here, place);
    let _lock = files.lock().await?;
    let last_port = files.announced().map(|announced| announced.port);
    if let Some(announced) = files.announced() {
        let agent = announced.agent(here, place, service::key(here, key)?)?;
        match answers(&agent).await {
            Ok(()) if announced.suits(port) => {
                return Ok(Reached {
                    agent,
                    is_new: false,
                });
            }
            // Its own boot answers, and it does not know this key: it is the agent, and cannot be asked to go.
            Err(error) if error.is_stranger() => {
                process::terminate(announced.pid);
            }
            Ok(()) => {
                here.render.note(&announced.why_replaced(), None);
                ask_to_end(&agent).await?;
            }
            Err(error) if error.is_absence() => {}
            Err(error) => return Err(error.into()),
        }
        wait_for_end(announced.pid, &agent).await?;
        let _ = fs::remove_file(&files.announced);
    }
    // Where the last one was, so that an address that is open in a browser stays good.
    let last_port = last_port.filter(|port| !is_taken(*port));
    let port = port.or(last_port).unwrap_or(DEFAULT_PORT);
    if is_taken(port) {
        return Err(taken(here, place, port));
    }
    let key = service::key(here, key)?;
    let announced = start(here, place, &files, &key, port).await?;
    here.render.note(
        &format!(
            "started an agent at {} (its log: {})",
            ServiceUrl::loopback(announced.port),
            files.log.display()
        ),
        None,
    );
    Ok(Reached {
        agent: announced.agent(here, place, key)?,
        is_new: true,
    })
}

/// The project's agent for a command that starts none.
pub(crate) fn running(here: &Here, place: &Place, key: &KeyFile) -> Result<Agent, Problem> {
    let Some(announced) = Files::of(here, place).announced() else {
        return Err(Problem::unreachable(format!(
            "no agent of {} runs on this machine",
            place.folder.display()
        ))
        .hint(format!(
            "{} starts one",
            here.call.command("push --local", &place.typed)
        )));
    };
    announced.agent(here, place, service::key(here, key)?)
}

/// Ends the project's agent. Says whether there was one.
pub(crate) async fn end(here: &Here, place: &Place, key: &KeyFile) -> Result<bool, Problem> {
    let files = Files::of(here, place);
    let _lock = files.lock().await?;
    let Some(announced) = files.announced() else {
        return Ok(false);
    };
    let agent = announced.agent(here, place, service::key(here, key)?)?;
    let was_there = match ask_to_end(&agent).await {
        Ok(()) => true,
        Err(error) if error.is_stranger() => {
            process::terminate(announced.pid);
            true
        }
        Err(error) if error.is_absence() => false,
        Err(error) => return Err(error.into()),
    };
    if was_there {
        wait_for_end(announced.pid, &agent).await?;
    }
    let _ = fs::remove_file(&files.announced);
    Ok(was_there)
}

async fn answers(agent: &Agent) -> Result<(), AskError> {
    match tokio::time::timeout(ANSWER_LIMIT, agent.status()).await {
        Ok(answer) => answer.map(|_| ()),
        Err(_) => Err(agent.broken("it does not answer")),
    }
}

async fn ask_to_end(agent: &Agent) -> Result<(), AskError> {
    let path = format!("{CONTROL_PREFIX}stop?agent=true");
    let asking = agent.ask(Method::POST, &path, Default::default());
    match tokio::time::timeout(END_LIMIT, asking).await {
        // The connection may end with the agent, before or in the middle of its answer.
        Ok(Ok(_) | Err(AskError::Broken { .. })) => Ok(()),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(agent.broken("it does not answer")),
    }
}

/// Waits until the process is gone. A number that is another process's by now has nobody listening for it.
async fn wait_for_end(pid: u32, agent: &Agent) -> Result<(), Problem> {
    let since = Instant::now();
    while process::is_running(pid) {
        if matches!(answers(agent).await, Err(error) if error.is_absence())
            && since.elapsed() > ANSWER_LIMIT
        {
            return Ok(());
        }
        if since.elapsed() > END_LIMIT {
            return Err(
                Problem::unexpected(format!("the agent (process {pid}) does not end"))
                    .hint(format!("end it by hand: kill -9 {pid}")),
            );
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
    Ok(())
}

/// Starts an agent and waits until it says that it listens.
async fn start(
    here: &Here,
    place: &Place,
    files: &Files,
    key: &Key,
    port: u16,
) -> Result<Announced, Problem> {
    let workspace = here.folders.agent_workspace(&place.id);
    make_private(&workspace).or_cannot("make the agent's workspace")?;
    let _ = fs::remove_file(&files.announced);
    let log = File::create(&files.log).or_cannot("write the agent's log")?;
    let mut arguments: Vec<OsString> = ["agent", "serve", "--bind", "127.0.0.1", "--port"]
        .map(OsString::from)
        .to_vec();
    arguments.push(port.to_string().into());
    arguments.extend(["--workspace".into(), workspace.clone().into()]);
    arguments.extend(["--announce".into(), files.announced.clone().into()]);
    let environment = [("RRUN_AUTHORIZED_KEYS", key.public().to_string())];
    let mut child = process::start_detached(&arguments, &environment, &workspace, &log)
        .or_cannot("start the agent")?;
    wait_for_start(files, &mut child).await
}

async fn wait_for_start(files: &Files, child: &mut Child) -> Result<Announced, Problem> {
    let since = Instant::now();
    loop {
        if let Some(announced) = read(&files.announced) {
            return Ok(announced);
        }
        let ended = child.try_wait().or_cannot("watch the agent")?;
        let what = match ended {
            Some(status) => format!("the agent ended at once ({status})"),
            None if since.elapsed() > START_LIMIT => "the agent does not start".to_owned(),
            None => {
                tokio::time::sleep(POLL_EVERY).await;
                continue;
            }
        };
        if ended.is_none() {
            process::terminate(child.id());
        }
        let log = last_lines(&files.log);
        return Err(Problem::unreachable(if log.is_empty() {
            what
        } else {
            format!("{what}; its log ends with:\n{log}")
        })
        .hint(format!("the whole log: {}", files.log.display())));
    }
}

fn last_lines(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

/// Whether somebody else has the port. Both are tried: macOS lets one bind beside a listener for all addresses.
fn is_taken(port: u16) -> bool {
    let address = (Ipv4Addr::LOCALHOST, port);
    match TcpListener::bind(address) {
        Err(error) => error.kind() != io::ErrorKind::PermissionDenied,
        Ok(listener) => {
            drop(listener);
            TcpStream::connect_timeout(&address.into(), Duration::from_millis(200)).is_ok()
        }
    }
}

/// Names who has the port, and offers a free one.
fn taken(here: &Here, place: &Place, port: u16) -> Problem {
    let error = match other_project_at(&here.folders.state, port) {
        Some(folder) => format!("port {port} is held by the agent of {}", folder.display()),
        None => format!("port {port} is taken by another program"),
    };
    let free = (port.saturating_add(1)..=port.saturating_add(100)).find(|port| !is_taken(*port));
    let command = format!("push --local --port {}", free.unwrap_or(port));
    Problem::unreachable(error).hint(format!(
        "choose another one: {}",
        here.call.command(&command, &place.typed)
    ))
}

/// The project whose running agent listens at `port`.
fn other_project_at(states: &Path, port: u16) -> Option<PathBuf> {
    fs::read_dir(states)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|state| {
            let announced = read(&state.join("agent.json"));
            announced.is_some_and(|other| other.port == port && process::is_running(other.pid))
        })
        .find_map(|state| checkout::load(&state).map(|checkout| checkout.folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_suits_if_version_and_port_are_right() {
        let announced = |version: &str| Announced {
            pid: 1,
            port: 8080,
            version: version.to_owned(),
            boot: BootId::from_random([1; 9]),
        };
        let same = announced(env!("CARGO_PKG_VERSION"));
        assert!(same.suits(None) && same.suits(Some(8080)));
        assert!(!same.suits(Some(8081)));
        assert!(!announced("0.0.0").suits(None));
    }

    #[test]
    fn a_port_that_somebody_listens_at_is_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(is_taken(port));
        drop(listener);
        assert!(!is_taken(port));
    }

    #[test]
    fn a_port_that_another_projects_agent_holds_is_told_by_its_folder() {
        let states = tempfile::tempdir().unwrap();
        let state = states.path().join("0123");
        checkout::number(&state, Path::new("/home/ann/other")).unwrap();
        let announced = serde_json::json!({
            "pid": std::process::id(), "port": 8080, "version": "0.1.0", "boot": BootId::from_random([1; 9]),
        });
        fs::write(state.join("agent.json"), announced.to_string()).unwrap();
        let other = other_project_at(states.path(), 8080);
        assert_eq!(other, cfg!(unix).then(|| PathBuf::from("/home/ann/other")));
        assert_eq!(other_project_at(states.path(), 8081), None);
    }

    #[test]
    fn only_the_end_of_a_log_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let lines: Vec<String> = (0..50).map(|line| line.to_string()).collect();
        fs::write(&log, lines.join("\n")).unwrap();
        assert!(last_lines(&log).starts_with("40\n"));
        assert_eq!(last_lines(&folder.path().join("none")), "");
    }
}

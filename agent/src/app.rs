//! One live process of a generation: started on a private port, watched until it is ready, stopped with all it started.
//!
//! Ready means that a listening socket on the private port belongs to the process or something it started (and that the
//! ready path answers, if there is one). That somebody accepts connections there is not enough: another process may have
//! taken the port first, and requests must never go to it.
//!
//! Dropping an [`App`] kills it. What serves, and when, is decided in `service.rs`.

use std::{
    ffi::OsString,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::ExitStatus,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{
    Request,
    client::conn::{http1, http2},
    header::HOST,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rrun_protocol::{RunPlan, Stream};
use rustix::process::Signal;
use tokio::{net::TcpStream, task::JoinSet};

use crate::{
    child::{self, Started},
    clock::{running_sleep, running_timeout},
    fault::fault_point,
    output::{Output, OutputLine},
    platform::{self, Descendant},
};

/// Pause between two looks whether the app listens.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Every so many looks, also look who listens elsewhere: reading all sockets of the machine takes some milliseconds.
const LOOKS_UNTIL_SEARCH: u32 = 50;
/// After so many searches in a row that found it listening elsewhere only, it is not going to listen on its port: about
/// five seconds. Less would refuse an app that opens a port for its metrics first and then connects to its database.
const SEARCHES_ELSEWHERE: u32 = 20;
/// How long one request to the ready path may take.
const READY_REQUEST_LIMIT: Duration = Duration::from_secs(5);
/// How often another port is tried when somebody else took it.
const PORT_TRIES: u32 = 5;
/// Lines of output that are shown of an app that never got ready.
const LINES_SHOWN: usize = 50;
/// How long the rest of a dead app's output may take: something it started may still hold the pipe.
const REST_OF_OUTPUT_LIMIT: Duration = Duration::from_millis(500);
/// Pause between two looks whether a group has ended.
const GONE_EVERY: Duration = Duration::from_millis(10);
/// How long processes may take to go after SIGKILL.
const KILLED_LIMIT: Duration = Duration::from_secs(1);

/// What to run.
#[derive(Clone, Debug)]
pub struct AppSpec {
    /// Number of the build that it came from.
    pub generation: u64,
    /// Its working directory.
    pub directory: PathBuf,
    /// The program.
    pub executable: PathBuf,
    /// Arguments, environment, limits.
    pub run: RunPlan,
    /// The container's environment; what `run` says and `PORT` are put on top.
    pub environment: Vec<(OsString, OsString)>,
}

impl AppSpec {
    /// Replaces this process by the app, on `port`. Returns only if that fails.
    pub fn exec(&self, port: u16) -> io::Error {
        child::exec(&child::Spec {
            executable: &self.executable,
            arguments: self.arguments(port),
            directory: &self.directory,
            environment: environment(self, port),
            known_by: "PORT",
        })
    }

    fn arguments(&self, port: u16) -> Vec<OsString> {
        self.run
            .args
            .iter()
            .map(|argument| expand(argument, port).into())
            .collect()
    }
}

/// Something the user should know that does not end the push: a lower-case fragment and what to do next.
pub type Warning = (String, Option<String>);

/// Why a version does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// It was started and never got ready.
    #[error("{reason}")]
    NotReady {
        /// A lower-case fragment.
        reason: String,
        /// What to do next.
        hint: Option<String>,
        /// The last that it printed.
        output: Vec<OutputLine>,
    },
    /// Somebody cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// It could not be started.
    #[error("{path} could not be started in {directory}: {source}")]
    Start {
        /// The program.
        path: String,
        /// Its working directory.
        directory: String,
        /// Why.
        source: io::Error,
    },
}

/// A process of a generation that is ready.
#[derive(Debug)]
pub(crate) struct ReadyApp {
    pub(crate) app: App,
    pub(crate) address: SocketAddr,
    pub(crate) warnings: Vec<Warning>,
    pub(crate) took: Duration,
}

/// Starts an app and waits until it is ready. Dropping the future kills it.
pub(crate) async fn start_ready(
    spec: &Arc<AppSpec>,
    output: &Output,
) -> Result<ReadyApp, ReplaceError> {
    let since = Instant::now();
    let mut last = None;
    for _ in 0..PORT_TRIES {
        let position = output.position();
        let mut app = App::start(spec, output).await?;
        match app.ready().await {
            Ok((address, warnings)) => {
                let took = since.elapsed();
                return Ok(ReadyApp {
                    app,
                    address,
                    warnings,
                    took,
                });
            }
            Err(unready) => {
                app.kill().await;
                let foreign = unready.foreign;
                last = Some(unready.into_error(spec, output, position));
                if !foreign {
                    break;
                }
                tracing::info!("somebody else took the app's port, starting it on another one");
            }
        }
    }
    Err(last.expect("at least one start was tried"))
}

/// A process and what it started.
#[derive(Debug)]
pub(crate) struct App {
    spec: Arc<AppSpec>,
    port: u16,
    started: Started,
    exit: Option<ExitStatus>,
    pumps: JoinSet<()>,
    gone: bool,
}

impl App {
    async fn start(spec: &Arc<AppSpec>, output: &Output) -> Result<Self, ReplaceError> {
        let port = free_port().map_err(|error| could_not_start(spec, error))?;
        let mut started = child::start(&child::Spec {
            executable: &spec.executable,
            arguments: spec.arguments(port),
            directory: &spec.directory,
            environment: environment(spec, port),
            known_by: "PORT",
        })
        .await
        .map_err(|error| could_not_start(spec, error))?;
        fault_point!("starting");
        let mut pumps = JoinSet::new();
        if let Some(pipe) = started.child.stdout.take() {
            pumps.spawn(output.clone().pump(spec.generation, Stream::Stdout, pipe));
        }
        if let Some(pipe) = started.child.stderr.take() {
            pumps.spawn(output.clone().pump(spec.generation, Stream::Stderr, pipe));
        }
        Ok(Self {
            spec: Arc::clone(spec),
            port,
            started,
            exit: None,
            pumps,
            gone: false,
        })
    }

    /// Its process id.
    pub(crate) fn process(&self) -> u32 {
        self.started.process()
    }

    /// Waits until it ends by itself, and says how.
    pub(crate) async fn exited(&mut self) -> String {
        describe(self.wait().await)
    }

    async fn wait(&mut self) -> ExitStatus {
        if let Some(exit) = self.exit {
            return exit;
        }
        // An error means that somebody else reaped it: it has ended, and nobody knows how.
        let exit = self.started.child.wait().await.unwrap_or_default();
        self.exit = Some(exit);
        exit
    }

    async fn ready(&mut self) -> Result<(SocketAddr, Vec<Warning>), Unready> {
        let (port, group) = (self.port, self.process());
        let limit = self.spec.run.ready_timeout;
        let ready_path = self.spec.run.ready_path.clone();
        let mut progress = Progress::default();
        let outcome = {
            let readiness = readiness(port, group, ready_path.as_deref(), &mut progress);
            tokio::select! {
                biased;
                exit = self.wait() => Err(Some(exit)),
                outcome = running_timeout(limit, readiness) => outcome.map_err(|_| None),
            }
        };
        match outcome {
            Ok(outcome) => outcome.map(|address| (address, progress.warnings(address))),
            Err(Some(exit)) => Err(Unready::exited(exit, port)),
            Err(None) => Err(progress.timed_out(port, limit, ready_path.as_deref())),
        }
    }

    /// SIGTERM, until `grace` is over, SIGKILL; returns when nothing of it is left.
    pub(crate) async fn stop(mut self, grace: impl Future<Output = ()>) {
        let generation = self.spec.generation;
        let mut known = self.descendants().await;
        platform::signal_group(self.process(), Signal::TERM);
        tokio::select! {
            biased;
            () = self.ended(&known) => {}
            () = grace => {
                tracing::info!("generation {generation} did not end after SIGTERM, it is killed");
            }
        }
        for late in self.descendants().await {
            if !known.contains(&late) {
                known.push(late);
            }
        }
        self.finish(known).await;
    }

    /// SIGKILL at once; returns when nothing of it is left.
    pub(crate) async fn kill(mut self) {
        let known = self.descendants().await;
        self.finish(known).await;
    }

    async fn finish(&mut self, known: Vec<Descendant>) {
        if running_timeout(KILLED_LIMIT, self.kill_all(known))
            .await
            .is_err()
        {
            tracing::warn!(
                "something that generation {} started did not end after SIGKILL",
                self.spec.generation
            );
        }
        let rest = async { while self.pumps.join_next().await.is_some() {} };
        // Whoever still holds the pipe is not part of the app any more.
        let _ = running_timeout(REST_OF_OUTPUT_LIMIT, rest).await.is_ok();
        self.gone = true;
        self.started.all_gone();
    }

    /// Again and again: what is killed may have been about to start something that was not listed yet.
    async fn kill_all(&mut self, mut known: Vec<Descendant>) {
        loop {
            self.kill_now(&known);
            self.ended(&known).await;
            known = self.descendants().await;
            if known.is_empty() {
                return;
            }
        }
    }

    fn kill_now(&self, known: &[Descendant]) {
        platform::signal_group(self.process(), Signal::KILL);
        for descendant in known {
            descendant.send(Signal::KILL);
        }
    }

    async fn ended(&mut self, known: &[Descendant]) {
        self.wait().await;
        let group = self.process();
        while platform::group_is_alive(group) || known.iter().any(|known| known.is_alive()) {
            running_sleep(GONE_EVERY).await;
        }
    }

    async fn descendants(&self) -> Vec<Descendant> {
        tokio::task::spawn_blocking(self.started.look())
            .await
            .unwrap_or_default()
    }
}

impl Drop for App {
    fn drop(&mut self) {
        if !self.gone {
            self.kill_now(&self.started.look()());
            // What was just being started is found once it is there; not worth making an async thread wait.
            std::thread::spawn(self.started.kill_until_gone());
        }
    }
}

/// Waits until somebody of the group listens on its port, and answers there if there is a path to ask.
async fn readiness(
    port: u16,
    group: u32,
    ready_path: Option<&str>,
    progress: &mut Progress,
) -> Result<SocketAddr, Unready> {
    let address = listening(port, group, progress).await?;
    let Some(path) = ready_path else {
        return Ok(address);
    };
    loop {
        match running_timeout(READY_REQUEST_LIMIT, ask(address, path)).await {
            Ok(Ok(status)) if status < 500 => return Ok(address),
            Ok(Ok(status)) => progress.answer = Some(format!("answered {status}")),
            Ok(Err(error)) => progress.answer = Some(format!("did not answer: {error}")),
            Err(_) => progress.answer = Some(String::from("did not answer")),
        }
        running_sleep(LOOK_EVERY * 4).await;
    }
}

async fn listening(port: u16, group: u32, progress: &mut Progress) -> Result<SocketAddr, Unready> {
    let mut searches_elsewhere = 0;
    for look in 1.. {
        let accepts = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .is_ok();
        if accepts || look % LOOKS_UNTIL_SEARCH == 0 {
            progress.search(port, group).await;
            if let Some(address) = progress.reachable(port, accepts) {
                return Ok(address);
            }
            if progress.foreign {
                return Err(Unready::foreign(port));
            }
            if look % LOOKS_UNTIL_SEARCH == 0 {
                searches_elsewhere = if progress.elsewhere.is_empty() {
                    0
                } else {
                    searches_elsewhere + 1
                };
            }
            if searches_elsewhere >= SEARCHES_ELSEWHERE {
                return Err(progress.listens_elsewhere(port));
            }
        }
        running_sleep(LOOK_EVERY).await;
    }
    unreachable!("the looks do not end by themselves")
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Status of a GET.
async fn ask(address: SocketAddr, path: &str) -> Result<u16, BoxError> {
    match ask_http1(address, path).await {
        Ok(status) => Ok(status),
        // It may speak HTTP/2 alone, as gRPC servers do.
        Err(error) => ask_http2(address, path).await.map_err(|_| error),
    }
}

async fn ask_http2(address: SocketAddr, path: &str) -> Result<u16, BoxError> {
    let stream = TcpStream::connect(address).await?;
    let executor = TokioExecutor::new();
    let (mut sender, connection) = http2::handshake(executor, TokioIo::new(stream)).await?;
    let request = Request::get(format!("http://{address}{path}")).body(Empty::<Bytes>::new())?;
    tokio::select! {
        response = sender.send_request(request) => Ok(response?.status().as_u16()),
        ended = connection => {
            ended?;
            Err("the connection was closed".into())
        }
    }
}

async fn ask_http1(address: SocketAddr, path: &str) -> Result<u16, BoxError> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path)
        .header(HOST, format!("localhost:{}", address.port()))
        .body(Empty::<Bytes>::new())?;
    tokio::select! {
        response = sender.send_request(request) => Ok(response?.status().as_u16()),
        ended = connection => {
            ended?;
            Err("the connection was closed".into())
        }
    }
}

/// What was found so far.
#[derive(Debug, Default)]
struct Progress {
    own: Vec<SocketAddr>,
    elsewhere: Vec<u16>,
    foreign: bool,
    answer: Option<String>,
}

impl Progress {
    async fn search(&mut self, port: u16, group: u32) {
        let sockets = tokio::task::spawn_blocking(move || platform::listening_sockets(group))
            .await
            .unwrap_or_default();
        (self.own, self.elsewhere) = {
            let (own, elsewhere): (Vec<_>, Vec<_>) = sockets
                .own
                .into_iter()
                .partition(|socket| socket.port() == port);
            let mut elsewhere: Vec<_> = elsewhere.iter().map(SocketAddr::port).collect();
            elsewhere.sort_unstable();
            elsewhere.dedup();
            (own, elsewhere)
        };
        self.foreign =
            self.own.is_empty() && sockets.foreign.iter().any(|socket| socket.port() == port);
        if !self.own.is_empty() {
            self.elsewhere.clear();
        }
    }

    /// Where requests can be sent, if the app listens on its port.
    fn reachable(&self, port: u16, accepts: bool) -> Option<SocketAddr> {
        if let Some(socket) = self.own.first() {
            let ip = match socket.ip().to_canonical() {
                IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(ip) if ip.is_unspecified() && accepts => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
                ip => ip,
            };
            return Some(SocketAddr::new(ip, port));
        }
        // Where nobody can be asked who listens, that somebody does has to be enough.
        (accepts && !self.foreign && !platform::tells_listeners())
            .then(|| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port))
    }

    fn warnings(&self, address: SocketAddr) -> Vec<Warning> {
        let only_here = !self.own.is_empty()
            && self
                .own
                .iter()
                .all(|socket| socket.ip().to_canonical().is_loopback());
        only_here
            .then(|| {
                let ip = address.ip();
                (
                    format!("the app listens on {ip} only, where production would not reach it"),
                    Some(String::from("listen on 0.0.0.0, or on [::]")),
                )
            })
            .into_iter()
            .collect()
    }

    fn listens_elsewhere(&self, port: u16) -> Unready {
        let ports: Vec<_> = self.elsewhere.iter().map(u16::to_string).collect();
        Unready {
            reason: format!("listens on {}, not on $PORT ({port})", ports.join(" and ")),
            hint: Some(String::from(
                "listen on the port that the environment variable PORT names; the settings `args` and `env` expand $PORT",
            )),
            foreign: false,
        }
    }

    fn timed_out(&self, port: u16, limit: Duration, ready_path: Option<&str>) -> Unready {
        let limit = limit.as_secs_f32();
        if let (Some(answer), Some(path)) = (&self.answer, ready_path) {
            return Unready {
                reason: format!("{path} {answer} for {limit} s"),
                hint: Some(String::from(
                    "`ready-path` has to answer below 500; `ready-timeout` gives it longer",
                )),
                foreign: false,
            };
        }
        if !self.elsewhere.is_empty() {
            return self.listens_elsewhere(port);
        }
        Unready {
            reason: format!("did not listen on $PORT ({port}) within {limit} s"),
            hint: Some(String::from("`ready-timeout` gives a slow starter longer")),
            foreign: false,
        }
    }
}

/// Why an app is not ready.
#[derive(Debug)]
struct Unready {
    reason: String,
    hint: Option<String>,
    /// Somebody else has the port: another one may do.
    foreign: bool,
}

impl Unready {
    fn exited(exit: ExitStatus, port: u16) -> Self {
        Self {
            reason: format!("{} before it was ready", describe(exit)),
            hint: None,
            foreign: TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_err(),
        }
    }

    fn foreign(port: u16) -> Self {
        Self {
            reason: format!("another process listens on its port ({port})"),
            hint: None,
            foreign: true,
        }
    }

    fn into_error(self, spec: &AppSpec, output: &Output, since: u64) -> ReplaceError {
        ReplaceError::NotReady {
            reason: self.reason,
            hint: self.hint,
            output: output.of_generation_since(spec.generation, since, LINES_SHOWN),
        }
    }
}

fn could_not_start(spec: &AppSpec, source: io::Error) -> ReplaceError {
    ReplaceError::Start {
        path: spec.executable.display().to_string(),
        directory: spec.directory.display().to_string(),
        source,
    }
}

/// How a process ended: a lower-case fragment.
fn describe(exit: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (exit.code(), exit.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(number)) => match Signal::from_named_raw(number) {
            Some(signal) => format!("was killed by signal {number} ({signal:?})"),
            None => format!("was killed by signal {number}"),
        },
        (None, None) => String::from("ended"),
    }
}

/// A port that is free now. Somebody may take it before the app does; then the app is started on another one.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?
        .local_addr()?
        .port())
}

fn environment(spec: &AppSpec, port: u16) -> Vec<(OsString, OsString)> {
    let own = spec
        .run
        .environment
        .iter()
        .map(|(name, value)| (name.into(), expand(value, port).into()));
    let port = (OsString::from("PORT"), OsString::from(port.to_string()));
    spec.environment
        .iter()
        .cloned()
        .chain(own)
        .chain([port])
        .collect()
}

/// Puts the port in the place of `$PORT` and `${PORT}`; `$PORTAL` is another variable.
fn expand(text: &str, port: u16) -> String {
    let port = port.to_string();
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at..];
        let bare = rest.strip_prefix("$PORT").filter(|after| {
            !after.starts_with(|next: char| next == '_' || next.is_ascii_alphanumeric())
        });
        if let Some(after) = rest.strip_prefix("${PORT}").or(bare) {
            expanded.push_str(&port);
            rest = after;
        } else {
            expanded.push('$');
            rest = &rest[1..];
        }
    }
    expanded + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_put_in_its_place() {
        let cases = [
            ("--listen=0.0.0.0:$PORT", "--listen=0.0.0.0:81"),
            ("${PORT}0 $PORT", "810 81"),
            ("$PORTAL $PORT_ $$PORT $", "$PORTAL $PORT_ $81 $"),
        ];
        for (text, expected) in cases {
            assert_eq!(expand(text, 81), expected);
        }
    }
}

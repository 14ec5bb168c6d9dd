//! A laptop, an agent and a project for end-to-end tests: the real client, the real agent, real cargo, real sockets.
//!
//! Everything lies in one temporary folder and ends with the test. Projects use nothing but std, so that they compile in
//! half a second.

use std::{
    collections::BTreeMap,
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rrun_protocol::{
    Authorization, BootId, Digest, Nonce, PrivateKey, SIGNATURE_HEADER, SignedRequest,
};
use serde_json::Value;

/// How long anything in a test may take before it counts as hanging; far beyond what a slow machine needs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// An app that answers every request with `ANSWER`, over connections that stay open.
pub(crate) const MAIN: &str = r#"use std::io::{BufRead, BufReader, Write};

const ANSWER: &str = "one";

fn main() {
    let port = std::env::var("PORT").expect("PORT is set");
    let listener = std::net::TcpListener::bind(format!("0.0.0.0:{port}")).expect("the port is free");
    println!("listening on {port}");
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || serve(stream));
    }
}

fn serve(mut stream: std::net::TcpStream) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    loop {
        while !lines.next()?.ok()?.is_empty() {}
        let answer = answer();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
        stream.write_all(answer.as_bytes()).ok()?;
    }
}

fn answer() -> String {
    ANSWER.to_owned()
}
"#;

/// One person's laptop: their settings, cache and key.
pub(crate) struct Laptop {
    folder: tempfile::TempDir,
    /// Environment of every command on top of the test's own.
    pub environment: BTreeMap<String, String>,
}

/// A cargo project on a laptop.
pub(crate) struct Project {
    pub folder: PathBuf,
    _owner: Option<tempfile::TempDir>,
}

/// How an agent is started.
#[derive(Clone, Copy, Default)]
struct How {
    /// Program and arguments in front of the agent's own.
    starter: &'static [&'static str],
    /// More environment.
    environment: &'static [(&'static str, &'static str)],
}

/// A running agent; ends with its app when dropped.
pub(crate) struct Agent {
    child: Child,
    how: How,
    folder: tempfile::TempDir,
    keys: String,
    pub port: u16,
}

/// A push that goes on while the test does something else.
pub(crate) struct Running {
    child: Child,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
    seen: String,
}

impl Running {
    /// Reads events until one of `kind` comes.
    pub(crate) fn wait_for(&mut self, kind: &str) -> Value {
        loop {
            let line = self.lines.next();
            let line = line.unwrap_or_else(|| panic!("no {kind}: {}", self.seen));
            let line = line.unwrap();
            let event: Value = serde_json::from_str(&line).unwrap();
            self.seen += &(line + "\n");
            if event["event"] == kind {
                return event;
            }
        }
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub(crate) fn code(&mut self) -> Option<i32> {
        self.child.try_wait().unwrap()?.code()
    }

    /// Ends it by SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ran {
        for line in self.lines.by_ref() {
            self.seen += &(line.unwrap() + "\n");
        }
        let output = self.child.wait_with_output().unwrap();
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: self.seen,
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// What a command of `rrun` did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: u16,
    pub body: String,
}

impl Laptop {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut environment = BTreeMap::new();
        for (name, place) in [
            ("XDG_CONFIG_HOME", "config"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_STATE_HOME", "state"),
        ] {
            environment.insert(
                name.to_owned(),
                folder.path().join(place).to_str().unwrap().to_owned(),
            );
        }
        Self {
            folder,
            environment,
        }
    }

    /// Everything that it keeps: settings with the key, cache, state.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn key_file(&self) -> PathBuf {
        self.folder.path().join("config/rrun/key.pem")
    }

    pub(crate) fn private_key(&self) -> PrivateKey {
        self.public_key();
        PrivateKey::from_pem(&fs::read_to_string(self.key_file()).unwrap()).unwrap()
    }

    /// The line that `rrun key` prints.
    pub(crate) fn public_key(&self) -> String {
        let ran = self.run(Path::new("."), &["key"]);
        assert_eq!(ran.code, 0, "{ran:?}");
        ran.stdout.trim().to_owned()
    }

    pub(crate) fn command(&self, folder: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rrun"));
        command
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::null());
        for name in std::env::vars()
            .map(|(name, _)| name)
            .filter(|name| name.starts_with("RRUN_"))
        {
            command.env_remove(name);
        }
        for name in ["NO_COLOR", "CARGO_TARGET_DIR"] {
            command.env_remove(name);
        }
        command.envs(&self.environment);
        command
    }

    /// Runs `rrun` with `arguments` in `folder` to its end.
    pub(crate) fn run(&self, folder: &Path, arguments: &[&str]) -> Ran {
        let output = self.command(folder, arguments).output().unwrap();
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Pushes `project` to `agent` with `--json` and more arguments.
    pub(crate) fn push(&self, project: &Project, agent: &Agent, more: &[&str]) -> Ran {
        let url = agent.url();
        let arguments = [&["push", "--json", "--url", &url], more].concat();
        self.run(&project.folder, &arguments)
    }

    /// Starts a push and goes on.
    pub(crate) fn start_push(&self, project: &Project, agent: &Agent, more: &[&str]) -> Running {
        let url = agent.url();
        let arguments = [&["push", "--json", "--url", &url], more].concat();
        let mut command = self.command(&project.folder, &arguments);
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let lines = std::io::BufRead::lines(std::io::BufReader::new(stdout));
        Running {
            child,
            lines,
            seen: String::new(),
        }
    }

    /// Pushes and expects that it serves.
    pub(crate) fn push_live(&self, project: &Project, agent: &Agent) -> Ran {
        let ran = self.push(project, agent, &[]);
        assert_eq!(
            (ran.code, ran.outcome().as_str()),
            (0, "live"),
            "{}\n{}",
            ran.stdout,
            ran.stderr
        );
        ran
    }
}

impl Ran {
    /// The events that `--json` printed.
    pub(crate) fn events(&self) -> Vec<Value> {
        self.stdout
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}")))
            .collect()
    }

    /// The terminal event.
    pub(crate) fn end(&self) -> Value {
        self.events()
            .pop()
            .unwrap_or_else(|| panic!("no event; {}", self.stderr))
    }

    pub(crate) fn outcome(&self) -> String {
        self.end()["outcome"]
            .as_str()
            .unwrap_or_else(|| panic!("{self:?}"))
            .to_owned()
    }

    pub(crate) fn number(&self, field: &str) -> u64 {
        self.end()[field]
            .as_u64()
            .unwrap_or_else(|| panic!("no {field}: {}", self.end()))
    }

    /// The last event of a kind.
    pub(crate) fn event(&self, kind: &str) -> Option<Value> {
        self.events()
            .into_iter()
            .rfind(|event| event["event"] == kind)
    }

    /// The build's log as one text.
    pub(crate) fn log(&self) -> String {
        let logs = self
            .events()
            .into_iter()
            .filter(|event| event["event"] == "log");
        logs.map(|event| event["text"].as_str().unwrap().to_owned() + "\n")
            .collect()
    }
}

impl Project {
    /// A package `app` that answers with `one`.
    pub(crate) fn new() -> Self {
        let project = Self::empty();
        project.write(
            "Cargo.toml",
            "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2024\"\n",
        );
        project.write(
            "Cargo.lock",
            "# This file is automatically @generated by Cargo.\n# It is not intended for manual editing.\nversion = 4\n\n[[package]]\nname = \"app\"\nversion = \"0.1.0\"\n",
        );
        project.write("src/main.rs", MAIN);
        project
    }

    pub(crate) fn empty() -> Self {
        let owner = tempfile::tempdir().unwrap();
        let folder = owner.path().canonicalize().unwrap().join("project");
        fs::create_dir(&folder).unwrap();
        Self {
            folder,
            _owner: Some(owner),
        }
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.folder.join(path)
    }

    pub(crate) fn write(&self, path: &str, content: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    pub(crate) fn replace(&self, path: &str, from: &str, to: &str) {
        let content = self.read(path);
        assert!(content.contains(from), "{path} does not hold {from}");
        self.write(path, &content.replace(from, to));
    }

    /// Lets the app answer with `answer`.
    pub(crate) fn answer(&self, answer: &str) {
        self.write(
            "src/main.rs",
            &MAIN.replace("\"one\"", &format!("{answer:?}")),
        );
    }
}

impl Agent {
    /// An agent that takes pushes from `laptops`, whose keys it knows by the names `person-0`, `person-1` and so on.
    pub(crate) fn new(laptops: &[&Laptop]) -> Self {
        Self::started(How::default(), laptops, |_| {})
    }

    /// The same with more in the agent's environment.
    pub(crate) fn with_environment(
        laptops: &[&Laptop],
        environment: &'static [(&'static str, &'static str)],
    ) -> Self {
        let how = How {
            environment,
            ..How::default()
        };
        Self::started(how, laptops, |_| {})
    }

    /// The same, started by the program and arguments of `starter`, after `prepare` was given the workspace to be.
    pub(crate) fn started_by(
        starter: &'static [&'static str],
        laptops: &[&Laptop],
        prepare: impl FnOnce(&Path),
    ) -> Self {
        let how = How {
            starter,
            ..How::default()
        };
        Self::started(how, laptops, prepare)
    }

    fn started(how: How, laptops: &[&Laptop], prepare: impl FnOnce(&Path)) -> Self {
        let keys = public_keys(laptops);
        let folder = tempfile::tempdir().unwrap();
        prepare(&folder.path().join("workspace"));
        let (child, port) = start(&folder, &keys, how, 0);
        Self {
            child,
            how,
            folder,
            keys,
            port,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Its process id.
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Everything that it keeps: workspace, log, announcement.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The person that the agent knows by `laptop`'s key.
    pub(crate) fn name_of(&self, laptop: &Laptop) -> String {
        let line = laptop.public_key();
        let key = line.split(' ').nth(1).unwrap();
        let line = self.keys.lines().find(|line| line.contains(key)).unwrap();
        line.splitn(3, ' ').nth(2).unwrap().to_owned()
    }

    /// From the next start on, takes pushes from `laptops` only.
    pub(crate) fn authorize(&mut self, laptops: &[&Laptop]) {
        self.keys = public_keys(laptops);
    }

    pub(crate) fn workspace(&self) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join("workspace")
    }

    /// A file of the agent's tree.
    pub(crate) fn tree(&self, path: &str) -> PathBuf {
        self.workspace().join("tree").join(path)
    }

    /// Ends the agent, changes its workspace, and starts it again on the same port.
    pub(crate) fn restart(&mut self, between: impl FnOnce(&Path)) {
        self.stop();
        between(&self.workspace());
        self.start_again();
    }

    /// Starts an agent that ended, on the same port.
    pub(crate) fn start_again(&mut self) {
        (self.child, self.port) = start(&self.folder, &self.keys, self.how, self.port);
    }

    /// The process that signals are for: the agent itself, whoever started it.
    pub(crate) fn told(&self) -> u32 {
        let process = self.process();
        let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
        match children {
            Ok(children) if !self.how.starter.is_empty() => {
                children.trim().parse().unwrap_or(process)
            }
            _ => process,
        }
    }

    /// How it ended.
    pub(crate) fn code(&mut self) -> Option<i32> {
        self.child.try_wait().unwrap()?.code()
    }

    /// Ends the agent by SIGKILL, and leaves its processes as they are.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Lets the agent die when it comes to this point.
    pub(crate) fn die_at(&self, point: &str) {
        fs::write(self.order(), format!("die at {point}")).unwrap();
    }

    /// Lets the agent wait at this point, until it may go on.
    pub(crate) fn wait_at(&self, point: &str) {
        let _ = fs::remove_file(self.order().with_extension("reached"));
        fs::write(self.order(), format!("wait at {point}")).unwrap();
    }

    /// Waits until the agent waits.
    pub(crate) fn reached(&self) {
        wait_for("the agent to come to the point", || {
            self.order().with_extension("reached").exists()
        });
    }

    /// Withdraws what the agent was to do at some point.
    pub(crate) fn go_on(&self) {
        let _ = fs::remove_file(self.order());
    }

    /// What the agent does at its fault points; see its `fault.rs`.
    fn order(&self) -> PathBuf {
        self.folder.path().join("order")
    }

    /// Sends SIGTERM and waits for the end.
    pub(crate) fn stop(&mut self) {
        if self.has_ended() {
            return;
        }
        let process = rustix::process::Pid::from_raw(self.told().try_into().unwrap()).unwrap();
        let _ = rustix::process::kill_process(process, rustix::process::Signal::TERM);
        wait_for("the agent to end", || {
            self.child.try_wait().unwrap().is_some()
        });
    }

    /// What the agent and its app printed.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// A plain request to the app.
    pub(crate) fn get(&self, path: &str) -> Answer {
        request("GET", &format!("{}{path}", self.url()), None, &[], b"")
    }

    /// A request signed by `laptop`, as `curl` with `rrun sign` makes it.
    pub(crate) fn signed(
        &self,
        laptop: &Laptop,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let encoding = headers
            .iter()
            .find(|(name, _)| *name == "content-encoding")
            .map_or("", |(_, value)| value);
        let header = sign(
            &laptop.private_key(),
            self.boot(),
            method,
            path,
            encoding,
            body,
            0,
        );
        request(
            method,
            &format!("{}{path}", self.url()),
            Some(&header),
            headers,
            body,
        )
    }

    /// The boot id, which the agent tells whoever it refuses.
    pub(crate) fn boot(&self) -> BootId {
        let refused = request(
            "GET",
            &format!("{}/_rrun/status", self.url()),
            None,
            &[],
            b"",
        );
        assert_eq!(refused.status, 401);
        serde_json::from_str::<Value>(&refused.body).unwrap()["boot"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap()
    }

    pub(crate) fn status(&self, laptop: &Laptop) -> Value {
        serde_json::from_str(&self.signed(laptop, "GET", "/_rrun/status", &[], b"").body).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop();
        if std::thread::panicking() {
            println!("--- agent ---\n{}", self.log());
        }
    }
}

/// The keys of `laptops` by the names `person-0`, `person-1` and so on.
fn public_keys(laptops: &[&Laptop]) -> String {
    let named = |(number, laptop): (usize, &&Laptop)| {
        let key = laptop.public_key();
        let key: Vec<&str> = key.split(' ').take(2).collect();
        format!("{} person-{number}", key.join(" "))
    };
    let lines: Vec<String> = laptops.iter().enumerate().map(named).collect();
    lines.join("\n")
}

fn start(folder: &tempfile::TempDir, keys: &str, how: How, port: u16) -> (Child, u16) {
    let announcement = folder.path().join("announcement.json");
    let _ = fs::remove_file(&announcement);
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(folder.path().join("log"))
        .unwrap();
    let program = [how.starter, &[env!("CARGO_BIN_EXE_rrun")]].concat();
    let mut child = Command::new(program[0])
        .args(&program[1..])
        .args([
            "agent",
            "serve",
            "--bind",
            "127.0.0.1",
            "--port",
            &port.to_string(),
            "--workspace",
        ])
        .arg(folder.path().join("workspace"))
        .arg("--announce")
        .arg(&announcement)
        .env("RRUN_AUTHORIZED_KEYS", keys)
        .envs(how.environment.iter().copied())
        .env("RRUN_FAULT_POINT_FILE", folder.path().join("order"))
        .env_remove("CARGO_TARGET_DIR")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    wait_for("the agent to listen", || {
        assert!(
            child.try_wait().unwrap().is_none(),
            "the agent ended: {}",
            fs::read_to_string(folder.path().join("log")).unwrap()
        );
        announcement.exists()
    });
    let announced: Value =
        serde_json::from_str(&fs::read_to_string(announcement).unwrap()).unwrap();
    (
        child,
        u16::try_from(announced["port"].as_u64().unwrap()).unwrap(),
    )
}

/// Whether a test that needs `what` ends at once, because this machine does not allow it. Says so, and fails where
/// nothing may be skipped.
pub(crate) fn may_skip(is_allowed: bool, what: &str) -> bool {
    let required = std::env::var("RRUN_REQUIRE_MOUNT").is_ok_and(|value| value == "1");
    assert!(is_allowed || !required, "`{what}` is not allowed here");
    if !is_allowed {
        println!("SKIPPED: `{what}` is not allowed here");
    }
    !is_allowed
}

/// Looks every few milliseconds until `is_so`.
pub(crate) fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// The signature header for a request, made by a clock that is `skew` seconds ahead.
pub(crate) fn sign(
    key: &PrivateKey,
    boot: BootId,
    method: &str,
    path_and_query: &str,
    content_encoding: &str,
    body: &[u8],
    skew: i64,
) -> String {
    let request = SignedRequest {
        method,
        path_and_query,
        content_encoding,
        body: Digest::of(body),
    };
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let mut nonce = [0; 12];
    getrandom::fill(&mut nonce).unwrap();
    let nonce = Nonce::from_random(nonce);
    Authorization::sign(
        key,
        &request,
        now.checked_add_signed(skew).unwrap(),
        nonce,
        boot,
    )
    .to_string()
}

/// Any request; errors of the connection have status 0.
pub(crate) fn request(
    method: &str,
    url: &str,
    signature: Option<&str>,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Answer {
    let mut request = ureq::http::Request::builder().method(method).uri(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    if let Some(signature) = signature {
        request = request.header(SIGNATURE_HEADER, signature);
    }
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .allow_non_standard_methods(true)
        .timeout_global(Some(PATIENCE))
        .build()
        .into();
    match agent.run(request.body(body.to_vec()).unwrap()) {
        Ok(mut answer) => Answer {
            status: answer.status().as_u16(),
            body: answer.body_mut().read_to_string().unwrap_or_default(),
        },
        Err(error) => Answer {
            status: 0,
            body: error.to_string(),
        },
    }
}

/// Text that does not compress: what is small about a push of it comes only from what both sides have.
pub(crate) fn noise(bytes: usize) -> String {
    let mut state = 1u64;
    let mut text = String::with_capacity(bytes + 20);
    while text.len() < bytes {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        text += &format!("// {state:016x}\n");
    }
    text
}

/// A port that something else listens on.
pub(crate) fn taken_port() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

//! What breaks between laptop and agent: requests and answers cut, ended early and held back, bodies that lie about
//! themselves, and strangers in large numbers.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rrun_protocol::{
    Digest, MAX_BODY_BYTES, MAX_UPLOAD_BYTES, PrivateKey, SIGNATURE_HEADER, UPLOAD_PART_BYTES,
    part_path, upload_path,
};
use serde_json::Value;

use crate::{
    harness::{Agent, Laptop, PATIENCE, Project, Ran, sign, wait_for},
    proxy::{Fault, Proxy},
};

/// Path of a push that nothing else sends.
const PUSH: &str = "/_rrun/pushes/MTIzNDU2Nzg5";
const PART: usize = UPLOAD_PART_BYTES as usize;

fn setting() -> (Laptop, Project, Agent) {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    (laptop, Project::new(), agent)
}

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut noise = Vec::with_capacity(length);
    while noise.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(length);
    noise
}

fn add_noise(project: &Project, length: usize) {
    fs::write(project.path("src/noise"), noise(length)).unwrap();
}

fn push_through(laptop: &Laptop, project: &Project, proxy: &Proxy, more: &[&str]) -> Ran {
    let url = proxy.url();
    let arguments = [&["push", "--json", "--url", &url], more].concat();
    laptop.run(&project.folder, &arguments)
}

fn history(agent: &Agent, laptop: &Laptop) -> Vec<Value> {
    let answer = agent.signed(laptop, "GET", "/_rrun/history", &[], b"");
    serde_json::from_str(&answer.body).unwrap()
}

/// What must not change when nothing is applied.
fn applied(agent: &Agent, laptop: &Laptop) -> (Value, Vec<Value>, String, usize) {
    let staging = fs::read_dir(agent.workspace().join("state/staging")).unwrap();
    (
        agent.status(laptop)["tree"].clone(),
        history(agent, laptop),
        agent.get("/").body,
        staging.count(),
    )
}

fn assert_live(ran: &Ran) {
    assert_eq!((ran.code, ran.outcome().as_str()), (0, "live"), "{ran:?}");
}

/// The client saw each kept event once, and the end is the one that the agent tells.
fn assert_seen_once(ran: &Ran, agent: &Agent, laptop: &Laptop) {
    let push = ran.end()["push"].as_str().unwrap().to_owned();
    let path = format!("/_rrun/pushes/{push}/events?from=0&wait=false");
    let told = agent.signed(laptop, "GET", &path, &[], b"").body;
    let told: Vec<Value> = told
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let kept = |events: &[Value]| {
        let kept = events.iter().filter(|event| {
            !matches!(
                event["event"].as_str(),
                Some("progress" | "heartbeat" | "finished")
            )
        });
        kept.map(|event| (event["event"].clone(), event["text"].clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(kept(&ran.events()), kept(&told));
    let ends = |events: &[Value]| {
        let ends = events.iter().filter(|event| event["event"] == "finished");
        ends.map(|end| (end["outcome"].clone(), end["generation"].clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(ends(&told).len(), 1);
    assert_eq!(ends(&ran.events()), ends(&told));
}

#[test]
fn a_push_that_is_always_cut_on_its_way_up_applies_nothing_and_exits_with_3() {
    let (laptop, project, agent) = setting();
    laptop.push_live(&project, &agent);
    let before = applied(&agent, &laptop);
    project.answer("two");
    add_noise(&project, 300_000);
    let proxy = Proxy::new(agent.port, |line, _| match line {
        line if line.starts_with("POST /_rrun/pushes/") => Fault::CutUp(100_000),
        _ => Fault::None,
    });
    let ran = push_through(&laptop, &project, &proxy, &[]);
    assert_eq!((ran.code, ran.outcome().as_str()), (3, "failed"), "{ran:?}");
    let reason = ran.end()["reason"].to_string();
    assert!(reason.contains("broke"), "{reason}");
    assert!(proxy.seen("POST ").len() > 3, "it tries again");
    assert_eq!(applied(&agent, &laptop), before);
}

#[test]
fn a_push_that_is_cut_once_on_its_way_up_is_sent_again_and_applied_once() {
    let (laptop, project, agent) = setting();
    add_noise(&project, 300_000);
    let proxy = Proxy::new(agent.port, |line, before| match before {
        0 if line.starts_with("POST ") => Fault::CutUp(100_000),
        _ => Fault::None,
    });
    assert_live(&push_through(&laptop, &project, &proxy, &[]));
    assert_eq!(history(&agent, &laptop).len(), 1);
    assert_eq!(proxy.seen("POST /_rrun/pushes/").len(), 2);
}

#[test]
fn a_log_that_is_cut_several_times_ends_with_the_same_terminal_event() {
    let (laptop, project, agent) = setting();
    let proxy = Proxy::new(agent.port, |line, before| {
        let is_stream = line.starts_with("POST /_rrun/pushes/") || line.contains("/events?");
        match before {
            0..4 if is_stream => Fault::CutDown(1 + before),
            _ => Fault::None,
        }
    });
    let ran = push_through(&laptop, &project, &proxy, &[]);
    assert_live(&ran);
    assert!(proxy.seen("GET ").len() >= 4, "{:?}", proxy.seen(""));
    assert_seen_once(&ran, &agent, &laptop);
    assert_eq!(history(&agent, &laptop).len(), 1);
}

#[test]
fn a_stream_that_ends_cleanly_without_its_terminal_event_is_not_taken_for_the_end() {
    let (laptop, project, agent) = setting();
    let proxy = Proxy::new(agent.port, |line, before| {
        let is_stream = line.starts_with("POST /_rrun/pushes/") || line.contains("/events?");
        match before {
            0..2 if is_stream => Fault::EndDown(2),
            _ => Fault::None,
        }
    });
    let ran = push_through(&laptop, &project, &proxy, &[]);
    assert_live(&ran);
    assert!(!proxy.seen("GET /_rrun/pushes/").is_empty());
    assert_seen_once(&ran, &agent, &laptop);
    assert_eq!(history(&agent, &laptop).len(), 1);
}

/// A build that ends when the file `gate` is there.
struct Gated(tempfile::TempDir);

impl Gated {
    fn new(project: &Project) -> Self {
        let gated = Self(tempfile::tempdir().unwrap());
        let pause = "std::thread::sleep(std::time::Duration::from_millis(10))";
        project.write(
            "build.rs",
            &format!(
                "fn main() {{ while !std::path::Path::new({:?}).exists() {{ {pause} }} }}",
                gated.gate()
            ),
        );
        gated
    }

    fn gate(&self) -> std::path::PathBuf {
        self.0.path().join("gate")
    }

    fn open(&self) {
        fs::write(self.gate(), "").unwrap();
    }
}

impl Drop for Gated {
    /// A test that fails must not leave a build that waits.
    fn drop(&mut self) {
        self.open();
    }
}

/// Starts a push and reads its events until the first of a kind.
fn push_until(
    laptop: &Laptop,
    project: &Project,
    url: &str,
    kind: &str,
) -> (Child, impl Iterator<Item = Value> + use<>) {
    let arguments = ["push", "--json", "--url", url];
    let mut command = laptop.command(&project.folder, &arguments);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut events = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let found = events.find(|event| event["event"] == kind);
    assert!(found.is_some(), "the push ended before");
    (child, events)
}

#[test]
fn behind_something_that_holds_streams_back_the_log_shows_while_it_builds() {
    for fault in [Fault::HoldBody, Fault::HoldAll] {
        let (laptop, project, agent) = setting();
        let gated = Gated::new(&project);
        let proxy = Proxy::new(agent.port, move |_, _| fault);
        let (mut child, rest) = push_until(&laptop, &project, &proxy.url(), "log");
        // The build waits for the gate, so the stream that the push opened has told nothing yet.
        let posted = proxy.seen("POST /_rrun/pushes/").last().unwrap().at;
        let polled = proxy.seen("GET /_rrun/pushes/")[0].clone();
        assert!(polled.line.ends_with("&wait=false"), "{polled:?}");
        let noticed = polled.at - posted;
        assert!(noticed < Duration::from_secs(3), "{noticed:?}");
        gated.open();
        let end = rest.last().unwrap();
        assert_eq!(end["outcome"], "live", "{fault:?} {end}");
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert_eq!(history(&agent, &laptop).len(), 1);
    }
}

#[test]
fn polling_answers_at_once_with_what_is_there() {
    let (laptop, project, agent) = setting();
    let gated = Gated::new(&project);
    let (mut child, rest) = push_until(&laptop, &project, &agent.url(), "log");
    let push = agent.status(&laptop)["push"].as_str().unwrap().to_owned();
    let path = format!("/_rrun/pushes/{push}/events?from=1&wait=false");
    let answer = agent.signed(&laptop, "GET", &path, &[], b"");
    let first: Value = serde_json::from_str(answer.body.lines().next().unwrap()).unwrap();
    assert_eq!((answer.status, first["seq"].as_u64()), (200, Some(2)));
    assert!(!answer.body.contains("finished"), "{}", answer.body);
    gated.open();
    assert_eq!(rest.last().unwrap()["outcome"], "live");
    assert!(child.wait().unwrap().success());
}

/// A shell that ignores SIGINT holds the build's group up until the grace is over.
#[test]
fn a_push_is_told_that_it_arrived_before_the_one_under_way_has_given_way() {
    let (laptop, project, agent) = setting();
    let gated = Gated::new(&project);
    let (gate, started) = (gated.gate(), gated.0.path().join("started"));
    project.write(
        "build.rs",
        &format!(
            "fn main() {{ let script = \"trap '' INT; : > {}; while ! test -e {}; do sleep 0.01; done\";
             std::process::Command::new(\"sh\").args([\"-c\", script]).status().unwrap(); }}",
            started.display(),
            gate.display()
        ),
    );
    let (mut first, rest) = push_until(&laptop, &project, &agent.url(), "log");
    wait_for("the shell to ignore", || started.exists());
    project.write("build.rs", "fn main() {}");
    let first_push = agent.status(&laptop)["push"].clone();
    let (mut second, rest_of_second) = push_until(&laptop, &project, &agent.url(), "waiting");
    assert_eq!(agent.status(&laptop)["push"], first_push);
    assert_eq!(rest.last().unwrap()["outcome"], "superseded");
    assert_eq!(first.wait().unwrap().code(), Some(5));
    assert_eq!(rest_of_second.last().unwrap()["outcome"], "live");
    assert!(second.wait().unwrap().success());
}

#[test]
fn a_large_push_that_broke_goes_on_where_it_was_in_the_next_one() {
    let (laptop, project, agent) = setting();
    add_noise(&project, 5 * PART);
    let proxy = Proxy::new(agent.port, |line, before| match before {
        3.. if line.starts_with("PUT ") => Fault::CutUp(PART / 2),
        _ => Fault::None,
    });
    let url = proxy.url();
    let mut first = laptop
        .command(&project.folder, &["push", "--json", "--url", &url])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the fourth part to be cut", || proxy.seen("PUT ").len() > 3);
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(history(&agent, &laptop).is_empty());
    assert_eq!(agent.get("/").status, 503, "nothing runs");

    proxy.heal();
    let again = push_through(&laptop, &project, &proxy, &[]);
    assert_live(&again);
    let parts: Vec<_> = proxy
        .seen("PUT ")
        .iter()
        .map(|part| part.line.rsplit_once('/').unwrap().1.to_owned())
        .collect();
    assert_eq!(parts, ["3", "4", "5"], "the payload is a little over 5 MiB");
    let sent: usize = proxy.seen("").iter().map(|seen| seen.body).sum();
    assert!((2 * PART..2 * PART + 10_000).contains(&sent), "{sent}");
    let counted = again.number("bytes_up");
    assert!(counted < 2 * UPLOAD_PART_BYTES + 20_000, "{counted}");
    assert_eq!(fs::read(agent.tree("src/noise")).unwrap(), noise(5 * PART));
    // What served its purpose makes room.
    let upload = proxy.seen("PUT ")[0].line["PUT ".len()..].to_owned();
    let upload = upload.rsplit_once('/').unwrap().0;
    let left = agent.signed(&laptop, "GET", upload, &[], b"");
    assert_eq!(left.body, "{\"parts\":[]}");
}

#[test]
fn an_upload_whose_parts_and_push_are_cut_on_the_way_arrives_by_itself() {
    let (laptop, project, agent) = setting();
    add_noise(&project, 2 * PART);
    let proxy = Proxy::new(agent.port, |line, before| match before {
        1 if line.starts_with("PUT ") => Fault::CutUp(PART / 2),
        0 if line.starts_with("POST ") => Fault::CutUp(10),
        _ => Fault::None,
    });
    assert_live(&push_through(&laptop, &project, &proxy, &[]));
    assert_eq!(
        proxy.seen("PUT ").len(),
        4,
        "three parts, one of them twice"
    );
    assert_eq!(history(&agent, &laptop).len(), 1);
}

#[test]
fn more_than_one_request_may_carry_arrives_when_max_upload_allows_it() {
    let (laptop, project, agent) = setting();
    let size = usize::try_from(MAX_BODY_BYTES).unwrap() + PART;
    add_noise(&project, size);
    let stopped = laptop.push(&project, &agent, &[]);
    assert_eq!(stopped.code, 2, "{stopped:?}");
    let limit = MAX_UPLOAD_BYTES.to_string();
    let pushed = laptop.push(&project, &agent, &["--max-upload", &limit]);
    assert_live(&pushed);
    assert_eq!(
        fs::metadata(agent.tree("src/noise")).unwrap().len(),
        size as u64
    );
}

#[test]
fn parts_that_are_not_the_named_upload_are_refused_and_dropped() {
    let (laptop, project, agent) = setting();
    laptop.push_live(&project, &agent);
    let before = applied(&agent, &laptop);
    let upload = Digest::of(b"what was announced");
    let put = agent.signed(
        &laptop,
        "PUT",
        &part_path(&upload, 0),
        &[],
        b"something else",
    );
    assert_eq!(put.status, 204, "{}", put.body);
    let push = format!("{PUSH}?upload={upload}");
    let answer = agent.signed(&laptop, "POST", &push, &[], b"");
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert!(answer.body.contains(&upload.to_string()), "{}", answer.body);
    let answer = agent.signed(&laptop, "POST", &push, &[], b"");
    assert_eq!(answer.status, 404, "{}", answer.body);
    assert_eq!(applied(&agent, &laptop), before);
}

#[test]
fn a_part_that_is_too_large_or_not_the_signed_one_is_refused_and_parts_end_with_the_agent() {
    let (laptop, _project, mut agent) = setting();
    let upload = Digest::of(b"upload");
    let arrived = |agent: &Agent| {
        agent
            .signed(&laptop, "GET", &upload_path(&upload), &[], b"")
            .body
    };
    for (part, size) in [(0, PART + 1), (1_000_000, 1)] {
        let path = part_path(&upload, part);
        let answer = agent.signed(&laptop, "PUT", &path, &[], &vec![0; size]);
        assert_eq!(answer.status, 413, "{}", answer.body);
        assert!(answer.body.contains("MiB"), "{}", answer.body);
    }
    let path = part_path(&upload, 0);
    let signature = sign(
        &laptop.private_key(),
        agent.boot(),
        "PUT",
        &path,
        "",
        b"a",
        0,
    );
    let url = format!("{}{path}", agent.url());
    let answer = crate::harness::request("PUT", &url, Some(&signature), &[], b"b");
    assert_eq!(answer.status, 401, "{}", answer.body);
    assert_eq!(arrived(&agent), "{\"parts\":[]}");

    assert_eq!(agent.signed(&laptop, "PUT", &path, &[], b"a").status, 204);
    assert_eq!(arrived(&agent), "{\"parts\":[0]}");
    agent.restart(|workspace| {
        let left = fs::read_dir(workspace.join("state/staging")).unwrap();
        assert_eq!(left.count(), 0);
    });
    assert_eq!(arrived(&agent), "{\"parts\":[]}");
}

/// The head of a signed POST whose body is said to have `length` bytes.
fn head(agent: &Agent, key: &PrivateKey, body: &[u8], length: impl std::fmt::Display) -> String {
    let signature = sign(key, agent.boot(), "POST", PUSH, "", body, 0);
    format!(
        "POST {PUSH} HTTP/1.1\r\nhost: x\r\n{SIGNATURE_HEADER}: {signature}\r\n{length}\r\n\r\n"
    )
}

/// Sends `bytes`, says that nothing more comes, and reads what is answered until the connection ends.
fn exchange(agent: &Agent, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", agent.port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // Who is refused early cannot send everything.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let ended = stream.read_to_end(&mut answer);
    let hangs = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
    assert!(
        !ended.as_ref().is_err_and(hangs),
        "the connection stays open"
    );
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn bodies_larger_or_smaller_than_said_are_refused_and_apply_nothing() {
    let (laptop, project, agent) = setting();
    laptop.push_live(&project, &agent);
    let before = applied(&agent, &laptop);
    let key = laptop.private_key();
    let said = |length: u64| format!("content-length: {length}");
    for (what, head, body, expected) in [
        (
            "larger",
            head(&agent, &key, b"0123456789", said(5)),
            "0123456789",
            "HTTP/1.1 401",
        ),
        // The client has gone, as far as HTTP can tell; an answer is owed to nobody.
        (
            "smaller",
            head(&agent, &key, b"01234", said(10)),
            "01234",
            "",
        ),
        (
            "chunked and broken off",
            head(&agent, &key, b"01234", "transfer-encoding: chunked"),
            "5\r\n01234\r\n5\r\n0",
            "",
        ),
        (
            "beyond the limit, and nothing sent",
            head(&agent, &key, b"", said(MAX_BODY_BYTES + 1)),
            "",
            "HTTP/1.1 413",
        ),
    ] {
        let answer = exchange(&agent, format!("{head}{body}").as_bytes());
        assert!(answer.starts_with(expected), "{what}: {answer}");
        assert!(!answer.starts_with("HTTP/1.1 200"), "{what}: {answer}");
    }
    assert_eq!(applied(&agent, &laptop), before);
}

#[test]
fn an_endless_body_is_cut_at_the_limit() {
    let (laptop, _project, agent) = setting();
    let head = head(
        &agent,
        &laptop.private_key(),
        b"",
        "transfer-encoding: chunked",
    );
    let mut stream = TcpStream::connect(("127.0.0.1", agent.port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    let chunk = format!("{PART:x}\r\n{}\r\n", "x".repeat(PART));
    let mut reader = stream.try_clone().unwrap();
    let answer = thread::spawn(move || {
        let mut answer = [0; 12];
        reader.read_exact(&mut answer).map(|()| answer)
    });
    let mut sent = 0;
    while stream.write_all(chunk.as_bytes()).is_ok() {
        sent += PART as u64;
        assert!(sent < 4 * MAX_BODY_BYTES, "the agent goes on reading");
    }
    assert_eq!(&answer.join().unwrap().unwrap(), b"HTTP/1.1 413");
}

/// What a stranger does with a connection.
#[derive(Clone, Copy)]
enum Stranger {
    Unsigned,
    EndlessBody,
    PartialHead,
    Silent,
}

impl Stranger {
    /// Comes, and tells whether it was refused. Who only holds a connection open keeps it for as long as the test takes.
    fn come(self, port: u16) -> (Option<TcpStream>, bool) {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let head = format!("POST {PUSH} HTTP/1.1\r\nhost: x\r\n");
        match self {
            Self::Silent => return (Some(stream), true),
            Self::PartialHead => {
                stream.write_all(head.as_bytes()).unwrap();
                return (Some(stream), true);
            }
            Self::Unsigned => {
                let request = format!("{head}content-length: 5\r\nconnection: close\r\n\r\nhello");
                stream.write_all(request.as_bytes()).unwrap();
            }
            Self::EndlessBody => {
                let request = format!("{head}content-length: 1000000000000\r\n\r\n");
                stream.write_all(request.as_bytes()).unwrap();
            }
        }
        let mut answer = [0; 12];
        let is_refused = stream.read_exact(&mut answer).is_ok() && &answer == b"HTTP/1.1 401";
        let mut sent = 0;
        while matches!(self, Self::EndlessBody) && stream.write_all(&[0; 64 << 10]).is_ok() {
            sent += 64 << 10;
            assert!(sent < 64 << 20, "the agent goes on reading");
        }
        (None, is_refused)
    }
}

#[test]
fn two_hundred_strangers_at_once_are_refused_while_the_app_is_served() {
    let (laptop, project, agent) = setting();
    laptop.push_live(&project, &agent);
    let port = agent.port;
    let kinds = [
        Stranger::Unsigned,
        Stranger::EndlessBody,
        Stranger::PartialHead,
        Stranger::Silent,
    ];
    let is_over = Arc::new(AtomicBool::new(false));
    let visits = Arc::new(AtomicUsize::new(0));
    let strangers: Vec<_> = (0..200)
        .map(|number| {
            let (kind, is_over) = (kinds[number % kinds.len()], Arc::clone(&is_over));
            let visits = Arc::clone(&visits);
            thread::spawn(move || {
                loop {
                    let (held, refused) = kind.come(port);
                    visits.fetch_add(1, Ordering::Relaxed);
                    assert!(refused);
                    while held.is_some() && !is_over.load(Ordering::Relaxed) {
                        thread::park_timeout(Duration::from_millis(50));
                    }
                    if is_over.load(Ordering::Relaxed) {
                        break;
                    }
                }
            })
        })
        .collect();
    wait_for("every stranger to come", || {
        visits.load(Ordering::Relaxed) >= 200
    });
    let mut slowest = Duration::ZERO;
    for _ in 0..200 {
        let started = Instant::now();
        assert_eq!(agent.get("/").body, "one");
        slowest = slowest.max(started.elapsed());
    }
    let visits = visits.load(Ordering::Relaxed);
    println!("200 requests beside {visits} visits of strangers, the slowest in {slowest:?}");
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    project.answer("two");
    laptop.push_live(&project, &agent);
    is_over.store(true, Ordering::Relaxed);
    strangers
        .into_iter()
        .for_each(|stranger| stranger.join().unwrap());
}

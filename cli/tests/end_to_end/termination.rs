//! SIGTERM, whatever the agent is doing: it ends in the time that Cloud Run gives it, and leaves nothing behind, not even
//! what ignores signals or left its session.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::Command,
    time::{Duration, Instant},
};

use rrun_protocol::SIGNATURE_HEADER;

use crate::{
    crash::{processes_of, start_endless_build},
    harness::{Agent, Laptop, MAIN, Project, may_skip, sign, wait_for},
};

/// Between SIGTERM and SIGKILL.
const CLOUD_RUN_LIMIT: Duration = Duration::from_secs(10);

/// Starts two processes that ignore SIGTERM, one of them without a parent and in a session of its own, before the app listens.
const STUBBORN: &str = r#"
    let stubborn = "trap '' TERM INT; while :; do sleep 1000; done";
    for script in [stubborn.to_owned(), format!("setsid sh -c \"{stubborn}\" &")] {
        std::process::Command::new("sh").args(["-c", &script]).spawn().unwrap();
    }
"#;

/// An agent that serves an app with stubborn processes.
fn setting() -> (Laptop, Project, Agent) {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    project.write("src/main.rs", &stubborn_main("one"));
    laptop.push_live(&project, &agent);
    wait_for("the app, two shells and their sleeps", || {
        processes_of(&agent.workspace()).len() == 5
    });
    (laptop, project, agent)
}

/// Requests to `/slow` are never answered.
fn stubborn_main(answer: &str) -> String {
    MAIN.replace("\"one\"", &format!("{answer:?}"))
        .replace("fn main() {", &format!("fn main() {{{STUBBORN}"))
        .replace(
            "while !lines.next()?.ok()?.is_empty() {}",
            "let first = lines.next()?.ok()?;
        while !lines.next()?.ok()?.is_empty() {}
        while first.contains(\"/slow\") {
            println!(\"slow\");
            std::thread::park();
        }",
        )
}

/// Sends SIGTERM, and checks what has to be true of every end.
fn terminate(agent: &mut Agent) {
    let started = Instant::now();
    agent.stop();
    let took = started.elapsed();
    println!("ended after {took:?}");
    assert_eq!(processes_of(&agent.workspace()), BTreeSet::new(), "orphans");
    assert!(took < CLOUD_RUN_LIMIT, "{took:?}");
}

#[test]
fn an_agent_that_is_told_to_end_while_it_serves_leaves_nothing_behind() {
    let (_laptop, _project, mut agent) = setting();
    terminate(&mut agent);
}

#[test]
fn an_agent_that_is_told_to_end_while_it_builds_leaves_nothing_behind_and_says_so() {
    let (laptop, project, mut agent) = setting();
    let push = start_endless_build(&laptop, &project, &agent);
    wait_for("everything to run", || {
        processes_of(&agent.workspace()).len() >= 11
    });
    terminate(&mut agent);
    let end = push.end();
    assert_eq!(end.outcome(), "cancelled", "{}{}", end.stdout, end.stderr);
    assert_eq!(end.end()["reason"], "the agent was told to end");
}

#[test]
fn an_agent_that_is_told_to_end_while_an_old_version_finishes_leaves_nothing_behind() {
    let (laptop, project, mut agent) = setting();
    let mut slow = TcpStream::connect(("127.0.0.1", agent.port)).unwrap();
    slow.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    wait_for("the request to be under way", || {
        agent.log().contains("slow")
    });
    project.write("src/main.rs", &stubborn_main("two"));
    laptop.push_live(&project, &agent);
    wait_for("both versions to run", || {
        processes_of(&agent.workspace()).len() == 10
    });
    terminate(&mut agent);
}

#[test]
fn an_agent_that_is_told_to_end_while_a_push_arrives_leaves_nothing_behind() {
    let (laptop, project, mut agent) = setting();
    let path = "/_rrun/pushes/MTIzNDU2Nzg5";
    let body = vec![b'x'; 100_000];
    let signature = sign(
        &laptop.private_key(),
        agent.boot(),
        "POST",
        path,
        "",
        &body,
        0,
    );
    let mut half = TcpStream::connect(("127.0.0.1", agent.port)).unwrap();
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\nexpect: 100-continue\r\n{SIGNATURE_HEADER}: {signature}\r\n\r\n"
    );
    half.write_all(head.as_bytes()).unwrap();
    let mut answer = [0; 12];
    half.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 100", "the body is awaited");
    half.write_all(&body[..length / 2]).unwrap();
    // Another one is being taken apart.
    project.write("src/main.rs", &stubborn_main("two"));
    agent.wait_at("receiving");
    let push = laptop.start_push(&project, &agent, &[]);
    agent.reached();
    terminate(&mut agent);
    push.kill();
    agent.go_on();
    agent.start_again();
    wait_for("the old version", || agent.get("/").body == "one");
    assert!(
        fs::read_to_string(agent.tree("src/main.rs"))
            .unwrap()
            .contains("\"one\"")
    );
}

#[test]
fn an_agent_that_is_told_to_end_twice_or_in_another_way_ends_once() {
    let (_laptop, _project, mut agent) = setting();
    for signal in ["-HUP", "-TERM", "-INT", "-QUIT"] {
        kill(agent.process(), signal);
    }
    terminate(&mut agent);
    assert_eq!(agent.code(), Some(0));
}

/// What makes a program process 1 of a machine of its own, as in a container.
const AS_PROCESS_1: [&str; 5] = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"];

#[test]
fn as_process_1_the_agent_reaps_orphans_passes_signals_on_and_ends_in_time() {
    let possible = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "true"])
        .output();
    if may_skip(
        possible.is_ok_and(|output| output.status.success()),
        "unshare",
    ) {
        return;
    }
    let laptop = Laptop::new();
    let mut agent = Agent::started_by(&AS_PROCESS_1, &[&laptop], |_| {});
    let project = Project::new();
    let orphans = r#"
    for _ in 0..20 {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "sleep 0.1 &"]).status().unwrap();
    }
    let mut told = std::process::Command::new("sh");
    told.args(["-c", "trap 'echo got TERM; exit' TERM; echo armed; while :; do sleep 0.1; done"]).spawn().unwrap();
"#;
    let main = MAIN.replace("fn main() {", &format!("fn main() {{{orphans}"));
    project.write("src/main.rs", &main);
    laptop.push_live(&project, &agent);
    assert_eq!(
        agent.status(&laptop)["process"]
            .as_u64()
            .map(|number| number < 1000),
        Some(true)
    );
    wait_for("orphans to be reaped", || children(agent.told()).len() == 1);
    wait_for("the app to be told", || agent.log().contains("armed"));

    kill(agent.told(), "-USR1");
    wait_for("the app to get it", || {
        agent.log().contains("was killed by signal 10")
    });
    wait_for("the app again", || agent.get("/").body == "one");
    wait_for("the app to be told", || {
        agent.log().matches("armed").count() == 2
    });
    wait_for("orphans to be reaped", || children(agent.told()).len() == 1);

    terminate(&mut agent);
    assert_eq!(agent.log().matches("got TERM").count(), 1);
    assert_eq!(agent.code(), Some(0));
}

/// Processes whose parent this is, ended ones that nobody reaped included.
fn children(process: u32) -> Vec<u32> {
    // Every thread has those that it started.
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let all = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    all.flat_map(|line| {
        line.split_whitespace()
            .map(|number| number.parse().unwrap())
            .collect::<Vec<_>>()
    })
    .collect()
}

fn kill(process: u32, signal: &str) {
    let killed = Command::new("kill")
        .args([signal, &process.to_string()])
        .status();
    assert!(killed.unwrap().success());
}

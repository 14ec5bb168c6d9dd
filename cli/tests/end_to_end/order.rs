//! The newest scan wins, whatever arrives when, and everyone is told what became of their push.

use std::{fs, path::PathBuf};

use rrun_protocol::{
    BuildPlan, CheckoutId, Entry, Kind, Manifest, Plan, Preamble, RunPlan, TreePath, compress,
    write_tar,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Agent, Laptop, Project};

/// A file that builds wait for, so that a test decides when they end.
struct Gate {
    _folder: tempfile::TempDir,
    file: PathBuf,
}

impl Gate {
    /// Lets every build of `project` wait until the gate opens.
    fn new(project: &Project) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("open");
        let script = "fn main() {\n    println!(\"cargo:rerun-if-changed=src/main.rs\");\n    while !std::path::Path::new(GATE).exists() {\n        std::thread::yield_now();\n    }\n}\n";
        let gate = format!("const GATE: &str = {:?};\n", file.to_str().unwrap());
        project.write("build.rs", &(gate + script));
        Self {
            _folder: folder,
            file,
        }
    }

    fn open(&self) {
        fs::write(&self.file, "").unwrap();
    }

    fn close(&self) {
        fs::remove_file(&self.file).unwrap();
    }
}

#[test]
fn a_newer_push_stops_the_build_under_way_and_the_older_one_is_told_by_which() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let gate = Gate::new(&project);
    let mut older = laptop.start_push(&project, &agent, &[]);
    older.wait_for("building");
    project.answer("two");
    let mut newer = laptop.start_push(&project, &agent, &[]);
    newer.wait_for("building");
    let older = older.end();
    gate.open();
    let newer = newer.end();
    assert_eq!((newer.code, newer.outcome().as_str()), (0, "live"));
    assert_eq!((older.code, older.outcome().as_str()), (5, "superseded"));
    assert_eq!(older.end()["superseded_by"], newer.end()["push"]);
    assert_eq!(agent.get("/").body, "two");
}

#[test]
fn of_ten_pushes_within_a_second_the_newest_serves_and_nine_are_told_so() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let gate = Gate::new(&project);
    let mut pushes = Vec::new();
    for number in 0..10 {
        project.answer(&number.to_string());
        let mut push = laptop.start_push(&project, &agent, &[]);
        // It has scanned; what follows goes on beside the next one.
        push.wait_for("received");
        pushes.push(push);
    }
    gate.open();
    let mut ended: Vec<_> = pushes.into_iter().map(|push| push.end()).collect();
    let newest = ended.pop().unwrap();
    assert_eq!((newest.code, newest.outcome().as_str()), (0, "live"));
    assert_eq!(agent.get("/").body, "9");
    for older in &ended {
        assert_eq!(
            (older.code, older.outcome().as_str()),
            (5, "superseded"),
            "{}",
            older.stdout
        );
    }
}

/// A push made by hand, against nothing, as the `sequence`-th scan of one checkout.
fn push_by_hand(sequence: u64, answer: &str) -> Vec<u8> {
    let project = Project::new();
    project.answer(answer);
    let files: Vec<(TreePath, Vec<u8>)> = ["Cargo.lock", "Cargo.toml", "src/main.rs"]
        .map(|path| {
            (
                TreePath::new(path).unwrap(),
                project.read(path).into_bytes(),
            )
        })
        .into();
    let entries = files
        .iter()
        .map(|(path, bytes)| (path.clone(), Entry::of(Kind::File, bytes)));
    let target = Manifest::new(entries).unwrap().tree_digest();
    let contents = files.iter().map(|(path, bytes)| rrun_protocol::Content {
        path,
        kind: Kind::File,
        bytes,
    });
    let payload = compress(&write_tar(contents), b"", 3).unwrap();
    let build = BuildPlan {
        directory: None,
        package: "app".to_owned(),
        bin: "app".to_owned(),
        profile: "dev".to_owned(),
        features: Vec::new(),
        no_default_features: false,
        environment: Default::default(),
    };
    let preamble = Preamble {
        checkout: CheckoutId::from_random([1; 9]),
        sequence,
        base: Manifest::default().tree_digest(),
        target,
        with_prefix: false,
        no_build: false,
        changed: Vec::new(),
        deleted: Vec::new(),
        plan: Plan {
            build,
            run: RunPlan::default(),
        },
    };
    preamble.into_body(&payload)
}

#[test]
fn an_older_push_that_arrives_late_changes_nothing_and_is_told_by_which() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let send = |id: &str, body: &[u8]| -> serde_json::Value {
        let answer = agent.signed(&laptop, "POST", &format!("/_rrun/pushes/{id}"), &[], body);
        serde_json::from_str(answer.body.lines().last().unwrap()).unwrap()
    };
    let newer = send("bmV3ZXJuZXdl", &push_by_hand(8, "new"));
    assert_eq!(newer["outcome"], "live");
    let older = send("b2xkZXJvbGRl", &push_by_hand(7, "old"));
    assert_eq!(
        (older["outcome"].as_str(), older["superseded_by"].as_str()),
        (Some("superseded"), Some("bmV3ZXJuZXdl"))
    );
    assert_eq!(agent.get("/").body, "new");
    assert_eq!(agent.status(&laptop)["tree"], newer["tree"]);
}

#[test]
fn ctrl_c_cancels_the_push_and_the_old_version_serves() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let gate = Gate::new(&project);
    gate.open();
    laptop.push_live(&project, &agent);
    gate.close();
    project.answer("two");
    let mut push = laptop.start_push(&project, &agent, &[]);
    push.wait_for("building");
    let process = Pid::from_raw(push.process().cast_signed()).unwrap();
    kill_process(process, Signal::INT).unwrap();
    let push = push.end();
    assert_eq!((push.code, push.outcome().as_str()), (130, "cancelled"));
    assert_eq!(agent.get("/").body, "one");
    gate.open();
    laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "two");
}

/// What a killed build left broken looks like an error in code that is right.
#[test]
fn a_failure_after_a_cancelled_build_is_built_once_more_from_clean() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::empty();
    let package = |name: &str| {
        format!("[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2024\"\n")
    };
    project.write(
        "Cargo.toml",
        &(package("app") + "[dependencies]\nwords = { path = \"words\" }\n[workspace]\n"),
    );
    project.write("words/Cargo.toml", &package("words"));
    project.write("words/src/lib.rs", "pub const WORD: &str = \"word\";\n");
    let source =
        crate::harness::MAIN.replace("ANSWER.to_owned()", "format!(\"{ANSWER} {}\", words::WORD)");
    project.write("src/main.rs", &source);
    let gate = Gate::new(&project);
    gate.open();
    laptop.push_live(&project, &agent);
    gate.close();
    project.replace("src/main.rs", "\"one\"", "\"two\"");
    let mut push = laptop.start_push(&project, &agent, &[]);
    push.wait_for("building");
    let url = agent.url();
    assert_eq!(
        laptop.run(&project.folder, &["cancel", "--url", &url]).code,
        0
    );
    assert_eq!(push.end().code, 130);
    for item in fs::read_dir(agent.workspace().join("target/debug/deps")).unwrap() {
        let path = item.unwrap().path();
        if path
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("libwords-")
        {
            let time = fs::metadata(&path).unwrap().modified().unwrap();
            fs::write(&path, "broken").unwrap();
            filetime::set_file_mtime(&path, time.into()).unwrap();
        }
    }
    gate.open();
    let pushed = laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "two word");
    let warning = pushed
        .event("warning")
        .expect("it says that it built twice");
    assert!(
        warning["text"].as_str().unwrap().contains("interrupted"),
        "{warning}"
    );
}

/// A build script that leaves a process which no polite signal ends.
#[test]
fn ctrl_c_on_a_push_that_waits_for_the_one_before_cancels_it() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    laptop.push_live(&project, &agent);
    let gate = Gate::new(&project);
    let stubborn = "fn main() {\n    let _ = std::process::Command::new(\"sh\").args([\"-c\", \"trap '' INT TERM; while :; do sleep 0.05; done\"]).status();\n";
    project.replace("build.rs", "fn main() {\n", stubborn);
    project.answer("two");
    let mut older = laptop.start_push(&project, &agent, &[]);
    older.wait_for("building");
    project.answer("three");
    let mut newer = laptop.start_push(&project, &agent, &[]);
    newer.wait_for("waiting");
    let process = Pid::from_raw(newer.process().cast_signed()).unwrap();
    kill_process(process, Signal::INT).unwrap();
    let newer = newer.end();
    assert_eq!(
        (newer.code, newer.outcome().as_str()),
        (130, "cancelled"),
        "{}",
        newer.stdout
    );
    assert_eq!(older.end().outcome(), "superseded");
    assert_eq!(agent.get("/").body, "one");
    drop(gate);
}

#[test]
fn a_stop_does_not_wait_for_an_open_event_stream() {
    let laptop = Laptop::new();
    let mut agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let endless = "stream.write_all(b\"HTTP/1.1 200 OK\\r\\ncontent-type: text/event-stream\\r\\n\\r\\ndata: 1\\n\\n\").ok()?;\n        loop { std::thread::park(); }\n        #[allow(unreachable_code)]\n        let answer = answer();";
    project.write(
        "src/main.rs",
        &crate::harness::MAIN.replace("let answer = answer();", endless),
    );
    laptop.push_live(&project, &agent);
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", agent.port)).unwrap();
    std::io::Write::write_all(&mut stream, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    std::io::Read::read_exact(&mut stream, &mut [0; 64]).unwrap();
    let started = std::time::Instant::now();
    let url = agent.url();
    assert_eq!(
        laptop.run(&project.folder, &["stop", "--url", &url]).code,
        0
    );
    let limit = std::time::Duration::from_secs(15);
    assert!(
        started.elapsed() < limit,
        "the stream's own limit is five minutes"
    );
    assert_eq!(agent.status(&laptop)["state"], "nothing");
    assert_eq!(agent.get("/").status, 503);
    agent.stop();
}

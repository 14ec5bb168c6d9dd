//! What a person at the laptop meets: the local agent, keys, exit codes, bad input.

use std::{fs, os::unix::fs::PermissionsExt as _};

use crate::harness::{Agent, Laptop, Project, request, taken_port};

/// A port that is free now, for a local agent of this test's own.
fn free_port() -> String {
    taken_port().1.to_string()
}

/// Ends the local agent also when the test fails.
struct Local<'a> {
    laptop: &'a Laptop,
    project: &'a Project,
    port: String,
}

impl<'a> Local<'a> {
    fn new(laptop: &'a Laptop, project: &'a Project) -> Self {
        Self {
            laptop,
            project,
            port: free_port(),
        }
    }

    fn push(&self, more: &[&str]) -> crate::harness::Ran {
        let arguments = [&["push", "--local", "--port", &self.port], more].concat();
        self.laptop.run(&self.project.folder, &arguments)
    }

    fn get(&self) -> String {
        request(
            "GET",
            &format!("http://127.0.0.1:{}/", self.port),
            None,
            &[],
            b"",
        )
        .body
    }
}

impl Drop for Local<'_> {
    fn drop(&mut self) {
        self.laptop.run(&self.project.folder, &["stop", "--local"]);
    }
}

#[test]
fn one_command_starts_an_agent_and_the_next_one_finds_it() {
    let (laptop, project) = (Laptop::new(), Project::new());
    let local = Local::new(&laptop, &project);
    let first = local.push(&[]);
    assert_eq!(first.code, 0, "{first:?}");
    assert!(
        first.stdout.starts_with("live  http://127.0.0.1:"),
        "{first:?}"
    );
    for part in [
        "generation 1",
        "3 files",
        " up, ",
        "round trip",
        "scan ",
        "send ",
        "apply ",
        "build ",
        "ready ",
        "swap ",
        "total ",
    ] {
        assert!(first.stdout.contains(part), "{part}: {first:?}");
    }
    assert!(first.stderr.contains("Compiling") && !first.stdout.contains("Compiling"));
    assert!(
        !first.stdout.contains('\u{1b}') && !first.stderr.contains('\u{1b}'),
        "no colours into a pipe"
    );
    assert_eq!(local.get(), "one");
    project.answer("two");
    let second = local.push(&[]);
    assert!(
        second.stdout.contains("generation 2") && second.stdout.contains("1 file, "),
        "{second:?}"
    );
    assert!(second.stdout.contains("1 round trip "), "{second:?}");
    assert_eq!(local.get(), "two");
    // Without --port it finds the same one.
    let third = laptop.run(&project.folder, &["push", "--local"]);
    assert!(
        third.code == 0 && third.stdout.starts_with("unchanged"),
        "{third:?}"
    );
    let status = laptop.run(&project.folder, &["status", "--local", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(
        (status["state"].as_str(), status["generation"].as_u64()),
        (Some("serving"), Some(2))
    );
    let stopped = laptop.run(&project.folder, &["stop", "--local"]);
    assert_eq!(stopped.code, 0, "{stopped:?}");
    assert_eq!(
        request(
            "GET",
            &format!("http://127.0.0.1:{}/", local.port),
            None,
            &[],
            b""
        )
        .status,
        0
    );
}

#[test]
fn an_agent_of_another_version_is_replaced() {
    let (laptop, project) = (Laptop::new(), Project::new());
    let local = Local::new(&laptop, &project);
    assert_eq!(local.push(&[]).code, 0);
    let states = std::path::Path::new(&laptop.environment["XDG_STATE_HOME"]).join("rrun");
    let announced = fs::read_dir(states).unwrap().flatten();
    let mut announced = announced.map(|folder| folder.path().join("agent.json"));
    let announced = announced.find(|file| file.exists()).unwrap();
    let text = fs::read_to_string(&announced).unwrap();
    let before: serde_json::Value = serde_json::from_str(&text).unwrap();
    let version = before["version"].as_str().unwrap();
    fs::write(&announced, text.replace(version, "0.0.0-old")).unwrap();
    project.answer("two");
    let pushed = local.push(&[]);
    assert_eq!(pushed.code, 0, "{pushed:?}");
    assert!(pushed.stderr.contains("0.0.0-old"), "{pushed:?}");
    assert_eq!(local.get(), "two");
    let after: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&announced).unwrap()).unwrap();
    assert_ne!(before["pid"], after["pid"]);
}

#[test]
fn a_port_that_something_else_has_is_named_and_another_one_offered() {
    let (laptop, project) = (Laptop::new(), Project::new());
    let (_listener, port) = taken_port();
    let ran = laptop.run(
        &project.folder,
        &["push", "--local", "--port", &port.to_string()],
    );
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(
        ran.stderr.contains(&port.to_string()) && ran.stderr.contains("--port"),
        "{ran:?}"
    );
}

#[test]
fn a_port_that_another_project_s_agent_holds_is_named_with_the_project() {
    let (laptop, project, other) = (Laptop::new(), Project::new(), Project::new());
    let local = Local::new(&laptop, &project);
    assert_eq!(local.push(&[]).code, 0);
    let ran = laptop.run(&other.folder, &["push", "--local", "--port", &local.port]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(
        ran.stderr.contains(project.folder.to_str().unwrap()) && ran.stderr.contains("--port"),
        "{ran:?}"
    );
}

#[test]
fn no_agent_and_no_target_are_told_apart() {
    let (laptop, project) = (Laptop::new(), Project::new());
    let none = laptop.run(&project.folder, &["push"]);
    assert_eq!(none.code, 2, "{none:?}");
    assert!(
        none.stderr.contains("--local") && none.stderr.contains("--url"),
        "{none:?}"
    );
    let url = format!("http://127.0.0.1:{}", free_port());
    let unreachable = laptop.run(&project.folder, &["push", "--json", "--url", &url]);
    assert_eq!(unreachable.code, 3, "{unreachable:?}");
    assert!(unreachable.end()["outcome"].is_string(), "{unreachable:?}");
    let plain = laptop.run(&project.folder, &["push", "--url", "http://example.com"]);
    assert!(
        plain.code == 2 && plain.stderr.contains("https"),
        "{plain:?}"
    );
    let typo = laptop.run(&project.folder, &["psuh"]);
    assert!(typo.code == 2 && typo.stderr.contains("push"), "{typo:?}");
}

#[test]
fn a_setting_that_does_not_exist_is_named_with_the_nearest_one() {
    let (laptop, project) = (Laptop::new(), Project::new());
    project.write(
        "Cargo.toml",
        &(project.read("Cargo.toml") + "[package.metadata.rrun]\nasset = []\n"),
    );
    let ran = laptop.run(
        &project.folder,
        &["push", "--local", "--port", &free_port()],
    );
    assert!(ran.code == 2 && ran.stderr.contains("`assets`"), "{ran:?}");
}

#[test]
fn a_strange_key_is_refused_with_the_next_step() {
    let (laptop, stranger, project) = (Laptop::new(), Laptop::new(), Project::new());
    let agent = Agent::new(&[&laptop]);
    let ran = stranger.push(&project, &agent, &[]);
    assert_eq!(
        (ran.code, ran.outcome().as_str()),
        (3, "refused"),
        "{ran:?}"
    );
    assert!(
        ran.end()["hint"].as_str().unwrap().contains("rrun key"),
        "{ran:?}"
    );
}

#[test]
fn the_key_is_the_owner_s_alone() {
    let laptop = Laptop::new();
    let line = laptop.public_key();
    assert!(line.starts_with("rrun-ed25519 "), "{line}");
    assert_eq!(laptop.public_key(), line);
    assert_eq!(
        fs::metadata(laptop.key_file())
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    fs::set_permissions(laptop.key_file(), fs::Permissions::from_mode(0o644)).unwrap();
    let ran = laptop.run(std::path::Path::new("."), &["key"]);
    assert!(ran.code == 2 && ran.stderr.contains("chmod"), "{ran:?}");
}

/// The first answer tells the agent's time; the laptop signs again by it and remembers.
#[test]
fn a_laptop_whose_clock_is_an_hour_off_pushes_with_one_more_round_trip() {
    let (mut laptop, project) = (Laptop::new(), Project::new());
    let agent = Agent::new(&[&laptop]);
    laptop.push_live(&project, &agent);
    for (offset, answer) in [("3600", "two"), ("-3600", "three")] {
        laptop
            .environment
            .insert("RRUN_TEST_CLOCK_OFFSET".to_owned(), offset.to_owned());
        project.answer(answer);
        let pushed = laptop.push_live(&project, &agent);
        assert_eq!(pushed.number("round_trips"), 2);
        assert_eq!(agent.get("/").body, answer);
        project.write("README.md", answer);
        assert_eq!(laptop.push_live(&project, &agent).number("round_trips"), 1);
    }
}

#[test]
fn a_dry_run_lists_what_would_go_and_why_the_rest_does_not() {
    let (laptop, project) = (Laptop::new(), Project::new());
    project.write(".gitignore", "*.log\n");
    project.write("noise.log", "x");
    let ran = laptop.run(&project.folder, &["push", "--dry-run"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let line = |name: &str| {
        ran.stdout
            .lines()
            .find(|line| line.contains(name))
            .unwrap_or_else(|| panic!("{name}: {ran:?}"))
            .to_owned()
    };
    assert!(line("src/main.rs").contains('B'));
    assert!(line("noise.log").contains("*.log"));
}

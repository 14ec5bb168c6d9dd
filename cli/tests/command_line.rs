//! What a user meets before any agent is there: exit codes, where output goes, and colours.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{fs, path::Path, process::Output};

use assert_cmd::Command;

/// A user with a home of their own and one small project.
struct User {
    home: tempfile::TempDir,
}

impl User {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let project = home.path().join("app");
        fs::create_dir_all(project.join("src")).unwrap();
        let manifest = "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2024\"\n";
        fs::write(project.join("Cargo.toml"), manifest).unwrap();
        fs::write(project.join("src/main.rs"), "fn main() {}\n").unwrap();
        Self { home }
    }

    fn project(&self) -> &Path {
        self.home.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::cargo_bin("rrun").unwrap();
        for (name, _) in std::env::vars() {
            if name.starts_with("RRUN_") || name.starts_with("CLICOLOR") || name == "NO_COLOR" {
                command.env_remove(name);
            }
        }
        command
            .current_dir(self.project())
            .args(arguments)
            .env("HOME", self.home.path())
            .env("XDG_CONFIG_HOME", self.home.path().join("config"))
            .env("XDG_CACHE_HOME", self.home.path().join("cache"))
            .env("XDG_STATE_HOME", self.home.path().join("state"));
        // Cargo itself is found through the real home.
        if let (None, Some(home)) = (std::env::var_os("RUSTUP_HOME"), std::env::home_dir()) {
            command.env("RUSTUP_HOME", home.join(".rustup"));
        }
        command
    }

    fn run(&self, arguments: &[&str]) -> Run {
        Run(self.command(arguments).output().unwrap())
    }
}

struct Run(Output);

impl Run {
    fn code(&self) -> i32 {
        self.0.status.code().unwrap()
    }

    fn stdout(&self) -> &str {
        std::str::from_utf8(&self.0.stdout).unwrap()
    }

    fn stderr(&self) -> &str {
        std::str::from_utf8(&self.0.stderr).unwrap()
    }

    fn last_json(&self) -> serde_json::Value {
        serde_json::from_str(self.stdout().lines().last().unwrap()).unwrap()
    }
}

#[test]
fn without_a_service_a_push_says_what_to_do_and_exits_with_2() {
    let run = User::new().run(&["push", "app"]);
    assert_eq!(run.code(), 2);
    assert_eq!(run.stdout(), "");
    assert!(
        run.stderr()
            .starts_with("error: nothing says where to push to\nhint: ")
    );
    assert!(
        run.stderr().contains("push --local app`"),
        "{}",
        run.stderr()
    );
}

#[test]
fn mistakes_exit_with_2_and_absent_agents_with_3() {
    let user = User::new();
    fs::create_dir(user.project().join("nothing")).unwrap();
    for (arguments, code) in [
        (&["push", "--prot", "1"][..], 2),
        (&["push", "nothing", "--local"], 2),
        (&["push", "app", "--bin", "other", "--local"], 2),
        (&["push", "app", "--url", "http://example.com"], 2),
        (&["push", "app", "--url", "https://a", "--local"], 2),
        (
            &["push", "app", "--url", "http://127.0.0.1:9", "--port", "1"],
            2,
        ),
        (&["push", "app", "--url", "http://127.0.0.1:9"], 3),
        (&["status", "app", "--local"], 3),
        (&["push", "app", "--dry-run"], 0),
        (&["stop", "app", "--local"], 0),
        (&["push", "--help"], 0),
    ] {
        let run = user.run(arguments);
        assert_eq!(run.code(), code, "{arguments:?}: {}", run.stderr());
        assert_eq!(code != 0, run.stderr().contains("error:"), "{arguments:?}");
    }
}

#[test]
fn json_ends_with_the_terminal_event_whatever_goes_wrong() {
    let user = User::new();
    for (arguments, code, reason) in [
        (&["push", "app", "--json"][..], 2, "nothing says where"),
        (&["push", "--jso", "--json"], 2, "unexpected argument"),
        (
            &["push", "app", "--json", "--bin", "b", "--local"],
            2,
            "no binary `b`",
        ),
        (
            &["push", "app", "--json", "--url", "http://127.0.0.1:9"],
            3,
            "no agent can be reached",
        ),
    ] {
        let run = user.run(arguments);
        let end = run.last_json();
        assert_eq!(run.code(), code, "{arguments:?}");
        assert_eq!(end["exit_code"], code);
        assert_eq!(end["outcome"], "failed");
        assert!(end["reason"].as_str().unwrap().contains(reason), "{end}");
        assert!(end["timings_ms"]["total"].is_u64());
    }
}

#[test]
fn the_service_comes_from_the_flag_then_the_environment_then_what_is_remembered() {
    let user = User::new();
    let goes_to = |flag: Option<&str>, variable: Option<&str>| {
        let mut command = user.command(&["push", "app", "--json"]);
        command.args(flag.map(|url| format!("--url={url}")));
        command.envs(variable.map(|url| ("RRUN_URL", url)));
        let run = Run(command.output().unwrap());
        run.last_json()["url"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let [a, b, c] = [
        "http://127.0.0.1:7",
        "http://127.0.0.1:9",
        "http://127.0.0.1:11",
    ];
    assert_eq!(goes_to(None, None), "");
    assert_eq!(user.run(&["use", c, "app"]).code(), 0);
    assert_eq!(user.run(&["use"]).code(), 2);
    assert_eq!(goes_to(None, None), c);
    assert_eq!(goes_to(None, Some(b)), b);
    assert_eq!(goes_to(Some(a), Some(b)), a);
}

#[test]
fn colours_never_go_into_a_pipe_unless_they_are_forced() {
    let user = User::new();
    let has_colours = |variables: &[(&str, &str)]| {
        let output = user
            .command(&["push", "app"])
            .envs(variables.iter().copied())
            .output();
        Run(output.unwrap()).stderr().contains('\u{1b}')
    };
    assert!(!has_colours(&[]));
    assert!(has_colours(&[("CLICOLOR_FORCE", "1")]));
    assert!(!has_colours(&[("NO_COLOR", "1")]));
}

#[test]
fn the_public_key_is_data_and_its_making_is_talk() {
    let user = User::new();
    let first = user.run(&["key"]);
    let second = user.run(&["key"]);
    assert_eq!(first.stdout(), second.stdout());
    assert!(first.stdout().starts_with("rrun-ed25519 "));
    assert!(first.stderr().contains("made a key pair"));
    assert_eq!(second.stderr(), "");
}

#[test]
fn a_dry_run_lists_what_would_go_and_why() {
    let user = User::new();
    fs::write(user.project().join("app/.rrunignore"), "notes.txt\n").unwrap();
    fs::write(user.project().join("app/notes.txt"), "mine").unwrap();
    let run = user.run(&["push", "app", "--dry-run"]);
    let line = |path: &str| {
        run.stdout()
            .lines()
            .find(|line| line.contains(path))
            .unwrap()
    };
    assert!(line("src/main.rs").starts_with("sent "), "{}", run.stdout());
    assert!(
        line("notes.txt").starts_with("left out "),
        "{}",
        run.stdout()
    );
}

//! From an edit to a served request, with the real client, the real agent and real cargo.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    time::{Duration, SystemTime},
};

use crate::harness::{Agent, Laptop, MAIN, Project, noise, wait_for};
use filetime::{FileTime, set_file_mtime};

fn setting() -> (Laptop, Project, Agent) {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    (laptop, Project::new(), agent)
}

#[test]
fn an_edit_is_served_and_the_end_says_how() {
    let (laptop, project, agent) = setting();
    assert_eq!(agent.get("/").status, 503);
    let first = laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "one");
    assert_eq!((first.number("generation"), first.number("files")), (1, 3));
    project.answer("two");
    let second = laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "two");
    let end = second.end();
    assert_eq!(
        (
            second.number("generation"),
            second.number("files"),
            second.number("round_trips")
        ),
        (2, 1, 1)
    );
    for field in ["push", "tree", "bytes_up", "bytes_down"] {
        assert!(!end[field].is_null(), "{field}: {end}");
    }
    for stage in [
        "scan", "pack", "send", "apply", "build", "ready", "swap", "total",
    ] {
        assert!(end["timings_ms"][stage].is_u64(), "{stage}: {end}");
    }
    assert_eq!(agent.status(&laptop)["serving_tree"], end["tree"]);
}

#[test]
fn a_one_line_edit_in_a_large_file_goes_up_in_less_than_a_kilobyte_and_one_round_trip() {
    let (laptop, project, agent) = setting();
    let filler = noise(30_000);
    project.write("src/main.rs", &format!("{MAIN}{filler}"));
    let first = laptop.push_live(&project, &agent);
    assert!(first.number("bytes_up") > 10_000);
    project.replace("src/main.rs", "\"one\"", "\"two\"");
    let second = laptop.push_live(&project, &agent);
    assert!(second.number("bytes_up") < 1000, "{}", second.end());
    assert_eq!(second.number("round_trips"), 1);
    assert_eq!(agent.get("/").body, "two");
}

/// Cargo compares times only; a file from a laptop may carry any.
#[test]
fn no_file_time_makes_a_stale_binary() {
    let (laptop, project, agent) = setting();
    laptop.push_live(&project, &agent);
    let now = SystemTime::now();
    let day = Duration::from_secs(24 * 3600);
    let first =
        FileTime::from_last_modification_time(&fs::metadata(project.path("src/main.rs")).unwrap());
    for (answer, time) in [
        ("past", FileTime::from_system_time(now - day)),
        ("future", FileTime::from_system_time(now + day)),
        ("equal", first),
        ("past again", FileTime::from_unix_time(1, 0)),
        // A revert to earlier content, with the time it had.
        ("one", first),
    ] {
        project.answer(answer);
        set_file_mtime(project.path("src/main.rs"), time).unwrap();
        let pushed = laptop.push_live(&project, &agent);
        assert_eq!(agent.get("/").body, answer);
        let warning = pushed.event("warning");
        assert!(warning.is_none(), "cargo saw it by itself: {warning:?}");
    }
}

#[test]
fn an_edit_and_its_undo_between_two_pushes_change_nothing() {
    let (laptop, project, agent) = setting();
    laptop.push_live(&project, &agent);
    let process = agent.status(&laptop)["process"].clone();
    project.answer("two");
    project.answer("one");
    let again = laptop.push(&project, &agent, &[]);
    assert_eq!((again.code, again.outcome().as_str()), (0, "unchanged"));
    assert!(again.event("building").is_none() && again.event("starting").is_none());
    assert_eq!(agent.status(&laptop)["process"], process);
}

/// With cargo's own stamps in the future, every edit looks older than the last build, as after a clock was set back.
#[test]
fn the_guard_catches_what_cargo_calls_fresh_and_is_not() {
    let (laptop, project, agent) = setting();
    laptop.push_live(&project, &agent);
    let future =
        FileTime::from_system_time(SystemTime::now() + Duration::from_secs(1000 * 24 * 3600));
    let mut folders = vec![agent.workspace().join("target/debug/.fingerprint")];
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(folder).unwrap() {
            let path = item.unwrap().path();
            if path.is_dir() {
                folders.push(path)
            } else {
                set_file_mtime(&path, future).unwrap()
            }
        }
    }
    project.answer("two");
    let pushed = laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "two");
    let warning = pushed.event("warning").expect("the guard says what it did");
    assert!(
        warning["text"].as_str().unwrap().contains("src/main.rs"),
        "{warning}"
    );
}

/// A workspace of a library and a binary that uses it.
fn workspace() -> Project {
    let project = Project::empty();
    project.write(
        "Cargo.toml",
        "[workspace]\nmembers = [\"app\", \"words\"]\nresolver = \"3\"\n",
    );
    let package = |name: &str| {
        format!("[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2024\"\n")
    };
    project.write(
        "app/Cargo.toml",
        &(package("app") + "[dependencies]\nwords = { path = \"../words\" }\n"),
    );
    project.write("words/Cargo.toml", &package("words"));
    project.write(
        "app/src/main.rs",
        &MAIN.replace("ANSWER.to_owned()", "format!(\"{ANSWER} {}\", words::WORD)"),
    );
    project.write("words/src/lib.rs", "pub const WORD: &str = \"word\";\n");
    project.write("README.md", "not compiled\n");
    project
}

#[test]
fn unchanged_packages_are_not_built_again() {
    let (laptop, _, agent) = setting();
    let project = workspace();
    laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "one word");
    project.replace("app/src/main.rs", "\"one\"", "\"two\"");
    let built = laptop.push_live(&project, &agent).event("built").unwrap();
    assert_eq!(
        (built["compiled"].as_u64(), built["fresh"].as_u64()),
        (Some(1), Some(1)),
        "{built}"
    );
    assert_eq!(agent.get("/").body, "two word");
    project.replace("words/src/lib.rs", "\"word\"", "\"letter\"");
    let built = laptop.push_live(&project, &agent).event("built").unwrap();
    assert_eq!(
        (built["compiled"].as_u64(), built["fresh"].as_u64()),
        (Some(2), Some(0)),
        "{built}"
    );
    assert_eq!(agent.get("/").body, "two letter");
    // A changed file that nothing is compiled from leaves everything fresh, rightly.
    project.write("words/README.md", "changed\n");
    let pushed = laptop.push_live(&project, &agent);
    assert_eq!(pushed.event("built").unwrap()["fresh"].as_u64(), Some(2));
    assert!(pushed.event("warning").is_none(), "{}", pushed.stdout);
}

/// What compiled before another package failed is rightly fresh in the next build.
#[test]
fn the_guard_is_quiet_about_what_a_failed_build_already_compiled() {
    let (laptop, _, agent) = setting();
    let project = workspace();
    laptop.push_live(&project, &agent);
    project.replace("words/src/lib.rs", "\"word\"", "\"letter\"");
    project.replace("app/src/main.rs", "\"one\"", "missing");
    assert_eq!(laptop.push(&project, &agent, &[]).code, 101);
    project.replace("app/src/main.rs", "missing", "\"two\"");
    let pushed = laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "two letter");
    assert!(pushed.event("warning").is_none(), "{}", pushed.stdout);
    assert_eq!(pushed.event("built").unwrap()["fresh"].as_u64(), Some(1));
}

#[test]
fn a_rollback_and_a_push_after_it_swap_without_building() {
    let (laptop, project, agent) = setting();
    laptop.push_live(&project, &agent);
    project.answer("two");
    laptop.push_live(&project, &agent);
    let url = agent.url();
    let back = laptop.run(&project.folder, &["rollback", "--url", &url]);
    assert_eq!(back.code, 0, "{back:?}");
    assert_eq!(agent.get("/").body, "one");
    let again = laptop.push_live(&project, &agent);
    assert!(again.event("building").is_none(), "{}", again.stdout);
    assert_eq!(agent.get("/").body, "two");
}

#[test]
fn what_does_not_compile_is_shown_as_at_home_and_the_old_version_serves() {
    let (laptop, project, agent) = setting();
    laptop.push_live(&project, &agent);
    project.replace("src/main.rs", "ANSWER.to_owned()", "ANSWER.to_owned() + 1");
    let failed = laptop.push(&project, &agent, &[]);
    assert_eq!(
        (failed.code, failed.outcome().as_str()),
        (101, "build_failed")
    );
    assert_eq!(agent.get("/").body, "one");
    let at_home = std::process::Command::new("cargo")
        .args(["build", "--color", "always"])
        .env("CARGO_TARGET_DIR", project.path("target"))
        .current_dir(&project.folder)
        .output()
        .unwrap();
    let at_home = String::from_utf8(at_home.stderr).unwrap();
    let error = at_home
        .find("\u{1b}[1m\u{1b}[91merror")
        .unwrap_or_else(|| panic!("{at_home}"));
    let error = at_home[error..].split("\n\n").next().unwrap();
    assert!(
        error.contains("E0308") && failed.log().contains(error),
        "{}\n---\n{error}",
        failed.log()
    );
    // What is pending is built by any later push.
    project.write("README.md", "unrelated\n");
    assert_eq!(laptop.push(&project, &agent, &[]).code, 101);
    project.replace(
        "src/main.rs",
        "ANSWER.to_owned() + 1",
        "ANSWER.to_owned() + \"!\"",
    );
    let applied = laptop.push(&project, &agent, &["--no-build"]);
    assert_eq!((applied.code, applied.outcome().as_str()), (0, "applied"));
    assert_eq!(agent.get("/").body, "one");
    assert_eq!(agent.status(&laptop)["needs_build"], true);
    project.write("README.md", "unrelated again\n");
    laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "one!");
}

#[test]
fn a_version_that_does_not_get_ready_leaves_the_old_one_serving_and_is_tried_again() {
    let (laptop, project, agent) = setting();
    project.write(
        "Cargo.toml",
        &(project.read("Cargo.toml") + "[package.metadata.rrun]\nready-timeout = \"2s\"\n"),
    );
    laptop.push_live(&project, &agent);
    let bad = |body: &str| MAIN.replace("let port =", &format!("{body}\n    let port ="));
    let elsewhere = crate::harness::taken_port().1;
    for (source, reason, printed) in [
        (
            bad("println!(\"no configuration\"); std::process::exit(3);"),
            "exited with code 3".to_owned(),
            "no configuration",
        ),
        (
            bad("panic!(\"what a pity\");"),
            "exited with code 101".to_owned(),
            "what a pity",
        ),
        (
            bad("println!(\"thinking\"); loop { std::thread::park(); }"),
            "did not listen on $PORT".to_owned(),
            "thinking",
        ),
        (
            MAIN.replace("0.0.0.0:{port}", &format!("0.0.0.0:{elsewhere}")),
            format!("listens on {elsewhere}, not on $PORT"),
            "listening on",
        ),
    ] {
        project.write("src/main.rs", &source);
        for _ in 0..2 {
            let pushed = laptop.push(&project, &agent, &[]);
            assert_eq!(
                (pushed.code, pushed.outcome().as_str()),
                (4, "not_ready"),
                "{}",
                pushed.stdout
            );
            let end = pushed.end();
            assert!(end["reason"].as_str().unwrap().contains(&reason), "{end}");
            assert!(
                pushed.events().iter().any(|event| event["event"] == "app"
                    && event["text"].as_str().unwrap().contains(printed)),
                "{}",
                pushed.stdout
            );
            assert_eq!(agent.get("/").body, "one");
        }
    }
}

#[test]
fn the_agent_s_tree_follows_whatever_the_laptop_s_does() {
    let (laptop, project, agent) = setting();
    project.write("src/foo.rs", "pub fn foo() {}\n");
    project.write(
        "src/main.rs",
        &format!("mod foo;\n{MAIN}").replace("let port =", "foo::foo();\n    let port ="),
    );
    project.write("old/name.txt", "content\n");
    project.write("run.sh", "#!/bin/sh\n");
    laptop.push_live(&project, &agent);
    let before = fs::metadata(agent.tree("Cargo.toml")).unwrap();

    fs::create_dir(project.path("src/foo")).unwrap();
    fs::rename(project.path("src/foo.rs"), project.path("src/foo/mod.rs")).unwrap();
    fs::create_dir(project.path("new")).unwrap();
    fs::rename(project.path("old/name.txt"), project.path("new/name.txt")).unwrap();
    fs::remove_dir(project.path("old")).unwrap();
    fs::set_permissions(project.path("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("new/name.txt", project.path("link")).unwrap();
    laptop.push_live(&project, &agent);

    assert!(!agent.tree("src/foo.rs").exists() && agent.tree("src/foo/mod.rs").exists());
    assert!(!agent.tree("old").exists());
    assert_eq!(fs::read_to_string(agent.tree("link")).unwrap(), "content\n");
    assert!(agent.tree("link").is_symlink());
    assert_ne!(
        fs::metadata(agent.tree("run.sh")).unwrap().mode() & 0o111,
        0
    );
    let after = fs::metadata(agent.tree("Cargo.toml")).unwrap();
    assert_eq!(
        (before.ino(), before.mtime_nsec()),
        (after.ino(), after.mtime_nsec()),
        "unchanged files are left alone"
    );
}

#[test]
fn an_agent_that_lost_its_state_gets_what_is_missing_and_the_laptop_says_so() {
    let (laptop, project, mut agent) = setting();
    laptop.push_live(&project, &agent);
    agent.restart(|workspace| fs::remove_dir_all(workspace).unwrap());
    project.answer("two");
    let pushed = laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "two");
    assert_eq!(pushed.number("files"), 3);
    let note = pushed.event("note").expect("it says why it sent more");
    assert!(
        note["text"].as_str().unwrap().contains("another tree"),
        "{note}"
    );
}

#[test]
fn an_agent_that_starts_again_serves_what_it_served_without_a_build() {
    let (laptop, project, mut agent) = setting();
    laptop.push_live(&project, &agent);
    agent.restart(|_| {});
    wait_for("the app", || agent.get("/").body == "one");
    assert_eq!(laptop.push(&project, &agent, &[]).outcome(), "unchanged");
}

#[test]
fn a_file_that_the_build_changes_is_put_back_and_named() {
    let (laptop, project, agent) = setting();
    project.write(
        "build.rs",
        "fn main() { std::fs::write(\"src/made.rs\", \"pub const MADE: u8 = 1;\\n\").unwrap(); }\n",
    );
    project.write("src/made.rs", "pub const MADE: u8 = 0;\n");
    laptop.push_live(&project, &agent);
    project.answer("two");
    let pushed = laptop.push_live(&project, &agent);
    let warning = pushed.event("warning").unwrap();
    assert!(
        warning["text"].as_str().unwrap().contains("src/made.rs"),
        "{warning}"
    );
    assert!(
        warning["hint"].as_str().unwrap().contains("OUT_DIR"),
        "{warning}"
    );
    assert_eq!(agent.get("/").body, "two");
}

#[test]
fn assets_belong_to_their_generation() {
    let (laptop, project, agent) = setting();
    let settings = "[package.metadata.rrun]\nassets = [\"templates\"]\n";
    project.write("Cargo.toml", &(project.read("Cargo.toml") + settings));
    project.write("templates/page.txt", "old page");
    let reads = "std::fs::read_to_string(\"templates/page.txt\").expect(\"the template is there\")";
    project.write("src/main.rs", &MAIN.replace("ANSWER.to_owned()", reads));
    laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "old page");
    project.write("templates/page.txt", "new page");
    let pushed = laptop.push_live(&project, &agent);
    assert_eq!(
        pushed.event("built").unwrap()["compiled"].as_u64(),
        Some(0),
        "only a swap"
    );
    assert_eq!(agent.get("/").body, "new page");
    let url = agent.url();
    assert_eq!(
        laptop
            .run(&project.folder, &["rollback", "--url", &url])
            .code,
        0
    );
    assert_eq!(agent.get("/").body, "old page");
}

/// Cargo's own message says nothing of whether a build script ran.
#[test]
fn the_guard_catches_a_build_script_that_did_not_run_again() {
    let (laptop, project, agent) = setting();
    project.write(
        "build.rs",
        "fn main() {\n    println!(\"cargo:rerun-if-changed=answer.txt\");\n    let answer = std::fs::read_to_string(\"answer.txt\").unwrap();\n    println!(\"cargo:rustc-env=ANSWER={answer}\");\n}\n",
    );
    project.write("answer.txt", "first");
    let source = MAIN.replace("ANSWER.to_owned()", "env!(\"ANSWER\").to_owned()");
    project.write("src/main.rs", &source);
    laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "first");
    let future = SystemTime::now() + Duration::from_secs(1000 * 24 * 3600);
    let scripts = fs::read_dir(agent.workspace().join("target/debug/build")).unwrap();
    let outputs = scripts.map(|script| script.unwrap().path().join("output"));
    for output in outputs.filter(|output| output.exists()) {
        set_file_mtime(&output, FileTime::from_system_time(future)).unwrap();
    }
    project.write("answer.txt", "second");
    let pushed = laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "second");
    let warning = pushed.event("warning").expect("the guard says what it did");
    assert!(
        warning["text"].as_str().unwrap().contains("answer.txt"),
        "{warning}"
    );
    // In order, it says nothing, also where the script rightly does not run.
    project.write("answer.txt", "third");
    assert!(
        laptop
            .push_live(&project, &agent)
            .event("warning")
            .is_none()
    );
    assert_eq!(agent.get("/").body, "third");
    project.write("src/main.rs", &(source + "// edited\n"));
    assert!(
        laptop
            .push_live(&project, &agent)
            .event("warning")
            .is_none()
    );
}

#[test]
fn a_rollback_that_does_not_get_ready_keeps_the_version_for_another_try() {
    let (laptop, project, agent) = setting();
    let switch = tempfile::NamedTempFile::new().unwrap();
    let needs = format!(
        "assert!(std::path::Path::new({:?}).exists(), \"no database\");\n    let port =",
        switch.path()
    );
    project.write("src/main.rs", &MAIN.replace("let port =", &needs));
    laptop.push_live(&project, &agent);
    project.answer("two");
    laptop.push_live(&project, &agent);
    let url = agent.url();
    let rollback = || laptop.run(&project.folder, &["rollback", "--url", &url]);
    let away = switch.path().with_extension("away");
    fs::rename(switch.path(), &away).unwrap();
    assert_eq!(rollback().code, 4);
    assert_eq!(agent.get("/").body, "two");
    fs::rename(&away, switch.path()).unwrap();
    assert_eq!(rollback().code, 0);
    assert_eq!(agent.get("/").body, "one");
    // The tree on the agent is the last pushed one all the same: an edit goes up in one round trip.
    project.answer("three");
    assert_eq!(laptop.push_live(&project, &agent).number("round_trips"), 1);
}

#[test]
fn what_served_last_is_started_again_until_it_starts() {
    let (laptop, project, mut agent) = setting();
    let switch = tempfile::NamedTempFile::new().unwrap();
    let needs = format!(
        "assert!(std::path::Path::new({:?}).exists(), \"no database\");\n    let port =",
        switch.path()
    );
    project.write("src/main.rs", &MAIN.replace("let port =", &needs));
    laptop.push_live(&project, &agent);
    let away = switch.path().with_extension("away");
    fs::rename(switch.path(), &away).unwrap();
    agent.restart(|_| {});
    wait_for("the page that says why", || {
        agent.get("/").body.contains("generation 1 does not start")
    });
    fs::rename(&away, switch.path()).unwrap();
    wait_for("the app", || agent.get("/").body == "one");
}

#[test]
fn warm_leaves_what_a_push_would_have_left() {
    let (laptop, project) = (Laptop::new(), Project::new());
    let mut agent = Agent::new(&[&laptop]);
    agent.restart(|workspace| {
        fs::remove_dir_all(workspace).unwrap();
        let tree = workspace.join("tree");
        fs::create_dir_all(tree.join("src")).unwrap();
        for file in ["Cargo.toml", "Cargo.lock", "src/main.rs"] {
            fs::copy(project.path(file), tree.join(file)).unwrap();
        }
        let workspace = workspace.to_str().unwrap();
        let warmed = laptop.run(&tree, &["agent", "warm", "--workspace", workspace]);
        assert_eq!(warmed.code, 0, "{warmed:?}");
        assert!(warmed.stderr.contains("Compiling"), "{warmed:?}");
    });
    wait_for("the image's own build", || agent.get("/").body == "one");
    // Another laptop's file times mean nothing, and the recipe is the same: nothing is built.
    let first = laptop.push(&project, &agent, &[]);
    assert_eq!(first.outcome(), "unchanged", "{}", first.stdout);
    project.answer("two");
    let built = laptop.push_live(&project, &agent).event("built").unwrap();
    assert_eq!(built["compiled"].as_u64(), Some(1), "{built}");
    assert_eq!(agent.get("/").body, "two");
}

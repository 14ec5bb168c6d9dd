//! Slow starters, and containers that lose their CPU: limits count only the time in which something could happen.

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::harness::{Agent, Laptop, MAIN, Project};

/// Waits for a moment that no event marks.
fn let_pass(time: Duration) {
    let started = Instant::now();
    while let Some(rest) = time.checked_sub(started.elapsed()) {
        std::thread::park_timeout(rest);
    }
}

fn pid(process: u64) -> Pid {
    Pid::from_raw(i32::try_from(process).unwrap()).unwrap()
}

/// The process of the generation that is getting ready, found by its executable.
fn starting_process(agent: &Agent, generation: u64) -> Pid {
    let executable = agent
        .workspace()
        .join("generations")
        .join(generation.to_string())
        .join("executable");
    let mut found = None;
    crate::harness::wait_for("the new process", || {
        found = fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            (fs::read_link(entry.path().join("exe")).ok()? == executable).then_some(number)
        });
        found.is_some()
    });
    pid(found.unwrap())
}

#[test]
fn an_app_that_takes_thirty_seconds_to_start_goes_live() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let slow = "std::thread::sleep(std::time::Duration::from_secs(30));\n    let port =";
    project.write("src/main.rs", &MAIN.replace("let port =", slow));
    let pushed = laptop.push_live(&project, &agent);
    assert!(pushed.end()["timings_ms"]["ready"].as_u64().unwrap() >= 30_000);
    assert_eq!(agent.get("/").body, "one");
}

/// Agent, app and cargo are stopped for longer than the limit that is running, as Cloud Run does between requests.
#[test]
fn a_container_that_is_frozen_past_every_limit_ends_the_push_as_if_nothing_happened() {
    const LIMIT: Duration = Duration::from_secs(3);
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let settings = "[package.metadata.rrun]\nready-timeout = \"3s\"\ndrain-limit = \"3s\"\nstream-drain-limit = \"3s\"\n";
    project.write("Cargo.toml", &(project.read("Cargo.toml") + settings));
    laptop.push_live(&project, &agent);
    let slow = "std::thread::sleep(std::time::Duration::from_millis(1500));\n    let port =";
    project.write(
        "src/main.rs",
        &MAIN
            .replace("let port =", slow)
            .replace("\"one\"", "\"two\""),
    );
    let mut push = laptop.start_push(&project, &agent, &[]);
    push.wait_for("starting");
    let app = starting_process(&agent, 2);
    let itself = pid(agent.process().into());
    kill_process(itself, Signal::STOP).unwrap();
    kill_process_group(app, Signal::STOP).unwrap();
    let_pass(LIMIT + LIMIT);
    // The agent wakes up first and finds its limit long past on the clock.
    kill_process(itself, Signal::CONT).unwrap();
    kill_process_group(app, Signal::CONT).unwrap();
    let push = push.end();
    assert_eq!(
        (push.code, push.outcome().as_str()),
        (0, "live"),
        "{}",
        push.stdout
    );
    assert_eq!(agent.get("/").body, "two");
}

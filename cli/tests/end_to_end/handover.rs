//! `--swap restart` and `--swap exec`, by the real client.

use std::fs;

use crate::harness::{Agent, Laptop, MAIN, Project, wait_for};

#[test]
fn exec_makes_the_agent_s_process_the_app_on_the_public_port() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    laptop.push_live(&project, &agent);
    project.answer("two");
    let pushed = laptop.push(&project, &agent, &["--swap", "exec"]);
    assert_eq!(
        (pushed.code, pushed.outcome().as_str()),
        (0, "handed_over"),
        "{}",
        pushed.stdout
    );
    assert_eq!(pushed.number("generation"), 2);
    wait_for("the app on the public port", || {
        agent.get("/").body == "two"
    });
    let executable = fs::read_link(format!("/proc/{}/exe", agent.process())).unwrap();
    assert!(
        executable.starts_with(agent.workspace().join("generations")),
        "{executable:?}"
    );
    let environment = fs::read(format!("/proc/{}/environ", agent.process())).unwrap();
    let environment = String::from_utf8(environment).unwrap();
    assert!(
        environment.contains(&format!("PORT={}\0", agent.port)) && !environment.contains("RRUN_")
    );
    // Nobody takes pushes there any more, and the next one says so.
    project.answer("three");
    let next = laptop.push(&project, &agent, &[]);
    assert_eq!(next.code, 3, "{next:?}");
    assert!(
        next.end()["reason"]
            .as_str()
            .unwrap()
            .contains("no rrun agent answers"),
        "{next:?}"
    );
}

#[test]
fn exec_of_what_does_not_get_ready_leaves_agent_and_old_version() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    laptop.push_live(&project, &agent);
    project.write("src/main.rs", "fn main() {}\n");
    let pushed = laptop.push(&project, &agent, &["--swap", "exec"]);
    assert_eq!(
        (pushed.code, pushed.outcome().as_str()),
        (4, "not_ready"),
        "{}",
        pushed.stdout
    );
    assert_eq!(agent.get("/").body, "one");
}

/// An app of which two cannot run at once: it locks a file, as a database would.
#[test]
fn restart_stops_the_old_version_first_and_holds_the_requests() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let lock = tempfile::NamedTempFile::new().unwrap();
    let locking = format!(
        "let lock = std::fs::File::open({:?}).unwrap();\n    lock.try_lock().expect(\"only one runs\");\n    let port =",
        lock.path().to_str().unwrap()
    );
    let source = MAIN.replace("let port =", &locking);
    project.write("src/main.rs", &source);
    laptop.push_live(&project, &agent);
    project.write("src/main.rs", &source.replace("\"one\"", "\"two\""));
    assert_eq!(
        laptop.push(&project, &agent, &[]).code,
        4,
        "both at once is not possible"
    );
    let asking = {
        let url = agent.url();
        std::thread::spawn(move || {
            let ask = || crate::harness::request("GET", &url, None, &[], b"");
            loop {
                let answer = ask();
                assert_eq!(answer.status, 200, "{}", answer.body);
                if answer.body == "two" {
                    break;
                }
            }
        })
    };
    let pushed = laptop.push(&project, &agent, &["--swap", "restart"]);
    assert_eq!(
        (pushed.code, pushed.outcome().as_str()),
        (0, "live"),
        "{}",
        pushed.stdout
    );
    asking.join().unwrap();
}

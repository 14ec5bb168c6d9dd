//! The control routes as curl sees them: who is let in, what they answer.

use crate::harness::{Agent, Laptop, Project, request, sign};
use rrun_protocol::{BootId, PrivateKey};
use std::{fs, process::Command};

/// No routes at all, under the same prefix.
const NO_ROUTES: [(&str, &str); 5] = [
    ("GET", "/_rrun/"),
    ("GET", "/_rrun/nowhere"),
    ("PUT", "/_rrun/status"),
    ("OPTIONS", "/_rrun/tree"),
    ("GET", "/_rrun/pushes/MTIzNDU2Nzg5/events?from=x"),
];

/// Every route of the agent's own table, with something in place of what is in braces.
fn routes() -> Vec<(&'static str, String)> {
    let filled = |path: &str| {
        path.replace("{id}", "MTIzNDU2Nzg5")
            .replace("{upload}", &"0".repeat(64))
            .replace("{part}", "0")
            .replace("{build}", "latest")
    };
    let all = rrun_agent::CONTROL_ROUTES.iter().chain(&NO_ROUTES);
    all.map(|(method, path)| (*method, filled(path))).collect()
}

#[test]
fn nothing_answers_who_did_not_sign_now_for_this_boot_and_once() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let (key, boot) = (laptop.private_key(), agent.boot());
    let stranger = PrivateKey::from_seed(&[3; 32]);
    for (method, path) in &routes() {
        let other_path = format!("{path}x");
        let cases = [
            ("unsigned", None),
            ("junk", Some("1 a b c".to_owned())),
            (
                "by a stranger",
                Some(sign(&stranger, boot, method, path, "", b"", 0)),
            ),
            (
                "for another path",
                Some(sign(&key, boot, method, &other_path, "", b"", 0)),
            ),
            (
                "for another method",
                Some(sign(&key, boot, "PATCH", path, "", b"", 0)),
            ),
            ("stale", Some(sign(&key, boot, method, path, "", b"", -400))),
            (
                "from the future",
                Some(sign(&key, boot, method, path, "", b"", 400)),
            ),
            (
                "for another boot",
                Some(sign(
                    &key,
                    BootId::from_random([9; 9]),
                    method,
                    path,
                    "",
                    b"",
                    0,
                )),
            ),
        ];
        for (what, signature) in cases {
            let answer = request(
                method,
                &format!("{}{path}", agent.url()),
                signature.as_deref(),
                &[],
                b"",
            );
            assert_eq!(
                answer.status, 401,
                "{method} {path} {what}: {}",
                answer.body
            );
        }
        // Signed by the owner it gets through, and only once. What ends the app comes late in the list.
        let signature = sign(&key, boot, method, path, "", b"", 0);
        let send = || {
            request(
                method,
                &format!("{}{path}", agent.url()),
                Some(&signature),
                &[],
                b"",
            )
            .status
        };
        assert_ne!(send(), 401, "{method} {path}");
        assert_eq!(send(), 401, "{method} {path} again");
    }
}

#[test]
fn a_body_other_than_the_signed_one_is_refused() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let path = "/_rrun/pushes/MTIzNDU2Nzg5";
    let signature = sign(
        &laptop.private_key(),
        agent.boot(),
        "POST",
        path,
        "",
        b"signed",
        0,
    );
    let answer = request(
        "POST",
        &format!("{}{path}", agent.url()),
        Some(&signature),
        &[],
        b"other",
    );
    assert_eq!(answer.status, 401, "{}", answer.body);
}

#[test]
fn git_archive_and_curl_push_a_whole_tree_and_follow_the_build() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let url = agent.url();
    for arguments in [
        &["init", "-q"][..],
        &["add", "-A"],
        &[
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "commit",
            "-qm",
            "x",
        ],
        &["archive", "--format=tar.gz", "-o", "tree.tar.gz", "HEAD"],
    ] {
        assert!(
            Command::new("git")
                .args(arguments)
                .current_dir(&project.folder)
                .status()
                .unwrap()
                .success()
        );
    }
    let sign = |arguments: &[&str]| {
        let ran = laptop.run(
            &project.folder,
            &[&["sign", "--url", &url], arguments].concat(),
        );
        assert_eq!(ran.code, 0, "{ran:?}");
        ran.stdout.trim().to_owned()
    };
    let curl = |arguments: &[&str]| {
        let output = Command::new("curl")
            .args(["-sS"])
            .args(arguments)
            .current_dir(&project.folder)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let path = "/_rrun/pushes/MTIzNDU2Nzg5";
    let header = sign(&["POST", path, "--body", "tree.tar.gz"]);
    let events = curl(&[
        "-H",
        &header,
        "--data-binary",
        "@tree.tar.gz",
        &format!("{url}{path}"),
    ]);
    let end: serde_json::Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
    assert_eq!(end["outcome"], "live", "{events}");
    assert_eq!(agent.get("/").body, "one");

    let path = "/_rrun/builds/latest/log";
    let plain = curl(&["-H", &sign(&["GET", path]), &format!("{url}{path}")]);
    assert!(
        plain.contains("Compiling") && plain.contains("Finished"),
        "{plain}"
    );
    let sse = curl(&[
        "-H",
        &sign(&["GET", path]),
        "-H",
        "accept: text/event-stream",
        &format!("{url}{path}"),
    ]);
    assert!(sse.contains("id: 1\n") && sse.contains("data: "), "{sse}");
    let ndjson = curl(&[
        "-H",
        &sign(&["GET", path]),
        "-H",
        "accept: application/x-ndjson",
        &format!("{url}{path}"),
    ]);
    let first: serde_json::Value = serde_json::from_str(ndjson.lines().next().unwrap()).unwrap();
    assert_eq!(
        (first["seq"].as_u64(), first["event"].as_str()),
        (Some(1), Some("log"))
    );
    assert_eq!(plain.lines().count(), ndjson.lines().count());
    let path = "/_rrun/builds/latest/log?from=1";
    let rest = curl(&["-H", &sign(&["GET", path]), &format!("{url}{path}")]);
    assert_eq!(rest.lines().count() + 1, plain.lines().count());
}

#[test]
fn an_archive_that_leads_outside_is_refused_by_name_and_changes_nothing() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    laptop.push_live(&project, &agent);
    let before = agent.status(&laptop);
    for (index, name) in [
        "../outside",
        "/tmp/outside",
        "src/../../outside",
        ".git/hooks/post-checkout",
    ]
    .iter()
    .enumerate()
    {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(1);
        header.set_cksum();
        builder.append(&header, &b"x"[..]).unwrap();
        let body = builder.into_inner().unwrap();
        let path = format!("/_rrun/pushes/MTIzNDU2Nzg{index}");
        let answer = agent.signed(&laptop, "POST", &path, &[], &body);
        assert_eq!(answer.status, 422, "{}", answer.body);
        assert!(answer.body.contains(name), "{}", answer.body);
    }
    let after = agent.status(&laptop);
    assert_eq!(
        (&before["tree"], &before["generation"]),
        (&after["tree"], &after["generation"])
    );
    assert_eq!(fs::read_dir(agent.workspace()).unwrap().count(), 4);
}

#[test]
fn the_same_push_id_again_is_told_the_same_and_applies_nothing_twice() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let pushed = laptop.push_live(&project, &agent);
    let id = pushed.end()["push"].as_str().unwrap().to_owned();
    let history = || {
        let answer = agent.signed(&laptop, "GET", "/_rrun/history", &[], b"");
        serde_json::from_str::<Vec<serde_json::Value>>(&answer.body).unwrap()
    };
    assert_eq!(history().len(), 1);
    let again = agent.signed(&laptop, "POST", &format!("/_rrun/pushes/{id}"), &[], b"");
    let end: serde_json::Value = serde_json::from_str(again.body.lines().last().unwrap()).unwrap();
    assert_eq!(
        (end["event"].as_str(), end["outcome"].as_str()),
        (Some("finished"), Some("live"))
    );
    assert_eq!(history().len(), 1);
    let from = format!(
        "/_rrun/pushes/{id}/events?from={}",
        end["seq"].as_u64().unwrap() - 1
    );
    assert_eq!(
        agent
            .signed(&laptop, "GET", &from, &[], b"")
            .body
            .lines()
            .count(),
        1
    );
}

#[test]
fn the_app_s_output_can_be_read() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    laptop.push_live(&project, &agent);
    let url = agent.url();
    let logs = laptop.run(&project.folder, &["logs", "--url", &url]);
    assert!(
        logs.code == 0 && logs.stdout.contains("listening on"),
        "{logs:?}"
    );
}

#[test]
fn an_agent_without_a_key_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_rrun"))
        .args([
            "agent",
            "serve",
            "--bind",
            "127.0.0.1",
            "--port",
            "0",
            "--workspace",
        ])
        .arg(folder.path())
        .env_remove("RRUN_AUTHORIZED_KEYS")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("rrun key"));
}

#[test]
fn curl_follows_a_build_while_it_runs() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("open");
    let script = format!(
        "fn main() {{\n    while !std::path::Path::new({:?}).exists() {{\n        std::thread::yield_now();\n    }}\n}}\n",
        gate.to_str().unwrap()
    );
    project.write("build.rs", &script);
    let mut push = laptop.start_push(&project, &agent, &[]);
    push.wait_for("log");
    let path = "/_rrun/builds/latest/log";
    let signature = sign(&laptop.private_key(), agent.boot(), "GET", path, "", b"", 0);
    let mut curl = Command::new("curl")
        .args([
            "-sSN",
            "-H",
            &format!("rrun-signature: {signature}"),
            &format!("{}{path}", agent.url()),
        ])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(curl.stdout.take().unwrap()));
    let first = lines.next().unwrap().unwrap();
    assert!(first.contains("Compiling"), "{first}");
    assert!(
        curl.try_wait().unwrap().is_none(),
        "it goes on until the build ends"
    );
    fs::write(&gate, "").unwrap();
    let last = lines.last().unwrap().unwrap();
    assert!(last.contains("Finished"), "{last}");
    assert!(curl.wait().unwrap().success());
    assert_eq!(push.end().outcome(), "live");
}

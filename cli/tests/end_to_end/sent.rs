//! What is sent, and that it builds on the agent: layouts, ignore rules, settings of the laptop, credentials, dependencies.

use std::fs;

use crate::harness::{Agent, Laptop, MAIN, Project, noise};

fn package(name: &str, more: &str) -> String {
    format!("[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2024\"\n{more}")
}

fn setting() -> (Laptop, Agent) {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    (laptop, agent)
}

/// A monorepo: `work/` is a workspace of `app` and `other`; `libraries/` beside it is another one; `unrelated/` is neither.
fn monorepo() -> Project {
    let project = Project::empty();
    let workspace = "[workspace]\nmembers = [\"app\", \"other\"]\nresolver = \"3\"\n[patch.crates-io]\npatched = { path = \"../patched\" }\n";
    project.write("work/Cargo.toml", workspace);
    let dependencies =
        "[dependencies]\nouter = { path = \"../../libraries/outer\" }\npatched = \"0.1\"\n";
    project.write("work/app/Cargo.toml", &package("app", dependencies));
    let answer = "format!(\"{ANSWER} {} {}\", outer::WORD, patched::WORD)";
    project.write(
        "work/app/src/main.rs",
        &MAIN.replace("ANSWER.to_owned()", answer),
    );
    project.write("work/other/Cargo.toml", &package("other", ""));
    project.write("work/other/src/main.rs", "fn main() {}\n");
    project.write("libraries/Cargo.toml", "[workspace]\nmembers = [\"outer\"]\nresolver = \"3\"\n[workspace.package]\nversion = \"0.1.0\"\n");
    project.write(
        "libraries/outer/Cargo.toml",
        "[package]\nname = \"outer\"\nversion.workspace = true\nedition = \"2024\"\n",
    );
    project.write(
        "libraries/outer/src/lib.rs",
        "pub const WORD: &str = \"outer\";\n",
    );
    project.write("patched/Cargo.toml", &package("patched", ""));
    project.write(
        "patched/src/lib.rs",
        "pub const WORD: &str = \"patched\";\n",
    );
    project.write("unrelated/large.txt", "not sent\n");
    project
}

#[test]
fn one_package_of_a_workspace_goes_with_its_dependencies_outside_and_nothing_else() {
    let (laptop, agent) = setting();
    let project = monorepo();
    let url = agent.url();
    let pushed = laptop.run(
        &project.path("work/app"),
        &["push", "--json", "--url", &url],
    );
    assert_eq!(pushed.code, 0, "{pushed:?}");
    assert_eq!(agent.get("/").body, "one outer patched");
    assert!(!agent.tree("unrelated").exists());
    // From the workspace's folder the package has to be named.
    let unclear = laptop.run(&project.path("work"), &["push", "--url", &url]);
    assert!(
        unclear.code == 2 && unclear.stderr.contains("app, other"),
        "{unclear:?}"
    );
    let named = laptop.run(
        &project.path("work"),
        &["push", "--json", "--url", &url, "-p", "app"],
    );
    assert_eq!(
        (named.code, named.outcome().as_str()),
        (0, "unchanged"),
        "{named:?}"
    );
    // An edit far from the workspace is noticed and built.
    project.replace("patched/src/lib.rs", "\"patched\"", "\"changed\"");
    let pushed = laptop.run(
        &project.path("work/app"),
        &["push", "--json", "--url", &url],
    );
    assert_eq!((pushed.code, pushed.number("files")), (0, 1), "{pushed:?}");
    assert_eq!(agent.get("/").body, "one outer changed");
}

#[test]
fn hidden_files_go_ignored_ones_do_not_and_rrunignore_brings_back() {
    let (laptop, agent) = setting();
    let project = Project::new();
    project.write(".hidden/file", "sent\n");
    project.write(".gitignore", "*.log\n/generated/\n");
    project.write("noise.log", "not sent\n");
    project.write(
        "generated/code.rs",
        "pub const CODE: &str = \"generated\";\n",
    );
    project.write("nested/.gitignore", "*\n!kept.txt\n");
    project.write("nested/kept.txt", "sent\n");
    project.write("nested/dropped.txt", "not sent\n");
    project.write(".rrunignore", "!/generated/\n/private/\n");
    project.write("private/notes.txt", "not sent\n");
    let include =
        "include!(concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/generated/code.rs\"));\nfn main() {";
    let source = MAIN
        .replace("fn main() {", include)
        .replace("ANSWER.to_owned()", "CODE.to_owned() + ANSWER");
    project.write("src/main.rs", &source);
    laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "generatedone");
    for (path, is_sent) in [
        (".hidden/file", true),
        (".gitignore", true),
        ("noise.log", false),
        ("nested/kept.txt", true),
        ("nested/dropped.txt", false),
        ("private/notes.txt", false),
        (".git", false),
    ] {
        assert_eq!(agent.tree(path).exists(), is_sent, "{path}");
    }
}

#[test]
fn the_target_directory_stays_at_home_wherever_it_is() {
    let (mut laptop, agent) = setting();
    let project = Project::new();
    project.write(
        ".cargo/config.toml",
        "[build]\ntarget-dir = \"made/here\"\n",
    );
    project.write("made/here/debug/app", "large\n");
    project.write("made/there/debug/app", "large\n");
    laptop.push_live(&project, &agent);
    assert!(!agent.tree("made/here").exists() && agent.tree("made/there").exists());
    let there = project.path("made/there").to_str().unwrap().to_owned();
    laptop
        .environment
        .insert("CARGO_TARGET_DIR".to_owned(), there);
    project.answer("two");
    laptop.push_live(&project, &agent);
    assert!(!agent.tree("made/there").exists());
    assert_eq!(agent.get("/").body, "two");
}

#[test]
fn settings_that_only_fit_the_laptop_are_left_out_and_named() {
    let (laptop, agent) = setting();
    let project = Project::new();
    project.write(
        ".cargo/config.toml",
        "[build]\nrustc-wrapper = \"no-such-wrapper\"\n[env]\nKEPT = \"kept\"\n[target.x86_64-unknown-linux-gnu]\nlinker = \"no-such-linker\"\n[registries.ours]\nindex = \"sparse+https://example.com/\"\ntoken = \"secret-token\"\n",
    );
    project.write(
        "src/main.rs",
        &MAIN.replace("ANSWER.to_owned()", "env!(\"KEPT\").to_owned()"),
    );
    let pushed = laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "kept");
    let sent = fs::read_to_string(agent.tree(".cargo/config.toml")).unwrap();
    assert!(
        !sent.contains("wrapper") && !sent.contains("linker") && !sent.contains("secret-token"),
        "{sent}"
    );
    for name in ["rustc-wrapper", "linker", "token"] {
        assert!(
            pushed.stdout.contains(name),
            "{name} is named: {}",
            pushed.stdout
        );
    }
    assert!(!pushed.stdout.contains("secret-token"));
}

#[test]
fn a_toolchain_file_that_asks_for_another_rust_is_a_named_error() {
    let (laptop, agent) = setting();
    let project = Project::new();
    project.write("rust-toolchain.toml", "[toolchain]\nchannel = \"stable\"\n");
    laptop.push_live(&project, &agent);
    project.write("rust-toolchain.toml", "[toolchain]\nchannel = \"1.60.0\"\n");
    // The laptop may not have it either; it reads the project all the same.
    let pushed = laptop.push(&project, &agent, &[]);
    assert_eq!(
        (pushed.code, pushed.outcome().as_str()),
        (101, "build_failed"),
        "{pushed:?}"
    );
    assert!(
        pushed.end()["reason"].as_str().unwrap().contains("1.60.0"),
        "{pushed:?}"
    );
    assert!(pushed.end()["hint"].is_string(), "{pushed:?}");
    assert_eq!(agent.get("/").body, "one");
}

#[test]
fn a_lock_file_that_the_build_completes_is_put_back_and_named() {
    let (laptop, agent) = setting();
    let project = Project::new();
    laptop.push_live(&project, &agent);
    project.write("words/Cargo.toml", &package("words", ""));
    project.write("words/src/lib.rs", "pub const WORD: &str = \"word\";\n");
    project.write(
        "Cargo.toml",
        &package("app", "[dependencies]\nwords = { path = \"words\" }\n"),
    );
    let pushed = laptop.push_live(&project, &agent);
    assert!(pushed.event("warning").is_none(), "{}", pushed.stdout);
    project.answer("two");
    let pushed = laptop.push_live(&project, &agent);
    let warning = pushed.event("warning").expect("the lock file is named");
    assert!(
        warning["text"].as_str().unwrap().contains("Cargo.lock"),
        "{warning}"
    );
    assert!(
        warning["hint"].as_str().unwrap().contains("cargo build"),
        "{warning}"
    );
    assert_eq!(agent.get("/").body, "two");
}

#[test]
fn too_much_is_not_sent_and_the_largest_folders_are_named() {
    let (laptop, agent) = setting();
    let project = Project::new();
    // Hexadecimal digits compress to half.
    project.write("data/numbers.txt", &noise(50 << 20));
    let pushed = laptop.push(&project, &agent, &[]);
    assert_eq!(pushed.code, 2, "{pushed:?}");
    let end = pushed.end();
    assert!(end["reason"].as_str().unwrap().contains("data"), "{end}");
    assert!(
        end["hint"].as_str().unwrap().contains(".rrunignore"),
        "{end}"
    );
    assert_eq!(agent.status(&laptop)["files"], 0, "nothing arrived");
    project.write(".rrunignore", "/data/\n");
    laptop.push_live(&project, &agent);
}

#[test]
fn credentials_stop_a_push_by_name_and_what_only_looks_like_them_does_not() {
    let (laptop, agent) = setting();
    let project = Project::new();
    project.write(
        "src/id_map.rs",
        "// PRIVATE KEY is only mentioned here, as in \"private_key\"\n",
    );
    project.write(
        "public.pem",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
    );
    laptop.push_live(&project, &agent);
    let before = agent.status(&laptop)["tree"].clone();
    let key = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIBERERERERERERERERERERERERERERERERERERERERER\n-----END PRIVATE KEY-----\n";
    let account = "{\"type\": \"service_account\", \"private_key\": \"-----BEGIN PRIVATE KEY-----\\nMC4C\\n-----END PRIVATE KEY-----\\n\"}\n";
    for (path, content) in [
        ("id_rsa", "x"),
        ("keys/id_ed25519", "x"),
        (".env", "SECRET=1\n"),
        ("deploy/key.pem", key),
        ("deploy/account.json", account),
    ] {
        project.write(path, content);
        let pushed = laptop.push(&project, &agent, &[]);
        assert_eq!(pushed.code, 2, "{path}: {pushed:?}");
        assert!(
            pushed.end()["reason"].as_str().unwrap().contains(path),
            "{pushed:?}"
        );
        assert_eq!(agent.status(&laptop)["tree"], before);
        // An ignored one stops nothing.
        project.write(".gitignore", &format!("/{path}\n/.gitignore\n"));
        assert_eq!(
            laptop.push(&project, &agent, &[]).outcome(),
            "unchanged",
            "{path}"
        );
        fs::remove_file(project.path(path)).unwrap();
        fs::remove_file(project.path(".gitignore")).unwrap();
    }
    project.write(".env", "SECRET=1\n");
    project.write(
        "Cargo.toml",
        &package("app", "[package.metadata.rrun]\nallow = [\".env\"]\n"),
    );
    laptop.push_live(&project, &agent);
    assert!(agent.tree(".env").exists());
}

#[test]
fn features_are_switched_and_dependencies_come_and_go() {
    let (laptop, agent) = setting();
    let project = Project::new();
    project.write("Cargo.toml", &package("app", "[features]\nloud = []\n"));
    let answer =
        "if cfg!(feature = \"loud\") { \"LOUD\".to_owned() } else { \"quiet\".to_owned() }";
    project.write("src/main.rs", &MAIN.replace("ANSWER.to_owned()", answer));
    laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "quiet");
    assert_eq!(
        laptop
            .push(&project, &agent, &["--features", "loud"])
            .outcome(),
        "live"
    );
    assert_eq!(agent.get("/").body, "LOUD");
    // The version without it is still kept.
    let back = laptop.push_live(&project, &agent);
    assert!(back.event("building").is_none());
    assert_eq!(agent.get("/").body, "quiet");

    project.write("words/Cargo.toml", &package("words", ""));
    project.write(
        "words/src/lib.rs",
        "pub fn answer() -> String {\n    \"word\".to_owned()\n}\n",
    );
    project.write(
        "Cargo.toml",
        &package("app", "[dependencies]\nwords = { path = \"words\" }\n"),
    );
    project.write(
        "src/main.rs",
        &MAIN.replace("ANSWER.to_owned()", "words::answer()"),
    );
    laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "word");
    fs::remove_dir_all(project.path("words")).unwrap();
    project.write("Cargo.toml", &package("app", ""));
    project.answer("without");
    laptop.push_live(&project, &agent);
    assert_eq!(agent.get("/").body, "without");
    assert!(!agent.tree("words").exists());
}

#[test]
fn a_crate_that_the_agent_cannot_get_is_named_with_what_to_do() {
    let (laptop, agent) = setting();
    let project = Project::new();
    laptop.push_live(&project, &agent);
    let offline = "[package.metadata.rrun]\nbuild-env = { CARGO_NET_OFFLINE = \"true\" }\n";
    project.write(
        "Cargo.toml",
        &package(
            "app",
            &format!("[dependencies]\nno-such-crate-anywhere = \"1\"\n{offline}"),
        ),
    );
    let pushed = laptop.push(&project, &agent, &[]);
    assert_eq!(
        (pushed.code, pushed.outcome().as_str()),
        (101, "build_failed"),
        "{}",
        pushed.stdout
    );
    let end = pushed.end();
    assert!(
        end["reason"]
            .as_str()
            .unwrap()
            .contains("no-such-crate-anywhere"),
        "{end}"
    );
    assert!(end["hint"].as_str().unwrap().contains("network"), "{end}");
    assert_eq!(agent.get("/").body, "one");
}

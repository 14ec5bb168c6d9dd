//! Real files in real folders.

use std::time::Duration;

use rrun_protocol::Selection;
use serde_json::json;

use super::*;
use crate::{
    discover::{Source, Sources, discover},
    fixture::Fixture,
};

/// The whole folder of a fixture as one source, without cargo.
fn checkout(fixture: &Fixture) -> Checkout {
    let root = fixture.root();
    let metadata = serde_json::from_value(json!({
        "packages": [{"name": "app", "version": "0.1.0", "id": "app", "dependencies": [], "features": {}, "edition": "2024",
            "targets": [{"name": "app", "kind": ["bin"], "crate_types": ["bin"], "src_path": root.join("main.rs"), "edition": "2024"}],
            "manifest_path": root.join("Cargo.toml"), "metadata": null}],
        "workspace_members": ["app"], "workspace_root": root, "target_directory": root.join("target"), "version": 1, "metadata": null}))
    .unwrap();
    let project =
        rrun_protocol::Project::resolve(&metadata, &root, &root, &Selection::default()).unwrap();
    Checkout {
        project_folder: root.clone(),
        project,
        sources: Sources {
            folders: vec![Source {
                path: root.clone(),
                why: "folder of package `app`".to_owned(),
            }],
            never: vec![root.join("target")],
            ..Sources::default()
        },
        root,
        notes: Vec::new(),
    }
}

fn try_scan(fixture: &Fixture, checkout: &Checkout) -> Result<Scan, ScanError> {
    // Late enough that files written a moment ago count as settled.
    let started = SystemTime::now() + Duration::from_secs(60);
    scan_at(
        checkout,
        &fixture.cache(),
        true,
        &Gitignore::empty(),
        started,
    )
}

fn scanned(fixture: &Fixture) -> Scan {
    try_scan(fixture, &checkout(fixture)).unwrap()
}

fn paths(scan: &Scan) -> Vec<&str> {
    scan.manifest
        .iter()
        .map(|(path, _)| path.as_str())
        .collect()
}

fn rule<'s>(scan: &'s Scan, path: &str) -> (&'s str, bool) {
    let listed = scan.listing.iter().find(|listed| listed.path == path);
    let listed = listed.unwrap_or_else(|| panic!("{path} in {:?}", scan.listing));
    (&listed.rule, listed.sent)
}

fn path(text: &str) -> TreePath {
    TreePath::new(text).unwrap()
}

#[test]
fn hidden_files_are_sent_and_git_and_the_target_directory_are_not() {
    let fixture = Fixture::new();
    for file in [
        "src/main.rs",
        ".hidden/x",
        ".sqlx/query.json",
        ".gitattributes",
        ".git/config",
        "sub/.git/config",
        "target/debug/app",
        "src/target/x",
    ] {
        fixture.write(file, "x");
    }
    let scan = scanned(&fixture);
    assert_eq!(
        paths(&scan),
        [
            ".gitattributes",
            ".hidden/x",
            ".sqlx/query.json",
            "src/main.rs",
            "src/target/x"
        ]
    );
    assert_eq!(
        rule(&scan, "src/main.rs"),
        ("folder of package `app`", true)
    );
    assert!(!rule(&scan, "target/").1 && !rule(&scan, ".git").1);
}

#[test]
fn a_folder_that_is_marked_as_a_cache_is_not_sent_and_one_merely_named_so_is() {
    let fixture = Fixture::new();
    fixture.write(
        "tools/target/CACHEDIR.TAG",
        "Signature: 8a477f597d28d172789f06886806bc55\n#",
    );
    fixture.write("tools/target/debug/x", "x");
    fixture.write("other/CACHEDIR.TAG", "no mark");
    assert_eq!(paths(&scanned(&fixture)), ["other/CACHEDIR.TAG"]);
}

#[test]
fn git_ignore_files_count_in_all_their_forms_without_a_repository_too() {
    let fixture = Fixture::new();
    fixture.write(".gitignore", "*.log\n/only-top\nbuild/\n!keep.log\n");
    fixture.write("sub/.gitignore", "local\n!again.log\n");
    for file in [
        "a.log",
        "keep.log",
        "only-top",
        "sub/only-top",
        "sub/build/x",
        "build.rs",
        "sub/local",
        "local",
        "sub/again.log",
        "sub/b.log",
    ] {
        fixture.write(file, "x");
    }
    let expected = [
        ".gitignore",
        "build.rs",
        "keep.log",
        "local",
        "sub/.gitignore",
        "sub/again.log",
        "sub/only-top",
    ];
    assert_eq!(paths(&scanned(&fixture)), expected);
    fixture.write(".git/info/exclude", "local\n");
    let scan = scanned(&fixture);
    assert!(!paths(&scan).contains(&"local"));
    assert_eq!(rule(&scan, "a.log"), (".gitignore:1: *.log", false));
    assert_eq!(rule(&scan, "keep.log"), (".gitignore:4: !keep.log", true));
    assert_eq!(rule(&scan, "sub/build/"), (".gitignore:3: build/", false));
    assert_eq!(rule(&scan, "local"), (".git/info/exclude:1: local", false));
}

#[test]
fn rules_above_the_tree_count_up_to_the_repository_and_no_further() {
    let fixture = Fixture::new();
    fixture.write(".gitignore", "*\n");
    fixture.write("repository/.gitignore", "/app/generated\n*.tmp\n");
    fs::create_dir_all(fixture.path("repository/.git")).unwrap();
    for file in ["main.rs", "generated", "x.tmp", "vendored/x.tmp"] {
        fixture.write(&format!("repository/app/{file}"), "x");
    }
    // A repository inside, as of a submodule, has rules of its own.
    fixture.write("repository/app/vendored/.git", "gitdir: nowhere\n");
    let mut checkout = checkout(&fixture);
    checkout.root = fixture.path("repository/app");
    checkout.sources.folders[0].path = checkout.root.clone();
    let scan = try_scan(&fixture, &checkout).unwrap();
    assert_eq!(paths(&scan), ["main.rs", "vendored/x.tmp"]);
}

#[test]
fn a_work_tree_has_the_excludes_of_its_repository() {
    let fixture = Fixture::new();
    fixture.write("clone/.git/info/exclude", "secret\n");
    fixture.write("clone/.git/worktrees/two/commondir", "../..\n");
    let directory = fixture.path("clone/.git/worktrees/two");
    fixture.write("two/.git", format!("gitdir: {}\n", directory.display()));
    fixture.write("two/secret", "x");
    fixture.write("two/main.rs", "x");
    let mut checkout = checkout(&fixture);
    checkout.root = fixture.path("two");
    checkout.sources.folders[0].path = checkout.root.clone();
    let scan = try_scan(&fixture, &checkout).unwrap();
    assert_eq!(paths(&scan), ["main.rs"]);
}

#[test]
fn the_users_global_rules_count_after_those_of_the_repository() {
    let fixture = Fixture::new();
    fixture.write("global", "*.swp\n*.keep\n");
    fixture.write("work/.gitignore", "!*.keep\n");
    fixture.write("work/a.swp", "x");
    fixture.write("work/a.keep", "x");
    let mut checkout = checkout(&fixture);
    checkout.root = fixture.path("work");
    checkout.sources.folders[0].path = checkout.root.clone();
    let global = read_rules(&fixture.path("global"), &mut Vec::new());
    let scan = scan_at(
        &checkout,
        &fixture.cache(),
        false,
        &global,
        SystemTime::now(),
    )
    .unwrap();
    assert_eq!(paths(&scan), [".gitignore", "a.keep"]);
    assert!(scan.listing.is_empty());
}

#[test]
fn our_own_ignore_file_wins_and_brings_files_back_even_from_ignored_folders() {
    let fixture = Fixture::new();
    fixture.write(".gitignore", "*.pem\nconfig/\nnode_modules/\ndist/\n");
    fixture.write(
        ".rrunignore",
        "/docs/\n!certificate.pem\n!/config/live/app.toml\n!dist/\n",
    );
    for file in [
        "docs/large",
        "certificate.pem",
        "other.pem",
        "config/live/app.toml",
        "config/live/rest",
        "config/old",
        "node_modules/config/x",
        "dist/page",
        "sub/.rrunignore",
        "sub/certificate.pem",
    ] {
        fixture.write(file, "x");
    }
    fixture.write("sub/.rrunignore", "certificate.pem\n");
    let scan = scanned(&fixture);
    let expected = [
        ".gitignore",
        ".rrunignore",
        "certificate.pem",
        "config/live/app.toml",
        "dist/page",
        "sub/.rrunignore",
    ];
    assert_eq!(paths(&scan), expected);
    assert_eq!(rule(&scan, "docs/"), (".rrunignore:1: /docs/", false));
    assert_eq!(
        rule(&scan, "config/live/app.toml").0,
        ".rrunignore:3: !/config/live/app.toml"
    );
    assert_eq!(rule(&scan, "config/old"), (".gitignore:2: config/", false));
}

#[test]
fn a_rule_that_is_no_pattern_is_named() {
    let fixture = Fixture::new();
    fixture.write(".rrunignore", "a{b\nfine\n");
    fixture.write("fine", "x");
    let scan = scanned(&fixture);
    assert_eq!(paths(&scan), [".rrunignore"]);
    assert!(
        scan.notes[0].text.contains(".rrunignore"),
        "{:?}",
        scan.notes
    );
}

#[test]
fn files_named_for_themselves_are_sent_though_ignored() {
    let fixture = Fixture::new();
    fixture.write(".gitignore", "Cargo.lock\n");
    fixture.write("Cargo.lock", "x");
    let mut checkout = checkout(&fixture);
    for name in ["Cargo.lock", "missing"] {
        checkout.sources.files.push(Source {
            path: fixture.path(name),
            why: "the workspace's lock file".to_owned(),
        });
    }
    let scan = try_scan(&fixture, &checkout).unwrap();
    assert_eq!(paths(&scan), [".gitignore", "Cargo.lock"]);
    assert_eq!(
        rule(&scan, "Cargo.lock"),
        ("the workspace's lock file", true)
    );
}

#[test]
fn a_start_inside_an_ignored_folder_is_walked_once() {
    let fixture = Fixture::new();
    fixture.write(".gitignore", "vendored/\n*.tmp\n");
    fixture.write("vendored/lib/src.rs", "x");
    fixture.write("vendored/lib/x.tmp", "x");
    fixture.write("vendored/other/src.rs", "x");
    fixture.write("inside/src.rs", "x");
    let mut checkout = checkout(&fixture);
    for name in ["vendored/lib", "inside"] {
        checkout.sources.folders.push(Source {
            path: fixture.path(name),
            why: "path dependency".to_owned(),
        });
    }
    let scan = try_scan(&fixture, &checkout).unwrap();
    assert_eq!(
        paths(&scan),
        [".gitignore", "inside/src.rs", "vendored/lib/src.rs"]
    );
    assert_eq!(rule(&scan, "inside/src.rs"), ("path dependency", true));
}

#[cfg(unix)]
#[test]
fn links_are_sent_as_links_and_may_not_lead_outside() {
    use std::os::unix::fs::symlink;
    let fixture = Fixture::new();
    fixture.write("real/x", "content");
    symlink("real", fixture.path("folder")).unwrap();
    symlink("../real/x", fixture.path("real/again")).unwrap();
    let scan = scanned(&fixture);
    assert_eq!(paths(&scan), ["folder", "real/again", "real/x"]);
    let link = path("real/again");
    assert_eq!(scan.manifest.get("folder").unwrap().kind, Kind::Symlink);
    assert_eq!(scan.read(&link).unwrap(), b"../real/x");

    symlink("../../outside", fixture.path("real/bad")).unwrap();
    let error = try_scan(&fixture, &checkout(&fixture)).unwrap_err();
    assert!(error.to_string().contains("`real/bad`"), "{error}");
    assert!(error.hint().unwrap().contains("`/real/bad`"));
    fixture.write(".rrunignore", "/real/bad\n");
    scanned(&fixture);
}

#[cfg(unix)]
#[test]
fn a_target_directory_that_is_a_link_to_another_disk_is_not_sent() {
    let fixture = Fixture::new();
    std::os::unix::fs::symlink("/nowhere", fixture.path("target")).unwrap();
    assert!(paths(&scanned(&fixture)).is_empty());
}

#[cfg(unix)]
#[test]
fn the_executable_bit_is_part_of_the_tree() {
    use std::os::unix::fs::PermissionsExt as _;
    let fixture = Fixture::new();
    fixture.write("run.sh", "x");
    let before = scanned(&fixture);
    fs::set_permissions(fixture.path("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    let after = scanned(&fixture);
    assert_eq!(before.manifest.get("run.sh").unwrap().kind, Kind::File);
    assert_eq!(after.manifest.get("run.sh").unwrap().kind, Kind::Executable);
}

#[cfg(unix)]
#[test]
fn what_cannot_be_sent_is_left_out_and_named() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, os::unix::net::UnixListener};
    let fixture = Fixture::new();
    fixture.write("main.rs", "x");
    let _socket = UnixListener::bind(fixture.path("socket")).unwrap();
    fixture.write("escape\u{1b}[2J", "x");
    // macOS stores no such name.
    let has_odd_name = fs::write(fixture.root().join(OsStr::from_bytes(b"odd\xff")), "x").is_ok();
    let scan = scanned(&fixture);
    assert_eq!(paths(&scan), ["main.rs"]);
    assert_eq!(
        scan.notes.len(),
        2 + usize::from(has_odd_name),
        "{:?}",
        scan.notes
    );
}

#[cfg(target_os = "linux")]
#[test]
fn names_that_differ_only_in_case_are_noted() {
    let fixture = Fixture::new();
    for file in [
        "src/Model.rs",
        "src/model.rs",
        "docs/x",
        "Docs/y",
        "other/model.rs",
    ] {
        fixture.write(file, "x");
    }
    let scan = scanned(&fixture);
    let texts: Vec<&str> = scan.notes.iter().map(|note| note.text.as_str()).collect();
    assert_eq!(
        texts,
        [
            "`Docs` and `docs` differ only in case",
            "`Model.rs` and `model.rs` in `src` differ only in case"
        ]
    );
}

#[test]
fn spaces_other_scripts_and_decomposed_names_are_taken_as_they_are() {
    let fixture = Fixture::new();
    let names = ["a b/ü.rs", "e\u{301}.rs", "空.txt"];
    for name in names {
        fixture.write(name, "x\r\n");
    }
    let scan = scanned(&fixture);
    for name in names {
        assert_eq!(scan.read(&path(name)).unwrap(), b"x\r\n");
    }
}

const KEY: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIBkQ2M2nRl2wzS0yQ2M2nRl2wzS0yQ2M2nRl2wzS0yQ2\n-----END PRIVATE KEY-----\n";

#[test]
fn credentials_stop_the_scan_each_time_and_are_all_named() {
    let fixture = Fixture::new();
    fixture.write("src/id_map.rs", "// PRIVATE KEY");
    fixture.write("certificate.pem", "-----BEGIN CERTIFICATE-----\n");
    scanned(&fixture);
    fixture.write(".env", "X=1");
    fixture.write("keys/server.pem", KEY);
    for _ in 0..2 {
        let error = try_scan(&fixture, &checkout(&fixture)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("`.env`") && text.contains("`keys/server.pem`"),
            "{text}"
        );
        assert!(error.hint().unwrap().contains("`/.env`"));
    }
}

#[test]
fn ignored_credentials_stop_nothing_and_allowed_ones_go() {
    let fixture = Fixture::new();
    fixture.write(".gitignore", ".env\n");
    fixture.write(".env", "X=1");
    fixture.write("tests/keys/server.pem", KEY);
    let mut checkout = checkout(&fixture);
    checkout.project.settings.allow = vec!["tests/keys/".to_owned()];
    let scan = try_scan(&fixture, &checkout).unwrap();
    assert_eq!(paths(&scan), [".gitignore", "tests/keys/server.pem"]);
    checkout.project.settings.allow.clear();
    let error = try_scan(&fixture, &checkout).unwrap_err();
    assert!(matches!(error, ScanError::Credentials { .. }), "{error}");
    checkout.project.settings.allow = vec!["/keys/server.pem".to_owned()];
    checkout.project.settings_folder = Some(path("tests"));
    try_scan(&fixture, &checkout).unwrap();
}

#[test]
fn configuration_travels_without_what_belongs_to_this_laptop() {
    let fixture = Fixture::new();
    let text = "# team\n[build]\nrustc-wrapper = \"sccache\"\nrustflags = []\n[registries.x]\ntoken = \"secret\"\n";
    fixture.write(".cargo/config.toml", text);
    fixture.write("sub/.cargo/config.toml", "[alias]\n");
    for _ in 0..2 {
        let scan = scanned(&fixture);
        let sent = scan.read(&path(".cargo/config.toml")).unwrap();
        let entry = scan.manifest.get(".cargo/config.toml").unwrap();
        assert_eq!(*entry, Entry::of(Kind::File, &sent));
        let sent = String::from_utf8(sent).unwrap();
        assert!(
            sent.starts_with("# team") && !sent.contains("sccache") && !sent.contains("secret")
        );
        assert_eq!(scan.notes.len(), 1);
        let note = &scan.notes[0].text;
        assert!(note.contains("`build.rustc-wrapper`") && note.contains("`registries.x.token`"));
        assert!(!note.contains("secret"));
    }
    assert_eq!(
        fs::read_to_string(fixture.path(".cargo/config.toml")).unwrap(),
        text
    );
    fixture.write(".cargo/config.toml", "[registries.x\ntoken = \"secret\"");
    assert!(!paths(&scanned(&fixture)).contains(&".cargo/config.toml"));
}

#[test]
fn a_configuration_that_is_not_sent_at_all_is_named() {
    let fixture = Fixture::new();
    fixture.write("above/.cargo/config.toml", "[build]\ntarget-dir = \"x\"\n");
    fixture.write("above/app/main.rs", "x");
    let mut checkout = checkout(&fixture);
    checkout.root = fixture.path("above/app");
    checkout.sources.folders[0].path = checkout.root.clone();
    checkout.sources.configurations = vec![fixture.path("above/.cargo/config.toml")];
    let scan = try_scan(&fixture, &checkout).unwrap();
    assert_eq!(paths(&scan), ["main.rs"]);
    assert!(scan.notes[0].text.contains("`build.target-dir`"));
}

#[test]
fn an_edit_with_restored_size_and_time_is_seen() {
    let fixture = Fixture::new();
    fixture.write("main.rs", "one");
    fixture.age();
    let before = scanned(&fixture);
    let modified = fs::metadata(fixture.path("main.rs"))
        .unwrap()
        .modified()
        .unwrap();
    fixture.write("main.rs", "two");
    let file = fs::File::options()
        .append(true)
        .open(fixture.path("main.rs"))
        .unwrap();
    file.set_modified(modified).unwrap();
    drop(file);
    let after = scanned(&fixture);
    // Other systems tell such an edit by nothing; there only a new time or size does.
    assert_eq!(cfg!(unix), before.manifest != after.manifest);
    fixture.write("main.rs", "one");
    assert_eq!(
        scanned(&fixture).manifest,
        before.manifest,
        "content decides"
    );
}

/// Puts a wrong digest into the stat cache, so that the next scan shows whether it read the file.
fn falsify_stamps(fixture: &Fixture) {
    let cache = fixture.cache();
    let stamps: Stamps = cache.load_compact(STAMPS).unwrap();
    cache.store_compact(STAMPS, &stamps.falsified()).unwrap();
}

#[test]
fn a_file_that_was_not_touched_is_not_read_again() {
    let fixture = Fixture::new();
    fixture.write("main.rs", "one");
    let honest = scanned(&fixture);
    falsify_stamps(&fixture);
    assert_ne!(scanned(&fixture).manifest, honest.manifest);
}

#[test]
fn a_file_that_was_hashed_right_after_it_was_written_is_read_again() {
    let fixture = Fixture::new();
    fixture.write("main.rs", "one");
    let checkout = checkout(&fixture);
    let now = || {
        let cache = fixture.cache();
        scan_at(
            &checkout,
            &cache,
            false,
            &Gitignore::empty(),
            SystemTime::now(),
        )
        .unwrap()
    };
    let honest = now();
    falsify_stamps(&fixture);
    assert_eq!(now().manifest, honest.manifest);
}

#[test]
fn a_broken_stat_cache_counts_as_none() {
    let fixture = Fixture::new();
    fixture.write("main.rs", "one");
    let honest = scanned(&fixture);
    let file = fixture
        .root()
        .join("../cache")
        .join(format!("{STAMPS}.bin"));
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 5;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    assert_eq!(scanned(&fixture).manifest, honest.manifest);
}

#[test]
fn a_file_that_changed_since_the_scan_is_not_read_as_what_it_was() {
    let fixture = Fixture::new();
    fixture.write("main.rs", "one");
    fixture.write("gone.rs", "one");
    let scan = scanned(&fixture);
    assert_eq!(scan.read(&path("main.rs")).unwrap(), b"one");
    fixture.write("main.rs", "two");
    fs::remove_file(fixture.path("gone.rs")).unwrap();
    for name in ["main.rs", "gone.rs"] {
        let error = scan.read(&path(name)).unwrap_err();
        assert!(
            matches!(&error, ScanError::ChangedMeanwhile { path } if path.as_str() == name),
            "{error}"
        );
    }
}

#[test]
fn a_file_beyond_the_limit_is_named_before_anything_is_read() {
    let fixture = Fixture::new();
    fixture.write("data/dump.sql", "");
    let file = fs::File::options()
        .write(true)
        .open(fixture.path("data/dump.sql"))
        .unwrap();
    file.set_len(MAX_FILE_BYTES + 1).unwrap();
    let error = try_scan(&fixture, &checkout(&fixture)).unwrap_err();
    assert!(error.to_string().contains("`data/dump.sql`"), "{error}");
    assert!(error.hint().unwrap().contains(".rrunignore"));
}

/// The claim that all other rules serve: what is sent is enough for cargo, far from where it came from.
#[test]
fn the_sent_tree_loads_elsewhere() {
    let fixture = Fixture::new();
    fixture.write(
        "ours/Cargo.toml",
        "[workspace]\nmembers = [\"app\"]\n[workspace.dependencies]\nshared = { path = \"../theirs/shared\" }\n",
    );
    fixture.binary(
        "ours/app",
        "app",
        "[dependencies]\nshared.workspace = true\n",
    );
    // The foreign root is a package too. Cargo wants its targets to exist, and no more of it.
    fixture.library(
        "theirs",
        "root",
        "[workspace]\nmembers = [\"shared\", \"other\"]\n[workspace.package]\nlicense = \"MIT\"\n\
         [[bin]]\nname = \"one\"\n[[bench]]\nname = \"speed\"\npath = \"fast.rs\"\n",
    );
    for file in ["src/bin/one.rs", "fast.rs", "src/more.rs", "data"] {
        fixture.write(&format!("theirs/{file}"), "mod more;");
    }
    fixture.library("theirs/shared", "shared", "license.workspace = true\n");
    fixture.library("theirs/other", "other", "");
    fixture.write("unrelated/x", "x");
    let open = |_: &Path| Ok(fixture.cache());
    let (checkout, cache) =
        discover(&fixture.path("ours/app"), &Selection::default(), open).unwrap();
    let scan = scan(&checkout, &cache, false).unwrap();
    assert_eq!(
        paths(&scan),
        [
            "ours/Cargo.toml",
            "ours/app/Cargo.toml",
            "ours/app/src/main.rs",
            "theirs/Cargo.toml",
            "theirs/fast.rs",
            "theirs/shared/Cargo.toml",
            "theirs/shared/src/lib.rs",
            "theirs/src/bin/one.rs",
            "theirs/src/lib.rs"
        ]
    );

    let elsewhere = Fixture::new();
    for (path, _) in scan.manifest.iter() {
        elsewhere.write(path.as_str(), scan.read(path).unwrap());
    }
    let mut command = cargo_metadata::MetadataCommand::new();
    let folder = elsewhere.path("ours");
    command
        .current_dir(&folder)
        .other_options(vec!["--offline".to_owned()]);
    let metadata = command.exec().unwrap();
    assert_eq!(metadata.packages.len(), 2);
}

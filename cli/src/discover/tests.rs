//! Real projects, real cargo.

use super::*;
use crate::fixture::Fixture;

/// Nothing of the machine that the tests run on.
fn surroundings() -> Surroundings {
    Surroundings {
        home: env::home_dir(),
        ..Surroundings::default()
    }
}

fn try_discover(
    fixture: &Fixture,
    folder: &str,
    surroundings: &Surroundings,
) -> Result<Checkout, DiscoverError> {
    let open = |_: &Path| Ok(fixture.cache());
    let found = discover_in(
        &fixture.path(folder),
        &Selection::default(),
        open,
        surroundings,
    );
    found.map(|(checkout, _)| checkout)
}

fn found(fixture: &Fixture, folder: &str) -> Checkout {
    try_discover(fixture, folder, &surroundings()).unwrap()
}

fn folders(checkout: &Checkout, fixture: &Fixture) -> Vec<String> {
    in_order(&checkout.sources.folders, fixture)
}

/// Files that exist.
fn files(checkout: &Checkout, fixture: &Fixture) -> Vec<String> {
    let existing: Vec<Source> = checkout
        .sources
        .files
        .iter()
        .filter(|file| file.path.exists())
        .cloned()
        .collect();
    in_order(&existing, fixture)
}

fn in_order(places: &[Source], fixture: &Fixture) -> Vec<String> {
    let root = fixture.root();
    let relative = |place: &Source| {
        let path = place.path.strip_prefix(&root).unwrap();
        path.to_str().unwrap().replace('\\', "/")
    };
    places.iter().map(relative).collect()
}

#[test]
fn one_package_is_its_folder() {
    let fixture = Fixture::with_app();
    let checkout = found(&fixture, "app");
    assert_eq!(checkout.root, fixture.path("app"));
    assert_eq!(checkout.project_folder, fixture.path("app"));
    assert_eq!(checkout.project.plan.build.package, "app");
    assert_eq!(folders(&checkout, &fixture), ["app"]);
    assert_eq!(checkout.sources.never[0], fixture.path("app/target"));
}

#[test]
fn a_folder_inside_the_package_finds_it_and_a_folder_outside_is_an_error() {
    let fixture = Fixture::with_app();
    assert_eq!(found(&fixture, "app/src").root, fixture.path("app"));
    let error = try_discover(&fixture, "", &surroundings()).unwrap_err();
    assert!(matches!(error, DiscoverError::NoManifest(_)), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn a_workspace_is_its_packages_and_not_what_lies_beside_them() {
    let fixture = Fixture::new();
    fixture.write("Cargo.toml", "[workspace]\nmembers = [\"crates/*\"]\n");
    fixture.binary("crates/one", "one", "");
    fixture.binary("crates/two", "two", "");
    fixture.write("docs/large.bin", "x");
    fixture.write("rust-toolchain.toml", "");
    let checkout = found(&fixture, "crates/two");
    assert_eq!(checkout.project.plan.build.package, "two");
    assert_eq!(checkout.project_folder, fixture.root());
    assert_eq!(folders(&checkout, &fixture), ["crates/one", "crates/two"]);
    assert_eq!(
        files(&checkout, &fixture),
        ["Cargo.toml", "rust-toolchain.toml"]
    );
}

#[test]
fn path_dependencies_of_every_kind_are_found_and_theirs_too() {
    let fixture = Fixture::new();
    fixture.binary(
        "app",
        "app",
        "[dependencies]\nplain = { path = \"../plain\" }\nregistered = \"1\"\n\
         [dev-dependencies]\ntested = { path = \"../tested\" }\n\
         [build-dependencies]\nbuilt = { path = \"../built\" }\n\
         [target.'cfg(windows)'.dependencies]\non_windows = { path = \"../on_windows\" }\n\
         [patch.crates-io]\nregistered = { path = \"../patched\" }\n",
    );
    fixture.library(
        "plain",
        "plain",
        "[dependencies]\ndeeper = { path = \"../deeper\" }\n",
    );
    for name in ["tested", "built", "on_windows", "deeper", "unrelated"] {
        fixture.library(name, name, "");
    }
    fixture.library("patched", "registered", "");
    let checkout = found(&fixture, "app");
    assert_eq!(checkout.root, fixture.root());
    assert_eq!(
        folders(&checkout, &fixture),
        [
            "app",
            "built",
            "deeper",
            "on_windows",
            "patched",
            "plain",
            "tested"
        ]
    );
    assert_eq!(
        checkout
            .project
            .plan
            .build
            .directory
            .as_ref()
            .map(|path| path.as_str()),
        Some("app")
    );
}

#[test]
fn an_inherited_path_dependency_and_the_root_of_a_foreign_workspace_are_found() {
    let fixture = Fixture::new();
    fixture.write(
        "ours/Cargo.toml",
        "[workspace]\nmembers = [\"app\"]\n[workspace.dependencies]\nshared = { path = \"../theirs/shared\" }\nunused = { path = \"../unused\" }\n",
    );
    fixture.binary(
        "ours/app",
        "app",
        "[dependencies]\nshared.workspace = true\n",
    );
    fixture.write(
        "theirs/Cargo.toml",
        "[workspace]\nmembers = [\"shared\", \"other\"]\n[workspace.package]\nlicense = \"MIT\"\n[workspace.dependencies]\ninner = { path = \"inner\" }\n",
    );
    fixture.library(
        "theirs/shared",
        "shared",
        "license.workspace = true\n[dependencies]\ninner.workspace = true\n",
    );
    fixture.library("theirs/inner", "inner", "");
    fixture.library("theirs/other", "other", "");
    fixture.library("unused", "unused", "");
    let checkout = found(&fixture, "ours/app");
    assert_eq!(
        folders(&checkout, &fixture),
        ["ours/app", "theirs/inner", "theirs/shared"]
    );
    assert!(files(&checkout, &fixture).contains(&"theirs/Cargo.toml".to_owned()));
}

#[test]
fn configuration_further_up_counts_and_the_users_own_does_not() {
    let fixture = Fixture::new();
    fixture.binary("home/team/app", "app", "");
    fixture.write("home/team/.cargo/config.toml", "[alias]\nb = \"build\"\n");
    fixture.write("home/.cargo/config.toml", "[alias]\nc = \"check\"\n");
    let mut surroundings = surroundings();
    surroundings.home = Some(fixture.path("home"));
    let checkout = try_discover(&fixture, "home/team/app", &surroundings).unwrap();
    assert_eq!(checkout.root, fixture.path("home/team"));
    assert_eq!(
        files(&checkout, &fixture),
        ["home/team/.cargo/config.toml", "home/team/app/Cargo.toml"]
    );

    fixture.write(
        "home/team/.cargo/config.toml",
        "[build]\ntarget-dir = \"elsewhere\"\n",
    );
    let checkout = try_discover(&fixture, "home/team/app", &surroundings).unwrap();
    assert_eq!(
        checkout.root,
        fixture.path("home/team/app"),
        "nothing of it is sent"
    );
    assert_eq!(
        checkout.sources.never[0],
        fixture.path("home/team/elsewhere")
    );
}

#[test]
fn what_configuration_points_to_is_sent() {
    let fixture = Fixture::new();
    fixture.binary("app", "app", "[dependencies]\n");
    fixture.write(
        "app/.cargo/config.toml",
        "[patch.crates-io]\npatched = { path = \"../patched\" }\n[source.vendored]\ndirectory = \"../vendor\"\n",
    );
    fixture.library("patched", "patched", "");
    fixture.write("vendor/x/Cargo.toml", "");
    assert_eq!(
        folders(&found(&fixture, "app"), &fixture),
        ["app", "patched", "vendor"]
    );
}

#[test]
fn settings_name_more_to_send_and_a_mistake_is_named() {
    let fixture = Fixture::new();
    let settings = "[package.metadata.rrun]\ninclude = [\"../shared\", \"../one.txt\"]\nworking-directory = \"..\"\nassets = [\"../static\", \"../made\"]\n";
    fixture.binary("app", "app", settings);
    fixture.write("shared/data", "x");
    fixture.write("static/page", "x");
    fixture.write("one.txt", "x");
    let checkout = found(&fixture, "app");
    assert_eq!(checkout.root, fixture.root());
    assert_eq!(folders(&checkout, &fixture), ["app", "shared", "static"]);
    assert!(files(&checkout, &fixture).contains(&"one.txt".to_owned()));
    assert!(checkout.notes[0].text.contains("made"));

    fs::remove_file(fixture.path("one.txt")).unwrap();
    let error = try_discover(&fixture, "app", &surroundings()).unwrap_err();
    assert!(error.to_string().contains("one.txt"), "{error}");
}

#[test]
fn what_cargo_refuses_is_said_with_its_words() {
    let fixture = Fixture::new();
    fixture.write(
        "app/Cargo.toml",
        "[package]\nname = \"app\"\nversion = \"x\"\n",
    );
    fixture.write("app/src/main.rs", "");
    let error = try_discover(&fixture, "app", &surroundings()).unwrap_err();
    assert!(matches!(error, DiscoverError::Cargo { .. }), "{error}");
    fixture.write("app/Cargo.toml", "[package\n");
    let error = try_discover(&fixture, "app", &surroundings()).unwrap_err();
    assert!(matches!(error, DiscoverError::Manifest { .. }), "{error}");
}

/// Marks what is remembered, so that a later discovery shows whether it asked again.
fn mark(fixture: &Fixture, folder: &str) {
    fixture.age();
    found(fixture, folder);
    let folder = fixture.path(folder);
    let digest = Digest::of(folder.as_os_str().as_encoded_bytes()).to_string();
    let name = format!("project-{}", &digest[..8]);
    let mut memory: Memory = fixture
        .cache()
        .load_compact(&name)
        .expect("it is remembered");
    memory.layout.sources.folders[0].why = "remembered".to_owned();
    fixture.cache().store_compact(&name, &memory).unwrap();
}

fn is_remembered(checkout: &Checkout) -> bool {
    let mut folders = checkout.sources.folders.iter();
    folders.any(|folder| folder.why == "remembered")
}

#[test]
fn an_unchanged_project_runs_no_cargo() {
    let fixture = Fixture::with_app();
    mark(&fixture, "app");
    fixture.write("app/src/main.rs", "fn main() { }\n");
    assert!(is_remembered(&found(&fixture, "app")));
}

#[test]
fn whatever_could_change_the_answer_makes_it_ask_again() {
    type Change = (&'static str, fn(&Fixture));
    let changes: [Change; 9] = [
        ("a manifest", |fixture| {
            fixture.binary("ws/crates/one", "one", "[features]\nx = []\n");
        }),
        ("a new member", |fixture| {
            fixture.binary("ws/crates/three", "three", "")
        }),
        ("a new binary", |fixture| {
            fixture.write("ws/crates/one/src/bin/more.rs", "fn main() {}");
        }),
        ("a new configuration further up", |fixture| {
            fixture.write(".cargo/config.toml", "[build]\ntarget-dir = \"x\"\n");
        }),
        ("a toolchain file", |fixture| {
            fixture.write("ws/rust-toolchain", "")
        }),
        ("the manifest of a dependency", |fixture| {
            fixture.library("dep", "dep", "[dependencies]\n");
        }),
        ("the root of a dependency's workspace", |fixture| {
            fixture.write("Cargo.toml", "[workspace]\nexclude = [\"ws\"]\n");
        }),
        ("a dependency that is gone", |fixture| {
            fs::remove_dir_all(fixture.path("dep")).unwrap();
        }),
        ("a new root", |fixture| {
            fixture.write("ws/Cargo.toml", "[workspace]\nmembers = [\"crates/one\"]\n");
        }),
    ];
    for (what, change) in changes {
        let fixture = Fixture::new();
        fixture.write("ws/Cargo.toml", "[workspace]\nmembers = [\"crates/*\"]\n");
        fixture.binary(
            "ws/crates/one",
            "one",
            "[dependencies]\ndep = { path = \"../../../dep\" }\n",
        );
        fixture.library("ws/crates/two", "two", "");
        fixture.library("dep", "dep", "");
        mark(&fixture, "ws/crates/one");
        assert!(is_remembered(&found(&fixture, "ws/crates/one")));
        change(&fixture);
        let after = try_discover(&fixture, "ws/crates/one", &surroundings());
        assert!(after.is_err() || !is_remembered(&after.unwrap()), "{what}");
    }
}

#[test]
fn another_target_directory_in_the_environment_makes_it_ask_again() {
    let fixture = Fixture::with_app();
    mark(&fixture, "app");
    let mut surroundings = surroundings();
    let elsewhere = fixture.path("elsewhere");
    surroundings
        .variables
        .insert("CARGO_TARGET_DIR".to_owned(), elsewhere.clone().into());
    let build = fixture.path("build");
    surroundings
        .variables
        .insert("CARGO_BUILD_BUILD_DIR".to_owned(), build.clone().into());
    let checkout = try_discover(&fixture, "app", &surroundings).unwrap();
    assert_eq!(checkout.sources.never[0], elsewhere);
    // Cargo has had build directories apart from the target's since 1.91.
    assert!(
        checkout.sources.never[1..]
            .iter()
            .all(|path| *path == build)
    );
}

#[test]
fn a_manifest_that_was_just_written_is_not_remembered() {
    let fixture = Fixture::with_app();
    mark(&fixture, "app");
    fixture.binary("app", "app", "[features]\nx = []\n");
    found(&fixture, "app");
    let digest = Digest::of(fixture.path("app").as_os_str().as_encoded_bytes()).to_string();
    let memory: Option<Memory> = fixture
        .cache()
        .load_compact(&format!("project-{}", &digest[..8]));
    assert!(memory.is_none_or(|memory| !memory.account.holds()));
}

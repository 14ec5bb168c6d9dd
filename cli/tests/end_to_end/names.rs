//! Names and contents that some program on the way might change: none does.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
};

use crate::harness::{Agent, Laptop, Project};

/// Names that are unusual and allowed. The second `ü` consists of `u` and a combining mark, as macOS writes it.
const NAMES: [&str; 11] = [
    "a b/c d.txt",
    " leading and trailing ",
    "ü.txt",
    "u\u{308}.txt",
    "日本語/ファイル.txt",
    "👩\u{200d}👩\u{200d}👧.txt",
    "-rf",
    "--config=x",
    "back\\slash",
    "quo\"te'$(x)`x`",
    "...",
];

/// Contents that a program for text would change.
fn contents() -> BTreeMap<&'static str, Vec<u8>> {
    BTreeMap::from([
        ("empty", Vec::new()),
        ("latin1", b"caf\xe9\n".to_vec()),
        ("no text", (0..=255).collect()),
        ("crlf", b"one\r\ntwo\nthree\rfour\r\n".to_vec()),
        ("bom", b"\xef\xbb\xbfwith a mark".to_vec()),
        ("decomposed", "u\u{308}\n".as_bytes().to_vec()),
        ("zeros", vec![0; 5000]),
        ("no end of line", b"x".to_vec()),
    ])
}

#[test]
fn unusual_names_and_contents_arrive_byte_for_byte() {
    let (laptop, project) = (Laptop::new(), Project::new());
    let agent = Agent::new(&[&laptop]);
    let mut expected = BTreeMap::new();
    for name in NAMES {
        expected.insert(format!("names/{name}"), name.as_bytes().to_vec());
    }
    for (name, content) in contents() {
        expected.insert(format!("contents/{name}"), content);
    }
    let write = |files: &BTreeMap<String, Vec<u8>>| {
        for (path, content) in files {
            project.write(path, "");
            fs::write(project.path(path), content).unwrap();
        }
    };
    // What git would do to line ends is nobody else's to do.
    project.write(".gitattributes", "* text=auto eol=lf\n");
    write(&expected);
    symlink("./../names//ü.txt", project.path("contents/link")).unwrap();
    fs::set_permissions(
        project.path("contents/empty"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    laptop.push_live(&project, &agent);
    let arrived = |files: &BTreeMap<String, Vec<u8>>| {
        for (path, content) in files {
            assert!(
                fs::read(agent.tree(path)).unwrap() == *content,
                "{path} is another one"
            );
        }
    };
    arrived(&expected);
    let found = fs::read_dir(agent.tree("names")).unwrap().count();
    assert_eq!(found, fs::read_dir(project.path("names")).unwrap().count());
    let link = fs::read_link(agent.tree("contents/link")).unwrap();
    assert_eq!(link.to_str(), Some("./../names//ü.txt"));
    let mode = |path: &str| {
        let metadata = fs::metadata(agent.tree(path)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(
        (mode("contents/empty"), mode("contents/crlf")),
        (0o755, 0o644)
    );
    assert_eq!(laptop.push(&project, &agent, &[]).outcome(), "unchanged");

    // Once more as differences to what lies there, one of them to nothing.
    for content in expected.values_mut() {
        match content.pop() {
            Some(_) => content.extend(b"\r\n\xff"),
            None => content.push(0),
        }
    }
    expected.insert("names/-rf".to_owned(), Vec::new());
    write(&expected);
    laptop.push_live(&project, &agent);
    arrived(&expected);
}

#[cfg(target_os = "linux")]
#[test]
fn names_that_differ_only_in_case_are_two_files_and_warned_of() {
    let (laptop, project) = (Laptop::new(), Project::new());
    let agent = Agent::new(&[&laptop]);
    let files = [
        ("doc/Readme.txt", "one"),
        ("doc/README.txt", "two"),
        ("Doc/readme.txt", "three"),
        ("doc/Ü.txt", "four"),
        ("doc/ü.txt", "five"),
    ];
    for (path, content) in files {
        project.write(path, content);
    }
    let url = agent.url();
    let ran = laptop.run(&project.folder, &["push", "--url", &url]);
    assert_eq!(ran.code, 0, "{ran:?}");
    for warning in [
        "`README.txt` and `Readme.txt` in `doc` differ only in case",
        "`Doc` and `doc` differ only in case",
        "`Ü.txt` and `ü.txt` in `doc` differ only in case",
    ] {
        assert!(ran.stderr.contains(warning), "{warning}: {}", ran.stderr);
    }
    for (path, content) in files {
        assert_eq!(fs::read_to_string(agent.tree(path)).unwrap(), content);
    }
    // One goes, the other stays.
    fs::remove_file(project.path("doc/README.txt")).unwrap();
    laptop.push_live(&project, &agent);
    assert!(agent.tree("doc/Readme.txt").exists() && !agent.tree("doc/README.txt").exists());
}

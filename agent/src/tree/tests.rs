//! What a tree promises, on real files.

use super::*;

/// A workspace in a temporary folder.
struct Bench {
    _folder: tempfile::TempDir,
    layout: Layout,
}

/// Path, kind and content.
type File<'t> = (&'t str, Kind, &'t str);

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::create(folder.path()).unwrap();
        Self {
            _folder: folder,
            layout,
        }
    }

    fn open(&self) -> Tree {
        Tree::open(&self.layout).unwrap()
    }

    fn stage(&self, files: &[File<'_>]) -> (Manifest, Staged) {
        let staged = Staged::new(&self.layout).unwrap();
        let entries: Vec<_> = files
            .iter()
            .map(|(path, kind, content)| {
                (
                    TreePath::new(*path).unwrap(),
                    staged.store(*kind, &mut content.as_bytes()).unwrap(),
                )
            })
            .collect();
        (Manifest::new(entries).unwrap(), staged)
    }

    fn apply(&self, tree: &mut Tree, files: &[File<'_>]) -> Applied {
        let (target, staged) = self.stage(files);
        tree.apply(target, &staged).unwrap()
    }

    fn path(&self, path: &str) -> PathBuf {
        self.layout.tree().join(path)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    /// Names of the pristine copies.
    fn contents(&self) -> BTreeSet<std::ffi::OsString> {
        let contents = fs::read_dir(self.layout.contents()).unwrap();
        contents.map(|item| item.unwrap().file_name()).collect()
    }

    /// Every file below the tree's folder, whoever made it.
    fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.layout.tree()];
        while let Some(folder) = folders.pop() {
            for item in fs::read_dir(folder).unwrap() {
                let path = item.unwrap().path();
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path);
                } else {
                    found.push(
                        path.strip_prefix(self.layout.tree())
                            .unwrap()
                            .to_str()
                            .unwrap()
                            .to_owned(),
                    );
                }
            }
        }
        found.sort();
        found
    }
}

fn file<'t>(path: &'t str, content: &'t str) -> File<'t> {
    (path, Kind::File, content)
}

fn modified(path: &Path) -> SystemTime {
    fs::symlink_metadata(path).unwrap().modified().unwrap()
}

#[test]
fn the_tree_becomes_the_target_whatever_moved() {
    let bench = Bench::new();
    let mut tree = bench.open();
    bench.apply(
        &mut tree,
        &[file("foo.rs", "1"), file("a/b/c", "2"), file("x", "3")],
    );
    let target = [
        file("foo/mod.rs", "1"),
        ("x", Kind::Executable, "3"),
        ("link", Kind::Symlink, "foo/mod.rs"),
    ];
    bench.apply(&mut tree, &target);
    assert_eq!(bench.files(), ["foo/mod.rs", "link", "x"]);
    assert!(!bench.path("a").exists(), "folders that became empty go");
    assert_eq!(
        fs::metadata(bench.path("x")).unwrap().permissions().mode() & 0o777,
        0o755
    );
    assert_eq!(bench.read("link"), "1");
    let (expected, _staged) = bench.stage(&target);
    assert_eq!(tree.digest(), expected.tree_digest());
    assert_eq!(
        bench.open().digest(),
        expected.tree_digest(),
        "it is remembered"
    );
    bench.apply(&mut tree, &[file("foo", "file again")]);
    assert_eq!(bench.files(), ["foo"]);
}

#[test]
fn unchanged_files_keep_their_time_and_changed_ones_are_newer_than_the_last_build() {
    let bench = Bench::new();
    let mut tree = bench.open();
    bench.apply(&mut tree, &[file("same", "1"), file("changed", "1")]);
    let before = modified(&bench.path("same"));
    // A build that ended in the future, as after a clock was set back.
    tree.last_build = now() + Duration::from_secs(3600);
    bench.apply(&mut tree, &[file("same", "1"), file("changed", "2")]);
    assert_eq!(modified(&bench.path("same")), before);
    let changed = modified(&bench.path("changed"))
        .duration_since(UNIX_EPOCH)
        .unwrap();
    assert!(
        changed >= tree.last_build + TICK,
        "{changed:?} {:?}",
        tree.last_build
    );
}

#[test]
fn a_changed_file_written_right_after_a_build_is_newer_and_not_in_the_future() {
    let bench = Bench::new();
    let mut tree = bench.open();
    tree.build_ended(true);
    bench.apply(&mut tree, &[file("changed", "1")]);
    let changed = modified(&bench.path("changed"));
    assert!(changed.duration_since(UNIX_EPOCH).unwrap() >= tree.last_build + TICK);
    assert!(changed <= SystemTime::now());
}

#[test]
fn what_the_build_changed_is_put_back_and_named() {
    let bench = Bench::new();
    let mut tree = bench.open();
    let files = [
        file("Cargo.lock", "pushed"),
        file("other", "1"),
        file("gone", "2"),
    ];
    bench.apply(&mut tree, &files);
    fs::write(bench.path("Cargo.lock"), "longer than pushed").unwrap();
    fs::write(bench.path("generated"), "not pushed").unwrap();
    fs::remove_file(bench.path("gone")).unwrap();
    let applied = bench.apply(&mut tree, &files);
    assert_eq!(
        applied.restored,
        ["Cargo.lock", "gone"].map(|path| TreePath::new(path).unwrap())
    );
    assert_eq!(
        (
            bench.read("Cargo.lock").as_str(),
            bench.read("gone").as_str()
        ),
        ("pushed", "2")
    );
    assert_eq!(
        bench.read("generated"),
        "not pushed",
        "what was not pushed is left alone"
    );
    // The same while the agent was not running.
    fs::write(bench.path("other"), "x").unwrap();
    bench.open();
    assert_eq!(bench.read("other"), "1");
}

#[test]
fn a_link_in_the_way_is_replaced_and_never_followed() {
    let bench = Bench::new();
    let mut tree = bench.open();
    let outside = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path(), bench.path("src")).unwrap();
    std::os::unix::fs::symlink(outside.path().join("target"), bench.path("file")).unwrap();
    bench.apply(&mut tree, &[file("src/main.rs", "1"), file("file", "2")]);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(
        (
            bench.read("src/main.rs").as_str(),
            bench.read("file").as_str()
        ),
        ("1", "2")
    );
    assert!(!bench.path("file").is_symlink());
}

/// A build or the app may have put anything in a pushed file's place.
#[cfg(target_os = "linux")]
#[test]
fn a_named_pipe_in_a_pushed_file_s_place_is_replaced_and_never_read() {
    let bench = Bench::new();
    let mut tree = bench.open();
    bench.apply(&mut tree, &[file("a", "1"), file("b", "1")]);
    fs::remove_file(bench.path("a")).unwrap();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, bench.path("a"), mode).unwrap();
    let applied = bench.apply(&mut tree, &[file("a", "1"), file("b", "2")]);
    assert_eq!(applied.restored, [TreePath::new("a").unwrap()]);
    assert_eq!((bench.read("a"), bench.read("b")), ("1".into(), "2".into()));
}

#[test]
fn a_folder_that_became_a_link_to_a_copy_is_made_anew_with_all_its_files() {
    let bench = Bench::new();
    let mut tree = bench.open();
    let files = [file("src/a", "1"), file("src/b", "1"), file("other/b", "1")];
    bench.apply(&mut tree, &files);
    fs::rename(bench.path("src"), bench.path("copy")).unwrap();
    std::os::unix::fs::symlink("copy", bench.path("src")).unwrap();
    bench.apply(
        &mut tree,
        &[file("src/a", "2"), file("src/b", "1"), file("other/b", "1")],
    );
    assert!(!bench.path("src").is_symlink());
    assert_eq!(
        (bench.read("src/a"), bench.read("src/b")),
        ("2".into(), "1".into())
    );
    assert_eq!(
        bench.read("copy/a"),
        "1",
        "what was not pushed is left alone"
    );
}

#[test]
fn deleting_does_not_follow_a_link_to_another_pushed_file() {
    let bench = Bench::new();
    let mut tree = bench.open();
    bench.apply(&mut tree, &[file("old/a", "1"), file("other/a", "1")]);
    fs::remove_dir_all(bench.path("old")).unwrap();
    std::os::unix::fs::symlink("other", bench.path("old")).unwrap();
    bench.apply(&mut tree, &[file("other/a", "1")]);
    assert_eq!(bench.read("other/a"), "1");
}

#[test]
fn what_a_build_left_gives_way_to_pushed_files_and_folders() {
    let bench = Bench::new();
    let mut tree = bench.open();
    bench.apply(&mut tree, &[file("a", "1")]);
    fs::create_dir_all(bench.path("file/deep/er")).unwrap();
    fs::write(bench.path("file/deep/er/x"), "built").unwrap();
    fs::write(bench.path("folder"), "built").unwrap();
    std::os::unix::fs::symlink("/", bench.path("linked")).unwrap();
    let target = [
        file("file", "2"),
        file("folder/a", "3"),
        file("linked/etc/b", "4"),
    ];
    bench.apply(&mut tree, &target);
    assert_eq!(bench.files(), ["file", "folder/a", "linked/etc/b"]);
}

#[test]
fn a_push_that_was_interrupted_after_its_commit_point_is_finished_at_the_next_start() {
    let bench = Bench::new();
    let mut tree = bench.open();
    bench.apply(&mut tree, &[file("a", "1"), file("b", "1"), file("c", "1")]);
    let (target, staged) = bench.stage(&[file("a", "2"), file("b", "2"), file("d", "2")]);
    let paths = |names: &[&str]| {
        names
            .iter()
            .map(|name| TreePath::new(*name).unwrap())
            .collect::<Vec<_>>()
    };
    // As far as the commit point, and half of what follows it.
    tree.take_over(&staged).unwrap();
    let journal = Journal {
        target: target.clone(),
        write: paths(&["a", "b", "d"]),
        delete: paths(&["c"]),
    };
    bench.layout.store(JOURNAL, &journal).unwrap();
    fs::write(bench.path("a"), "2").unwrap();
    drop(tree);
    let tree = bench.open();
    assert_eq!(tree.digest(), target.tree_digest());
    assert_eq!(bench.files(), ["a", "b", "d"]);
    assert_eq!(bench.read("b"), "2");
    assert!(!bench.layout.state(JOURNAL).exists());
}

#[test]
fn an_apply_that_fails_after_its_commit_point_is_finished_before_the_next_one() {
    let bench = Bench::new();
    let mut tree = bench.open();
    bench.apply(&mut tree, &[file("a", "1"), file("b", "1")]);
    // A folder in the manifest's place: nothing can be renamed over it.
    fs::remove_file(bench.layout.state(MANIFEST)).unwrap();
    fs::create_dir(bench.layout.state(MANIFEST)).unwrap();
    let (target, staged) = bench.stage(&[file("a", "2"), file("new", "2")]);
    let digest = target.tree_digest();
    assert!(tree.apply(target, &staged).is_err());
    assert!(tree.recover().is_err(), "still in the way");
    fs::remove_dir(bench.layout.state(MANIFEST)).unwrap();
    tree.recover().unwrap();
    assert_eq!((tree.digest(), bench.files().len()), (digest, 2));
    // What the failed push brought does not stay behind when the next one takes it back.
    bench.apply(&mut tree, &[file("a", "1")]);
    assert_eq!(
        (bench.files(), bench.read("a")),
        (vec!["a".to_owned()], "1".to_owned())
    );
}

#[test]
fn an_apply_that_fails_before_its_commit_point_changes_nothing_and_keeps_no_room() {
    let bench = Bench::new();
    let mut tree = bench.open();
    bench.apply(&mut tree, &[file("a", "1")]);
    let (before, digest) = (bench.contents(), tree.digest());
    fs::create_dir(bench.layout.state(JOURNAL)).unwrap();
    let (target, staged) = bench.stage(&[file("a", "2"), file("b", "2")]);
    assert!(tree.apply(target, &staged).is_err());
    drop(staged);
    assert_eq!((tree.digest(), bench.read("a")), (digest, "1".to_owned()));
    assert_eq!(
        (bench.files(), bench.contents()),
        (vec!["a".to_owned()], before)
    );
    assert_eq!(fs::read_dir(bench.layout.staging()).unwrap().count(), 0);
}

#[test]
fn what_a_crash_left_beside_the_tree_is_gone_after_the_next_start() {
    let bench = Bench::new();
    let mut tree = bench.open();
    bench.apply(&mut tree, &[file("a", "1")]);
    let before = bench.contents();
    let (_, staged) = bench.stage(&[file("b", "2")]);
    tree.take_over(&staged).unwrap();
    let (_, staged) = bench.stage(&[file("c", "3")]);
    std::mem::forget(staged);
    drop(tree);
    bench.open();
    assert_eq!(bench.contents(), before);
    assert_eq!(fs::read_dir(bench.layout.staging()).unwrap().count(), 0);
}

#[test]
fn lost_contents_make_the_tree_another_one_so_that_they_are_sent_again() {
    let bench = Bench::new();
    let mut tree = bench.open();
    bench.apply(&mut tree, &[file("a", "1"), file("b", "2")]);
    fs::remove_file(bench.layout.contents().join(Digest::of(b"2").to_string())).unwrap();
    let tree = bench.open();
    assert_eq!(tree.manifest().len(), 1);
    assert_eq!(bench.files(), ["a"]);
}

#[test]
fn touched_files_are_known_until_a_build_of_the_plan_succeeds() {
    let bench = Bench::new();
    let mut tree = bench.open();
    let (dev, release) = (Digest::of(b"dev"), Digest::of(b"release"));
    tree.built(dev);
    bench.apply(&mut tree, &[file("a", "1")]);
    bench.apply(&mut tree, &[file("a", "1"), file("b", "1")]);
    tree.partly_built(dev, &BTreeSet::from(["unit".to_owned()]));
    bench.apply(&mut tree, &[file("a", "1"), file("b", "2")]);
    drop(tree);
    let mut tree = bench.open();
    let touched = tree.touched(&dev);
    let compiled: Vec<(&str, usize)> = touched
        .iter()
        .map(|(path, units)| (path.as_str(), units.len()))
        .collect();
    assert_eq!(compiled, [("a", 1), ("b", 0)]);
    assert_eq!(
        tree.touched(&release).len(),
        2,
        "a plan that never built takes all for touched"
    );
    tree.built(dev);
    assert!(tree.touched(&dev).is_empty());
}

#[test]
fn a_folder_that_was_filled_while_an_image_was_built_is_taken_as_the_tree() {
    let bench = Bench::new();
    fs::create_dir_all(bench.path("src")).unwrap();
    fs::create_dir_all(bench.path(".git")).unwrap();
    fs::write(bench.path(".git/config"), "").unwrap();
    fs::write(bench.path("src/main.rs"), "fn main() {}").unwrap();
    std::os::unix::fs::symlink("src/main.rs", bench.path("link")).unwrap();
    let mut tree = bench.open();
    let before = modified(&bench.path("src/main.rs"));
    tree.adopt().unwrap();
    let (expected, _staged) = bench.stage(&[
        file("src/main.rs", "fn main() {}"),
        ("link", Kind::Symlink, "src/main.rs"),
    ]);
    assert_eq!(tree.digest(), expected.tree_digest());
    assert_eq!(bench.open().digest(), expected.tree_digest());
    assert_eq!(modified(&bench.path("src/main.rs")), before);
}

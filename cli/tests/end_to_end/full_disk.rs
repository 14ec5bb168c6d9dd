//! A disk that is full at some step of a push: the error says what and where, the old version serves, room is made, and a
//! later push succeeds. The disk is a real one, of a few megabytes.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use crate::harness::{Agent, Laptop, Project, Ran, may_skip, wait_for};

/// Holds a few builds of the smallest app.
const DISK: &str = "size=64m";

/// A small file system, gone with the test.
struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    /// `None` where nobody may mount one.
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", DISK, "none"])
            .arg(folder.path())
            .output();
        let mounted = mounted.is_ok_and(|output| output.status.success());
        (!may_skip(mounted, "mount")).then_some(Self { folder })
    }

    /// Writes until only `room` bytes are left.
    fn fill(&self, room: u64) {
        let statistics = rustix::fs::statvfs(self.folder.path()).unwrap();
        let free = statistics.f_bavail * statistics.f_frsize;
        let mut filler = fs::File::create(self.filler()).unwrap();
        let zeros = vec![0; usize::try_from(free.saturating_sub(room)).unwrap()];
        // What others write at the same time may be too much; then it is full all the same.
        let _ = filler.write_all(&zeros);
    }

    fn clear(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.folder.path().join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount")
            .arg("-l")
            .arg(self.folder.path())
            .status();
        assert!(unmounted.unwrap().success());
    }
}

/// An agent on a small disk that serves its second version.
struct Setting {
    laptop: Laptop,
    project: Project,
    agent: Agent,
    disk: Disk,
}

impl Setting {
    fn new() -> Option<Self> {
        let disk = Disk::mount()?;
        let laptop = Laptop::new();
        let agent = Agent::started_by(&[], &[&laptop], |workspace: &Path| {
            symlink(disk.folder.path(), workspace).unwrap();
        });
        let project = Project::new();
        for answer in ["zero", "one"] {
            project.answer(answer);
            laptop.push_live(&project, &agent);
        }
        Some(Self {
            laptop,
            project,
            agent,
            disk,
        })
    }

    /// Pushes `answer` with the disk full from `point` on.
    fn push_full_from(&self, point: &str, answer: &str) -> Ran {
        self.project.answer(answer);
        self.agent.wait_at(point);
        let push = self.laptop.start_push(&self.project, &self.agent, &[]);
        self.agent.reached();
        self.disk.fill(0);
        self.agent.go_on();
        push.end()
    }

    /// What has to be true after a push that found no room, and that the next one succeeds once there is some.
    fn check(&self, failed: &Ran, (code, outcome): (i32, &str), said: &[&str]) {
        let end = failed.end();
        assert_eq!(
            (failed.code, failed.outcome().as_str()),
            (code, outcome),
            "{}{}",
            failed.stdout,
            failed.stderr
        );
        let said_there = end.to_string() + &failed.stderr;
        for part in said.iter().chain(&["removed to make room"]) {
            assert!(said_there.contains(part), "no {part}: {said_there}");
        }
        assert_eq!(self.agent.get("/").body, "one");
        let workspace = self.agent.workspace();
        let count = |folder: &str| fs::read_dir(workspace.join(folder)).unwrap().count();
        wait_for("staging to be empty", || count("state/staging") == 0);
        assert_eq!(count("generations"), 1, "only what serves is kept");
        assert!(!workspace.join("target/debug/incremental").exists());
        self.disk.clear();
        self.laptop.push_live(&self.project, &self.agent);
        let source = self.project.read("src/main.rs");
        assert_eq!(
            fs::read_to_string(self.agent.tree("src/main.rs")).unwrap(),
            source
        );
        assert!(source.contains(&format!("{:?}", self.agent.get("/").body)));
    }
}

/// Bytes that do not compress.
fn noise(length: usize) -> String {
    let mut state = 1u64;
    let mut noise = String::new();
    while noise.len() < length {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        noise += &format!("{state:016x}");
    }
    noise
}

#[test]
fn a_push_that_finds_no_room_to_arrive_is_refused_by_name() {
    let Some(setting) = Setting::new() else {
        return;
    };
    // Digits compress to half: one request carries it.
    setting.project.write("large.txt", &noise(3 << 19));
    setting.project.answer("two");
    setting.disk.fill(64 << 10);
    let failed = setting.laptop.push(&setting.project, &setting.agent, &[]);
    let said = ["No space left on device", "large.txt", "state/staging"];
    setting.check(&failed, (3, "refused"), &said);
}

#[test]
fn a_part_that_finds_no_room_is_refused_by_name() {
    let Some(setting) = Setting::new() else {
        return;
    };
    setting.project.write("large.txt", &noise(4 << 20));
    setting.project.answer("two");
    setting.disk.fill(64 << 10);
    let failed = setting.laptop.push(&setting.project, &setting.agent, &[]);
    let said = ["No space left on device", "part", "state/staging"];
    setting.check(&failed, (3, "refused"), &said);
}

#[test]
fn a_push_that_finds_no_room_in_the_tree_changes_nothing() {
    let Some(setting) = Setting::new() else {
        return;
    };
    let failed = setting.push_full_from("contents moved", "two");
    let said = ["No space left on device", "tree/src/main.rs"];
    assert!(
        fs::read_to_string(setting.agent.tree("src/main.rs"))
            .unwrap()
            .contains("\"one\"")
    );
    setting.check(&failed, (1, "failed"), &said);
}

#[test]
fn a_push_that_finds_no_room_in_the_middle_of_its_apply_is_finished_by_the_next_one() {
    let Some(setting) = Setting::new() else {
        return;
    };
    setting
        .project
        .write("added.txt", "added by a push that failed");
    let failed = setting.push_full_from("files written", "two");
    fs::remove_file(setting.project.path("added.txt")).unwrap();
    setting.check(
        &failed,
        (1, "failed"),
        &["No space left on device", "state/manifest"],
    );
    assert!(!setting.agent.tree("added.txt").exists());
}

#[test]
fn a_build_that_finds_no_room_is_no_compile_error() {
    let Some(setting) = Setting::new() else {
        return;
    };
    let failed = setting.push_full_from("contents dropped", "two");
    setting.check(&failed, (1, "failed"), &["no room to build", "/target"]);
}

#[test]
fn a_version_that_finds_no_room_to_be_published_is_built_and_published_later() {
    let Some(setting) = Setting::new() else {
        return;
    };
    let failed = setting.push_full_from("built", "two");
    setting.check(
        &failed,
        (1, "failed"),
        &["No space left on device", "generations/3"],
    );
}

#[test]
fn a_version_that_serves_is_live_though_the_disk_is_full() {
    let Some(mut setting) = Setting::new() else {
        return;
    };
    let pushed = setting.push_full_from("starting", "two");
    assert_eq!(
        (pushed.code, pushed.outcome().as_str()),
        (0, "live"),
        "{}",
        pushed.stdout
    );
    assert_eq!(setting.agent.get("/").body, "two");
    setting.agent.restart(|_| {});
    wait_for("the last good version", || {
        setting.agent.get("/").body == "two"
    });
    let again = setting.laptop.push(&setting.project, &setting.agent, &[]);
    assert_eq!(again.outcome(), "unchanged");
}

//! The agent is killed, at every step of a push and at any time: afterwards the tree is the old or the new one, the last good
//! version serves without a build, nothing of the dead agent runs on, and the next push succeeds.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use rrun_protocol::{Entry, Kind, Manifest, TreeDigest, TreePath};

use crate::harness::{Agent, Laptop, MAIN, Project, wait_for};

/// Which of the two trees, or of the two versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Old,
    New,
    /// Another task of the agent decides that at the same time.
    Either,
}
use Which::{Either, New, Old};

/// The agent's fault points in the order of a push: the tree that lies there after a death at this point and a start, and
/// the version that serves.
const STEPS: [(&str, Which, Which); 19] = [
    ("receiving", Old, Old),
    ("staged", Old, Old),
    ("contents moved", Old, Old),
    ("state written", Old, Old),
    ("prepared", Old, Old),
    ("journal written", New, Old),
    ("half applied", New, Old),
    ("files written", New, Old),
    ("manifest written", New, Old),
    ("contents dropped", New, Old),
    ("building", New, Old),
    ("built", New, Old),
    ("publishing", New, Old),
    ("published", New, Old),
    ("starting", New, Old),
    ("switching", New, Old),
    ("draining", New, Either),
    ("serving noted", New, New),
    ("generation removed", New, New),
];

/// A project of several files, all of which are other ones in each version.
struct Versions {
    project: Project,
    number: u32,
}

impl Versions {
    fn new() -> Self {
        let project = Project::new();
        project.write(
            "src/main.rs",
            &MAIN.replace("\"one\"", "include_str!(\"answer.txt\")"),
        );
        let mut versions = Self { project, number: 0 };
        versions.next();
        versions
    }

    /// Changes, adds and deletes files.
    fn next(&mut self) {
        let _ = fs::remove_file(self.project.path(&format!("notes/{}.txt", self.number)));
        self.number += 1;
        let answer = self.answer();
        for path in ["src/answer.txt", "notes/last.txt"] {
            self.project.write(path, &answer);
        }
        self.project
            .write(&format!("notes/{}.txt", self.number), &answer);
    }

    fn answer(&self) -> String {
        format!("version {}", self.number)
    }

    fn manifest(&self) -> Manifest {
        manifest(&self.project.folder)
    }
}

/// The files that lie in a folder, read one by one.
fn manifest(root: &Path) -> Manifest {
    let mut entries = Vec::new();
    for path in files(root) {
        let executable = fs::metadata(&path).unwrap().permissions().mode() & 0o100 != 0;
        let kind = if executable {
            Kind::Executable
        } else {
            Kind::File
        };
        let name = path.strip_prefix(root).unwrap().to_str().unwrap();
        let entry = Entry::of(kind, &fs::read(&path).unwrap());
        entries.push((TreePath::new(name).unwrap(), entry));
    }
    Manifest::new(entries).unwrap()
}

fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for item in fs::read_dir(root).unwrap() {
        let path = item.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// Processes that an agent of this workspace started: by their program, their folder or their target directory.
pub(crate) fn processes_of(workspace: &Path) -> BTreeSet<u32> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return BTreeSet::new();
    };
    let is_of = |process: &Path| {
        let leads_there = |link: &str| {
            fs::read_link(process.join(link)).is_ok_and(|target| target.starts_with(workspace))
        };
        let target = format!("CARGO_TARGET_DIR={}", workspace.join("target").display());
        let builds_there = || {
            let environment = fs::read(process.join("environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|line| line == target.as_bytes())
        };
        leads_there("exe") || leads_there("cwd") || builds_there()
    };
    let numbered = processes.filter_map(|item| {
        let path = item.ok()?.path();
        let number = path.file_name()?.to_str()?.parse().ok()?;
        is_of(&path).then_some(number)
    });
    numbered.collect()
}

/// What has to be true of an agent that was killed and has started again, whenever that was.
fn check_recovered(agent: &Agent, laptop: &Laptop, trees: [&Manifest; 2]) -> TreeDigest {
    let found = manifest(&agent.workspace().join("tree"));
    assert!(
        trees.contains(&&found),
        "the tree is neither the old nor the new one: {found:?}"
    );
    let status = agent.status(laptop);
    let tree = found.tree_digest();
    assert_eq!(status["tree"], serde_json::to_value(tree).unwrap());
    let log = agent.signed(laptop, "GET", "/_rrun/builds/latest/log", &[], b"");
    assert_eq!(log.status, 404, "it built: {}", log.body);
    // A small state file may be on its way through it at this moment.
    let staging = agent.workspace().join("state/staging");
    wait_for("staging to be empty", || {
        fs::read_dir(&staging).unwrap().count() == 0
    });
    for generation in fs::read_dir(agent.workspace().join("generations")).unwrap() {
        let generation = generation.unwrap().path();
        assert!(
            generation.join("generation.json").exists(),
            "{}",
            generation.display()
        );
    }
    let contents = fs::read_dir(agent.workspace().join("state/contents")).unwrap();
    let contents: BTreeSet<_> = contents.map(|item| item.unwrap().file_name()).collect();
    let used = found
        .iter()
        .map(|(_, entry)| entry.digest.to_string().into());
    assert_eq!(contents, used.collect(), "pristine copies are of this tree");
    tree
}

/// Waits until something serves, and that nothing else of this workspace runs.
fn served(agent: &Agent, laptop: &Laptop) -> String {
    wait_for("the last good version", || agent.get("/").status == 200);
    let app = agent.status(laptop)["process"].as_u64().unwrap();
    if Path::new("/proc/self").exists() {
        let app = u32::try_from(app).unwrap();
        wait_for("the app to be alone", || {
            processes_of(&agent.workspace()) == BTreeSet::from([app])
        });
    }
    agent.get("/").body
}

#[test]
fn an_agent_killed_at_any_step_of_a_push_goes_on_with_the_old_or_the_new_tree() {
    let laptop = Laptop::new();
    let mut agent = Agent::new(&[&laptop]);
    let mut versions = Versions::new();
    laptop.push_live(&versions.project, &agent);
    for (step, tree, version) in STEPS {
        println!("{step}");
        let (old_tree, old_answer) = (versions.manifest(), versions.answer());
        versions.next();
        let (new_tree, new_answer) = (versions.manifest(), versions.answer());
        agent.die_at(step);
        let push = laptop.start_push(&versions.project, &agent, &[]);
        wait_for(step, || agent.has_ended());
        push.kill();
        agent.go_on();
        agent.start_again();

        let found = check_recovered(&agent, &laptop, [&old_tree, &new_tree]);
        let expected = if tree == Old { &old_tree } else { &new_tree };
        assert_eq!(found, expected.tree_digest(), "{step}: {tree:?}");
        let served = served(&agent, &laptop);
        match version {
            Old => assert_eq!(served, old_answer, "{step}"),
            New => assert_eq!(served, new_answer, "{step}"),
            Either => assert!([old_answer, new_answer.clone()].contains(&served), "{step}"),
        }

        let next = laptop.push(&versions.project, &agent, &[]);
        assert_eq!(next.code, 0, "{step}: {}{}", next.stdout, next.stderr);
        assert_eq!(agent.get("/").body, new_answer, "{step}");
        assert_eq!(
            manifest(&agent.workspace().join("tree")),
            new_tree,
            "{step}"
        );
    }
}

/// Kills of the second test, and how many agents they are spread over: a push waits for its compiler and for the disk in turn.
const KILLS: u32 = 200;
const LANES: u32 = 4;
/// After so many kills a push is left alone, and has to succeed.
const WHOLE_PUSH_EVERY: u32 = 10;
/// Repeats an earlier run's moments.
const SEED: &str = "RRUN_TEST_SEED";

/// What came of the kills.
#[derive(Debug, Default)]
struct Tally {
    kills: u32,
    old_trees: u32,
    new_trees: u32,
    old_versions: u32,
    new_versions: u32,
    whole_pushes: u32,
}

/// One agent that is killed again and again.
struct Lane {
    laptop: Laptop,
    agent: Agent,
    versions: Versions,
    /// Each version's tree.
    trees: BTreeMap<String, TreeDigest>,
    serving: String,
    /// How long a push took that nobody disturbed: the kills come within that time and a fifth more.
    push_takes: Duration,
    random: Random,
    tally: Tally,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

impl Lane {
    fn new(seed: u64) -> Self {
        let laptop = Laptop::new();
        let agent = Agent::new(&[&laptop]);
        let versions = Versions::new();
        laptop.push_live(&versions.project, &agent);
        let mut lane = Self {
            trees: BTreeMap::from([(versions.answer(), versions.manifest().tree_digest())]),
            serving: versions.answer(),
            laptop,
            agent,
            versions,
            push_takes: Duration::ZERO,
            random: Random(seed),
            tally: Tally::default(),
        };
        lane.push();
        lane
    }

    /// The next version, pushed to its end.
    fn push(&mut self) {
        self.edit();
        let started = Instant::now();
        self.laptop.push_live(&self.versions.project, &self.agent);
        self.push_takes = started.elapsed();
        self.serving = self.versions.answer();
        assert_eq!(self.agent.get("/").body, self.serving);
        self.tally.whole_pushes += 1;
    }

    fn edit(&mut self) {
        self.versions.next();
        let tree = self.versions.manifest().tree_digest();
        self.trees.insert(self.versions.answer(), tree);
    }

    /// Kills the agent some time after a push began, starts it again, and checks all that has to be true then.
    fn kill_during_push(&mut self) {
        let old_tree = manifest(&self.agent.workspace().join("tree"));
        self.edit();
        let moments = self.push_takes.as_micros() * 6 / 5;
        let moment = self.random.below(u64::try_from(moments).unwrap());
        let mut push = self
            .laptop
            .start_push(&self.versions.project, &self.agent, &[]);
        thread::sleep(Duration::from_micros(moment));
        self.agent.kill();
        let was_live = push.code() == Some(0);
        push.kill();
        self.agent.start_again();

        let new_tree = self.versions.manifest();
        let tree = check_recovered(&self.agent, &self.laptop, [&old_tree, &new_tree]);
        let served = served(&self.agent, &self.laptop);
        let pushed = self.versions.answer();
        let expected = if was_live {
            vec![&pushed]
        } else {
            vec![&self.serving, &pushed]
        };
        assert!(
            expected.contains(&&served),
            "{served} instead of {expected:?}"
        );
        let serving_tree = serde_json::to_value(self.trees[&served]).unwrap();
        // The answer comes first, the status a moment later.
        wait_for("the status to name the tree that serves", || {
            self.agent.status(&self.laptop)["serving_tree"] == serving_tree
        });

        self.tally.kills += 1;
        *if tree == new_tree.tree_digest() {
            &mut self.tally.new_trees
        } else {
            &mut self.tally.old_trees
        } += 1;
        *if served == pushed {
            &mut self.tally.new_versions
        } else {
            &mut self.tally.old_versions
        } += 1;
        self.serving = served;
    }
}

#[test]
fn an_agent_killed_at_200_random_times_always_goes_on() {
    let time = || {
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_nanos()
    };
    let seed = std::env::var(SEED).map_or_else(|_| time() as u64, |seed| seed.parse().unwrap());
    println!("{SEED}={seed}");
    let lane = |number: u32| {
        thread::spawn(move || {
            let mut lane = Lane::new(seed.wrapping_add(number.into()));
            for kill in 1..=KILLS / LANES {
                lane.kill_during_push();
                if kill % WHOLE_PUSH_EVERY == 0 {
                    lane.push();
                }
            }
            println!("{:?}", lane.tally);
            lane.tally.kills
        })
    };
    let lanes: Vec<_> = (0..LANES).map(lane).collect();
    let kills: u32 = lanes.into_iter().map(|lane| lane.join().unwrap()).sum();
    assert_eq!(kills, KILLS);
}

/// A build script that never ends, with two processes that ignore what asks them to end, one of them without a parent and
/// in a session of its own.
const ENDLESS_BUILD: &str = r#"fn main() {
    let stubborn = "trap '' TERM INT; while :; do sleep 1000; done";
    for script in [stubborn.to_owned(), format!("setsid sh -c \"{stubborn}\" &")] {
        std::process::Command::new("sh").args(["-c", &script]).spawn().unwrap();
    }
    let target = std::env::var("CARGO_TARGET_DIR").unwrap();
    std::fs::write(format!("{target}/building"), "").unwrap();
    loop {
        std::thread::park();
    }
}
"#;

/// Starts a build that does not end, and waits until it is under way.
#[cfg(target_os = "linux")]
pub(crate) fn start_endless_build(
    laptop: &Laptop,
    project: &Project,
    agent: &Agent,
) -> crate::harness::Running {
    project.write("build.rs", ENDLESS_BUILD);
    let push = laptop.start_push(project, agent, &[]);
    let sign = agent.workspace().join("target/building");
    wait_for("the build script", || sign.exists());
    fs::remove_file(sign).unwrap();
    push
}

#[cfg(target_os = "linux")]
#[test]
fn what_a_killed_agent_was_building_has_ended_before_the_next_one_applies_anything() {
    let laptop = Laptop::new();
    let mut agent = Agent::new(&[&laptop]);
    let project = Project::new();
    laptop.push_live(&project, &agent);
    // With cargo alive, and with its group's leader gone as well.
    for (leader_dies, answer) in [(false, "two"), (true, "three")] {
        let push = start_endless_build(&laptop, &project, &agent);
        wait_for("app, cargo, build script, two shells, their sleeps", || {
            processes_of(&agent.workspace()).len() >= 7
        });
        let under_way = processes_of(&agent.workspace());
        agent.kill();
        push.kill();
        if leader_dies {
            kill(leader_of_the_build(&under_way));
        }
        let left = processes_of(&agent.workspace());
        assert!(left.len() >= 5, "nobody else ends them: {left:?}");
        agent.start_again();
        let left: Vec<_> = processes_of(&agent.workspace())
            .intersection(&under_way)
            .copied()
            .collect();
        assert!(left.is_empty(), "{left:?}");
        fs::remove_file(project.path("build.rs")).unwrap();
        project.answer(answer);
        laptop.push_live(&project, &agent);
        assert_eq!(agent.get("/").body, answer);
    }
}

#[cfg(target_os = "linux")]
fn leader_of_the_build(processes: &BTreeSet<u32>) -> u32 {
    let is_cargo = |number: &&u32| {
        fs::read_to_string(format!("/proc/{number}/comm")).is_ok_and(|name| name.trim() == "cargo")
    };
    *processes.iter().find(is_cargo).unwrap()
}

#[cfg(target_os = "linux")]
fn kill(process: u32) {
    use rustix::process::{Pid, Signal, kill_process};
    kill_process(
        Pid::from_raw(process.try_into().unwrap()).unwrap(),
        Signal::KILL,
    )
    .unwrap();
    wait_for("the process to end", || {
        !fs::read_to_string(format!("/proc/{process}/stat"))
            .is_ok_and(|stat| !stat.contains(") Z "))
    });
}

/// The agent's register of processes, as it lies on disk: the machine's boot, when the agent started, and of each process
/// its number, when that started, and its mark.
#[cfg(target_os = "linux")]
type Register = (String, u64, Vec<(Option<(u32, u64)>, Option<Vec<u8>>)>);

#[cfg(target_os = "linux")]
#[test]
fn a_process_that_only_has_a_leftover_s_number_is_left_alone() {
    let laptop = Laptop::new();
    let mut agent = Agent::new(&[&laptop]);
    laptop.push_live(&Project::new(), &agent);
    agent.kill();
    let register = agent.workspace().join("state/processes");
    let mut written: Register = postcard::from_bytes(&fs::read(&register).unwrap()).unwrap();
    let stranger = std::process::Command::new("sleep")
        .arg("1000")
        .process_group(0)
        .spawn();
    let mut stranger = stranger.unwrap();
    let (_, _, processes) = &mut written;
    let (app, _) = processes
        .iter_mut()
        .find(|(_, mark)| mark.as_ref().is_some_and(|mark| mark.starts_with(b"PORT=")))
        .unwrap();
    let (number, _) = app.as_mut().unwrap();
    *number = stranger.id();
    fs::write(&register, postcard::to_stdvec(&written).unwrap()).unwrap();
    agent.start_again();
    assert!(stranger.try_wait().unwrap().is_none(), "it was killed");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    // The app, which the register does not name by its number any more, was known by its mark.
    served(&agent, &laptop);
}

//! Generations on disk: each an executable with the assets it was built with, in a folder of its own, so that no build
//! overwrites what runs and an old version never sees new templates.
//!
//! Executable and assets are hard links: publishing writes next to nothing. Does not start anything.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use rrun_protocol::{Digest, Manifest, Plan, PushId, TreeDigest, TreePath};
use serde::{Deserialize, Serialize};

use crate::{app::AppSpec, fault::fault_point, layout::Layout};

/// Generations that are kept to roll back to, the serving one included.
const KEPT: usize = 3;

/// Name of the file that describes a generation in its folder, of its executable, and of the app's working directory.
const DESCRIPTION: &str = "generation.json";
const EXECUTABLE: &str = "executable";
const FILES: &str = "files";

/// State file: numbers of the generations that served, the one that serves last.
const SERVED: &str = "served";

/// One built version.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Generation {
    /// Rises with each build.
    pub number: u64,
    /// The tree that it was built from.
    pub tree: TreeDigest,
    /// How it was built and is run.
    pub plan: Plan,
    /// Who pushed it.
    pub by: String,
    /// With which push; `None` for the image's own.
    pub push: Option<PushId>,
    /// When, in seconds since 1970.
    pub time: u64,
}

/// Names what serves: two generations of equal identity answer alike.
pub(crate) type Identity = (TreeDigest, Digest);

impl Generation {
    /// What it is, apart from its number.
    pub(crate) fn identity(&self) -> Identity {
        (self.tree, self.plan.digest())
    }
}

/// The generations on disk.
pub(crate) struct Generations {
    layout: Layout,
    kept: Vec<Generation>,
    next: u64,
}

impl Generations {
    /// Reads what is there. Folders that an interrupted publication left are removed.
    pub(crate) fn open(layout: &Layout) -> anyhow::Result<Self> {
        let mut kept = Vec::new();
        for item in fs::read_dir(layout.generations())? {
            let folder = item?.path();
            match read(&folder) {
                Some(generation) => kept.push(generation),
                None => remove(layout, &folder)?,
            }
        }
        kept.sort_by_key(|generation: &Generation| generation.number);
        let next = kept.last().map_or(1, |generation| generation.number + 1);
        Ok(Self {
            layout: layout.clone(),
            kept,
            next,
        })
    }

    /// The generation that serves or last served.
    pub(crate) fn serving(&self) -> Option<&Generation> {
        self.get(*self.served().last()?)
    }

    /// The one that served before `serving`, and is still kept.
    pub(crate) fn previous(&self, serving: Option<u64>) -> Option<&Generation> {
        let served = self.served();
        let before = served
            .iter()
            .rev()
            .filter(|number| Some(**number) != serving);
        before.filter_map(|number| self.get(*number)).next()
    }

    /// A kept generation by its number.
    pub(crate) fn get(&self, number: u64) -> Option<&Generation> {
        self.kept
            .iter()
            .find(|generation| generation.number == number)
    }

    /// Notes that `number` serves now, and removes generations beyond those that are kept, the longest out of service first.
    pub(crate) fn set_serving(&mut self, number: u64) -> anyhow::Result<()> {
        let mut served = self.served();
        served.retain(|other| *other != number && self.get(*other).is_some());
        served.push(number);
        self.layout.store(SERVED, &served)?;
        fault_point!("serving noted");
        let last_service = |number: u64| served.iter().position(|other| *other == number);
        let mut oldest_first: Vec<u64> = self
            .kept
            .iter()
            .map(|generation| generation.number)
            .collect();
        oldest_first.sort_by_key(|number| last_service(*number));
        let surplus = oldest_first.len().saturating_sub(KEPT);
        oldest_first
            .into_iter()
            .take(surplus)
            .try_for_each(|number| self.remove(number))
    }

    /// Numbers in the order of their last service.
    fn served(&self) -> Vec<u64> {
        self.layout.load(SERVED).unwrap_or_default()
    }

    /// Removes all but `serving`, to make room.
    pub(crate) fn keep_only(&mut self, serving: Option<u64>) -> anyhow::Result<()> {
        let numbers = self.kept.iter().map(|generation| generation.number);
        let others: Vec<u64> = numbers.filter(|number| Some(*number) != serving).collect();
        others
            .into_iter()
            .try_for_each(|number| self.remove(number))
    }

    /// Notes that nothing serves.
    pub(crate) fn clear_serving(&self) -> anyhow::Result<()> {
        let mut served = self.served();
        // No generation has this number.
        served.push(0);
        self.layout.store(SERVED, &served)
    }

    /// Kept generations, newest first.
    pub(crate) fn kept(&self) -> impl Iterator<Item = &Generation> {
        self.kept.iter().rev()
    }

    /// A kept generation that answers as asked for.
    pub(crate) fn find(&self, identity: &Identity) -> Option<&Generation> {
        self.kept()
            .find(|generation| generation.identity() == *identity)
    }

    /// Publishes `executable` with the assets of `manifest`'s tree as a new generation.
    pub(crate) fn publish(
        &mut self,
        executable: &Path,
        manifest: &Manifest,
        describe: impl FnOnce(u64) -> Generation,
    ) -> anyhow::Result<Generation> {
        let generation = describe(self.next);
        let folder = self.folder(generation.number);
        self.fill(&generation, executable, manifest)
            .and_then(|staging| {
                fault_point!("publishing");
                Ok(fs::rename(staging.path(), &folder)?)
            })
            .with_context(|| format!("cannot publish `{}`", folder.display()))?;
        fault_point!("published");
        self.next += 1;
        self.kept.push(generation.clone());
        Ok(generation)
    }

    /// Lays a generation out in a folder of its own, which goes unless it is renamed.
    fn fill(
        &self,
        generation: &Generation,
        executable: &Path,
        manifest: &Manifest,
    ) -> anyhow::Result<tempfile::TempDir> {
        let staging = tempfile::TempDir::new_in(self.layout.staging())?;
        let files = staging.path().join(FILES);
        fs::create_dir(&files)?;
        link(executable, &staging.path().join(EXECUTABLE))
            .with_context(|| format!("`{}`", executable.display()))?;
        for (path, place) in assets(&generation.plan, manifest) {
            link(&self.layout.tree().join(path), &files.join(place))
                .with_context(|| format!("`{path}`"))?;
        }
        let description = serde_json::to_vec(generation)?;
        fs::write(staging.path().join(DESCRIPTION), description).context(DESCRIPTION)?;
        Ok(staging)
    }

    /// Removes a generation, as one that never became ready.
    pub(crate) fn remove(&mut self, number: u64) -> anyhow::Result<()> {
        self.kept.retain(|generation| generation.number != number);
        remove(&self.layout, &self.folder(number))
    }

    /// How to start `generation`, in `environment`.
    pub(crate) fn spec(
        &self,
        generation: &Generation,
        environment: &[(OsString, OsString)],
    ) -> AppSpec {
        let folder = self.folder(generation.number);
        AppSpec {
            generation: generation.number,
            directory: folder.join(FILES),
            executable: folder.join(EXECUTABLE),
            run: generation.plan.run.clone(),
            environment: environment.to_vec(),
        }
    }

    fn folder(&self, number: u64) -> PathBuf {
        self.layout.generations().join(number.to_string())
    }
}

/// Removes a generation's folder all at once: half of one would look whole after a crash.
fn remove(layout: &Layout, folder: &Path) -> anyhow::Result<()> {
    let remove = || -> io::Result<()> {
        // Of its own number, because a folder with a random name would have to be made first, on a disk that may be full.
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let removed = layout.staging().join(format!("generation-{name}"));
        fs::rename(folder, &removed)?;
        fault_point!("generation removed");
        fs::remove_dir_all(removed)
    };
    remove().with_context(|| format!("cannot remove `{}`", folder.display()))
}

fn read(folder: &Path) -> Option<Generation> {
    let generation: Generation =
        serde_json::from_slice(&fs::read(folder.join(DESCRIPTION)).ok()?).ok()?;
    let is_whole = folder.file_name()?.to_str()? == generation.number.to_string()
        && folder.join(EXECUTABLE).exists();
    is_whole.then_some(generation)
}

/// The tree's files that the app reads at run time, each with its place in the app's working directory.
fn assets<'a>(
    plan: &'a Plan,
    manifest: &'a Manifest,
) -> impl Iterator<Item = (&'a TreePath, &'a str)> {
    let is_asset = |path: &TreePath| {
        let run = &plan.run;
        run.assets
            .iter()
            .any(|asset| path == asset || path.strip_prefix(Some(asset)).is_some())
    };
    manifest
        .iter()
        .map(|(path, _)| path)
        .filter(move |path| is_asset(path))
        .filter_map(|path| {
            let place = path.strip_prefix(plan.run.working_directory.as_ref())?;
            Some((path, place))
        })
}

/// Links `from` to `to`, or copies where a file system cannot link. A symbolic link stays one.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(drop))
}

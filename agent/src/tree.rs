//! The pushed tree on disk: made equal to a manifest all at once, or not at all.
//!
//! Beside the tree lies a pristine copy of each of its files, named by digest. It is the base of the next push's compression,
//! and what files that the build changed are restored from. Applying a push is: pristine copies of the new files, then a
//! journal renamed into place (the commit point), then the tree itself, file by file, by rename. After a crash the journal
//! is carried out again; each of its steps may run twice.
//!
//! Changed files get a time of the agent's own, later than the end of the last build, because cargo compares times: a file
//! older than the last build's start counts as unchanged whatever it holds. Unchanged files are left alone.
//!
//! Knows nothing of pushes, archives or signatures.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs,
    io::{self, Read},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use cap_std::{ambient_authority, fs::Dir};
use filetime::FileTime;
use rrun_protocol::{Digest, Entry, Kind, MAX_PREFIX_BYTES, Manifest, TreeDigest, TreePath};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{fault::fault_point, layout::Layout};

/// State files.
const MANIFEST: &str = "manifest";
const JOURNAL: &str = "journal";
const TOUCHED: &str = "touched";
const LAST_BUILD: &str = "last-build";
const INTERRUPTED: &str = "interrupted";

/// How much later than the last build's end a changed file's time is at least. Kernels stamp files with a clock that ticks
/// every 1 to 10 ms, so two moments within a tick look equal to cargo.
const TICK: Duration = Duration::from_millis(20);

/// Build plans whose touched files are remembered. One beyond that is taken for new: what others touched since counts for it.
const MAX_BUILD_PLANS: usize = 8;

/// The tree, with everything needed to change it safely.
pub(crate) struct Tree {
    layout: Layout,
    folder: Dir,
    manifest: Manifest,
    /// What the tree was before the last push.
    previous: Manifest,
    digest: TreeDigest,
    stamps: HashMap<TreePath, Stamp>,
    touched: Touched,
    /// End of the last build, as time since 1970.
    last_build: Duration,
    /// Whether the tree is what the manifest says, but for what a build or the app changed.
    whole: bool,
}

/// What a file's metadata was when its content was last known. Equal stamps mean an untouched file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    size: u64,
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Files that were written or deleted since a build plan last succeeded, each with the units that were compiled since then.
///
/// A build that fails late has compiled some units already, and those are rightly fresh in the next one.
pub(crate) type TouchedFiles = BTreeMap<TreePath, BTreeSet<String>>;

/// The touched files of each build plan.
type Touched = BTreeMap<Digest, TouchedFiles>;

/// What [`Tree::apply`] still has to do, and has done once it is gone.
#[derive(Serialize, Deserialize)]
struct Journal {
    target: Manifest,
    write: Vec<TreePath>,
    delete: Vec<TreePath>,
}

/// The files that a journal writes, ready to be renamed into the tree, in the journal's order.
struct Prepared {
    folder: tempfile::TempDir,
}

/// New files on their way into the tree, in a folder of their own that goes when this does.
pub(crate) struct Staged {
    folder: tempfile::TempDir,
}

/// What an apply did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    /// Files of the tree that something other than a push had changed, and that were put back first.
    pub restored: Vec<TreePath>,
}

impl Staged {
    /// An empty folder to receive files into.
    pub(crate) fn new(layout: &Layout) -> io::Result<Self> {
        Ok(Self {
            folder: tempfile::TempDir::new_in(layout.staging())?,
        })
    }

    /// Stores one file's content as it comes in, under its digest.
    pub(crate) fn store(&self, kind: Kind, content: &mut dyn Read) -> io::Result<Entry> {
        let mut file = tempfile::NamedTempFile::new_in(self.folder.path())?;
        let (size, digest) = copy_and_digest(content, file.as_file_mut())?;
        file.persist(self.folder.path().join(digest.to_string()))?;
        fault_point!("receiving");
        Ok(Entry { kind, size, digest })
    }

    /// The content of a staged file.
    pub(crate) fn read(&self, digest: &Digest) -> io::Result<Vec<u8>> {
        fs::read(self.folder.path().join(digest.to_string()))
    }
}

impl Tree {
    /// Opens the tree and makes it whole. If that fails, as on a full disk, it is tried again before the next push.
    pub(crate) fn open(layout: &Layout) -> anyhow::Result<Self> {
        empty(&layout.staging())?;
        let path = layout.tree();
        let folder = Dir::open_ambient_dir(&path, ambient_authority())
            .with_context(|| format!("cannot open `{}`", path.display()))?;
        let manifest: Manifest = layout.load(MANIFEST).unwrap_or_default();
        let mut tree = Self {
            layout: layout.clone(),
            folder,
            digest: manifest.tree_digest(),
            manifest,
            previous: Manifest::default(),
            stamps: HashMap::new(),
            touched: layout.load(TOUCHED).unwrap_or_default(),
            last_build: layout.load(LAST_BUILD).unwrap_or_default(),
            whole: false,
        };
        if let Err(error) = tree.recover() {
            tracing::error!("the tree cannot be made whole yet: {error:#}");
        }
        Ok(tree)
    }

    /// Carries out what was interrupted, then checks every file against the manifest and restores what differs. Does
    /// nothing if nothing was interrupted since the last time.
    pub(crate) fn recover(&mut self) -> anyhow::Result<()> {
        if self.whole {
            return Ok(());
        }
        if let Some(journal) = self.layout.load::<Journal>(JOURNAL) {
            tracing::warn!("a push was interrupted while it was applied; finishing it");
            let prepared = self.prepare(&journal)?;
            self.carry_out(journal, &prepared)?;
        }
        self.drop_what_is_lost()?;
        self.restore()?;
        self.previous = Manifest::default();
        self.drop_unused_contents()?;
        self.whole = true;
        Ok(())
    }

    /// Takes the files that lie in the tree's folder as the tree, as when an image was built. `.git` folders are left out.
    pub(crate) fn adopt(&mut self) -> anyhow::Result<()> {
        let staged = Staged::new(&self.layout)?;
        let mut entries = Vec::new();
        let mut folders = vec![self.layout.tree()];
        while let Some(folder) = folders.pop() {
            for item in fs::read_dir(&folder)
                .with_context(|| format!("cannot read `{}`", folder.display()))?
            {
                let path = item?.path();
                let relative = path.strip_prefix(self.layout.tree())?;
                if path.file_name().is_some_and(|name| name == ".git") {
                    continue;
                }
                let metadata = fs::symlink_metadata(&path)?;
                if metadata.is_dir() {
                    folders.push(path);
                    continue;
                }
                anyhow::ensure!(
                    metadata.is_file() || metadata.is_symlink(),
                    "`{}` is no file, folder or link",
                    path.display()
                );
                let relative = TreePath::from_bytes(relative.as_os_str().as_encoded_bytes())?;
                let entry = if metadata.is_symlink() {
                    let target = fs::read_link(&path)?;
                    staged.store(Kind::Symlink, &mut target.as_os_str().as_encoded_bytes())?
                } else {
                    let executable = metadata.permissions().mode() & 0o100 != 0;
                    let kind = if executable {
                        Kind::Executable
                    } else {
                        Kind::File
                    };
                    staged.store(kind, &mut fs::File::open(&path)?)?
                };
                self.stamps.insert(relative.clone(), Stamp::of(&metadata));
                entries.push((relative, entry));
            }
        }
        self.take_over(&staged)?;
        self.set_manifest(Manifest::new(entries)?)
    }

    /// The tree's files.
    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The tree's identity.
    pub(crate) fn digest(&self) -> TreeDigest {
        self.digest
    }

    /// Makes the tree equal to `target`, whose new contents lie in `staged`.
    ///
    /// On an error before the commit point nothing has changed; after it, [`Self::recover`] finishes what this began.
    /// No process may be building in the tree, and it has to be whole.
    pub(crate) fn apply(&mut self, target: Manifest, staged: &Staged) -> anyhow::Result<Applied> {
        let restored = self.changed_behind_our_back()?;
        let write: Vec<TreePath> = target
            .iter()
            .filter(|(path, entry)| {
                self.manifest.get(path.as_str()) != Some(*entry) || restored.contains(*path)
            })
            .map(|(path, _)| path.clone())
            .collect();
        let delete: Vec<TreePath> = self
            .manifest
            .iter()
            .map(|(path, _)| path)
            .filter(|path| target.get(path.as_str()).is_none())
            .cloned()
            .collect();
        if !write.is_empty() || !delete.is_empty() {
            let journal = Journal {
                target,
                write,
                delete,
            };
            let prepared = match self.commit(&journal, staged) {
                Ok(prepared) => prepared,
                Err(error) => {
                    self.drop_unused_contents()?;
                    return Err(error);
                }
            };
            self.whole = false;
            self.carry_out(journal, &prepared)?;
            self.whole = true;
        }
        Ok(Applied {
            restored: restored.into_iter().collect(),
        })
    }

    /// Does everything that may fail for want of room, then passes the commit point.
    fn commit(&mut self, journal: &Journal, staged: &Staged) -> anyhow::Result<Prepared> {
        self.take_over(staged)?;
        fault_point!("contents moved");
        let prepared = self.prepare(journal)?;
        self.touch(journal.write.iter().chain(&journal.delete))?;
        fault_point!("prepared");
        self.layout.store(JOURNAL, journal)?;
        fault_point!("journal written");
        Ok(prepared)
    }

    /// Files written or deleted since `build_plan` last succeeded; all that is known to be touched, if it never did.
    pub(crate) fn touched(&self, build_plan: &Digest) -> TouchedFiles {
        match self.touched.get(build_plan) {
            Some(touched) => touched.clone(),
            None => self
                .touched
                .values()
                .flat_map(BTreeMap::keys)
                .map(|path| (path.clone(), BTreeSet::new()))
                .collect(),
        }
    }

    /// Notes that a build by `build_plan` did not succeed but compiled `units`.
    pub(crate) fn partly_built(&mut self, build_plan: Digest, units: &BTreeSet<String>) {
        let mut touched = self.touched(&build_plan);
        touched
            .values_mut()
            .for_each(|compiled| compiled.extend(units.iter().cloned()));
        self.touched.insert(build_plan, touched);
        self.note(TOUCHED, &self.touched);
    }

    /// Notes that a build of the present tree by `build_plan` succeeded.
    pub(crate) fn built(&mut self, build_plan: Digest) {
        if self.touched.len() >= MAX_BUILD_PLANS && !self.touched.contains_key(&build_plan) {
            self.touched.pop_first();
        }
        self.touched.insert(build_plan, TouchedFiles::new());
        self.note(TOUCHED, &self.touched);
    }

    /// Notes that a build begins, and says whether the one before was interrupted: what that left may be broken.
    pub(crate) fn build_begins(&mut self) -> bool {
        let interrupted = self.layout.load(INTERRUPTED).unwrap_or(false);
        self.note(INTERRUPTED, &true);
        interrupted
    }

    /// Notes that a build's processes are gone, so that files written from now on are newer than all it made; and whether
    /// cargo came to its own end, be it a failure.
    pub(crate) fn build_ended(&mut self, by_itself: bool) {
        self.last_build = now().max(self.last_build);
        self.note(LAST_BUILD, &self.last_build);
        if by_itself {
            self.note(INTERRUPTED, &false);
        }
    }

    /// Writes down what becomes of builds. Where that fails, as on a full disk, the push goes on: the next build may be
    /// more careful than it has to be, or fail where it would have been cleaned.
    fn note(&self, name: &str, value: &impl Serialize) {
        if let Err(error) = self.layout.store(name, value) {
            tracing::warn!("{error:#}");
        }
    }

    /// Reads a pristine file of the tree, checked against its digest.
    pub(crate) fn content(layout: &Layout, digest: &Digest) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        let file = fs::File::open(layout.contents().join(digest.to_string()))?;
        file.take(MAX_PREFIX_BYTES).read_to_end(&mut content)?;
        if Digest::of(&content) != *digest {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a pristine copy of a file is damaged",
            ));
        }
        Ok(content)
    }

    /// Forgets files without a pristine copy, so that the next push sends them again.
    fn drop_what_is_lost(&mut self) -> anyhow::Result<()> {
        let is_there = |entry: &Entry| {
            let metadata = fs::metadata(self.layout.contents().join(entry.digest.to_string()));
            metadata.is_ok_and(|metadata| metadata.len() == entry.size)
        };
        let (kept, lost): (Vec<_>, Vec<_>) = self
            .manifest
            .clone()
            .into_iter()
            .partition(|(_, entry)| is_there(entry));
        if !lost.is_empty() {
            tracing::warn!(
                files = lost.len(),
                "files of the tree are lost; the next push sends them again"
            );
            self.touch(lost.iter().map(|(path, _)| path))?;
            lost.iter().try_for_each(|(path, _)| self.delete(path))?;
            self.set_manifest(Manifest::new(kept)?)?;
        }
        Ok(())
    }

    /// Puts every file back that differs from the manifest.
    fn restore(&mut self) -> anyhow::Result<()> {
        let differing = self.changed_behind_our_back()?;
        if !differing.is_empty() {
            self.touch(differing.iter())?;
            let target = self.manifest.clone();
            let journal = Journal {
                target,
                write: differing.into_iter().collect(),
                delete: Vec::new(),
            };
            let prepared = self.prepare(&journal)?;
            self.carry_out(journal, &prepared)?;
        }
        Ok(())
    }

    /// Pushed files whose content is no longer the pushed one. Only those whose metadata changed are read.
    fn changed_behind_our_back(&mut self) -> anyhow::Result<BTreeSet<TreePath>> {
        let mut changed = BTreeSet::new();
        let mut folders = RealFolders::default();
        for (path, entry) in self.manifest.iter() {
            // Behind a link that took a folder's place lie other files, whatever they hold.
            if !folders.hold(&self.layout.tree(), path) {
                changed.insert(path.clone());
                continue;
            }
            let on_disk = self.layout.tree().join(path);
            let stamp = fs::symlink_metadata(&on_disk)
                .ok()
                .map(|metadata| Stamp::of(&metadata));
            if stamp.is_some() && stamp.as_ref() == self.stamps.get(path) {
                continue;
            }
            match stamp {
                Some(stamp) if read_entry(&on_disk).is_ok_and(|found| found == *entry) => {
                    self.stamps.insert(path.clone(), stamp);
                }
                _ => {
                    changed.insert(path.clone());
                }
            }
        }
        Ok(changed)
    }

    /// Moves staged contents to the pristine copies.
    fn take_over(&self, staged: &Staged) -> anyhow::Result<()> {
        for item in fs::read_dir(staged.folder.path())? {
            let item = item?;
            let kept = self.layout.contents().join(item.file_name());
            fs::rename(item.path(), &kept)
                .with_context(|| format!("cannot keep `{}`", kept.display()))?;
        }
        Ok(())
    }

    /// Notes `paths` as touched for every build plan, before they change.
    fn touch<'p>(
        &mut self,
        paths: impl Iterator<Item = &'p TreePath> + Clone,
    ) -> anyhow::Result<()> {
        for touched in self.touched.values_mut() {
            touched.extend(paths.clone().map(|path| (path.clone(), BTreeSet::new())));
        }
        self.layout.store(TOUCHED, &self.touched)
    }

    /// Writes what the journal will rename into the tree.
    fn prepare(&self, journal: &Journal) -> anyhow::Result<Prepared> {
        let prepared = Prepared {
            folder: tempfile::TempDir::new_in(self.layout.staging())
                .with_context(|| format!("no room in `{}`", self.layout.staging().display()))?,
        };
        let time = self.time_for_changed_files();
        for (index, path) in journal.write.iter().enumerate() {
            let entry = journal
                .target
                .get(path.as_str())
                .context("the journal names a file that its tree does not have")?;
            self.make(&prepared.place(index), entry, time)
                .with_context(|| {
                    format!("cannot write `{}`", self.layout.tree().join(path).display())
                })?;
        }
        Ok(prepared)
    }

    /// Runs a journal to its end. May run again after it was interrupted anywhere.
    fn carry_out(&mut self, journal: Journal, prepared: &Prepared) -> anyhow::Result<()> {
        for path in &journal.delete {
            self.delete(path)
                .with_context(|| format!("cannot delete `{path}`"))?;
        }
        for (index, path) in journal.write.iter().enumerate() {
            self.put(path, &prepared.place(index)).with_context(|| {
                format!("cannot write `{}`", self.layout.tree().join(path).display())
            })?;
            fault_point!("half applied");
        }
        fault_point!("files written");
        self.set_manifest(journal.target)?;
        fault_point!("contents dropped");
        match fs::remove_file(self.layout.state(JOURNAL)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).context("cannot remove the journal")
            }
            _ => Ok(()),
        }
    }

    fn set_manifest(&mut self, manifest: Manifest) -> anyhow::Result<()> {
        self.layout.store(MANIFEST, &manifest)?;
        fault_point!("manifest written");
        self.digest = manifest.tree_digest();
        self.stamps
            .retain(|path, _| manifest.get(path.as_str()).is_some());
        self.previous = std::mem::replace(&mut self.manifest, manifest);
        self.drop_unused_contents()
    }

    /// Removes what only the tree before this one needs, unless a journal is still to be carried out.
    pub(crate) fn make_room(&mut self) -> anyhow::Result<()> {
        if self.whole {
            self.previous = Manifest::default();
            self.drop_unused_contents()?;
        }
        Ok(())
    }

    /// Keeps what the tree before this one needs too: another push that starts from it may be read at this moment.
    fn drop_unused_contents(&self) -> anyhow::Result<()> {
        let used: HashSet<String> = self
            .manifest
            .iter()
            .chain(self.previous.iter())
            .map(|(_, entry)| entry.digest.to_string())
            .collect();
        for item in fs::read_dir(self.layout.contents())? {
            let item = item?;
            if !item
                .file_name()
                .to_str()
                .is_some_and(|name| used.contains(name))
            {
                fs::remove_file(item.path())?;
            }
        }
        Ok(())
    }

    /// Later than anything the last build made, and not in the future when the next one starts.
    fn time_for_changed_files(&self) -> FileTime {
        let time = now().max(self.last_build + TICK);
        if let Some(wait) = time.checked_sub(now()).filter(|wait| *wait <= TICK) {
            std::thread::sleep(wait);
        }
        FileTime::from_system_time(UNIX_EPOCH + time)
    }

    fn delete(&mut self, path: &TreePath) -> io::Result<()> {
        self.stamps.remove(path);
        if !RealFolders::default().hold(&self.layout.tree(), path) {
            return Ok(());
        }
        match self.folder.symlink_metadata(path) {
            Ok(metadata) if !metadata.is_dir() => self.folder.remove_file(path)?,
            // Already gone, or something else took its place: neither is the pushed file.
            _ => {}
        }
        for folder in path.ancestors() {
            // Fails on the first folder that is not empty.
            if self.folder.remove_dir(folder).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Makes a file of the tree at `new`, from its pristine copy.
    fn make(&self, new: &Path, entry: &Entry, time: FileTime) -> anyhow::Result<()> {
        let pristine = self.layout.contents().join(entry.digest.to_string());
        if entry.kind == Kind::Symlink {
            std::os::unix::fs::symlink(fs::read_to_string(&pristine)?, new)?;
            return Ok(());
        }
        let mode = if entry.kind == Kind::Executable {
            0o755
        } else {
            0o644
        };
        let mut file = fs::File::create(new)?;
        let (_, digest) = copy_and_digest(&mut fs::File::open(&pristine)?, &mut file)?;
        anyhow::ensure!(digest == entry.digest, "its pristine copy is damaged");
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        filetime::set_file_handle_times(&file, None, Some(time))?;
        Ok(())
    }

    /// Renames `new` into the tree.
    fn put(&mut self, path: &TreePath, new: &Path) -> anyhow::Result<()> {
        let folder = self.folder_for(path)?;
        let name = Path::new(path.file_name());
        if folder
            .symlink_metadata(name)
            .is_ok_and(|metadata| metadata.is_dir())
        {
            folder.remove_dir_all(name)?;
        }
        let from = new.parent().context("a prepared file lies in a folder")?;
        let from = Dir::open_ambient_dir(from, ambient_authority())?;
        from.rename(new.file_name().unwrap_or_default(), &folder, name)?;
        let stamp = Stamp::of(&fs::symlink_metadata(self.layout.tree().join(path))?);
        self.stamps.insert(path.clone(), stamp);
        Ok(())
    }

    /// The folder that `path` lies in, made if needed. Whatever stands in the way and is no real folder goes, links above all.
    fn folder_for(&self, path: &TreePath) -> io::Result<Dir> {
        let mut folder = self.folder.try_clone()?;
        let Some(parent) = path.parent() else {
            return Ok(folder);
        };
        for component in parent.as_str().split('/') {
            match folder.symlink_metadata(component) {
                Ok(metadata) if metadata.is_dir() => {}
                Ok(_) => {
                    folder.remove_file(component)?;
                    folder.create_dir(component)?;
                }
                Err(_) => folder.create_dir(component)?,
            }
            folder = folder.open_dir(component)?;
        }
        Ok(folder)
    }
}

impl Prepared {
    fn place(&self, index: usize) -> PathBuf {
        self.folder.path().join(index.to_string())
    }
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            size: metadata.len(),
            inode: metadata.ino(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Which folders of the tree are folders, and no links to some.
#[derive(Default)]
struct RealFolders(HashMap<String, bool>);

impl RealFolders {
    /// Whether every folder above `path` is one.
    fn hold(&mut self, tree: &Path, path: &TreePath) -> bool {
        path.ancestors().all(|folder| {
            if let Some(known) = self.0.get(folder) {
                return *known;
            }
            let is_real = fs::symlink_metadata(tree.join(folder)).is_ok_and(|found| found.is_dir());
            self.0.insert(folder.to_owned(), is_real);
            is_real
        })
    }
}

/// The entry that a file on disk makes. Nothing but files and links is opened: a named pipe would never answer.
fn read_entry(path: &Path) -> io::Result<Entry> {
    let metadata = fs::symlink_metadata(path)?;
    if metadata.is_symlink() {
        return Ok(Entry::of(
            Kind::Symlink,
            fs::read_link(path)?.as_os_str().as_encoded_bytes(),
        ));
    }
    if !metadata.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let executable = metadata.permissions().mode() & 0o100 != 0;
    let (size, digest) = copy_and_digest(&mut fs::File::open(path)?, &mut io::sink())?;
    Ok(Entry {
        kind: if executable {
            Kind::Executable
        } else {
            Kind::File
        },
        size,
        digest,
    })
}

/// Copies everything, and gives its size and digest.
pub(crate) fn copy_and_digest(
    from: &mut dyn Read,
    to: &mut dyn io::Write,
) -> io::Result<(u64, Digest)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    let mut size = 0;
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok((size, Digest::finish(hasher))),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..read]);
        to.write_all(&buffer[..read])?;
        size += read as u64;
    }
}

/// Removes everything in `folder`.
fn empty(folder: &Path) -> anyhow::Result<()> {
    for item in fs::read_dir(folder)? {
        let path: PathBuf = item?.path();
        let removed = if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.with_context(|| format!("cannot remove `{}`", path.display()))?;
    }
    Ok(())
}

fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;

//! Walks the folders that are sent, in parallel, and asks the ignore rules at each name.
//!
//! Exists beside the `ignore` crate's own walker because the same walk has to say which rule kept a file out, to stop at folders that are
//! walked for another reason, and to look below an ignored folder for what `.rrunignore` brings back. It opens no file but
//! ignore files and follows no link.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, DirEntry, FileType, Metadata},
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use ignore::gitignore::Gitignore;
use rayon::prelude::*;
use rrun_protocol::{Kind, TreePath};

use super::{
    Listed, ScanError,
    rules::{Above, Level, Verdict, describe, slashed},
    stamps::Stamp,
};
use crate::discover::{Checkout, Note, Source};

/// First bytes of the file that marks a folder as a cache: every target directory has one, whatever its name (bford.info/cachedir).
const CACHE_MARK: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";
const CACHE_MARK_FILE: &str = "CACHEDIR.TAG";

/// A file that is sent.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) path: TreePath,
    /// Where it lies on this machine.
    pub(super) file: PathBuf,
    pub(super) kind: Kind,
    pub(super) stamp: Stamp,
    /// Why it is sent; empty unless a listing is made.
    pub(super) rule: String,
}

/// What a walk gives.
#[derive(Debug, Default)]
pub(super) struct Walked {
    pub(super) found: Vec<Found>,
    /// What is kept out; empty unless a listing is made.
    pub(super) kept_out: Vec<Listed>,
    pub(super) notes: Vec<Note>,
}

impl Walked {
    fn add(&mut self, other: Self) {
        self.found.extend(other.found);
        self.kept_out.extend(other.kept_out);
        self.notes.extend(other.notes);
    }
}

/// Finds all files of `checkout` that are sent, in the order of their paths.
pub(super) fn walk(
    checkout: &Checkout,
    global: &Gitignore,
    listing: bool,
) -> Result<Walked, ScanError> {
    let root = checkout.root.as_path();
    let in_tree = |path: &Path| path.strip_prefix(root).ok().map(slashed);
    let walk = Walk {
        root,
        global,
        listing,
        starts: checkout
            .sources
            .folders
            .iter()
            .filter_map(|source| in_tree(&source.path))
            .collect(),
        never: checkout
            .sources
            .never
            .iter()
            .filter_map(|path| in_tree(path))
            .collect(),
    };
    let mut walked = Walked::default();
    let mut above = Above::new(root);
    for source in &checkout.sources.folders {
        let Some(relative) = in_tree(&source.path) else {
            continue;
        };
        let level = above.around(&source.path, &mut walked.notes);
        let folder = Folder {
            absolute: source.path.clone(),
            relative,
            above: level,
            only_brought_back: None,
            why: &source.why,
        };
        walked.add(walk.folder(&folder)?);
    }
    for source in &checkout.sources.files {
        walk.single(source, &mut walked)?;
    }
    walked
        .found
        .par_sort_unstable_by(|left, right| left.path.cmp(&right.path));
    walked
        .found
        .dedup_by(|later, earlier| later.path == earlier.path);
    walked
        .notes
        .sort_by(|left, right| left.text.cmp(&right.text));
    walked.notes.dedup();
    Ok(walked)
}

struct Walk<'w> {
    root: &'w Path,
    global: &'w Gitignore,
    listing: bool,
    /// Folders in the tree that are walked for themselves.
    starts: BTreeSet<String>,
    /// Folders in the tree that are never entered.
    never: BTreeSet<String>,
}

struct Folder<'w> {
    absolute: PathBuf,
    /// Path in the tree; empty for its root.
    relative: String,
    above: Option<Arc<Level>>,
    /// Inside a folder that is kept out by this rule: only what our own rules bring back counts.
    only_brought_back: Option<String>,
    /// Why the start of this walk is sent.
    why: &'w str,
}

/// What happens to one name.
enum Fate {
    Sent {
        rule: String,
    },
    /// A kept out folder that holds something to be brought back.
    LookBelow {
        rule: String,
    },
    KeptOut {
        rule: String,
    },
}

impl Walk<'_> {
    fn folder(&self, folder: &Folder<'_>) -> Result<Walked, ScanError> {
        let mut walked = Walked::default();
        let entries = self.entries(folder)?;
        let names: Vec<_> = entries.iter().map(DirEntry::file_name).collect();
        let names: BTreeSet<&OsStr> = names
            .iter()
            .map(|name| name.as_os_str())
            .filter(|name| {
                name.as_encoded_bytes().first() == Some(&b'.') || *name == CACHE_MARK_FILE
            })
            .collect();
        if names.contains(OsStr::new(CACHE_MARK_FILE))
            && !self.starts.contains(&folder.relative)
            && is_cache(&folder.absolute)
        {
            self.keep_out(&mut walked, &format!("{}/", folder.relative), 0, || {
                "marked as a cache by its CACHEDIR.TAG".to_owned()
            });
            return Ok(walked);
        }
        let level = Level::enter(
            folder.above.as_ref(),
            &folder.absolute,
            || {
                (
                    folder.relative.len() + usize::from(!folder.relative.is_empty()),
                    None,
                )
            },
            &names,
            &mut walked.notes,
        );
        let mut below = Vec::new();
        for entry in &entries {
            self.entry(folder, &level, entry, &mut walked, &mut below)?;
        }
        note_names_that_clash(&folder.relative, &walked.found, &below, &mut walked.notes);
        let deeper: Vec<Walked> = below
            .par_iter()
            .map(|folder| self.folder(folder))
            .collect::<Result<_, _>>()?;
        for other in deeper {
            walked.add(other);
        }
        Ok(walked)
    }

    fn entries(&self, folder: &Folder<'_>) -> Result<Vec<DirEntry>, ScanError> {
        let entries = fs::read_dir(&folder.absolute).and_then(Iterator::collect);
        match entries {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries.map_err(|source| ScanError::Read {
                path: folder.absolute.clone(),
                source,
            }),
        }
    }

    fn entry<'f>(
        &self,
        folder: &Folder<'f>,
        level: &Arc<Level>,
        entry: &DirEntry,
        walked: &mut Walked,
        below: &mut Vec<Folder<'f>>,
    ) -> Result<(), ScanError> {
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            walked
                .notes
                .push(left_out(&entry.path(), "its name is not UTF-8"));
            return Ok(());
        };
        let relative = if folder.relative.is_empty() {
            name.to_owned()
        } else {
            format!("{}/{name}", folder.relative)
        };
        if name.eq_ignore_ascii_case(".git") {
            self.keep_out(walked, &relative, 0, || {
                "git's own are never sent".to_owned()
            });
            return Ok(());
        }
        // Whatever it is: people put a link to another disk there.
        if self.never.contains(&relative) {
            self.keep_out(walked, &format!("{relative}/"), 0, || {
                "cargo's target directory is never sent".to_owned()
            });
            return Ok(());
        }
        let file_type = entry.file_type().map_err(|source| ScanError::Read {
            path: entry.path(),
            source,
        })?;
        if file_type.is_dir() {
            self.subfolder(folder, level, entry.path(), relative, walked, below);
            return Ok(());
        }
        match self.fate(folder, level, &relative, false) {
            Fate::Sent { rule } => self.file(entry.path(), relative, file_type, rule, walked),
            Fate::LookBelow { rule } | Fate::KeptOut { rule } => {
                if self.listing {
                    let size = entry.metadata().map_or(0, |metadata| metadata.len());
                    self.keep_out(walked, &relative, size, || rule);
                }
                Ok(())
            }
        }
    }

    fn subfolder<'f>(
        &self,
        folder: &Folder<'f>,
        level: &Arc<Level>,
        absolute: PathBuf,
        relative: String,
        walked: &mut Walked,
        below: &mut Vec<Folder<'f>>,
    ) {
        if self.starts.contains(&relative) {
            return;
        }
        let only_brought_back = match self.fate(folder, level, &relative, true) {
            Fate::Sent { .. } => None,
            Fate::LookBelow { rule } => Some(rule),
            Fate::KeptOut { rule } => {
                self.keep_out(walked, &format!("{relative}/"), 0, || rule);
                return;
            }
        };
        below.push(Folder {
            absolute,
            relative,
            above: Some(level.clone()),
            only_brought_back,
            why: folder.why,
        });
    }

    fn fate(&self, folder: &Folder<'_>, level: &Level, path: &str, is_folder: bool) -> Fate {
        let described = |rule| {
            if self.listing {
                describe(rule, self.root)
            } else {
                String::new()
            }
        };
        let verdict = match &folder.only_brought_back {
            None => level.verdict(self.global, path, is_folder),
            Some(_) => level.own_verdict(path, is_folder),
        };
        let look_below = is_folder && level.brings_back_below(path);
        match (verdict, &folder.only_brought_back) {
            (Verdict::BroughtBack(rule), _) => Fate::Sent {
                rule: described(rule),
            },
            (Verdict::KeptOut(rule), _) => Fate::KeptOut {
                rule: described(rule),
            },
            (Verdict::KeptOutByGit(rule), _) if look_below => Fate::LookBelow {
                rule: described(rule),
            },
            (Verdict::KeptOutByGit(rule), _) => Fate::KeptOut {
                rule: described(rule),
            },
            (Verdict::Nothing, None) => Fate::Sent {
                rule: if self.listing {
                    folder.why.to_owned()
                } else {
                    String::new()
                },
            },
            (Verdict::Nothing, Some(rule)) if look_below => Fate::LookBelow { rule: rule.clone() },
            (Verdict::Nothing, Some(rule)) => Fate::KeptOut { rule: rule.clone() },
        }
    }

    /// Takes a file or link that no rule keeps out.
    fn file(
        &self,
        file: PathBuf,
        relative: String,
        file_type: FileType,
        rule: String,
        walked: &mut Walked,
    ) -> Result<(), ScanError> {
        if !file_type.is_file() && !file_type.is_symlink() {
            let why = "it is neither a file nor a folder nor a link";
            walked.notes.push(left_out(&file, why));
            return Ok(());
        }
        let path = match TreePath::new(relative) {
            Ok(path) => path,
            Err(error) => {
                walked.notes.push(left_out(&file, &error.to_string()));
                return Ok(());
            }
        };
        let metadata = match fs::symlink_metadata(&file) {
            Ok(metadata) => metadata,
            // Gone since the folder was read, as if the scan had come a moment later.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(ScanError::Read { path: file, source }),
        };
        walked.found.push(Found {
            path,
            file,
            kind: kind(&metadata),
            stamp: Stamp::of(&metadata),
            rule,
        });
        Ok(())
    }

    /// Takes a file that is named for itself, whatever ignore rules say.
    fn single(&self, source: &Source, walked: &mut Walked) -> Result<(), ScanError> {
        let Ok(relative) = source.path.strip_prefix(self.root).map(slashed) else {
            return Ok(());
        };
        match fs::symlink_metadata(&source.path) {
            Ok(metadata) if !metadata.is_dir() => self.file(
                source.path.clone(),
                relative,
                metadata.file_type(),
                source.why.clone(),
                walked,
            ),
            _ => Ok(()),
        }
    }

    fn keep_out(&self, walked: &mut Walked, path: &str, size: u64, rule: impl FnOnce() -> String) {
        if self.listing {
            walked.kept_out.push(Listed {
                path: path.to_owned(),
                size,
                rule: rule(),
                sent: false,
            });
        }
    }
}

fn kind(metadata: &Metadata) -> Kind {
    if metadata.is_symlink() {
        return Kind::Symlink;
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        if metadata.permissions().mode() & 0o100 != 0 {
            return Kind::Executable;
        }
    }
    Kind::File
}

fn is_cache(folder: &Path) -> bool {
    let mut start = Vec::new();
    let length = CACHE_MARK.len() as u64;
    fs::File::open(folder.join(CACHE_MARK_FILE))
        .and_then(|file| file.take(length).read_to_end(&mut start))
        .is_ok()
        && start == CACHE_MARK
}

fn left_out(file: &Path, why: &str) -> Note {
    Note {
        text: format!("left out `{}`: {why}", file.display()),
        hint: None,
    }
}

/// macOS and Windows would take such names for one.
fn note_names_that_clash(
    folder: &str,
    files: &[Found],
    folders: &[Folder<'_>],
    notes: &mut Vec<Note>,
) {
    let names = files
        .iter()
        .map(|file| file.path.file_name())
        .chain(folders.iter().map(|folder| {
            let path = folder.relative.as_str();
            path.rsplit_once('/').map_or(path, |(_, name)| name)
        }));
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    for name in names {
        if let Some(other) = seen.insert(name.to_lowercase(), name) {
            let (first, second) = (other.min(name), other.max(name));
            let place = if folder.is_empty() {
                String::new()
            } else {
                format!(" in `{folder}`")
            };
            notes.push(Note {
                text: format!("`{first}` and `{second}`{place} differ only in case"),
                hint: Some("macOS and Windows cannot hold both: rename one".to_owned()),
            });
        }
    }
}

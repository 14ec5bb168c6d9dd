//! Reads a checkout as it lies there: which files are sent, and the digest of each.
//!
//! Exists as one pass that everything later relies on: the manifest that it gives is the tree that the push announces, and [`Scan::read`] gives
//! exactly the bytes that the manifest names or an error. It stops before a credential leaves the laptop. It compares with
//! nothing and sends nothing, and writes to nothing but the cache.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use ignore::gitignore::{Gitignore, GitignoreBuilder, gitconfig_excludes_path};
use rayon::prelude::*;
use rrun_protocol::{
    Digest, Entry, Kind, MAX_FILE_BYTES, MAX_TREE_BYTES, Manifest, ManifestError, TreePath,
};

use crate::{
    cache::Cache,
    cargo_config::{is_cargo_config, portable},
    discover::{Checkout, Note},
    weigh::heaviest,
};

mod credentials;
mod rules;
mod stamps;
mod walk;

use credentials::Finding;
use rules::{read_rules, slashed};
use stamps::{Known, Stamps};
use walk::{Found, walk};

/// Name of the stat cache.
const STAMPS: &str = "stamps";

/// A checkout at one moment.
#[derive(Debug)]
pub(crate) struct Scan {
    /// The tree.
    pub(crate) manifest: Manifest,
    /// Every file that is sent or kept out, by path; empty unless asked for.
    pub(crate) listing: Vec<Listed>,
    /// What is left out or may surprise.
    pub(crate) notes: Vec<Note>,
    root: PathBuf,
    /// Files whose content in the tree is not the one on disk.
    rewritten: BTreeMap<TreePath, Vec<u8>>,
}

/// One file or folder of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Path in the tree; a folder that is kept out as a whole ends with `/`.
    pub(crate) path: String,
    /// Size in bytes; 0 for a folder.
    pub(crate) size: u64,
    /// What lets it through or keeps it out.
    pub(crate) rule: String,
    /// Whether it is sent.
    pub(crate) sent: bool,
}

/// Why there is no scan.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScanError {
    /// Something could not be read.
    #[error("cannot read `{}`: {source}", .path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it was when it was scanned: scan again.
    #[error("`{path}` changed while it was read")]
    ChangedMeanwhile {
        /// The file.
        path: TreePath,
    },
    /// Files that look like credentials.
    #[error("would send credentials: {}", named(.files))]
    Credentials {
        /// Each with the reason.
        files: Vec<(TreePath, Finding)>,
    },
    /// The files cannot be one tree.
    #[error(transparent)]
    Tree(#[from] ManifestError),
    /// Beyond what a tree may hold.
    #[error("the tree has {bytes} bytes, more than {MAX_TREE_BYTES}; the largest: {}", .folders.iter().map(|(path, _)| format!("`{path}`")).collect::<Vec<_>>().join(", "))]
    TooLarge {
        /// Sum of all sizes.
        bytes: u64,
        /// Folders (with `/` at their end) and files that weigh most, largest first.
        folders: Vec<(String, u64)>,
    },
    /// A pattern of `allow` is none.
    #[error("setting `allow`: {0}")]
    Allow(#[source] ignore::Error),
}

impl ScanError {
    /// What to do next.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::ChangedMeanwhile { .. } => Some("push again".to_owned()),
            Self::Credentials { files } => files.first().map(|(path, _)| {
                format!(
                    "write the line `/{path}` into `.rrunignore` in the top folder of what is sent; if it has to go, add it to `allow` in [package.metadata.rrun]"
                )
            }),
            Self::Tree(
                ManifestError::LinkOutside { path, .. } | ManifestError::FileTooLarge { path, .. },
            ) => Some(leave_out(path.as_str())),
            Self::TooLarge { folders, .. } => folders.first().map(|(path, _)| leave_out(path)),
            _ => None,
        }
    }
}

fn leave_out(path: &str) -> String {
    format!("leave it out by the line `/{path}` in `.rrunignore` in the top folder of what is sent")
}

fn named(files: &[(TreePath, Finding)]) -> String {
    let named: Vec<String> = files
        .iter()
        .map(|(path, finding)| format!("`{path}` ({})", finding.reason()))
        .collect();
    named.join(", ")
}

/// Scans `checkout`. With `listing`, every file is listed with the rule that decided on it, at the cost of some time.
pub(crate) fn scan(checkout: &Checkout, cache: &Cache, listing: bool) -> Result<Scan, ScanError> {
    let mut notes = Vec::new();
    let global = gitconfig_excludes_path()
        .map_or_else(Gitignore::empty, |file| read_rules(&file, &mut notes));
    let mut scan = scan_at(checkout, cache, listing, &global, SystemTime::now())?;
    scan.notes.extend(notes);
    Ok(scan)
}

fn scan_at(
    checkout: &Checkout,
    cache: &Cache,
    listing: bool,
    global: &Gitignore,
    started: SystemTime,
) -> Result<Scan, ScanError> {
    let walked = walk(checkout, global, listing)?;
    check_sizes(&walked.found)?;
    let mut notes = walked.notes;
    let configurations = Configurations::read(checkout, &walked.found, &mut notes)?;
    let mut found = walked.found;
    found.retain(|file| !configurations.broken.contains(&file.path));

    let links = link_targets(&found)?;
    let known = contents(checkout, cache, &found, started)?;
    stop_at_credentials(checkout, &found, &known)?;

    let executables = executables_of_base(cache);
    let mut known = known.iter();
    let entries = found.iter().map(|file| {
        let kind = match executables.contains(&file.path) {
            true if file.kind == Kind::File => Kind::Executable,
            _ => file.kind,
        };
        let entry = if let Some(target) = links.get(&file.path) {
            Entry::of(kind, target.as_bytes())
        } else {
            let content = known.next().expect("every file but links was hashed");
            match configurations.rewritten.get(&file.path) {
                Some(text) => Entry::of(kind, text),
                None => Entry {
                    kind,
                    size: content.stamp.size,
                    digest: content.digest,
                },
            }
        };
        (file.path.clone(), entry)
    });
    let manifest = Manifest::new(entries)?;
    manifest.check_links(|path, _| links.get(path).cloned())?;
    let listing = if listing {
        list(&manifest, &found, walked.kept_out)
    } else {
        Vec::new()
    };
    Ok(Scan {
        manifest,
        listing,
        notes,
        root: checkout.root.clone(),
        rewritten: configurations.rewritten,
    })
}

impl Scan {
    /// The content that the manifest names at `path`.
    pub(crate) fn read(&self, path: &TreePath) -> Result<Vec<u8>, ScanError> {
        let changed = || ScanError::ChangedMeanwhile { path: path.clone() };
        let entry = self.manifest.get(path.as_str()).ok_or_else(changed)?;
        if let Some(bytes) = self.rewritten.get(path) {
            return Ok(bytes.clone());
        }
        let file = self.root.join(path);
        let bytes = if entry.kind == Kind::Symlink {
            link_target(&file, path)?.into_bytes()
        } else {
            read_file(&file, path)?
        };
        if Digest::of(&bytes) == entry.digest {
            Ok(bytes)
        } else {
            Err(changed())
        }
    }
}

/// Stops before anything is read, where reading all would take long and end in an error.
fn check_sizes(found: &[Found]) -> Result<(), ScanError> {
    for file in found {
        if file.kind != Kind::Symlink && file.stamp.size > MAX_FILE_BYTES {
            return Err(ScanError::Tree(ManifestError::FileTooLarge {
                path: file.path.clone(),
                size: file.stamp.size,
                limit: MAX_FILE_BYTES,
            }));
        }
    }
    let bytes = found.iter().map(|file| file.stamp.size).sum();
    if bytes > MAX_TREE_BYTES {
        return Err(ScanError::TooLarge {
            bytes,
            folders: heaviest(found.iter().map(|file| (&file.path, file.stamp.size))),
        });
    }
    Ok(())
}

/// Cargo's configuration files as they travel.
#[derive(Default)]
struct Configurations {
    /// Contents without what belongs to this laptop, where that differs from the disk.
    rewritten: BTreeMap<TreePath, Vec<u8>>,
    /// Those that are not TOML: left out, because of what they may hold.
    broken: BTreeSet<TreePath>,
}

impl Configurations {
    fn read(
        checkout: &Checkout,
        found: &[Found],
        notes: &mut Vec<Note>,
    ) -> Result<Self, ScanError> {
        let mut configurations = Self::default();
        let named = &checkout.sources.configurations;
        for file in found.iter().filter(|file| file.kind != Kind::Symlink) {
            if is_cargo_config(file.path.as_str()) || named.contains(&file.file) {
                configurations.add(file, notes)?;
            }
        }
        for file in named {
            if found.iter().all(|found| found.file != *file) {
                note_unsent_settings(file, notes);
            }
        }
        Ok(configurations)
    }

    fn add(&mut self, file: &Found, notes: &mut Vec<Note>) -> Result<(), ScanError> {
        let bytes = read_file(&file.file, &file.path)?;
        let read = String::from_utf8(bytes)
            .map_err(|error| error.to_string())
            .and_then(|text| portable(&text).map_err(|error| error.to_string()));
        match read {
            Ok(read) if read.left_out.is_empty() => {}
            Ok(read) => {
                notes.push(left_out_settings(file.path.as_str(), &read.left_out));
                self.rewritten
                    .insert(file.path.clone(), read.text.into_bytes());
            }
            Err(why) => {
                let text = format!("left out `{}`: {}", file.path, why.trim_end());
                notes.push(Note { text, hint: None });
                self.broken.insert(file.path.clone());
            }
        }
        Ok(())
    }
}

/// Names the settings of a file that is not sent at all, as it says nothing but for this laptop.
fn note_unsent_settings(file: &Path, notes: &mut Vec<Note>) {
    let read = fs::read_to_string(file)
        .ok()
        .and_then(|text| portable(&text).ok());
    if let Some(read) = read.filter(|read| !read.left_out.is_empty()) {
        notes.push(left_out_settings(
            &file.display().to_string(),
            &read.left_out,
        ));
    }
}

fn left_out_settings(path: &str, keys: &[String]) -> Note {
    let keys: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
    Note {
        text: format!(
            "left out of `{path}`, as it holds for this machine only: {}",
            keys.join(", ")
        ),
        hint: None,
    }
}

/// Digest and findings of each regular file, in order: from the stat cache where a file was not touched, else by reading it.
fn contents(
    checkout: &Checkout,
    cache: &Cache,
    found: &[Found],
    started: SystemTime,
) -> Result<Vec<Known>, ScanError> {
    let root = slashed(&checkout.root);
    let stamps = cache
        .load_compact::<Stamps>(STAMPS)
        .filter(|stamps| stamps.is_for(&root))
        .unwrap_or_default();
    let mut look_up = stamps.in_order();
    let files: Vec<(&Found, Option<&Known>)> = found
        .iter()
        .filter(|file| file.kind != Kind::Symlink)
        .map(|file| (file, look_up.untouched(file.path.as_str(), &file.stamp)))
        .collect();
    let all_known = files.iter().all(|(_, known)| known.is_some()) && files.len() == stamps.len();
    let contents = files
        .into_par_iter()
        .map(|(file, known)| match known {
            Some(known) => Ok(known.clone()),
            None => hash(file),
        })
        .collect::<Result<Vec<_>, ScanError>>()?;
    if !all_known {
        let stamps = Stamps::new(root, started, contents);
        // Without it the next scan takes longer, and that is all.
        let _ = cache.store_compact(STAMPS, &stamps);
        return Ok(stamps.into_files());
    }
    Ok(contents)
}

fn hash(file: &Found) -> Result<Known, ScanError> {
    let content = read_file(&file.file, &file.path)?;
    // A file that grew since it was looked at has a stamp of its own by now.
    if content.len() as u64 != file.stamp.size {
        return Err(ScanError::ChangedMeanwhile {
            path: file.path.clone(),
        });
    }
    Ok(Known {
        path: file.path.as_str().to_owned(),
        stamp: file.stamp,
        digest: Digest::of(&content),
        finding: credentials::by_content(&content),
    })
}

fn stop_at_credentials(
    checkout: &Checkout,
    found: &[Found],
    known: &[Known],
) -> Result<(), ScanError> {
    let by_name = found
        .iter()
        .filter_map(|file| Some((file.path.clone(), credentials::by_name(file.path.as_str())?)));
    let by_content = known
        .iter()
        .filter_map(|file| Some((TreePath::new(file.path.as_str()).ok()?, file.finding?)));
    let mut files: BTreeMap<TreePath, Finding> = by_content.collect();
    files.extend(by_name);
    if files.is_empty() {
        return Ok(());
    }
    let allowed = Allowed::new(checkout)?;
    let files: Vec<_> = files
        .into_iter()
        .filter(|(path, _)| !allowed.lets_through(path))
        .collect();
    if files.is_empty() {
        Ok(())
    } else {
        Err(ScanError::Credentials { files })
    }
}

/// The setting `allow`.
struct Allowed<'c> {
    folder: Option<&'c TreePath>,
    patterns: Gitignore,
}

impl<'c> Allowed<'c> {
    fn new(checkout: &'c Checkout) -> Result<Self, ScanError> {
        let mut builder = GitignoreBuilder::new("");
        for pattern in &checkout.project.settings.allow {
            builder.add_line(None, pattern).map_err(ScanError::Allow)?;
        }
        Ok(Self {
            folder: checkout.project.settings_folder.as_ref(),
            patterns: builder.build().map_err(ScanError::Allow)?,
        })
    }

    /// Patterns start from the settings' folder; what lies outside of it is matched from the tree's root.
    fn lets_through(&self, path: &TreePath) -> bool {
        let path = path.strip_prefix(self.folder).unwrap_or(path.as_str());
        self.patterns
            .matched_path_or_any_parents(path, false)
            .is_ignore()
    }
}

/// Where files have no executable bit, those that had it in the last tree keep it.
fn executables_of_base(cache: &Cache) -> BTreeSet<TreePath> {
    #[cfg(unix)]
    {
        let _ = cache;
        BTreeSet::new()
    }
    #[cfg(not(unix))]
    {
        let base = cache.newest_tree().unwrap_or_default();
        base.iter()
            .filter(|(_, entry)| entry.kind == Kind::Executable)
            .map(|(path, _)| path.clone())
            .collect()
    }
}

fn list(manifest: &Manifest, found: &[Found], kept_out: Vec<Listed>) -> Vec<Listed> {
    let sent = found.iter().filter_map(|file| {
        let entry = manifest.get(file.path.as_str())?;
        Some(Listed {
            path: file.path.to_string(),
            size: entry.size,
            rule: file.rule.clone(),
            sent: true,
        })
    });
    // A file that a rule keeps out may be sent for another reason, as Cargo.lock.
    let kept_out = kept_out
        .into_iter()
        .filter(|listed| manifest.get(&listed.path).is_none());
    let mut listing: Vec<Listed> = sent.chain(kept_out).collect();
    listing.sort_by(|left, right| left.path.cmp(&right.path));
    listing.dedup_by(|later, earlier| later.path == earlier.path);
    listing
}

fn read_file(file: &Path, path: &TreePath) -> Result<Vec<u8>, ScanError> {
    fs::read(file).map_err(|source| gone_or(source, file, path))
}

fn link_targets(found: &[Found]) -> Result<HashMap<TreePath, String>, ScanError> {
    found
        .iter()
        .filter(|file| file.kind == Kind::Symlink)
        .map(|file| Ok((file.path.clone(), link_target(&file.file, &file.path)?)))
        .collect()
}

/// A link's target as text, with `/` between components.
fn link_target(file: &Path, path: &TreePath) -> Result<String, ScanError> {
    let target = fs::read_link(file).map_err(|source| gone_or(source, file, path))?;
    let text = target.to_str().ok_or_else(|| ScanError::Read {
        path: file.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, "the link's target is not UTF-8"),
    })?;
    Ok(if cfg!(windows) {
        text.replace('\\', "/")
    } else {
        text.to_owned()
    })
}

/// A file that was there a moment ago was changed meanwhile; anything else is an error of its own.
fn gone_or(source: io::Error, file: &Path, path: &TreePath) -> ScanError {
    match source.kind() {
        // The last one: a link that became a file.
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::InvalidInput => {
            ScanError::ChangedMeanwhile { path: path.clone() }
        }
        _ => ScanError::Read {
            path: file.to_owned(),
            source,
        },
    }
}

#[cfg(test)]
mod tests;

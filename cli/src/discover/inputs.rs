//! Reads files for discovery and keeps account of them: the memory of what was found holds while all of them are as they were.
//!
//! Exists so that nothing can be read and forgotten in that account: there is no other way to read in discovery. It does not
//! know what the files mean.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rrun_protocol::Digest;
use serde::{Deserialize, Serialize};

/// A file that changed less than this before it was read may change again without a new time: kernels stamp by a clock that ticks
/// every 1 to 10 ms.
const SETTLED: Duration = Duration::from_millis(20);
/// The same where the file system keeps whole seconds; two is the coarsest (FAT).
const SETTLED_COARSE: Duration = Duration::from_secs(2);

/// What was seen at a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Seen {
    /// The file's content; `None`: no file.
    Content(Option<Digest>),
    /// Whether there is anything.
    Presence(bool),
    /// The names in a folder, each with whether it holds a manifest or a `main.rs`.
    Names(Digest),
    /// The folders that a pattern fits.
    Pattern(Digest),
}

/// All that discovery read. What was seen in two states stands here with both, and such an account never holds.
#[derive(Debug, Default)]
pub(crate) struct Inputs {
    seen: RefCell<BTreeSet<(PathBuf, Seen)>>,
}

/// The account of a finished discovery.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Account(BTreeSet<(PathBuf, Seen)>);

impl Inputs {
    /// The text of `file`, or `None` if there is none.
    pub(crate) fn read(&self, file: &Path) -> io::Result<Option<String>> {
        let bytes = content(file)?;
        self.note(file, Seen::Content(bytes.as_deref().map(Digest::of)));
        bytes
            .map(String::from_utf8)
            .transpose()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
    }

    /// Whether there is anything at `path`.
    pub(crate) fn exists(&self, path: &Path) -> bool {
        let exists = fs::symlink_metadata(path).is_ok();
        self.note(path, Seen::Presence(exists));
        exists
    }

    /// Takes the names in `folder` into account.
    pub(crate) fn watch_names(&self, folder: &Path) {
        self.note(folder, Seen::Names(names(folder)));
    }

    /// Takes into account which folders `pattern` fits.
    pub(crate) fn watch_pattern(&self, pattern: &Path) {
        self.note(pattern, Seen::Pattern(fitting(pattern)));
    }

    fn note(&self, path: &Path, seen: Seen) {
        self.seen.borrow_mut().insert((path.to_owned(), seen));
    }

    /// The account, if no file in it changed so shortly before `started` that it could be another one than what was read.
    pub(crate) fn settled(self, started: SystemTime) -> Option<Account> {
        let seen = self.seen.into_inner();
        let all_old = seen.iter().all(|(path, _)| {
            let Ok(modified) = fs::metadata(path).and_then(|metadata| metadata.modified()) else {
                return true;
            };
            let is_coarse = modified
                .duration_since(SystemTime::UNIX_EPOCH)
                .is_ok_and(|since| since.subsec_nanos() == 0);
            let settled = if is_coarse { SETTLED_COARSE } else { SETTLED };
            modified + settled < started
        });
        all_old.then_some(Account(seen))
    }
}

impl Account {
    /// Whether everything is as it was.
    pub(crate) fn holds(&self) -> bool {
        self.0.iter().all(|(path, seen)| match seen {
            Seen::Content(digest) => {
                content(path).is_ok_and(|bytes| bytes.as_deref().map(Digest::of) == *digest)
            }
            Seen::Presence(exists) => fs::symlink_metadata(path).is_ok() == *exists,
            Seen::Names(digest) => names(path) == *digest,
            Seen::Pattern(digest) => fitting(path) == *digest,
        })
    }
}

fn content(file: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(file) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Ok(None),
            // A folder named like a file, as `.cargo/config/`, and what only others may read: cargo passes both by.
            io::ErrorKind::IsADirectory | io::ErrorKind::PermissionDenied => Ok(None),
            _ => Err(error),
        },
    }
}

fn names(folder: &Path) -> Digest {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| {
            let is_target = entry.path().join("main.rs").exists();
            format!("{:?} {is_target}\n", entry.file_name())
        })
        .collect();
    names.sort();
    Digest::of(names.concat().as_bytes())
}

fn fitting(pattern: &Path) -> Digest {
    let mut folders: Vec<String> = pattern
        .to_str()
        .and_then(|pattern| glob::glob(pattern).ok())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|folder| folder.join("Cargo.toml").exists())
        .map(|folder| format!("{folder:?}\n"))
        .collect();
    folders.sort();
    Digest::of(folders.concat().as_bytes())
}

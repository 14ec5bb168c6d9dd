//! The stat cache: which content a file had when it last looked as it looks now, as in git's index.
//!
//! Exists so that a scan of ten thousand unchanged files opens none of them. Content decides, never times: a stamp only says that a file was not
//! touched, and one that is too young to say so says nothing. It does no hashing.

use std::{
    fs::Metadata,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rrun_protocol::Digest;
use serde::{Deserialize, Serialize};

use super::credentials::Finding;

/// Files touched less than this before they were hashed may have been touched again within one tick of their clock.
const SETTLED: Duration = Duration::from_secs(2);

/// What the file system says of a file without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    pub(super) size: u64,
    modified: Time,
    /// On Unix the time that nobody can set: it tells an edit whose size and modification time were restored.
    changed: Time,
    inode: u64,
}

/// Seconds and nanoseconds since 1970.
type Time = (i64, u32);

impl Stamp {
    #[cfg(unix)]
    pub(super) fn of(metadata: &Metadata) -> Self {
        use std::os::unix::fs::MetadataExt as _;
        Self {
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec() as u32),
            changed: (metadata.ctime(), metadata.ctime_nsec() as u32),
            inode: metadata.ino(),
        }
    }

    #[cfg(not(unix))]
    pub(super) fn of(metadata: &Metadata) -> Self {
        let unknown = (i64::MAX, 0);
        Self {
            size: metadata.len(),
            modified: metadata.modified().map_or(unknown, time),
            changed: metadata.created().map_or((0, 0), time),
            inode: 0,
        }
    }

    fn is_before(&self, limit: Time) -> bool {
        self.modified.max(self.changed) < limit
    }
}

fn time(time: SystemTime) -> Time {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs() as i64, since.subsec_nanos())
}

/// A file as it was hashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    pub(super) path: String,
    pub(super) stamp: Stamp,
    pub(super) digest: Digest,
    /// What its content was recognised as, so that it is read for that once only.
    pub(super) finding: Option<Finding>,
}

/// All files of the last scan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamps {
    /// The tree's root that the paths start from.
    root: String,
    /// When the scan began that hashed the last of them.
    hashed: Time,
    /// In the order of their paths.
    files: Vec<Known>,
}

impl Stamps {
    pub(super) fn new(root: String, hashed: SystemTime, files: Vec<Known>) -> Self {
        Self {
            root,
            hashed: time(hashed),
            files,
        }
    }

    pub(super) fn is_for(&self, root: &str) -> bool {
        self.root == root
    }

    /// The same stamps with wrong digests, to show where they are believed.
    #[cfg(test)]
    pub(super) fn falsified(mut self) -> Self {
        for file in &mut self.files {
            file.digest = Digest::of(b"false");
        }
        self
    }

    pub(super) fn into_files(self) -> Vec<Known> {
        self.files
    }

    /// How many files are known.
    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    /// Looks files up whose paths come in rising order.
    pub(super) fn in_order(&self) -> LookUp<'_> {
        let limit = (self.hashed.0 - SETTLED.as_secs() as i64, self.hashed.1);
        LookUp {
            files: &self.files,
            limit,
        }
    }
}

/// A look-up that goes through the known files once.
pub(super) struct LookUp<'s> {
    files: &'s [Known],
    limit: Time,
}

impl<'s> LookUp<'s> {
    /// What is known of the file at `path`, if it was not touched since.
    pub(super) fn untouched(&mut self, path: &str, stamp: &Stamp) -> Option<&'s Known> {
        let skip = self
            .files
            .iter()
            .take_while(|known| known.path.as_str() < path)
            .count();
        self.files = &self.files[skip..];
        self.files.first().filter(|known| {
            known.path == path && known.stamp == *stamp && stamp.is_before(self.limit)
        })
    }
}

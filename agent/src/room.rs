//! A full disk: how it is recognised, and what is removed so that a later push succeeds.
//!
//! Only what can be made again goes: cargo's incremental files cost one slower build. Which generations may go is known by who
//! owns them. On Cloud Run the disk is the instance's memory, so every byte counts twice.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{compile::CompileError, layout::Layout};

/// Cargo's folder of incremental files, one in each profile's.
const INCREMENTAL: &str = "incremental";

/// What the system says when a disk is full; compilers pass it on.
const FULL: &str = "No space left on device";

/// How a linker dies that writes its output through memory, where no room is left for a page.
const DIED_WRITING: [&str; 2] = ["Bus error", "SIGBUS"];

/// Below this a large executable may not find room.
const LITTLE_ROOM_BYTES: u64 = 256 << 20;

/// Whether something failed for want of room.
pub(crate) fn is_no_room(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(is_full)
            || matches!(cause.downcast_ref(), Some(CompileError::NoRoom(_)))
    })
}

/// Whether an operation failed because the disk, or the user's share of it, is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

/// Whether a line of a failed build's log says that there was no room in `folder`.
pub(crate) fn tells_full(line: &str, folder: &Path) -> bool {
    let died_writing = || DIED_WRITING.iter().any(|text| line.contains(text));
    let is_low = || free_bytes(folder).is_some_and(|bytes| bytes < LITTLE_ROOM_BYTES);
    // The text alone may stand in somebody's code.
    (line.contains(FULL) || died_writing()) && is_low()
}

/// Removes cargo's incremental files, and says how much is free then and what to do next.
pub(crate) fn make(layout: &Layout) -> String {
    for folder in incremental_folders(&layout.target()) {
        if let Err(error) = fs::remove_dir_all(&folder) {
            tracing::warn!("cannot remove `{}`: {error}", folder.display());
        }
    }
    let free = free_bytes(&layout.target()).map_or(String::new(), |bytes| {
        format!("{} MB are free now; ", bytes / 1_000_000)
    });
    tracing::warn!("the disk is full: older versions and incremental files are removed. {free}");
    format!(
        "older versions and cargo's incremental files were removed to make room. {free}push again, or give the agent more room (on Cloud Run: memory)"
    )
}

/// Below each profile, with and without a folder for the platform in between.
fn incremental_folders(target: &Path) -> Vec<PathBuf> {
    let folders = |of: &Path| -> Vec<PathBuf> {
        let items = fs::read_dir(of).into_iter().flatten().flatten();
        items
            .map(|item| item.path())
            .filter(|path| path.is_dir() && !path.is_symlink())
            .collect()
    };
    let mut found = folders(target);
    found.extend(found.clone().iter().flat_map(|folder| folders(folder)));
    found.iter_mut().for_each(|folder| folder.push(INCREMENTAL));
    found.retain(|folder| folder.is_dir());
    found
}

fn free_bytes(path: &Path) -> Option<u64> {
    let statistics = rustix::fs::statvfs(path).ok()?;
    Some(statistics.f_bavail * statistics.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incremental_files_go_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::create(folder.path()).unwrap();
        let (gone, kept) = (
            [
                "debug/incremental/app",
                "x86_64-unknown-linux-gnu/release/incremental/app",
            ],
            ["debug/deps", "debug/build/incremental-1"],
        );
        for path in gone.iter().chain(&kept) {
            fs::create_dir_all(layout.target().join(path)).unwrap();
        }
        let said = make(&layout);
        assert!(said.contains("MB are free now"), "{said}");
        assert!(gone.iter().all(|path| !layout.target().join(path).exists()));
        assert!(kept.iter().all(|path| layout.target().join(path).exists()));
    }
}

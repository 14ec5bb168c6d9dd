//! What rrun keeps about one checkout: its id, the number of its last scan, and the service it goes to.
//!
//! One small file for each project in the state folder, changed under a lock, so that two pushes at once never get one
//! number and the later scan always has the higher one.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use fs4::{FileExt, TryLockError};
use rrun_protocol::CheckoutId;
use serde::{Deserialize, Serialize};

use crate::folders::make_private;

/// The file's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checkout {
    pub(crate) id: CheckoutId,
    /// Where it lies, for messages about its agent.
    pub(crate) folder: PathBuf,
    last_sequence: u64,
    /// Remembered by `rrun use`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) service: Option<String>,
}

/// Reads what is kept in `state`, if anything.
pub(crate) fn load(state: &Path) -> Option<Checkout> {
    serde_json::from_slice(&fs::read(state.join("checkout.json")).ok()?).ok()
}

/// Draws the number of a scan that is about to start.
pub(crate) fn number(state: &Path, folder: &Path) -> io::Result<(CheckoutId, u64)> {
    change(state, folder, |checkout| {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis();
        // Time makes it rise even when the file is lost; the file, when the clock goes back.
        checkout.last_sequence =
            (checkout.last_sequence + 1).max(u64::try_from(now).unwrap_or_default());
        (checkout.id, checkout.last_sequence)
    })
}

/// Remembers the service that the project goes to, or forgets it.
pub(crate) fn remember_service(
    state: &Path,
    folder: &Path,
    service: Option<String>,
) -> io::Result<()> {
    change(state, folder, |checkout| checkout.service = service)
}

/// Locks `name` in `state` until the file is dropped, if no other rrun has it.
pub(crate) fn try_lock(state: &Path, name: &str) -> io::Result<Option<File>> {
    let file = open_lock(state, name)?;
    match FileExt::try_lock(&file) {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn open_lock(state: &Path, name: &str) -> io::Result<File> {
    make_private(state)?;
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(state.join(name))
}

fn change<T>(
    state: &Path,
    folder: &Path,
    change: impl FnOnce(&mut Checkout) -> T,
) -> io::Result<T> {
    let lock = open_lock(state, "checkout.lock")?;
    FileExt::lock(&lock)?;
    let mut checkout = match load(state) {
        Some(checkout) => checkout,
        None => Checkout {
            id: CheckoutId::from_random(random()?),
            folder: folder.to_owned(),
            last_sequence: 0,
            service: None,
        },
    };
    let result = change(&mut checkout);
    let mut unfinished = tempfile::NamedTempFile::new_in(state)?;
    unfinished.write_all(&serde_json::to_vec(&checkout)?)?;
    unfinished.persist(state.join("checkout.json"))?;
    Ok(result)
}

/// Random bytes for an id.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_rise_under_one_id_and_the_service_stays() {
        let state = tempfile::tempdir().unwrap();
        let folder = Path::new("/app");
        let (id, first) = number(state.path(), folder).unwrap();
        remember_service(state.path(), folder, Some("https://a".to_owned())).unwrap();
        let (same, second) = number(state.path(), folder).unwrap();
        assert_eq!(id, same);
        assert!(second > first);
        let kept = load(state.path()).unwrap();
        assert_eq!(kept.service.as_deref(), Some("https://a"));
        assert_eq!(kept.folder, folder);
    }

    #[test]
    fn numbers_drawn_at_once_are_all_different() {
        let state = tempfile::tempdir().unwrap();
        let numbers: Vec<u64> = std::thread::scope(|scope| {
            let draw = || number(state.path(), Path::new("/app")).unwrap().1;
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(draw)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let different: std::collections::HashSet<_> = numbers.iter().collect();
        assert_eq!(different.len(), 8);
    }
}

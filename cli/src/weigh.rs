//! Which folders are heavy: names the few places that make a push too large.
//!
//! Exists because "too large" alone helps nobody, and neither does naming the project's own folder: it goes down as long as one folder
//! holds nearly all. It decides nothing about what is sent.

use std::collections::BTreeMap;

use rrun_protocol::TreePath;

/// How many places are named.
const NAMED: usize = 5;

/// The heaviest folders (with `/` at their end) and files among `files`, largest first, each as deep as it stays informative.
pub(crate) fn heaviest<'p>(
    files: impl IntoIterator<Item = (&'p TreePath, u64)>,
) -> Vec<(String, u64)> {
    let mut top = Folder::default();
    for (path, size) in files {
        top.add(path.as_str(), size);
    }
    let (start, prefix) = top.narrowed(String::new());
    let mut places: Vec<(String, u64)> = start
        .folders
        .iter()
        .map(|(name, folder)| {
            let (narrowed, path) = folder.narrowed(format!("{prefix}{name}/"));
            narrowed.only_file(&path).unwrap_or((path, narrowed.bytes))
        })
        .chain(
            start
                .files
                .iter()
                .map(|(name, size)| (format!("{prefix}{name}"), *size)),
        )
        .collect();
    places.sort_by(|left, right| right.1.cmp(&left.1).then_with(|| left.0.cmp(&right.0)));
    places.truncate(NAMED);
    places
}

/// A folder with the sum of what lies in it.
#[derive(Default)]
struct Folder<'p> {
    bytes: u64,
    folders: BTreeMap<&'p str, Folder<'p>>,
    files: BTreeMap<&'p str, u64>,
}

impl<'p> Folder<'p> {
    fn add(&mut self, path: &'p str, size: u64) {
        self.bytes += size;
        match path.split_once('/') {
            Some((folder, rest)) => self.folders.entry(folder).or_default().add(rest, size),
            None => {
                self.files.insert(path, size);
            }
        }
    }

    /// Goes down while one folder holds at least three quarters.
    fn narrowed(&self, path: String) -> (&Self, String) {
        let heavy = self
            .folders
            .iter()
            .find(|(_, folder)| folder.bytes.saturating_mul(4) >= self.bytes.saturating_mul(3));
        match heavy {
            Some((name, folder)) if self.bytes > 0 => folder.narrowed(format!("{path}{name}/")),
            _ => (self, path),
        }
    }

    /// The file, if it is the only thing here.
    fn only_file(&self, path: &str) -> Option<(String, u64)> {
        match (self.folders.is_empty(), self.files.len()) {
            (true, 1) => self
                .files
                .first_key_value()
                .map(|(name, size)| (format!("{path}{name}"), *size)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_that_weighs_is_named_and_not_the_folders_around_it() {
        let files = [
            ("app/src/main.rs", 10),
            ("app/assets/videos/a.mp4", 5_000),
            ("app/assets/videos/b.mp4", 6_000),
            ("app/data/dump.sql", 9_000),
            ("lib/src/lib.rs", 20),
        ]
        .map(|(path, size)| (TreePath::new(path).unwrap(), size));
        let named = heaviest(files.iter().map(|(path, size)| (path, *size)));
        assert_eq!(
            named[..2],
            [
                ("app/assets/videos/".to_owned(), 11_000),
                ("app/data/dump.sql".to_owned(), 9_000)
            ]
        );
    }
}

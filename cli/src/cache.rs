//! What one project's pushes remember on the laptop: file stamps, cargo's metadata, trees and contents.
//!
//! Exists so that the second push reads, asks and sends only what changed. Everything in it may be lost without harm: each value is checked when it is
//! read, and what does not hold counts as absent. Values are written beside their place and renamed, so that a reader in another process sees a whole
//! one or none. It does not choose its folder, and holds nothing that only it knows.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashSet},
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use rrun_protocol::{Digest, MAX_PREFIX_FILE_BYTES, Manifest, TreeDigest, TreePath};
use serde::{Serialize, de::DeserializeOwned};
use tempfile::NamedTempFile;

use crate::scan::Scan;

/// How many trees are kept: the agent's, the image's, and those of pushes under way.
const TREES_KEPT: usize = 4;
const TREES: &str = "trees";
const CONTENTS: &str = "contents";

/// A project's folder in the user's cache.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Uses `folder`, which is made if it is missing and closed to other users.
    pub(crate) fn open(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        close_to_others(&folder)?;
        fs::create_dir_all(folder.join(TREES))?;
        fs::create_dir_all(folder.join(CONTENTS))?;
        Ok(Self { folder })
    }

    /// The value stored under `name`, if there is one of this form.
    pub(crate) fn load<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.value(name)).ok()?).ok()
    }

    /// Stores a small value under `name`.
    pub(crate) fn store<T: Serialize>(&self, name: &str, value: &T) -> io::Result<()> {
        self.write(&self.value(name), &serde_json::to_vec(value)?)
    }

    /// A value in compact form, if not a bit of it changed since it was stored.
    pub(crate) fn load_compact<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let bytes = fs::read(self.compact_value(name)).ok()?;
        let (digest, value) = bytes.split_first_chunk::<32>()?;
        if Digest::of(value).as_bytes() != digest {
            return None;
        }
        postcard::from_bytes(value).ok()
    }

    /// Stores a value in compact form, with its digest in front.
    pub(crate) fn store_compact<T: Serialize>(&self, name: &str, value: &T) -> io::Result<()> {
        let value = postcard::to_stdvec(value).map_err(io::Error::other)?;
        let mut bytes = Digest::of(&value).as_bytes().to_vec();
        bytes.extend(value);
        self.write(&self.compact_value(name), &bytes)
    }

    /// A remembered tree.
    pub(crate) fn tree(&self, digest: &TreeDigest) -> Option<Manifest> {
        let trees = self.trees();
        trees
            .iter()
            .find(|tree| tree.digest == *digest)
            .and_then(KeptTree::manifest)
    }

    /// The tree that was remembered last.
    #[cfg_attr(
        unix,
        expect(dead_code, reason = "only where files have no executable bit")
    )]
    pub(crate) fn newest_tree(&self) -> Option<Manifest> {
        self.trees().first().and_then(KeptTree::manifest)
    }

    /// A remembered content.
    pub(crate) fn content(&self, digest: &Digest) -> Option<Vec<u8>> {
        let bytes = fs::read(self.content_file(digest)).ok()?;
        (Digest::of(&bytes) == *digest).then_some(bytes)
    }

    /// Remembers the scanned tree and the contents that can become a compression prefix, and forgets what no kept tree needs.
    pub(crate) fn remember(&self, scan: &Scan) -> io::Result<()> {
        let digest = scan.manifest.tree_digest();
        let earlier = self.trees();
        if earlier
            .first()
            .is_some_and(|newest| newest.digest == digest)
            && self.tree(&digest).is_some()
        {
            return Ok(());
        }
        let (kept, dropped): (Vec<_>, Vec<_>) = earlier
            .iter()
            .filter(|tree| tree.digest != digest)
            .enumerate()
            .partition(|(age, _)| *age < TREES_KEPT - 1);
        let manifests: Option<Vec<Manifest>> = earlier.iter().map(KeptTree::manifest).collect();
        let known: HashSet<Digest> = manifests.iter().flatten().flat_map(digests).collect();
        self.keep_contents(scan, &known)?;

        let number = earlier.first().map_or(0, |newest| newest.number) + 1;
        let bytes = postcard::to_stdvec(&scan.manifest).map_err(io::Error::other)?;
        self.write(&self.tree_file(number, &digest), &bytes)?;
        for (_, tree) in &dropped {
            remove(&tree.file)?;
        }
        for tree in earlier.iter().filter(|tree| tree.digest == digest) {
            remove(&tree.file)?;
        }

        let mut needed: HashSet<Digest> = digests(&scan.manifest).collect();
        needed.extend(
            kept.iter()
                .filter_map(|(_, tree)| tree.manifest())
                .flat_map(|manifest| digests(&manifest).collect::<Vec<_>>()),
        );
        if manifests.is_some() {
            for digest in known.difference(&needed) {
                remove(&self.content_file(digest))?;
            }
            Ok(())
        } else {
            self.sweep(&needed)
        }
    }

    /// Stores the contents of `scan` that are not `known` yet. One that changed since the scan is left out.
    fn keep_contents(&self, scan: &Scan, known: &HashSet<Digest>) -> io::Result<()> {
        let mut wanted: BTreeMap<Digest, &TreePath> = BTreeMap::new();
        for (path, entry) in scan.manifest.iter() {
            if entry.size <= MAX_PREFIX_FILE_BYTES && !known.contains(&entry.digest) {
                wanted.insert(entry.digest, path);
            }
        }
        wanted.par_iter().try_for_each(|(digest, path)| {
            let file = self.content_file(digest);
            match scan.read(path) {
                Ok(content) if !file.exists() => self.write(&file, &content),
                _ => Ok(()),
            }
        })
    }

    /// Removes all contents but the needed ones; for when it is not known which were there.
    fn sweep(&self, needed: &HashSet<Digest>) -> io::Result<()> {
        for entry in fs::read_dir(self.folder.join(CONTENTS))? {
            let entry = entry?;
            let digest = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if digest.is_none_or(|digest: Digest| !needed.contains(&digest)) {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// The kept trees, newest first.
    fn trees(&self) -> Vec<KeptTree> {
        let Ok(entries) = fs::read_dir(self.folder.join(TREES)) else {
            return Vec::new();
        };
        let mut trees: Vec<KeptTree> = entries
            .flatten()
            .filter_map(|entry| KeptTree::of(entry.path()))
            .collect();
        trees.sort_by_key(|tree| Reverse((tree.number, tree.digest)));
        trees
    }

    fn value(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.json"))
    }

    fn compact_value(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.bin"))
    }

    fn tree_file(&self, number: u64, digest: &TreeDigest) -> PathBuf {
        self.folder.join(TREES).join(format!("{number}-{digest}"))
    }

    fn content_file(&self, digest: &Digest) -> PathBuf {
        self.folder.join(CONTENTS).join(digest.to_string())
    }

    fn write(&self, file: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut beside = NamedTempFile::new_in(&self.folder)?;
        beside.write_all(bytes)?;
        beside.persist(file).map_err(|error| error.error)?;
        Ok(())
    }
}

/// A tree in the cache; its file's name says how new it is and which.
struct KeptTree {
    number: u64,
    digest: TreeDigest,
    file: PathBuf,
}

impl KeptTree {
    fn of(file: PathBuf) -> Option<Self> {
        let (number, digest) = file.file_name()?.to_str()?.split_once('-')?;
        Some(Self {
            number: number.parse().ok()?,
            digest: digest.parse().ok()?,
            file,
        })
    }

    fn manifest(&self) -> Option<Manifest> {
        let manifest: Manifest = postcard::from_bytes(&fs::read(&self.file).ok()?).ok()?;
        (manifest.tree_digest() == self.digest).then_some(manifest)
    }
}

/// Digests of what is remembered of a tree.
fn digests(manifest: &Manifest) -> impl Iterator<Item = Digest> + '_ {
    manifest
        .iter()
        .filter(|(_, entry)| entry.size <= MAX_PREFIX_FILE_BYTES)
        .map(|(_, entry)| entry.digest)
}

/// Removes a file that another process may have removed already.
fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Sources lie in here: nobody else on this machine may read them. On Windows the user's own folders are closed as they are.
fn close_to_others(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))?;
    }
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rrun_protocol::Selection;

    use super::*;
    use crate::{discover::discover, fixture::Fixture, scan::scan};

    fn scanned(fixture: &Fixture, text: &str) -> Scan {
        fixture.write("app/src/main.rs", text);
        let open = |_: &Path| Ok(fixture.cache());
        let (checkout, cache) =
            discover(&fixture.path("app"), &Selection::default(), open).unwrap();
        scan(&checkout, &cache, false).unwrap()
    }

    #[test]
    fn values_read_back_and_broken_ones_are_absent() {
        let fixture = Fixture::new();
        let cache = fixture.cache();
        cache.store("url", &"https://x".to_owned()).unwrap();
        cache.store_compact("numbers", &vec![1u32, 2]).unwrap();
        assert_eq!(cache.load("url"), Some("https://x".to_owned()));
        assert_eq!(cache.load_compact("numbers"), Some(vec![1u32, 2]));
        assert_eq!(cache.load::<u32>("url"), None);
        assert_eq!(cache.load::<String>("missing"), None);
        let file = cache.compact_value("numbers");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        assert_eq!(cache.load_compact::<Vec<u32>>("numbers"), None);
    }

    #[cfg(unix)]
    #[test]
    fn nobody_else_can_read_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let fixture = Fixture::new();
        fs::create_dir_all(fixture.path("open")).unwrap();
        let cache = Cache::open(fixture.path("open")).unwrap();
        let mode = fs::metadata(&cache.folder).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn the_newest_four_trees_are_kept_with_their_contents_and_no_others() {
        let fixture = Fixture::with_app();
        let cache = fixture.cache();
        let texts = [
            "fn main() {}",
            "fn main() { }",
            "fn main(){}",
            "fn  main() {}",
            "fn main () {}",
        ];
        let mut digests = Vec::new();
        for text in texts {
            let scan = scanned(&fixture, text);
            cache.remember(&scan).unwrap();
            digests.push(scan.manifest.tree_digest());
        }
        let kept: Vec<bool> = digests
            .iter()
            .map(|digest| cache.tree(digest).is_some())
            .collect();
        assert_eq!(kept, [false, true, true, true, true]);
        for (text, kept) in texts.iter().zip(kept) {
            let content = cache.content(&Digest::of(text.as_bytes()));
            assert_eq!(content, kept.then(|| text.as_bytes().to_vec()), "{text}");
        }
        // The oldest comes again and is the newest now; what all trees share is still there.
        let scan = scanned(&fixture, texts[1]);
        cache.remember(&scan).unwrap();
        cache
            .remember(&scanned(&fixture, "fn main() { () }"))
            .unwrap();
        assert!(cache.tree(&digests[1]).is_some() && cache.tree(&digests[2]).is_none());
        let manifest = fs::read(fixture.path("app/Cargo.toml")).unwrap();
        assert_eq!(cache.content(&Digest::of(&manifest)), Some(manifest));
    }

    #[test]
    fn a_broken_tree_or_content_is_absent_and_leaves_nothing_behind() {
        let fixture = Fixture::with_app();
        let cache = fixture.cache();
        let scan = scanned(&fixture, "fn main() { 1; }");
        cache.remember(&scan).unwrap();
        let tree = cache.trees().remove(0);
        let other = postcard::to_stdvec(&Manifest::default()).unwrap();
        for bytes in [b"junk".to_vec(), other] {
            fs::write(&tree.file, bytes).unwrap();
            assert!(cache.tree(&tree.digest).is_none());
        }
        let digest = Digest::of(b"fn main() { 1; }");
        fs::write(cache.content_file(&digest), b"junk").unwrap();
        assert!(cache.content(&digest).is_none());

        for text in ["a", "b", "c", "d"] {
            cache.remember(&scanned(&fixture, text)).unwrap();
        }
        assert!(!cache.content_file(&digest).exists());
    }

    #[test]
    fn a_content_that_changed_since_the_scan_is_not_remembered_under_its_name() {
        let fixture = Fixture::with_app();
        let scan = scanned(&fixture, "fn main() { 1; }");
        fixture.write("app/src/main.rs", "other");
        let cache = fixture.cache();
        cache.remember(&scan).unwrap();
        assert!(cache.content(&Digest::of(b"fn main() { 1; }")).is_none());
        assert!(cache.content(&Digest::of(b"other")).is_none());
    }
}

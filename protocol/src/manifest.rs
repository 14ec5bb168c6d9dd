//! What a tree consists of: each path with kind, size and content digest, and the one digest that names the whole.
//!
//! Content decides, never times: a manifest holds no time, owner or mode beyond the executable bit.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    digest::{Digest, TreeDigest},
    limits::{
        MAX_FILE_BYTES, MAX_LINK_BYTES, MAX_PATH_BYTES, MAX_TREE_BYTES, MAX_TREE_FILES,
        MAX_TREE_PATH_BYTES,
    },
    path::TreePath,
};

/// What lies at a path. Folders exist only through the files in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A regular file.
    File,
    /// A regular file that its owner may execute.
    Executable,
    /// A symbolic link; its content is the target's text.
    Symlink,
}

/// One file of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// What lies there.
    pub kind: Kind,
    /// Length of the content in bytes.
    pub size: u64,
    /// Digest of the content.
    pub digest: Digest,
}

impl Entry {
    /// The entry for `content`.
    pub fn of(kind: Kind, content: &[u8]) -> Self {
        Self {
            kind,
            size: content.len() as u64,
            digest: Digest::of(content),
        }
    }
}

/// The files of a tree, sorted by their paths' bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(TreePath, Entry)>", into = "Vec<(TreePath, Entry)>")]
pub struct Manifest(BTreeMap<TreePath, Entry>);

/// Why files cannot be one tree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The same path twice.
    #[error("`{0}` stands in the tree twice")]
    Twice(TreePath),
    /// A path that other paths use as their folder.
    #[error("`{0}` is a file and a folder at once")]
    FileAndFolder(String),
    /// Beyond [`MAX_TREE_FILES`].
    #[error("the tree has {0} files, more than {MAX_TREE_FILES}")]
    TooManyFiles(usize),
    /// Beyond [`MAX_TREE_PATH_BYTES`].
    #[error("the tree's paths have {0} bytes, more than {MAX_TREE_PATH_BYTES}")]
    PathsTooLong(usize),
    /// Beyond [`MAX_FILE_BYTES`], or [`MAX_LINK_BYTES`] for a link.
    #[error("`{path}` has {size} bytes, more than {limit}")]
    FileTooLarge {
        /// The file.
        path: TreePath,
        /// Its size in bytes.
        size: u64,
        /// What is allowed for its kind.
        limit: u64,
    },
    /// Beyond [`MAX_TREE_BYTES`].
    #[error("the tree has {0} bytes, more than {MAX_TREE_BYTES}")]
    TooLarge(u64),
    /// A link whose target leads out of the tree or in a circle.
    #[error("the link `{path}` leads out of the tree: `{target}`")]
    LinkOutside {
        /// The link.
        path: TreePath,
        /// Its target as written.
        target: String,
    },
}

impl Manifest {
    /// Collects `entries`, in any order, and checks that they can be one tree within the limits.
    pub fn new(
        entries: impl IntoIterator<Item = (TreePath, Entry)>,
    ) -> Result<Self, ManifestError> {
        let mut files = BTreeMap::new();
        let (mut total, mut path_bytes) = (0u64, 0);
        for (path, entry) in entries {
            let limit = if entry.kind == Kind::Symlink {
                MAX_LINK_BYTES
            } else {
                MAX_FILE_BYTES
            };
            if entry.size > limit {
                return Err(ManifestError::FileTooLarge {
                    path,
                    size: entry.size,
                    limit,
                });
            }
            total += entry.size;
            if total > MAX_TREE_BYTES {
                return Err(ManifestError::TooLarge(total));
            }
            if files.len() == MAX_TREE_FILES {
                return Err(ManifestError::TooManyFiles(files.len() + 1));
            }
            path_bytes += path.as_str().len();
            if path_bytes > MAX_TREE_PATH_BYTES {
                return Err(ManifestError::PathsTooLong(path_bytes));
            }
            if files.insert(path.clone(), entry).is_some() {
                return Err(ManifestError::Twice(path));
            }
        }
        for path in files.keys() {
            if let Some(folder) = path.ancestors().find(|folder| files.contains_key(*folder)) {
                return Err(ManifestError::FileAndFolder(folder.to_owned()));
            }
        }
        Ok(Self(files))
    }

    /// SHA-256 over every file's path, kind with executable bit, size and content digest, in order of the paths' bytes.
    ///
    /// Each path is preceded by its length, so that no two trees share the bytes that are digested.
    pub fn tree_digest(&self) -> TreeDigest {
        let mut hasher = Sha256::new();
        hasher.update(b"rrun tree 1\n");
        for (path, entry) in &self.0 {
            hasher.update((path.as_str().len() as u32).to_le_bytes());
            hasher.update(path.as_str());
            let kind = match entry.kind {
                Kind::File => 0u8,
                Kind::Executable => 1,
                Kind::Symlink => 2,
            };
            hasher.update([kind]);
            hasher.update(entry.size.to_le_bytes());
            hasher.update(entry.digest.as_bytes());
        }
        TreeDigest(Digest::finish(hasher))
    }

    /// The file at `path`.
    pub fn get(&self, path: &str) -> Option<&Entry> {
        self.0.get(path)
    }

    /// The files in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&TreePath, &Entry)> {
        self.0.iter()
    }

    /// How many files.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no file at all, as in an agent that never got a push.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sum of the files' sizes in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.0.values().map(|entry| entry.size).sum()
    }

    /// Checks that every link leads to a place inside the tree, also through other links. `target` gives a link's content.
    ///
    /// The place may not exist, as a link may point to what the build makes.
    pub fn check_links(
        &self,
        target: impl Fn(&TreePath, &Entry) -> Option<String>,
    ) -> Result<(), ManifestError> {
        let links: BTreeMap<&str, Option<String>> = self
            .0
            .iter()
            .filter(|(_, entry)| entry.kind == Kind::Symlink)
            .map(|(path, entry)| (path.as_str(), target(path, entry)))
            .collect();
        for (path, _) in self
            .0
            .iter()
            .filter(|(_, entry)| entry.kind == Kind::Symlink)
        {
            if !stays_inside(path, &links) {
                let target = links
                    .get(path.as_str())
                    .cloned()
                    .flatten()
                    .unwrap_or_default();
                return Err(ManifestError::LinkOutside {
                    path: path.clone(),
                    target,
                });
            }
        }
        Ok(())
    }
}

/// Follows `path` the way the kernel does, component by component, and says whether it ever leaves the root.
fn stays_inside(path: &TreePath, links: &BTreeMap<&str, Option<String>>) -> bool {
    /// What Linux allows before it answers ELOOP.
    const MAX_LINKS_FOLLOWED: usize = 40;
    /// Where a link may lead at most; no file can lie deeper, and the walk stays short.
    const MAX_PLACE_BYTES: usize = 4 * MAX_PATH_BYTES;
    let mut followed = 0;
    let mut here = String::new();
    let mut rest: Vec<&str> = path.as_str().rsplit('/').collect();
    while let Some(component) = rest.pop() {
        match component {
            "" | "." => {}
            ".." if here.is_empty() => return false,
            ".." => here.truncate(here.rfind('/').unwrap_or_default()),
            _ if component.eq_ignore_ascii_case(".git") => return false,
            _ => {
                let above = here.len();
                if above > 0 {
                    here.push('/');
                }
                here.push_str(component);
                let Some(target) = links.get(here.as_str()) else {
                    if here.len() > MAX_PLACE_BYTES {
                        return false;
                    }
                    continue;
                };
                followed += 1;
                let Some(target) = target.as_deref().filter(|target| is_relative(target)) else {
                    return false;
                };
                if followed > MAX_LINKS_FOLLOWED {
                    return false;
                }
                here.truncate(above);
                rest.extend(target.rsplit('/'));
            }
        }
    }
    true
}

fn is_relative(target: &str) -> bool {
    !target.is_empty() && !target.starts_with('/') && !target.contains('\0')
}

impl TryFrom<Vec<(TreePath, Entry)>> for Manifest {
    type Error = ManifestError;

    fn try_from(entries: Vec<(TreePath, Entry)>) -> Result<Self, ManifestError> {
        Self::new(entries)
    }
}

impl From<Manifest> for Vec<(TreePath, Entry)> {
    fn from(manifest: Manifest) -> Self {
        manifest.0.into_iter().collect()
    }
}

impl IntoIterator for Manifest {
    type Item = (TreePath, Entry);
    type IntoIter = std::collections::btree_map::IntoIter<TreePath, Entry>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(files: &[(&str, Kind, &str)]) -> Result<Manifest, ManifestError> {
        Manifest::new(files.iter().map(|(path, kind, content)| {
            (
                TreePath::new(*path).unwrap(),
                Entry::of(*kind, content.as_bytes()),
            )
        }))
    }

    fn links(files: &[(&str, &str)]) -> Result<(), ManifestError> {
        let all: Vec<_> = files
            .iter()
            .map(|(path, target)| (*path, Kind::Symlink, *target))
            .collect();
        let target = |path: &TreePath, _: &Entry| {
            files
                .iter()
                .find(|(name, _)| *name == path.as_str())
                .map(|(_, target)| (*target).to_owned())
        };
        manifest(&all)?.check_links(target)
    }

    #[test]
    fn order_of_arrival_does_not_matter_but_everything_else_does() {
        let base = [("a", Kind::File, "1"), ("b/c", Kind::File, "2")];
        let digest = manifest(&base).unwrap().tree_digest();
        assert_eq!(manifest(&[base[1], base[0]]).unwrap().tree_digest(), digest);
        for other in [
            [("a", Kind::File, "x"), ("b/c", Kind::File, "2")],
            [("a", Kind::Executable, "1"), ("b/c", Kind::File, "2")],
            [("a", Kind::Symlink, "1"), ("b/c", Kind::File, "2")],
            [("a", Kind::File, "1"), ("b/d", Kind::File, "2")],
        ] {
            assert_ne!(manifest(&other).unwrap().tree_digest(), digest, "{other:?}");
        }
    }

    #[test]
    fn a_file_cannot_be_a_folder_too() {
        let error = manifest(&[("a", Kind::Symlink, "b"), ("a/x/y", Kind::File, "")]).unwrap_err();
        assert_eq!(error, ManifestError::FileAndFolder("a".to_owned()));
    }

    #[test]
    fn links_may_not_leave_the_tree_even_through_each_other() {
        links(&[("a/b", "../c"), ("d", "a/b/../x")]).unwrap();
        links(&[("broken", "nowhere/yet")]).unwrap();
        for bad in [
            &[("a", "/etc")][..],
            &[("a", "..")],
            &[("a/b", "../../x")],
            &[("here", "."), ("a", "here/../../x"), ("b", "here/..")],
            &[("a", "b"), ("b", "a")],
            &[("a", ".git/config")],
            &[("a", "")],
        ] {
            assert!(
                matches!(links(bad), Err(ManifestError::LinkOutside { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_manifest_read_from_json_is_checked() {
        let whole = serde_json::to_string(&manifest(&[("a", Kind::File, "1")]).unwrap()).unwrap();
        assert!(serde_json::from_str::<Manifest>(&whole).is_ok());
        let doubled = format!("[{0},{0}]", &whole[1..whole.len() - 1]);
        assert!(serde_json::from_str::<Manifest>(&doubled).is_err());
    }
}

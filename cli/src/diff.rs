//! What has to happen to one tree so that it becomes another: two manifests in, positions and paths out.
//!
//! Exists so that the pushed delta is a pure function of two lists. It reads no file, and finds no renames: a renamed file is
//! one that goes and one that comes, and compression with the old content as prefix makes that nearly free.

use rrun_protocol::{Manifest, TreePath};

/// The way from a base tree to a target tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Positions in the base of files with other content or kind in the target, rising.
    pub(crate) changed: Vec<u32>,
    /// Positions in the base of files that the target does not have, rising.
    pub(crate) deleted: Vec<u32>,
    /// Paths in the target of changed and added files, sorted.
    pub(crate) files: Vec<TreePath>,
}

/// Compares two trees.
pub(crate) fn diff(base: &Manifest, target: &Manifest) -> Difference {
    let mut difference = Difference::default();
    for (position, (path, entry)) in (0u32..).zip(base.iter()) {
        match target.get(path.as_str()) {
            None => difference.deleted.push(position),
            Some(new) if new != entry => difference.changed.push(position),
            Some(_) => {}
        }
    }
    let is_news =
        |(path, entry): &(&TreePath, &_)| base.get(path.as_str()).is_none_or(|old| old != *entry);
    difference.files = target
        .iter()
        .filter(is_news)
        .map(|(path, _)| path.clone())
        .collect();
    difference
}

/// The same way without relying on what the base's files hold: every file of the target is sent.
pub(crate) fn everything(base: &Manifest, target: &Manifest) -> Difference {
    let (changed, deleted) = (0u32..)
        .zip(base.iter())
        .partition::<Vec<_>, _>(|(_, (path, _))| target.get(path.as_str()).is_some());
    let positions =
        |files: Vec<(u32, _)>| files.into_iter().map(|(position, _)| position).collect();
    Difference {
        changed: positions(changed),
        deleted: positions(deleted),
        files: target.iter().map(|(path, _)| path.clone()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rrun_protocol::{Entry, Kind};

    fn tree(files: &[(&str, Kind, &str)]) -> Manifest {
        Manifest::new(files.iter().map(|(path, kind, content)| {
            let path = TreePath::new(*path).unwrap();
            (path, Entry::of(*kind, content.as_bytes()))
        }))
        .unwrap()
    }

    #[test]
    fn changed_added_and_deleted_files_are_told_apart() {
        let base = tree(&[
            ("a", Kind::File, "1"),
            ("b", Kind::File, "2"),
            ("c", Kind::File, "3"),
        ]);
        let target = tree(&[
            ("a", Kind::File, "1"),
            ("c", Kind::File, "new"),
            ("aa", Kind::File, "4"),
        ]);
        let expected = Difference {
            changed: vec![2],
            deleted: vec![1],
            files: ["aa", "c"]
                .map(|path| TreePath::new(path).unwrap())
                .to_vec(),
        };
        assert_eq!(diff(&base, &target), expected);
    }

    #[test]
    fn everything_is_sent_again_though_nothing_changed() {
        let base = tree(&[
            ("a", Kind::File, "1"),
            ("b", Kind::File, "2"),
            ("c", Kind::File, "3"),
        ]);
        let target = tree(&[("a", Kind::File, "1"), ("c", Kind::File, "3")]);
        let whole = everything(&base, &target);
        assert_eq!((whole.changed, whole.deleted), (vec![0, 2], vec![1]));
        assert_eq!(whole.files.len(), 2);
    }

    #[test]
    fn a_new_executable_bit_is_a_change_and_equal_trees_have_none() {
        let base = tree(&[("run.sh", Kind::File, "x")]);
        let target = tree(&[("run.sh", Kind::Executable, "x")]);
        assert_eq!(diff(&base, &target).changed, [0]);
        assert_eq!(diff(&base, &base), Difference::default());
    }

    #[test]
    fn a_module_that_becomes_a_folder_goes_and_comes() {
        let base = tree(&[("src/foo.rs", Kind::File, "x")]);
        let target = tree(&[("src/foo/mod.rs", Kind::File, "x")]);
        let difference = diff(&base, &target);
        assert_eq!((difference.deleted, difference.files.len()), (vec![0], 1));
    }
}

//! A push's body into checked files beside the tree. Nothing in the tree changes here.
//!
//! The digests of body and upload were checked before; this takes it apart, checks it against the base and gives the tree that results,
//! which is the announced one or an error that names the entry.

use std::io::{self, BufRead, BufReader, Read};

use flate2::read::GzDecoder;
use rrun_protocol::{
    ArchiveError, ArchiveRules, Entry, Manifest, ManifestError, Preamble, PushError, TreeDigest,
    TreePath, WrongPlan, decompress, read_tar, write_tar,
};

use crate::{
    layout::Layout,
    room,
    tree::{Staged, Tree},
};

/// First bytes of a gzip stream, as in a `tar.gz` that is sent as it is.
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];

/// A push that arrived whole.
pub(crate) struct Received {
    /// What `rrun` says of it; `None` for a whole tree made without it.
    pub preamble: Option<Preamble>,
    /// The tree that the push results in.
    pub target: Manifest,
    /// The new files' contents.
    pub staged: Staged,
    /// Files changed and added.
    pub changed: usize,
    /// Files deleted.
    pub deleted: usize,
}

/// Why a body was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    /// Made against a tree that the agent does not have.
    #[error("the push starts from tree {}, the agent has {}", .base.short(), .tree.short())]
    WrongBase {
        /// What it starts from.
        base: TreeDigest,
        /// What lies here.
        tree: TreeDigest,
    },
    /// Not a push, or one that does not fit its base.
    #[error(transparent)]
    Push(#[from] PushError),
    /// An archive that does not keep the rules.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// Files that cannot be one tree.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// An archive without a file, as of a command that failed: taken as a tree, it would delete everything.
    #[error("the archive holds no file")]
    NoFile,
    /// A plan that would build or run something else than it names.
    #[error(transparent)]
    Plan(#[from] WrongPlan),
    /// A content encoding other than gzip.
    #[error("content encoding `{0}` is not known")]
    Encoding(String),
    /// The agent could not store it.
    #[error("cannot store the push: {0}")]
    Store(#[source] io::Error),
}

impl ReceiveError {
    /// Whether the agent is at fault, not the push.
    pub(crate) fn is_internal(&self) -> bool {
        matches!(
            self,
            Self::Store(_) | Self::Archive(ArchiveError::Store { .. })
        )
    }

    /// Whether the agent's disk is full.
    pub(crate) fn is_no_room(&self) -> bool {
        match self {
            Self::Store(source) | Self::Archive(ArchiveError::Store { source, .. }) => {
                room::is_full(source)
            }
            _ => false,
        }
    }
}

/// Takes `body` apart against `base`, the manifest of the present tree.
pub(crate) fn receive(
    layout: &Layout,
    base: &Manifest,
    mut body: impl Read,
    content_encoding: &str,
) -> Result<Received, ReceiveError> {
    let staged = Staged::new(layout).map_err(ReceiveError::Store)?;
    let start = read_start(&mut body).map_err(ReceiveError::Store)?;
    match content_encoding {
        "" if Preamble::is_push(&start) => receive_push(layout, base, &start, body, staged),
        "" if !start.starts_with(GZIP_MAGIC) => receive_whole_tree(base, start.chain(body), staged),
        "" | "gzip" => receive_whole_tree(base, GzDecoder::new(start.chain(body)), staged),
        other => Err(ReceiveError::Encoding(other.chars().take(40).collect())),
    }
}

/// As much as decides what a body is and holds any preamble.
fn read_start(body: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut start = Vec::new();
    body.take(Preamble::MAX_START_BYTES as u64)
        .read_to_end(&mut start)?;
    Ok(start)
}

fn receive_push(
    layout: &Layout,
    base: &Manifest,
    start: &[u8],
    rest: impl Read,
    staged: Staged,
) -> Result<Received, ReceiveError> {
    let (preamble, payload) = Preamble::from_body(start)?;
    preamble.plan.check()?;
    let mut payload = BufReader::new(payload.chain(rest));
    // A push against the empty tree brings everything, so it fits on whatever lies here.
    let nothing = Manifest::default();
    let base = if preamble.base == nothing.tree_digest() {
        &nothing
    } else {
        base
    };
    if preamble.base != base.tree_digest() {
        return Err(ReceiveError::WrongBase {
            base: preamble.base,
            tree: base.tree_digest(),
        });
    }
    let replaced = preamble.replaced(base)?;
    let prefix = if preamble.with_prefix {
        prefix(layout, &replaced.prefix_files())?
    } else {
        Vec::new()
    };
    let mut entries = Vec::new();
    let has_files = !payload.fill_buf().map_err(ReceiveError::Store)?.is_empty();
    if has_files {
        let mut archive = decompress(payload, &prefix).map_err(ArchiveError::Unreadable)?;
        entries = unpack(&mut archive, ArchiveRules::Push, &staged)?;
        archive.finish()?;
    }
    let (changed, deleted) = (entries.len(), replaced.deleted.len());
    let target = preamble.resulting_tree(base, entries)?;
    check_links(layout, &target, &staged)?;
    if !preamble.no_build {
        preamble.plan.check_folder(&target)?;
    }
    Ok(Received {
        preamble: Some(preamble),
        target,
        staged,
        changed,
        deleted,
    })
}

fn receive_whole_tree(
    base: &Manifest,
    archive: impl Read,
    staged: Staged,
) -> Result<Received, ReceiveError> {
    let target = Manifest::new(unpack(archive, ArchiveRules::WholeTree, &staged)?)?;
    if target.is_empty() {
        return Err(ReceiveError::NoFile);
    }
    target.check_links(|_, entry| link_target(staged.read(&entry.digest)))?;
    let changed = target
        .iter()
        .filter(|(path, entry)| base.get(path.as_str()) != Some(*entry))
        .count();
    let deleted = base
        .iter()
        .filter(|(path, _)| target.get(path.as_str()).is_none())
        .count();
    Ok(Received {
        preamble: None,
        target,
        staged,
        changed,
        deleted,
    })
}

/// The archive of the base versions, as the laptop made it to compress against.
fn prefix(layout: &Layout, files: &[(&TreePath, &Entry)]) -> Result<Vec<u8>, ReceiveError> {
    let contents: Vec<Vec<u8>> = files
        .iter()
        .map(|(_, entry)| Tree::content(layout, &entry.digest))
        .collect::<io::Result<_>>()
        .map_err(ReceiveError::Store)?;
    let files = files.iter().zip(&contents);
    Ok(write_tar(files.map(|((path, entry), bytes)| {
        rrun_protocol::Content {
            path,
            kind: entry.kind,
            bytes,
        }
    })))
}

fn unpack(
    archive: impl Read,
    rules: ArchiveRules,
    staged: &Staged,
) -> Result<Vec<(TreePath, Entry)>, ArchiveError> {
    let mut entries = Vec::new();
    read_tar(archive, rules, |path, kind, content| {
        entries.push((path.clone(), staged.store(kind, content)?));
        Ok(())
    })?;
    Ok(entries)
}

fn check_links(layout: &Layout, target: &Manifest, staged: &Staged) -> Result<(), ManifestError> {
    target.check_links(|_, entry| {
        link_target(
            staged
                .read(&entry.digest)
                .or_else(|_| Tree::content(layout, &entry.digest)),
        )
    })
}

fn link_target(content: io::Result<Vec<u8>>) -> Option<String> {
    String::from_utf8(content.ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rrun_protocol::{BuildPlan, CheckoutId, Kind, Plan, RunPlan, compress};

    struct Bench {
        _folder: tempfile::TempDir,
        layout: Layout,
        tree: Tree,
    }

    fn path(text: &str) -> TreePath {
        TreePath::new(text).unwrap()
    }

    fn archive(files: &[(&str, Kind, &str)]) -> Vec<u8> {
        let paths: Vec<TreePath> = files.iter().map(|(name, ..)| path(name)).collect();
        let contents =
            paths
                .iter()
                .zip(files)
                .map(|(path, (_, kind, content))| rrun_protocol::Content {
                    path,
                    kind: *kind,
                    bytes: content.as_bytes(),
                });
        write_tar(contents)
    }

    fn manifest(files: &[(&str, Kind, &str)]) -> Manifest {
        let entry = |(name, kind, content): &(&str, Kind, &str)| {
            (path(name), Entry::of(*kind, content.as_bytes()))
        };
        Manifest::new(files.iter().map(entry)).unwrap()
    }

    fn preamble(base: &Manifest, target: TreeDigest, changed: &[u32], deleted: &[u32]) -> Preamble {
        let build = BuildPlan {
            directory: None,
            package: "a".to_owned(),
            bin: "a".to_owned(),
            profile: "dev".to_owned(),
            features: Vec::new(),
            no_default_features: false,
            environment: Default::default(),
        };
        Preamble {
            checkout: CheckoutId::from_random([1; 9]),
            sequence: 1,
            base: base.tree_digest(),
            target,
            with_prefix: true,
            no_build: true,
            changed: changed.to_vec(),
            deleted: deleted.to_vec(),
            plan: Plan {
                build,
                run: RunPlan::default(),
            },
        }
    }

    impl Bench {
        /// An agent whose tree holds `files`.
        fn new(files: &[(&str, Kind, &str)]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let layout = Layout::create(folder.path()).unwrap();
            let mut tree = Tree::open(&layout).unwrap();
            let received = receive(&layout, tree.manifest(), &archive(files)[..], "").unwrap();
            tree.apply(received.target, &received.staged).unwrap();
            Self {
                _folder: folder,
                layout,
                tree,
            }
        }

        fn receive(&self, body: &[u8]) -> Result<Received, ReceiveError> {
            receive(&self.layout, self.tree.manifest(), body, "")
        }
    }

    #[test]
    fn a_change_arrives_as_its_difference_to_the_base() {
        let long = "line of text that is the same before and after\n".repeat(500);
        let base = [
            ("deleted", Kind::File, "1"),
            ("long", Kind::File, long.as_str()),
            ("same", Kind::File, "2"),
        ];
        let bench = Bench::new(&base);
        let edited = format!("{long}one more\n");
        let target = [
            ("long", Kind::File, edited.as_str()),
            ("new", Kind::Executable, "3"),
            ("same", Kind::File, "2"),
        ];
        let prefix = archive(&base[..2]);
        let payload = compress(&archive(&target[..2]), &prefix, 19).unwrap();
        assert!(payload.len() < 150, "{} bytes", payload.len());
        let body = preamble(
            &manifest(&base),
            manifest(&target).tree_digest(),
            &[1],
            &[0],
        )
        .into_body(&payload);
        let received = bench.receive(&body).unwrap();
        assert_eq!(received.target, manifest(&target));
        assert_eq!((received.changed, received.deleted), (2, 1));
    }

    #[test]
    fn a_push_against_another_tree_is_told_which_one_lies_here() {
        let bench = Bench::new(&[("a", Kind::File, "1")]);
        let other = manifest(&[("a", Kind::File, "2")]);
        let body = preamble(&other, other.tree_digest(), &[], &[]).into_body(b"");
        let error = bench.receive(&body).err().unwrap();
        assert!(
            matches!(error, ReceiveError::WrongBase { tree, .. } if tree == bench.tree.digest())
        );
        // Against nothing it brings everything, and fits anywhere.
        let payload = compress(&archive(&[("a", Kind::File, "2")]), b"", 3).unwrap();
        let body =
            preamble(&Manifest::default(), other.tree_digest(), &[], &[]).into_body(&payload);
        assert_eq!(bench.receive(&body).unwrap().target, other);
    }

    #[test]
    fn a_push_that_gives_another_tree_than_announced_is_refused() {
        let base = [("a", Kind::File, "1")];
        let bench = Bench::new(&base);
        let target = manifest(&[("a", Kind::File, "2")]).tree_digest();
        let payload = compress(&archive(&[("a", Kind::File, "3")]), &archive(&base), 19).unwrap();
        let body = preamble(&manifest(&base), target, &[0], &[]).into_body(&payload);
        assert!(matches!(
            bench.receive(&body),
            Err(ReceiveError::Push(PushError::WrongTree { .. }))
        ));
    }

    #[test]
    fn links_that_lead_outside_are_refused_by_name() {
        let bench = Bench::new(&[("a", Kind::File, "1")]);
        for (name, target) in [
            ("out", "../../etc/passwd"),
            ("abs", "/etc/passwd"),
            ("d/up", "../../x"),
        ] {
            let error = bench
                .receive(&archive(&[(name, Kind::Symlink, target)]))
                .err()
                .unwrap()
                .to_string();
            assert!(error.contains(name) && error.contains(target), "{error}");
        }
        assert!(
            bench
                .receive(&archive(&[("in", Kind::Symlink, "a")]))
                .is_ok()
        );
    }

    #[test]
    fn a_whole_tree_may_come_as_tar_or_gzip() {
        use std::io::Write as _;
        let bench = Bench::new(&[("old", Kind::File, "1")]);
        let tar = archive(&[("a", Kind::File, "2")]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&tar).unwrap();
        let gzip = gzip.finish().unwrap();
        for (body, encoding) in [(&tar, ""), (&gzip, "gzip"), (&gzip, "")] {
            let received =
                receive(&bench.layout, bench.tree.manifest(), &body[..], encoding).unwrap();
            assert_eq!(received.target, manifest(&[("a", Kind::File, "2")]));
            assert_eq!((received.changed, received.deleted), (1, 1));
        }
        assert!(matches!(
            receive(&bench.layout, bench.tree.manifest(), &tar[..], "br"),
            Err(ReceiveError::Encoding(name)) if name == "br"
        ));
    }

    #[test]
    fn junk_changes_nothing_and_leaves_nothing() {
        let bench = Bench::new(&[("a", Kind::File, "1")]);
        let whole =
            preamble(bench.tree.manifest(), bench.tree.digest(), &[0], &[]).into_body(b"not zstd");
        for body in [b"junk".as_slice(), b"rrun", &whole] {
            assert!(bench.receive(body).is_err());
        }
        assert_eq!(
            std::fs::read_dir(bench.layout.staging()).unwrap().count(),
            0
        );
    }
}

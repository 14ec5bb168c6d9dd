//! The body of a push: what changes against a tree that both sides know, as few bytes as can be.
//!
//! ```text
//! "rrun"  preamble (postcard)  tar of the changed and added files, zstd with a reference prefix
//! ```
//!
//! The prefix is the same tar over the base versions of the changed and deleted files. The preamble names them by their
//! position in the base's manifest, so both sides make the same prefix and a changed line costs little more than itself.
//! A body without files (only deletions, or nothing) ends after the preamble. A large payload goes ahead as an upload in
//! parts, and the body ends after the preamble too: see [`crate::push_path`].

use std::{
    collections::HashSet,
    io::{self, BufRead, Read, Write as _},
};

use serde::{Deserialize, Serialize};

use crate::{
    digest::TreeDigest,
    id::CheckoutId,
    limits::{MAX_PREAMBLE_BYTES, MAX_PREFIX_BYTES, MAX_PREFIX_FILE_BYTES, MAX_WINDOW_LOG},
    manifest::{Entry, Manifest, ManifestError},
    path::TreePath,
    plan::Plan,
};

/// First bytes of every body that `rrun` makes, and of no archive or gzip stream.
const MAGIC: &[u8; 4] = b"rrun";

/// Everything about a push but the files' content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preamble {
    /// The checkout that was scanned.
    pub checkout: CheckoutId,
    /// Rises with each scan of the checkout; the agent refuses a lower one than it has seen.
    pub sequence: u64,
    /// The tree that the push starts from; the agent takes it only while it has this one.
    pub base: TreeDigest,
    /// The tree that it results in.
    pub target: TreeDigest,
    /// Whether the content is compressed with the base versions as prefix, or alone.
    pub with_prefix: bool,
    /// Whether to leave the build to a later push.
    pub no_build: bool,
    /// Positions in the base's manifest of the files with new content or kind, rising.
    pub changed: Vec<u32>,
    /// Positions in the base's manifest of the files that go, rising.
    pub deleted: Vec<u32>,
    /// What to build and how to run it.
    pub plan: Plan,
}

/// Why a body is not a push, or does not fit its base.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// Not of the form that `rrun` sends.
    #[error("the body is not a push")]
    Malformed,
    /// Bytes behind the compressed files.
    #[error("the push goes on behind its files")]
    Trailing,
    /// The body could not be read to its end.
    #[error("the push cannot be read: {0}")]
    Unreadable(#[source] io::Error),
    /// Positions that are not rising, named twice or beyond the base's files.
    #[error("the push names a position twice, out of order or beyond its base's files: {0}")]
    Position(u32),
    /// A file in the archive replaces one that the preamble does not name as changed.
    #[error("refused `{0}`: the push does not name it as changed")]
    Unannounced(TreePath),
    /// A file named as changed that the archive does not hold.
    #[error("`{0}` is named as changed and not in the archive")]
    Missing(TreePath),
    /// What the push would leave is no tree.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Base, files and positions give another tree than the one announced.
    #[error("the push gives tree {actual}, not {announced} as announced")]
    WrongTree {
        /// What it gives.
        actual: TreeDigest,
        /// What it should.
        announced: TreeDigest,
    },
}

/// The files of the base that a push replaces or deletes.
#[derive(Debug)]
pub struct Replaced<'m> {
    /// Those with new content or kind.
    pub changed: Vec<(&'m TreePath, &'m Entry)>,
    /// Those that go.
    pub deleted: Vec<(&'m TreePath, &'m Entry)>,
}

impl Preamble {
    /// The body that consists of this preamble and `payload`, which is empty or what [`compress`] gave.
    pub fn into_body(self, payload: &[u8]) -> Vec<u8> {
        let mut body = MAGIC.to_vec();
        body.extend(postcard::to_stdvec(&self).expect("plain values into memory always serialize"));
        body.extend_from_slice(payload);
        body
    }

    /// Whether `body` starts like one that `rrun` made.
    pub fn is_push(body: &[u8]) -> bool {
        body.starts_with(MAGIC)
    }

    /// Takes a body apart into preamble and payload.
    pub fn from_body(body: &[u8]) -> Result<(Self, &[u8]), PushError> {
        let rest = body.strip_prefix(MAGIC).ok_or(PushError::Malformed)?;
        let head = &rest[..rest.len().min(MAX_PREAMBLE_BYTES)];
        let (preamble, after) =
            postcard::take_from_bytes::<Self>(head).map_err(|_| PushError::Malformed)?;
        Ok((preamble, &rest[head.len() - after.len()..]))
    }

    /// Longest start of a body that [`Self::from_body`] looks at.
    pub const MAX_START_BYTES: usize = MAGIC.len() + MAX_PREAMBLE_BYTES;

    /// Looks the positions up in the base's manifest.
    pub fn replaced<'m>(&self, base: &'m Manifest) -> Result<Replaced<'m>, PushError> {
        let files: Vec<_> = base.iter().collect();
        let look_up = |positions: &[u32]| {
            let mut next = 0;
            positions
                .iter()
                .map(|position| {
                    let file = files.get(*position as usize).filter(|_| *position >= next);
                    next = position.saturating_add(1);
                    file.copied().ok_or(PushError::Position(*position))
                })
                .collect::<Result<Vec<_>, _>>()
        };
        let changed: HashSet<u32> = self.changed.iter().copied().collect();
        if let Some(both) = self
            .deleted
            .iter()
            .find(|position| changed.contains(position))
        {
            return Err(PushError::Position(*both));
        }
        Ok(Replaced {
            changed: look_up(&self.changed)?,
            deleted: look_up(&self.deleted)?,
        })
    }

    /// The tree that results from `base` and the files that the payload held, if it is the one announced.
    pub fn resulting_tree(
        &self,
        base: &Manifest,
        received: impl IntoIterator<Item = (TreePath, Entry)>,
    ) -> Result<Manifest, PushError> {
        let replaced = self.replaced(base)?;
        let deleted: HashSet<&TreePath> =
            replaced.deleted.into_iter().map(|(path, _)| path).collect();
        let mut missing: HashSet<&TreePath> =
            replaced.changed.into_iter().map(|(path, _)| path).collect();
        let mut files: Vec<_> = base
            .iter()
            .filter(|(path, _)| !deleted.contains(path) && !missing.contains(path))
            .map(|(path, entry)| (path.clone(), *entry))
            .collect();
        for (path, entry) in received {
            if !missing.remove(&path) && base.get(path.as_str()).is_some() {
                return Err(PushError::Unannounced(path));
            }
            files.push((path, entry));
        }
        if let Some(path) = missing.into_iter().min() {
            return Err(PushError::Missing(path.clone()));
        }
        let tree = Manifest::new(files)?;
        let actual = tree.tree_digest();
        if actual != self.target {
            return Err(PushError::WrongTree {
                actual,
                announced: self.target,
            });
        }
        Ok(tree)
    }
}

impl<'m> Replaced<'m> {
    /// The files whose base versions are the compression prefix, in order: none over [`MAX_PREFIX_FILE_BYTES`], no more than
    /// [`MAX_PREFIX_BYTES`] together. Both sides come to the same list.
    pub fn prefix_files(&self) -> Vec<(&'m TreePath, &'m Entry)> {
        let mut files: Vec<_> = self.changed.iter().chain(&self.deleted).copied().collect();
        files.sort_by_key(|(path, _)| *path);
        let mut total = 0;
        files.retain(|(_, entry)| {
            let fits =
                entry.size <= MAX_PREFIX_FILE_BYTES && total + entry.size <= MAX_PREFIX_BYTES;
            total += if fits { entry.size } else { 0 };
            fits
        });
        files
    }
}

/// Compresses `archive` with `prefix` (possibly empty) as reference, at zstd's `level`.
pub fn compress(archive: &[u8], prefix: &[u8], level: i32) -> io::Result<Vec<u8>> {
    // The window has to reach from the archive's last byte to the prefix's first.
    let reach = (archive.len() + prefix.len()).max(1024).next_power_of_two();
    let mut encoder = zstd::Encoder::with_ref_prefix(Vec::new(), level, prefix)?;
    encoder.window_log(reach.trailing_zeros().min(MAX_WINDOW_LOG))?;
    encoder.long_distance_matching(prefix.len() > MAX_PREFIX_FILE_BYTES as usize)?;
    encoder.include_checksum(false)?;
    encoder.include_contentsize(false)?;
    encoder.write_all(archive)?;
    encoder.finish()
}

/// Reads what [`compress`] made with the same `prefix`. Memory is bounded whatever `payload` claims.
pub fn decompress<'p, R: BufRead>(payload: R, prefix: &'p [u8]) -> io::Result<Unpacked<'p, R>> {
    let mut decoder = zstd::Decoder::with_ref_prefix(payload, prefix)?.single_frame();
    decoder.window_log_max(MAX_WINDOW_LOG)?;
    Ok(Unpacked(decoder))
}

/// The archive in a payload, as it unpacks.
pub struct Unpacked<'p, R: BufRead>(zstd::Decoder<'p, R>);

impl<R: BufRead> Unpacked<'_, R> {
    /// Called once all is read: a payload is one frame and nothing else.
    pub fn finish(self) -> Result<(), PushError> {
        match self.0.finish().fill_buf() {
            Ok([]) => Ok(()),
            Ok(_) => Err(PushError::Trailing),
            Err(error) => Err(PushError::Unreadable(error)),
        }
    }
}

impl<R: BufRead> Read for Unpacked<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        manifest::Kind,
        plan::{BuildPlan, RunPlan},
    };

    fn path(text: &str) -> TreePath {
        TreePath::new(text).unwrap()
    }

    fn tree(files: &[(&str, &str)]) -> Manifest {
        Manifest::new(
            files
                .iter()
                .map(|(name, content)| (path(name), Entry::of(Kind::File, content.as_bytes()))),
        )
        .unwrap()
    }

    fn preamble(base: &Manifest, target: &Manifest, changed: &[u32], deleted: &[u32]) -> Preamble {
        Preamble {
            checkout: CheckoutId::from_random([1; 9]),
            sequence: 7,
            base: base.tree_digest(),
            target: target.tree_digest(),
            with_prefix: true,
            no_build: false,
            changed: changed.to_vec(),
            deleted: deleted.to_vec(),
            plan: Plan {
                build: BuildPlan {
                    directory: None,
                    package: "hello".to_owned(),
                    bin: "hello".to_owned(),
                    profile: "dev".to_owned(),
                    features: Vec::new(),
                    no_default_features: false,
                    environment: Default::default(),
                },
                run: RunPlan::default(),
            },
        }
    }

    /// Any change here is a change of the protocol.
    #[test]
    fn the_preamble_has_its_committed_bytes() {
        let (base, target) = (tree(&[("a", "1"), ("b", "2")]), tree(&[("a", "3")]));
        let body = preamble(&base, &target, &[0], &[1]).into_body(b"payload");
        let hex: String = body.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("../vectors/push.txt").trim_end());
        let (read, payload) = Preamble::from_body(&body).unwrap();
        assert_eq!(
            (read, payload),
            (preamble(&base, &target, &[0], &[1]), b"payload".as_slice())
        );
    }

    #[test]
    fn the_resulting_tree_is_the_announced_one_or_an_error() {
        let base = tree(&[("a", "1"), ("b", "2"), ("c", "3")]);
        let target = tree(&[("a", "x"), ("c", "3"), ("new", "y")]);
        let received = |files: &[(&str, &str)]| tree(files);
        let good = preamble(&base, &target, &[0], &[1]);
        assert_eq!(
            good.resulting_tree(&base, received(&[("a", "x"), ("new", "y")]))
                .unwrap(),
            target
        );
        assert!(matches!(
            good.resulting_tree(&base, received(&[("a", "other"), ("new", "y")])),
            Err(PushError::WrongTree { .. })
        ));
        assert!(matches!(
            good.resulting_tree(&base, received(&[("a", "x"), ("c", "z"), ("new", "y")])),
            Err(PushError::Unannounced(at)) if at == path("c")
        ));
        assert!(matches!(
            good.resulting_tree(&base, received(&[("new", "y")])),
            Err(PushError::Missing(at)) if at == path("a")
        ));
        for (changed, deleted) in [
            (&[3][..], &[][..]),
            (&[1, 0], &[]),
            (&[0, 0], &[]),
            (&[0], &[0]),
            (&[u32::MAX], &[]),
        ] {
            let bad = preamble(&base, &target, changed, deleted);
            assert!(
                matches!(bad.replaced(&base), Err(PushError::Position(_))),
                "{changed:?} {deleted:?}"
            );
        }
    }

    #[test]
    fn content_travels_as_its_difference_to_the_prefix() {
        let old: Vec<u8> = (0..30_000u32)
            .flat_map(|number| (number.wrapping_mul(2_654_435_761)).to_le_bytes())
            .collect();
        let mut new = old.clone();
        new[60_000] ^= 1;
        let packed = compress(&new, &old, 19).unwrap();
        assert!(packed.len() < 200, "{} bytes", packed.len());
        let mut unpacked = Vec::new();
        decompress(packed.as_slice(), &old)
            .unwrap()
            .read_to_end(&mut unpacked)
            .unwrap();
        assert_eq!(unpacked, new);
    }

    #[test]
    fn nothing_may_hide_behind_the_compressed_files() {
        let packed = compress(b"archive", b"", 1).unwrap();
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 0];
        for (behind, is_right) in [
            (&b""[..], true),
            (b"x", false),
            (&packed, false),
            (&skippable, false),
        ] {
            let payload = [&packed, behind].concat();
            let mut unpacked = decompress(payload.as_slice(), b"").unwrap();
            let mut archive = Vec::new();
            unpacked.read_to_end(&mut archive).unwrap();
            assert_eq!(archive, b"archive");
            assert_eq!(unpacked.finish().is_ok(), is_right);
        }
    }

    #[test]
    fn junk_is_no_push() {
        for junk in [
            &b""[..],
            b"rru",
            b"rrun",
            b"\x1f\x8b\x08",
            b"rrun\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        ] {
            assert!(Preamble::from_body(junk).is_err());
        }
    }
}

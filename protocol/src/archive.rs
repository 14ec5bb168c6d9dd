//! The tar that carries files, written in one deterministic form and read with suspicion.
//!
//! Written archives hold only path, kind and content, in the order given: both sides make the same bytes from the same files,
//! which is what lets one archive be the compression prefix of another. Reading takes regular files and symbolic links and
//! refuses everything else by name; it never touches the file system.

use std::{
    collections::HashSet,
    io::{self, Read},
};

use tar::{Archive, Builder, EntryType, Header};

use crate::{
    limits::{MAX_FILE_BYTES, MAX_LINK_BYTES, MAX_PATH_BYTES, MAX_TREE_BYTES, MAX_TREE_FILES},
    manifest::Kind,
    path::{PathError, TreePath},
};

/// Longest PAX header that is read: `git archive` writes one path and one link into it.
const MAX_PAX_BYTES: u64 = 4 * MAX_PATH_BYTES as u64;

/// One file with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content<'a> {
    /// Where it lies.
    pub path: &'a TreePath,
    /// What it is.
    pub kind: Kind,
    /// Its bytes; a link's target.
    pub bytes: &'a [u8],
}

/// What an archive may look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArchiveRules {
    /// As [`write_tar`] makes it: files and links in the order of their paths.
    Push,
    /// As `git archive` or `tar` makes it: any order, folders and a comment besides.
    WholeTree,
}

/// Why an archive was refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// An entry's path is not one inside the tree.
    #[error("refused an entry of the archive: {0}")]
    Path(#[from] PathError),
    /// Neither a regular file nor a symbolic link.
    #[error("refused `{path}`: a {what} cannot be pushed")]
    Kind {
        /// The entry.
        path: String,
        /// What it is.
        what: String,
    },
    /// The same path twice, or out of order.
    #[error("refused `{0}`: it stands in the archive twice or out of order")]
    Order(TreePath),
    /// Larger than a limit of this protocol.
    #[error("refused `{path}`: {what}")]
    TooLarge {
        /// The entry.
        path: String,
        /// Which limit.
        what: String,
    },
    /// Not a readable archive.
    #[error("the archive cannot be read: {0}")]
    Unreadable(#[source] io::Error),
    /// The caller could not store a file.
    #[error("cannot store `{path}`: {source}")]
    Store {
        /// The entry.
        path: TreePath,
        /// Why.
        source: io::Error,
    },
}

/// Makes an archive of `files`, which come in the order of their paths.
pub fn write_tar<'a>(files: impl IntoIterator<Item = Content<'a>>) -> Vec<u8> {
    const IN_MEMORY: &str =
        "writing into memory cannot fail, and paths and links were checked before";
    let mut builder = Builder::new(Vec::new());
    for Content { path, kind, bytes } in files {
        let mut header = Header::new_gnu();
        header.set_mode(if kind == Kind::Executable {
            0o755
        } else {
            0o644
        });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        if kind == Kind::Symlink {
            header.set_entry_type(EntryType::Symlink);
            header.set_size(0);
            let target = std::str::from_utf8(bytes).expect("a scanned link's target is text");
            builder
                .append_link(&mut header, path.as_str(), target)
                .expect(IN_MEMORY);
        } else {
            header.set_entry_type(EntryType::Regular);
            header.set_size(bytes.len() as u64);
            builder
                .append_data(&mut header, path.as_str(), bytes)
                .expect(IN_MEMORY);
        }
    }
    builder.into_inner().expect(IN_MEMORY)
}

/// Reads an archive and hands each file to `store`, as its content streams in.
///
/// Nothing is kept in memory but names. `store` may stop early; what it leaves unread is skipped.
pub fn read_tar(
    archive: impl Read,
    rules: ArchiveRules,
    mut store: impl FnMut(&TreePath, Kind, &mut dyn Read) -> io::Result<()>,
) -> Result<(), ArchiveError> {
    let mut archive = Archive::new(archive);
    let mut seen = HashSet::new();
    let mut last: Option<TreePath> = None;
    let mut total = 0;
    let mut extended = Extended::default();
    let mut entries_read = 0usize;
    for entry in archive
        .entries()
        .map_err(ArchiveError::Unreadable)?
        .raw(true)
    {
        let mut entry = entry.map_err(ArchiveError::Unreadable)?;
        entries_read += 1;
        // Each file has at most two extension headers and three folders of its own in any archive worth taking.
        if entries_read > 6 * MAX_TREE_FILES {
            return Err(too_large(
                "the archive",
                format!("more than {MAX_TREE_FILES} files"),
            ));
        }
        let kind = entry.header().entry_type();
        if extended.take(kind, &mut entry)? {
            continue;
        }
        let Extended { path, link } = std::mem::take(&mut extended);
        let raw_path = path.unwrap_or_else(|| entry.path_bytes().into_owned());
        if kind == EntryType::Directory && rules == ArchiveRules::WholeTree {
            let folder = raw_path.strip_suffix(b"/").unwrap_or(&raw_path);
            if folder != b"." {
                TreePath::from_bytes(folder.strip_prefix(b"./").unwrap_or(folder))?;
            }
            continue;
        }
        // `tar -c .` writes `./` in front of each name; nothing else is forgiven.
        let path = match rules {
            ArchiveRules::WholeTree => {
                TreePath::from_bytes(raw_path.strip_prefix(b"./").unwrap_or(&raw_path))?
            }
            ArchiveRules::Push => TreePath::from_bytes(&raw_path)?,
        };
        let in_order =
            rules == ArchiveRules::WholeTree || last.as_ref().is_none_or(|last| *last < path);
        if !in_order || !seen.insert(path.clone()) {
            return Err(ArchiveError::Order(path));
        }
        if seen.len() > MAX_TREE_FILES {
            return Err(too_large(
                path.as_str(),
                format!("more than {MAX_TREE_FILES} files"),
            ));
        }
        let size = entry.size();
        match kind {
            EntryType::Regular => {
                if size > MAX_FILE_BYTES {
                    return Err(too_large(
                        path.as_str(),
                        format!("{size} bytes, more than {MAX_FILE_BYTES}"),
                    ));
                }
                total += size;
                if total > MAX_TREE_BYTES {
                    return Err(too_large(
                        path.as_str(),
                        format!("the archive unpacks to more than {MAX_TREE_BYTES} bytes"),
                    ));
                }
                let mode = entry.header().mode().map_err(ArchiveError::Unreadable)?;
                let kind = if mode & 0o100 == 0 {
                    Kind::File
                } else {
                    Kind::Executable
                };
                store(&path, kind, &mut entry).map_err(|source| ArchiveError::Store {
                    path: path.clone(),
                    source,
                })?;
            }
            EntryType::Symlink => {
                let target = link
                    .or_else(|| entry.link_name_bytes().map(|name| name.into_owned()))
                    .unwrap_or_default();
                if target.len() as u64 > MAX_LINK_BYTES {
                    return Err(too_large(
                        path.as_str(),
                        format!("its target is longer than {MAX_LINK_BYTES} bytes"),
                    ));
                }
                if std::str::from_utf8(&target).is_err() || size != 0 {
                    return Err(ArchiveError::Kind {
                        path: path.to_string(),
                        what: "link of this form".to_owned(),
                    });
                }
                store(&path, Kind::Symlink, &mut target.as_slice()).map_err(|source| {
                    ArchiveError::Store {
                        path: path.clone(),
                        source,
                    }
                })?;
            }
            other => {
                let what = match other {
                    EntryType::Link => "hard link".to_owned(),
                    EntryType::Directory => "folder".to_owned(),
                    EntryType::Char | EntryType::Block => "device".to_owned(),
                    EntryType::Fifo => "named pipe".to_owned(),
                    EntryType::GNUSparse => "sparse file".to_owned(),
                    other => format!("tar entry of type {:?}", char::from(other.as_byte())),
                };
                return Err(ArchiveError::Kind {
                    path: path.to_string(),
                    what,
                });
            }
        }
        last = Some(path);
    }
    Ok(())
}

fn too_large(path: &str, what: String) -> ArchiveError {
    ArchiveError::TooLarge {
        path: path.to_owned(),
        what,
    }
}

/// What headers in front of an entry say of it, where its own fields are too short.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

impl Extended {
    /// Reads `entry` if it is such a header, and says whether it was one.
    fn take(
        &mut self,
        kind: EntryType,
        entry: &mut tar::Entry<'_, impl Read>,
    ) -> Result<bool, ArchiveError> {
        let extension = matches!(
            kind,
            EntryType::GNULongName
                | EntryType::GNULongLink
                | EntryType::XHeader
                | EntryType::XGlobalHeader
        );
        if !extension {
            return Ok(false);
        }
        if entry.size() > MAX_PAX_BYTES {
            return Err(too_large(
                "the archive",
                format!(
                    "a header of {} bytes, more than {MAX_PAX_BYTES}",
                    entry.size()
                ),
            ));
        }
        match kind {
            EntryType::GNULongName => self.path = Some(read_name(entry)?),
            EntryType::GNULongLink => self.link = Some(read_name(entry)?),
            EntryType::XHeader => {
                let Some(extensions) = entry.pax_extensions().map_err(ArchiveError::Unreadable)?
                else {
                    return Ok(true);
                };
                for extension in extensions {
                    let extension = extension.map_err(ArchiveError::Unreadable)?;
                    match extension.key_bytes() {
                        b"path" => self.path = Some(extension.value_bytes().to_owned()),
                        b"linkpath" => self.link = Some(extension.value_bytes().to_owned()),
                        // Times and owners are not taken over, so what they say does not matter.
                        b"mtime" | b"atime" | b"ctime" | b"uid" | b"gid" | b"uname" | b"gname"
                        | b"comment" => {}
                        key => {
                            let what = format!(
                                "file with the PAX attribute `{}`",
                                String::from_utf8_lossy(key)
                            );
                            return Err(ArchiveError::Kind {
                                path: "the archive".to_owned(),
                                what,
                            });
                        }
                    }
                }
            }
            // `git archive` writes the commit's id here.
            _ => {}
        }
        Ok(true)
    }
}

/// A GNU long name: its bytes up to the first NUL.
fn read_name(entry: &mut impl Read) -> Result<Vec<u8>, ArchiveError> {
    let mut name = Vec::new();
    entry
        .take(MAX_PAX_BYTES)
        .read_to_end(&mut name)
        .map_err(ArchiveError::Unreadable)?;
    if let Some(end) = name.iter().position(|byte| *byte == 0) {
        name.truncate(end);
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Files = Vec<(TreePath, Kind, Vec<u8>)>;

    fn read(archive: &[u8], rules: ArchiveRules) -> Result<Files, ArchiveError> {
        let mut files = Vec::new();
        read_tar(archive, rules, |path, kind, content| {
            let mut bytes = Vec::new();
            content.read_to_end(&mut bytes)?;
            files.push((path.clone(), kind, bytes));
            Ok(())
        })?;
        Ok(files)
    }

    fn write(files: &Files) -> Vec<u8> {
        write_tar(files.iter().map(|(path, kind, bytes)| Content {
            path,
            kind: *kind,
            bytes,
        }))
    }

    fn path(text: &str) -> TreePath {
        TreePath::new(text).unwrap()
    }

    #[test]
    fn what_is_written_reads_back_also_with_long_names() {
        let long = format!("{}/name.rs", "folder/".repeat(60).trim_end_matches('/'));
        let files = vec![
            (path("a"), Kind::File, b"1".to_vec()),
            (path(&long), Kind::Executable, vec![b'x'; 1000]),
            (path("link"), Kind::Symlink, "../".repeat(70).into_bytes()),
            (path("ü/e\u{301} b"), Kind::File, Vec::new()),
        ];
        assert_eq!(read(&write(&files), ArchiveRules::Push).unwrap(), files);
    }

    /// Both sides make the prefix themselves; if this changes, so must the protocol's version.
    #[test]
    fn the_bytes_have_their_committed_digest() {
        let files = vec![
            (path("Cargo.toml"), Kind::File, b"[package]\n".to_vec()),
            (path("link"), Kind::Symlink, b"src/main.rs".to_vec()),
            (
                path(&format!("src/{}.rs", "n".repeat(120))),
                Kind::Executable,
                b"fn main() {}\n".to_vec(),
            ),
        ];
        let digest = crate::Digest::of(&write(&files)).to_string();
        assert_eq!(digest, include_str!("../vectors/archive.txt").trim_end());
    }

    #[test]
    fn a_push_has_to_be_in_order() {
        let files = vec![
            (path("b"), Kind::File, Vec::new()),
            (path("a"), Kind::File, Vec::new()),
        ];
        assert!(
            matches!(read(&write(&files), ArchiveRules::Push), Err(ArchiveError::Order(at)) if at == path("a"))
        );
        assert_eq!(
            read(&write(&files), ArchiveRules::WholeTree).unwrap().len(),
            2
        );
    }

    #[test]
    fn what_is_no_file_and_no_link_is_refused_by_name() {
        for (kind, what) in [
            (EntryType::Link, "hard link"),
            (EntryType::Char, "device"),
            (EntryType::Fifo, "named pipe"),
            (EntryType::GNUSparse, "sparse file"),
            (EntryType::Directory, "folder"),
        ] {
            let mut builder = Builder::new(Vec::new());
            let mut header = Header::new_gnu();
            header.set_entry_type(kind);
            header.set_path("dev/thing").unwrap();
            header.set_size(0);
            header.set_cksum();
            builder.append(&header, io::empty()).unwrap();
            let error = read(&builder.into_inner().unwrap(), ArchiveRules::Push)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("dev/thing") && error.contains(what),
                "{error}"
            );
        }
    }

    #[test]
    fn a_name_that_leads_outside_is_refused() {
        for name in ["../x", "/etc/x", "a/../../x", ".git/hooks/x"] {
            let mut builder = Builder::new(Vec::new());
            let mut header = Header::new_gnu();
            header.set_entry_type(EntryType::Regular);
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(0);
            header.set_cksum();
            builder.append(&header, io::empty()).unwrap();
            let archive = builder.into_inner().unwrap();
            for rules in [ArchiveRules::Push, ArchiveRules::WholeTree] {
                let error = read(&archive, rules).unwrap_err();
                assert!(
                    matches!(error, ArchiveError::Path(_)) && error.to_string().contains(name),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn a_header_that_promises_too_much_is_refused_before_it_is_read() {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_path("zeros").unwrap();
        header.set_mode(0o644);
        header.set_size(MAX_FILE_BYTES + 1);
        header.set_cksum();
        let endless = header.as_bytes().as_slice().chain(io::repeat(0));
        let error = read_tar(endless, ArchiveRules::Push, |_, _, _| Ok(())).unwrap_err();
        assert!(matches!(error, ArchiveError::TooLarge { .. }), "{error}");
    }
}

//! The tar that carries files, written in one deterministic form and read with suspicion.
//!
//! Written archives hold only path, kind and content, in the order given: both sides make the same bytes from the same files,
//! which is what lets one archive be the compression prefix of another. Reading takes regular files and symbolic links and
//! refuses everything else by name; it never touches the file system.

use std::{
    collections::HashSet,
    io::{self, Read},
};

use tar::{Archive, Builder, Entry, EntryType, Header};

use crate::{
    limits::{
        MAX_FILE_BYTES, MAX_LINK_BYTES, MAX_PATH_BYTES, MAX_TREE_BYTES, MAX_TREE_FILES,
        MAX_TREE_PATH_BYTES,
    },
    manifest::Kind,
    path::{PathError, TreePath},
};

/// Longest PAX header that is read: `git archive` writes one path and one link into it.
const MAX_PAX_BYTES: u64 = 4 * MAX_PATH_BYTES as u64;

/// Longest archive: the largest tree, with as much again for tar's own headers.
const MAX_STREAM_BYTES: u64 = 2 * MAX_TREE_BYTES;

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
    /// Two headers in front of one entry name it, or one does so twice.
    #[error("refused `{0}`: the archive gives it two names")]
    NamedTwice(String),
    /// Headers that describe an entry, and none follows.
    #[error("the archive ends with the name of a file that does not follow")]
    NoEntry,
    /// Cut, or never finished.
    #[error("the archive ends before its end marker")]
    NoEnd,
    /// Something is hidden behind what other programs read, or two archives were joined.
    #[error("the archive goes on behind its end marker")]
    BehindTheEnd,
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
    let mut builder = Builder::new(Vec::new());
    for Content { path, kind, bytes } in files {
        let (mode, entry_type) = match kind {
            Kind::Executable => (0o755, EntryType::Regular),
            Kind::File => (0o644, EntryType::Regular),
            Kind::Symlink => (0o644, EntryType::Symlink),
        };
        let (target, content) = match kind {
            Kind::Symlink => (bytes, &[][..]),
            Kind::File | Kind::Executable => (&[][..], bytes),
        };
        let mut header = plain_header(entry_type, mode, content.len());
        let path = path.as_str().as_bytes();
        // Names go in as they are. The crate's own ways to set them leave `.` and `//` out of a link's target, and fail where
        // the first hundred bytes of a path happen to end with `..`.
        put(&mut header.as_old_mut().name, path);
        put(&mut header.as_old_mut().linkname, target);
        append_long_name(&mut builder, EntryType::GNULongName, path);
        append_long_name(&mut builder, EntryType::GNULongLink, target);
        append(&mut builder, header, content);
    }
    builder.into_inner().expect(IN_MEMORY)
}

const IN_MEMORY: &str = "writing into memory cannot fail";

fn plain_header(entry_type: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(entry_type);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size as u64);
    header
}

/// Puts as many whole letters of `text` into a header's `field` as there is room for.
fn put(field: &mut [u8], text: &[u8]) {
    let mut end = text.len().min(field.len());
    while end > 0 && end < text.len() && is_inside_a_letter(text[end]) {
        end -= 1;
    }
    field[..end].copy_from_slice(&text[..end]);
}

fn is_inside_a_letter(byte: u8) -> bool {
    byte & 0b1100_0000 == 0b1000_0000
}

/// An entry of GNU's in front of the one whose name does not fit into its header.
fn append_long_name(builder: &mut Builder<Vec<u8>>, kind: EntryType, name: &[u8]) {
    const FIELD_BYTES: usize = 100;
    if name.len() <= FIELD_BYTES {
        return;
    }
    let with_nul = [name, b"\0"].concat();
    let mut header = plain_header(kind, 0o644, with_nul.len());
    put(&mut header.as_old_mut().name, b"././@LongLink");
    append(builder, header, &with_nul);
}

fn append(builder: &mut Builder<Vec<u8>>, mut header: Header, content: &[u8]) {
    header.set_cksum();
    builder.append(&header, content).expect(IN_MEMORY);
}

/// Reads an archive and hands each file to `store`, as its content streams in.
///
/// Nothing is kept in memory but names. `store` may stop early; what it leaves unread is skipped. An archive has an end
/// marker, so that one that was cut between two files is not taken for a smaller one, and nothing but zeros after it.
pub fn read_tar(
    archive: impl Read,
    rules: ArchiveRules,
    mut store: impl FnMut(&TreePath, Kind, &mut dyn Read) -> io::Result<()>,
) -> Result<(), ArchiveError> {
    let mut archive = Archive::new(Stream::new(archive));
    let mut reading = Reading::new(rules);
    let mut extended = Extended::default();
    let entries = archive.entries().map_err(ArchiveError::Unreadable)?;
    for entry in entries.raw(true) {
        let mut entry = entry.map_err(ArchiveError::Unreadable)?;
        reading.count_entry()?;
        if !extended.take(&mut entry)? {
            reading.take(&mut entry, std::mem::take(&mut extended), &mut store)?;
        }
    }
    if !extended.is_empty() {
        return Err(ArchiveError::NoEntry);
    }
    archive.into_inner().finish()
}

/// What was read so far, and what may follow it.
struct Reading {
    rules: ArchiveRules,
    entries: usize,
    files: usize,
    path_bytes: usize,
    content_bytes: u64,
    /// The path before, where paths have to rise.
    last: Option<TreePath>,
    /// All paths, where they come in any order.
    seen: HashSet<TreePath>,
}

impl Reading {
    fn new(rules: ArchiveRules) -> Self {
        Self {
            rules,
            entries: 0,
            files: 0,
            path_bytes: 0,
            content_bytes: 0,
            last: None,
            seen: HashSet::new(),
        }
    }

    fn count_entry(&mut self) -> Result<(), ArchiveError> {
        /// Each file has at most two extension headers and three folders of its own in any archive worth taking.
        const MAX_ENTRIES: usize = 6 * MAX_TREE_FILES;
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(too_large(
                "the archive",
                format!("more than {MAX_ENTRIES} entries"),
            ));
        }
        Ok(())
    }

    /// Takes one entry that is no extension header.
    fn take(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        Extended {
            path,
            link,
            unwanted,
        }: Extended,
        store: &mut impl FnMut(&TreePath, Kind, &mut dyn Read) -> io::Result<()>,
    ) -> Result<(), ArchiveError> {
        let raw_path = path.unwrap_or_else(|| entry.path_bytes().into_owned());
        if let Some(key) = unwanted {
            return Err(ArchiveError::Kind {
                path: String::from_utf8_lossy(&raw_path).into_owned(),
                what: format!("file with the PAX attribute `{key}`"),
            });
        }
        let kind = entry.header().entry_type();
        if kind == EntryType::Directory && self.rules == ArchiveRules::WholeTree {
            return check_folder(&raw_path);
        }
        let path = self.path(&raw_path)?;
        self.count_file(&path)?;
        let mut link = link
            .or_else(|| entry.link_name_bytes().map(|name| name.into_owned()))
            .unwrap_or_default();
        let stored = match kind {
            EntryType::Regular => {
                self.count_content(&path, entry.size())?;
                let mode = entry.header().mode().map_err(ArchiveError::Unreadable)?;
                let kind = if mode & 0o100 == 0 {
                    Kind::File
                } else {
                    Kind::Executable
                };
                store(&path, kind, entry)
            }
            EntryType::Symlink => {
                check_link(&path, &link, entry.size())?;
                store(
                    &path,
                    Kind::Symlink,
                    &mut std::mem::take(&mut link).as_slice(),
                )
            }
            other => {
                return Err(ArchiveError::Kind {
                    path: path.to_string(),
                    what: name_of(other),
                });
            }
        };
        stored.map_err(|source| ArchiveError::Store { path, source })
    }

    /// The entry's path, if it is one inside the tree that was not there before.
    fn path(&mut self, raw: &[u8]) -> Result<TreePath, ArchiveError> {
        match self.rules {
            ArchiveRules::Push => {
                let path = TreePath::from_bytes(raw)?;
                if self.last.as_ref().is_some_and(|last| *last >= path) {
                    return Err(ArchiveError::Order(path));
                }
                self.last = Some(path.clone());
                Ok(path)
            }
            // `tar -c .` writes `./` in front of each name; nothing else is forgiven.
            ArchiveRules::WholeTree => {
                let path = TreePath::from_bytes(raw.strip_prefix(b"./").unwrap_or(raw))?;
                if !self.seen.insert(path.clone()) {
                    return Err(ArchiveError::Order(path));
                }
                Ok(path)
            }
        }
    }

    fn count_file(&mut self, path: &TreePath) -> Result<(), ArchiveError> {
        self.files += 1;
        if self.files > MAX_TREE_FILES {
            let what = format!("more than {MAX_TREE_FILES} files");
            return Err(too_large(path.as_str(), what));
        }
        self.path_bytes += path.as_str().len();
        if self.path_bytes > MAX_TREE_PATH_BYTES {
            let what = format!("the archive's paths have more than {MAX_TREE_PATH_BYTES} bytes");
            return Err(too_large(path.as_str(), what));
        }
        Ok(())
    }

    fn count_content(&mut self, path: &TreePath, size: u64) -> Result<(), ArchiveError> {
        if size > MAX_FILE_BYTES {
            let what = format!("{size} bytes, more than {MAX_FILE_BYTES}");
            return Err(too_large(path.as_str(), what));
        }
        self.content_bytes += size;
        if self.content_bytes > MAX_TREE_BYTES {
            let what = format!("the archive unpacks to more than {MAX_TREE_BYTES} bytes");
            return Err(too_large(path.as_str(), what));
        }
        Ok(())
    }
}

/// Folders exist through their files; one that is named has to lie in the tree all the same.
fn check_folder(raw_path: &[u8]) -> Result<(), ArchiveError> {
    let folder = raw_path.strip_suffix(b"/").unwrap_or(raw_path);
    if folder != b"." {
        TreePath::from_bytes(folder.strip_prefix(b"./").unwrap_or(folder))?;
    }
    Ok(())
}

/// Whether a link's target is one that can be kept. Where it leads is for the whole tree to say.
fn check_link(path: &TreePath, target: &[u8], size: u64) -> Result<(), ArchiveError> {
    if target.len() as u64 > MAX_LINK_BYTES {
        let what = format!("its target is longer than {MAX_LINK_BYTES} bytes");
        return Err(too_large(path.as_str(), what));
    }
    let is_text = std::str::from_utf8(target).is_ok_and(|target| !target.contains('\0'));
    if !is_text || target.is_empty() || size != 0 {
        return Err(ArchiveError::Kind {
            path: path.to_string(),
            what: "link of this form".to_owned(),
        });
    }
    Ok(())
}

fn name_of(kind: EntryType) -> String {
    match kind {
        EntryType::Link => "hard link".to_owned(),
        EntryType::Directory => "folder".to_owned(),
        EntryType::Char | EntryType::Block => "device".to_owned(),
        EntryType::Fifo => "named pipe".to_owned(),
        EntryType::GNUSparse => "sparse file".to_owned(),
        other => format!("tar entry of type {:?}", char::from(other.as_byte())),
    }
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
    /// The first attribute that changes what the entry means and is not taken.
    unwanted: Option<String>,
}

impl Extended {
    fn is_empty(&self) -> bool {
        self.path.is_none() && self.link.is_none() && self.unwanted.is_none()
    }

    /// Reads `entry` if it is such a header, and says whether it was one.
    fn take(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<bool, ArchiveError> {
        let kind = entry.header().entry_type();
        let is_extension = matches!(
            kind,
            EntryType::GNULongName
                | EntryType::GNULongLink
                | EntryType::XHeader
                | EntryType::XGlobalHeader
        );
        if !is_extension {
            return Ok(false);
        }
        let size = entry.size();
        if size > MAX_PAX_BYTES {
            let what = format!("a header of {size} bytes, more than {MAX_PAX_BYTES}");
            return Err(too_large("the archive", what));
        }
        match kind {
            EntryType::GNULongName => set(&mut self.path, read_name(entry)?)?,
            EntryType::GNULongLink => set(&mut self.link, read_name(entry)?)?,
            _ => self.take_pax(entry, kind == EntryType::XHeader)?,
        }
        Ok(true)
    }

    /// A PAX header; a global one, as `git archive` writes for the commit's id, may not say which file is which.
    fn take_pax(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        is_local: bool,
    ) -> Result<(), ArchiveError> {
        let extensions = entry.pax_extensions().map_err(ArchiveError::Unreadable)?;
        for extension in extensions.into_iter().flatten() {
            let extension = extension.map_err(ArchiveError::Unreadable)?;
            match extension.key_bytes() {
                b"path" if is_local => set(&mut self.path, extension.value_bytes().to_owned())?,
                b"linkpath" if is_local => set(&mut self.link, extension.value_bytes().to_owned())?,
                // Times and owners are not taken over, so what they say does not matter.
                b"mtime" | b"atime" | b"ctime" | b"uid" | b"gid" | b"uname" | b"gname"
                | b"comment" => {}
                key => {
                    let key = String::from_utf8_lossy(key).into_owned();
                    self.unwanted.get_or_insert(key);
                }
            }
        }
        Ok(())
    }
}

/// Who reads the first of two names and who reads the second would see two different trees.
fn set(field: &mut Option<Vec<u8>>, value: Vec<u8>) -> Result<(), ArchiveError> {
    match field.replace(value) {
        None => Ok(()),
        Some(first) => Err(ArchiveError::NamedTwice(
            String::from_utf8_lossy(&first).into_owned(),
        )),
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

/// The archive's bytes: no more than the largest tree needs, and watched for their end.
struct Stream<R> {
    from: R,
    left: u64,
    has_ended: bool,
}

impl<R: Read> Stream<R> {
    fn new(from: R) -> Self {
        Self {
            from,
            left: MAX_STREAM_BYTES,
            has_ended: false,
        }
    }

    /// Called where the entries end: behind the first block of the end marker, or where there was nothing left to read.
    fn finish(mut self) -> Result<(), ArchiveError> {
        if self.has_ended {
            return Err(ArchiveError::NoEnd);
        }
        const ZEROS: [u8; 8 << 10] = [0; 8 << 10];
        let mut buffer = ZEROS;
        loop {
            match self.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) if buffer[..read] == ZEROS[..read] => {}
                Ok(_) => return Err(ArchiveError::BehindTheEnd),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ArchiveError::Unreadable(error)),
            }
        }
    }
}

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            io::Error::other(format!("it unpacks to more than {MAX_STREAM_BYTES} bytes"))
        })?;
        self.has_ended |= read == 0 && !buffer.is_empty();
        Ok(read)
    }
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

    #[test]
    fn a_link_s_target_is_written_as_it_is_not_in_its_shortest_form() {
        for target in ["./a", "a/./b", "a//b", "a/", ".", "../", "a/../b", "/etc"] {
            let files = vec![(path("link"), Kind::Symlink, target.as_bytes().to_vec())];
            assert_eq!(read(&write(&files), ArchiveRules::Push).unwrap(), files);
        }
    }

    #[test]
    fn a_long_path_is_written_wherever_its_header_cuts_it() {
        for cut in 90..110 {
            let long = format!("{}/..x/ü{}", "n".repeat(cut), "y".repeat(30));
            let files = vec![
                (path(&long), Kind::File, b"1".to_vec()),
                (path("o"), Kind::Symlink, long.clone().into_bytes()),
            ];
            assert_eq!(read(&write(&files), ArchiveRules::Push).unwrap(), files);
        }
    }

    /// An archive of raw entries: type, name, content.
    fn raw(entries: &[(u8, &str, &[u8])]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (kind, name, content) in entries {
            let mut header = plain_header(EntryType::new(*kind), 0o644, content.len());
            put(&mut header.as_old_mut().name, name.as_bytes());
            append(&mut builder, header, content);
        }
        builder.into_inner().unwrap()
    }

    fn refused(archive: &[u8]) -> String {
        let errors = [ArchiveRules::Push, ArchiveRules::WholeTree]
            .map(|rules| read(archive, rules).unwrap_err().to_string());
        assert_eq!(errors[0], errors[1]);
        errors[0].clone()
    }

    #[test]
    fn a_link_without_a_target_is_refused_as_it_could_not_be_written_again() {
        assert!(refused(&raw(&[(b'2', "empty", b"")])).contains("`empty`"));
    }

    #[test]
    fn an_archive_that_was_cut_between_two_files_is_not_taken_for_a_smaller_one() {
        let whole = raw(&[(b'0', "a", b"1"), (b'0', "b", b"2")]);
        for end in 0..whole.len() - 1024 {
            assert!(
                read(&whole[..end], ArchiveRules::WholeTree).is_err(),
                "{end}"
            );
        }
        assert!(refused(&whole[..1024]).contains("end marker"));
        assert!(refused(b"").contains("end marker"));
        for end in [whole.len() - 512, whole.len()] {
            assert_eq!(read(&whole[..end], ArchiveRules::Push).unwrap().len(), 2);
        }
    }

    #[test]
    fn nothing_may_hide_behind_the_end_marker() {
        let whole = raw(&[(b'0', "a", b"1")]);
        let joined = [whole.clone(), raw(&[(b'0', "b", b"2")])].concat();
        assert!(refused(&joined).contains("behind its end marker"));
        // As tar fills up its last record.
        let padded = [whole, vec![0; 8 << 10]].concat();
        assert_eq!(read(&padded, ArchiveRules::WholeTree).unwrap().len(), 1);
    }

    #[test]
    fn a_name_for_a_file_that_does_not_follow_is_refused() {
        for header in [
            (b'L', "././@LongLink", &b"name\0"[..]),
            (b'K', "././@LongLink", b"target\0"),
            (b'x', "pax", b"10 path=a\n"),
        ] {
            assert!(refused(&raw(&[header])).contains("does not follow"));
        }
    }

    #[test]
    fn two_names_for_one_file_are_refused() {
        let long = (b'L', "././@LongLink", &b"one\0"[..]);
        let pax = (b'x', "pax", &b"12 path=two\n"[..]);
        let file = (b'0', "three", &b""[..]);
        let twice = (b'x', "pax", &b"12 path=one\n12 path=two\n"[..]);
        for entries in [&[long, pax, file][..], &[long, long, file], &[twice, file]] {
            assert!(refused(&raw(entries)).contains("`one`"));
        }
    }

    #[test]
    fn attributes_that_change_what_a_file_is_are_refused_with_its_name() {
        for (kind, record) in [
            (b'x', "10 size=1\n"),
            (b'x', "22 GNU.sparse.major=1\n"),
            (b'x', "28 SCHILY.xattr.user.x=evil\n"),
            (b'g', "10 path=b\n"),
            (b'g', "10 size=1\n"),
        ] {
            let error = refused(&raw(&[
                (kind, "pax", record.as_bytes()),
                (b'0', "the/file", b""),
            ]));
            let key = &record[3..record.find('=').unwrap()];
            assert!(
                error.contains("`the/file`") && error.contains(key),
                "{error}"
            );
        }
    }

    #[test]
    fn more_files_than_a_tree_holds_are_refused_at_the_first_one_too_many() {
        let paths: Vec<TreePath> = (0..=MAX_TREE_FILES)
            .map(|number| path(&format!("{number:06}")))
            .collect();
        let archive = write_tar(paths.iter().map(|path| Content {
            path,
            kind: Kind::File,
            bytes: b"",
        }));
        for rules in [ArchiveRules::Push, ArchiveRules::WholeTree] {
            let mut stored = 0;
            let error = read_tar(archive.as_slice(), rules, |_, _, _| {
                stored += 1;
                Ok(())
            });
            let error = error.unwrap_err().to_string();
            assert!(
                error.contains("`200000`: more than 200000 files"),
                "{error}"
            );
            assert_eq!(stored, MAX_TREE_FILES);
        }
    }

    #[test]
    fn names_alone_cannot_fill_the_memory() {
        /// Endless files with the longest of paths.
        struct Files {
            number: usize,
            block: Vec<u8>,
        }
        impl Read for Files {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                if self.block.is_empty() {
                    self.number += 1;
                    let part = format!("{:06}/{}", self.number, "n".repeat(200));
                    let name = [part.as_str(), &"n".repeat(250), &"n".repeat(250)].join("/");
                    let pax = format!("{} path={name}\n", name.len() + 10);
                    self.block = raw(&[(b'x', "pax", pax.as_bytes()), (b'0', "n", b"")]);
                    self.block.truncate(self.block.len() - 1024);
                }
                let read = buffer.len().min(self.block.len());
                buffer[..read].copy_from_slice(&self.block[..read]);
                self.block.drain(..read);
                Ok(read)
            }
        }
        let endless = Files {
            number: 0,
            block: Vec::new(),
        };
        let error = read_tar(endless, ArchiveRules::Push, |_, _, _| Ok(())).unwrap_err();
        assert!(
            error.to_string().contains("paths have more than"),
            "{error}"
        );
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

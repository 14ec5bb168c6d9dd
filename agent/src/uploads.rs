//! Parts of large pushes, kept until the push that names them.
//!
//! Each upload is one file without a name in the agent's state folder, so that nothing of it outlives the agent, however that
//! ends. A part that arrived is never written again: what was digested is what is read afterwards. What an upload holds is
//! not looked at here.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rrun_protocol::{Arrived, Digest, MAX_UPLOAD_BYTES, UPLOAD_IDLE_LIMIT, UPLOAD_PART_BYTES};

use crate::{clock::running_sleep, layout::Layout, tree::copy_and_digest};

/// Uploads at once, each an open file; one developer has one.
const MAX_UPLOADS: usize = 8;
/// How often uploads that nobody adds to are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// The uploads of one agent.
pub(crate) struct Uploads {
    layout: Layout,
    /// Most bytes kept in all of them.
    room: u64,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    uploads: HashMap<Digest, Upload>,
    /// Rises with each use; orders the uploads by their last one.
    uses: u64,
}

struct Upload {
    file: Arc<File>,
    /// Length of each part that arrived, by number.
    arrived: BTreeMap<u32, u64>,
    last_use: u64,
    /// Running time since the last use.
    idle: Duration,
}

/// Why a part was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PartError {
    /// Its number or size lies beyond what any upload may have.
    #[error("an upload has at most {} MiB, in parts of {} MiB", MAX_UPLOAD_BYTES >> 20, UPLOAD_PART_BYTES >> 20)]
    TooLarge,
    /// No room is left, not even without the other uploads.
    #[error("the agent keeps at most {} MiB of uploads", .0 >> 20)]
    NoRoom(u64),
    /// It could not be written.
    #[error("cannot store the part: {0}")]
    Store(#[from] io::Error),
}

/// Why an upload cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UploadError {
    /// It was never sent whole, or dropped since.
    #[error("the agent has not all parts of upload {0}")]
    Incomplete(Digest),
    /// Its parts are not what the digest names. They are dropped.
    #[error("the parts of upload {0} are not what it names")]
    Wrong(Digest),
    /// It could not be read.
    #[error("cannot read upload: {0}")]
    Read(#[from] io::Error),
}

impl Uploads {
    /// No uploads, and where those to come lie; together they take at most `room` bytes.
    pub(crate) fn new(layout: Layout, room: u64) -> Self {
        Self {
            layout,
            room,
            kept: Mutex::default(),
        }
    }

    /// Which parts of `upload` are here.
    pub(crate) fn arrived(&self, upload: &Digest) -> Arrived {
        let mut kept = self.lock();
        let parts = kept
            .touch(upload)
            .map(|upload| upload.arrived.keys().copied().collect());
        Arrived {
            parts: parts.unwrap_or_default(),
        }
    }

    /// Keeps a part. One that is here already stays as it is.
    pub(crate) fn store(&self, upload: Digest, part: u32, content: &[u8]) -> Result<(), PartError> {
        let (start, length) = (u64::from(part) * UPLOAD_PART_BYTES, content.len() as u64);
        if length > UPLOAD_PART_BYTES || start + length > MAX_UPLOAD_BYTES {
            return Err(PartError::TooLarge);
        }
        let mut kept = self.lock();
        if kept
            .touch(&upload)
            .is_some_and(|upload| upload.arrived.contains_key(&part))
        {
            return Ok(());
        }
        kept.make_room(&upload, length, self.room)?;
        if !kept.uploads.contains_key(&upload) {
            let file = Arc::new(tempfile::tempfile_in(self.layout.staging())?);
            kept.begin(upload, file);
        }
        if let Some(upload) = kept.touch(&upload) {
            upload.file.write_all_at(content, start)?;
            upload.arrived.insert(part, length);
        }
        Ok(())
    }

    /// The whole upload, once its digest is checked.
    pub(crate) fn open(&self, upload: &Digest) -> Result<Whole, UploadError> {
        let whole = self.lock().touch(upload).and_then(|upload| upload.whole());
        let whole = whole.ok_or(UploadError::Incomplete(*upload))?;
        let (_, digest) = copy_and_digest(&mut whole.clone(), &mut io::sink())?;
        if digest != *upload {
            self.drop_upload(upload);
            return Err(UploadError::Wrong(*upload));
        }
        Ok(whole)
    }

    /// Forgets an upload; who reads it goes on.
    pub(crate) fn drop_upload(&self, upload: &Digest) {
        self.lock().uploads.remove(upload);
    }

    /// Forgets all uploads, to make room.
    pub(crate) fn drop_all(&self) {
        self.lock().uploads.clear();
    }

    /// Drops uploads that nobody used for [`UPLOAD_IDLE_LIMIT`] of running time. Never ends.
    pub(crate) async fn forget_idle(&self) -> Infallible {
        loop {
            running_sleep(SWEEP_EVERY).await;
            self.lock().uploads.retain(|_, upload| {
                upload.idle += SWEEP_EVERY;
                upload.idle < UPLOAD_IDLE_LIMIT
            });
        }
    }

    /// A panic under the lock leaves at worst a part that counts as missing, so a poisoned one is taken all the same.
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// The upload, as one that is in use.
    fn touch(&mut self, upload: &Digest) -> Option<&mut Upload> {
        let upload = self.uploads.get_mut(upload)?;
        self.uses += 1;
        upload.last_use = self.uses;
        upload.idle = Duration::ZERO;
        Some(upload)
    }

    fn begin(&mut self, upload: Digest, file: Arc<File>) {
        let (arrived, idle) = (BTreeMap::new(), Duration::ZERO);
        let begun = Upload {
            file,
            arrived,
            last_use: self.uses,
            idle,
        };
        self.uploads.insert(upload, begun);
    }

    /// Drops other uploads, the longest unused first, until `more` bytes of `upload` fit into `room`.
    fn make_room(&mut self, upload: &Digest, more: u64, room: u64) -> Result<(), PartError> {
        while self.bytes() + more > room || self.others(upload).count() >= MAX_UPLOADS {
            let oldest = self
                .others(upload)
                .min_by_key(|(_, other)| other.last_use)
                .map(|(digest, _)| *digest);
            self.uploads.remove(&oldest.ok_or(PartError::NoRoom(room))?);
        }
        Ok(())
    }

    fn others<'k>(&'k self, upload: &'k Digest) -> impl Iterator<Item = (&'k Digest, &'k Upload)> {
        self.uploads
            .iter()
            .filter(move |(digest, _)| *digest != upload)
    }

    fn bytes(&self) -> u64 {
        self.uploads
            .values()
            .flat_map(|upload| upload.arrived.values())
            .sum()
    }
}

impl Upload {
    /// The upload from its first byte to its last, if no part is missing before it.
    fn whole(&self) -> Option<Whole> {
        let is_whole = (0..).zip(self.arrived.keys()).all(|(at, part)| at == *part);
        let (last, length) = self.arrived.last_key_value()?;
        is_whole.then(|| Whole {
            file: Arc::clone(&self.file),
            at: 0,
            end: u64::from(*last) * UPLOAD_PART_BYTES + length,
        })
    }
}

/// Reads an upload without holding it in memory.
#[derive(Clone)]
pub(crate) struct Whole {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Whole {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let room = buffer.len().min(left);
        let read = self.file.read_at(&mut buffer[..room], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: usize = UPLOAD_PART_BYTES as usize;

    fn uploads(room: u64) -> (tempfile::TempDir, Uploads) {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::create(folder.path()).unwrap();
        (folder, Uploads::new(layout, room))
    }

    fn named(content: &[u8]) -> Digest {
        Digest::of(content)
    }

    #[test]
    fn parts_in_any_order_are_the_upload_once_none_is_missing() {
        let (folder, uploads) = uploads(MAX_UPLOAD_BYTES);
        let content: Vec<u8> = (0..2 * PART + 5).map(|at| (at % 251) as u8).collect();
        let upload = named(&content);
        let missing = |parts: &[u32]| {
            assert_eq!(uploads.arrived(&upload).parts, parts);
            let error = uploads.open(&upload).err();
            assert!(matches!(error, Some(UploadError::Incomplete(_))));
        };
        missing(&[]);
        uploads.store(upload, 2, &content[2 * PART..]).unwrap();
        missing(&[2]);
        uploads.store(upload, 0, &content[..PART]).unwrap();
        missing(&[0, 2]);
        uploads.store(upload, 1, &content[PART..2 * PART]).unwrap();
        let mut read = Vec::new();
        uploads
            .open(&upload)
            .unwrap()
            .read_to_end(&mut read)
            .unwrap();
        assert_eq!(read, content);
        let staging = Layout::create(folder.path()).unwrap().staging();
        let left = std::fs::read_dir(staging).unwrap().count();
        assert_eq!(left, 0, "a crash would leave this");
    }

    #[test]
    fn parts_that_are_not_what_the_digest_names_are_dropped_unread() {
        let (_folder, uploads) = uploads(MAX_UPLOAD_BYTES);
        let upload = named(b"one");
        uploads.store(upload, 0, b"two").unwrap();
        assert!(matches!(
            uploads.open(&upload).err(),
            Some(UploadError::Wrong(_))
        ));
        assert_eq!(uploads.arrived(&upload), Arrived::default());
    }

    #[test]
    fn a_part_that_arrived_is_never_written_again() {
        let (_folder, uploads) = uploads(MAX_UPLOAD_BYTES);
        let upload = named(b"one");
        uploads.store(upload, 0, b"one").unwrap();
        let mut whole = uploads.open(&upload).unwrap();
        uploads.store(upload, 0, b"two").unwrap();
        let mut read = String::new();
        whole.read_to_string(&mut read).unwrap();
        assert_eq!(read, "one");
    }

    #[test]
    fn the_longest_unused_upload_makes_room_and_one_alone_is_refused_by_the_cap() {
        let (_folder, uploads) = uploads(100);
        let [old, used, new] = [b"old", b"use", b"new"].map(|name| named(name));
        uploads.store(old, 0, &[0; 40]).unwrap();
        uploads.store(used, 0, &[0; 40]).unwrap();
        uploads.arrived(&old);
        uploads.store(new, 0, &[0; 40]).unwrap();
        let counts = [old, used, new].map(|upload| uploads.arrived(&upload).parts.len());
        assert_eq!(counts, [1, 0, 1]);
        let error = uploads.store(new, 1, &[0; 70]).unwrap_err();
        assert!(matches!(error, PartError::NoRoom(100)), "{error}");
    }

    #[test]
    fn a_part_beyond_the_largest_upload_is_refused() {
        let (_folder, uploads) = uploads(u64::MAX);
        let last = u32::try_from(MAX_UPLOAD_BYTES / UPLOAD_PART_BYTES).unwrap() - 1;
        uploads.store(named(b""), last, &[0; PART]).unwrap();
        for (part, length) in [(last + 1, 1), (u32::MAX, 1), (0, PART + 1)] {
            let error = uploads.store(named(b""), part, &vec![0; length]);
            assert!(matches!(error, Err(PartError::TooLarge)), "{part} {length}");
        }
    }

    #[test]
    fn many_small_uploads_hold_few_files_open() {
        let (_folder, uploads) = uploads(MAX_UPLOAD_BYTES);
        for number in 0..100u8 {
            uploads.store(named(&[number]), 0, b"x").unwrap();
        }
        assert!(uploads.lock().uploads.len() <= MAX_UPLOADS);
        assert_eq!(uploads.arrived(&named(&[99])).parts, [0]);
    }

    #[tokio::test(start_paused = true)]
    async fn parts_that_nobody_adds_to_are_dropped_after_an_hour() {
        let (_folder, uploads) = uploads(MAX_UPLOAD_BYTES);
        let upload = named(b"one");
        uploads.store(upload, 0, b"one").unwrap();
        let within = |limit| tokio::time::timeout(limit, uploads.forget_idle());
        assert!(within(UPLOAD_IDLE_LIMIT / 2).await.is_err());
        assert_eq!(uploads.arrived(&upload).parts, [0]);
        assert!(within(UPLOAD_IDLE_LIMIT + SWEEP_EVERY).await.is_err());
        assert_eq!(uploads.arrived(&upload).parts, [0; 0]);
    }
}

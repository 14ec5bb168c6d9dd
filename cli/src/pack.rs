//! Makes the body of a push: what changed against a base, as few bytes as can be.
//!
//! Exists because the uplink is the slow part of the loop: milliseconds of compression buy seconds of sending. It reads the changed files through
//! the scan, so that a body never holds anything but what the announced tree names, and stops before a body grows beyond what was
//! asked for. It does not send.

use rayon::prelude::*;
use rrun_protocol::{
    CheckoutId, Content, Entry, Manifest, Plan, Preamble, Replaced, TreePath, compress, write_tar,
};

use crate::{
    cache::Cache,
    diff::{Difference, diff, everything},
    scan::{Scan, ScanError},
    weigh::heaviest,
};

/// What to pack, and against what.
pub(crate) struct PackRequest<'a> {
    /// The tree that the push results in.
    pub(crate) scan: &'a Scan,
    /// The tree that the agent is thought to have.
    pub(crate) base: &'a Manifest,
    /// The checkout that was scanned.
    pub(crate) checkout: CheckoutId,
    /// The scan's number in the checkout.
    pub(crate) sequence: u64,
    /// Whether to leave the build to a later push.
    pub(crate) no_build: bool,
    /// Whether to send every file alone, whatever the base's files hold.
    pub(crate) full: bool,
    /// What to build and how to run it.
    pub(crate) plan: &'a Plan,
    /// Largest body that is wanted, in bytes.
    pub(crate) max_upload: u64,
}

/// A body that is ready to be sent.
#[derive(Debug)]
pub(crate) struct Packed {
    /// The request's body.
    pub(crate) body: Vec<u8>,
    /// How many files it brings, changes and deletes.
    pub(crate) files: usize,
    /// Size of the files that it brings, unpacked.
    pub(crate) unpacked_bytes: u64,
}

/// Why there is no body.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackError {
    /// A file could not be read, or is not what was scanned.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// Larger than asked for.
    #[error("the push would send {}, more than {}; the largest: {}", mebibytes(*.bytes), mebibytes(*.limit), listed(.folders))]
    TooMuch {
        /// Size of the body.
        bytes: u64,
        /// What was asked for.
        limit: u64,
        /// Folders (with `/` at their end) and files with the most unpacked bytes, largest first.
        folders: Vec<(String, u64)>,
    },
    /// The compressor failed.
    #[error("cannot compress the push: {0}")]
    Compress(#[source] std::io::Error),
}

impl PackError {
    /// What to do next.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Scan(error) => error.hint(),
            Self::TooMuch { folders, .. } => folders.first().map(|(path, _)| {
                format!(
                    "if the build does not need it, write the line `/{path}` into `.rrunignore` in the top folder of what is sent; otherwise allow more with `--max-upload`"
                )
            }),
            Self::Compress(_) => None,
        }
    }
}

/// Packs the difference between the request's base and its scan.
pub(crate) fn pack(request: &PackRequest<'_>, cache: &Cache) -> Result<Packed, PackError> {
    let target = &request.scan.manifest;
    let difference = if request.full {
        everything(request.base, target)
    } else {
        diff(request.base, target)
    };
    let contents = read_all(request.scan, &difference.files)?;
    let prefix = if request.full {
        None
    } else {
        prefix(request.base, &difference, cache)
    };
    let payload = match (&contents[..], &prefix) {
        ([], _) => Vec::new(),
        (contents, prefix) => {
            let archive = archive(target, difference.files.iter().zip(contents));
            let prefix = prefix.as_deref().unwrap_or_default();
            compress(&archive, prefix, level(archive.len() + prefix.len()))
                .map_err(PackError::Compress)?
        }
    };
    let files = difference.files.len() + difference.deleted.len();
    let preamble = Preamble {
        checkout: request.checkout,
        sequence: request.sequence,
        base: request.base.tree_digest(),
        target: target.tree_digest(),
        with_prefix: prefix.is_some() && !contents.is_empty(),
        no_build: request.no_build,
        changed: difference.changed,
        deleted: difference.deleted,
        plan: request.plan.clone(),
    };
    let body = preamble.into_body(&payload);
    if body.len() as u64 > request.max_upload {
        return Err(PackError::TooMuch {
            bytes: body.len() as u64,
            limit: request.max_upload,
            folders: heaviest(
                difference
                    .files
                    .iter()
                    .zip(&contents)
                    .map(|(path, content)| (path, content.len() as u64)),
            ),
        });
    }
    Ok(Packed {
        body,
        files,
        unpacked_bytes: contents.iter().map(|content| content.len() as u64).sum(),
    })
}

fn read_all(scan: &Scan, files: &[TreePath]) -> Result<Vec<Vec<u8>>, ScanError> {
    files.par_iter().map(|path| scan.read(path)).collect()
}

/// The archive of `files`, with their kinds as `manifest` has them.
fn archive<'a>(
    manifest: &Manifest,
    files: impl Iterator<Item = (&'a TreePath, &'a Vec<u8>)>,
) -> Vec<u8> {
    write_tar(files.filter_map(|(path, bytes)| {
        let Entry { kind, .. } = manifest.get(path.as_str())?;
        Some(Content {
            path,
            kind: *kind,
            bytes,
        })
    }))
}

/// The archive of the base versions, or `None` if one of them is not remembered.
fn prefix(base: &Manifest, difference: &Difference, cache: &Cache) -> Option<Vec<u8>> {
    let files: Vec<_> = base.iter().collect();
    let look_up = |positions: &[u32]| -> Option<Vec<_>> {
        positions
            .iter()
            .map(|position| files.get(*position as usize).copied())
            .collect()
    };
    let replaced = Replaced {
        changed: look_up(&difference.changed)?,
        deleted: look_up(&difference.deleted)?,
    };
    let replaced = replaced.prefix_files();
    let contents: Option<Vec<Vec<u8>>> = replaced
        .par_iter()
        .map(|(_, entry)| cache.content(&entry.digest))
        .collect();
    let contents = contents?;
    Some(archive(
        base,
        replaced.iter().map(|(path, _)| *path).zip(&contents),
    ))
}

/// zstd's level for `input` bytes of archive and prefix.
///
/// On a slow uplink the smallest body is the fastest push while compressing takes less time than sending what it saves. At 19 that holds
/// up to about 1 MiB (some 0.3 s); a first push of a large tree would take half a minute, where 3 takes a moment.
fn level(input: usize) -> i32 {
    match input >> 20 {
        0 => 19,
        1..8 => 12,
        8..32 => 6,
        _ => 3,
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn listed(folders: &[(String, u64)]) -> String {
    let places: Vec<String> = folders
        .iter()
        .map(|(path, bytes)| format!("`{path}` ({})", mebibytes(*bytes)))
        .collect();
    places.join(", ")
}

#[cfg(test)]
mod tests {
    use rrun_protocol::{
        ArchiveRules, DEFAULT_MAX_UPLOAD_BYTES, Preamble, Selection, decompress, read_tar,
    };

    use super::*;
    use crate::{
        discover::{Checkout, discover},
        fixture::Fixture,
        scan::scan,
    };

    struct Project {
        fixture: Fixture,
        checkout: Checkout,
    }

    impl Project {
        fn new() -> Self {
            let fixture = Fixture::with_app();
            let open = |_: &std::path::Path| Ok(fixture.cache());
            let folder = fixture.path("app");
            let (checkout, _) = discover(&folder, &Selection::default(), open).unwrap();
            Self { fixture, checkout }
        }

        fn scan(&self) -> Scan {
            scan(&self.checkout, &self.fixture.cache(), false).unwrap()
        }

        fn pack(&self, scan: &Scan, base: &Manifest, max_upload: u64) -> Result<Packed, PackError> {
            let request = PackRequest {
                scan,
                base,
                checkout: CheckoutId::from_random([1; 9]),
                sequence: 1,
                no_build: false,
                full: false,
                plan: &self.checkout.project.plan,
                max_upload,
            };
            pack(&request, &self.fixture.cache())
        }
    }

    /// Does with `body` what the agent does, with the base's contents at hand or not.
    fn unpack(body: &[u8], base: &Scan) -> Manifest {
        let (preamble, payload) = Preamble::from_body(body).unwrap();
        let replaced = preamble.replaced(&base.manifest).unwrap();
        let contents: Vec<_> = replaced
            .prefix_files()
            .into_iter()
            .map(|(path, entry)| {
                (
                    path,
                    entry.kind,
                    BASE.with(|files| files.borrow()[path].clone()),
                )
            })
            .collect();
        let prefix = write_tar(contents.iter().map(|(path, kind, bytes)| Content {
            path,
            kind: *kind,
            bytes,
        }));
        let prefix = if preamble.with_prefix {
            prefix
        } else {
            Vec::new()
        };
        let mut received = Vec::new();
        if !payload.is_empty() {
            let archive = decompress(payload, &prefix).unwrap();
            read_tar(archive, ArchiveRules::Push, |path, kind, content| {
                let mut bytes = Vec::new();
                content.read_to_end(&mut bytes)?;
                received.push((path.clone(), Entry::of(kind, &bytes)));
                Ok(())
            })
            .unwrap();
        }
        preamble.resulting_tree(&base.manifest, received).unwrap()
    }

    type Files = std::collections::BTreeMap<TreePath, Vec<u8>>;
    thread_local! {
        /// Contents on the pretended agent, as the laptop's files change under the test.
        static BASE: std::cell::RefCell<Files> = const { std::cell::RefCell::new(Files::new()) };
    }

    fn arrives(scan: &Scan) {
        let files = scan
            .manifest
            .iter()
            .map(|(path, _)| (path.clone(), scan.read(path).unwrap()));
        BASE.with(|base| *base.borrow_mut() = files.collect());
    }

    #[test]
    fn a_changed_line_costs_little_more_than_itself_once_the_base_is_remembered() {
        let project = Project::new();
        let mut lines: Vec<String> = (0..1_000u32)
            .map(|line| format!("const C{line}: u32 = {};", line.wrapping_mul(2_654_435_761)))
            .collect();
        lines.push("fn main() {}".to_owned());
        project.fixture.write("app/src/main.rs", lines.join("\n"));
        project.fixture.write("app/src/old.rs", "//");
        let before = project.scan();
        arrives(&before);
        lines[500] = "const CHANGED: u32 = 1;".to_owned();
        project.fixture.write("app/src/main.rs", lines.join("\n"));
        project.fixture.write("app/src/new.rs", "//");
        std::fs::remove_file(project.fixture.path("app/src/old.rs")).unwrap();
        let after = project.scan();

        let alone = project
            .pack(&after, &before.manifest, DEFAULT_MAX_UPLOAD_BYTES)
            .unwrap();
        assert!(!Preamble::from_body(&alone.body).unwrap().0.with_prefix);
        assert_eq!(unpack(&alone.body, &before), after.manifest);
        assert!(alone.body.len() > 4_000, "{}", alone.body.len());

        project.fixture.write("app/src/main.rs", "");
        let error = project.pack(&after, &before.manifest, DEFAULT_MAX_UPLOAD_BYTES);
        let error = error.unwrap_err();
        assert!(
            matches!(error, PackError::Scan(ScanError::ChangedMeanwhile { .. })),
            "{error}"
        );
    }

    #[test]
    fn the_remembered_base_is_the_prefix() {
        let project = Project::new();
        let text: String = (0..3_000u32)
            .map(|line| format!("// {}\n", line.wrapping_mul(2_654_435_761)))
            .collect();
        project
            .fixture
            .write("app/src/main.rs", format!("{text}fn main() {{}}"));
        let before = project.scan();
        arrives(&before);
        project.fixture.cache().remember(&before).unwrap();
        project.fixture.write(
            "app/src/main.rs",
            format!("{text}fn main() {{ print!(\"\") }}"),
        );
        let after = project.scan();
        let packed = project
            .pack(&after, &before.manifest, DEFAULT_MAX_UPLOAD_BYTES)
            .unwrap();
        assert!(packed.body.len() < 350, "{} bytes", packed.body.len());
        assert_eq!(
            (packed.files, unpack(&packed.body, &before)),
            (1, after.manifest)
        );
    }

    #[test]
    fn a_push_without_new_content_ends_after_its_preamble() {
        let project = Project::new();
        project.fixture.write("app/src/old.rs", "//");
        let before = project.scan();
        arrives(&before);
        std::fs::remove_file(project.fixture.path("app/src/old.rs")).unwrap();
        let after = project.scan();
        let packed = project.pack(&after, &before.manifest, u64::MAX).unwrap();
        let (preamble, payload) = Preamble::from_body(&packed.body).unwrap();
        assert!(payload.is_empty() && !preamble.with_prefix);
        assert_eq!(unpack(&packed.body, &before), after.manifest);
    }

    #[test]
    fn a_push_that_is_too_large_names_what_is_large_and_the_line_that_helps() {
        let project = Project::new();
        let noise: Vec<u8> = (0..200_000u32)
            .map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        project.fixture.write("app/data/noise", &noise);
        project.fixture.write("app/data/more", &noise[..100_000]);
        let scan = project.scan();
        let error = project
            .pack(&scan, &Manifest::default(), 1_000)
            .unwrap_err();
        let PackError::TooMuch { folders, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(folders[0], ("data/noise".to_owned(), 200_000));
        assert!(
            error
                .hint()
                .unwrap()
                .contains("the line `/data/noise` into `.rrunignore`")
        );
    }
}

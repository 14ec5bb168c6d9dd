//! Everything that reads bytes from outside, under inputs that are made at random and then damaged.
//!
//! Each test runs for two seconds; `RRUN_FUZZ_SECONDS` lets it run longer, `RRUN_FUZZ_SEED` repeats a run. Inputs start
//! from valid ones, because random bytes do not get past the first check: archives are built entry by entry with fields
//! that no honest program writes, pushes are damaged before they are compressed, after it, and in each field of their
//! preamble. No input may panic, take long or much memory; what is accepted has to keep its promises.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "tests stop at the first surprise and say how far they came"
)]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use rrun_protocol::{
    ArchiveRules, Authorization, BootId, BuildPlan, CheckoutId, Content, Digest, Entry, Kind,
    MAX_FILE_BYTES, MAX_LINK_BYTES, Manifest, Nonce, Plan, Preamble, PrivateKey, PublicKey,
    RunPlan, SignedRequest, TreePath, compress, decompress, read_tar, write_tar,
};

/// How long a test runs unless it is told otherwise.
const SHORT_RUN: Duration = Duration::from_secs(2);
/// How long one input may take: far beyond what any needs, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much more memory a run may need than it had at its start: the decoder's largest window and a tree's contents.
const MEMORY_BYTES: u64 = 400 << 20;

type Files = BTreeMap<TreePath, (Kind, Vec<u8>)>;

/// SplitMix64: small, fast, and the same everywhere for one seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap()
    }

    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn one<'v, T>(&mut self, values: &'v [T]) -> &'v T {
        &values[self.below(values.len())]
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.below(most + 1);
        (0..length).map(|_| self.next().to_le_bytes()[0]).collect()
    }

    /// A number of the kind that code forgets.
    fn edge(&mut self) -> u64 {
        let near = *self.one(&[
            0,
            1,
            511,
            512,
            u64::from(u32::MAX),
            MAX_FILE_BYTES,
            u64::MAX / 2,
            u64::MAX,
        ]);
        near.wrapping_add(self.below(3) as u64).wrapping_sub(1)
    }
}

/// Feeds inputs to `try_one` until the time is over, and says how many.
fn run(name: &str, mut try_one: impl FnMut(&mut Random) -> bool) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let seed = number("RRUN_FUZZ_SEED").unwrap_or(1);
    let limit = number("RRUN_FUZZ_SECONDS").map_or(SHORT_RUN, Duration::from_secs);
    let (started, memory) = (Instant::now(), peak_memory());
    let (mut inputs, mut accepted) = (0u64, 0u64);
    while started.elapsed() < limit {
        // Each input has a seed of its own, so that one can be repeated without those before it.
        let mut random = Random(seed.wrapping_mul(0x1_0000_0001).wrapping_add(inputs));
        let before = Instant::now();
        let _named = OnPanic {
            name,
            seed,
            input: inputs,
        };
        accepted += u64::from(try_one(&mut random));
        assert!(
            before.elapsed() < PATIENCE,
            "{name}: input {inputs} of seed {seed} took long"
        );
        inputs += 1;
    }
    let grown = peak_memory().saturating_sub(memory);
    println!("{name}: {inputs} inputs of seed {seed}, {accepted} accepted, {grown} bytes");
    assert!(inputs > 10 && accepted > 0 && accepted < inputs);
    assert!(grown < MEMORY_BYTES, "{name}: {grown} bytes of memory");
}

/// Names the input if it panics.
struct OnPanic<'n> {
    name: &'n str,
    seed: u64,
    input: u64,
}

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        let Self { name, seed, input } = self;
        if std::thread::panicking() {
            println!("{name}: failed at input {input} of seed {seed}");
        }
    }
}

/// The most memory that this process ever had; 0 where the system does not tell.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kibibytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kibibytes.unwrap_or_default() << 10
}

const NAMES: [&str; 24] = [
    "a",
    "b",
    "Cargo.toml",
    "src/main.rs",
    "src/lib.rs",
    "a/b",
    "a/b/c",
    "ü b",
    "e\u{301}",
    "...",
    ".gitignore",
    "target/debug/app",
    "",
    ".",
    "..",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "./a",
    "a//b",
    "a/",
    ".git/config",
    "a/.GIT/hooks/x",
    "a\u{1b}[2J",
];

/// How many of [`NAMES`] are paths in a tree.
const GOOD_NAMES: usize = 12;

fn name(random: &mut Random) -> Vec<u8> {
    match random.below(12) {
        0 => random.bytes(300),
        1 => "deep/".repeat(random.below(300)).into_bytes(),
        2 => "n".repeat(random.below(2000)).into_bytes(),
        3 => random.one(&NAMES).as_bytes().to_vec(),
        _ => random.one(&NAMES[..GOOD_NAMES]).as_bytes().to_vec(),
    }
}

fn files(random: &mut Random) -> Files {
    let mut files = Files::new();
    for _ in 0..random.below(6) {
        let path = honest_path(random);
        if files.keys().any(|other| lies_in(other, &path)) {
            continue;
        }
        let kind = *random.one(&[Kind::File, Kind::File, Kind::Executable, Kind::Symlink]);
        let content = match kind {
            Kind::Symlink => honest_link_target(random),
            _ => content(random),
        };
        files.insert(path, (kind, content));
    }
    files
}

/// One of a few, so that trees have some in common; at times one that does not fit into a header.
fn honest_path(random: &mut Random) -> TreePath {
    let path = *random.one(&NAMES[..GOOD_NAMES]);
    TreePath::new(match random.below(10) {
        0 => format!("{}/..{path}", "ü".repeat(random.below(100) + 1)),
        _ => path.to_owned(),
    })
    .unwrap()
}

fn lies_in(one: &TreePath, other: &TreePath) -> bool {
    one == other
        || one.strip_prefix(Some(other)).is_some()
        || other.strip_prefix(Some(one)).is_some()
}

fn link_target(random: &mut Random) -> Vec<u8> {
    const TARGETS: [&str; 14] = [
        "a",
        "b",
        "../a",
        "src",
        ".",
        "..",
        "/etc",
        "a/../../x",
        "./a",
        "a//b",
        "a/",
        "a/./b",
        "..//",
        "ü b",
    ];
    match random.below(20) {
        0 => "../".repeat(random.below(400)).into_bytes(),
        _ => random.one(&TARGETS).as_bytes().to_vec(),
    }
}

/// One that a scan lets through.
fn honest_link_target(random: &mut Random) -> Vec<u8> {
    let target = link_target(random);
    match (1..=MAX_LINK_BYTES).contains(&(target.len() as u64)) {
        true => target,
        false => b"a".to_vec(),
    }
}

fn content(random: &mut Random) -> Vec<u8> {
    match random.below(4) {
        0 => Vec::new(),
        1 => "a line that repeats\n"
            .repeat(random.below(200))
            .into_bytes(),
        _ => random.bytes(1500),
    }
}

fn tar_of(files: &Files) -> Vec<u8> {
    write_tar(files.iter().map(|(path, (kind, bytes))| Content {
        path,
        kind: *kind,
        bytes,
    }))
}

/// An archive as no honest program writes it, entry by entry.
fn strange_tar(random: &mut Random) -> Vec<u8> {
    let mut archive = Vec::new();
    for _ in 0..=random.below(6) {
        let (entry_type, body) = match random.below(8) {
            0 => (b'x', pax(random)),
            1 => (b'g', pax(random)),
            2 => (b'L', name(random)),
            3 => (b'K', link_target(random)),
            4 => (*random.one(b"12345678SVMN\0AX"), content(random)),
            _ => (*random.one(b"00002"), content(random)),
        };
        strange_entry(random, &mut archive, entry_type, &body);
    }
    let blocks = random.below(4);
    archive.resize(archive.len() + 512 * blocks, 0);
    archive
}

fn strange_entry(random: &mut Random, archive: &mut Vec<u8>, entry_type: u8, body: &[u8]) {
    let mut header = [0; 512];
    let name = name(random);
    let length = name.len().min(100);
    header[..length].copy_from_slice(&name[..length]);
    let is_link = entry_type == b'2';
    let size = match random.below(12) {
        0 => random.edge(),
        _ if is_link => 0,
        _ => body.len() as u64,
    };
    write_number(random, &mut header[100..108], 0o755);
    write_number(random, &mut header[124..136], size);
    header[156] = entry_type;
    let target = link_target(random);
    let length = target.len().min(100);
    header[157..157 + length].copy_from_slice(&target[..length]);
    header[257..265].copy_from_slice(random.one::<&[u8]>(&[b"ustar  \0", b"ustar\x0000", &[0; 8]]));
    if random.once_in(8) {
        header[345..350].copy_from_slice(random.one::<&[u8]>(&[b"src/\0", b"../x\0", b"/etc\0"]));
    }
    seal(&mut header);
    archive.extend(header);
    if !is_link {
        archive.extend(body);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
}

/// A number as tar writes it: octal, or in a form of GNU's where it does not fit.
fn write_number(random: &mut Random, field: &mut [u8], number: u64) {
    let octal = format!("{number:0width$o}", width = field.len() - 1);
    if octal.len() < field.len() && !random.once_in(10) {
        field[..octal.len()].copy_from_slice(octal.as_bytes());
    } else {
        let bytes = number.to_be_bytes();
        let length = field.len().min(8);
        let at = field.len() - length;
        field[at..].copy_from_slice(&bytes[8 - length..]);
        field[0] |= 0x80;
    }
}

/// Sets a header's checksum.
fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn pax(random: &mut Random) -> Vec<u8> {
    const KEYS: [&str; 10] = [
        "path",
        "linkpath",
        "size",
        "mtime",
        "comment",
        "GNU.sparse.major",
        "GNU.sparse.name",
        "SCHILY.xattr.user.x",
        "",
        "path=",
    ];
    let mut body = Vec::new();
    for _ in 0..random.below(4) {
        let (key, value) = (random.one(&KEYS), name(random));
        let mut record = [format!(" {key}=").into_bytes(), value, b"\n".to_vec()].concat();
        let mut length = record.len() + 1;
        length += length.to_string().len() - 1;
        if length.to_string().len() + record.len() != length {
            length += 1;
        }
        let length = match random.below(10) {
            0 => random.edge(),
            _ => length as u64,
        };
        body.extend(length.to_string().into_bytes());
        body.append(&mut record);
    }
    body
}

/// Changes some bytes, and where they have a length.
fn damage(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..random.below(4) {
        let at = random.below(bytes.len());
        let end = at + random.below((bytes.len() - at).min(600) + 1);
        match random.below(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = *random.one(&[0, 1, 0x7f, 0x80, 0xff]),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            5 => {
                let piece = random.bytes(20);
                bytes.splice(at..at, piece);
            }
            _ => bytes[at..end].fill(0),
        }
    }
}

/// Gives headers their checksum again, so that damage is not noticed by it alone.
fn reseal(archive: &mut [u8]) {
    for header in archive.chunks_exact_mut(512) {
        if &header[257..262] == b"ustar" {
            seal(header);
        }
    }
}

fn some_tar(random: &mut Random) -> Vec<u8> {
    let mut archive = match random.below(3) {
        0 => tar_of(&files(random)),
        1 => [tar_of(&files(random)), tar_of(&files(random))].concat(),
        _ => strange_tar(random),
    };
    if !random.once_in(3) {
        damage(random, &mut archive);
        if !random.once_in(4) {
            reseal(&mut archive);
        }
    }
    archive
}

/// Reads an archive as the agent does, and checks what is accepted.
fn read(archive: &[u8], rules: ArchiveRules) -> Option<Files> {
    let mut files = Files::new();
    read_tar(archive, rules, |path, kind, content| {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes)?;
        assert_eq!(TreePath::new(path.as_str()).as_ref(), Ok(path));
        assert!(bytes.len() <= archive.len());
        if kind == Kind::Symlink {
            assert!(bytes.len() as u64 <= MAX_LINK_BYTES && !bytes.contains(&0));
            std::str::from_utf8(&bytes).unwrap();
        }
        let twice = files.insert(path.clone(), (kind, bytes));
        assert_eq!(twice, None, "{path}");
        Ok(())
    })
    .ok()?;
    Some(files)
}

#[test]
fn archives_are_refused_or_say_the_same_when_written_again() {
    run("archives", |random| {
        let archive = some_tar(random);
        let rules = *random.one(&[ArchiveRules::Push, ArchiveRules::WholeTree]);
        let Some(files) = read(&archive, rules) else {
            return false;
        };
        let written = tar_of(&files);
        for rules in [ArchiveRules::Push, ArchiveRules::WholeTree] {
            let again = read(&written, rules);
            // Not assert_eq: it would print all contents.
            assert!(again.as_ref() == Some(&files), "{:?}", files.keys());
        }
        true
    });
}

fn plan(random: &mut Random) -> Plan {
    const TEXTS: [&str; 10] = [
        "app",
        "app",
        "app",
        "dev",
        "",
        "--config=x",
        "a\0b",
        "*",
        "RRUN_X",
        "A=B",
    ];
    let text = |random: &mut Random| match random.below(20) {
        0 => String::from_utf8_lossy(&random.bytes(300)).into_owned(),
        1 => (*random.one(&TEXTS)).to_owned(),
        _ => "app".to_owned(),
    };
    let texts = |random: &mut Random| -> Vec<String> {
        (0..random.below(3)).map(|_| text(random)).collect()
    };
    let build = BuildPlan {
        directory: None,
        package: text(random),
        bin: text(random),
        profile: text(random),
        features: texts(random),
        no_default_features: random.once_in(2),
        environment: BTreeMap::from([(text(random), text(random))]),
    };
    let run = RunPlan {
        args: texts(random),
        ready_path: random.once_in(4).then(|| format!("/{}", text(random))),
        ready_timeout: Duration::from_secs(random.edge()),
        ..RunPlan::default()
    };
    Plan { build, run }
}

fn manifest_of(files: &Files) -> Option<Manifest> {
    let entries = files.iter().map(|(path, (kind, bytes))| {
        let entry = Entry::of(*kind, bytes);
        (path.clone(), entry)
    });
    Manifest::new(entries).ok()
}

/// A push from `base` to another tree: mostly as it should be, sometimes wrong in one of its fields.
fn some_push(random: &mut Random, base: &Files) -> Option<Vec<u8>> {
    let target = files(random);
    let (base_tree, target_tree) = (manifest_of(base)?, manifest_of(&target)?);
    let mut changed = Vec::new();
    let mut deleted = Vec::new();
    for (position, path) in (0..).zip(base.keys()) {
        match target.get(path) {
            None => deleted.push(position),
            Some(file) if file != &base[path] => changed.push(position),
            Some(_) => {}
        }
    }
    let mut sent = target.clone();
    sent.retain(|path, file| base.get(path) != Some(file));
    let mut archive = tar_of(&sent);
    let mut preamble = Preamble {
        checkout: CheckoutId::from_random([1; 9]),
        sequence: random.edge(),
        base: base_tree.tree_digest(),
        target: target_tree.tree_digest(),
        with_prefix: random.once_in(2),
        no_build: random.once_in(2),
        changed,
        deleted,
        plan: plan(random),
    };
    match random.below(10) {
        0 => damage(random, &mut archive),
        1 => archive = some_tar(random),
        2 => preamble.changed.push(random.below(8) as u32),
        3 => preamble.deleted.insert(0, random.edge() as u32),
        4 => preamble.target = base_tree.tree_digest(),
        5 => preamble.with_prefix = !preamble.with_prefix,
        _ => {}
    }
    let prefix = prefix(&preamble, &base_tree, base).unwrap_or_default();
    let mut payload = match sent.is_empty() {
        true => Vec::new(),
        false => compress(&archive, &prefix, 1).unwrap(),
    };
    match random.below(12) {
        0 => damage(random, &mut payload),
        1 => payload.extend(compress(&archive, &prefix, 1).unwrap()),
        // A skippable frame.
        2 => payload.extend([0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 0]),
        // The frame header's descriptor and window.
        3 if payload.len() > 6 => payload[4 + random.below(2)] = random.next().to_le_bytes()[0],
        _ => {}
    }
    let mut body = preamble.into_body(&payload);
    if random.once_in(6) {
        damage(random, &mut body);
    }
    Some(body)
}

fn prefix(preamble: &Preamble, base: &Manifest, contents: &Files) -> Option<Vec<u8>> {
    let replaced = preamble.replaced(base).ok()?;
    if !preamble.with_prefix {
        return Some(Vec::new());
    }
    let files = replaced.prefix_files().into_iter();
    Some(write_tar(files.map(|(path, entry)| Content {
        path,
        kind: entry.kind,
        bytes: &contents[path].1,
    })))
}

/// Takes a push apart as the agent does, and checks what is accepted.
fn receive(body: &[u8], base: &Files) -> Option<()> {
    let (preamble, payload) = Preamble::from_body(body).ok()?;
    let again = preamble.clone().into_body(payload);
    let again = Preamble::from_body(&again).unwrap();
    assert_eq!(again, (preamble.clone(), payload));
    let tree = manifest_of(base)?;
    let prefix = prefix(&preamble, &tree, base)?;
    let mut received = Files::new();
    if !payload.is_empty() {
        let mut unpacked = decompress(payload, &prefix).ok()?;
        read_tar(&mut unpacked, ArchiveRules::Push, |path, kind, content| {
            let mut bytes = Vec::new();
            content.read_to_end(&mut bytes)?;
            received.insert(path.clone(), (kind, bytes));
            Ok(())
        })
        .ok()?;
        unpacked.finish().ok()?;
    }
    let entries = received
        .iter()
        .map(|(path, (kind, bytes))| (path.clone(), Entry::of(*kind, bytes)));
    let target = preamble.resulting_tree(&tree, entries).ok()?;
    assert_eq!(target.tree_digest(), preamble.target);
    for (path, entry) in target.iter() {
        let file = received.get(path).unwrap_or_else(|| &base[path]);
        assert_eq!(Entry::of(file.0, &file.1), *entry);
    }
    let links = target.check_links(|path, _| {
        let file = received.get(path).unwrap_or_else(|| &base[path]);
        String::from_utf8(file.1.clone()).ok()
    });
    links.ok()?;
    preamble.plan.check().ok()?;
    let values = [&preamble.plan.build.package, &preamble.plan.build.bin];
    for value in values.into_iter().chain(&preamble.plan.build.features) {
        assert!(!value.starts_with('-') && !value.contains('\0') && !value.is_empty());
    }
    Some(())
}

#[test]
fn pushes_are_refused_or_give_the_tree_that_they_announce() {
    run("pushes", |random| {
        let base = files(random);
        some_push(random, &base).is_some_and(|body| receive(&body, &base).is_some())
    });
}

#[test]
fn texts_are_refused_or_read_the_same_when_written_again() {
    let manifest = manifest_of(&Files::from([
        (
            TreePath::new("src/main.rs").unwrap(),
            (Kind::File, b"fn main() {}".to_vec()),
        ),
        (
            TreePath::new("link").unwrap(),
            (Kind::Symlink, b"src".to_vec()),
        ),
    ]));
    let key = PrivateKey::from_seed(&[7; 32]);
    let request = SignedRequest {
        method: "GET",
        path_and_query: "/_rrun/status",
        content_encoding: "",
        body: Digest::of(b"body"),
    };
    let nonce = Nonce::from_random([1; 12]);
    let header = Authorization::sign(&key, &request, 1, nonce, BootId::from_random([2; 9]));
    let header = header.to_string();
    let public = key.public_key("ann@laptop").to_string();
    run("texts", |random| {
        let kind = random.below(4);
        let mut text = match kind {
            0 => serde_json::to_vec(&manifest).unwrap(),
            1 => serde_json::to_vec(&plan(random)).unwrap(),
            2 => header.clone().into_bytes(),
            _ => format!("{public}\n{public},{public}").into_bytes(),
        };
        damage(random, &mut text);
        let text = String::from_utf8_lossy(&text);
        match kind {
            0 => reads_back::<Manifest>(&text),
            1 => reads_back::<Plan>(&text),
            2 => text.parse::<Authorization>().is_ok_and(|read| {
                assert_eq!(read.to_string().parse(), Ok(read));
                true
            }),
            _ => PublicKey::parse_list(&text).is_ok_and(|keys| {
                for key in keys {
                    assert_eq!(key.to_string().parse(), Ok(key));
                }
                true
            }),
        }
    });
}

fn reads_back<T>(text: &str) -> bool
where
    T: serde::de::DeserializeOwned + serde::Serialize + PartialEq + std::fmt::Debug,
{
    let Ok(read) = serde_json::from_str::<T>(text) else {
        return false;
    };
    let again = serde_json::to_string(&read).unwrap();
    assert_eq!(serde_json::from_str::<T>(&again).unwrap(), read);
    true
}

//! Pushes by somebody who holds a key and means harm, or whose programs are broken: each is refused with the reason, and
//! leaves the tree, the disk, the memory and what serves as they were.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rrun_protocol::{
    BootId, BuildPlan, CheckoutId, Content, Entry, Kind, MAX_ASSETS, Manifest, Plan, Preamble,
    PrivateKey, PushId, RunPlan, TreePath, compress, write_tar,
};
use serde_json::Value;

use crate::harness::{Agent, Answer, Laptop, Project, request, sign};

/// How much more memory than before the agent may ever need for refusing something.
const MEMORY_BYTES: u64 = 200 << 20;

/// An agent that serves something, and somebody with a key.
struct Victim {
    agent: Agent,
    key: PrivateKey,
    boot: BootId,
    tree: Manifest,
    before: Before,
    memory: u64,
    refused: Cell<usize>,
}

/// What no refused push may change.
#[derive(Debug, PartialEq, Eq)]
struct Before {
    files: BTreeMap<PathBuf, Vec<u8>>,
    status: Value,
}

/// A request's body with its content encoding.
struct Body {
    bytes: Vec<u8>,
    encoding: &'static str,
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        let encoding = "";
        Self { bytes, encoding }
    }
}

impl Victim {
    fn new() -> Self {
        let (laptop, project) = (Laptop::new(), Project::new());
        let agent = Agent::new(&[&laptop]);
        laptop.push_live(&project, &agent);
        let tree = agent.signed(&laptop, "GET", "/_rrun/tree", &[], b"").body;
        let (key, boot) = (laptop.private_key(), agent.boot());
        let mut victim = Self {
            agent,
            key,
            boot,
            tree: serde_json::from_str(&tree).unwrap(),
            before: Before {
                files: BTreeMap::new(),
                status: Value::Null,
            },
            memory: 0,
            refused: Cell::default(),
        };
        victim.before = victim.look();
        victim.memory = peak_memory(victim.agent.process());
        victim
    }

    /// Everything in the workspace but cargo's output and the running app's files.
    fn look(&self) -> Before {
        let mut files = BTreeMap::new();
        for folder in ["tree", "state"] {
            collect(&self.agent.workspace().join(folder), &mut files);
        }
        // The workspace's own folders and what stands beside it.
        for folder in [
            self.agent.workspace(),
            self.agent.workspace().join(".."),
            self.agent.workspace().join("target"),
        ] {
            for item in fs::read_dir(folder).unwrap() {
                files.entry(item.unwrap().path()).or_default();
            }
        }
        files.retain(|path, _| path.file_name().is_none_or(|name| name != "log"));
        let answer = self.send("GET", "/_rrun/status", Vec::new().into());
        let mut status: Value = serde_json::from_str(&answer.body).unwrap();
        // Which process answers is the service's affair.
        status["process"] = Value::Null;
        Before { files, status }
    }

    fn send(&self, method: &str, path: &str, body: Body) -> Answer {
        let Body { bytes, encoding } = body;
        let header = sign(&self.key, self.boot, method, path, encoding, &bytes, 0);
        let headers = [("content-encoding", encoding)];
        let headers = if encoding.is_empty() {
            &[][..]
        } else {
            &headers[..]
        };
        let url = format!("{}{path}", self.agent.url());
        request(method, &url, Some(&header), headers, &bytes)
    }

    fn push(&self, body: impl Into<Body>) -> Answer {
        let mut id = [0; 9];
        getrandom::fill(&mut id).unwrap();
        let path = format!("/_rrun/pushes/{}", PushId::from_random(id));
        self.send("POST", &path, body.into())
    }

    /// Pushes `body` and expects that nothing comes of it but an error that names `part`.
    fn refuses(&self, what: &str, body: impl Into<Body>, part: &str) {
        let answer = self.push(body);
        assert!(
            (400..500).contains(&answer.status) && answer.status != 401,
            "{what}: {answer:?}"
        );
        let refusal: Value = serde_json::from_str(&answer.body).unwrap();
        let error = refusal["error"].as_str().unwrap();
        assert!(error.contains(part), "{what}: {error}");
        assert!(error.len() < 4096, "{what}: {} bytes", error.len());
        assert!(!error.contains(char::is_control), "{what}: {error:?}");
        let after = self.look();
        assert!(after == self.before, "{what}: {after:?}");
        let staging = self.agent.workspace().join("state/staging");
        assert_eq!(fs::read_dir(staging).unwrap().count(), 0, "{what}");
        assert_eq!(self.agent.get("/").body, "one", "{what}");
        let grown = self.grown();
        assert!(grown < MEMORY_BYTES, "{what}: {grown} bytes of memory");
        self.refused.set(self.refused.get() + 1);
    }

    /// How much more memory than at the start the agent has needed.
    fn grown(&self) -> u64 {
        peak_memory(self.agent.process()).saturating_sub(self.memory)
    }

    /// The same entries as a push by `rrun`, and as a whole tree that some other program packed.
    fn refuses_both(&self, what: &str, archive: &Tar, part: &str) {
        self.refuses(what, self.as_push(&archive.end()), part);
        self.refuses(what, archive.end(), part);
        let honest = Tar::default().file(b"AAA", b"an honest file before it").0;
        let behind = Tar([honest, archive.0.clone()].concat());
        self.refuses(what, gzip([behind.end()]), part);
    }

    /// A push that adds `archive` to the tree as it is.
    fn as_push(&self, archive: &[u8]) -> Vec<u8> {
        let payload = compress(archive, b"", 1).unwrap();
        self.preamble().into_body(&payload)
    }

    /// A push that changes nothing.
    fn preamble(&self) -> Preamble {
        Preamble {
            checkout: CheckoutId::from_random([1; 9]),
            sequence: u64::MAX,
            base: self.tree.tree_digest(),
            target: self.tree.tree_digest(),
            with_prefix: false,
            no_build: false,
            changed: Vec::new(),
            deleted: Vec::new(),
            plan: Plan {
                build: BuildPlan {
                    directory: None,
                    package: "app".to_owned(),
                    bin: "app".to_owned(),
                    profile: "dev".to_owned(),
                    features: Vec::new(),
                    no_default_features: false,
                    environment: BTreeMap::new(),
                },
                run: RunPlan::default(),
            },
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let (refused, mebibytes) = (self.refused.get(), self.grown() >> 20);
        println!("{refused} pushes refused, {mebibytes} MiB more memory");
    }
}

fn collect(folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for item in fs::read_dir(folder).unwrap() {
        let path = item.unwrap().path();
        if path.is_symlink() {
            let target = fs::read_link(&path).unwrap();
            files.insert(path, target.into_os_string().into_encoded_bytes());
        } else if path.is_dir() {
            collect(&path, files);
            files.insert(path, Vec::new());
        } else {
            let content = fs::read(&path).unwrap();
            files.insert(path, content);
        }
    }
}

/// The most memory that a process ever had.
fn peak_memory(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kibibytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kibibytes.unwrap_or_default() << 10
}

fn gzip(pieces: impl IntoIterator<Item = Vec<u8>>) -> Body {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for piece in pieces {
        encoder.write_all(&piece).unwrap();
    }
    Body {
        bytes: encoder.finish().unwrap(),
        encoding: "gzip",
    }
}

/// An archive as no honest program writes it.
#[derive(Clone, Default)]
struct Tar(Vec<u8>);

/// One entry's header fields, as they go in.
struct Raw<'a> {
    kind: u8,
    name: &'a [u8],
    /// Ustar's second field for a long name's folders.
    prefix: &'a [u8],
    link: &'a [u8],
    size: u64,
}

impl Default for Raw<'_> {
    fn default() -> Self {
        Self {
            kind: b'0',
            name: b"",
            prefix: b"",
            link: b"",
            size: 0,
        }
    }
}

impl Raw<'_> {
    fn header(&self) -> [u8; 512] {
        let mut header = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.name[..self.name.len().min(100)]);
        put(100, b"0000755\0");
        if self.size < 1 << 33 {
            put(124, format!("{:011o}\0", self.size).as_bytes());
        } else {
            put(124, &[0x80, 0, 0, 0]);
            put(128, &self.size.to_be_bytes());
        }
        put(148, b"        ");
        put(156, &[self.kind]);
        put(157, &self.link[..self.link.len().min(100)]);
        put(257, b"ustar\x0000");
        put(345, self.prefix);
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header
    }
}

impl Tar {
    fn raw(mut self, raw: &Raw<'_>, content: &[u8]) -> Self {
        self.0.extend(raw.header());
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn entry(self, kind: u8, name: &[u8], content: &[u8]) -> Self {
        let size = content.len() as u64;
        let raw = Raw {
            kind,
            name,
            size,
            ..Raw::default()
        };
        self.raw(&raw, content)
    }

    fn file(self, name: &[u8], content: &[u8]) -> Self {
        self.entry(b'0', name, content)
    }

    fn link(self, name: &str, target: &str) -> Self {
        let raw = Raw {
            kind: b'2',
            name: name.as_bytes(),
            link: target.as_bytes(),
            ..Raw::default()
        };
        self.raw(&raw, b"")
    }

    fn long_name(self, name: &[u8]) -> Self {
        self.entry(b'L', b"././@LongLink", &[name, b"\0"].concat())
    }

    fn pax(self, key: &str, value: &str) -> Self {
        self.entry(b'x', b"pax", &record(key, value))
    }

    fn end(&self) -> Vec<u8> {
        [self.0.as_slice(), &[0; 1024]].concat()
    }
}

/// A PAX record, which starts with its own length.
fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (rest..)
        .find(|length| length.to_string().len() + rest == *length)
        .unwrap();
    format!("{length} {key}={value}\n").into_bytes()
}

/// A zstd frame by hand, so that it can say what no compressor would.
struct Frame(Vec<u8>);

impl Frame {
    /// A frame whose window is 2 to the power of `window_log`.
    fn new(window_log: u8) -> Self {
        let mut bytes = 0xfd2f_b528u32.to_le_bytes().to_vec();
        bytes.extend([0, (window_log - 10) << 3]);
        Self(bytes)
    }

    fn block(&mut self, kind: u32, size: usize, is_last: bool, content: &[u8]) {
        let header = u32::try_from(size).unwrap() << 3 | kind << 1 | u32::from(is_last);
        self.0.extend(&header.to_le_bytes()[..3]);
        self.0.extend(content);
    }

    /// Bytes as they are.
    fn plain(mut self, content: &[u8]) -> Self {
        self.block(0, content.len(), false, content);
        self
    }

    /// Zeros, four bytes for each 128 KiB of them.
    fn zeros(mut self, size: u64) -> Self {
        const BLOCK_BYTES: usize = 128 << 10;
        for _ in 0..size / BLOCK_BYTES as u64 {
            self.block(1, BLOCK_BYTES, false, &[0]);
        }
        self
    }

    fn end(mut self) -> Vec<u8> {
        self.block(0, 0, true, b"");
        self.0
    }
}

#[test]
fn names_that_lead_out_of_the_tree_or_mislead_are_refused_in_every_way_to_write_them() {
    let victim = Victim::new();
    let long_part = format!("a/{}", "n".repeat(256));
    let long = format!("src/{}/x", ["d"; 600].join("/"));
    let names: [(&str, &str); 17] = [
        ("/etc/cron.d/x", "/etc/cron.d/x"),
        ("//x", "//x"),
        ("../x", "../x"),
        ("..", ".."),
        ("src/../../x", "src/../../x"),
        ("src/..", "src/.."),
        ("../tree/x", "../tree/x"),
        ("../state/manifest", "../state/manifest"),
        ("../target/debug/app", "../target/debug/app"),
        ("src/./x", "src/./x"),
        ("src//x", "src//x"),
        ("src/x/", "src/x/"),
        (".git/hooks/post-checkout", ".git/hooks/post-checkout"),
        ("src/.GIT/config", "src/.GIT/config"),
        ("src/\u{1b}[2Jx", "holds a control character"),
        (&long_part, "is too long (258 bytes)"),
        (&long, "is too long (1205 bytes)"),
    ];
    for (name, part) in names {
        let bytes = name.as_bytes();
        let honest = |tar: Tar| tar.file(b"zzz", b"x");
        let ways = [
            (
                "long name",
                honest(Tar::default().long_name(bytes)),
                bytes.len() < 4096,
            ),
            (
                "PAX path",
                honest(Tar::default().pax("path", name)),
                bytes.len() < 4096,
            ),
            (
                "header",
                Tar::default().file(bytes, b"x"),
                bytes.len() <= 100,
            ),
            (
                "link",
                Tar::default().link(name, "Cargo.toml"),
                bytes.len() <= 100,
            ),
        ];
        for (way, tar, _) in ways.iter().filter(|(.., fits)| *fits) {
            victim.refuses_both(&format!("{name:?} as {way}"), tar, part);
        }
    }
    let by_prefix = Raw {
        name: b"x",
        prefix: b"src/../../etc",
        ..Raw::default()
    };
    let tar = Tar::default().raw(&by_prefix, b"");
    victim.refuses_both("prefix", &tar, "src/../../etc/x");
    let tar = Tar::default().file(b"src/\xff\xfe", b"x");
    victim.refuses_both("not UTF-8", &tar, "is not UTF-8");
    victim.refuses_both("no name", &Tar::default().file(b"", b"x"), "empty");
    let tar = Tar::default().entry(b'5', b"../folder/", b"");
    victim.refuses("folder", tar.end(), "../folder");
}

#[test]
fn links_out_of_the_tree_are_refused_also_through_each_other() {
    let victim = Victim::new();
    let circle = [("a", "b"), ("b", "a")];
    let cases: [(&[(&str, &str)], &str); 12] = [
        (
            &[("l", "/etc/passwd")],
            "`l` leads out of the tree: `/etc/passwd`",
        ),
        (&[("l", "..")], "`l` leads out of the tree: `..`"),
        (&[("l", "../state/manifest")], "`l` leads out"),
        (&[("src/l", "../../x")], "`src/l` leads out"),
        (&[("src/l", "./.././../x")], "`src/l` leads out"),
        (&[("l", "src/../..//x")], "`l` leads out"),
        (&[("here", "."), ("out", "here/../x")], "`out` leads out"),
        (&[("a", "src"), ("b", "a/../../x")], "`b` leads out"),
        (&[("a", "b"), ("b", "..")], "`a` leads out"),
        (&circle, "`a` leads out"),
        (&[("l", ".git/config")], "`l` leads out"),
        (&[("l", "src/.Git/../../Cargo.toml")], "`l` leads out"),
    ];
    for (links, part) in cases {
        let mut tar = Tar::default();
        for (name, target) in links {
            tar = tar.link(name, target);
        }
        let mut announced: Vec<_> = victim.tree.clone().into_iter().collect();
        announced.extend(links.iter().map(|(name, target)| {
            let entry = Entry::of(Kind::Symlink, target.as_bytes());
            (TreePath::new(*name).unwrap(), entry)
        }));
        let mut preamble = victim.preamble();
        preamble.target = Manifest::new(announced).unwrap().tree_digest();
        let body = preamble.into_body(&compress(&tar.end(), b"", 1).unwrap());
        victim.refuses(part, body, part);
        victim.refuses(part, tar.end(), part);
    }
    // A file whose folder is a link of the same archive.
    let through = Tar::default().link("a", "src").file(b"a/x", b"x");
    victim.refuses_both(
        "through a link",
        &through,
        "`a` is a file and a folder at once",
    );
    let empty = Tar::default().link("l", "");
    victim.refuses_both("no target", &empty, "`l`");
    let long = Tar::default()
        .entry(b'K', b"././@LongLink", "../".repeat(400).as_bytes())
        .link("l", "x");
    victim.refuses_both("long target", &long, "`l`: its target is longer");
    let nul = Tar::default().pax("linkpath", "a\0/etc").link("l", "x");
    victim.refuses_both("NUL in a target", &nul, "`l`");
}

#[test]
fn what_is_no_file_and_no_link_is_refused_by_name() {
    let victim = Victim::new();
    let kinds: [(u8, &str); 12] = [
        (b'1', "hard link"),
        (b'3', "device"),
        (b'4', "device"),
        (b'6', "named pipe"),
        (b'7', "tar entry of type '7'"),
        (b'S', "sparse file"),
        (b'V', "tar entry of type 'V'"),
        (b'M', "tar entry of type 'M'"),
        (b'D', "tar entry of type 'D'"),
        (b'N', "tar entry of type 'N'"),
        (b'A', "tar entry of type 'A'"),
        (0xff, "tar entry of type"),
    ];
    for (kind, what) in kinds {
        let tar = Tar::default().entry(kind, b"src/thing", b"");
        let part = format!("`src/thing`: a {what}");
        victim.refuses_both(what, &tar, &part);
    }
    let hard_link = Raw {
        kind: b'1',
        name: b"src/passwd",
        link: b"/etc/passwd",
        ..Raw::default()
    };
    let tar = Tar::default().raw(&hard_link, b"");
    victim.refuses_both("hard link out", &tar, "`src/passwd`: a hard link");
    let tar = Tar::default().entry(b'5', b"folder", b"");
    victim.refuses("folder", victim.as_push(&tar.end()), "`folder`: a folder");
}

#[test]
fn headers_that_programs_read_in_different_ways_are_refused() {
    let victim = Victim::new();
    let file = |tar: Tar| tar.file(b"the/file", b"content");
    for (key, value) in [
        ("size", "1"),
        ("size", "99999999999999999999"),
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.map", "0,1"),
        ("GNU.sparse.name", "../x"),
        ("GNU.sparse.realsize", "1073741824"),
        ("SCHILY.xattr.security.capability", "x"),
        ("SCHILY.realsize", "1"),
        ("hdrcharset", "BINARY"),
        ("unknown", "x"),
        ("", "x"),
    ] {
        let part = format!("`the/file`: a file with the PAX attribute `{key}`");
        victim.refuses_both(key, &file(Tar::default().pax(key, value)), &part);
        let global = Tar::default().entry(b'g', b"pax", &record(key, value));
        victim.refuses_both(key, &file(global), &part);
    }
    for key in ["path", "linkpath"] {
        let global = Tar::default().entry(b'g', b"pax", &record(key, "../x"));
        victim.refuses_both(key, &file(global), "`the/file`");
    }
    for (what, pax) in [
        ("longer than said", &b"9 path=abcdefgh\n"[..]),
        ("shorter than said", b"99 path=a\n"),
        ("no length", b"path=a\n"),
        ("a length beyond all", b"99999999999999999999999 path=a\n"),
        ("no value", b"7 path\n"),
    ] {
        let tar = file(Tar::default().entry(b'x', b"pax", pax));
        victim.refuses_both(what, &tar, "malformed pax extension");
    }
    for kind in [b'x', b'g', b'L', b'K'] {
        let tar = file(Tar::default().entry(kind, b"long", &[b'a'; 5000]));
        victim.refuses_both("overlong header", &tar, "a header of 5000 bytes");
        let absurd = Raw {
            kind,
            name: b"long",
            size: u64::MAX - 1,
            ..Raw::default()
        };
        let tar = Tar::default().raw(&absurd, b"");
        victim.refuses_both("endless header", &tar, "");
    }
    for (what, tar) in [
        ("long name", Tar::default().long_name(b"name")),
        ("long link", Tar::default().entry(b'K', b"x", b"target\0")),
        ("PAX", Tar::default().pax("path", "name")),
    ] {
        victim.refuses_both(what, &tar, "that does not follow");
    }
    let one = || Tar::default().long_name(b"one");
    for (what, tar) in [
        ("two long names", one().long_name(b"two")),
        ("long name and PAX", one().pax("path", "two")),
        (
            "two PAX",
            Tar::default().pax("path", "one").pax("path", "two"),
        ),
    ] {
        victim.refuses_both(what, &file(tar), "`one`: the archive gives it two names");
    }
    let mut damaged = file(Tar::default());
    damaged.0[0] ^= 1;
    victim.refuses_both("checksum", &damaged, "checksum");
}

#[test]
fn a_path_twice_or_as_file_and_folder_is_refused() {
    let victim = Victim::new();
    let twice = Tar::default().file(b"m/x", b"1").file(b"m/x", b"2");
    victim.refuses_both("twice", &twice, "`m/x`: it stands in the archive twice");
    let twice = Tar::default().file(b"m/x", b"1").link("m/x", "y");
    victim.refuses_both("twice as a link", &twice, "`m/x`");
    let dotted = Tar::default().file(b"x", b"1").file(b"./x", b"2");
    victim.refuses("twice by dot", dotted.end(), "`x`");
    let unordered = Tar::default().file(b"n", b"1").file(b"m", b"2");
    let unordered = victim.as_push(&unordered.end());
    victim.refuses(
        "out of order",
        unordered,
        "`m`: it stands in the archive twice or out of",
    );
    let both = Tar::default().file(b"m", b"1").file(b"m/x", b"2");
    victim.refuses_both(
        "file and folder",
        &both,
        "`m` is a file and a folder at once",
    );
    // The same against what lies in the tree.
    let folder = Tar::default().file(b"src", b"1");
    let folder = victim.as_push(&folder.end());
    victim.refuses(
        "a file where a folder is",
        folder,
        "`src` is a file and a folder",
    );
    let inside = Tar::default().file(b"src/main.rs/x", b"1");
    let inside = victim.as_push(&inside.end());
    victim.refuses(
        "a folder where a file is",
        inside,
        "`src/main.rs` is a file and a folder",
    );
    let known = Tar::default().file(b"Cargo.toml", b"1");
    let known = victim.as_push(&known.end());
    victim.refuses(
        "not announced",
        known,
        "`Cargo.toml`: the push does not name it",
    );
}

#[test]
fn what_unpacks_to_more_than_a_tree_is_refused_within_little_memory() {
    const GIB: u64 = 1 << 30;
    let victim = Victim::new();
    let push = |payload: Vec<u8>| {
        assert!(payload.len() < 1 << 20);
        victim.preamble().into_body(&payload)
    };
    let sized = |name: &'static [u8], size: u64| {
        let raw = Raw {
            name,
            size,
            ..Raw::default()
        };
        raw.header()
    };
    let zeros = Frame::new(20).plain(&sized(b"zeros", GIB)).zeros(GIB).end();
    victim.refuses(
        "1 GiB in one file",
        push(zeros),
        "`zeros`: 1073741824 bytes",
    );
    for size in [(64 << 20) + 1, u64::MAX / 2, u64::MAX] {
        let tar = Tar(sized(b"zeros", size).to_vec());
        victim.refuses_both("a size beyond all", &tar, "");
    }
    let mut files = Frame::new(20);
    for name in [b"a", b"b", b"c", b"d", b"e"] {
        files = files.plain(&sized(name, 64 << 20)).zeros(64 << 20);
    }
    victim.refuses(
        "files of 64 MiB",
        push(files.end()),
        "`e`: the archive unpacks to more",
    );
    let tail = Tar::default().file(b"small", b"x").end();
    let tail = Frame::new(20).plain(&tail).zeros(GIB).end();
    victim.refuses(
        "1 GiB of zeros behind the end",
        push(tail),
        "unpacks to more than",
    );
    let folder = Raw {
        kind: b'5',
        name: b"folder/",
        size: GIB,
        ..Raw::default()
    };
    let zeros = std::iter::repeat_n(vec![0; 1 << 20], 600);
    let whole = gzip(std::iter::once(folder.header().to_vec()).chain(zeros));
    assert!(whole.bytes.len() < 4 << 20);
    victim.refuses("a folder with content", whole, "unpacks to more than");
    // A frame of some bytes may ask for the largest window, which is not used up.
    let wide = Frame::new(27)
        .plain(&Tar::default().file(b"../x", b"").end())
        .end();
    victim.refuses("the widest window", push(wide), "../x");
    for window_log in [28, 31, 41] {
        let wide = Frame::new(window_log).plain(&Tar::default().file(b"x", b"").end());
        victim.refuses("a wider window", push(wide.end()), "too much memory");
    }
}

#[test]
fn pushes_at_once_take_no_more_memory_than_one() {
    const AT_ONCE: usize = 4;
    let victim = Victim::new();
    // Uses the widest window up, behind an archive of one small file.
    let wide = Frame::new(27).plain(&Tar::default().file(b"small", b"x").end());
    let body = victim.preamble().into_body(&wide.zeros(160 << 20).end());
    let (key, boot, url) = (&victim.key, victim.boot, victim.agent.url());
    std::thread::scope(|scope| {
        for number in 0..AT_ONCE {
            let (body, url) = (&body, &url);
            scope.spawn(move || {
                let path = format!("/_rrun/pushes/MTIzNDU2Nzg{number}");
                let header = sign(key, boot, "POST", &path, "", body, 0);
                let answer = request("POST", &(url.to_owned() + &path), Some(&header), &[], body);
                assert_eq!(answer.status, 422, "{answer:?}");
            });
        }
    });
    let grown = victim.grown();
    // One did fill its window.
    assert!(
        (100 << 20..MEMORY_BYTES).contains(&grown),
        "{grown} bytes of memory"
    );
}

#[test]
fn millions_of_entries_are_refused_within_little_memory() {
    let victim = Victim::new();
    // As many as fit into the longest stream, all of them harmless by themselves.
    let folder = Raw {
        kind: b'5',
        name: b"folder/",
        ..Raw::default()
    };
    let folders = folder.header().repeat(1000);
    let folders = std::iter::repeat_n(folders, 1100);
    victim.refuses("folders", gzip(folders), "unpacks to more than");
}

#[test]
fn pushes_that_do_not_fit_their_base_are_refused() {
    let victim = Victim::new();
    let mut preamble = victim.preamble();
    preamble.base = Manifest::default().tree_digest();
    preamble.target = preamble.base;
    victim.refuses("nothing at all", preamble.into_body(b""), "no Cargo.toml");
    let nobody = Entry::of(Kind::File, b"never here");
    let nobody = Manifest::new([(TreePath::new("never").unwrap(), nobody)]).unwrap();
    let mut preamble = victim.preamble();
    preamble.base = nobody.tree_digest();
    let part = victim.tree.tree_digest().short();
    victim.refuses("wrong base", preamble.into_body(b""), &part);

    let archive = Tar::default().file(b"new", b"x").end();
    victim.refuses("wrong digest", victim.as_push(&archive), "as announced");
    let positions: [(&[u32], &[u32], &str); 8] = [
        (&[3], &[], ": 3"),
        (&[u32::MAX], &[], ": 4294967295"),
        (&[], &[3], ": 3"),
        (&[1, 0], &[], ": 0"),
        (&[0, 0], &[], ": 0"),
        (&[], &[2, 1], ": 1"),
        (&[], &[1, 1], ": 1"),
        (&[0, 1], &[1], ": 1"),
    ];
    for (changed, deleted, part) in positions {
        let mut preamble = victim.preamble();
        preamble.changed = changed.to_vec();
        preamble.deleted = deleted.to_vec();
        victim.refuses("positions", preamble.into_body(b""), part);
    }
    let mut preamble = victim.preamble();
    preamble.changed = vec![1];
    victim.refuses(
        "missing",
        preamble.into_body(b""),
        "`Cargo.toml` is named as changed",
    );
    let mut preamble = victim.preamble();
    preamble.changed = (0..300_000).collect();
    victim.refuses("positions beyond all", preamble.into_body(b""), ": 3");
}

#[test]
fn bodies_that_are_cut_joined_or_say_absurd_lengths_are_refused() {
    let victim = Victim::new();
    let archive = Tar::default().file(b"new", &[7; 3000]).end();
    let payload = compress(&archive, b"", 3).unwrap();
    let body = |payload: &[u8]| victim.preamble().into_body(payload);
    for end in [1, 4, 6, payload.len() / 2, payload.len() - 1] {
        victim.refuses(
            "cut frame",
            body(&payload[..end]),
            "the archive cannot be read",
        );
    }
    let head = Frame::new(20).plain(&archive[..512]).end();
    victim.refuses("cut archive", body(&head), "the archive cannot be read");
    let unended = Frame::new(20).plain(&archive[..archive.len() - 1024]).end();
    victim.refuses(
        "no end marker",
        body(&unended),
        "ends before its end marker",
    );
    let skippable = [
        &0x184d_2a50u32.to_le_bytes()[..],
        &4u32.to_le_bytes(),
        b"skip",
    ]
    .concat();
    for (what, payload, part) in [
        (
            "two frames",
            [&payload[..], &payload].concat(),
            "goes on behind its files",
        ),
        (
            "skippable behind",
            [&payload[..], &skippable].concat(),
            "goes on behind its files",
        ),
        (
            "skippable first",
            [&skippable[..], &payload].concat(),
            "ends before its end marker",
        ),
        (
            "garbage behind",
            [&payload[..], b"garbage"].concat(),
            "goes on behind its files",
        ),
        ("garbage", b"garbage".to_vec(), "cannot be read"),
        ("an archive as it is", archive.clone(), "cannot be read"),
    ] {
        victim.refuses(what, body(&payload), part);
    }
    let joined = [archive.clone(), archive].concat();
    victim.refuses("joined", victim.as_push(&joined), "behind its end marker");
    victim.refuses("joined", joined, "behind its end marker");

    let whole = victim.preamble().into_body(b"");
    for end in [4, 5, 13, whole.len() / 2, whole.len() - 1] {
        victim.refuses(
            "cut preamble",
            whole[..end].to_vec(),
            "the body is not a push",
        );
    }
    // Behind the digests stand the flags and then the number of changed positions.
    let preamble = victim.preamble();
    let counts = whole.len() - preamble_tail(&preamble).len();
    for length in [
        &[0xff, 0xff, 0xff, 0xff, 0x0f][..],
        &[0xff; 10],
        &[0x80; 20],
    ] {
        let absurd = [&whole[..counts], length, b"rest"].concat();
        victim.refuses("absurd length", absurd, "the body is not a push");
    }
    victim.refuses("nothing", Vec::new(), "ends before its end marker");
    victim.refuses("no file", vec![0; 1024], "holds no file");
    victim.refuses(
        "folders only",
        Tar::default().entry(b'5', b"a/", b"").end(),
        "holds no file",
    );
    let brotli = Body {
        bytes: b"x".to_vec(),
        encoding: "br",
    };
    victim.refuses("brotli", brotli, "`br`");
    let cut = gzip([Tar::default().file(b"a", b"x").end()]);
    let half = Body {
        bytes: cut.bytes[..cut.bytes.len() / 2].to_vec(),
        ..cut
    };
    victim.refuses("cut gzip", half, "cannot be read");
}

/// What follows the flags in a preamble: both lists of positions, and the plan.
fn preamble_tail(preamble: &Preamble) -> Vec<u8> {
    let mut other = preamble.clone();
    other.changed = vec![0];
    let (with, without) = (other.into_body(b""), preamble.clone().into_body(b""));
    let same = with
        .iter()
        .zip(&without)
        .take_while(|(one, other)| one == other)
        .count();
    without[same..].to_vec()
}

#[test]
fn plans_that_would_build_or_run_something_else_are_refused() {
    let victim = Victim::new();
    let variables = |name: &str| BTreeMap::from([(name.to_owned(), "x".to_owned())]);
    type Change<'a> = Box<dyn Fn(&mut Plan) + 'a>;
    let cases: [(&str, Change<'_>); 15] = [
        (
            "package \"--manifest-path=/etc/Cargo.toml\"",
            Box::new(|plan| {
                plan.build.package = "--manifest-path=/etc/Cargo.toml".to_owned();
            }),
        ),
        (
            "package \"*\"",
            Box::new(|plan| plan.build.package = "*".to_owned()),
        ),
        (
            "binary \"-Zscript\"",
            Box::new(|plan| plan.build.bin = "-Zscript".to_owned()),
        ),
        (
            "binary \"app\\0\"",
            Box::new(|plan| plan.build.bin = "app\0".to_owned()),
        ),
        (
            "profile \"--config=/etc/x\"",
            Box::new(|plan| {
                plan.build.profile = "--config=/etc/x".to_owned();
            }),
        ),
        (
            "feature \"--config=/etc/x\"",
            Box::new(|plan| {
                plan.build.features = vec!["--config=/etc/x".to_owned()];
            }),
        ),
        (
            "folder \"src\"",
            Box::new(|plan| {
                plan.build.directory = Some(TreePath::new("src").unwrap());
            }),
        ),
        (
            "folder \"no/where\"",
            Box::new(|plan| {
                plan.build.directory = Some(TreePath::new("no/where").unwrap());
            }),
        ),
        (
            "build environment \"A=B\"",
            Box::new(|plan| plan.build.environment = variables("A=B")),
        ),
        (
            "build environment \"CARGO_TARGET_DIR\"",
            Box::new(|plan| {
                plan.build.environment = variables("CARGO_TARGET_DIR");
            }),
        ),
        (
            "environment \"A\\0B\"",
            Box::new(|plan| plan.run.environment = variables("A\0B")),
        ),
        (
            "environment \"RRUN_KEY_FILE\"",
            Box::new(|plan| {
                plan.run.environment = variables("RRUN_KEY_FILE");
            }),
        ),
        (
            "argument \"a\\0b\"",
            Box::new(|plan| plan.run.args = vec!["a\0b".to_owned()]),
        ),
        (
            "ready path \"@169.254.169.254/\"",
            Box::new(|plan| {
                plan.run.ready_path = Some("@169.254.169.254/".to_owned());
            }),
        ),
        (
            "more assets",
            Box::new(|plan| {
                plan.run.assets = vec![TreePath::new("src").unwrap(); MAX_ASSETS + 1];
            }),
        ),
    ];
    for (part, change) in cases {
        let mut preamble = victim.preamble();
        change(&mut preamble.plan);
        victim.refuses(part, preamble.into_body(b""), part);
    }
}

#[test]
fn limits_beyond_all_time_are_waited_for_and_break_nothing() {
    let victim = Victim::new();
    for argument in ["one", "two"] {
        let mut preamble = victim.preamble();
        let run = &mut preamble.plan.run;
        run.args = vec![argument.to_owned()];
        run.ready_timeout = Duration::MAX;
        run.drain_limit = Duration::MAX;
        run.stream_drain_limit = Duration::MAX;
        let answer = victim.push(preamble.into_body(b""));
        assert!(answer.body.contains("\"outcome\":\"live\""), "{answer:?}");
        assert_eq!(victim.agent.get("/").body, "one");
    }
}

/// Cargo's target directory lies beside the tree; a folder of that name in the tree is one like any other.
#[test]
fn a_push_into_a_folder_named_target_touches_nothing_that_was_built() {
    let victim = Victim::new();
    let built = victim.agent.workspace().join("target/debug/app");
    let before = fs::read(&built).unwrap();
    let path = TreePath::new("target/debug/app").unwrap();
    let archive = write_tar([Content {
        path: &path,
        kind: Kind::Executable,
        bytes: b"evil",
    }]);
    let mut announced: Vec<_> = victim.tree.clone().into_iter().collect();
    announced.push((path, Entry::of(Kind::Executable, b"evil")));
    let mut preamble = victim.preamble();
    preamble.target = Manifest::new(announced).unwrap().tree_digest();
    let answer = victim.push(preamble.into_body(&compress(&archive, b"", 1).unwrap()));
    assert!(answer.body.contains("\"outcome\":\"live\""), "{answer:?}");
    assert!(fs::read(&built).unwrap() == before);
    assert_eq!(
        fs::read(victim.agent.tree("target/debug/app")).unwrap(),
        b"evil"
    );
    assert_eq!(victim.agent.get("/").body, "one");
}

//! Who may push, and what there is to steal: nothing on the agent's side signs, and no text holds a signature.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use rrun_protocol::{PrivateKey, SIGNATURE_HEADER};
use serde_json::Value;

use crate::harness::{Agent, Answer, Laptop, MAIN, Project, Ran, request, sign};

fn laptop_of(user: &str) -> Laptop {
    let mut laptop = Laptop::new();
    laptop
        .environment
        .insert("USER".to_owned(), user.to_owned());
    laptop
}

/// Names of the people in the history, oldest first.
fn pushed_by(agent: &Agent, laptop: &Laptop) -> Vec<String> {
    let answer = agent.signed(laptop, "GET", "/_rrun/history", &[], b"");
    let history: Vec<Value> = serde_json::from_str(&answer.body).unwrap();
    let by = |entry: &Value| entry["by"].as_str().unwrap().to_owned();
    history.iter().map(by).collect()
}

#[test]
fn who_is_taken_off_the_list_is_out_after_a_restart_and_the_others_are_in() {
    let [ann, ben, cem] = ["ann", "ben", "cem"].map(laptop_of);
    let mut agent = Agent::new(&[&ann, &ben, &cem]);
    let project = Project::new();
    for (laptop, answer) in [(&ann, "one"), (&ben, "two"), (&cem, "three")] {
        project.answer(answer);
        laptop.push_live(&project, &agent);
        assert_eq!(agent.get("/").body, answer);
    }
    let names = [&ann, &ben, &cem].map(|laptop| agent.name_of(laptop));
    assert_eq!(pushed_by(&agent, &ann), names);

    agent.authorize(&[&ann, &ben]);
    agent.restart(|_| {});
    project.answer("four");
    let refused = cem.push(&project, &agent, &[]);
    assert_eq!((refused.code, refused.outcome().as_str()), (3, "refused"));
    let reason = refused.end()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("authorized keys"), "{reason}");
    for (method, path) in [
        ("GET", "/_rrun/status"),
        ("GET", "/_rrun/tree"),
        ("GET", "/_rrun/logs"),
        ("GET", "/_rrun/history"),
        ("POST", "/_rrun/pushes/MTIzNDU2Nzg5"),
        ("POST", "/_rrun/rollback"),
        ("POST", "/_rrun/cancel"),
        ("POST", "/_rrun/restart"),
        ("POST", "/_rrun/stop"),
    ] {
        let answer = agent.signed(&cem, method, path, &[], b"");
        assert_eq!(answer.status, 401, "{method} {path}: {answer:?}");
    }
    assert_eq!(
        agent.get("/").body,
        "three",
        "what was pushed goes on serving"
    );
    for (laptop, answer) in [(&ann, "four"), (&ben, "five")] {
        project.answer(answer);
        laptop.push_live(&project, &agent);
        assert_eq!(agent.get("/").body, answer);
    }
    assert_eq!(pushed_by(&agent, &ann).len(), 5);
}

#[test]
fn who_pushes_over_another_one_s_version_is_told_whose_it_is() {
    let (ann, ben) = (laptop_of("ann"), laptop_of("ben"));
    let agent = Agent::new(&[&ann, &ben]);
    let project = Project::new();
    let first = ann.push_live(&project, &agent);
    assert_eq!(first.event("warning"), None);
    project.answer("two");
    let second = ben.push_live(&project, &agent);
    let expected = format!(
        "this replaces generation 1, which {} pushed",
        agent.name_of(&ann)
    );
    assert_eq!(second.event("warning").unwrap()["text"], expected.as_str());
    project.answer("three");
    let third = ben.push_live(&project, &agent);
    assert_eq!(third.event("warning"), None, "it is their own");
}

#[test]
fn a_key_file_that_others_can_read_signs_nothing() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    for mode in [0o644, 0o640, 0o604, 0o622, 0o601] {
        fs::set_permissions(laptop.key_file(), fs::Permissions::from_mode(mode)).unwrap();
        let ran = laptop.push(&project, &agent, &[]);
        assert_eq!(ran.code, 2, "{mode:o}: {ran:?}");
        let file = laptop.key_file();
        let texts = ran.stdout + &ran.stderr;
        let hint = format!("chmod 600 {}", file.display());
        assert!(
            texts.contains(&hint) && texts.contains(&format!("mode {mode:o}")),
            "{texts}"
        );
    }
    fs::set_permissions(laptop.key_file(), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(pushed_by(&agent, &laptop), [""; 0]);
    laptop.push_live(&project, &agent);
}

/// Prints everything that a program finds without looking at files: its environment, and its parents' as far as the agent.
const LOOK: &str = r#"
fn look() -> String {
    use std::fs;
    let mut found = String::new();
    for (name, value) in std::env::vars_os() {
        found += &format!("own {}={}\n", name.to_string_lossy(), value.to_string_lossy());
    }
    let mut process = std::process::id().to_string();
    loop {
        let read = |file: &str| {
            let bytes = fs::read(format!("/proc/{process}/{file}")).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let command = read("cmdline");
        found += &format!("command {command}\nenvironment {}\n", read("environ"));
        let status = read("status");
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        let parent = parent.unwrap_or("0").trim().to_owned();
        if command.contains("agent serve") || parent.parse::<u32>().unwrap_or(0) < 2 {
            return found;
        }
        process = parent;
    }
}
"#;

/// The forms in which a private key could lie somewhere.
struct Secret {
    /// Of its PEM file, base64.
    lines: Vec<String>,
    /// The 32 bytes that everything follows from.
    seed: Vec<u8>,
}

impl Secret {
    fn of(laptop: &Laptop) -> Self {
        /// In front of the seed in PKCS#8: an octet string in an octet string.
        const MARK: [u8; 4] = [0x04, 0x22, 0x04, 0x20];
        let pem = fs::read_to_string(laptop.key_file()).unwrap();
        let lines: Vec<String> = pem
            .lines()
            .filter(|line| !line.starts_with('-'))
            .map(str::to_owned)
            .collect();
        let bytes = BASE64.decode(lines.concat()).unwrap();
        let at = bytes
            .windows(MARK.len())
            .position(|window| window == MARK)
            .unwrap();
        let seed = bytes[at + MARK.len()..][..32].to_vec();
        let again = PrivateKey::from_seed(seed.as_slice().try_into().unwrap());
        assert_eq!(
            again.public_key("").id(),
            laptop.private_key().public_key("").id()
        );
        Self { lines, seed }
    }

    fn is_in(&self, bytes: &[u8]) -> bool {
        let hex: String = self.seed.iter().map(|byte| format!("{byte:02x}")).collect();
        let base64 = BASE64.encode(&self.seed);
        let texts = self.lines.iter().chain([&hex, &base64]);
        holds(bytes, &self.seed) || texts.into_iter().any(|text| holds(bytes, text.as_bytes()))
    }
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Every file below `folder`, but those that `is_left_out` names.
fn files_below(folder: &Path, is_left_out: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(folder).unwrap() {
            let path = item.unwrap().path();
            if is_left_out(&path) || path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files
}

#[cfg(target_os = "linux")]
#[test]
fn neither_build_script_nor_app_nor_disk_holds_anything_to_sign_with() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    let build = format!(
        "{LOOK}\nfn main() {{ let file = std::env::var(\"OUT_DIR\").unwrap() + \"/found\"; std::fs::write(file, look()).unwrap(); }}"
    );
    project.write("build.rs", &build);
    let answer = "BUILD.to_owned() + \"=====\" + &look()";
    let main = MAIN.replace("ANSWER.to_owned()", answer).replace(
        "const ANSWER: &str = \"one\";",
        "const BUILD: &str = include_str!(concat!(env!(\"OUT_DIR\"), \"/found\"));",
    );
    project.write("src/main.rs", &(main + LOOK));
    laptop.push_live(&project, &agent);
    let found = agent.get("/").body;
    let (build, app) = found.split_once("=====").unwrap();
    let secret = Secret::of(&laptop);
    for (who, found) in [("build script", build), ("app", app)] {
        // It did see its environment and the agent's.
        assert!(found.contains("own PATH="), "{who}: {found}");
        let agent_s = found.lines().last().unwrap();
        assert!(found.contains("agent serve") && agent_s.contains("RRUN_AUTHORIZED_KEYS"));
        let own: Vec<&str> = found
            .lines()
            .filter(|line| line.starts_with("own RRUN_"))
            .collect();
        assert_eq!(own, [""; 0], "{who}");
        assert!(!secret.is_in(found.as_bytes()), "{who}: {found}");
        assert!(!found.contains("PRIVATE KEY"), "{who}: {found}");
    }
    let files = files_below(agent.folder(), |_| false);
    assert!(files.len() > 20 && files.iter().any(|file| file.ends_with("state/manifest")));
    for file in files {
        let content = fs::read(&file).unwrap();
        assert!(!secret.is_in(&content), "{}", file.display());
        // A compiled program may name the form; what rrun keeps may not.
        let is_built = file.starts_with(agent.workspace().join("target"));
        assert!(
            is_built || !holds(&content, b"PRIVATE KEY"),
            "{}",
            file.display()
        );
    }
    // The search finds what is there.
    assert!(secret.is_in(&fs::read(laptop.key_file()).unwrap()));
}

/// Stands between laptop and agent and keeps what the laptop sends.
struct Listener {
    port: u16,
    connections: Arc<Mutex<Vec<Sent>>>,
}

/// What the laptop sent over one connection.
type Sent = Arc<Mutex<Vec<u8>>>;

impl Listener {
    fn before(agent: &Agent) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::<Mutex<Vec<Sent>>>::default();
        let (agent, kept) = (agent.port, Arc::clone(&connections));
        std::thread::spawn(move || {
            for up in listener.incoming().flatten() {
                let Ok(down) = TcpStream::connect(("127.0.0.1", agent)) else {
                    continue;
                };
                let own = Sent::default();
                kept.lock().unwrap().push(Arc::clone(&own));
                let (from, to) = (up.try_clone().unwrap(), down.try_clone().unwrap());
                std::thread::spawn(move || pass_on(from, to, Some(&own)));
                std::thread::spawn(move || pass_on(down, up, None));
            }
        });
        Self { port, connections }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The signature headers that went by.
    fn headers(&self) -> Vec<String> {
        let mark = format!("{SIGNATURE_HEADER}: ");
        let mut found = Vec::new();
        for sent in self.connections.lock().unwrap().iter() {
            let sent = String::from_utf8_lossy(&sent.lock().unwrap()).into_owned();
            let lines = sent.split("\r\n");
            found.extend(lines.filter_map(|line| line.strip_prefix(&mark).map(str::to_owned)));
        }
        found
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, keep: Option<&Mutex<Vec<u8>>>) {
    let mut buffer = [0; 16 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if let Some(kept) = keep {
            kept.lock().unwrap().extend(&buffer[..read]);
        }
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// An app that prints the head of each request.
fn talkative() -> String {
    MAIN.replace(
        "while !lines.next()?.ok()?.is_empty() {}",
        "loop { let line = lines.next()?.ok()?; println!(\"head: {line}\"); if line.is_empty() { break } }",
    )
}

/// Everything that was signed by hand.
struct ByHand<'a> {
    agent: &'a Agent,
    key: PrivateKey,
    headers: Vec<String>,
}

impl ByHand<'_> {
    /// Signs a request in a form that is no HTTP, so that its connection ends with an error.
    fn break_off(&mut self, path: &str) {
        let header = sign(&self.key, self.agent.boot(), "GET", path, "", b"", 0);
        let request =
            format!("GET {path} HTTP/1.1\r\n{SIGNATURE_HEADER}: {header}\r\nno header\r\n\r\n");
        let mut stream = TcpStream::connect(("127.0.0.1", self.agent.port)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 400"));
        self.headers.push(header);
    }

    /// Signs a request for `signed` and sends it as `changed` makes of it.
    fn send(
        &mut self,
        method: &str,
        path: &str,
        body: &[u8],
        change: impl FnOnce(&str) -> String,
    ) -> Answer {
        let header = sign(&self.key, self.agent.boot(), method, path, "", b"signed", 0);
        let sent = change(&header);
        self.headers.extend([header, sent.clone()]);
        let url = format!("{}{path}", self.agent.url());
        request(method, &url, Some(&sent), &[], body)
    }
}

#[test]
fn no_text_and_no_file_holds_a_signature_or_a_private_key() {
    // The log says all that it can.
    let (laptop, stranger) = (Laptop::new(), Laptop::new());
    let mut agent = Agent::with_environment(&[&laptop], &[("RRUN_LOG", "trace")]);
    let listener = Listener::before(&agent);
    let url = listener.url();
    let project = Project::new();
    project.write("src/main.rs", &talkative());
    let mut texts: Vec<(String, String)> = Vec::new();
    let mut rrun = |laptop: &Laptop, arguments: &[&str]| -> Ran {
        let all = [arguments, &["--url", &url]].concat();
        let ran = laptop.run(&project.folder, &all);
        let name = arguments.join(" ");
        texts.push((format!("{name} (stdout)"), ran.stdout.clone()));
        texts.push((format!("{name} (stderr)"), ran.stderr.clone()));
        ran
    };

    // What goes well and what does not, through the client.
    assert_eq!(rrun(&laptop, &["push", "--json"]).code, 0);
    for source in [
        "does not compile",
        "fn main() { eprintln!(\"head: dies\"); std::process::exit(3) }",
    ] {
        project.write("src/main.rs", source);
        assert_ne!(rrun(&laptop, &["push", "--verbose"]).code, 0);
    }
    assert_eq!(rrun(&stranger, &["push", "--json"]).code, 3);
    project.write("src/main.rs", &talkative());
    for arguments in [
        &["push"][..],
        &["status"],
        &["history"],
        &["logs"],
        &["rollback"],
        &["push", "--json", "--full"],
    ] {
        rrun(&laptop, arguments);
    }

    // What only somebody with bad intentions sends.
    let mut by_hand = ByHand {
        agent: &agent,
        key: laptop.private_key(),
        headers: Vec::new(),
    };
    let path = "/_rrun/pushes/MTIzNDU2Nzg5";
    let same = |header: &str| header.to_owned();
    let cut = |header: &str| header[..header.len() - 1].to_owned();
    let other_version = |header: &str| header.replacen('1', "999", 1);
    let mut answers = vec![
        by_hand.send("POST", path, b"another body", same),
        by_hand.send("POST", path, b"signed", cut),
        by_hand.send("POST", path, b"signed", other_version),
        by_hand.send("POST", path, b"signed", |header| {
            header.to_owned() + " more"
        }),
        by_hand.send("POST", path, b"signed", |header| header.replace(' ', "  ")),
        by_hand.send("POST", path, b"signed", same),
        // To the app, which prints all that it gets.
        by_hand.send("GET", "/", b"", same),
    ];
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [401, 401, 426, 401, 401, 422, 200]);
    by_hand.break_off("/_rrun/status");
    let mut headers = std::mem::take(&mut by_hand.headers);
    headers.extend(listener.headers());
    // Each of the client's, once more.
    for header in listener.headers() {
        let again = format!("{}/_rrun/status", agent.url());
        let answer = request("GET", &again, Some(&header), &[], b"");
        assert_eq!(answer.status, 401, "{answer:?}");
        answers.push(answer);
    }
    for path in [
        "/_rrun/logs",
        "/_rrun/status",
        "/_rrun/history",
        "/_rrun/builds/latest/log",
        "/_rrun/builds/1/log",
    ] {
        answers.push(agent.signed(&laptop, "GET", path, &[], b""));
    }
    assert!(
        answers
            .iter()
            .any(|answer| answer.body.contains("head: GET / "))
    );
    texts.extend(
        answers
            .into_iter()
            .map(|answer| (String::from("answer"), answer.body)),
    );
    agent.stop();

    let signatures: Vec<&str> = headers
        .iter()
        .filter_map(|header| header.split(' ').next_back())
        .filter(|signature| signature.len() > 80)
        .collect();
    assert!(signatures.len() > 20, "{} signatures", signatures.len());
    let key_files = [laptop.key_file(), stranger.key_file()];
    let secrets = [Secret::of(&laptop), Secret::of(&stranger)];
    let folders = [agent.folder(), laptop.folder(), stranger.folder()];
    let is_built = |path: &Path| path.ends_with("workspace/target");
    let files = folders
        .iter()
        .flat_map(|folder| files_below(folder, is_built))
        .filter(|file| !key_files.contains(file));
    let files = files.map(|file| (file.display().to_string(), fs::read(&file).unwrap()));
    let texts = texts
        .into_iter()
        .map(|(name, text)| (name, text.into_bytes()));
    let mut looked_at = 0;
    for (name, content) in files.chain(texts) {
        looked_at += 1;
        for signature in &signatures {
            // Neither as a whole nor in part.
            let parts = [&signature[..40], &signature[40..]];
            let is_there = parts.iter().any(|part| find(&content, part));
            assert!(!is_there, "{name} holds a signature");
        }
        for secret in &secrets {
            assert!(!secret.is_in(&content), "{name} holds a private key");
        }
    }
    assert!(looked_at > 40, "{looked_at} files and texts");
    assert!(
        agent.log().contains("DEBUG"),
        "the log says all that it can"
    );
}

fn find(content: &[u8], part: &str) -> bool {
    holds(content, part.as_bytes())
}

//! Something between laptop and agent that misbehaves: cuts requests and answers, ends streams early, holds them back.
//!
//! It relays one request over each connection and changes nothing in it but `connection: close`. Faults are chosen by the
//! request line, so that a test says which exchange goes wrong and how.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

/// What goes wrong with one exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The connection breaks after so many bytes of the request's body.
    CutUp(usize),
    /// It breaks in the middle of the answer's chunk after so many whole ones.
    CutDown(usize),
    /// The answer ends, well formed, after so many chunks.
    EndDown(usize),
    /// The answer's head passes, its body comes when it is complete.
    HoldBody,
    /// The answer comes when it is complete.
    HoldAll,
}

/// One exchange as it went.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// Method and path.
    pub line: String,
    pub at: Instant,
    /// Bytes of the body that were passed on.
    pub body: usize,
}

type Rule = Box<dyn Fn(&str, usize) -> Fault + Send + Sync>;

/// A running proxy; takes no more connections once dropped.
pub(crate) struct Proxy {
    pub port: u16,
    inner: Arc<Inner>,
}

struct Inner {
    agent: u16,
    rule: Mutex<Rule>,
    seen: Mutex<Vec<Seen>>,
    is_over: AtomicBool,
}

impl Proxy {
    /// In front of the agent at `agent`. `rule` is asked with the request's method and path, and how many requests of this
    /// method there were before.
    pub(crate) fn new(
        agent: u16,
        rule: impl Fn(&str, usize) -> Fault + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let inner = Arc::new(Inner {
            agent,
            rule: Mutex::new(Box::new(rule)),
            seen: Mutex::default(),
            is_over: AtomicBool::new(false),
        });
        let serving = Arc::clone(&inner);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if serving.is_over.load(Ordering::SeqCst) {
                    break;
                }
                let inner = Arc::clone(&serving);
                // A broken connection is what this is for.
                thread::spawn(move || drop(inner.relay(client)));
            }
        });
        Self { port, inner }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on nothing goes wrong, and what was seen is forgotten.
    pub(crate) fn heal(&self) {
        *self.inner.rule.lock().unwrap() = Box::new(|_, _| Fault::None);
        self.inner.seen.lock().unwrap().clear();
    }

    /// The exchanges whose method and path start so, in order.
    pub(crate) fn seen(&self, start: &str) -> Vec<Seen> {
        let seen = self.inner.seen.lock().unwrap();
        let matching = seen.iter().filter(|seen| seen.line.starts_with(start));
        matching.cloned().collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.inner.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Inner {
    fn relay(&self, mut client: TcpStream) -> io::Result<()> {
        let mut from_client = BufReader::new(client.try_clone()?);
        let head = read_head(&mut from_client)?;
        let line = head.lines().next().unwrap_or_default();
        let line = line.trim_end_matches(" HTTP/1.1").to_owned();
        let (number, fault) = self.note(&line);
        let mut agent = TcpStream::connect(("127.0.0.1", self.agent))?;
        let (first, rest) = head.split_once("\r\n").unwrap();
        agent.write_all(format!("{first}\r\nconnection: close\r\n{rest}").as_bytes())?;

        let length = header(&head, "content-length").map_or(0, |length| length.parse().unwrap());
        let passed = match fault {
            Fault::CutUp(limit) => length.min(limit),
            _ => length,
        };
        let mut body = vec![0; passed];
        from_client.read_exact(&mut body)?;
        agent.write_all(&body)?;
        self.seen.lock().unwrap()[number].body = passed;
        if passed < length {
            return Ok(());
        }
        answer(BufReader::new(agent), &mut client, fault)
    }

    fn note(&self, line: &str) -> (usize, Fault) {
        let method = &line[..=line.find(' ').unwrap()];
        let mut seen = self.seen.lock().unwrap();
        let before = seen.iter().filter(|seen| seen.line.starts_with(method));
        let fault = (self.rule.lock().unwrap())(line, before.count());
        seen.push(Seen {
            line: line.to_owned(),
            at: Instant::now(),
            body: 0,
        });
        (seen.len() - 1, fault)
    }
}

fn answer(mut agent: BufReader<TcpStream>, client: &mut TcpStream, fault: Fault) -> io::Result<()> {
    if fault == Fault::HoldAll {
        return hold(&mut agent, client);
    }
    let head = read_head(&mut agent)?;
    client.write_all(head.as_bytes())?;
    if header(&head, "transfer-encoding") != Some("chunked") {
        return io::copy(&mut agent, client).map(drop);
    }
    let mut passed = 0;
    while let Some(chunk) = read_chunk(&mut agent)? {
        match fault {
            Fault::HoldBody => {
                client.write_all(&[chunk, read_all(&mut agent)?].concat())?;
                break;
            }
            Fault::CutDown(limit) if passed == limit => {
                return client.write_all(&chunk[..chunk.len() / 2]);
            }
            Fault::EndDown(limit) if passed == limit => return client.write_all(b"0\r\n\r\n"),
            _ => client.write_all(&chunk)?,
        }
        passed += 1;
    }
    Ok(())
}

fn hold(agent: &mut BufReader<TcpStream>, client: &mut TcpStream) -> io::Result<()> {
    client.write_all(&read_all(agent)?)
}

fn read_all(from: &mut BufReader<TcpStream>) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    from.read_to_end(&mut all)?;
    Ok(all)
}

fn read_head(from: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if from.read_line(&mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(head)
}

/// The value of a header that is sent in lower case, as hyper does.
fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    let start = format!("{name}: ");
    head.lines().find_map(|line| line.strip_prefix(&start))
}

/// One chunk as it is on the wire, the last and empty one too; `None` after that.
fn read_chunk(from: &mut BufReader<TcpStream>) -> io::Result<Option<Vec<u8>>> {
    let mut chunk = Vec::new();
    if from.read_until(b'\n', &mut chunk)? == 0 {
        return Ok(None);
    }
    let size = std::str::from_utf8(&chunk).unwrap().trim_end();
    let size = usize::from_str_radix(size, 16).unwrap();
    let start = chunk.len();
    chunk.resize(start + size + 2, 0);
    from.read_exact(&mut chunk[start..])?;
    Ok(Some(chunk))
}

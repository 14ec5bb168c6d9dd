//! Twenty real pushes under load: no request fails, and after `live` nobody is answered by an older version.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use crate::harness::{Agent, Laptop, Project};

const SWAPS: u64 = 20;
const REQUESTS: u64 = 20_000;

/// What the load found.
#[derive(Default)]
struct Tally {
    done: AtomicBool,
    requests: AtomicU64,
    failed: AtomicU64,
    stale: AtomicU64,
    /// The version that the last `live` named.
    live: AtomicU64,
}

impl Tally {
    /// Sends one request and judges the answer.
    fn ask(&self, stream: &mut TcpStream, keep_alive: bool) -> bool {
        let expected = self.live.load(Ordering::SeqCst);
        let answer = exchange(stream, keep_alive);
        self.requests.fetch_add(1, Ordering::Relaxed);
        match answer {
            Some(version) if version < expected => self.stale.fetch_add(1, Ordering::Relaxed),
            Some(_) => return true,
            None => self.failed.fetch_add(1, Ordering::Relaxed),
        };
        false
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::Relaxed)
    }
}

fn exchange(stream: &mut TcpStream, keep_alive: bool) -> Option<u64> {
    let connection = if keep_alive {
        ""
    } else {
        "connection: close\r\n"
    };
    let request = format!("GET / HTTP/1.1\r\nhost: x\r\n{connection}\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut reader = BufReader::new(stream);
    let mut status = String::new();
    reader.read_line(&mut status).ok()?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if line == "\r\n" {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body = String::from_utf8(body).ok()?;
    if status.starts_with("HTTP/1.1 200") {
        body.parse().ok()
    } else {
        None
    }
}

fn load(tally: &Arc<Tally>, port: u16, keep_alive: bool) -> thread::JoinHandle<()> {
    let tally = Arc::clone(tally);
    thread::spawn(move || {
        let connect = || TcpStream::connect(("127.0.0.1", port)).expect("the agent always accepts");
        let mut stream = connect();
        while !tally.is_done() {
            let good = tally.ask(&mut stream, keep_alive);
            if !keep_alive || !good {
                stream = connect();
            }
        }
    })
}

#[test]
fn twenty_swaps_under_load_lose_nothing_and_serve_nothing_old() {
    let laptop = Laptop::new();
    let agent = Agent::new(&[&laptop]);
    let project = Project::new();
    project.answer("0");
    laptop.push_live(&project, &agent);
    let tally = Arc::new(Tally::default());
    let workers: Vec<_> = (0..4)
        .map(|worker| load(&tally, agent.port, worker % 2 == 0))
        .collect();
    for version in 1..=SWAPS {
        project.answer(&version.to_string());
        laptop.push_live(&project, &agent);
        tally.live.store(version, Ordering::SeqCst);
    }
    crate::harness::wait_for("enough requests", || {
        tally.requests.load(Ordering::Relaxed) >= REQUESTS
    });
    tally.done.store(true, Ordering::Relaxed);
    workers
        .into_iter()
        .for_each(|worker| worker.join().unwrap());
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!("{} requests over {SWAPS} swaps", count(&tally.requests));
    assert_eq!((count(&tally.failed), count(&tally.stale)), (0, 0));
}

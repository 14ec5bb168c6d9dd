//! Apps that go away under a request: it is sent again if nothing of it was sent, and never if something was.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Request,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::harness::{Bare, PATIENCE, Stand, eventually, is_alive, read_head};

/// The test itself is the app and the client: so it is known what happens between two looks at the sockets.
struct Both {
    _bare: Bare,
    listener: TcpListener,
    client: TcpStream,
}

impl Both {
    async fn new() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let bare = Bare::before(listener.local_addr().unwrap()).await;
        let client = TcpStream::connect(bare.address).await.unwrap();
        Self {
            _bare: bare,
            listener,
            client,
        }
    }

    async fn ask(&mut self, path: &str) {
        let request = format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody");
        self.client.write_all(request.as_bytes()).await.unwrap();
    }

    async fn accepted(&self) -> TcpStream {
        let accepted = tokio::time::timeout(PATIENCE, self.listener.accept());
        accepted.await.expect("hangs").unwrap().0
    }

    /// Status line and body of the answer.
    async fn answer(&mut self) -> (String, String) {
        let head = tokio::time::timeout(PATIENCE, read_head(&mut self.client));
        let head = head.await.expect("hangs").to_lowercase();
        let length = head.split("content-length: ").nth(1).expect("a length");
        let mut body = vec![0; length.split("\r\n").next().unwrap().parse().unwrap()];
        self.client.read_exact(&mut body).await.unwrap();
        let status = head.lines().next().unwrap().to_owned();
        (status, String::from_utf8(body).unwrap())
    }

    /// A connection to the app that has carried a request and is kept.
    async fn pooled(&mut self) -> TcpStream {
        self.ask("/first").await;
        let mut app = self.accepted().await;
        assert_eq!(request(&mut app).await, "/first body");
        respond(&mut app, "first").await;
        assert_eq!(self.answer().await.1, "first");
        app
    }
}

/// Path and body of a request as the app reads it.
async fn request(app: &mut TcpStream) -> String {
    let head = tokio::time::timeout(PATIENCE, read_head(app))
        .await
        .expect("hangs");
    let mut body = [0; 4];
    app.read_exact(&mut body).await.unwrap();
    let path = head.split(' ').nth(1).unwrap();
    format!("{path} {}", str::from_utf8(&body).unwrap())
}

async fn respond(app: &mut TcpStream, body: &str) {
    let length = body.len();
    let response = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
    app.write_all(response.as_bytes()).await.unwrap();
}

#[tokio::test]
async fn a_request_given_to_a_connection_that_the_app_just_closed_is_sent_again_whole() {
    let mut both = Both::new().await;
    for number in 0..20 {
        let app = both.pooled().await;
        // Nothing else runs between these two: the front sees the request first, and the end when it turns to the app.
        both.ask(&format!("/{number}")).await;
        drop(app);
        let mut app = both.accepted().await;
        assert_eq!(request(&mut app).await, format!("/{number} body"));
        respond(&mut app, "again").await;
        assert_eq!(
            both.answer().await,
            ("http/1.1 200 ok".into(), "again".into())
        );
    }
}

#[tokio::test]
async fn a_request_that_was_sent_is_not_sent_again_when_the_app_dies_without_an_answer() {
    for reused in [false, true] {
        let mut both = Both::new().await;
        let mut app = if reused {
            let app = both.pooled().await;
            both.ask("/lost").await;
            app
        } else {
            both.ask("/lost").await;
            both.accepted().await
        };
        assert_eq!(request(&mut app).await, "/lost body");
        drop(app);
        let (status, why) = both.answer().await;
        assert_eq!(status, "http/1.1 502 bad gateway");
        assert!(why.starts_with("rrun: the app did not answer"), "{why}");
        // The app has got nothing else until now.
        both.ask("/next").await;
        let mut app = both.accepted().await;
        assert_eq!(request(&mut app).await, "/next body");
        respond(&mut app, "next").await;
        assert_eq!(both.answer().await.1, "next");
    }
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    async fn connect(stand: std::net::SocketAddr, http2: bool) -> Self {
        let io = TokioIo::new(TcpStream::connect(stand).await.unwrap());
        if http2 {
            let executor = TokioExecutor::new();
            let (sender, connection) = http2::handshake(executor, io).await.unwrap();
            tokio::spawn(connection);
            Self::Http2(sender)
        } else {
            let (sender, connection) = http1::handshake(io).await.unwrap();
            tokio::spawn(connection);
            Self::Http1(sender)
        }
    }

    async fn record(&mut self, number: u64) -> (u16, String) {
        let request = Request::post(format!("http://a/record/{number}"));
        let request = request.body(Full::from("body")).unwrap();
        let response = async {
            match self {
                Self::Http1(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await
                }
                Self::Http2(sender) => sender.send_request(request).await,
            }
        };
        let response = tokio::time::timeout(PATIENCE, response).await;
        let response = response.expect("hangs").unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }
}

/// How often the app answered each number.
fn recorded(stand: &Stand) -> BTreeMap<u64, usize> {
    let record = std::fs::read_to_string(stand.file("record")).unwrap();
    let mut counts = BTreeMap::new();
    for line in record.lines() {
        *counts.entry(line.parse().unwrap()).or_default() += 1;
    }
    counts
}

async fn kill(stand: &Stand) {
    let process = stand.service.status().process.unwrap();
    let pid = Pid::from_raw(process.try_into().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    // A thread that has not ended yet keeps the sockets open.
    let threads = format!("/proc/{process}/task");
    let threads = || std::fs::read_dir(&threads).map_or(0, Iterator::count);
    eventually(|| !is_alive(process) && threads() <= 1).await;
}

/// What the clients of a load have in common.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    next: AtomicU64,
    answered: AtomicU64,
}

/// Asks until it is stopped; returns the numbers that were answered.
async fn ask(load: Arc<Load>, mut sender: Sender) -> Vec<u64> {
    let mut answered = Vec::new();
    while !load.stop.load(Ordering::SeqCst) {
        let number = load.next.fetch_add(1, Ordering::SeqCst);
        match sender.record(number).await {
            (200, body) => {
                assert_eq!(body, number.to_string());
                answered.push(number);
                load.answered.fetch_add(1, Ordering::SeqCst);
            }
            (status, why) => {
                // What had been sent is lost, and what a busy machine kept waiting for too long.
                assert!(status == 502 || status == 503, "{status} {why}");
            }
        }
    }
    answered
}

async fn killed_under_load(http2: bool) {
    let mut stand = Stand::new().await;
    stand
        .push(1, if http2 { &["http2"] } else { &[] })
        .await
        .unwrap();
    let load = Arc::new(Load::default());
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let sender = Sender::connect(stand.address, http2).await;
        clients.spawn(ask(Arc::clone(&load), sender));
    }
    for round in 1..=4 {
        let enough = round * 300;
        eventually(|| load.answered.load(Ordering::SeqCst) >= enough).await;
        kill(&stand).await;
    }
    eventually(|| load.answered.load(Ordering::SeqCst) >= 1500).await;
    load.stop.store(true, Ordering::SeqCst);
    let answered = clients.join_all().await.concat();
    let recorded = recorded(&stand);
    assert!(
        recorded.values().all(|count| *count == 1),
        "the app answered something twice"
    );
    assert!(answered.iter().all(|number| recorded.contains_key(number)));
    assert!(answered.len() >= 1500);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_is_killed_under_load_answers_nothing_twice_and_what_was_not_sent_is_not_lost()
{
    killed_under_load(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_of_http2_that_is_killed_under_load_answers_nothing_twice_and_what_was_not_sent_is_not_lost()
 {
    killed_under_load(true).await;
}

#[tokio::test]
async fn connections_of_a_killed_process_cost_no_request() {
    for http2 in [false, true] {
        let mut stand = Stand::new().await;
        stand
            .push(1, if http2 { &["http2"] } else { &[] })
            .await
            .unwrap();
        let mut senders = Vec::new();
        for number in 0..8 {
            let mut sender = Sender::connect(stand.address, http2).await;
            assert_eq!(sender.record(number).await.0, 200);
            senders.push(sender);
        }
        kill(&stand).await;
        // Until the agent has noticed, a request can be written into a connection whose other end is gone.
        eventually(|| stand.service.status().restarts > 0).await;
        for (sender, number) in senders.iter_mut().zip(8..) {
            assert_eq!(sender.record(number).await, (200, number.to_string()));
        }
        assert_eq!(
            recorded(&stand),
            (0..16).map(|number| (number, 1)).collect()
        );
    }
}

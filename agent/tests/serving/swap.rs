//! What a swap promises to who sends requests.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use rrun_agent::service::ReplaceError;
use rrun_protocol::SwapMode;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::harness::{Client, PATIENCE, Stand, eventually, is_alive};

/// Clients that never stop asking for the generation, and check each answer.
struct Load {
    clients: JoinSet<()>,
    stop: Arc<AtomicBool>,
    reported: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
}

impl Load {
    fn start(stand: &Stand, keep_alive: usize, new_connections: usize) -> Self {
        let mut load = Self {
            clients: JoinSet::new(),
            stop: Arc::default(),
            reported: Arc::default(),
            answered: Arc::default(),
        };
        for number in 0..keep_alive + new_connections {
            let (stop, reported, answered) = (
                Arc::clone(&load.stop),
                Arc::clone(&load.reported),
                Arc::clone(&load.answered),
            );
            let address = stand.address;
            load.clients.spawn(async move {
                let mut client = Client::connect(address).await;
                while !stop.load(Ordering::SeqCst) {
                    if number >= keep_alive {
                        client = Client::connect(address).await;
                    }
                    let at_least = reported.load(Ordering::SeqCst);
                    let (status, body) = client.get("/").await;
                    assert_eq!(status, 200, "{body}");
                    let generation: u64 = body.parse().unwrap();
                    assert!(
                        generation >= at_least,
                        "{generation} answered after {at_least} was live"
                    );
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        load
    }

    fn report(&self, generation: u64) {
        self.reported.store(generation, Ordering::SeqCst);
    }

    async fn reached(&self, count: u64) {
        eventually(|| self.answered.load(Ordering::SeqCst) >= count).await;
    }

    async fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
        self.answered.load(Ordering::SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_hot_swaps_under_load_fail_no_request_and_never_answer_from_an_older_generation() {
    let mut stand = Stand::new().await;
    stand.push(1, &[]).await.unwrap();
    let load = Load::start(&stand, 4, 4);
    for generation in 2..=21 {
        load.reached((generation - 1) * 1000).await;
        stand.push(generation, &[]).await.unwrap();
        load.report(generation);
    }
    load.reached(21_000).await;
    let answered = load.stop().await;
    assert!(answered >= 20_000, "{answered}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_holds_requests_and_never_runs_two_at_once() {
    let mut stand = Stand::new().await;
    let only = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let port = only.port().to_string();
    stand.push_restart(1, &["alone", &port]).await.unwrap();
    let load = Load::start(&stand, 4, 2);
    for generation in 2..=6 {
        load.reached((generation - 1) * 200).await;
        stand
            .push_restart(generation, &["alone", &port])
            .await
            .unwrap();
        load.report(generation);
    }
    load.reached(1200).await;
    load.stop().await;
}

/// Whether a browser asked; status, content type and body of the answer.
type Told = (bool, u16, String, String);

/// Asks so many times at once, every second time as a browser.
fn ask_at_once(address: SocketAddr, times: usize) -> JoinSet<Told> {
    let mut asked = JoinSet::new();
    for number in 0..times {
        asked.spawn(async move {
            let mut client = Client::connect(address).await;
            let browser = number % 2 == 0;
            let accept = if browser {
                "text/html,*/*;q=0.8"
            } else {
                "*/*"
            };
            let request = Request::get("/").header("accept", accept);
            let response = client.send(request.body(Full::default()).unwrap()).await;
            let status = response.status().as_u16();
            let headers = response.headers().get("content-type");
            let kind = headers.map_or("", |kind| kind.to_str().unwrap()).to_owned();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            (browser, status, kind, String::from_utf8_lossy(&body).into())
        });
    }
    asked
}

fn assert_told((browser, status, kind, page): Told, why: &str) {
    assert_eq!(status, 503, "{page}");
    assert!(page.contains(why), "{page}");
    let html = kind.starts_with("text/html") && page.starts_with("<!doctype html>");
    let text = kind.starts_with("text/plain") && page.starts_with("rrun: ");
    assert!(if browser { html } else { text }, "{kind} {page}");
}

/// Restarts into a version that waits for a file; meanwhile `meanwhile` runs, once the old version is gone.
async fn while_restarting(stand: &mut Stand, meanwhile: impl Future<Output = ()>) {
    let go = stand.file("go");
    let mut spec = stand.spec(2, &["after", go.to_str().unwrap()]);
    spec.run.swap = SwapMode::Restart;
    let output = stand.output.clone();
    let meanwhile = async {
        let mut lines = Box::pin(output.follow());
        while lines.next().await.unwrap().generation != 2 {}
        meanwhile.await;
        std::fs::write(&go, "").unwrap();
    };
    tokio::join!(stand.replace(spec), meanwhile).0.unwrap();
}

#[tokio::test]
async fn a_restart_holds_only_so_many_requests_and_tells_the_others_why() {
    let mut stand = Stand::with(|proxy| proxy.with_limits(PATIENCE, 4)).await;
    stand.push_restart(1, &[]).await.unwrap();
    let address = stand.address;
    let mut asked = JoinSet::new();
    while_restarting(&mut stand, async {
        asked = ask_at_once(address, 10);
        for _ in 0..6 {
            let refused = asked.join_next().await.unwrap().unwrap();
            assert_told(
                refused,
                "the app is being replaced, and 4 requests are waiting already",
            );
        }
    })
    .await;
    assert_eq!(asked.len(), 4);
    while let Some(answer) = asked.join_next().await {
        let (_, status, _, body) = answer.unwrap();
        assert_eq!((status, body.as_str()), (200, "2"));
    }
}

#[tokio::test]
async fn a_restart_that_takes_too_long_tells_who_waited() {
    let limit = Duration::from_secs(1);
    let mut stand = Stand::with(|proxy| proxy.with_limits(limit, 100)).await;
    stand.push_restart(1, &[]).await.unwrap();
    let address = stand.address;
    let since = std::time::Instant::now();
    while_restarting(&mut stand, async {
        let mut asked = ask_at_once(address, 6);
        while let Some(refused) = asked.join_next().await {
            assert!(since.elapsed() >= limit);
            assert_told(
                refused.unwrap(),
                "the app is being replaced; the request waited for 1 s",
            );
        }
    })
    .await;
    assert_eq!(stand.get("/").await.1, "2");
}

#[tokio::test]
async fn a_restart_that_fails_starts_the_old_version_again() {
    let mut stand = Stand::new().await;
    stand.push_restart(1, &[]).await.unwrap();
    let error = stand.push_restart(2, &["exit", "3"]).await.unwrap_err();
    assert!(matches!(error, ReplaceError::NotReady { .. }), "{error}");
    assert_eq!(stand.get("/").await.1, "1");
    assert_eq!(stand.service.serving(), Some(1));
}

#[tokio::test]
async fn a_cancelled_version_is_killed_and_the_old_one_serves() {
    for restart in [false, true] {
        let mut stand = Stand::new().await;
        stand.push(1, &[]).await.unwrap();
        let cancel = CancellationToken::new();
        let mut spec = stand.spec(2, &["never"]);
        if restart {
            spec.run.swap = SwapMode::Restart;
        }
        let output = stand.output.clone();
        let outcome = {
            let replace = stand.service.replace(spec, &cancel);
            let cancelled = async {
                let mut lines = Box::pin(output.follow());
                while lines.next().await.unwrap().generation != 2 {}
                cancel.cancel();
            };
            tokio::join!(replace, cancelled).0
        };
        assert!(matches!(outcome, Err(ReplaceError::Cancelled)));
        assert_eq!(stand.get("/").await.1, "1");
    }
}

#[tokio::test]
async fn a_replacement_that_is_dropped_kills_the_new_version_and_leaves_the_old_one() {
    for swap in [SwapMode::Hot, SwapMode::Restart] {
        let mut stand = Stand::new().await;
        stand.push(1, &[]).await.unwrap();
        let mut spec = stand.spec(2, &["family"]);
        spec.run.ready_path = Some("/broken".into());
        spec.run.swap = swap;
        let output = stand.output.clone();
        let started = output.follow().filter_map(|line| {
            let process = line
                .text
                .strip_prefix("stubborn ")
                .map(|number| number.parse::<u32>().unwrap());
            std::future::ready(process)
        });
        let never = CancellationToken::new();
        let left_behind = tokio::select! {
            outcome = stand.service.replace(spec, &never) => panic!("{outcome:?}"),
            left_behind = started.take(2).collect::<Vec<_>>() => left_behind,
        };
        assert_eq!(stand.get("/").await.1, "1");
        eventually(|| left_behind.iter().all(|process| !is_alive(*process))).await;
    }
}

#[tokio::test]
async fn a_response_under_way_arrives_whole_after_a_swap() {
    let mut stand = Stand::new().await;
    stand.push(1, &[]).await.unwrap();
    let mut client = Client::connect(stand.address).await;
    let request = Request::get("/big").body(Full::default()).unwrap();
    let mut body = client.send(request).await.into_body();
    let first = body
        .frame()
        .await
        .unwrap()
        .unwrap()
        .into_data()
        .unwrap()
        .len();
    stand.push(2, &[]).await.unwrap();
    assert_eq!(stand.get("/").await.1, "2");
    let rest = tokio::time::timeout(PATIENCE, body.collect())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(first + rest.to_bytes().len(), 50_000_000);
}

#[tokio::test]
async fn a_websocket_and_an_event_stream_live_on_in_the_old_generation() {
    let mut stand = Stand::new().await;
    let mut spec = stand.spec(1, &[]);
    spec.run.drain_limit = Duration::ZERO;
    stand.replace(spec).await.unwrap();
    let process = stand.service.status().process.unwrap();
    let url = format!("ws://{}/socket", stand.address);
    let (mut socket, _) = tokio_tungstenite::connect_async(url).await.unwrap();
    socket.send("before".into()).await.unwrap();
    assert_eq!(
        socket.next().await.unwrap().unwrap().to_text().unwrap(),
        "1 before"
    );
    let mut client = Client::connect(stand.address).await;
    let request = Request::get("/events").body(Full::default()).unwrap();
    let mut events = client.send(request).await.into_body();
    let _ = events.frame().await.unwrap().unwrap();

    stand.push(2, &[]).await.unwrap();
    assert_eq!(stand.get("/").await.1, "2");
    for _ in 0..20 {
        let event = events.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(event.starts_with(b"data: 1\n\n"));
    }
    socket.send("after".into()).await.unwrap();
    assert_eq!(
        socket.next().await.unwrap().unwrap().to_text().unwrap(),
        "1 after"
    );
    assert!(is_alive(process));
    drop(events);
    drop(client);
    socket.close(None).await.unwrap();
    drop(socket);
    eventually(|| !is_alive(process)).await;
}

#[tokio::test]
async fn what_exceeds_the_drain_limits_is_cut() {
    let mut stand = Stand::new().await;
    let mut spec = stand.spec(1, &["stubborn"]);
    spec.run.drain_limit = Duration::from_millis(200);
    spec.run.stream_drain_limit = Duration::from_millis(400);
    stand.replace(spec).await.unwrap();
    let process = stand.service.status().process.unwrap();
    let hanging = {
        let mut client = Client::connect(stand.address).await;
        let request = Request::get("/after/nothing")
            .body(Full::default())
            .unwrap();
        tokio::spawn(async move { client.send(request).await.status() })
    };
    stand.printed(1, "waiting").await;
    let mut client = Client::connect(stand.address).await;
    let request = Request::get("/events").body(Full::default()).unwrap();
    let events = client.send(request).await.into_body();
    let url = format!("ws://{}/socket", stand.address);
    let (mut socket, _) = tokio_tungstenite::connect_async(url).await.unwrap();
    socket.send("before".into()).await.unwrap();
    socket.next().await.unwrap().unwrap();

    stand.push(2, &[]).await.unwrap();
    assert_eq!(hanging.await.unwrap(), 503);
    let ended = tokio::time::timeout(PATIENCE, socket.next()).await;
    assert!(!matches!(ended.expect("hangs"), Some(Ok(_))));
    let cut = tokio::time::timeout(PATIENCE, events.collect())
        .await
        .unwrap();
    assert!(
        cut.is_err(),
        "a stream that was cut must not look like one that ended"
    );
    // Cut by the limit: the app itself ignores SIGTERM and still runs.
    assert!(is_alive(process));
}

#[tokio::test]
async fn handing_over_leaves_no_process_and_can_be_taken_back() {
    let mut stand = Stand::new().await;
    stand.push(1, &[]).await.unwrap();
    let old = stand.service.status().process.unwrap();
    let spec = stand.spec(2, &[]);
    stand
        .service
        .hand_over(&spec, &CancellationToken::new())
        .await
        .unwrap();
    assert!(!is_alive(old));
    assert_eq!(stand.service.status().process, None);
    stand.service.take_back();
    assert_eq!(stand.get("/").await.1, "1");
}

#[tokio::test]
async fn handing_over_what_is_not_ready_changes_nothing() {
    let mut stand = Stand::new().await;
    stand.push(1, &[]).await.unwrap();
    let spec = stand.spec(2, &["panic"]);
    let outcome = stand
        .service
        .hand_over(&spec, &CancellationToken::new())
        .await;
    assert!(matches!(outcome, Err(ReplaceError::NotReady { .. })));
    assert_eq!(stand.get("/").await.1, "1");
}

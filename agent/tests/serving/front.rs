//! The public socket: who gets a place, who loses it, and how it is closed.

use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::Request;
use rrun_agent::front::Limits;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::harness::{Bare, Client, PATIENCE, Stand, rest};

/// Start of an HTTP/2 connection: the preface and an empty SETTINGS frame.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

async fn serving() -> Stand {
    let mut stand = Stand::new().await;
    stand.push(1, &[]).await.unwrap();
    stand
}

async fn patiently(limits: Limits) -> (Stand, Bare) {
    let stand = serving().await;
    let bare = Bare::within(limits, stand.address).await;
    (stand, bare)
}

fn soon_idle() -> Limits {
    Limits {
        idle: Duration::from_millis(150),
        ..Limits::default()
    }
}

#[tokio::test]
async fn a_connection_that_never_completes_a_head_is_given_up() {
    let (_stand, bare) = patiently(soon_idle()).await;
    let heads = [
        &b""[..],
        b"G",
        b"PRI * HTTP/2.0\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHo",
        HTTP2_PREFACE,
    ];
    for head in heads {
        let mut stream = TcpStream::connect(bare.address).await.unwrap();
        stream.write_all(head).await.unwrap();
        let answer = rest(&mut stream).await;
        let answers = answer.matches("HTTP/1.1 200").count();
        let requests = String::from_utf8_lossy(head).matches("\r\n\r\nGET").count();
        assert_eq!(answers, requests, "{answer}");
    }
}

#[tokio::test]
async fn a_request_under_way_is_not_given_up_however_long_it_takes() {
    let (stand, bare) = patiently(soon_idle()).await;
    let file = stand.file("go");
    let path = format!("/after{}", file.display());
    let address = bare.address;
    let asked = tokio::spawn(async move { Client::connect(address).await.get(&path).await });
    stand.printed(1, "waiting").await;
    let mut client = Client::connect(bare.address).await;
    let request = Request::get("/events").body(Full::default()).unwrap();
    let mut events = client.send(request).await.into_body();
    for _ in 0..10 {
        // Is given up after the limit; all of them together take longer than an idle connection's orderly end.
        let mut silent = TcpStream::connect(bare.address).await.unwrap();
        rest(&mut silent).await;
    }
    for _ in 0..600 {
        // More than were sent meanwhile.
        events.frame().await.unwrap().unwrap();
    }
    std::fs::write(file, "").unwrap();
    assert_eq!(asked.await.unwrap(), (hyper::StatusCode::OK, "1".into()));
}

#[tokio::test]
async fn who_finds_no_place_waits_until_there_is_one() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let (_stand, bare) = patiently(limits).await;
    let address = bare.address;
    let mut first = Client::connect(address).await;
    let mut second = Client::connect(address).await;
    first.get("/").await;
    second.get("/").await;
    let third = tokio::spawn(async move { Client::connect(address).await.get("/").await });
    for _ in 0..20 {
        assert_eq!(first.get("/").await.0, 200);
        assert_eq!(second.get("/").await.0, 200);
    }
    assert!(!third.is_finished());
    drop(first);
    assert_eq!(third.await.unwrap().0, 200);
}

#[tokio::test]
async fn shutting_down_closes_what_is_idle_and_finishes_what_is_under_way() {
    let (stand, bare) = patiently(Limits::default()).await;
    let file = stand.file("go");
    let path = format!("/after{}", file.display());
    let address = bare.address;
    let asked = tokio::spawn(async move { Client::connect(address).await.get(&path).await });
    stand.printed(1, "waiting").await;
    let mut idle = TcpStream::connect(address).await.unwrap();
    idle.write_all(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    crate::harness::read_head(&mut idle).await;
    let mut silent = TcpStream::connect(address).await.unwrap();
    // Somebody who came later has been served: so the silent one was accepted.
    Client::connect(address).await.get("/").await;

    bare.shutdown.cancel();
    assert_eq!(rest(&mut idle).await, "");
    assert_eq!(rest(&mut silent).await, "");
    assert!(TcpStream::connect(address).await.is_err());
    assert!(!bare.served.is_finished());
    std::fs::write(file, "").unwrap();
    assert_eq!(asked.await.unwrap(), (hyper::StatusCode::OK, "1".into()));
    let served = tokio::time::timeout(PATIENCE, bare.served);
    served.await.expect("hangs").unwrap().unwrap();
}

#[tokio::test]
async fn an_endless_response_holds_shutting_down_up_only_as_long_as_the_caller_likes() {
    let (_stand, bare) = patiently(Limits::default()).await;
    let mut client = Client::connect(bare.address).await;
    let request = Request::get("/events").body(Full::default()).unwrap();
    let mut events = client.send(request).await.into_body();
    bare.shutdown.cancel();
    for _ in 0..20 {
        events.frame().await.unwrap().unwrap();
    }
    assert!(!bare.served.is_finished());
    drop(bare);
    let cut = tokio::time::timeout(PATIENCE, events.collect()).await;
    assert!(cut.expect("hangs").is_err());
}

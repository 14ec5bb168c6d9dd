//! Answers before the answer (1xx), and answers before the request is complete.

use hyper::StatusCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{Bare, Client, PATIENCE, Stand, app, read_head, rest};

async fn serving() -> Stand {
    let mut stand = Stand::new().await;
    stand.push(1, &[]).await.unwrap();
    stand
}

/// A request that waits for 100 before it sends its body of three bytes.
fn expecting(path: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
}

#[tokio::test]
async fn a_client_that_waits_for_100_gets_it_and_its_body_arrives() {
    let stand = serving().await;
    let mut stream = TcpStream::connect(stand.address).await.unwrap();
    for _ in 0..3 {
        stream
            .write_all(expecting("/count").as_bytes())
            .await
            .unwrap();
        assert_eq!(
            read_head(&mut stream).await,
            "HTTP/1.1 100 Continue\r\n\r\n"
        );
        stream.write_all(b"abc").await.unwrap();
        let head = read_head(&mut stream).await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert_eq!(stream.read_u8().await.unwrap(), b'3');
    }
}

#[tokio::test]
async fn a_client_that_waits_for_100_and_is_refused_gets_the_refusal() {
    let stand = serving().await;
    for _ in 0..50 {
        let mut stream = TcpStream::connect(stand.address).await.unwrap();
        stream
            .write_all(expecting("/refuse").as_bytes())
            .await
            .unwrap();
        let mut answer = read_head(&mut stream).await;
        if answer == "HTTP/1.1 100 Continue\r\n\r\n" {
            answer = read_head(&mut stream).await;
        }
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    }
    assert_eq!(stand.get("/").await, (StatusCode::OK, "1".into()));
}

/// Sends a body and another request, whatever comes back meanwhile, and returns what came back.
async fn upload(stand: &Stand, path: &str, length: usize) -> String {
    let stream = TcpStream::connect(stand.address).await.unwrap();
    let (mut from, mut to) = stream.into_split();
    let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
    let sent = async {
        to.write_all(head.as_bytes()).await?;
        to.write_all(&vec![b'x'; length]).await?;
        to.write_all(b"GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            .await
    };
    let mut answers = Vec::new();
    let received = async {
        let read = from.read_to_end(&mut answers);
        let _ = tokio::time::timeout(PATIENCE, read).await.expect("hangs");
    };
    // What is not read any more cannot be sent either.
    let _ = tokio::join!(sent, received).0.is_ok();
    String::from_utf8_lossy(&answers).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_refuses_a_body_early_is_heard_and_no_byte_of_the_body_becomes_a_request() {
    let stand = serving().await;
    for length in [1, 1 << 10, 1 << 16, 1 << 20, 20 << 20] {
        for _ in 0..40 {
            let answers = upload(&stand, "/refuse", length).await;
            let rest = answers.strip_prefix("HTTP/1.1 413 Payload Too Large\r\n");
            let rest = rest.unwrap_or_else(|| panic!("{length}: {answers}"));
            let (_, rest) = rest.split_once("too long").unwrap();
            assert!(
                rest.is_empty() || rest.ends_with("app GET /next"),
                "{length}: {answers}"
            );
        }
    }
    assert_eq!(stand.get("/").await, (StatusCode::OK, "1".into()));
}

#[tokio::test]
async fn informational_responses_of_the_app_are_swallowed() {
    const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n\
        HTTP/1.1 102 Processing\r\n\r\n\
        HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n\
        HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\n\
        HTTP/1.1 199 Whatever\r\n\r\n";
    let hinting = app(|mut stream| async move {
        while !read_head(&mut stream).await.is_empty() {
            for byte in INTERIM {
                stream.write_all(&[*byte]).await.unwrap();
            }
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody")
                .await
                .unwrap();
        }
    })
    .await;
    let bare = Bare::before(hinting).await;
    let mut client = Client::connect(bare.address).await;
    for _ in 0..3 {
        assert_eq!(client.get("/").await, (StatusCode::OK, "body".into()));
    }
}

#[tokio::test]
async fn an_app_that_switches_protocols_unasked_is_a_502() {
    let switching = app(|mut stream| async move {
        read_head(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
            .await
            .unwrap();
        rest(&mut stream).await;
    })
    .await;
    let bare = Bare::before(switching).await;
    let mut client = Client::connect(bare.address).await;
    let (status, why) = client.get("/").await;
    assert_eq!(status, 502, "{why}");
}

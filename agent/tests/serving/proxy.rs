//! What passes through the proxy, what does not, and what it says by itself.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::{
    HeaderMap, Request, Version,
    body::Frame,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rrun_agent::{proxy::Route, upstream::Upstream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::harness::{Bare, Client, PATIENCE, Stand, app, eventually, read_head};

async fn serving() -> Stand {
    let mut stand = Stand::new().await;
    stand.push(1, &[]).await.unwrap();
    stand
}

#[tokio::test]
async fn before_the_first_push_a_page_says_so() {
    let stand = Stand::new().await;
    let plain = stand
        .raw(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    assert!(plain.starts_with("HTTP/1.1 503 "), "{plain}");
    assert!(plain.contains("text/plain"));
    assert!(plain.contains("no version has been pushed yet"));
    let html = stand
        .raw(b"GET / HTTP/1.1\r\nHost: a\r\nAccept: text/html,*/*;q=0.8\r\nConnection: close\r\n\r\n")
        .await;
    assert!(html.contains("text/html"), "{html}");
    assert!(html.contains("<!doctype html>"));
    assert!(html.contains("no version has been pushed yet"));
}

#[tokio::test]
async fn a_held_request_is_told_why_when_its_time_is_over() {
    let mut stand = Stand::with(|proxy| proxy.with_limits(Duration::from_millis(300), 9)).await;
    let flag = stand.file("flag");
    let flag = flag.to_str().unwrap();
    // Starts once, and never again.
    let mut spec = stand.spec(
        1,
        &[
            "-c",
            &format!("test -e {flag} && exit 5; : > {flag}; exec $APP"),
        ],
    );
    spec.run
        .environment
        .insert("APP".into(), spec.executable.display().to_string());
    spec.executable = "/bin/sh".into();
    stand.replace(spec).await.unwrap();
    stand.get("/crash").await;
    eventually(|| stand.service.status().state == "restarting").await;
    let (status, why) = stand.get("/").await;
    assert_eq!(status, 503, "{why}");
    assert!(why.contains("the app"), "{why}");
    assert!(why.contains("the request waited for 0 s"), "{why}");
}

#[tokio::test]
async fn only_so_many_requests_are_held() {
    let mut stand = Stand::with(|proxy| proxy.with_limits(PATIENCE, 1)).await;
    stand.push(1, &[]).await.unwrap();
    let spec = stand.spec(2, &[]);
    let never = CancellationToken::new();
    stand.service.hand_over(&spec, &never).await.unwrap();
    let address = stand.address;
    let mut asked = JoinSet::new();
    for _ in 0..3 {
        asked.spawn(async move { Client::connect(address).await.get("/").await });
    }
    for _ in 0..2 {
        let (status, why) = asked.join_next().await.unwrap().unwrap();
        assert_eq!(status, 503);
        assert!(why.contains("1 requests are waiting already"), "{why}");
    }
    stand.service.take_back();
    assert_eq!(asked.join_next().await.unwrap().unwrap().0, 200);
}

#[tokio::test]
async fn only_the_raw_control_prefix_leads_to_the_control_routes() {
    let stand = serving().await;
    let to_control = [
        "/_rrun/",
        "/_rrun/status?x=1",
        "/_rrun/../x",
        "http://elsewhere/_rrun/status",
    ];
    let to_app = [
        "/%5frrun/status",
        "/%5Frrun/status",
        "//_rrun/status",
        "/x/../_rrun/status",
        "/./_rrun/status",
        "/_rrun",
        "/_rrun%2fstatus",
        "/_RRUN/status",
        "/_rrun;/status",
        "/x?/_rrun/",
        "http://_rrun/status",
        "http://a//_rrun/status",
    ];
    for (targets, answerer) in [(&to_control[..], "control"), (&to_app[..], "app GET ")] {
        for target in targets {
            let request = format!("GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
            let answer = stand.raw(request.as_bytes()).await;
            let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
            assert!(body.starts_with(answerer), "{target}: {answer}");
        }
    }
}

#[tokio::test]
async fn a_request_that_could_be_read_in_two_ways_is_refused_or_made_unambiguous() {
    let stand = serving().await;
    let hidden = "GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n";
    let chunked = "0\r\n\r\n";
    let cases = [
        (
            "two lengths",
            format!("Content-Length: 0\r\nContent-Length: {}", hidden.len()),
            "",
        ),
        (
            "a list of lengths",
            format!("Content-Length: 0, {}", hidden.len()),
            "",
        ),
        ("a signed length", "Content-Length: +0".into(), ""),
        (
            "length and chunked",
            format!(
                "Content-Length: {}\r\nTransfer-Encoding: chunked",
                hidden.len() + 5
            ),
            chunked,
        ),
        (
            "chunked and length",
            format!(
                "Transfer-Encoding: chunked\r\nContent-Length: {}",
                hidden.len() + 5
            ),
            chunked,
        ),
        (
            "chunked twice",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked".into(),
            chunked,
        ),
        (
            "chunked twice in one",
            "Transfer-Encoding: chunked, chunked".into(),
            chunked,
        ),
        (
            "chunked and identity",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity".into(),
            chunked,
        ),
        (
            "not quite chunked",
            "Transfer-Encoding: xchunked".into(),
            chunked,
        ),
        (
            "a space before the colon",
            "Transfer-Encoding : chunked".into(),
            chunked,
        ),
        (
            "a folded header",
            "Transfer-Encoding:\r\n chunked".into(),
            chunked,
        ),
    ];
    for (name, headers, body) in cases {
        let request = format!("POST /count HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n{body}{hidden}");
        let answer = stand.raw_until_quiet(request.as_bytes()).await;
        assert!(!answer.contains("/hidden"), "{name}: {answer}");
        let refused = answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.1 501");
        let unambiguous = answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\n0");
        assert!(refused || unambiguous, "{name}: {answer}");
    }
}

#[tokio::test]
async fn headers_pass_as_they_came_except_those_of_the_connection() {
    let stand = serving().await;
    let seen = stand
        .raw(
            b"GET /seen HTTP/1.1\r\nHost: example.org\r\nX-Forwarded-For: 10.1.2.3\r\nX-Forwarded-Proto: https\r\n\
            Authorization: Bearer t\r\nRrun-Signature: secret\r\nX-Hop: 1\r\nKeep-Alive: 3\r\nConnection: close, X-Hop\r\n\r\n",
        )
        .await;
    for passed in [
        "\"host\": \"example.org\"",
        "10.1.2.3",
        "\"x-forwarded-proto\": \"https\"",
        "Bearer t",
    ] {
        assert!(seen.contains(passed), "{passed}: {seen}");
    }
    for removed in ["rrun-signature", "x-hop", "keep-alive", "\"connection\""] {
        assert!(!seen.contains(removed), "{removed}: {seen}");
    }
    assert!(seen.contains("connection: close"), "{seen}");
}

#[tokio::test]
async fn head_expect_and_http10_work() {
    let stand = serving().await;
    let head = stand
        .raw(b"HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    assert!(head.contains("content-length: 1"), "{head}");
    assert!(head.ends_with("\r\n\r\n"), "{head}");
    let expect = stand
        .raw(b"POST /count HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
        .await;
    assert!(
        expect.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK"),
        "{expect}"
    );
    assert!(expect.ends_with("\r\n\r\n3"), "{expect}");
    let old = stand.raw(b"GET / HTTP/1.0\r\n\r\n").await;
    assert!(old.starts_with("HTTP/1.0 200 OK"), "{old}");
    assert!(old.ends_with("\r\n\r\n1"), "{old}");
    let chunked = stand
        .raw(b"GET /count HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        .await;
    assert!(
        chunked.ends_with("\r\n\r\n3"),
        "the body of a GET got lost: {chunked}"
    );
}

#[tokio::test]
async fn chunks_pass_both_ways_and_their_frame_stays_with_who_understands_it() {
    let stand = serving().await;
    let echoed = stand
        .raw(b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n")
        .await;
    assert!(echoed.contains("transfer-encoding: chunked"), "{echoed}");
    let (_, chunks) = echoed.split_once("\r\n\r\n").unwrap();
    assert!(chunks.ends_with("\r\n0\r\n\r\n"), "{chunks}");
    let pieces: String = chunks.lines().skip(1).step_by(2).collect();
    assert_eq!(pieces, "abcdefg");

    let mut old = TcpStream::connect(stand.address).await.unwrap();
    old.write_all(b"GET /big HTTP/1.0\r\n\r\n").await.unwrap();
    let head = read_head(&mut old).await;
    assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
    assert!(!head.contains("transfer-encoding"), "{head}");
    let mut body = Vec::new();
    old.read_to_end(&mut body).await.unwrap();
    assert_eq!(body.len(), 50_000_000);

    let head = stand
        .raw(b"HEAD /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.ends_with("\r\n\r\n"), "{head}");
}

#[tokio::test]
async fn a_client_of_http_1_0_keeps_its_connection_if_it_asks_for_that() {
    let stand = serving().await;
    let answers = stand
        .raw(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /x HTTP/1.0\r\n\r\n")
        .await;
    assert_eq!(answers.matches("HTTP/1.0 200 OK").count(), 2, "{answers}");
    assert!(answers.ends_with("app GET /x"), "{answers}");
}

#[tokio::test]
async fn an_app_that_closes_after_each_answer_does_not_close_its_clients_connections() {
    let answers = [
        &b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbody"[..],
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nbody",
        b"HTTP/1.0 200 OK\r\n\r\nbody",
        b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nbody",
    ];
    for answer in answers {
        let closing = app(move |mut stream| async move {
            read_head(&mut stream).await;
            stream.write_all(answer).await.unwrap();
        })
        .await;
        let bare = Bare::before(closing).await;
        let mut client = Client::connect(bare.address).await;
        for _ in 0..3 {
            let request = Request::get("/").body(Full::default()).unwrap();
            let response = client.send(request).await;
            assert_eq!(response.version(), Version::HTTP_11);
            assert!(!response.headers().contains_key("connection"));
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, "body");
        }
    }
}

#[tokio::test]
async fn an_answer_that_the_app_breaks_off_does_not_look_complete() {
    let answers = [
        &b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbody"[..],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n",
    ];
    for answer in answers {
        let breaking = app(move |mut stream| async move {
            read_head(&mut stream).await;
            stream.write_all(answer).await.unwrap();
        })
        .await;
        let bare = Bare::before(breaking).await;
        let mut client = Client::connect(bare.address).await;
        let request = Request::get("/").body(Full::default()).unwrap();
        let response = client.send(request).await;
        assert_eq!(response.status(), 200);
        assert!(response.into_body().collect().await.is_err());
    }
}

/// A body in two pieces with a trailer.
fn with_trailers() -> StreamBody<
    impl futures_util::Stream<Item = Result<Frame<Bytes>, std::convert::Infallible>> + Unpin,
> {
    let trailers: HeaderMap = [("x-sum".parse().unwrap(), "7".parse().unwrap())]
        .into_iter()
        .collect();
    StreamBody::new(stream::iter([
        Ok(Frame::data(Bytes::from("three"))),
        Ok(Frame::data(Bytes::from(" words here"))),
        Ok(Frame::trailers(trailers)),
    ]))
}

#[tokio::test]
async fn trailers_pass_both_ways_over_http1() {
    let stand = serving().await;
    let stream = TcpStream::connect(stand.address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post("/trailers")
        .header("host", "a")
        .header("te", "trailers")
        .header("trailer", "x-sum")
        .body(with_trailers())
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let body = response.into_body().collect().await.unwrap();
    assert_eq!(body.trailers().unwrap()["x-sum"], "7");
    assert_eq!(body.trailers().unwrap()["x-version"], "HTTP/1.1");
    assert_eq!(body.to_bytes(), "three words here");
}

#[tokio::test]
async fn http2_reaches_the_app_as_http2_with_trailers_and_survives_a_swap() {
    let mut stand = serving().await;
    let stream = TcpStream::connect(stand.address).await.unwrap();
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    for generation in 2..5 {
        let request = Request::post("http://example.org/trailers")
            .header("te", "trailers")
            .body(with_trailers())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.version(), Version::HTTP_2);
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.trailers().unwrap()["x-sum"], "7");
        assert_eq!(body.trailers().unwrap()["x-version"], "HTTP/2.0");
        stand.push(generation, &[]).await.unwrap();
    }
}

#[tokio::test]
async fn a_body_of_50_mb_goes_up_whole() {
    let stand = serving().await;
    let mut client = Client::connect(stand.address).await;
    let body = Full::from(vec![7; 50_000_000]);
    let response = client
        .send(Request::post("/count").body(body).unwrap())
        .await;
    let count = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(count, "50000000");
}

#[tokio::test]
async fn what_the_app_breaks_is_a_502_with_the_reason() {
    let stand = serving().await;
    let (status, why) = stand.get("/crash").await;
    assert_eq!(status, 502);
    assert!(why.starts_with("rrun: the app did not answer"), "{why}");
}

#[tokio::test]
async fn a_request_that_nobody_took_is_sent_again_where_the_route_leads_then() {
    let stand = serving().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = taken.local_addr().unwrap();
    drop(taken);
    let bare = Bare::before(nobody).await;

    let mut client = Client::connect(bare.address).await;
    let body = Full::from("with a body");
    let asked = client.send(Request::post("/count").body(body).unwrap());
    let switched = async {
        // The first try was made once the proxy waits for another route.
        while bare.route.receiver_count() < 2 {
            tokio::task::yield_now().await;
        }
        let there = Upstream::new(2, stand.address);
        bare.route.send_replace(Route::To(there));
    };
    let (response, ()) = tokio::join!(asked, switched);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "11");
}

#[tokio::test]
async fn a_client_that_leaves_is_not_waited_for() {
    let mut stand = serving().await;
    let process = stand.service.status().process.unwrap();
    let mut client = Client::connect(stand.address).await;
    let request = Request::get("/after/nothing")
        .body(Full::default())
        .unwrap();
    let hanging = tokio::spawn(async move { client.send(request).await.status() });
    stand.printed(1, "waiting").await;
    hanging.abort();
    stand.push(2, &[]).await.unwrap();
    let gone = async {
        while crate::harness::is_alive(process) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    // Far below the drain limit.
    tokio::time::timeout(Duration::from_secs(10).min(PATIENCE), gone)
        .await
        .unwrap();
}

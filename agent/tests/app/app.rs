//! The app that the tests run: a small server that behaves, or misbehaves, as its first argument says.
//!
//! `GENERATION` in its environment is what `/` answers. See `serve` for the routes.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::exit,
    clippy::disallowed_methods,
    clippy::zombie_processes,
    reason = "it exists for tests alone, and ends badly on purpose"
)]

mod grpc;
mod words;

use std::{
    convert::Infallible,
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, stream};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::net::TcpListener;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{handshake::derive_accept_key, protocol::Role},
};

type Body = BoxBody<Bytes, Infallible>;

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let port: u16 = std::env::var("PORT").unwrap().parse().unwrap();
    println!("port {port}");
    let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    match arguments[..] {
        ["exit", code] => {
            println!("\x1b[31mgiving up\x1b[0m");
            std::process::exit(code.parse().unwrap());
        }
        ["panic"] => panic!("this app panics"),
        ["never"] => std::future::pending().await,
        ["grpc"] => grpc::serve(listen(everywhere).await).await,
        ["admin-first", admin, later] => {
            let _admin = listen(([0, 0, 0, 0], admin.parse().unwrap()).into()).await;
            tokio::time::sleep(Duration::from_millis(later.parse().unwrap())).await;
            serve(listen(everywhere).await).await;
        }
        ["elsewhere", port] => {
            serve(listen(([0, 0, 0, 0], port.parse().unwrap()).into()).await).await
        }
        ["loopback"] => serve(listen((Ipv4Addr::LOCALHOST, port).into()).await).await,
        ["ipv6"] => serve(listen(([0u16; 8], port).into()).await).await,
        ["after", file] => {
            until_exists(file).await;
            serve(listen(everywhere).await).await;
        }
        ["http2"] => serve_http2(listen(everywhere).await).await,
        ["alone", port] => {
            let _only_one =
                std::net::TcpListener::bind(("127.0.0.1", port.parse().unwrap())).unwrap();
            serve(listen(everywhere).await).await;
        }
        ["family"] => {
            start_stubborn(None);
            start_stubborn(Some(0));
            serve(listen(everywhere).await).await;
        }
        ["breeder"] => {
            // Bounded: it must not take the machine along when a test fails.
            let script = "i=0; while [ $i -lt 150 ]; do sleep 1000 & i=$((i+1)); done; wait";
            start(script, Some(0));
            serve(listen(everywhere).await).await;
        }
        ["stubborn"] => {
            tokio::spawn(async {
                let kind = tokio::signal::unix::SignalKind::terminate();
                let mut terminate = tokio::signal::unix::signal(kind).unwrap();
                while terminate.recv().await.is_some() {}
            });
            serve(listen(everywhere).await).await;
        }
        [] => serve(listen(everywhere).await).await,
        _ => panic!("unknown arguments {arguments:?}"),
    }
}

/// Starts a process that ignores SIGTERM, in a group of its own or in the app's.
fn start_stubborn(group: Option<i32>) {
    let script = "trap '' TERM; echo stubborn $$; while :; do sleep 1000; done";
    start(script, group);
}

fn start(script: &str, group: Option<i32>) {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    if let Some(group) = group {
        command.process_group(group);
    }
    command.spawn().unwrap();
}

async fn listen(address: SocketAddr) -> TcpListener {
    TcpListener::bind(address).await.unwrap()
}

async fn until_exists(file: &str) {
    while !Path::new(file).exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn serve(listener: TcpListener) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection_with_upgrades(TokioIo::new(stream), service_fn(answer))
                .await;
        });
    }
}

/// As gRPC servers do.
async fn serve_http2(listener: TcpListener) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            let _ = auto::Builder::new(TokioExecutor::new())
                .http2_only()
                .serve_connection(TokioIo::new(stream), service_fn(answer))
                .await;
        });
    }
}

fn generation() -> String {
    std::env::var("GENERATION").unwrap_or_default()
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    Ok(match path.as_str() {
        "/" => text(generation()),
        "/crash" => std::process::exit(9),
        "/hang" => std::future::pending().await,
        "/broken" => text("broken").map_status(StatusCode::INTERNAL_SERVER_ERROR),
        "/echo" => Response::new(request.into_body().map_err(|_| unreachable!()).boxed()),
        "/count" => count(request).await,
        "/refuse" => text("too long").map_status(StatusCode::PAYLOAD_TOO_LARGE),
        "/seen" => text(format!(
            "{:?} {} {:#?}",
            request.version(),
            request.method(),
            request.headers()
        )),
        "/big" => big(),
        "/events" => events(),
        "/trailers" => trailers(request).await,
        "/socket" => socket(request),
        _ => match path.strip_prefix("/after") {
            Some(file) => {
                println!("waiting");
                until_exists(file).await;
                text(generation())
            }
            None => match path.strip_prefix("/record/") {
                Some(number) => record(number),
                None => text(format!("app {} {}", request.method(), request.uri())),
            },
        },
    })
}

trait MapStatus {
    fn map_status(self, status: StatusCode) -> Self;
}

impl MapStatus for Response<Body> {
    fn map_status(mut self, status: StatusCode) -> Self {
        *self.status_mut() = status;
        self
    }
}

fn text(text: impl Into<String>) -> Response<Body> {
    Response::new(Full::from(text.into()).boxed())
}

/// Notes in a file of its working directory what it answers.
fn record(number: &str) -> Response<Body> {
    let mut how = std::fs::OpenOptions::new();
    let mut file = how.append(true).create(true).open("record").unwrap();
    file.write_all(format!("{number}\n").as_bytes()).unwrap();
    text(number)
}

/// Reads a body to its end and says how long it was.
async fn count(request: Request<Incoming>) -> Response<Body> {
    let body = request.into_body().collect().await.unwrap();
    text(body.to_bytes().len().to_string())
}

/// 50 MB in pieces, made only as fast as somebody reads.
fn big() -> Response<Body> {
    let pieces = (0..800u32).map(|number| Ok(Frame::data(Bytes::from(vec![number as u8; 62_500]))));
    Response::new(BodyExt::boxed(StreamBody::new(stream::iter(pieces))))
}

/// An event stream without end that names the generation.
fn events() -> Response<Body> {
    let events = stream::unfold((), |()| async {
        tokio::time::sleep(Duration::from_millis(5)).await;
        let event = format!("data: {}\n\n", generation());
        Some((Ok(Frame::data(Bytes::from(event))), ()))
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(events)));
    let kind = "text/event-stream; charset=utf-8".parse().unwrap();
    response.headers_mut().insert("content-type", kind);
    response
}

/// Answers with the request's body and its trailers, and one trailer more.
async fn trailers(request: Request<Incoming>) -> Response<Body> {
    let version = format!("{:?}", request.version());
    let body = request.into_body().collect().await.unwrap();
    let mut trailers = body.trailers().cloned().unwrap_or_else(HeaderMap::new);
    trailers.insert("x-version", version.parse().unwrap());
    let frames = [
        Ok(Frame::data(body.to_bytes())),
        Ok(Frame::trailers(trailers)),
    ];
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(stream::iter(frames))));
    let names = "x-version, x-sum".parse().unwrap();
    response.headers_mut().insert("trailer", names);
    response
}

/// A WebSocket that answers every message with the generation in front.
fn socket(mut request: Request<Incoming>) -> Response<Body> {
    let key = derive_accept_key(request.headers()["sec-websocket-key"].as_bytes());
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let io = TokioIo::new(upgrade.await.unwrap());
        let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
        while let Some(Ok(message)) = socket.next().await {
            if message.is_text() {
                let answer = format!("{} {}", generation(), message.to_text().unwrap());
                if socket.send(answer.into()).await.is_err() {
                    return;
                }
            }
        }
    });
    let mut response = text("").map_status(StatusCode::SWITCHING_PROTOCOLS);
    let headers = response.headers_mut();
    headers.insert("connection", "Upgrade".parse().unwrap());
    headers.insert("upgrade", "websocket".parse().unwrap());
    headers.insert("sec-websocket-accept", key.parse().unwrap());
    response
}

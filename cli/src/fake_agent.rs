//! A stand-in for the agent in this crate's tests: an HTTP server that answers as the test says and counts what it gets.
//!
//! It checks no signature and builds nothing. Tests of the whole use the real agent.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Incoming, header::HeaderValue, service::service_fn};
use hyper_util::rt::TokioIo;
use rrun_protocol::{Authorization, BOOT_HEADER, BootId, SIGNATURE_HEADER};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use crate::connection::ServiceUrl;

/// A request as the test sees it.
pub(crate) struct Asked {
    /// 1 for the first one.
    pub(crate) number: usize,
    authorization: Option<Authorization>,
}

impl Asked {
    /// The boot that the request was signed for.
    pub(crate) fn boot(&self) -> Option<BootId> {
        self.authorization.as_ref().map(|signed| signed.boot)
    }
}

/// What the test answers.
pub(crate) struct Answer(Option<Response<Full<Bytes>>>);

impl Answer {
    pub(crate) fn text(status: u16, body: impl Into<String>) -> Self {
        let body = Full::new(Bytes::from(body.into()));
        Self(Some(Response::builder().status(status).body(body).unwrap()))
    }

    pub(crate) fn json(status: u16, value: &impl serde::Serialize) -> Self {
        Self::text(status, serde_json::to_string(value).unwrap())
    }

    /// Closes the connection without a word.
    pub(crate) fn hang_up() -> Self {
        Self(None)
    }
}

/// The server; it ends when dropped.
pub(crate) struct FakeAgent {
    url: ServiceUrl,
    seen: Arc<Seen>,
    task: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    requests: Mutex<Vec<String>>,
    received: AtomicU64,
    sent: AtomicU64,
}

impl FakeAgent {
    pub(crate) async fn start(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = ServiceUrl::loopback(listener.local_addr().unwrap().port());
        let seen = Arc::new(Seen::default());
        let task = tokio::spawn(serve(listener, Arc::new(answer), Arc::clone(&seen)));
        Self {
            url,
            seen,
            task: Some(task),
        }
    }

    /// An address at which nobody listens.
    pub(crate) fn at(url: ServiceUrl) -> Self {
        Self {
            url,
            seen: Arc::default(),
            task: None,
        }
    }

    pub(crate) async fn stop(mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }

    pub(crate) fn url(&self) -> ServiceUrl {
        self.url.clone()
    }

    /// Method and path of each request, in order.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.seen.requests.lock().unwrap().clone()
    }

    pub(crate) fn bytes_received(&self) -> u64 {
        self.seen.received.load(Ordering::SeqCst)
    }

    pub(crate) fn bytes_sent(&self) -> u64 {
        self.seen.sent.load(Ordering::SeqCst)
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

type Script = dyn Fn(&Asked) -> Answer + Send + Sync;

async fn serve(listener: TcpListener, script: Arc<Script>, seen: Arc<Seen>) {
    while let Ok((socket, _)) = listener.accept().await {
        let (script, seen) = (Arc::clone(&script), Arc::clone(&seen));
        tokio::spawn(async move {
            let counted = TokioIo::new(Counted {
                socket,
                seen: Arc::clone(&seen),
            });
            let service = service_fn(|request| answer(&script, &seen, request));
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(counted, service)
                .await;
        });
    }
}

async fn answer(
    script: &Arc<Script>,
    seen: &Seen,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Box<dyn std::error::Error + Send + Sync>> {
    let number = {
        let mut requests = seen.requests.lock().unwrap();
        requests.push(format!("{} {}", request.method(), request.uri()));
        requests.len()
    };
    let header = request.headers().get(SIGNATURE_HEADER);
    let asked = Asked {
        number,
        authorization: header.map(|header| header.to_str().unwrap().parse().unwrap()),
    };
    request.into_body().collect().await?;
    let mut answer = script(&asked).0.ok_or("hung up")?;
    let boot = HeaderValue::from_static("AAAAAAAAAAAA");
    answer.headers_mut().insert(BOOT_HEADER, boot);
    Ok(answer)
}

/// Counts on the server's side what the client claims to count on its own.
struct Counted {
    socket: TcpStream,
    seen: Arc<Seen>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let done = Pin::new(&mut self.socket).poll_read(context, buffer);
        let read = buffer.filled().len() - before;
        self.seen.received.fetch_add(read as u64, Ordering::SeqCst);
        done
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(context, bytes);
        if let Poll::Ready(Ok(written)) = &written {
            self.seen.sent.fetch_add(*written as u64, Ordering::SeqCst);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

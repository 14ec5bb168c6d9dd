//! One start of a generation as the proxy sees it: an address, the connections to it, and who is still using it.
//!
//! Every upstream has connections of its own, so that nothing that was opened for an old generation can ever carry a
//! request meant for a new one. What is under way is counted from [`Upstream::enter`] until the response's body ends or
//! is dropped; upgraded connections and endless responses are counted apart, because they get another limit.
//!
//! The pool is a few lines over hyper's connections instead of a general client: it can hand a request back of which not
//! a byte was sent, and it costs no task, no clone and no allocation for a request on a connection that exists.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{
    Request, Response,
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{Notify, OnceCell},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::{clock::running_timeout, wire::Wire};

/// A connection that was idle for longer is not used again: the app may be about to close it. In real time, because a
/// frozen container wakes up with the app's own idle limits past. Opening one on the loopback takes a tenth of a millisecond.
const MAX_IDLE: Duration = Duration::from_secs(1);
/// How long the app's backlog may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long the app may take to show that it speaks HTTP/2.
const PROBE_LIMIT: Duration = Duration::from_secs(2);
/// Start of an HTTP/2 connection: the preface and an empty SETTINGS frame.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// Longest response head that is read from the app.
const MAX_RESPONSE_HEAD_BYTES: usize = 256 << 10;
/// Receive window of an HTTP/2 connection to the app: on the loopback only memory speaks against a large one.
const HTTP2_WINDOW_BYTES: u32 = 1 << 20;

/// One start of a generation: its private address and everything under way there.
#[derive(Debug)]
pub struct Upstream {
    /// The generation that answers there.
    pub generation: u64,
    address: SocketAddr,
    idle: Mutex<Vec<Idle>>,
    speaks_http2: OnceCell<bool>,
    http2: tokio::sync::Mutex<Option<http2::SendRequest<Incoming>>>,
    requests: Gauge,
    streams: Gauge,
    cut_requests: CancellationToken,
    cut_streams: CancellationToken,
}

/// What was still under way when a drain's limits ended, and was cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leftover {
    /// Requests without a complete answer.
    pub requests: usize,
    /// Upgraded connections and endless responses.
    pub streams: usize,
}

/// Why there is no response.
#[derive(Debug)]
pub(crate) enum SendError {
    /// Not a byte reached the app; here is the request again.
    Unsent(Box<Request<Incoming>>, String),
    /// Somewhere on the way.
    Failed(hyper::Error),
    /// The drain's limit ended.
    Cut,
}

impl Upstream {
    /// An upstream at an address where a process of that generation listens.
    pub fn new(generation: u64, address: SocketAddr) -> Arc<Self> {
        Arc::new(Self {
            generation,
            address,
            idle: Mutex::default(),
            speaks_http2: OnceCell::new(),
            http2: tokio::sync::Mutex::default(),
            requests: Gauge::default(),
            streams: Gauge::default(),
            cut_requests: CancellationToken::new(),
            cut_streams: CancellationToken::new(),
        })
    }

    /// Waits until nothing is under way any more, then closes the connections; what exceeds its limit is cut.
    pub async fn drained(&self, requests: Duration, streams: Duration) -> Leftover {
        let mut leftover = Leftover::default();
        let all = async {
            if running_timeout(requests, self.requests.empty())
                .await
                .is_err()
            {
                leftover.requests = self.requests.count();
                self.cut_requests.cancel();
            }
            self.streams.empty().await;
        };
        if running_timeout(streams.max(requests), all).await.is_err() {
            leftover.streams = self.streams.count();
        }
        self.cut();
        leftover
    }

    /// Ends everything that is under way.
    pub(crate) fn cut(&self) {
        self.cut_requests.cancel();
        self.cut_streams.cancel();
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        if let Ok(mut http2) = self.http2.try_lock() {
            *http2 = None;
        }
    }

    /// Counts a request from now on.
    pub(crate) fn enter(self: &Arc<Self>) -> InFlight {
        self.requests.enter();
        InFlight {
            upstream: Arc::clone(self),
            stream: false,
        }
    }

    /// Whether the app answers HTTP/2 without TLS; asked once.
    pub(crate) async fn speaks_http2(&self) -> bool {
        let asked = self.speaks_http2.get_or_try_init(|| async {
            let stream = connect(self.address).await?;
            let answer = running_timeout(PROBE_LIMIT, probe_http2(stream)).await;
            Ok::<_, io::Error>(matches!(answer, Ok(Ok(true))))
        });
        matches!(asked.await, Ok(true))
    }

    async fn send_http1(
        &self,
        mut request: Request<Incoming>,
    ) -> Result<(Response<Incoming>, Option<http1::SendRequest<Incoming>>), SendError> {
        let with_body = !request.body().is_end_stream();
        loop {
            let (mut sender, reused) = match self.take_idle() {
                Some(sender) => (sender, true),
                None => match self.connect_http1().await {
                    Ok(sender) => (sender, false),
                    Err(error) => {
                        return Err(SendError::Unsent(Box::new(request), error.to_string()));
                    }
                },
            };
            match sender.try_send_request(request).await {
                Ok(response) => {
                    let reusable = !(with_body && refuses(&response));
                    return Ok((response, reusable.then_some(sender)));
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) if reused => request = unsent,
                    Some(unsent) => {
                        let reason = error.into_error().to_string();
                        return Err(SendError::Unsent(Box::new(unsent), reason));
                    }
                    None => return Err(SendError::Failed(error.into_error())),
                },
            }
        }
    }

    async fn send_http2(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Incoming>, SendError> {
        let mut sender = match self.connection_http2().await {
            Ok(sender) => sender,
            Err(error) => return Err(SendError::Unsent(Box::new(request), error.to_string())),
        };
        sender
            .try_send_request(request)
            .await
            .map_err(|mut error| match error.take_message() {
                Some(unsent) => SendError::Unsent(Box::new(unsent), error.into_error().to_string()),
                None => SendError::Failed(error.into_error()),
            })
    }

    fn take_idle(&self) -> Option<http1::SendRequest<Incoming>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest_fresh = idle
            .iter()
            .position(|idle| idle.since.elapsed() < MAX_IDLE)
            .unwrap_or(idle.len());
        idle.drain(..oldest_fresh);
        // What is closed is never ready, and goes when its time is over.
        let ready = idle.iter().rposition(|idle| idle.sender.is_ready())?;
        Some(idle.remove(ready).sender)
    }

    fn put_idle(&self, sender: http1::SendRequest<Incoming>) {
        if sender.is_closed() || self.cut_requests.is_cancelled() {
            return;
        }
        let since = Instant::now();
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Idle { sender, since });
    }

    async fn connect_http1(&self) -> io::Result<http1::SendRequest<Incoming>> {
        let stream = connect(self.address).await?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(MAX_RESPONSE_HEAD_BYTES)
            .handshake(TokioIo::new(Wire::new(stream)))
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!("connection to the app ended: {error}");
            }
        });
        Ok(sender)
    }

    async fn connection_http2(&self) -> io::Result<http2::SendRequest<Incoming>> {
        let mut kept = self.http2.lock().await;
        if let Some(sender) = kept.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let stream = connect(self.address).await?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(HTTP2_WINDOW_BYTES)
            .initial_connection_window_size(HTTP2_WINDOW_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("HTTP/2 connection to the app ended: {error}");
            }
        });
        Ok(kept.insert(sender).clone())
    }
}

/// Who refuses a request may not have read its body, and closes the connection then without saying so.
fn refuses(response: &Response<Incoming>) -> bool {
    response.status().is_client_error() || response.status().is_server_error()
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = running_timeout(CONNECT_LIMIT, TcpStream::connect(address))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Starts an HTTP/2 connection by hand: the first thing that who speaks it sends is a SETTINGS frame.
async fn probe_http2(mut stream: TcpStream) -> io::Result<bool> {
    const SETTINGS: u8 = 4;
    stream.write_all(HTTP2_PREFACE).await?;
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    let [_, _, length, kind, flags, stream_id @ ..] = head;
    Ok(head[..2] == [0, 0]
        && length % 6 == 0
        && kind == SETTINGS
        && flags == 0
        && stream_id == [0; 4])
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<Incoming>,
    since: Instant,
}

/// Counts what is under way, and tells when nothing is.
#[derive(Debug, Default)]
struct Gauge {
    count: AtomicUsize,
    emptied: Notify,
}

impl Gauge {
    fn enter(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    fn leave(&self) {
        if self.count.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.emptied.notify_waiters();
        }
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    async fn empty(&self) {
        loop {
            let mut emptied = std::pin::pin!(self.emptied.notified());
            emptied.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            emptied.await;
        }
    }
}

/// Something under way in an upstream, counted until dropped.
#[derive(Debug)]
pub(crate) struct InFlight {
    upstream: Arc<Upstream>,
    stream: bool,
}

impl InFlight {
    pub(crate) fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Sends a request, over HTTP/2 if `http2`, and waits for the head of its response.
    pub(crate) async fn send(
        self,
        request: Request<Incoming>,
        http2: bool,
    ) -> Result<Response<UpstreamBody>, SendError> {
        let sent = async {
            if http2 {
                let response = self.upstream.send_http2(request).await?;
                Ok((response, None))
            } else {
                self.upstream.send_http1(request).await
            }
        };
        let (response, sender) = tokio::select! {
            biased;
            sent = sent => sent?,
            () = self.upstream.cut_requests.cancelled() => return Err(SendError::Cut),
        };
        Ok(response.map(|incoming| UpstreamBody {
            incoming,
            flight: Some(self),
            sender,
            cut: None,
        }))
    }

    /// Counts it among the endless from now on.
    fn become_stream(&mut self) {
        if !self.stream {
            self.stream = true;
            self.upstream.streams.enter();
            self.upstream.requests.leave();
        }
    }

    fn cut_token(&self) -> &CancellationToken {
        if self.stream {
            &self.upstream.cut_streams
        } else {
            &self.upstream.cut_requests
        }
    }

    /// Done when this has to end although it is not finished.
    pub(crate) async fn cut(&self) {
        self.cut_token().cancelled().await;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.stream {
            self.upstream.streams.leave();
        } else {
            self.upstream.requests.leave();
        }
    }
}

/// Body of a response on its way from the app.
#[derive(Debug)]
pub struct UpstreamBody {
    incoming: Incoming,
    flight: Option<InFlight>,
    sender: Option<http1::SendRequest<Incoming>>,
    cut: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The app's connection failed.
    #[error(transparent)]
    Connection(#[from] hyper::Error),
    /// The drain's limit ended.
    #[error("the version that sent this was replaced, and its time to finish ended")]
    Cut,
}

impl UpstreamBody {
    /// Counts the response among the endless from now on.
    pub(crate) fn become_stream(&mut self) {
        if let Some(flight) = &mut self.flight {
            flight.become_stream();
        }
    }

    /// Takes out what counts an upgraded connection, together with the connection's sender.
    pub(crate) fn into_upgraded(mut self) -> (Option<InFlight>, Option<impl Send + 'static>) {
        self.become_stream();
        (self.flight.take(), self.sender.take())
    }

    fn finish(&mut self) {
        let sender = self.sender.take();
        if let Some(flight) = self.flight.take()
            && let Some(sender) = sender
        {
            flight.upstream.put_idle(sender);
        }
    }

    fn abandon(&mut self) {
        self.sender = None;
        self.flight = None;
    }

    /// Only asked while the app is slower than the client, so that a small response never pays for it.
    fn poll_cut(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(flight) = &self.flight else {
            return Poll::Pending;
        };
        let cut = self
            .cut
            .get_or_insert_with(|| Box::pin(flight.cut_token().clone().cancelled_owned()));
        cut.as_mut().poll(context)
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        match Pin::new(&mut this.incoming).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if this.incoming.is_end_stream() {
                    this.finish();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.abandon();
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                this.finish();
                Poll::Ready(None)
            }
            Poll::Pending => {
                ready!(this.poll_cut(context));
                this.abandon();
                Poll::Ready(Some(Err(BodyError::Cut)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl Drop for UpstreamBody {
    fn drop(&mut self) {
        if self.incoming.is_end_stream() {
            self.finish();
        }
    }
}

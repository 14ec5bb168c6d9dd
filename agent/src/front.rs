//! The public socket, owned for the agent's whole life.
//!
//! Every request whose raw path starts with the control prefix goes to the control routes, every other one to the app
//! through the proxy. The path is compared as it was sent: nothing is decoded or normalised, so no spelling that the app
//! might read as something else reaches the control routes, and what does reach them needs a signature there.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, extract::ConnectInfo};
use bytes::Bytes;
use hyper::{
    Request, Response,
    body::{Body, Frame, Incoming, SizeHint},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rrun_protocol::CONTROL_PREFIX;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::{
    clock::{running_sleep, running_timeout},
    proxy::{Proxy, ProxyBody},
};

/// What the front bears.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; who opens more waits in the backlog.
    pub connections: usize,
    /// How long a connection is kept on which nothing is under way, be it that nothing comes or that a request's head
    /// does not get complete. It may last twice as long: one look each time is enough.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Cloud Run sends at most 1 000 requests at once to an instance.
            connections: 4096,
            // Longer than the 620 s after which Google's front ends give idle connections up, so that the two sides
            // never close and send at once.
            idle: Duration::from_secs(650),
        }
    }
}

/// How long an idle connection may take to end in order.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);
/// Longest request head.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// HTTP/2 requests at once on one connection.
const MAX_STREAMS: u32 = 1000;
/// Receive window of an HTTP/2 connection.
const HTTP2_WINDOW_BYTES: u32 = 1 << 20;
/// Pause after a connection could not be accepted, as when there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `listener` until `shutdown`, then finishes what is under way; dropping it cuts everything.
pub async fn serve(
    listener: TcpListener,
    control: Router,
    proxy: Arc<Proxy>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    serve_within(Limits::default(), listener, control, proxy, shutdown).await
}

/// The same with other limits.
pub async fn serve_within(
    limits: Limits,
    listener: TcpListener,
    control: Router,
    proxy: Arc<Proxy>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let stop = CancellationToken::new();
    let front = Arc::new(Front {
        control,
        proxy,
        idle_limit: limits.idle,
        stop: stop.clone(),
    });
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    let places = Arc::new(Semaphore::new(limits.connections));
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            (stream, peer, place) = accept(&listener, &places) => {
                connections.spawn(Arc::clone(&front).connection(stream, peer, place));
            }
        }
    }
    drop(listener);
    stop.cancel();
    while connections.join_next().await.is_some() {}
    Ok(())
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, place),
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                running_sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

struct Front {
    control: Router,
    proxy: Arc<Proxy>,
    idle_limit: Duration,
    stop: CancellationToken,
}

impl Front {
    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        _place: OwnedSemaphorePermit,
    ) {
        // Fails only on a connection that is broken already, which the first read tells.
        let _ = stream.set_nodelay(true).is_ok();
        let activity = Arc::new(Activity::default());
        let builder = server();
        let answer = service_fn(|request| {
            let front = Arc::clone(&self);
            let under_way = activity.begin();
            async move { front.answer(request, peer, under_way).await }
        });
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), answer);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
            () = activity.idle(self.idle_limit) => {
                connection.as_mut().graceful_shutdown();
                running_timeout(FAREWELL_LIMIT, connection).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            tracing::debug!("a connection ended: {error}");
        }
    }

    async fn answer(
        &self,
        mut request: Request<Incoming>,
        peer: SocketAddr,
        under_way: UnderWay,
    ) -> Result<Response<FrontBody>, Infallible> {
        let response = if request.uri().path().starts_with(CONTROL_PREFIX) {
            request.extensions_mut().insert(ConnectInfo(peer));
            let response = self.control.clone().oneshot(request).await?;
            response.map(Answer::Control)
        } else {
            self.proxy.forward(request).await.map(Answer::Proxy)
        };
        Ok(response.map(|answer| FrontBody {
            answer,
            _under_way: under_way,
        }))
    }
}

/// What happens on one connection, as far as it has to be known whether nothing does.
#[derive(Debug, Default)]
struct Activity {
    begun: AtomicUsize,
    ended: AtomicUsize,
}

impl Activity {
    fn begin(self: &Arc<Self>) -> UnderWay {
        self.begun.fetch_add(1, Ordering::Relaxed);
        UnderWay(Arc::clone(self))
    }

    /// Ends when nothing was under way for `limit`.
    async fn idle(&self, limit: Duration) {
        let mut before = self.quiet();
        loop {
            running_sleep(limit).await;
            let now = self.quiet();
            if now.is_some() && now == before {
                return;
            }
            before = now;
        }
    }

    /// How many requests there were, if none is under way.
    fn quiet(&self) -> Option<usize> {
        let ended = self.ended.load(Ordering::Relaxed);
        (self.begun.load(Ordering::Relaxed) == ended).then_some(ended)
    }
}

/// A request until its response was sent or given up.
#[derive(Debug)]
struct UnderWay(Arc<Activity>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}

fn server() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .max_buf_size(MAX_HEAD_BYTES)
        .auto_date_header(false);
    builder
        .http2()
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(HTTP2_WINDOW_BYTES)
        .auto_date_header(false);
    builder
}

/// Body of a response, under way until it is dropped.
struct FrontBody {
    answer: Answer,
    _under_way: UnderWay,
}

/// Body of whatever answered.
enum Answer {
    Proxy(ProxyBody),
    Control(axum::body::Body),
}

impl Body for FrontBody {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match &mut self.get_mut().answer {
            Answer::Proxy(body) => Pin::new(body).poll_frame(context).map_err(Into::into),
            Answer::Control(body) => Pin::new(body).poll_frame(context).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.answer {
            Answer::Proxy(body) => body.is_end_stream(),
            Answer::Control(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.answer {
            Answer::Proxy(body) => body.size_hint(),
            Answer::Control(body) => body.size_hint(),
        }
    }
}

//! The public socket, owned for the agent's whole life.
//!
//! Every request whose raw path starts with the control prefix goes to the control routes, every other one to the app
//! through the proxy. The path is compared as it was sent: nothing is decoded or normalised, so no spelling that the app
//! might read as something else reaches the control routes, and what does reach them needs a signature there.

use std::{convert::Infallible, io, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

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
use std::task::{Context, Poll};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::{
    clock::{RunningTimer, running_sleep},
    proxy::{Proxy, ProxyBody},
};

/// Connections at once. Cloud Run sends at most 1 000 requests at once to an instance; who opens more waits in the backlog.
const MAX_CONNECTIONS: usize = 4096;
/// How long a connection may take to send a request's head, the wait for the first byte included. Longer than the 620 s
/// after which Google's front ends give idle connections up, so that the two sides never close and send at once.
const HEAD_LIMIT: Duration = Duration::from_secs(650);
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
    let stop = CancellationToken::new();
    let front = Arc::new(Front {
        control,
        proxy,
        stop: stop.clone(),
    });
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
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
        let builder = server();
        let answer = service_fn(|request| {
            let front = Arc::clone(&self);
            async move { front.answer(request, peer).await }
        });
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), answer);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
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
    ) -> Result<Response<FrontBody>, Infallible> {
        if !request.uri().path().starts_with(CONTROL_PREFIX) {
            return Ok(self.proxy.forward(request).await.map(FrontBody::Proxy));
        }
        request.extensions_mut().insert(ConnectInfo(peer));
        let response = self.control.clone().oneshot(request).await?;
        Ok(response.map(FrontBody::Control))
    }
}

fn server() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(RunningTimer)
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(MAX_HEAD_BYTES)
        .auto_date_header(false);
    builder
        .http2()
        .timer(RunningTimer)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(HTTP2_WINDOW_BYTES)
        .auto_date_header(false);
    builder
}

/// Body of whatever answered.
enum FrontBody {
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
        match self.get_mut() {
            Self::Proxy(body) => Pin::new(body).poll_frame(context).map_err(Into::into),
            Self::Control(body) => Pin::new(body).poll_frame(context).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Proxy(body) => body.is_end_stream(),
            Self::Control(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Proxy(body) => body.size_hint(),
            Self::Control(body) => body.size_hint(),
        }
    }
}

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
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::{
    clock::{RunningTimer, running_sleep, running_timeout},
    proxy::{Proxy, ProxyBody},
};

/// Connections at once. Cloud Run sends at most 1 000 requests at once to an instance; who opens more waits in the backlog.
const MAX_CONNECTIONS: usize = 4096;
/// How long a connection may have no request under way: what it sends until then is no whole head, in either version of
/// HTTP. Longer than the 620 s after which Google's front ends give idle connections up, so that the two sides never close
/// and send at once.
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
        let requests = Arc::new(watch::Sender::new(0));
        let idle = idle(requests.subscribe());
        let answer = service_fn(|request| {
            let (front, under_way) = (Arc::clone(&self), UnderWay::new(&requests));
            async move { front.answer(request, peer, under_way).await }
        });
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), answer);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = idle => return,
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
        under_way: UnderWay,
    ) -> Result<Response<FrontBody>, Infallible> {
        let response = if request.uri().path().starts_with(CONTROL_PREFIX) {
            request.extensions_mut().insert(ConnectInfo(peer));
            let response = self.control.clone().oneshot(request).await?;
            response.map(Source::Control)
        } else {
            self.proxy.forward(request).await.map(Source::Proxy)
        };
        Ok(response.map(|source| FrontBody {
            source,
            _under_way: under_way,
        }))
    }
}

/// A request, from its head to the end of its answer.
struct UnderWay(Arc<watch::Sender<usize>>);

impl UnderWay {
    fn new(requests: &Arc<watch::Sender<usize>>) -> Self {
        requests.send_modify(|count| *count += 1);
        Self(Arc::clone(requests))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Ends once there was no request under way for [`HEAD_LIMIT`].
async fn idle(mut requests: watch::Receiver<usize>) {
    let mut goes_on = true;
    while goes_on {
        let is_idle = *requests.borrow_and_update() == 0;
        let changed = requests.changed();
        goes_on = match is_idle {
            true => matches!(running_timeout(HEAD_LIMIT, changed).await, Ok(Ok(()))),
            false => changed.await.is_ok(),
        };
    }
}

fn server() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(RunningTimer)
        // `idle` sees to it, for connections too whose first bytes do not say which version they speak.
        .header_read_timeout(None)
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
struct FrontBody {
    source: Source,
    _under_way: UnderWay,
}

enum Source {
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
        match &mut self.get_mut().source {
            Source::Proxy(body) => Pin::new(body).poll_frame(context).map_err(Into::into),
            Source::Control(body) => Pin::new(body).poll_frame(context).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Proxy(body) => body.is_end_stream(),
            Source::Control(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Proxy(body) => body.size_hint(),
            Source::Control(body) => body.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::Instant,
    };
    use tokio_util::task::AbortOnDropHandle;

    use super::*;
    use crate::{output::Output, service::Service};

    /// Longer than any idle connection lives.
    const LONG: Duration = Duration::from_secs(2 * HEAD_LIMIT.as_secs());

    async fn start() -> (SocketAddr, AbortOnDropHandle<io::Result<()>>) {
        let (_, route) = Service::new(Output::to(tokio::io::sink(), tokio::io::sink()));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let slow = get(|| async {
            tokio::time::sleep(LONG).await;
            "late"
        });
        let control = Router::new().route("/_rrun/slow", slow);
        let proxy = Arc::new(Proxy::new(route));
        let front = serve(listener, control, proxy, std::future::pending());
        (address, AbortOnDropHandle::new(tokio::spawn(front)))
    }

    /// Sends `bytes` and reads until the other side closes.
    async fn read_to_end(address: SocketAddr, bytes: &[u8]) -> (String, Duration) {
        let started = Instant::now();
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        // What is cut may be reset as well as ended.
        let _ = tokio::time::timeout(2 * LONG, read).await.unwrap();
        (answer, started.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_a_whole_head_ends_at_the_limit_whatever_it_sent() {
        let (address, _front) = start().await;
        let all = [
            &b""[..],
            b"PRI * HT",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
            b"GET / HTTP/1.1\r\nhost: x\r\n",
            // One request answered, and then nothing.
            b"GET /_rrun/nothing HTTP/1.1\r\nhost: x\r\n\r\n",
        ];
        let ended = all.map(|bytes| read_to_end(address, bytes));
        for (bytes, (_, took)) in all.iter().zip(futures_util::future::join_all(ended).await) {
            let slack = Duration::from_secs(30);
            let sent = String::from_utf8_lossy(bytes);
            assert!(
                took >= HEAD_LIMIT && took < HEAD_LIMIT + slack,
                "{sent} {took:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_may_take_longer_than_a_connection_may_be_idle() {
        let (address, _front) = start().await;
        let request = b"GET /_rrun/slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let (answer, took) = read_to_end(address, request).await;
        assert!(
            answer.ends_with("late") && took >= LONG,
            "{answer} {took:?}"
        );
    }
}

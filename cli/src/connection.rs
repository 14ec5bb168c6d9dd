//! The connection to one service, and what went over it.
//!
//! Bytes are counted at the TCP socket, below TLS: everything written counts, request lines, headers and handshakes too.
//! Plain `http://` is taken to this machine only. Requests are neither signed nor judged here.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, Uri,
    body::Incoming,
    rt::{Read, ReadBufCursor, Write},
};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connected, Connection as Connects, HttpConnector},
    },
    rt::TokioExecutor,
};
use serde::Serialize;
use tower::Service as Connector;

use crate::problem::Problem;

/// How long opening a connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// Address of a service: scheme, host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServiceUrl(String);

/// Why an address is not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UrlError {
    #[error("`{0}` is not an address of a service")]
    Form(String),
    #[error("plain http would send the push readable for everybody: `{0}`")]
    Plain(String),
}

/// What went over a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Traffic {
    pub(crate) bytes_up: u64,
    pub(crate) bytes_down: u64,
    /// Requests that were answered or given up.
    pub(crate) round_trips: u64,
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, more: Self) {
        self.bytes_up += more.bytes_up;
        self.bytes_down += more.bytes_down;
        self.round_trips += more.round_trips;
    }
}

/// A pool of connections to one service.
pub(crate) struct Connection {
    client: Client<HttpsConnector<Counting>, Full<Bytes>>,
    counters: Arc<Counters>,
    url: ServiceUrl,
}

#[derive(Debug, Default)]
struct Counters {
    up: AtomicU64,
    down: AtomicU64,
    round_trips: AtomicU64,
}

impl ServiceUrl {
    /// Checks an address that somebody typed. A path is not taken: the agent owns its prefix at the root.
    pub(crate) fn parse(text: &str) -> Result<Self, UrlError> {
        let form = || UrlError::Form(text.to_owned());
        let uri: Uri = text.trim().parse().map_err(|_| form())?;
        let scheme = uri.scheme_str().ok_or_else(form)?;
        let authority = uri.authority().ok_or_else(form)?;
        let bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
        if !bare || authority.as_str().contains('@') || authority.host().is_empty() {
            return Err(form());
        }
        match scheme {
            "https" => {}
            "http" if is_loopback(authority.host()) => {}
            "http" => return Err(UrlError::Plain(text.to_owned())),
            _ => return Err(form()),
        }
        Ok(Self(format!("{scheme}://{authority}")))
    }

    /// An agent on this machine.
    pub(crate) fn loopback(port: u16) -> Self {
        Self(format!("http://127.0.0.1:{port}"))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    match bare.parse::<std::net::IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => bare.eq_ignore_ascii_case("localhost"),
    }
}

impl From<UrlError> for Problem {
    fn from(error: UrlError) -> Self {
        let hint = match &error {
            UrlError::Form(_) => "as in `https://app-abc123-ew.a.run.app`, without a path",
            UrlError::Plain(_) => "use https://; http:// is taken to this machine only",
        };
        Self::usage(error).hint(hint.to_owned())
    }
}

impl std::fmt::Display for ServiceUrl {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl Connection {
    /// Prepares; connects with the first request.
    pub(crate) fn new(url: ServiceUrl) -> Result<Self, Problem> {
        let counters = Arc::new(Counters::default());
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_LIMIT));
        let counting = Counting {
            tcp,
            counters: Arc::clone(&counters),
        };
        let builder = HttpsConnectorBuilder::new();
        // The system's certificates are read from disk, which plain connections need not wait for.
        let builder = if url.as_str().starts_with("https:") {
            builder
                .with_native_roots()
                .map_err(|error| {
                    Problem::unexpected(format!("cannot read the system's certificates: {error}"))
                })?
                .https_only()
        } else {
            builder.with_tls_config(without_roots()?).https_or_http()
        };
        let connector = builder.enable_http1().wrap_connector(counting);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self {
            client,
            counters,
            url,
        })
    }

    /// Where it goes.
    pub(crate) fn url(&self) -> &ServiceUrl {
        &self.url
    }

    /// What went over it until now.
    pub(crate) fn traffic(&self) -> Traffic {
        Traffic {
            bytes_up: self.counters.up.load(Ordering::Relaxed),
            bytes_down: self.counters.down.load(Ordering::Relaxed),
            round_trips: self.counters.round_trips.load(Ordering::Relaxed),
        }
    }

    /// Sends one request and waits for the head of its answer; gives up when no byte moves for `silence`.
    pub(crate) async fn request(
        &self,
        request: Request<Full<Bytes>>,
        silence: Duration,
    ) -> Result<Response<Incoming>, RequestError> {
        let mut answer = std::pin::pin!(self.client.request(request));
        let mut seen = self.traffic();
        let answer = loop {
            match tokio::time::timeout(silence, &mut answer).await {
                Ok(answer) => break answer.map_err(RequestError::Client),
                Err(_) if self.traffic() != seen => seen = self.traffic(),
                Err(_) => break Err(RequestError::Silent(silence)),
            }
        };
        let has_left = !matches!(&answer, Err(error) if error.is_connect());
        self.counters
            .round_trips
            .fetch_add(u64::from(has_left), Ordering::Relaxed);
        answer
    }
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("{}", innermost(.0))]
    Client(hyper_util::client::legacy::Error),
    #[error("nothing came or went for {} s", .0.as_secs())]
    Silent(Duration),
}

impl RequestError {
    /// Whether not a byte of the request can have arrived.
    pub(crate) fn is_connect(&self) -> bool {
        matches!(self, Self::Client(error) if error.is_connect())
    }
}

/// The cause that says something: the outer errors only repeat that a request failed.
pub(crate) fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// A connection without encryption never asks for certificates; none are loaded for it.
fn without_roots() -> Result<rustls::ClientConfig, Problem> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(Problem::unexpected)?
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth())
}

/// Opens TCP connections that count.
#[derive(Clone)]
struct Counting {
    tcp: HttpConnector,
    counters: Arc<Counters>,
}

impl Connector<Uri> for Counting {
    type Response = Counted;
    type Error = <HttpConnector as Connector<Uri>>::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Counted, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Connector::<Uri>::poll_ready(&mut self.tcp, context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.tcp.call(uri);
        let counters = Arc::clone(&self.counters);
        Box::pin(async move {
            let socket = connecting.await?;
            Ok(Counted { socket, counters })
        })
    }
}

/// A TCP connection that counts.
struct Counted {
    socket: <HttpConnector as Connector<Uri>>::Response,
    counters: Arc<Counters>,
}

impl Counted {
    fn count_up(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &written {
            self.counters.up.fetch_add(*bytes as u64, Ordering::Relaxed);
        }
        written
    }
}

impl Connects for Counted {
    fn connected(&self) -> Connected {
        self.socket.connected()
    }
}

impl Read for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        // The cursor does not tell how far it was filled, so what arrives is read beside it and put in.
        let mut space = [0; 8 << 10];
        let room = buffer.remaining().min(space.len());
        let mut beside = hyper::rt::ReadBuf::new(&mut space[..room]);
        ready!(Pin::new(&mut self.socket).poll_read(context, beside.unfilled()))?;
        let filled = beside.filled();
        self.counters
            .down
            .fetch_add(filled.len() as u64, Ordering::Relaxed);
        buffer.put_slice(filled);
        Poll::Ready(Ok(()))
    }
}

impl Write for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(context, bytes);
        self.count_up(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(context, slices);
        self.count_up(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::fake_agent::{Answer, FakeAgent};

    #[test]
    fn plain_http_is_taken_to_this_machine_only() {
        for good in [
            "http://127.0.0.1:8080",
            "http://localhost:1/",
            "http://[::1]:8080",
            "https://app-abc123-ew.a.run.app",
        ] {
            assert!(ServiceUrl::parse(good).is_ok(), "{good}");
        }
        let plain = ServiceUrl::parse("http://example.com").unwrap_err();
        assert!(matches!(plain, UrlError::Plain(_)));
        assert_eq!(Problem::from(plain).code as u8, 2);
        for bad in [
            "",
            "app.run.app",
            "ftp://127.0.0.1",
            "https://a/b",
            "https://u:p@a",
            "http://127.0.0.1.evil.com",
            "http://localhost.evil.com",
        ] {
            assert!(ServiceUrl::parse(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn every_byte_on_the_socket_is_counted() {
        let agent = FakeAgent::start(|_| Answer::text(200, "hello")).await;
        let connection = Connection::new(agent.url()).unwrap();
        for _ in 0..2 {
            let request = Request::post(format!("{}/x", agent.url()))
                .body(Full::new(Bytes::from_static(b"four")))
                .unwrap();
            let answer = connection
                .request(request, Duration::from_secs(5))
                .await
                .unwrap();
            answer.into_body().collect().await.unwrap();
        }
        let host = agent
            .url()
            .as_str()
            .trim_start_matches("http://")
            .to_owned();
        let head = format!("POST /x HTTP/1.1\r\nhost: {host}\r\ncontent-length: 4\r\n\r\n");
        let traffic = connection.traffic();
        assert_eq!(traffic.round_trips, 2);
        assert_eq!(traffic.bytes_up, 2 * (head.len() as u64 + 4));
        assert_eq!(traffic.bytes_up, agent.bytes_received());
        assert_eq!(traffic.bytes_down, agent.bytes_sent());
    }
}

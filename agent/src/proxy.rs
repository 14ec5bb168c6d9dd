//! One request on its way through: picks the upstream when the request arrives, or holds it while nothing can serve.
//!
//! The route is read and the request counted in one step, under the watch's lock. So a switch that is published has
//! every earlier request counted, and the old generation is not stopped under it.
//!
//! Of the content nothing is looked at, kept or changed; what changes in the head stands in `headers.rs`.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode, Version,
    body::{Body, Frame, Incoming, SizeHint},
};
use hyper_util::rt::TokioIo;
use tokio::sync::watch;

use crate::{
    clock::running_timeout,
    headers,
    page::{self, Reader},
    upstream::{BodyError, InFlight, SendError, Upstream, UpstreamBody},
};

/// How long a request is held while nothing can serve.
pub const HOLD_LIMIT: Duration = Duration::from_secs(30);
/// How many requests are held at once: each is a connection and its buffers.
pub const MAX_HELD: usize = 1024;
/// How long a request whose connection was refused waits for somebody to notice that the app is gone.
const NOTICE_LIMIT: Duration = Duration::from_secs(1);

/// Where requests go.
#[derive(Clone, Debug)]
pub enum Route {
    /// Nowhere, and nothing is going to change that by itself.
    Nothing {
        /// A lower-case fragment.
        why: String,
    },
    /// Nowhere at the moment: requests wait.
    Held {
        /// A lower-case fragment.
        why: String,
    },
    /// To the app.
    To(Arc<Upstream>),
}

/// Passes requests on to whatever serves.
#[derive(Debug)]
pub struct Proxy {
    route: watch::Receiver<Route>,
    held: AtomicUsize,
    hold_limit: Duration,
    max_held: usize,
}

impl Proxy {
    /// A proxy that follows `route`.
    pub fn new(route: watch::Receiver<Route>) -> Self {
        Self {
            route,
            held: AtomicUsize::new(0),
            hold_limit: HOLD_LIMIT,
            max_held: MAX_HELD,
        }
    }

    /// The same with other limits for holding requests.
    pub fn with_limits(self, hold_limit: Duration, max_held: usize) -> Self {
        Self {
            hold_limit,
            max_held,
            ..self
        }
    }

    /// Answers a request: by the app, or by a page that says why not.
    pub async fn forward(&self, mut request: Request<Incoming>) -> Response<ProxyBody> {
        let reader = Reader::of(request.headers());
        if let Err((status, why)) = headers::check(&request) {
            return page::refusal(status, why, reader).map(ProxyBody::Page);
        }
        let upgrade = headers::wants_upgrade(&request).then(|| hyper::upgrade::on(&mut request));
        let response = match self.send(request, upgrade.is_some()).await {
            Ok(response) => response,
            Err(failure) => {
                return page::response(failure.status, &failure.why, reader).map(ProxyBody::Page);
            }
        };
        if response.status() == StatusCode::SWITCHING_PROTOCOLS && upgrade.is_none() {
            let why = "the app switched protocols although nobody asked for it";
            return page::response(StatusCode::BAD_GATEWAY, why, reader).map(ProxyBody::Page);
        }
        deliver(response, upgrade)
    }

    async fn send(
        &self,
        request: Request<Incoming>,
        upgrade: bool,
    ) -> Result<Response<UpstreamBody>, Failure> {
        let flight = self.enter().await?;
        let tried = Arc::clone(flight.upstream());
        let (request, why) = match send_to(flight, request, upgrade).await {
            Err(SendError::Unsent(request, why)) => (*request, why),
            Err(error) => return Err(error.into()),
            Ok(response) => return Ok(response),
        };
        tracing::debug!("the app did not take a request, it is sent again: {why}");
        self.left(&tried).await;
        let flight = self.enter().await?;
        Ok(send_to(flight, request, upgrade).await?)
    }

    /// Counts the request in what serves now, or in what serves next.
    async fn enter(&self) -> Result<InFlight, Failure> {
        match &*self.route.borrow() {
            Route::To(upstream) => return Ok(upstream.enter()),
            Route::Nothing { why } => return Err(Failure::unavailable(why)),
            Route::Held { why } if self.held.load(Ordering::Relaxed) >= self.max_held => {
                return Err(Failure::unavailable(&format!(
                    "{why}, and {} requests are waiting already",
                    self.max_held
                )));
            }
            Route::Held { .. } => {}
        }
        self.hold().await
    }

    async fn hold(&self) -> Result<InFlight, Failure> {
        let _held = Held::new(&self.held);
        let mut route = self.route.clone();
        let served = route.wait_for(|route| !matches!(route, Route::Held { .. }));
        match running_timeout(self.hold_limit, served).await {
            Ok(Ok(route)) => match &*route {
                Route::To(upstream) => Ok(upstream.enter()),
                Route::Nothing { why } | Route::Held { why } => Err(Failure::unavailable(why)),
            },
            Ok(Err(_)) => Err(Failure::unavailable("the agent is shutting down")),
            Err(_) => {
                let why = match &*self.route.borrow() {
                    Route::Held { why } => why.clone(),
                    _ => String::from("nothing could serve"),
                };
                let limit = self.hold_limit.as_secs();
                Err(Failure::unavailable(&format!(
                    "{why}; the request waited for {limit} s"
                )))
            }
        }
    }

    /// Waits for a moment until the route leads elsewhere.
    async fn left(&self, tried: &Arc<Upstream>) {
        let mut route = self.route.clone();
        let elsewhere = route.wait_for(
            |route| !matches!(route, Route::To(upstream) if Arc::ptr_eq(upstream, tried)),
        );
        // Still the same one: the second try shows whether it is back.
        let _ = running_timeout(NOTICE_LIMIT, elsewhere).await.is_ok();
    }
}

async fn send_to(
    flight: InFlight,
    mut request: Request<Incoming>,
    upgrade: bool,
) -> Result<Response<UpstreamBody>, SendError> {
    let http2 = request.version() == Version::HTTP_2 && flight.upstream().speaks_http2().await;
    headers::prepare_request(&mut request, upgrade, http2);
    flight.send(request, http2).await
}

/// Passes the response on; an upgraded connection lives on in a task of its own.
fn deliver(
    mut response: Response<UpstreamBody>,
    upgrade: Option<hyper::upgrade::OnUpgrade>,
) -> Response<ProxyBody> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let app = hyper::upgrade::on(&mut response);
        headers::prepare_response(&mut response);
        let (head, body) = response.into_parts();
        if let Some(client) = upgrade {
            tokio::spawn(tunnel(client, app, body));
        }
        return Response::from_parts(head, ProxyBody::Page(Full::default()));
    }
    headers::prepare_response(&mut response);
    if headers::is_endless(&response) {
        response.body_mut().become_stream();
    }
    response.map(ProxyBody::App)
}

async fn tunnel(
    client: hyper::upgrade::OnUpgrade,
    app: hyper::upgrade::OnUpgrade,
    body: UpstreamBody,
) {
    let (Some(flight), _sender) = body.into_upgraded() else {
        return;
    };
    let copied = async {
        let (client, app) = tokio::try_join!(client, app)?;
        tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(app)).await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    };
    tokio::select! {
        copied = copied => if let Err(error) = copied {
            tracing::debug!("an upgraded connection broke: {error}");
        },
        () = flight.cut() => {}
    }
}

/// No answer of the app.
#[derive(Debug)]
struct Failure {
    status: StatusCode,
    why: String,
}

impl Failure {
    fn unavailable(why: &str) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            why: why.to_owned(),
        }
    }
}

impl From<SendError> for Failure {
    fn from(error: SendError) -> Self {
        let (status, why) = match error {
            SendError::Unsent(_, why) => (
                StatusCode::BAD_GATEWAY,
                format!("the app did not take the request: {why}"),
            ),
            SendError::Failed(error) => (
                StatusCode::BAD_GATEWAY,
                format!("the app did not answer: {error}"),
            ),
            SendError::Cut => (
                StatusCode::SERVICE_UNAVAILABLE,
                String::from("the version that had this request was replaced before it answered"),
            ),
        };
        Self { status, why }
    }
}

struct Held<'a>(&'a AtomicUsize);

impl<'a> Held<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Body of a proxied response: the app's, or a page of our own.
#[derive(Debug)]
pub enum ProxyBody {
    /// A small text.
    Page(Full<Bytes>),
    /// On its way from the app.
    App(UpstreamBody),
}

impl Body for ProxyBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Page(page) => Pin::new(page)
                .poll_frame(context)
                .map_err(|never| match never {}),
            Self::App(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Page(page) => page.is_end_stream(),
            Self::App(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Page(page) => page.size_hint(),
            Self::App(body) => body.size_hint(),
        }
    }
}

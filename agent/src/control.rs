//! The control routes under `/_rrun/`: every request is checked by the [`Gate`] first, then reads a snapshot or sends the
//! deployer a request. Nothing here changes the agent's state itself.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, Query, Request, State},
    http::{
        HeaderMap, HeaderValue, StatusCode,
        header::{ACCEPT, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response, Sse, sse},
    routing::{get, post},
};
use futures_util::{Stream, StreamExt as _, stream};
use http_body_util::BodyExt as _;
use rrun_protocol::{
    Digest, Event, EventKind, HEARTBEAT_EVERY, MAX_BODY_BYTES, PushId, Refusal, Status, TreeDigest,
};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    authorize::{Gate, Signer},
    clock::running_timeout,
    deploy,
    receive::{ReceiveError, Received, receive},
    record::{Item, Record},
    shared::{Events, Shared},
};

/// Bodies that are read at once: each may take [`MAX_BODY_BYTES`] of memory, and one developer sends one at a time.
const MAX_BODIES: usize = 4;
/// Pushes that are taken apart at once: each may take a compression prefix twice and the decoder's window of memory.
const MAX_TAKEN_APART: usize = 1;
/// How long a body may take altogether: 31 MiB at 0.5 Mbit/s, the slowest uplink that this is for.
const BODY_LIMIT: Duration = Duration::from_secs(10 * 60);
/// How long a body may pause.
const BODY_PAUSE_LIMIT: Duration = Duration::from_secs(30);

/// What the routes share.
#[derive(Clone)]
struct Control {
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    deployer: mpsc::Sender<deploy::Request>,
    bodies: Arc<Semaphore>,
    taking_apart: Arc<Semaphore>,
    end_agent: CancellationToken,
}

/// The routes. `end_agent` is cancelled when a client asks the agent itself to end.
pub(crate) fn routes(
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    deployer: mpsc::Sender<deploy::Request>,
    end_agent: CancellationToken,
) -> Router {
    let control = Control {
        gate,
        shared,
        deployer,
        bodies: Arc::new(Semaphore::new(MAX_BODIES)),
        taking_apart: Arc::new(Semaphore::new(MAX_TAKEN_APART)),
        end_agent,
    };
    Router::new()
        .route("/_rrun/pushes/{id}", post(push))
        .route("/_rrun/pushes/{id}/events", get(events))
        .route("/_rrun/tree", get(tree))
        .route("/_rrun/builds/{build}/log", get(build_log))
        .route("/_rrun/status", get(status))
        .route("/_rrun/logs", get(logs))
        .route("/_rrun/history", get(history))
        .route("/_rrun/cancel", post(cancel))
        .route("/_rrun/rollback", post(rollback))
        .route("/_rrun/restart", post(restart))
        .route("/_rrun/stop", post(stop))
        .fallback(not_found)
        .method_not_allowed_fallback(not_found)
        // Around everything above, the fallbacks too: a route that is added is behind it.
        .layer(middleware::from_fn_with_state(control.clone(), authorize))
        .with_state(control)
}

/// An answer that says no.
struct No(StatusCode, Refusal);

impl IntoResponse for No {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

fn no(status: StatusCode, error: impl Into<String>) -> No {
    No(
        status,
        Refusal {
            error: error.into(),
            hint: None,
            boot: None,
            time: None,
            tree: None,
        },
    )
}

async fn authorize(State(control): State<Control>, mut request: Request, next: Next) -> Response {
    let path_and_query = request
        .uri()
        .path_and_query()
        .map_or("", |path| path.as_str());
    match control
        .gate
        .check(request.method().as_str(), path_and_query, request.headers())
    {
        Ok(signer) => {
            request.extensions_mut().insert(signer);
            let mut response = next.run(request).await;
            response
                .headers_mut()
                .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
            response
        }
        Err((status, refusal)) => No(status, refusal).into_response(),
    }
}

async fn not_found() -> No {
    no(StatusCode::NOT_FOUND, "the agent has no such route")
}

async fn push(
    State(control): State<Control>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, No> {
    let id = parse_push_id(&id)?;
    if let Some(events) = control.shared.events(id) {
        return Ok(event_stream(&events, 0));
    }
    let signer = signer(&request)?;
    let encoding = encoding(request.headers());
    let body = read_body(&control, request.into_body(), signer.body).await?;
    let received = take_apart(&control, body, encoding).await?;
    let (answer, answered) = oneshot::channel();
    let request = deploy::Request::Push {
        id,
        received: Box::new(received),
        by: signer.name,
        answer,
    };
    follow(&control, request, answered).await
}

/// A body in memory, which counts against [`MAX_BODIES`] for as long as it is there.
struct WholeBody {
    bytes: Vec<u8>,
    _place: OwnedSemaphorePermit,
}

/// Takes a push apart beside everything else. It goes on if the client leaves, so what bounds it goes with it.
async fn take_apart(control: &Control, body: WholeBody, encoding: String) -> Result<Received, No> {
    let turn = Arc::clone(&control.taking_apart).acquire_owned().await;
    let shared = Arc::clone(&control.shared);
    let working = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        receive(&shared.layout, &shared.manifest(), &body.bytes, &encoding)
    });
    match working.await {
        Ok(received) => received.map_err(|error| refuse_push(control, &error)),
        Err(error) => Err(no(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

/// Hands an exchange to the deployer and answers with its events.
async fn follow(
    control: &Control,
    request: deploy::Request,
    answered: oneshot::Receiver<Result<Events, TreeDigest>>,
) -> Result<Response, No> {
    match ask(control, request, answered).await? {
        Ok(events) => Ok(event_stream(&events, 0)),
        Err(tree) => Err(wrong_base(
            tree,
            "the agent's tree changed while the push was on its way",
        )),
    }
}

async fn ask<T>(
    control: &Control,
    request: deploy::Request,
    answered: oneshot::Receiver<T>,
) -> Result<T, No> {
    let ending = || no(StatusCode::SERVICE_UNAVAILABLE, "the agent is ending");
    control.deployer.send(request).await.map_err(|_| ending())?;
    answered.await.map_err(|_| ending())
}

fn wrong_base(tree: TreeDigest, error: impl Into<String>) -> No {
    let mut answer = no(StatusCode::CONFLICT, error);
    answer.1.tree = Some(tree);
    answer
}

fn refuse_push(control: &Control, error: &ReceiveError) -> No {
    let tree = control.shared.status().tree;
    match error {
        ReceiveError::WrongBase { .. } => wrong_base(tree, error.to_string()),
        error if error.is_internal() => no(StatusCode::INSUFFICIENT_STORAGE, error.to_string()),
        error => no(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
    }
}

/// Reads a whole body within bounds and checks that it is the signed one.
async fn read_body(control: &Control, mut body: Body, expected: Digest) -> Result<WholeBody, No> {
    let busy = || {
        no(
            StatusCode::SERVICE_UNAVAILABLE,
            "the agent is receiving other pushes; try again",
        )
    };
    let place = Arc::clone(&control.bodies).try_acquire_owned();
    let place = place.map_err(|_| busy())?;
    let reading = async {
        let mut bytes = Vec::new();
        loop {
            let frame = running_timeout(BODY_PAUSE_LIMIT, body.frame());
            let slow = |_| no(StatusCode::REQUEST_TIMEOUT, "the body stopped arriving");
            let Some(frame) = frame.await.map_err(slow)? else {
                return Ok(bytes);
            };
            let frame = frame.map_err(|error| {
                no(
                    StatusCode::BAD_REQUEST,
                    format!("the body broke off: {error}"),
                )
            })?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if bytes.len() as u64 + data.len() as u64 > MAX_BODY_BYTES {
                let limit = MAX_BODY_BYTES >> 20;
                return Err(no(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    format!("the body is larger than {limit} MiB"),
                ));
            }
            bytes.extend_from_slice(&data);
        }
    };
    let bytes = running_timeout(BODY_LIMIT, reading)
        .await
        .map_err(|_| no(StatusCode::REQUEST_TIMEOUT, "the body took too long"))??;
    if Digest::of(&bytes) != expected {
        return Err(no(
            StatusCode::UNAUTHORIZED,
            "the body is not the one that was signed",
        ));
    }
    Ok(WholeBody {
        bytes,
        _place: place,
    })
}

#[derive(Deserialize)]
struct From {
    #[serde(default)]
    from: u64,
}

async fn events(
    State(control): State<Control>,
    Path(id): Path<String>,
    Query(From { from }): Query<From>,
) -> Result<Response, No> {
    let events = control.shared.events(parse_push_id(&id)?);
    let events = events.ok_or_else(|| no(StatusCode::NOT_FOUND, "the agent knows no such push"))?;
    Ok(event_stream(&events, from))
}

async fn tree(State(control): State<Control>) -> impl IntoResponse {
    Json(control.shared.manifest().as_ref().clone())
}

async fn status(State(control): State<Control>) -> Json<Status> {
    Json(control.shared.status())
}

async fn history(State(control): State<Control>) -> impl IntoResponse {
    Json(control.shared.history())
}

#[derive(Deserialize)]
struct Logs {
    #[serde(default)]
    follow: bool,
}

async fn logs(State(control): State<Control>, Query(Logs { follow }): Query<Logs>) -> Response {
    let line = |line: crate::output::OutputLine| Ok::<_, Infallible>(Bytes::from(line.text + "\n"));
    let body = if follow {
        Body::from_stream(control.shared.output.follow().map(line))
    } else {
        Body::from_stream(stream::iter(control.shared.output.recent()).map(line))
    };
    ([(CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response()
}

async fn build_log(
    State(control): State<Control>,
    Path(build): Path<String>,
    Query(From { from }): Query<From>,
    headers: HeaderMap,
) -> Result<Response, No> {
    let number = match build.as_str() {
        "latest" => None,
        number => Some(number.parse().map_err(|_| {
            no(
                StatusCode::NOT_FOUND,
                "a build is named by its number or `latest`",
            )
        })?),
    };
    let log = control
        .shared
        .build_log(number)
        .ok_or_else(|| no(StatusCode::NOT_FOUND, "there is no such build"))?;
    let lines = lines(&log, from);
    let accept = headers
        .get(ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    Ok(if accept.contains("text/event-stream") {
        let events = lines.map(|(number, text)| {
            Ok::<_, Infallible>(sse::Event::default().id(number.to_string()).data(text))
        });
        Sse::new(events)
            .keep_alive(sse::KeepAlive::new().interval(HEARTBEAT_EVERY))
            .into_response()
    } else if accept.contains("ndjson") {
        let lines = lines.map(|(seq, text)| {
            json_line(&Event {
                seq,
                kind: EventKind::Log { text },
            })
        });
        (
            [(CONTENT_TYPE, "application/x-ndjson")],
            Body::from_stream(lines),
        )
            .into_response()
    } else {
        let lines = lines.map(|(_, text)| Ok::<_, Infallible>(Bytes::from(text + "\n")));
        (
            [(CONTENT_TYPE, "text/plain; charset=utf-8")],
            Body::from_stream(lines),
        )
            .into_response()
    })
}

/// The kept lines of a log after number `from`, until it ends.
fn lines(log: &Arc<Record<String>>, from: u64) -> impl Stream<Item = (u64, String)> + Send + use<> {
    log.follow(from).filter_map(async |item| match item {
        Item::Kept(number, text) => Some((number, text)),
        Item::Passing(..) => None,
    })
}

#[derive(Deserialize)]
struct Cancel {
    push: Option<String>,
}

async fn cancel(
    State(control): State<Control>,
    Query(query): Query<Cancel>,
) -> Result<Json<bool>, No> {
    let push = query.push.as_deref().map(parse_push_id).transpose()?;
    let (answer, answered) = oneshot::channel();
    Ok(Json(
        ask(&control, deploy::Request::Cancel { push, answer }, answered).await?,
    ))
}

#[derive(Deserialize)]
struct Rollback {
    generation: Option<u64>,
}

async fn rollback(
    State(control): State<Control>,
    Query(Rollback { generation }): Query<Rollback>,
    request: Request,
) -> Result<Response, No> {
    let (id, by) = (new_push_id(), signer(&request)?.name);
    let (answer, answered) = oneshot::channel();
    follow(
        &control,
        deploy::Request::Rollback {
            id,
            generation,
            by,
            answer,
        },
        answered,
    )
    .await
}

async fn restart(State(control): State<Control>, request: Request) -> Result<Response, No> {
    let (id, by) = (new_push_id(), signer(&request)?.name);
    let (answer, answered) = oneshot::channel();
    follow(
        &control,
        deploy::Request::Restart { id, by, answer },
        answered,
    )
    .await
}

#[derive(Deserialize)]
struct Stop {
    #[serde(default)]
    agent: bool,
}

async fn stop(
    State(control): State<Control>,
    Query(Stop { agent }): Query<Stop>,
) -> Result<Json<Status>, No> {
    let (answer, answered) = oneshot::channel();
    ask(&control, deploy::Request::Stop { answer }, answered).await?;
    if agent {
        control.end_agent.cancel();
    }
    Ok(Json(control.shared.status()))
}

/// The events after number `from`, one JSON object a line, with a heartbeat where nothing else happens.
fn event_stream(events: &Events, from: u64) -> Response {
    let follower = Box::pin(events.follow(from));
    let lines = stream::unfold((follower, from), |(mut follower, last)| async move {
        let event = match running_timeout(HEARTBEAT_EVERY, follower.next()).await {
            Ok(Some(Item::Kept(seq, kind) | Item::Passing(seq, kind))) => Event { seq, kind },
            Ok(None) => return None,
            Err(_) => Event {
                seq: last,
                kind: EventKind::Heartbeat,
            },
        };
        let seq = event.seq;
        Some((json_line(&event), (follower, seq)))
    });
    (
        [(CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response()
}

fn json_line(event: &Event) -> Result<Bytes, serde_json::Error> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    Ok(line.into())
}

fn signer(request: &Request) -> Result<Signer, No> {
    let signer = request.extensions().get::<Signer>().cloned();
    signer.ok_or_else(|| no(StatusCode::UNAUTHORIZED, "the request is not signed"))
}

fn encoding(headers: &HeaderMap) -> String {
    headers
        .get(CONTENT_ENCODING)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .to_owned()
}

fn parse_push_id(text: &str) -> Result<PushId, No> {
    text.parse().map_err(|_| {
        no(
            StatusCode::NOT_FOUND,
            "a push's id is 12 letters of base64url",
        )
    })
}

fn new_push_id() -> PushId {
    let mut bytes = [0; 9];
    // Without randomness the agent would not have started: its boot id needs it too.
    let _ = getrandom::fill(&mut bytes);
    PushId::from_random(bytes)
}

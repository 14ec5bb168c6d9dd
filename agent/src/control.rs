//! The control routes under `/_rrun/`: every request is checked by the [`Gate`] first, then reads a snapshot or sends the
//! deployer a request. Nothing here changes the agent's state itself.

use std::{
    convert::Infallible,
    io::{self, Read},
    sync::Arc,
    time::Duration,
};

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
    routing::{MethodRouter, get, post, put},
};
use futures_util::{Stream, StreamExt as _, stream};
use http_body_util::BodyExt as _;
use hyper::body::Body as _;
use rrun_protocol::{
    Arrived, BOOT_HEADER, CONTROL_PREFIX, Digest, Event, EventKind, HEARTBEAT_EVERY,
    MAX_BODY_BYTES, PushId, Refusal, Status, TreeDigest, UPLOAD_PART_BYTES,
};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    authorize::{Gate, Signer},
    clock::running_timeout,
    queue,
    receive::{ReceiveError, Received, receive},
    record::{Item, Record},
    room,
    shared::{Events, Shared},
    uploads::{PartError, UploadError, Uploads},
};

/// Bodies that are read at once: each may take [`MAX_BODY_BYTES`] of memory, and one developer sends one at a time.
const MAX_BODIES: usize = 4;
/// Pushes that are taken apart at once: each may take a compression prefix twice and the decoder's window of memory.
const MAX_TAKEN_APART: usize = 1;
/// How long a body may take altogether: 31 MiB at 0.5 Mbit/s, the slowest uplink that this is for.
const BODY_LIMIT: Duration = Duration::from_secs(10 * 60);
/// How long a body may pause.
const BODY_PAUSE_LIMIT: Duration = Duration::from_secs(30);

/// Longest refusal of the framework's own that is passed on.
const MAX_REFUSAL_BYTES: usize = 4 << 10;

/// What the routes share.
#[derive(Clone)]
struct Control {
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    deployer: mpsc::Sender<queue::Request>,
    uploads: Arc<Uploads>,
    bodies: Arc<Semaphore>,
    taking_apart: Arc<Semaphore>,
    end_agent: CancellationToken,
}

/// The routes. `end_agent` is cancelled when a client asks the agent itself to end.
pub(crate) fn routes(
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    deployer: mpsc::Sender<queue::Request>,
    uploads: Arc<Uploads>,
    end_agent: CancellationToken,
) -> Router {
    let control = Control {
        gate,
        shared,
        deployer,
        uploads,
        bodies: Arc::new(Semaphore::new(MAX_BODIES)),
        taking_apart: Arc::new(Semaphore::new(MAX_TAKEN_APART)),
        end_agent,
    };
    let all = TABLE
        .into_iter()
        .fold(Router::new(), |router, (method, path)| {
            router.route(path, handler(method, path))
        });
    all.fallback(not_found)
        .method_not_allowed_fallback(not_found)
        // Around everything above, the fallbacks too: a route that is added is behind it.
        .layer(middleware::from_fn_with_state(control.clone(), authorize))
        .with_state(control)
}

/// Every route, as method and path. A route that does not stand here does not exist, and the tests walk through all of it.
pub const TABLE: [(&str, &str); 13] = [
    ("POST", "/_rrun/pushes/{id}"),
    ("GET", "/_rrun/pushes/{id}/events"),
    ("GET", "/_rrun/uploads/{upload}"),
    ("PUT", "/_rrun/uploads/{upload}/{part}"),
    ("GET", "/_rrun/tree"),
    ("GET", "/_rrun/builds/{build}/log"),
    ("GET", "/_rrun/status"),
    ("GET", "/_rrun/logs"),
    ("GET", "/_rrun/history"),
    ("POST", "/_rrun/cancel"),
    ("POST", "/_rrun/rollback"),
    ("POST", "/_rrun/restart"),
    ("POST", "/_rrun/stop"),
];

/// What answers a route of the table.
fn handler(method: &str, path: &str) -> MethodRouter<Control> {
    match (method, path.strip_prefix(CONTROL_PREFIX).unwrap_or(path)) {
        ("POST", "pushes/{id}") => post(push),
        ("GET", "pushes/{id}/events") => get(events),
        ("GET", "uploads/{upload}") => get(arrived),
        ("PUT", "uploads/{upload}/{part}") => put(part),
        ("GET", "tree") => get(tree),
        ("GET", "builds/{build}/log") => get(build_log),
        ("GET", "status") => get(status),
        ("GET", "logs") => get(logs),
        ("GET", "history") => get(history),
        ("POST", "cancel") => post(cancel),
        ("POST", "rollback") => post(rollback),
        ("POST", "restart") => post(restart),
        ("POST", "stop") => post(stop),
        _ => unreachable!("{method} {path} stands in the table without a handler"),
    }
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

/// Lets signed requests through, and marks every answer as the agent's.
async fn authorize(State(control): State<Control>, mut request: Request, next: Next) -> Response {
    let path_and_query = request
        .uri()
        .path_and_query()
        .map_or("", |path| path.as_str());
    let checked = control
        .gate
        .check(request.method().as_str(), path_and_query, request.headers());
    let mut response = match checked {
        Ok(signer) => {
            request.extensions_mut().insert(signer);
            in_json(next.run(request).await).await
        }
        Err((status, refusal)) => No(status, refusal).into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Ok(boot) = HeaderValue::from_str(&control.shared.status().boot.to_string()) {
        headers.insert(BOOT_HEADER, boot);
    }
    response
}

/// Gives a refusal of the framework's own, as of a query that cannot be read, the form that all refusals have.
async fn in_json(response: Response) -> Response {
    let is_text = response
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/plain"));
    if !response.status().is_client_error() || !is_text {
        return response;
    }
    let status = response.status();
    let text = axum::body::to_bytes(response.into_body(), MAX_REFUSAL_BYTES).await;
    let text = text.unwrap_or_default();
    no(status, String::from_utf8_lossy(&text)).into_response()
}

async fn not_found() -> No {
    no(StatusCode::NOT_FOUND, "the agent has no such route")
}

#[derive(Deserialize)]
struct Push {
    /// What follows the body.
    upload: Option<String>,
}

async fn push(
    State(control): State<Control>,
    Path(id): Path<String>,
    Query(Push { upload }): Query<Push>,
    request: Request,
) -> Result<Response, No> {
    let id = parse_push_id(&id)?;
    if let Some(events) = control.shared.events(id) {
        return Ok(event_stream(&events, 0));
    }
    let upload = upload.as_deref().map(parse_upload).transpose()?;
    let signer = signer(&request)?;
    let encoding = encoding(request.headers());
    let body = read_body(&control, request.into_body(), signer.body, MAX_BODY_BYTES).await?;
    let base = control.shared.manifest();
    let received = match receive_with(&control, body, upload, encoding).await? {
        // What it starts from went while it was read.
        Err(error) if error.is_internal() && !Arc::ptr_eq(&base, &control.shared.manifest()) => {
            return Err(wrong_base(control.shared.status().tree, error.to_string()));
        }
        Err(error) if error.is_no_room() => {
            return Err(no_room(&control, &error).await);
        }
        received => received.map_err(|error| refuse_push(&control, &error))?,
    };
    let (answer, answered) = oneshot::channel();
    let request = queue::Request::Push {
        id,
        received: Box::new(received),
        by: signer.name,
        answer: answer.into(),
    };
    let answer = follow(&control, request, answered).await?;
    // Kept until here: a push that breaks before its first event is sent again without its upload.
    upload.inspect(|upload| control.uploads.drop_upload(upload));
    Ok(answer)
}

/// Takes a push apart that consists of `body` and of `upload`, if there is one. That goes on if the client leaves, so what
/// bounds it goes with it.
async fn receive_with(
    control: &Control,
    body: WholeBody,
    upload: Option<Digest>,
    encoding: String,
) -> Result<Result<Received, ReceiveError>, No> {
    let (shared, uploads) = (Arc::clone(&control.shared), Arc::clone(&control.uploads));
    let turn = Arc::clone(&control.taking_apart).acquire_owned().await;
    let received = blocking(move || {
        let _turn = turn;
        let upload: Box<dyn Read> = match upload {
            Some(upload) => Box::new(
                uploads
                    .open(&upload)
                    .map_err(|error| refuse_upload(&error))?,
            ),
            None => Box::new(io::empty()),
        };
        let (base, body) = (shared.manifest(), body.bytes.chain(upload));
        Ok(receive(&shared.layout, &base, body, &encoding))
    });
    received.await?
}

/// Does what reads and writes files where it holds nobody up.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, No> {
    let worked = tokio::task::spawn_blocking(work).await;
    worked.map_err(|error| no(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

async fn arrived(
    State(control): State<Control>,
    Path(upload): Path<String>,
) -> Result<Json<Arrived>, No> {
    Ok(Json(control.uploads.arrived(&parse_upload(&upload)?)))
}

async fn part(
    State(control): State<Control>,
    Path((upload, part)): Path<(String, u32)>,
    request: Request,
) -> Result<StatusCode, No> {
    let upload = parse_upload(&upload)?;
    let expected = signer(&request)?.body;
    let body = read_body(&control, request.into_body(), expected, UPLOAD_PART_BYTES).await?;
    let uploads = Arc::clone(&control.uploads);
    let stored = blocking(move || uploads.store(upload, part, &body.bytes)).await?;
    match stored {
        Err(PartError::Store(error)) if room::is_full(&error) => {
            Err(no_room(&control, &PartError::Store(error)).await)
        }
        stored => stored
            .map(|()| StatusCode::NO_CONTENT)
            .map_err(|error| refuse_part(&error)),
    }
}

/// The refusal of a push that found the disk full, after room was made for the next one.
async fn no_room(control: &Control, error: &impl std::fmt::Display) -> No {
    control.uploads.drop_all();
    let (answer, answered) = oneshot::channel();
    let request = queue::Request::MakeRoom { answer };
    let hint = ask(control, request, answered).await.ok().flatten();
    let folder = control.shared.layout.staging();
    let mut refusal = no(
        StatusCode::INSUFFICIENT_STORAGE,
        format!("{error} (in `{}`)", folder.display()),
    );
    refusal.1.hint = hint;
    refusal
}

/// A body in memory, which counts against [`MAX_BODIES`] for as long as it is there.
struct WholeBody {
    bytes: Vec<u8>,
    _place: OwnedSemaphorePermit,
}

/// Hands an exchange to the deployer and answers with its events.
async fn follow(
    control: &Control,
    request: queue::Request,
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
    request: queue::Request,
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

fn refuse_upload(error: &UploadError) -> No {
    let status = match error {
        UploadError::Incomplete(_) => StatusCode::NOT_FOUND,
        UploadError::Wrong(_) => StatusCode::UNPROCESSABLE_ENTITY,
        UploadError::Read(_) => StatusCode::INSUFFICIENT_STORAGE,
    };
    no(status, error.to_string())
}

fn refuse_part(error: &PartError) -> No {
    let status = match error {
        PartError::TooLarge | PartError::NoRoom(_) => StatusCode::PAYLOAD_TOO_LARGE,
        PartError::Store(_) => StatusCode::INSUFFICIENT_STORAGE,
    };
    no(status, error.to_string())
}

/// Reads a whole body of at most `limit` bytes, in time, and checks that it is the signed one.
async fn read_body(
    control: &Control,
    mut body: Body,
    expected: Digest,
    limit: u64,
) -> Result<WholeBody, No> {
    let too_large = || {
        let limit = limit >> 20;
        no(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is larger than {limit} MiB"),
        )
    };
    if body.size_hint().lower() > limit {
        return Err(too_large());
    }
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
            if bytes.len() as u64 + data.len() as u64 > limit {
                return Err(too_large());
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

#[derive(Deserialize)]
struct Take {
    #[serde(default)]
    from: u64,
    /// `false` asks for what is there now: for clients behind something that holds streams back until they end.
    wait: Option<bool>,
}

async fn events(
    State(control): State<Control>,
    Path(id): Path<String>,
    Query(Take { from, wait }): Query<Take>,
) -> Result<Response, No> {
    let events = control.shared.events(parse_push_id(&id)?);
    let events = events.ok_or_else(|| no(StatusCode::NOT_FOUND, "the agent knows no such push"))?;
    Ok(match wait {
        Some(false) => event_list(&events, from),
        _ => event_stream(&events, from),
    })
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
        ndjson(Body::from_stream(lines))
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
        ask(&control, queue::Request::Cancel { push, answer }, answered).await?,
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
        queue::Request::Rollback {
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
        queue::Request::Restart { id, by, answer },
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
    ask(&control, queue::Request::Stop { answer }, answered).await?;
    if agent {
        control.end_agent.cancel();
    }
    Ok(Json(control.shared.status()))
}

/// The events after number `from`, one JSON object a line. The first line comes at once, which shows that nothing holds the
/// stream back; where nothing happens there are heartbeats.
fn event_stream(events: &Events, from: u64) -> Response {
    let follower = Box::pin(events.follow(from));
    let start = (follower, from, Duration::ZERO);
    let lines = stream::unfold(start, |(mut follower, last, patience)| async move {
        let event = match running_timeout(patience, follower.next()).await {
            Ok(Some(Item::Kept(seq, kind) | Item::Passing(seq, kind))) => Event { seq, kind },
            Ok(None) => return None,
            Err(_) => Event {
                seq: last,
                kind: EventKind::Heartbeat,
            },
        };
        let seq = event.seq;
        Some((json_line(&event), (follower, seq, HEARTBEAT_EVERY)))
    });
    ndjson(Body::from_stream(lines))
}

/// The events after number `from` that are there now.
fn event_list(events: &Events, from: u64) -> Response {
    let lines = events.kept_after(from).into_iter();
    let lines = lines.map(|(seq, kind)| json_line(&Event { seq, kind }));
    ndjson(Body::from_stream(stream::iter(lines)))
}

fn ndjson(body: Body) -> Response {
    ([(CONTENT_TYPE, "application/x-ndjson")], body).into_response()
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

fn parse_upload(text: &str) -> Result<Digest, No> {
    text.parse().map_err(|_| {
        no(
            StatusCode::NOT_FOUND,
            "an upload is named by the 64 hexadecimal digits of its digest",
        )
    })
}

fn new_push_id() -> PushId {
    let mut bytes = [0; 9];
    // Without randomness the agent would not have started: its boot id needs it too.
    let _ = getrandom::fill(&mut bytes);
    PushId::from_random(bytes)
}

#[cfg(test)]
mod tests {
    use axum::http;
    use rrun_protocol::{
        Authorization, BootId, MAX_UPLOADS_BYTES, Nonce, PrivateKey, SIGNATURE_HEADER,
        SignedRequest, part_path,
    };
    use tokio::time::{Duration, Instant};
    use tower::ServiceExt as _;

    use super::*;
    use crate::{authorize::seconds_since_1970, layout::Layout, output::Output};

    struct Bench {
        _folder: tempfile::TempDir,
        routes: Router,
        uploads: Arc<Uploads>,
        _requests: mpsc::Receiver<queue::Request>,
    }

    fn boot() -> BootId {
        BootId::from_random([1; 9])
    }

    fn bench() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::create(folder.path()).unwrap();
        let output = Output::to(tokio::io::sink(), tokio::io::sink());
        let shared = Shared::new(layout.clone(), output, boot());
        let key = PrivateKey::from_seed(&[1; 32]).public_key("ann");
        let gate = Arc::new(Gate::new(vec![key], boot()));
        let uploads = Arc::new(Uploads::new(layout, MAX_UPLOADS_BYTES));
        let (deployer, requests) = mpsc::channel(1);
        let end = CancellationToken::new();
        Bench {
            _folder: folder,
            routes: routes(gate, shared, deployer, Arc::clone(&uploads), end),
            uploads,
            _requests: requests,
        }
    }

    /// Sends `body` as part 0 of an upload, signed as `whole`.
    async fn put(bench: &Bench, upload: &Digest, whole: &[u8], body: Body) -> (StatusCode, String) {
        let path = part_path(upload, 0);
        let signed = SignedRequest {
            method: "PUT",
            path_and_query: &path,
            content_encoding: "",
            body: Digest::of(whole),
        };
        let key = PrivateKey::from_seed(&[1; 32]);
        let mut nonce = [0; 12];
        getrandom::fill(&mut nonce).unwrap();
        let (time, nonce) = (seconds_since_1970(), Nonce::from_random(nonce));
        let header = Authorization::sign(&key, &signed, time, nonce, boot()).to_string();
        let request = http::Request::put(&path).header(SIGNATURE_HEADER, header);
        let request = request.body(body).unwrap();
        let answer = bench.routes.clone().oneshot(request).await.unwrap();
        let status = answer.status();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    /// A body that sends a byte, then one more after each pause.
    fn dripping(pause: Duration) -> Body {
        Body::from_stream(stream::unfold(Duration::ZERO, move |wait| async move {
            tokio::time::sleep(wait).await;
            Some((Ok::<_, Infallible>("x"), pause))
        }))
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_or_drips_is_given_up_and_makes_room_for_the_next() {
        let bench = bench();
        let upload = Digest::of(b"whole");
        // The pause ends the first, the limit the second.
        for (pause, limit) in [
            (Duration::MAX, BODY_PAUSE_LIMIT),
            (BODY_PAUSE_LIMIT - Duration::from_secs(2), BODY_LIMIT),
        ] {
            let started = Instant::now();
            let slow = (0..MAX_BODIES).map(|_| put(&bench, &upload, b"", dripping(pause)));
            let next = async {
                tokio::time::sleep(limit / 2).await;
                put(&bench, &upload, b"whole", Body::from("whole")).await
            };
            let slow = futures_util::future::join_all(slow);
            let (slow, (busy, why)) = tokio::join!(slow, next);
            for (status, why) in slow {
                assert_eq!(status, StatusCode::REQUEST_TIMEOUT, "{why}");
            }
            let took = started.elapsed();
            assert!(took >= limit && took < limit + BODY_PAUSE_LIMIT, "{took:?}");
            assert_eq!(busy, StatusCode::SERVICE_UNAVAILABLE, "{why}");
            assert_eq!(bench.uploads.arrived(&upload), Arrived::default());
        }
        let (status, why) = put(&bench, &upload, b"whole", Body::from("whole")).await;
        assert_eq!(status, StatusCode::NO_CONTENT, "{why}");
        assert_eq!(bench.uploads.arrived(&upload).parts, [0]);
    }
}

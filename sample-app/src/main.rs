//! A small service to push first: change the greeting below, push again, reload the page.

/// What `/` and `/plain` answer.
const GREETING: &str = "Hello from rrun!";

use std::{
    env, io,
    net::Ipv4Addr,
    process::{self, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Router, body::Body, extract::State, response::Html, routing::get};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_stream::StreamExt as _;
use tracing::{error, info};

/// Where to listen if `PORT` does not say it.
const DEFAULT_PORT: u16 = 8080;
/// How many lines `/stream` sends.
const STREAM_LINES: usize = 25;
/// How long it waits between two of them.
const STREAM_PAUSE: Duration = Duration::from_millis(200);

/// What lives in memory: every version that is pushed starts with its own.
struct App {
    started: Instant,
    visits: AtomicU64,
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().with_target(false).init();
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> io::Result<()> {
    let port = port(env::var("PORT").ok())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => info!("SIGTERM: finishing the requests under way"),
            _ = interrupt.recv() => info!("SIGINT: finishing the requests under way"),
        }
    };
    // All interfaces, not only loopback: requests to a container come from outside of it.
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("port {port}: {error}")))?;
    info!("listening on {}", listener.local_addr()?);
    serve(listener, shutdown).await?;
    info!("done");
    Ok(())
}

/// Serves until `shutdown`, then finishes the requests under way.
async fn serve(
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, router())
        .with_graceful_shutdown(shutdown)
        .await
}

fn router() -> Router {
    let app = App {
        started: Instant::now(),
        visits: AtomicU64::new(0),
    };
    Router::new()
        .route("/", get(page))
        .route("/plain", get(plain))
        .route("/stream", get(stream))
        .with_state(Arc::new(app))
}

async fn page(State(app): State<Arc<App>>) -> Html<String> {
    let visit = app.visits.fetch_add(1, Ordering::Relaxed) + 1;
    info!(visit, "somebody looks at the page");
    let page = include_str!("page.html")
        .replace("{greeting}", GREETING)
        .replace("{visit}", &visit.to_string())
        .replace("{process}", &process::id().to_string())
        .replace("{uptime}", &app.started.elapsed().as_secs().to_string());
    Html(page)
}

async fn plain() -> String {
    format!("{GREETING}\n")
}

/// Sends line by line, so that it takes a while: a push in the meantime does not cut it off.
async fn stream() -> Body {
    let lines = tokio_stream::iter(1..=STREAM_LINES)
        .throttle(STREAM_PAUSE)
        .map(|line| Ok::<_, io::Error>(format!("{line} of {STREAM_LINES}: {GREETING}\n")));
    Body::from_stream(lines)
}

/// The port that the environment asks for.
fn port(variable: Option<String>) -> io::Result<u16> {
    let Some(text) = variable else {
        info!("PORT is not set, taking {DEFAULT_PORT}");
        return Ok(DEFAULT_PORT);
    };
    text.parse().map_err(|error| {
        let message = format!("PORT is `{text}`, which is not a port: {error}");
        io::Error::new(io::ErrorKind::InvalidInput, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{
        body::to_bytes,
        http::{Request, StatusCode},
    };
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
        sync::oneshot,
    };
    use tower::ServiceExt as _;

    async fn get(router: &Router, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let answer = router.clone().oneshot(request).await.unwrap();
        let status = answer.status();
        let body = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn the_page_greets_and_counts_its_visits() {
        let router = router();
        for visit in ["visit <b>1</b>", "visit <b>2</b>"] {
            let (status, body) = get(&router, "/").await;
            assert_eq!(status, StatusCode::OK);
            assert!(body.contains(GREETING) && body.contains(visit), "{body}");
            assert!(!body.contains("{greeting}"), "{body}");
        }
    }

    #[tokio::test]
    async fn plain_text_is_the_greeting_alone() {
        let router = router();
        let (status, body) = get(&router, "/plain").await;
        assert_eq!((status, body), (StatusCode::OK, format!("{GREETING}\n")));
        assert_eq!(get(&router, "/nowhere").await.0, StatusCode::NOT_FOUND);
    }

    #[tokio::test(start_paused = true)]
    async fn the_stream_takes_its_time_and_ends() {
        let start = tokio::time::Instant::now();
        let (status, body) = get(&router(), "/stream").await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(body.lines().count(), STREAM_LINES);
        let pauses = STREAM_PAUSE * (STREAM_LINES as u32 - 1);
        assert!(start.elapsed() >= pauses, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_shutdown_lets_requests_under_way_finish() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(serve(listener, async {
            stopped.await.unwrap();
        }));

        let mut client = TcpStream::connect(address).await.unwrap();
        client
            .write_all(b"GET /stream HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut answer = vec![0; 64];
        client.read_exact(&mut answer).await.unwrap();
        stop.send(()).unwrap();
        client.read_to_end(&mut answer).await.unwrap();

        let answer = String::from_utf8(answer).unwrap();
        let last = format!("{STREAM_LINES} of {STREAM_LINES}: {GREETING}\n");
        assert!(answer.contains(&last), "{answer}");
        server.await.unwrap().unwrap();
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[test]
    fn the_port_comes_from_the_environment_or_is_named_as_wrong() {
        assert_eq!(port(None).unwrap(), DEFAULT_PORT);
        assert_eq!(port(Some("41233".into())).unwrap(), 41233);
        for wrong in ["", "http", "65536"] {
            let error = port(Some(wrong.into())).unwrap_err().to_string();
            assert!(error.contains(&format!("`{wrong}`")), "{error}");
        }
    }
}

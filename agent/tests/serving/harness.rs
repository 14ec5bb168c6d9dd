//! A front, a service and a folder on this machine, all gone when dropped.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::{Router, routing::any};
use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use rrun_agent::{
    front::{self, Limits},
    output::Output,
    proxy::{Proxy, Route},
    service::{AppSpec, ReplaceError, Replaced, Service},
    upstream::Upstream,
};
use rrun_protocol::{RunPlan, SwapMode};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// Longest that anything here may take before the test counts as hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Stand {
    pub(crate) service: Service,
    pub(crate) output: Output,
    pub(crate) address: SocketAddr,
    pub(crate) folder: TempDir,
    _front: AbortOnDropHandle<std::io::Result<()>>,
}

impl Stand {
    pub(crate) async fn new() -> Self {
        Self::with(|proxy| proxy).await
    }

    pub(crate) async fn with(configure: impl FnOnce(Proxy) -> Proxy) -> Self {
        let output = Output::to(tokio::io::sink(), tokio::io::sink());
        let (service, route) = Service::new(output.clone());
        let proxy = Arc::new(configure(Proxy::new(route)));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let control = Router::new().fallback(any(|| async { "control" }));
        let front = front::serve(listener, control, proxy, std::future::pending());
        Self {
            service,
            output,
            address,
            folder: tempfile::tempdir().unwrap(),
            _front: AbortOnDropHandle::new(tokio::spawn(front)),
        }
    }

    pub(crate) fn spec(&self, generation: u64, args: &[&str]) -> AppSpec {
        let run = RunPlan {
            args: args.iter().map(|arg| arg.to_string()).collect(),
            environment: [("GENERATION".into(), generation.to_string())].into(),
            ready_timeout: Duration::from_secs(30),
            ..RunPlan::default()
        };
        AppSpec {
            generation,
            directory: self.folder.path().to_owned(),
            executable: test_app(),
            run,
            environment: std::env::vars_os()
                .filter(|(name, _)| name == "PATH")
                .collect(),
        }
    }

    pub(crate) async fn push(
        &mut self,
        generation: u64,
        args: &[&str],
    ) -> Result<Replaced, ReplaceError> {
        let spec = self.spec(generation, args);
        self.replace(spec).await
    }

    pub(crate) async fn push_restart(
        &mut self,
        generation: u64,
        args: &[&str],
    ) -> Result<Replaced, ReplaceError> {
        let mut spec = self.spec(generation, args);
        spec.run.swap = SwapMode::Restart;
        self.replace(spec).await
    }

    pub(crate) async fn replace(&mut self, spec: AppSpec) -> Result<Replaced, ReplaceError> {
        let never = CancellationToken::new();
        let replaced = self.service.replace(spec, &never);
        tokio::time::timeout(PATIENCE, replaced)
            .await
            .expect("hangs")
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Waits until the app printed a line that starts so, and returns the rest of it.
    pub(crate) async fn printed(&self, generation: u64, start: &str) -> String {
        let found = self.output.follow().filter_map(|line| {
            let rest = line.text.strip_prefix(start).map(str::to_owned);
            std::future::ready(rest.filter(|_| line.generation == generation))
        });
        let mut found = Box::pin(found);
        tokio::time::timeout(PATIENCE, found.next())
            .await
            .expect("hangs")
            .unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, String) {
        let mut client = Client::connect(self.address).await;
        client.get(path).await
    }

    /// Sends bytes as they are and returns everything until the connection ends.
    pub(crate) async fn raw(&self, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        // A connection that is reset after the answer is an end too.
        let _ = tokio::time::timeout(PATIENCE, read).await.expect("hangs");
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// The same for a connection that may stay open: until nothing more comes for a moment.
    pub(crate) async fn raw_until_quiet(&self, request: &[u8]) -> String {
        const QUIET: Duration = Duration::from_millis(300);
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        while let Ok(Ok(1..)) = tokio::time::timeout(QUIET, stream.read_buf(&mut answer)).await {}
        String::from_utf8_lossy(&answer).into_owned()
    }
}

/// A front alone, before whatever its route leads to.
pub(crate) struct Bare {
    pub(crate) address: SocketAddr,
    pub(crate) route: watch::Sender<Route>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) served: AbortOnDropHandle<std::io::Result<()>>,
}

impl Bare {
    pub(crate) async fn before(app: SocketAddr) -> Self {
        Self::within(Limits::default(), app).await
    }

    pub(crate) async fn within(limits: Limits, app: SocketAddr) -> Self {
        let (route, watched) = watch::channel(Route::To(Upstream::new(1, app)));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let proxy = Arc::new(Proxy::new(watched));
        let shutdown = CancellationToken::new();
        let stop = shutdown.clone().cancelled_owned();
        let front = front::serve_within(limits, listener, Router::new(), proxy, stop);
        Self {
            address,
            route,
            shutdown,
            served: AbortOnDropHandle::new(tokio::spawn(front)),
        }
    }
}

/// An app inside the test that does with every connection what it is told.
pub(crate) async fn app<Behaviour, Done>(behave: Behaviour) -> SocketAddr
where
    Behaviour: Fn(TcpStream) -> Done + Send + 'static,
    Done: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(behave(stream));
        }
    });
    address
}

/// Reads a request's head, byte by byte, so that nothing behind it is taken along; empty at the connection's end.
pub(crate) async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return String::new(),
        }
    }
    String::from_utf8(head).unwrap()
}

/// Everything until the connection ends, in whatever way.
pub(crate) async fn rest(stream: &mut TcpStream) -> String {
    let mut rest = Vec::new();
    let read = stream.read_to_end(&mut rest);
    let _ = tokio::time::timeout(PATIENCE, read).await.expect("hangs");
    String::from_utf8_lossy(&rest).into_owned()
}

/// One keep-alive connection.
pub(crate) struct Client {
    sender: http1::SendRequest<Full<Bytes>>,
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self { sender }
    }

    pub(crate) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Response<hyper::body::Incoming> {
        self.sender.ready().await.unwrap();
        let response = self.sender.send_request(request);
        tokio::time::timeout(PATIENCE, response)
            .await
            .expect("hangs")
            .unwrap()
    }

    pub(crate) async fn get(&mut self, path: &str) -> (StatusCode, String) {
        let request = Request::get(path)
            .header("host", "test")
            .body(Full::default())
            .unwrap();
        let response = self.send(request).await;
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }
}

/// The example `test-app`, which cargo builds beside the tests.
fn test_app() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let app = test
        .parent()
        .unwrap()
        .with_file_name("examples")
        .join("test-app");
    assert!(
        app.exists(),
        "{} is missing: run `cargo build -p rrun-agent --examples`",
        app.display()
    );
    app
}

/// Waits until something is true that tells nobody when it becomes so.
pub(crate) async fn eventually(mut condition: impl FnMut() -> bool) {
    let true_at_last = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, true_at_last)
        .await
        .expect("never came true");
}

/// Whether a process runs; one that ended and waits for its parent does not.
pub(crate) fn is_alive(process: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{process}/stat")) {
        Ok(stat) => !stat
            .rsplit_once(')')
            .unwrap()
            .1
            .trim_start()
            .starts_with('Z'),
        Err(_) if cfg!(target_os = "linux") => false,
        Err(_) => {
            let process = rustix::process::Pid::from_raw(process.try_into().unwrap()).unwrap();
            rustix::process::test_kill_process(process).is_ok()
        }
    }
}

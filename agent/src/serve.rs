//! `rrun-agent serve`: puts the parts together, and takes them apart in order when it is told to stop.

use std::{
    ffi::OsString,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use rrun_protocol::{BootId, MAX_UPLOADS_BYTES, PublicKey};
use rustix::process::Signal;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Workspace,
    app::AppSpec,
    authorize::Gate,
    child, control, front,
    layout::Layout,
    output::Output,
    platform,
    proxy::Proxy,
    publish::Generations,
    queue::{Deployer, End},
    service::Service,
    shared::Shared,
    tree::Tree,
    uploads::Uploads,
};

/// How long answers under way may take once everything else has ended; by the clock, like all of the end.
const LAST_ANSWERS_LIMIT: Duration = Duration::from_secs(1);

/// How often the workspace's lock is tried: some seconds, in which a machine with too much to do starts a process.
const LOCK_TRIES: u32 = 500;
/// Pause between these tries.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// What `serve` is told.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Port to serve on; 0 takes a free one
    #[arg(long, env = "PORT", default_value_t = 8080)]
    port: u16,
    /// Address to serve on
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0")]
    bind: IpAddr,
    #[command(flatten)]
    workspace: Workspace,
    /// Public keys that may push, as `rrun key` prints them, one a line or between commas
    #[arg(
        long,
        value_name = "KEYS",
        env = "RRUN_AUTHORIZED_KEYS",
        hide_env_values = true
    )]
    authorized_keys: Option<String>,
    /// File with public keys that may push
    #[arg(long, value_name = "FILE", env = "RRUN_AUTHORIZED_KEYS_FILE")]
    authorized_keys_file: Option<PathBuf>,
    /// Writes process id, port, version and boot id to this file once the agent listens
    #[arg(long, value_name = "FILE", hide = true)]
    announce: Option<PathBuf>,
}

pub(crate) async fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let keys = authorized_keys(&arguments)?;
    // Before anything that takes time: as process 1 it would not get a signal that nobody has asked for.
    let stop = CancellationToken::new();
    tokio::spawn(stop_at_signal(stop.clone())?);
    let layout = Layout::create(&arguments.workspace.folder)?;
    let _lock = lock(&layout).await?;
    tokio::spawn(child::reap_orphans());
    child::end_leftovers(&layout).await?;
    let address = SocketAddr::new(arguments.bind, arguments.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    let port = listener.local_addr()?.port();
    let boot = new_boot_id()?;

    let tree = Tree::open(&layout)?;
    let generations = Generations::open(&layout)?;
    let output = Output::new();
    let shared = Shared::new(layout.clone(), output.clone(), boot);
    let (service, route) = Service::new(output);
    shared.set_service(service.view());
    if generations.serving().is_some() {
        service.hold("the version that served last is being started");
    }
    let (deployer, requests) = Deployer::new(
        tree,
        generations,
        service,
        Arc::clone(&shared),
        app_environment(),
    );
    let gate = Arc::new(Gate::new(keys, boot));
    let uploads = Arc::new(Uploads::new(layout, MAX_UPLOADS_BYTES));
    let routes = control::routes(
        gate,
        Arc::clone(&shared),
        requests,
        Arc::clone(&uploads),
        stop.clone(),
    );
    let proxy = Arc::new(Proxy::new(route));

    let close = CancellationToken::new();
    let front = tokio::spawn(front::serve(
        listener,
        routes,
        proxy,
        close.clone().cancelled_owned(),
    ));
    tokio::spawn(pass_on_signals(Arc::clone(&shared))?);
    tracing::info!("listening on {}", SocketAddr::new(arguments.bind, port));
    if let Some(file) = &arguments.announce {
        announce(file, port, boot)?;
    }

    let end = tokio::select! {
        end = deployer.run(stop) => end,
        never = uploads.forget_idle() => match never {},
    };
    close.cancel();
    // Who follows a log would keep its connection for ever.
    let _ = tokio::time::timeout(LAST_ANSWERS_LIMIT, front).await;
    // Whatever took longer than its limit.
    let _ = tokio::task::spawn_blocking(child::kill_rest).await.is_ok();
    match end {
        End::Stopped => Ok(()),
        End::HandOver(spec) => Err(become_app(&spec, port)),
    }
}

/// The keys that may push. Without one the agent does not start: it would answer nobody.
fn authorized_keys(arguments: &Arguments) -> anyhow::Result<Vec<PublicKey>> {
    let mut keys = Vec::new();
    if let Some(text) = &arguments.authorized_keys {
        keys.extend(PublicKey::parse_list(text).context("RRUN_AUTHORIZED_KEYS")?);
    }
    if let Some(file) = &arguments.authorized_keys_file {
        let name = file.display();
        let text = fs::read_to_string(file).with_context(|| format!("cannot read `{name}`"))?;
        keys.extend(PublicKey::parse_list(&text).with_context(|| format!("`{name}`"))?);
    }
    ensure!(
        !keys.is_empty(),
        "no key may push here (hint: put the line that `rrun key` prints into RRUN_AUTHORIZED_KEYS)"
    );
    Ok(keys)
}

/// Two agents in one workspace would build over each other.
///
/// An agent that was killed may hold the lock a little longer: through a process that it was starting, which has its files
/// until it executes. Once the lock is free, everything that agent started shows what it is.
async fn lock(layout: &Layout) -> anyhow::Result<fs::File> {
    let path = layout.state("lock");
    let file =
        fs::File::create(&path).with_context(|| format!("cannot open `{}`", path.display()))?;
    let mut tries = 0;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) if tries < LOCK_TRIES => {
                tries += 1;
                tokio::time::sleep(LOCK_PAUSE).await;
            }
            Err(fs::TryLockError::WouldBlock) => bail!(
                "another agent works in this workspace: `{}` is locked",
                path.display()
            ),
            Err(fs::TryLockError::Error(error)) => {
                return Err(error).context("cannot lock the workspace");
            }
        }
    }
}

fn new_boot_id() -> anyhow::Result<BootId> {
    let mut bytes = [0; 9];
    getrandom::fill(&mut bytes)
        .map_err(|error| anyhow::anyhow!("the system gives no random bytes: {error}"))?;
    Ok(BootId::from_random(bytes))
}

/// The container's environment as the app gets it: all but what is rrun's own.
fn app_environment() -> Vec<(OsString, OsString)> {
    let is_ours = |name: &OsString| name.as_encoded_bytes().starts_with(b"RRUN_");
    std::env::vars_os()
        .filter(|(name, _)| !is_ours(name))
        .collect()
}

/// Whatever asks the agent to end: nothing that it started may be left behind.
fn stop_at_signal(stop: CancellationToken) -> std::io::Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut quit = signal(SignalKind::quit())?;
    Ok(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            _ = hang_up.recv() => "SIGHUP",
            _ = quit.recv() => "SIGQUIT",
        };
        tracing::info!("{name}: stopping");
        stop.cancel();
    })
}

/// Passes the signals on that mean something to apps alone.
fn pass_on_signals(shared: Arc<Shared>) -> std::io::Result<impl Future<Output = ()> + Send> {
    let mut first = signal(SignalKind::user_defined1())?;
    let mut second = signal(SignalKind::user_defined2())?;
    Ok(async move {
        loop {
            let signal = tokio::select! {
                _ = first.recv() => Signal::USR1,
                _ = second.recv() => Signal::USR2,
            };
            if let Some(process) = shared.status().process {
                platform::signal(process, signal);
            }
        }
    })
}

fn announce(file: &Path, port: u16, boot: BootId) -> anyhow::Result<()> {
    let content = serde_json::json!({
        "pid": std::process::id(),
        "port": port,
        "version": env!("CARGO_PKG_VERSION"),
        "boot": boot,
    });
    let folder = file.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let new = tempfile::NamedTempFile::new_in(folder)?;
        fs::write(new.path(), content.to_string())?;
        new.persist(file)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write `{}`", file.display()))
}

/// Replaces this process by the app, on the public port. Returns only if that fails.
fn become_app(spec: &AppSpec, port: u16) -> anyhow::Error {
    let error = spec.exec(port);
    anyhow::Error::new(error).context(format!("cannot become `{}`", spec.executable.display()))
}

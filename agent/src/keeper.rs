//! Keeps one generation running: restarts the app when it dies, stops it for a while or for good when told.
//!
//! A keeper is a task with one wish from outside. The wish is level, not edge: whatever happened in between, the keeper
//! works towards the last one. So a pause that is given up in the middle just goes on serving.
//!
//! A generation that is to go is never restarted.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    app::{App, AppSpec, ReadyApp, start_ready},
    clock::running_sleep,
    fault::fault_point,
    output::Output,
    proxy::Route,
    service::Turn,
    upstream::{Leftover, Upstream},
};

/// Time between SIGTERM and SIGKILL.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// How long requests may take before a pause. New ones are held meanwhile, for 30 s at most: this, the stop and the start
/// of the next version have to fit in.
const PAUSE_DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// The same for streams, which do not end by themselves.
const STREAM_PAUSE_LIMIT: Duration = Duration::from_secs(1);
/// Pause before an app that died is started again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// An app that ran for so long has earned the first pause again.
const PROVEN_AFTER: Duration = Duration::from_secs(60);

/// What the keeper is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Keep it running.
    Serve,
    /// Let its requests finish, stop it, hold new requests, and wait.
    Pause,
    /// Let its requests finish, stop it, and end.
    Retire,
}

/// How the generation is doing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept {
    pub(crate) phase: Phase,
    pub(crate) process: Option<u32>,
    pub(crate) restarts: u32,
}

/// Whether requests are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// They are.
    Serving,
    /// They wait.
    Restarting,
}

/// A generation that is kept; dropping it kills the app.
#[derive(Debug)]
pub(crate) struct Keeper {
    spec: Arc<AppSpec>,
    wish: Arc<watch::Sender<Wish>>,
    kept: watch::Receiver<Kept>,
    task: AbortOnDropHandle<()>,
}

impl Keeper {
    /// Keeps an app that is ready and published by `turn`.
    pub(crate) fn start(
        spec: &Arc<AppSpec>,
        (app, upstream): (App, Arc<Upstream>),
        turn: Turn,
        output: Output,
        hurry: watch::Receiver<Option<Duration>>,
    ) -> Self {
        let (wish, wishes) = watch::channel(Wish::Serve);
        let running = Running {
            app,
            upstream,
            since: Instant::now(),
        };
        let (kept, status) = watch::channel(Kept {
            phase: Phase::Serving,
            process: Some(running.app.process()),
            restarts: 0,
        });
        let keeping = Keeping {
            spec: Arc::clone(spec),
            turn,
            output,
            hurry,
            wishes,
            kept,
            pause: FIRST_PAUSE,
            died: None,
        };
        Self {
            spec: Arc::clone(spec),
            wish: Arc::new(wish),
            kept: status,
            task: AbortOnDropHandle::new(tokio::spawn(keeping.run(running))),
        }
    }

    pub(crate) fn spec(&self) -> &Arc<AppSpec> {
        &self.spec
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Kept> {
        self.kept.clone()
    }

    pub(crate) fn wish(&self, wish: Wish) {
        self.wish.send_replace(wish);
    }

    /// Stops the app until the pause is dropped.
    pub(crate) fn pause(&self) -> Pause {
        self.wish(Wish::Pause);
        Pause {
            wish: Arc::clone(&self.wish),
            kept: self.kept.clone(),
            resume: true,
        }
    }

    /// Lets it finish; done when nothing of it is left.
    pub(crate) async fn retire(self) {
        self.wish(Wish::Retire);
        if let Err(error) = self.task.await {
            tracing::error!(
                "the keeper of generation {} failed: {error}",
                self.spec.generation
            );
        }
    }
}

/// A generation that is stopped for a while; dropping this starts it again.
#[derive(Debug)]
pub(crate) struct Pause {
    wish: Arc<watch::Sender<Wish>>,
    kept: watch::Receiver<Kept>,
    resume: bool,
}

impl Pause {
    /// Waits until its process is gone.
    pub(crate) async fn stopped(&self) {
        let mut kept = self.kept.clone();
        // A keeper that ended has no process either.
        let _ = kept.wait_for(|kept| kept.process.is_none()).await.is_ok();
    }

    /// Does not start it again.
    pub(crate) fn keep(mut self) {
        self.resume = false;
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        if self.resume {
            self.wish.send_if_modified(|wish| {
                let paused = *wish == Wish::Pause;
                if paused {
                    *wish = Wish::Serve;
                }
                paused
            });
        }
    }
}

/// The keeper's task.
struct Keeping {
    spec: Arc<AppSpec>,
    turn: Turn,
    output: Output,
    hurry: watch::Receiver<Option<Duration>>,
    wishes: watch::Receiver<Wish>,
    kept: watch::Sender<Kept>,
    /// Before the next start after a death.
    pause: Duration,
    /// How it died, if it is to be started again because of that.
    died: Option<String>,
}

struct Running {
    app: App,
    upstream: Arc<Upstream>,
    since: Instant,
}

impl Keeping {
    async fn run(mut self, running: Running) {
        let mut running = Some(running);
        loop {
            let wish = *self.wishes.borrow_and_update();
            running = match (wish, running) {
                (Wish::Serve, Some(running)) => self.serve(running).await,
                (Wish::Serve, None) => self.start_again().await,
                (Wish::Pause, Some(running)) => self.wind_down(running).await,
                (Wish::Pause, None) => self.wait().await,
                (Wish::Retire, Some(running)) => self.wind_down(running).await,
                (Wish::Retire, None) => return,
            };
        }
    }

    /// Until the wish changes or the app dies.
    async fn serve(&mut self, mut running: Running) -> Option<Running> {
        self.turn.publish(Route::To(Arc::clone(&running.upstream)));
        self.tell(Phase::Serving, Some(running.app.process()));
        let how = tokio::select! {
            how = running.app.exited() => how,
            _ = self.wishes.changed() => return Some(running),
        };
        let generation = self.spec.generation;
        tracing::warn!("generation {generation} {how} while it served, it is started again");
        self.hold(format!("the app {how} and is started again"));
        self.kept.send_modify(|kept| kept.restarts += 1);
        if running.since.elapsed() >= PROVEN_AFTER {
            self.pause = FIRST_PAUSE;
        }
        self.died = Some(how);
        // Its requests are not cut: nobody is left at the other end, so each of them tells by itself how far it came,
        // and those that were not sent yet wait for the next start.
        running.app.kill().await;
        self.tell(Phase::Restarting, None);
        None
    }

    /// Until it is ready again or the wish changes.
    async fn start_again(&mut self) -> Option<Running> {
        self.tell(Phase::Restarting, None);
        let pause = self.died.as_ref().map_or(Duration::ZERO, |_| self.pause);
        let spec = Arc::clone(&self.spec);
        let output = self.output.clone();
        let started = async {
            running_sleep(pause).await;
            start_ready(&spec, &output).await
        };
        let started = tokio::select! {
            started = started => started,
            _ = self.wishes.changed() => return None,
        };
        if self.died.is_some() {
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
        match started {
            Ok(ReadyApp { app, address, .. }) => {
                self.died = None;
                Some(Running {
                    app,
                    upstream: Upstream::new(self.spec.generation, address),
                    since: Instant::now(),
                })
            }
            Err(error) => {
                let generation = self.spec.generation;
                tracing::warn!("generation {generation} did not start again: {error}");
                self.hold(format!("the app does not start again: {error}"));
                self.died = Some(error.to_string());
                None
            }
        }
    }

    /// Lets requests finish, then stops it; not if the wish to serve comes back before.
    async fn wind_down(&mut self, mut running: Running) -> Option<Running> {
        self.hold(String::from("the app is being replaced"));
        fault_point!("draining");
        let (requests, streams) = match *self.wishes.borrow() {
            Wish::Pause => (
                self.spec.run.drain_limit.min(PAUSE_DRAIN_LIMIT),
                STREAM_PAUSE_LIMIT,
            ),
            _ => (self.spec.run.drain_limit, self.spec.run.stream_drain_limit),
        };
        let drained = {
            let upstream = Arc::clone(&running.upstream);
            async move { upstream.drained(requests, streams).await }
        };
        let mut hurry = self.hurry.clone();
        tokio::select! {
            leftover = drained => self.report(leftover),
            _ = hurry.wait_for(Option::is_some) => running.upstream.cut(),
            how = running.app.exited() => {
                tracing::warn!("generation {} {how} before its requests were done", self.spec.generation);
            }
            () = serve_again(&mut self.wishes) => return Some(running),
        }
        running.app.stop(grace(self.hurry.clone())).await;
        self.died = None;
        self.tell(Phase::Restarting, None);
        None
    }

    async fn wait(&mut self) -> Option<Running> {
        self.tell(Phase::Restarting, None);
        self.changed().await;
        None
    }

    async fn changed(&mut self) {
        // The sender goes only together with this task.
        let _ = self.wishes.changed().await.is_ok();
    }

    fn hold(&self, why: String) {
        self.turn.publish(Route::Held { why });
    }

    fn tell(&self, phase: Phase, process: Option<u32>) {
        self.kept.send_modify(|kept| {
            kept.phase = phase;
            kept.process = process;
        });
    }

    fn report(&self, leftover: Leftover) {
        if leftover != Leftover::default() {
            tracing::warn!(
                "generation {} ends with {} requests and {} streams unfinished",
                self.spec.generation,
                leftover.requests,
                leftover.streams
            );
        }
    }
}

/// Ends when SIGKILL is due: after the usual time, or sooner when everything has to end.
async fn grace(mut hurry: watch::Receiver<Option<Duration>>) {
    let hurried = async {
        match hurry.wait_for(Option::is_some).await.map(|share| *share) {
            Ok(Some(share)) => running_sleep(share).await,
            Ok(None) | Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = running_sleep(GRACE) => {}
        () = hurried => {}
    }
}

async fn serve_again(wishes: &mut watch::Receiver<Wish>) {
    if wishes.wait_for(|wish| *wish == Wish::Serve).await.is_err() {
        std::future::pending::<()>().await;
    }
}

//! What serves: the current generation, its keeper, and the old ones that finish what they have.
//!
//! - The old version serves until the new one is ready, and goes on serving if it never gets ready or is cancelled.
//! - No request fails because of a swap: the route changes in one step, the old version is stopped after its requests.
//! - Who owns the route is decided here alone, by order of taking it over: a keeper of an older start cannot publish.
//!
//! A [`Service`] is owned by one task. Every process belongs to one keeper task, and every keeper to the service; when the
//! service is dropped, all of them and their processes go.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rrun_protocol::SwapMode;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

pub use crate::app::{AppSpec, ReplaceError, Warning};
use crate::{
    app::{ReadyApp, start_ready},
    clock::{running_sleep, running_timeout},
    fault::fault_point,
    keeper::{GRACE, Keeper, Kept, Phase, Wish},
    output::Output,
    proxy::Route,
    upstream::Upstream,
};

/// What the app is told before anything was pushed.
const NOTHING_PUSHED: &str = "no version has been pushed yet; `rrun push` brings the first one";

/// What serves, and how that changes.
#[derive(Debug)]
pub struct Service {
    output: Output,
    routes: Arc<Routes>,
    current: Option<Keeper>,
    view: ServiceView,
    /// Keepers of older generations, until they have ended.
    retiring: JoinSet<()>,
    hurry: watch::Sender<Option<Duration>>,
}

/// A version that took over.
#[derive(Clone, Debug)]
pub struct Replaced {
    /// From the start of the new process until it was ready.
    pub ready: Duration,
    /// From ready until every new request went to the new version.
    pub swap: Duration,
    /// What the user should know.
    pub warnings: Vec<Warning>,
}

/// What serves, for `rrun status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceStatus {
    /// The generation that serves, or is being restarted.
    pub generation: Option<u64>,
    /// `serving`, `restarting` or `nothing`.
    pub state: &'static str,
    /// Its process id.
    pub process: Option<u32>,
    /// How often the app died since it went live.
    pub restarts: u32,
}

/// Sees what serves while the service itself is busy.
#[derive(Clone, Debug, Default)]
pub struct ServiceView(Arc<Mutex<Option<Serving>>>);

/// A generation's number and how it is doing.
type Serving = (u64, watch::Receiver<Kept>);

impl ServiceView {
    /// What serves now.
    pub fn status(&self) -> ServiceStatus {
        let serving = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((generation, kept)) = &*serving else {
            return ServiceStatus {
                generation: None,
                state: "nothing",
                process: None,
                restarts: 0,
            };
        };
        let Kept {
            phase,
            process,
            restarts,
        } = *kept.borrow();
        let state = match phase {
            Phase::Serving => "serving",
            Phase::Restarting => "restarting",
        };
        ServiceStatus {
            generation: Some(*generation),
            state,
            process,
            restarts,
        }
    }

    fn show(&self, serving: Option<Serving>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = serving;
    }
}

impl Service {
    /// Nothing serves yet.
    pub fn new(output: Output) -> (Self, watch::Receiver<Route>) {
        let (routes, receiver) = Routes::new(nothing(NOTHING_PUSHED));
        let service = Self {
            output,
            routes: Arc::new(routes),
            current: None,
            view: ServiceView::default(),
            retiring: JoinSet::new(),
            hurry: watch::Sender::new(None),
        };
        (service, receiver)
    }

    /// Lets a new version take over, in the way that its plan says.
    ///
    /// On an error, when `cancel` fires and when the future is dropped, the new version's processes are killed and the
    /// old version serves (in a restart: is started again).
    pub async fn replace(
        &mut self,
        spec: AppSpec,
        cancel: &CancellationToken,
    ) -> Result<Replaced, ReplaceError> {
        self.reap();
        let spec = Arc::new(spec);
        let start = start_ready(&spec, &self.output);
        let (ready, pause) = match (&self.current, spec.run.swap) {
            (Some(old), SwapMode::Restart) => {
                let pause = old.pause();
                let start = async {
                    pause.stopped().await;
                    start.await
                };
                (unless(cancel, start).await?, Some(pause))
            }
            _ => (unless(cancel, start).await?, None),
        };
        let replaced = self.take_over(&spec, ready);
        if let Some(pause) = pause {
            pause.keep();
        }
        Ok(replaced)
    }

    /// Starts what serves once more, and switches to it.
    pub async fn restart(&mut self) -> Result<Replaced, ReplaceError> {
        let Some(current) = &self.current else {
            return Err(ReplaceError::NotReady {
                reason: String::from("there is nothing to restart"),
                hint: Some(String::from("`rrun push` brings a version")),
                output: Vec::new(),
            });
        };
        let spec = AppSpec::clone(current.spec());
        self.replace(spec, &CancellationToken::new()).await
    }

    /// Holds requests for what is going to serve, if nothing does yet; those that wait too long are told `why`.
    pub fn hold(&self, why: &str) {
        if self.current.is_none() {
            let why = why.to_owned();
            self.routes.take_over(Route::Held { why });
        }
    }

    /// Stops what serves within `limit`, as [`Self::shutdown`] does; new requests are told `why`.
    pub async fn stop(&mut self, why: &str, limit: Duration) {
        self.routes.take_over(nothing(why));
        self.retire();
        self.end_retiring(limit).await;
        self.hurry.send_replace(None);
    }

    /// Stops everything. Requests under way have two fifths of `limit`, then everything gets SIGTERM, and SIGKILL after
    /// another two fifths. Altogether it takes no longer than `limit` by the clock: whoever ends the agent counts that.
    pub async fn shutdown(mut self, limit: Duration) {
        self.routes.take_over(nothing("the agent is shutting down"));
        self.retire();
        // What is left is killed as the service is dropped.
        let _ = tokio::time::timeout(limit, self.end_retiring(limit))
            .await
            .is_ok();
    }

    async fn end_retiring(&mut self, limit: Duration) {
        let share = limit * 2 / 5;
        if running_timeout(share, self.retired()).await.is_ok() {
            return;
        }
        self.hurry.send_replace(Some(share));
        if running_timeout(limit - share, self.retired())
            .await
            .is_err()
        {
            tracing::warn!("some processes did not end in time");
        }
    }

    /// Proves that a version gets ready, stops it again, and lets everything else finish: after that no process of an app
    /// is left, requests are held, and the caller replaces its own process. If that fails, [`Self::take_back`].
    pub async fn hand_over(
        &mut self,
        spec: &AppSpec,
        cancel: &CancellationToken,
    ) -> Result<Replaced, ReplaceError> {
        self.reap();
        let spec = Arc::new(spec.clone());
        let ready = unless(cancel, start_ready(&spec, &self.output)).await?;
        ready.app.stop(running_sleep(GRACE)).await;
        let since = Instant::now();
        // What still drains ends first: until then the present version serves.
        let drained = async {
            while self.retiring.join_next().await.is_some() {}
            Ok(())
        };
        unless(cancel, drained).await?;
        let pause = self.current.as_ref().map(Keeper::pause);
        let stopped = async {
            if let Some(pause) = &pause {
                pause.stopped().await;
            }
            Ok(())
        };
        unless(cancel, stopped).await?;
        if let Some(pause) = pause {
            pause.keep();
        }
        Ok(Replaced {
            ready: ready.took,
            swap: since.elapsed(),
            warnings: ready.warnings,
        })
    }

    /// After a [`Self::hand_over`] that led to nothing: starts the old version again.
    pub fn take_back(&mut self) {
        if let Some(current) = &self.current {
            current.wish(Wish::Serve);
        }
    }

    /// What serves.
    pub fn status(&self) -> ServiceStatus {
        self.view.status()
    }

    /// What serves, also for others to see.
    pub fn view(&self) -> ServiceView {
        self.view.clone()
    }

    /// The generation that requests go to.
    pub fn serving(&self) -> Option<u64> {
        self.current
            .as_ref()
            .map(|current| current.spec().generation)
    }

    fn take_over(&mut self, spec: &Arc<AppSpec>, ready: ReadyApp) -> Replaced {
        let since = Instant::now();
        let upstream = Upstream::new(spec.generation, ready.address);
        let turn = self.routes.take_over(Route::To(Arc::clone(&upstream)));
        let swap = since.elapsed();
        fault_point!("switching");
        self.retire();
        let keeper = Keeper::start(
            spec,
            (ready.app, upstream),
            turn,
            self.output.clone(),
            self.hurry.subscribe(),
        );
        self.view.show(Some((spec.generation, keeper.watch())));
        self.current = Some(keeper);
        Replaced {
            ready: ready.took,
            swap,
            warnings: ready.warnings,
        }
    }

    /// Lets the current generation finish and go, in the background.
    fn retire(&mut self) {
        if let Some(old) = self.current.take() {
            self.view.show(None);
            self.retiring.spawn(old.retire());
        }
    }

    async fn retired(&mut self) {
        while self.retiring.join_next().await.is_some() {}
    }

    fn reap(&mut self) {
        while self.retiring.try_join_next().is_some() {}
    }
}

fn nothing(why: &str) -> Route {
    Route::Nothing {
        why: why.to_owned(),
    }
}

async fn unless<T>(
    cancel: &CancellationToken,
    work: impl Future<Output = Result<T, ReplaceError>>,
) -> Result<T, ReplaceError> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(ReplaceError::Cancelled),
        outcome = work => outcome,
    }
}

/// The published route, and whose turn it is to publish.
#[derive(Debug)]
pub(crate) struct Routes {
    turn: Mutex<u64>,
    route: watch::Sender<Route>,
}

/// The right to publish routes, until somebody takes over.
#[derive(Debug)]
pub(crate) struct Turn {
    number: u64,
    routes: Arc<Routes>,
}

impl Routes {
    fn new(route: Route) -> (Self, watch::Receiver<Route>) {
        let (sender, receiver) = watch::channel(route);
        let routes = Self {
            turn: Mutex::new(0),
            route: sender,
        };
        (routes, receiver)
    }

    fn take_over(self: &Arc<Self>, route: Route) -> Turn {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        *turn += 1;
        self.route.send_replace(route);
        Turn {
            number: *turn,
            routes: Arc::clone(self),
        }
    }
}

impl Turn {
    /// Publishes `route`, unless somebody took over.
    pub(crate) fn publish(&self, route: Route) {
        let turn = self
            .routes
            .turn
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *turn == self.number {
            self.routes.route.send_replace(route);
        }
    }
}

//! The one owner of the agent's state: carries each request through apply → compile → publish → swap, one at a time.
//!
//! [`Worker::push`] is the pipeline; every push leaves it with exactly one report. What a stage does lies in the stage's own
//! file, and which request comes next is the queue's ([`crate::queue`]).

use std::{
    collections::BTreeSet,
    ffi::OsString,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rrun_protocol::{
    EventKind, HistoryEntry, Outcome, Plan, Project, PushId, Report, Selection, SwapMode, Timings,
    TreeDigest,
};

use crate::{
    app::AppSpec,
    authorize::seconds_since_1970,
    compile::{Build, CompileError},
    exchange::{Ending, Exchange, Stop, Tee, millis, millis_since},
    fault::fault_point,
    publish::{Generation, Generations},
    queue::{Request, fits_on},
    receive::Received,
    recipe,
    room::{self, is_no_room},
    service::{ReplaceError, Replaced, Service},
    shared::Shared,
    toolchain::{Mismatch, Toolchain},
    tree::Tree,
};

/// How long the app may take to end when it is stopped; less than a client waits for the answer.
const STOP_LIMIT: Duration = Duration::from_secs(6);
/// What requests are told after that.
const STOPPED: &str = "the app was stopped with `rrun stop`; push to start it again";

/// Pause before what served last is started again because it did not start; doubled each time.
const FIRST_START_PAUSE: Duration = Duration::from_millis(500);
/// Longest such pause.
const LONGEST_START_PAUSE: Duration = Duration::from_secs(10);

/// Does one thing at a time, with everything that the agent owns.
pub(crate) struct Worker {
    pub(crate) tree: Tree,
    pub(crate) generations: Generations,
    pub(crate) service: Service,
    pub(crate) shared: Arc<Shared>,
    pub(crate) environment: Vec<(OsString, OsString)>,
    pub(crate) hand_over: Option<Box<AppSpec>>,
    pub(crate) toolchain: Toolchain,
    /// How long to wait before what served last is started again, if it did not start.
    pub(crate) start_pause: Option<Duration>,
}

impl Worker {
    /// A worker with nothing to do yet.
    pub(crate) fn new(
        tree: Tree,
        generations: Generations,
        service: Service,
        shared: Arc<Shared>,
        environment: Vec<(OsString, OsString)>,
    ) -> Self {
        Self {
            tree,
            generations,
            service,
            shared,
            environment,
            hand_over: None,
            toolchain: Toolchain::default(),
            start_pause: None,
        }
    }

    /// Finishes what an earlier failure interrupted, so that a push is let in against the tree that really lies here.
    pub(crate) fn recover(&mut self) {
        let before = self.tree.digest();
        if let Err(error) = self.tree.recover() {
            tracing::warn!("the tree cannot be made whole yet: {error:#}");
        }
        if self.tree.digest() != before {
            self.shared
                .set_tree(self.tree.manifest(), self.tree.digest());
        }
    }

    /// Serves what served when the agent ended, or what the image was built with.
    async fn start_last(&mut self, stop: &Stop) {
        let last = self.generations.serving().cloned();
        let directory = last
            .as_ref()
            .and_then(|last| last.plan.build.directory.clone());
        let pause = self.start_pause.take().unwrap_or(FIRST_START_PAUSE);
        if let Some(generation) = last.filter(|_| self.service.serving().is_none()) {
            tracing::info!(generation = generation.number, tree = %generation.tree.short(), "starting what served last");
            let spec = self.generations.spec(&generation, &self.environment);
            if let Err(error) = self.service.replace(spec, &stop.token).await {
                if !matches!(error, ReplaceError::Cancelled) {
                    let why = format!("generation {} does not start: {error}", generation.number);
                    tracing::error!("{why}");
                    self.service.hold(&why);
                }
                self.start_pause = Some((pause * 2).min(LONGEST_START_PAUSE));
            }
        }
        // The compiler may take a while to say which it is; what serves is known by now.
        self.show();
        let manifest = self.tree.manifest();
        let asked = self
            .toolchain
            .check(&self.shared, manifest, directory.as_ref());
        if let Err(Mismatch { reason, .. }) = asked.await {
            tracing::warn!("{reason}");
        }
    }

    /// Carries one request to its end.
    pub(crate) async fn take(&mut self, request: Request, stop: &Stop) {
        match request {
            Request::Start => self.start_last(stop).await,
            Request::Push {
                id, received, by, ..
            } => self.take_push(id, *received, by, stop).await,
            Request::Rollback {
                id,
                generation,
                by,
                answer,
            } => {
                let exchange = self.begin_without_files(id, by, stop);
                let _ = answer.send(Ok(Arc::clone(&exchange.events)));
                self.rollback(exchange, generation).await;
            }
            Request::Restart { id, by, answer } => {
                let exchange = self.begin_without_files(id, by, stop);
                let _ = answer.send(Ok(Arc::clone(&exchange.events)));
                self.restart(exchange).await;
            }
            Request::Stop { answer } => {
                self.service.stop(STOPPED, STOP_LIMIT).await;
                self.start_pause = None;
                if let Err(error) = self.generations.clear_serving() {
                    tracing::warn!("{error:#}");
                }
                self.show();
                let _ = answer.send(());
            }
            Request::Cancel { answer, .. } => {
                let _ = answer.send(false);
            }
            Request::MakeRoom { answer } => {
                let _ = answer.send(Some(self.make_room()));
            }
        }
        self.show();
    }

    async fn take_push(&mut self, id: PushId, received: Received, by: String, stop: &Stop) {
        fault_point!("staged");
        let mut exchange = self.begin(id, by, received.target.tree_digest(), stop);
        if !fits_on(&received, self.tree.digest()) {
            return self.end(
                exchange,
                Ending {
                    outcome: Outcome::Refused,
                    reason: Some("the agent's tree changed while the push waited".to_owned()),
                    hint: Some("push again".to_owned()),
                },
            );
        }
        let ending = match self.tree.recover() {
            Ok(()) => self.push(&mut exchange, received).await,
            Err(error) => Err(error.context("the tree is not whole since an earlier failure")),
        };
        let ending = ending.unwrap_or_else(|error| self.failed(&error));
        self.end(exchange, ending);
    }

    /// The pipeline: apply → compile → publish → swap.
    async fn push(
        &mut self,
        exchange: &mut Exchange<'_>,
        received: Received,
    ) -> anyhow::Result<Ending> {
        let Received {
            preamble,
            target,
            staged,
            ..
        } = received;
        if exchange.stop.token.is_cancelled() {
            return Ok(exchange.stopped());
        }
        self.apply(exchange, target, &staged)?;
        let no_build = preamble.as_ref().is_some_and(|preamble| preamble.no_build);
        if no_build {
            return Ok(Ending::of(Outcome::Applied));
        }
        let plan = match preamble {
            Some(preamble) => preamble.plan,
            None => match self.resolve_plan().await {
                Ok(plan) => plan,
                Err(error) => {
                    let error = format!("{error:#}");
                    let error = anstream::adapter::strip_str(&error);
                    let reason =
                        format!("the tree is applied, but says not what to build: {error}");
                    return Ok(Ending::because(Outcome::BuildFailed, reason));
                }
            },
        };
        let identity = (self.tree.digest(), plan.digest());
        let serving = self.serving();
        let hands_over = plan.run.swap == SwapMode::Exec;
        if !hands_over
            && serving.is_some_and(|serving| serving.identity() == identity)
            && self.service.status().state == "serving"
        {
            return Ok(Ending::of(Outcome::Unchanged));
        }
        if let Some(other) =
            serving.filter(|serving| serving.by != exchange.by && !serving.by.is_empty())
        {
            let text = format!(
                "this replaces generation {}, which {} pushed",
                other.number, other.by
            );
            exchange.warn(text, None);
        }
        let asked = self.toolchain.check(
            &self.shared,
            self.tree.manifest(),
            plan.build.directory.as_ref(),
        );
        if let Err(Mismatch { reason, hint }) = asked.await {
            return Ok(Ending {
                outcome: Outcome::BuildFailed,
                reason: Some(reason),
                hint: Some(hint),
            });
        }
        let (generation, is_new) = match self.generations.find(&identity).cloned() {
            Some(kept) => (kept, false),
            None => match self.build(exchange, &plan).await? {
                Ok(generation) => (generation, true),
                Err(ending) => return Ok(ending),
            },
        };
        // Limits and swap mode may differ from those it was built with.
        let generation = Generation { plan, ..generation };
        self.swap(exchange, &generation, is_new).await
    }

    fn apply(
        &mut self,
        exchange: &mut Exchange<'_>,
        target: rrun_protocol::Manifest,
        staged: &crate::tree::Staged,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        let applied = tokio::task::block_in_place(|| self.tree.apply(target, staged));
        self.shared
            .set_tree(self.tree.manifest(), self.tree.digest());
        let restored = applied?.restored;
        let millis = millis_since(started);
        exchange.timings.apply = Some(millis);
        if let Some(first) = restored.first() {
            let text = match restored.len() {
                1 => format!(
                    "`{first}` was changed on the agent, by a build or the app, and was put back"
                ),
                count => format!(
                    "`{first}` and {} more files were changed on the agent and were put back",
                    count - 1
                ),
            };
            let hint = match first.file_name() {
                "Cargo.lock" => {
                    "run `cargo build` on the laptop, so that Cargo.lock is complete, and push again"
                }
                _ => "write generated files to OUT_DIR, or name them in .rrunignore",
            };
            exchange.warn(text, Some(hint.to_owned()));
        }
        exchange.tell(EventKind::Applied { restored, millis });
        Ok(())
    }

    /// What a whole tree says of itself.
    async fn resolve_plan(&self) -> anyhow::Result<Plan> {
        let folder = self.shared.layout.tree();
        let output = recipe::metadata(&folder)
            .output()
            .await
            .context("cargo cannot read the tree")?;
        let metadata = serde_json::from_slice(&output)
            .context("cannot understand what `cargo metadata` prints")?;
        let project = Project::resolve(&metadata, &folder, &folder, &Selection::default());
        Ok(project
            .map_err(|error| match error.hint() {
                Some(hint) => anyhow::anyhow!("{error} ({hint})"),
                None => anyhow::anyhow!(error),
            })?
            .plan)
    }

    /// Compiles the present tree and publishes the result.
    async fn build(
        &mut self,
        exchange: &mut Exchange<'_>,
        plan: &Plan,
    ) -> anyhow::Result<Result<Generation, Ending>> {
        let started = Instant::now();
        let (number, log) = self.shared.start_build();
        exchange.tell(EventKind::Building {
            build: number,
            command: recipe::for_people(&plan.build),
        });
        let build_log = Tee {
            events: &exchange.events,
            log: &log,
        };
        let build_plan = plan.build.digest();
        let touched = self.tree.touched(&build_plan);
        let mut compiled = BTreeSet::new();
        let build = Build {
            layout: &self.shared.layout,
            plan: &plan.build,
            touched: &touched,
            after_interruption: self.tree.build_begins(),
            log: &build_log,
            cancel: &exchange.stop.token,
        };
        let result = build.compile(&mut compiled).await;
        fault_point!("built");
        log.finish();
        // What a full disk cut off may be broken too.
        let no_room = matches!(result, Err(CompileError::NoRoom(_)));
        if no_room {
            self.make_room();
        }
        let by_itself = !no_room && !matches!(result, Err(CompileError::Cancelled));
        self.tree.build_ended(by_itself);
        let millis = millis_since(started);
        exchange.timings.build = Some(millis);
        let (success, fresh) = result
            .as_ref()
            .map_or((false, 0), |built| (true, built.fresh));
        exchange.tell(EventKind::Built {
            success,
            compiled: compiled.len(),
            fresh,
            millis,
        });
        if result.is_err() {
            self.tree.partly_built(build_plan, &compiled);
        }
        let built = match result {
            Ok(built) => built,
            Err(CompileError::Failed { error, .. }) => {
                return Ok(Err(Ending {
                    outcome: Outcome::BuildFailed,
                    hint: missing_crate_hint(&error),
                    reason: Some(error),
                }));
            }
            Err(CompileError::Cancelled) => return Ok(Err(exchange.stopped())),
            Err(error @ (CompileError::Stale(_) | CompileError::NoRoom(_))) => {
                return Err(error.into());
            }
            Err(CompileError::Other(error)) => return Err(error),
        };
        self.tree.built(build_plan);
        let (tree, by, push) = (self.tree.digest(), exchange.by.clone(), Some(exchange.id));
        let generation =
            self.generations
                .publish(&built.executable, self.tree.manifest(), |number| {
                    Generation {
                        number,
                        tree,
                        plan: plan.clone(),
                        by,
                        push,
                        time: seconds_since_1970(),
                    }
                })?;
        Ok(Ok(generation))
    }

    /// Lets `generation` serve.
    async fn swap(
        &mut self,
        exchange: &mut Exchange<'_>,
        generation: &Generation,
        is_new: bool,
    ) -> anyhow::Result<Ending> {
        let spec = self.generations.spec(generation, &self.environment);
        exchange.tell(EventKind::Starting {
            generation: generation.number,
        });
        let token = &exchange.stop.token;
        let hands_over = generation.plan.run.swap == SwapMode::Exec;
        let replaced = if hands_over {
            self.service.hand_over(&spec, token).await
        } else {
            self.service.replace(spec.clone(), token).await
        };
        match replaced {
            Ok(Replaced {
                ready,
                swap,
                warnings,
            }) => {
                exchange.timings.ready = Some(millis(ready));
                exchange.timings.swap = Some(millis(swap));
                warnings
                    .into_iter()
                    .for_each(|(text, hint)| exchange.warn(text, hint));
                self.note_serving(exchange, generation.number);
                if hands_over {
                    self.hand_over = Some(Box::new(spec));
                    return Ok(Ending::of(Outcome::HandedOver));
                }
                Ok(Ending::of(Outcome::Live))
            }
            Err(error) => {
                if is_new {
                    self.generations.remove(generation.number)?;
                }
                Ok(match error {
                    ReplaceError::Cancelled => exchange.stopped(),
                    ReplaceError::NotReady {
                        reason,
                        hint,
                        output,
                    } => {
                        exchange.show_output(&output);
                        Ending {
                            outcome: Outcome::NotReady,
                            reason: Some(reason),
                            hint,
                        }
                    }
                    error => Ending::because(Outcome::NotReady, error.to_string()),
                })
            }
        }
    }

    /// Writes down what serves now. It serves, so a failure here only concerns the agent's next start.
    fn note_serving(&mut self, exchange: &Exchange<'_>, number: u64) {
        let mut noted = self.generations.set_serving(number);
        if noted.as_ref().is_err_and(is_no_room) {
            self.make_room();
            noted = self.generations.set_serving(number);
        }
        if let Err(error) = noted {
            let text =
                format!("an agent that starts again would serve an older version: {error:#}");
            exchange.warn(text, None);
        }
    }

    /// The end of a push that failed on the agent's side. A full disk gets room for the next one.
    fn failed(&mut self, error: &anyhow::Error) -> Ending {
        let ending = Ending::because(Outcome::Failed, format!("{error:#}"));
        if !is_no_room(error) {
            return ending;
        }
        let hint = self.make_room();
        Ending {
            hint: Some(hint),
            ..ending
        }
    }

    /// Removes what can be made again, and says what to do next.
    fn make_room(&mut self) -> String {
        // Also while it does not start: a full disk may be why.
        let last = self.serving().or_else(|| self.generations.serving());
        let last = last.map(|last| last.number);
        let dropped = self.generations.keep_only(last);
        if let Err(error) = dropped.and_then(|()| self.tree.make_room()) {
            tracing::warn!("{error:#}");
        }
        room::make(&self.shared.layout)
    }

    async fn rollback(&mut self, mut exchange: Exchange<'_>, wanted: Option<u64>) {
        let serving = self.serving().map(|serving| serving.number);
        let found = match wanted {
            Some(number) => self.generations.get(number),
            None => self.generations.previous(serving),
        };
        let ending = match found.cloned() {
            Some(generation) => {
                exchange.tree = generation.tree;
                self.swap(&mut exchange, &generation, false).await
            }
            None => Ok(Ending {
                outcome: Outcome::Refused,
                reason: Some("there is no such generation to go back to".to_owned()),
                hint: Some("`rrun status` names those that are kept".to_owned()),
            }),
        };
        let ending = ending.unwrap_or_else(|error| self.failed(&error));
        self.end(exchange, ending);
    }

    async fn restart(&mut self, mut exchange: Exchange<'_>) {
        let ending = match self.serving().cloned() {
            Some(generation) => {
                exchange.tree = generation.tree;
                self.swap(&mut exchange, &generation, false).await
            }
            None => Ok(Ending::because(
                Outcome::Refused,
                "nothing serves that could be restarted",
            )),
        };
        let ending = ending.unwrap_or_else(|error| self.failed(&error));
        self.end(exchange, ending);
    }

    /// Starts an exchange that sends no files. Its first event names it, so that it can be taken up like a push.
    fn begin_without_files<'s>(&self, id: PushId, by: String, stop: &'s Stop) -> Exchange<'s> {
        let exchange = self.begin(id, by, self.tree.digest(), stop);
        let (tree, changed, deleted) = (exchange.tree, 0, 0);
        exchange.tell(EventKind::Received {
            push: id,
            tree,
            changed,
            deleted,
        });
        exchange
    }

    fn begin<'s>(&self, id: PushId, by: String, tree: TreeDigest, stop: &'s Stop) -> Exchange<'s> {
        let events = self.shared.start_push(id);
        self.shared.update(|status| status.push = Some(id));
        Exchange {
            events,
            id,
            by,
            tree,
            started: Instant::now(),
            timings: Timings::default(),
            stop,
        }
    }

    /// The one place where an exchange ends: its report, its line in the history, its terminal event.
    fn end(&mut self, exchange: Exchange<'_>, ending: Ending) {
        let handed_over = self.hand_over.as_ref().map(|spec| spec.generation);
        let generation = handed_over.or_else(|| Some(self.serving()?.number));
        let Exchange {
            events,
            id,
            by,
            tree,
            started,
            timings,
            stop,
        } = exchange;
        let Ending {
            outcome,
            reason,
            hint,
        } = ending;
        let superseded_by = (outcome == Outcome::Superseded)
            .then(|| stop.superseded_by.get().copied())
            .flatten();
        self.shared.remember(HistoryEntry {
            push: id,
            by,
            time: seconds_since_1970(),
            tree,
            outcome,
            generation,
            millis: millis_since(started),
        });
        self.shared.update(|status| status.push = None);
        self.show();
        events.append(EventKind::Finished(Report {
            outcome,
            tree,
            generation,
            reason,
            hint,
            superseded_by,
            timings_ms: timings,
        }));
        events.finish();
    }

    /// The generation that serves, if any.
    fn serving(&self) -> Option<&Generation> {
        let number = self.service.serving()?;
        self.generations
            .kept()
            .find(|generation| generation.number == number)
    }

    /// Publishes what the agent's state is now.
    fn show(&self) {
        let serving = self.serving();
        let (generation, serving_tree) = (
            serving.map(|serving| serving.number),
            serving.map(|serving| serving.tree),
        );
        let kept = self
            .generations
            .kept()
            .map(|generation| generation.number)
            .collect();
        let needs_build =
            serving_tree != Some(self.tree.digest()) && !self.tree.manifest().is_empty();
        self.shared.update(|status| {
            status.generation = generation;
            status.serving_tree = serving_tree;
            status.kept = kept;
            status.needs_build = needs_build;
        });
    }
}

/// What to do if cargo could not get a crate, as where the agent has no network.
fn missing_crate_hint(error: &str) -> Option<String> {
    let signs = [
        "no matching package",
        "failed to get `",
        "failed to download",
        "failed to load source",
        "failed to select a version",
        "unable to update registry",
    ];
    let is_missing = signs
        .iter()
        .any(|sign| error.to_ascii_lowercase().contains(sign));
    let hint = "give the agent a network for crates it does not have, or build its image anew";
    is_missing.then(|| hint.to_owned())
}

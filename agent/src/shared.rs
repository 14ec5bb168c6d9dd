//! What the control routes may see of the agent while its one owner works: snapshots and records, never the state itself.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use rrun_protocol::{
    BootId, EventKind, HistoryEntry, MAX_EVENTS_KEPT, Manifest, PushId, Status, TreeDigest,
};

use crate::{layout::Layout, output::Output, record::Record, service::ServiceView};

/// Pushes whose events can be taken up again.
const MAX_PUSHES: usize = 32;
/// Builds whose log can be read again.
const MAX_BUILDS: usize = 16;
/// Lines of the history.
const MAX_HISTORY: usize = 200;
/// State file of the history.
const HISTORY: &str = "history";

/// The events of a push.
pub(crate) type Events = Arc<Record<EventKind>>;
/// The log of a build, line by line.
pub(crate) type Log = Arc<Record<String>>;

/// Written by the deployer, read by the control routes.
pub(crate) struct Shared {
    /// Where things lie.
    pub layout: Layout,
    /// What the app prints.
    pub output: Output,
    state: Mutex<State>,
    service: OnceLock<ServiceView>,
}

struct State {
    status: Status,
    manifest: Arc<Manifest>,
    pushes: VecDeque<(PushId, Events)>,
    builds: VecDeque<(u64, Log)>,
    last_build: u64,
    history: VecDeque<HistoryEntry>,
}

impl Shared {
    /// An agent that has just started and serves nothing yet.
    pub(crate) fn new(layout: Layout, output: Output, boot: BootId) -> Arc<Self> {
        let manifest = Arc::<Manifest>::default();
        let status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot,
            toolchain: None,
            tree: manifest.tree_digest(),
            files: 0,
            needs_build: false,
            generation: None,
            serving_tree: None,
            state: "nothing".to_owned(),
            process: None,
            push: None,
            restarts: 0,
            kept: Vec::new(),
        };
        let history = layout.load(HISTORY).unwrap_or_default();
        let (pushes, builds) = (VecDeque::new(), VecDeque::new());
        let state = State {
            status,
            manifest,
            pushes,
            builds,
            last_build: 0,
            history,
        };
        Arc::new(Self {
            layout,
            output,
            state: Mutex::new(state),
            service: OnceLock::new(),
        })
    }

    /// Lets [`Self::status`] say how the app's process is doing.
    pub(crate) fn set_service(&self, service: ServiceView) {
        let _ = self.service.set(service);
    }

    /// The agent's state at this moment.
    pub(crate) fn status(&self) -> Status {
        let mut status = self.lock().status.clone();
        if let Some(service) = self.service.get() {
            let service = service.status();
            status.state = service.state.to_owned();
            status.process = service.process;
            status.restarts = service.restarts;
        }
        status
    }

    /// Changes what [`Self::status`] says.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock().status);
    }

    /// Notes which tree lies here.
    pub(crate) fn set_tree(&self, manifest: &Manifest, digest: TreeDigest) {
        let manifest = Arc::new(manifest.clone());
        let mut state = self.lock();
        state.status.files = manifest.len();
        state.status.tree = digest;
        state.manifest = manifest;
    }

    /// The tree that lies here.
    pub(crate) fn manifest(&self) -> Arc<Manifest> {
        Arc::clone(&self.lock().manifest)
    }

    /// The events of a push that is or was under way.
    pub(crate) fn events(&self, push: PushId) -> Option<Events> {
        self.lock()
            .pushes
            .iter()
            .find(|(id, _)| *id == push)
            .map(|(_, events)| Arc::clone(events))
    }

    /// Starts the events of a push, or goes on with those that were started.
    pub(crate) fn start_push(&self, push: PushId) -> Events {
        if let Some(started) = self.events(push) {
            return started;
        }
        let events = Record::new(MAX_EVENTS_KEPT);
        let mut state = self.lock();
        state.pushes.push_back((push, Arc::clone(&events)));
        if state.pushes.len() > MAX_PUSHES {
            state.pushes.pop_front();
        }
        events
    }

    /// Starts the log of a build and numbers it.
    pub(crate) fn start_build(&self) -> (u64, Log) {
        let log = Record::new(MAX_EVENTS_KEPT);
        let mut state = self.lock();
        state.last_build += 1;
        let number = state.last_build;
        state.builds.push_back((number, Arc::clone(&log)));
        if state.builds.len() > MAX_BUILDS {
            state.builds.pop_front();
        }
        (number, log)
    }

    /// The log of a build, the latest one if `number` is `None`.
    pub(crate) fn build_log(&self, number: Option<u64>) -> Option<Log> {
        let state = self.lock();
        let found = match number {
            Some(number) => state.builds.iter().find(|(id, _)| *id == number),
            None => state.builds.back(),
        };
        found.map(|(_, log)| Arc::clone(log))
    }

    /// What was pushed, newest last.
    pub(crate) fn history(&self) -> Vec<HistoryEntry> {
        self.lock().history.iter().cloned().collect()
    }

    /// Adds a line to the history.
    pub(crate) fn remember(&self, entry: HistoryEntry) {
        let history = {
            let mut state = self.lock();
            state.history.push_back(entry);
            if state.history.len() > MAX_HISTORY {
                state.history.pop_front();
            }
            state.history.clone()
        };
        if let Err(error) = self.layout.store(HISTORY, &history) {
            tracing::warn!("cannot keep the history: {error:#}");
        }
    }

    /// Nothing can be half changed under the lock, so a poisoned one is taken all the same.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

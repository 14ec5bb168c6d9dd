//! The queue in front of the one worker: which request is let in, which one stops the work under way, which one ends unbegun.
//!
//! A newer push stops the one under way, which then knows by which; an older scan of a checkout is refused whenever it
//! arrives. What is done with a request is the worker's ([`crate::deploy`]).

use std::{
    collections::{HashMap, VecDeque},
    ffi::OsString,
    sync::Arc,
    time::Duration,
};

use rrun_protocol::{
    CheckoutId, EventKind, Manifest, Outcome, Preamble, PushId, Report, Timings, TreeDigest,
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    app::AppSpec,
    clock::running_sleep,
    deploy::Worker,
    exchange::Stop,
    publish::Generations,
    receive::Received,
    service::Service,
    shared::{Events, Shared},
    tree::Tree,
};

/// Requests that wait for the deployer; each holds a received push, so few.
const MAX_WAITING: usize = 16;

/// Pushes that were cancelled on their way and are remembered; one person cancels one at a time.
const MAX_CANCELLED: usize = 64;
/// Checkouts whose newest scan is remembered. A team has some dozens; forgetting them only lets a late push in.
const MAX_CHECKOUTS: usize = 1024;

/// How long the apps may take to end when the agent does. Cloud Run kills after 10 s by the clock, so this is no running time.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(8);
/// How much of that work under way may take first: a build's grace, and what killing it takes.
const WORK_END_LIMIT: Duration = Duration::from_secs(3);

/// What the control routes ask for.
pub(crate) enum Request {
    /// Make this tree serve.
    Push {
        /// Chosen by the laptop.
        id: PushId,
        /// The checked push.
        received: Box<Received>,
        /// Who signed it.
        by: String,
        /// Gets the push's events, or the tree that lies here if the push starts from another one.
        answer: Answer,
    },
    /// Swap to a kept generation, the one before the serving one if none is named.
    Rollback {
        /// Names the exchange.
        id: PushId,
        /// Which one.
        generation: Option<u64>,
        /// Who asks.
        by: String,
        /// Gets the events.
        answer: oneshot::Sender<Result<Events, TreeDigest>>,
    },
    /// Start the serving generation anew.
    Restart {
        /// Names the exchange.
        id: PushId,
        /// Who asks.
        by: String,
        /// Gets the events.
        answer: oneshot::Sender<Result<Events, TreeDigest>>,
    },
    /// End the push under way, if it is the named one or none is named.
    Cancel {
        /// Which one.
        push: Option<PushId>,
        /// Gets whether there was one.
        answer: oneshot::Sender<bool>,
    },
    /// Remove what can be made again, because a push found no room. Nothing happens while something is under way.
    MakeRoom {
        /// Gets what to do next, if room was made.
        answer: oneshot::Sender<Option<String>>,
    },
    /// Serve what served last. The deployer asks it of itself.
    Start,
    /// Stop the app.
    Stop {
        /// Told when it is gone.
        answer: oneshot::Sender<()>,
    },
}

/// Where the answer to a push goes. It is given when the push is let in, which may be long before its turn.
pub(crate) struct Answer(Option<oneshot::Sender<Result<Events, TreeDigest>>>);

impl From<oneshot::Sender<Result<Events, TreeDigest>>> for Answer {
    fn from(sender: oneshot::Sender<Result<Events, TreeDigest>>) -> Self {
        Self(Some(sender))
    }
}

impl Answer {
    /// The first answer counts.
    fn give(&mut self, answer: Result<Events, TreeDigest>) {
        if let Some(sender) = self.0.take() {
            // Who asked may have left; the push goes on.
            let _ = sender.send(answer);
        }
    }
}

/// How the deployer ended.
pub(crate) enum End {
    /// It was told to stop; no process is left.
    Stopped,
    /// The agent's process is to become the app; no other process is left.
    HandOver(Box<AppSpec>),
}

/// The queue in front of the worker.
pub(crate) struct Deployer {
    worker: Worker,
    mailbox: mpsc::Receiver<Request>,
    seen: Seen,
}

/// What the queue remembers of what came by.
#[derive(Default)]
struct Seen {
    /// The newest scan of each checkout.
    newest: HashMap<CheckoutId, (u64, PushId)>,
    /// Pushes that were cancelled while they were still on their way.
    cancelled: VecDeque<PushId>,
}

impl Seen {
    /// Notes that a push that is not here yet is not to be let in, and says whether it may still come.
    fn cancel(&mut self, shared: &Shared, push: Option<PushId>) -> bool {
        let Some(push) = push.filter(|push| shared.events(*push).is_none()) else {
            return false;
        };
        self.cancelled.push_back(push);
        if self.cancelled.len() > MAX_CANCELLED {
            self.cancelled.pop_front();
        }
        true
    }
}

impl Deployer {
    /// A deployer and where to send it requests.
    pub(crate) fn new(
        tree: Tree,
        generations: Generations,
        service: Service,
        shared: Arc<Shared>,
        environment: Vec<(OsString, OsString)>,
    ) -> (Self, mpsc::Sender<Request>) {
        let (sender, mailbox) = mpsc::channel(MAX_WAITING);
        let worker = Worker::new(tree, generations, service, shared, environment);
        (
            Self {
                worker,
                mailbox,
                seen: Seen::default(),
            },
            sender,
        )
    }

    /// Works until `shutdown`, or until the agent's process is to become the app.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> End {
        let Self {
            mut worker,
            mut mailbox,
            mut seen,
        } = self;
        let shared = Arc::clone(&worker.shared);
        shared.set_tree(worker.tree.manifest(), worker.tree.digest());
        let mut limit = SHUTDOWN_LIMIT;
        let mut waiting = Some(Request::Start);
        while !shutdown.is_cancelled() {
            if waiting.is_none() {
                let pause = worker.start_pause.unwrap_or_default();
                let arrived = tokio::select! {
                    arrived = mailbox.recv() => arrived,
                    () = shutdown.cancelled() => None,
                    () = running_sleep(pause), if worker.start_pause.is_some() => Some(Request::Start),
                };
                let Some(arrived) = arrived else { break };
                worker.recover();
                waiting = admit(&mut seen, &shared, arrived, false);
            }
            let Some(request) = waiting.take() else {
                continue;
            };
            let under_way = request.push_id();
            let stop = Stop {
                shutdown: shutdown.clone(),
                ..Stop::default()
            };
            {
                let work = worker.take(request, &stop);
                tokio::pin!(work);
                loop {
                    let arrived = tokio::select! {
                        // First, so that a push is let in against the tree that the one under way leaves.
                        biased;
                        () = &mut work => break,
                        () = shutdown.cancelled() => {
                            stop.token.cancel();
                            limit -= WORK_END_LIMIT;
                            // Dropped if it takes longer: what it started goes with it.
                            let _ = tokio::time::timeout(WORK_END_LIMIT, &mut work).await.is_ok();
                            break;
                        }
                        Some(arrived) = mailbox.recv() => arrived,
                    };
                    if let Request::Cancel { push, answer } = arrived {
                        let is_meant =
                            |id: Option<PushId>| id.is_some() && (push.is_none() || push == id);
                        let waits = waiting.take_if(|waiting| is_meant(waiting.push_id()));
                        let found = is_meant(under_way) || waits.is_some();
                        if is_meant(under_way) {
                            stop.token.cancel();
                        }
                        if let Some(cancelled) = waits {
                            cancelled.end_unbegun(&shared, Outcome::Cancelled, None);
                        }
                        let _ = answer.send(found || seen.cancel(&shared, push));
                        continue;
                    }
                    if let Request::MakeRoom { answer } = arrived {
                        let _ = answer.send(None);
                        continue;
                    }
                    let Some(arrived) = admit(&mut seen, &shared, arrived, true) else {
                        continue;
                    };
                    stop.give_way_to(arrived.push_id());
                    if let Some(skipped) = waiting.replace(arrived) {
                        let newer = waiting.as_ref().and_then(Request::push_id);
                        skipped.end_unbegun(&shared, Outcome::Superseded, newer);
                    }
                }
            }
            if let Some(spec) = worker.hand_over.take() {
                return End::HandOver(spec);
            }
        }
        mailbox.close();
        while let Some(unbegun) = waiting.take().or_else(|| mailbox.try_recv().ok()) {
            unbegun.end_unbegun(&shared, Outcome::Cancelled, None);
        }
        worker.service.shutdown(limit).await;
        End::Stopped
    }
}

/// Lets a request in, unless it is already known, older than what was seen of its checkout, made against another tree, or
/// answered at once. Who sent a push gets its first events here, however long the work under way takes to give way.
fn admit(seen: &mut Seen, shared: &Shared, request: Request, is_busy: bool) -> Option<Request> {
    match request {
        Request::Cancel { push, answer } => {
            let _ = answer.send(seen.cancel(shared, push));
            None
        }
        Request::Push { id, mut answer, .. } if shared.events(id).is_some() => {
            answer.give(Ok(shared.events(id)?));
            None
        }
        Request::Push {
            id,
            received,
            by,
            mut answer,
        } => {
            let newer = received
                .preamble
                .as_ref()
                .and_then(|preamble| newer_scan(&mut seen.newest, preamble, id));
            let tree = shared.status().tree;
            if newer.is_none() && !fits_on(&received, tree) {
                answer.give(Err(tree));
                return None;
            }
            let events = shared.start_push(id);
            events.append(EventKind::Received {
                push: id,
                tree: received.target.tree_digest(),
                changed: received.changed,
                deleted: received.deleted,
            });
            answer.give(Ok(Arc::clone(&events)));
            let request = Request::Push {
                id,
                received,
                by,
                answer,
            };
            if seen.cancelled.contains(&id) {
                request.end_unbegun(shared, Outcome::Cancelled, None);
                return None;
            }
            if newer.is_some() {
                request.end_unbegun(shared, Outcome::Superseded, newer);
                return None;
            }
            if is_busy {
                let reason = "the one before it is being stopped".to_owned();
                events.append(EventKind::Waiting { reason });
            }
            Some(request)
        }
        request => Some(request),
    }
}

/// Notes a scan's number; gives the push of a newer scan of the same checkout, if there was one.
fn newer_scan(
    newest: &mut HashMap<CheckoutId, (u64, PushId)>,
    preamble: &Preamble,
    id: PushId,
) -> Option<PushId> {
    if newest.len() >= MAX_CHECKOUTS && !newest.contains_key(&preamble.checkout) {
        newest.clear();
    }
    let this = (preamble.sequence, id);
    let seen = newest.entry(preamble.checkout).or_insert(this);
    if this.0 < seen.0 {
        return Some(seen.1);
    }
    *seen = this;
    None
}

/// Whether a push starts from `tree`, or brings a whole one.
pub(crate) fn fits_on(received: &Received, tree: TreeDigest) -> bool {
    let base = received.preamble.as_ref().map(|preamble| preamble.base);
    base.is_none_or(|base| base == tree || base == Manifest::default().tree_digest())
}

impl Request {
    /// The push, or other exchange with events of its own.
    fn push_id(&self) -> Option<PushId> {
        match self {
            Self::Push { id, .. } | Self::Rollback { id, .. } | Self::Restart { id, .. } => {
                Some(*id)
            }
            Self::Cancel { .. } | Self::MakeRoom { .. } | Self::Start | Self::Stop { .. } => None,
        }
    }

    /// Ends a request that was never begun.
    fn end_unbegun(self, shared: &Shared, outcome: Outcome, newer: Option<PushId>) {
        let (id, tree, mut answer): (_, _, Answer) = match self {
            Self::Push {
                id,
                received,
                answer,
                ..
            } => (id, received.target.tree_digest(), answer),
            Self::Rollback { id, answer, .. } | Self::Restart { id, answer, .. } => {
                (id, shared.status().tree, answer.into())
            }
            Self::Stop { answer } => {
                let _ = answer.send(());
                return;
            }
            Self::Cancel { .. } | Self::MakeRoom { .. } | Self::Start => return,
        };
        let events = shared.start_push(id);
        events.append(EventKind::Finished(Report {
            outcome,
            tree,
            generation: shared.status().generation,
            reason: newer.map(|_| "a newer push came first".to_owned()),
            hint: None,
            superseded_by: newer,
            timings_ms: Timings::default(),
        }));
        events.finish();
        answer.give(Ok(events));
    }
}

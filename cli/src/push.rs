//! `rrun push`: discover → scan → diff → pack → send → render, in this order.
//!
//! Each stage is a file of its own and knows nothing of the others; only their order, and what to do when the agent has another
//! tree than expected, lies here.

use std::{path::Path, time::Instant};

use bytes::Bytes;
use rrun_protocol::{
    CheckoutId, Event, EventKind, ExitCode, Manifest, Outcome, PushId, TreeDigest,
    UNASKED_BODY_BYTES,
};
use tokio::sync::watch;

use crate::{
    account::{Account, Summary},
    arguments::PushArguments,
    ask::{Agent, AskError},
    cache::Cache,
    checkout::{self, random},
    commands::Here,
    discover::{Checkout, discover},
    folders::ProjectId,
    interrupt,
    local::{self, Reached},
    pack::{PackError, PackRequest, Packed, pack},
    problem::{Context as _, Problem},
    render::DryRun,
    scan::{Scan, ScanError, scan},
    send::{self, Sent, Then, send},
    service::{self, Place, Service},
};

/// How often a tree that is being edited is scanned until it holds still.
const MAX_SCANS: usize = 5;
/// How often a push is packed anew because the agent's tree was another one.
const MAX_PACKS: usize = 5;

/// How the command ends when nothing goes wrong.
enum End {
    Finished(Box<Summary>),
    /// Nothing was sent, or its end was not waited for.
    Left,
}

/// Runs the command to its end.
pub(crate) async fn run(here: &Here, arguments: &PushArguments) -> ExitCode {
    let mut account = Account::new(here.started);
    account.files = Some(0);
    match push(here, arguments, &mut account).await {
        Ok(End::Left) => ExitCode::Success,
        Ok(End::Finished(summary)) => {
            here.render.finished(&summary);
            summary.code
        }
        Err(problem) => {
            here.render.ended_by(&account.ended_by(&problem), &problem);
            problem.code
        }
    }
}

async fn push(
    here: &Here,
    arguments: &PushArguments,
    account: &mut Account,
) -> Result<End, Problem> {
    let (checkout, cache) = find(here, arguments)?;
    if arguments.dry_run {
        return list(here, &checkout, &cache);
    }
    let place = Place::new(checkout.project_folder.clone(), &arguments.folder);
    let service = Service::choose(here, &arguments.target, &place)?;
    let state = here.folders.project_state(&place.id);
    let scan = Numbered::scan(&state, &checkout, &cache)?;
    show_notes(here, &checkout, &scan.scan);
    account.scan = Some(here.started.elapsed());
    account.tree = Some(scan.tree());

    let mut push = Outgoing {
        here,
        arguments,
        checkout: &checkout,
        cache: &cache,
        state: &state,
        scan,
        id: PushId::from_random(random().or_cannot("draw random bytes")?),
    };
    account.push = Some(push.id);
    let (sent, is_interrupted) = push.to(&service, &place, account).await?;
    Ok(match sent {
        Sent::Finished(report) => {
            let mut summary = account.reported(report);
            if is_interrupted {
                summary.exit_with(ExitCode::Cancelled);
            }
            End::Finished(Box::new(summary))
        }
        _ => {
            let history = if arguments.target.local {
                "history --local"
            } else {
                "history"
            };
            here.render.hint(format_args!(
                "the build goes on; {} shows how it ended",
                here.call.command(history, &place.typed)
            ));
            End::Left
        }
    })
}

fn find(here: &Here, arguments: &PushArguments) -> Result<(Checkout, Cache), Problem> {
    let open = |folder: &Path| Cache::open(here.folders.project_cache(&ProjectId::of(folder)));
    discover(&arguments.folder, &arguments.choice.selection(), open).map_err(|error| {
        let hint = error.hint();
        Problem::usage(error).hint(hint)
    })
}

/// Scans until no file changed while it was read.
fn scan_still(checkout: &Checkout, cache: &Cache, listing: bool) -> Result<Scan, Problem> {
    let mut tries = 0;
    loop {
        tries += 1;
        match scan(checkout, cache, listing) {
            Err(ScanError::ChangedMeanwhile { .. }) if tries < MAX_SCANS => {}
            scanned => {
                return scanned.map_err(|error| {
                    let hint = error.hint();
                    Problem::usage(error).hint(hint)
                });
            }
        }
    }
}

fn list(here: &Here, checkout: &Checkout, cache: &Cache) -> Result<End, Problem> {
    let scan = scan_still(checkout, cache, true)?;
    show_notes(here, checkout, &scan);
    let whole = DryRun {
        tree: scan.manifest.tree_digest(),
        files: scan.manifest.len(),
        bytes: scan.manifest.total_bytes(),
    };
    here.render.listing(&scan.listing, &whole);
    Ok(End::Left)
}

fn show_notes(here: &Here, checkout: &Checkout, scan: &Scan) {
    for note in scan.notes.iter().chain(&checkout.notes) {
        here.render.note(&note.text, note.hint.as_deref());
    }
}

/// A scan with its number in the checkout. The number comes first, so that the later scan never has the lower one.
struct Numbered {
    checkout: CheckoutId,
    sequence: u64,
    scan: Scan,
}

impl Numbered {
    fn scan(state: &Path, checkout: &Checkout, cache: &Cache) -> Result<Self, Problem> {
        let folder = &checkout.project_folder;
        let (id, sequence) = checkout::number(state, folder).or_cannot("number the push")?;
        Ok(Self {
            checkout: id,
            sequence,
            scan: scan_still(checkout, cache, false)?,
        })
    }

    fn tree(&self) -> TreeDigest {
        self.scan.manifest.tree_digest()
    }
}

/// A scanned tree on its way to an agent.
struct Outgoing<'a> {
    here: &'a Here,
    arguments: &'a PushArguments,
    checkout: &'a Checkout,
    cache: &'a Cache,
    state: &'a Path,
    scan: Numbered,
    id: PushId,
}

impl Outgoing<'_> {
    /// Sends it to the agent that is meant; on this machine to one that is started if need be.
    async fn to(
        &mut self,
        service: &Service,
        place: &Place,
        account: &mut Account,
    ) -> Result<(Sent, bool), Problem> {
        let (here, target) = (self.here, &self.arguments.target);
        let port = self.arguments.port;
        let mut presses = interrupt::listen();
        if let Service::At(url) = service {
            if port.is_some() && std::env::var_os("RRUN_PORT").is_none() {
                return Err(Problem::usage("`--port` is for an agent on this machine")
                    .hint("name the service's port in its address".to_owned()));
            }
            let agent = service::agent_at(here, url.clone(), service::key(here, &target.key)?)?;
            return Ok(self.through(&agent, &mut presses, account).await?);
        }
        if let Some(Reached { agent, .. }) = local::presumed(here, place, &target.key, port)? {
            match self.through(&agent, &mut presses, account).await {
                Err(error) if error.is_absence() || error.is_stranger() => {}
                sent => return Ok(sent?),
            }
        }
        let found = local::ensure(here, place, &target.key, port);
        let Reached { agent, is_new } = interrupt::or_leave(&mut presses, found).await?;
        let sent = self.through(&agent, &mut presses, account).await?;
        if is_new && sent.0.is_success() {
            account.hint = Some(format!(
                "edit a file and run the same again; {} ends the agent",
                here.call.command("stop --local", &place.typed)
            ));
        }
        Ok(sent)
    }

    /// Sends it to this agent, unless Ctrl-C cancels it.
    async fn through(
        &mut self,
        agent: &Agent,
        presses: &mut watch::Receiver<u32>,
        account: &mut Account,
    ) -> Result<(Sent, bool), AskError> {
        account.url = Some(agent.connection().url().to_string());
        let sent =
            interrupt::or_cancel(agent, self.id, presses, self.converse(agent, account)).await;
        account.traffic += agent.connection().traffic();
        sent
    }

    /// Packs and sends, again when the agent has another tree than the one packed against.
    async fn converse(&mut self, agent: &Agent, account: &mut Account) -> Result<Sent, AskError> {
        let mut base = send::tree(agent, self.cache, agent.signer().known().tree).await?;
        for _ in 0..MAX_PACKS {
            let body = self.pack(&base, account)?;
            let push = send::Push {
                id: self.id,
                base: base.tree_digest(),
                body: &body,
            };
            let posted = Instant::now();
            let mut see = |event: &Event| self.see(event, posted, agent, account);
            base = match send(agent, push, &mut see).await? {
                Sent::OtherTree(tree) => {
                    self.explain(agent);
                    send::tree(agent, self.cache, Some(tree)).await?
                }
                Sent::Lost => {
                    self.here.render.note(
                        "a new instance answers, which does not know the push: sending it again",
                        None,
                    );
                    send::tree(agent, self.cache, None).await?
                }
                sent => return Ok(sent),
            };
        }
        let why = "the agent's tree became another one at each try";
        Err(Problem::refused(why)
            .hint("somebody else pushes to the same service".to_owned())
            .into())
    }

    fn pack(&mut self, base: &Manifest, account: &mut Account) -> Result<Bytes, Problem> {
        let since = Instant::now();
        let mut tries = 0;
        let Packed {
            body,
            files,
            unpacked_bytes,
        } = loop {
            tries += 1;
            match pack(&self.request(base), self.cache) {
                Ok(packed) => break packed,
                // A file was edited after the scan: what is sent is scanned anew.
                Err(PackError::Scan(ScanError::ChangedMeanwhile { .. })) if tries < MAX_SCANS => {
                    self.scan = Numbered::scan(self.state, self.checkout, self.cache)?;
                    account.tree = Some(self.scan.tree());
                }
                Err(error) => {
                    let hint = error.hint();
                    return Err(Problem::usage(error).hint(hint));
                }
            }
        };
        if body.len() as u64 > UNASKED_BODY_BYTES {
            let packed = body.len() as u64;
            self.here.render.sending(files, packed, unpacked_bytes);
        }
        account.files = Some(files);
        account.pack = Some(account.pack.unwrap_or_default() + since.elapsed());
        Ok(body.into())
    }

    fn request<'b>(&'b self, base: &'b Manifest) -> PackRequest<'b> {
        PackRequest {
            scan: &self.scan.scan,
            base,
            checkout: self.scan.checkout,
            sequence: self.scan.sequence,
            no_build: self.arguments.no_build,
            full: self.arguments.full,
            plan: &self.checkout.project.plan,
            max_upload: self.arguments.max_upload,
        }
    }

    fn see(&self, event: &Event, posted: Instant, agent: &Agent, account: &mut Account) -> Then {
        account.send.get_or_insert_with(|| posted.elapsed());
        self.here.render.event(event);
        match &event.kind {
            EventKind::Received { .. } => {
                // The agent is at work and the laptop is not: the time to keep what the next push starts from. Without it,
                // that push only costs one more round trip.
                let _ = self.cache.remember(&self.scan.scan);
                if self.arguments.detach {
                    return Then::Leave;
                }
            }
            EventKind::Applied { .. } => self.acknowledge(agent),
            EventKind::Finished(report) if has_tree(report.outcome) => self.acknowledge(agent),
            _ => {}
        }
        Then::GoOn
    }

    /// The agent has the tree that was scanned.
    fn acknowledge(&self, agent: &Agent) {
        agent.signer().remember_tree(self.scan.tree());
    }

    /// Says why more is sent than changed.
    fn explain(&self, agent: &Agent) {
        let who = if agent.boot_changed() {
            "a new instance answers, which has another tree"
        } else {
            "the agent has another tree (of another push)"
        };
        self.here
            .render
            .note(&format!("{who}: sending what is missing"), None);
    }
}

/// Whether a push that ends so leaves its tree on the agent, also if it had nothing to apply.
fn has_tree(outcome: Outcome) -> bool {
    matches!(
        outcome,
        Outcome::Live | Outcome::Unchanged | Outcome::Applied | Outcome::HandedOver
    )
}

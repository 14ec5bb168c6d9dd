//! Which agent a command talks to, and how it gets there.
//!
//! Flag before environment before what `rrun use` remembered; without any of them a command stops, as guessing could push to the
//! wrong place. Starting and finding an agent on this machine is a matter of its own.

use std::path::{Path, PathBuf};

use crate::{
    arguments::{KeyFile, Target},
    ask::Agent,
    cache::Cache,
    checkout,
    commands::Here,
    connection::{Connection, ServiceUrl},
    discover,
    folders::ProjectId,
    keys::Key,
    local,
    problem::{Context as _, Problem},
    sign::Signer,
};

/// Where the agent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    At(ServiceUrl),
    Local,
}

/// A project as far as commands without a push have to know it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The workspace's folder.
    pub(crate) folder: PathBuf,
    pub(crate) id: ProjectId,
    /// The folder as it was typed, for hints.
    pub(crate) typed: PathBuf,
}

impl Place {
    pub(crate) fn new(folder: PathBuf, typed: &Path) -> Self {
        Self {
            id: ProjectId::of(&folder),
            folder,
            typed: typed.to_owned(),
        }
    }

    /// The project that `typed` lies in.
    pub(crate) fn find(typed: &Path) -> Result<Self, Problem> {
        let folder = discover::project_folder(typed).map_err(|error| {
            let hint = error.hint();
            Problem::usage(error).hint(hint)
        })?;
        Ok(Self::new(folder, typed))
    }
}

/// What flags and environment say, if they say anything.
fn named(target: &Target) -> Result<Option<Service>, Problem> {
    let by_flag = target.url.is_some() && target.url != std::env::var("RRUN_URL").ok();
    match &target.url {
        Some(_) if target.local && by_flag => {
            Err(Problem::usage("`--url` and `--local` name two agents")
                .hint("leave one of them out".to_owned()))
        }
        _ if target.local => Ok(Some(Service::Local)),
        Some(url) if !url.is_empty() => Ok(Some(Service::At(ServiceUrl::parse(url)?))),
        _ => Ok(None),
    }
}

impl Service {
    /// The service that is meant for the project at `place`.
    pub(crate) fn choose(here: &Here, target: &Target, place: &Place) -> Result<Self, Problem> {
        if let Some(service) = named(target)? {
            return Ok(service);
        }
        let state = here.folders.project_state(&place.id);
        match checkout::load(&state).and_then(|checkout| checkout.service) {
            Some(url) => Ok(Self::At(ServiceUrl::parse(&url)?)),
            None => Err(Problem::usage("nothing says where to push to").hint(format!(
                "{} starts an agent on this machine; `--url https://…` or RRUN_URL names a service, and {} remembers it",
                here.call.command("push --local", &place.typed),
                here.call.command("use https://…", &place.typed),
            ))),
        }
    }
}

/// The user's key; says so if it was made just now.
pub(crate) fn key(here: &Here, chosen: &KeyFile) -> Result<Key, Problem> {
    let file = chosen
        .key_file
        .clone()
        .unwrap_or_else(|| here.folders.key_file());
    let key = Key::load_or_make(&file)?;
    if key.is_new {
        here.render
            .note(&format!("made a key pair in {}", key.file.display()), None);
    }
    Ok(key)
}

/// The agent of a service on the network.
pub(crate) fn agent_at(here: &Here, url: ServiceUrl, key: Key) -> Result<Agent, Problem> {
    let signer = signer(here, key, url.as_str())?;
    Ok(Agent::new(Connection::new(url)?, signer))
}

/// Signs for `service`, an address or another name that is remembered.
pub(crate) fn signer(here: &Here, key: Key, service: &str) -> Result<Signer, Problem> {
    let services = Cache::open(here.folders.services()).or_cannot("use the cache folder")?;
    Ok(Signer::new(key.private, services, service))
}

/// The agent that a command other than a push talks to. None is started.
pub(crate) async fn running_agent(
    here: &Here,
    target: &Target,
    folder: &Path,
) -> Result<Agent, Problem> {
    // With an address, a command needs no project around it.
    let (service, place) = match named(target)? {
        Some(Service::At(url)) => return agent_at(here, url, key(here, &target.key)?),
        Some(Service::Local) => (Service::Local, Place::find(folder)?),
        None => {
            let place = Place::find(folder)?;
            (Service::choose(here, target, &place)?, place)
        }
    };
    match service {
        Service::At(url) => agent_at(here, url, key(here, &target.key)?),
        Service::Local => local::running(here, &place, &target.key),
    }
}

//! The short commands: one question to the agent, or none, and its answer.
//!
//! What starts another version (rollback, restart) ends with the same terminal event as a push.

use std::fs;

use http_body_util::BodyExt as _;
use hyper::Method;
use rrun_protocol::{CONTROL_PREFIX, ExitCode, HistoryEntry};

use crate::{
    account::{Account, Summary},
    arguments::{
        CancelArguments, ControlArguments, KeyArguments, LogsArguments, QuestionArguments,
        RollbackArguments, SignArguments, StopArguments, UseArguments,
    },
    checkout,
    commands::Here,
    connection::{ServiceUrl, innermost},
    local,
    problem::{Context as _, Problem},
    send::{self, Sent, Then},
    service::{self, Place, running_agent},
    sign::header_line,
};

pub(crate) async fn status(here: &Here, arguments: &QuestionArguments) -> Result<(), Problem> {
    let agent = running_agent(here, &arguments.target, &arguments.folder).await?;
    let status = agent.status().await?;
    here.render
        .status(agent.connection().url().as_str(), &status);
    Ok(())
}

pub(crate) async fn history(here: &Here, arguments: &QuestionArguments) -> Result<(), Problem> {
    let agent = running_agent(here, &arguments.target, &arguments.folder).await?;
    let entries: Vec<HistoryEntry> = agent.get(&format!("{CONTROL_PREFIX}history")).await?;
    here.render.history(&entries);
    Ok(())
}

/// Shows what the app prints, until it ends or nobody reads it any more.
pub(crate) async fn logs(here: &Here, arguments: &LogsArguments) -> Result<(), Problem> {
    let agent = running_agent(here, &arguments.target, &arguments.folder).await?;
    let path = format!("{CONTROL_PREFIX}logs?follow={}", arguments.follow);
    let mut body = agent
        .ask(Method::GET, &path, Default::default())
        .await?
        .into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| agent.broken(innermost(&error)))?;
        let is_read = frame.data_ref().is_none_or(|data| here.render.bytes(data));
        if !is_read {
            break;
        }
    }
    Ok(())
}

pub(crate) async fn rollback(here: &Here, arguments: &RollbackArguments) -> ExitCode {
    let path = match arguments.generation {
        Some(generation) => format!("{CONTROL_PREFIX}rollback?generation={generation}"),
        None => format!("{CONTROL_PREFIX}rollback"),
    };
    with_end(here, &arguments.control, &path).await
}

pub(crate) async fn restart(here: &Here, arguments: &ControlArguments) -> ExitCode {
    with_end(here, arguments, &format!("{CONTROL_PREFIX}restart")).await
}

/// A command that ends with a terminal event.
async fn with_end(here: &Here, arguments: &ControlArguments, path: &str) -> ExitCode {
    let mut account = Account::new(here.started);
    match follow(here, arguments, path, &mut account).await {
        Ok(summary) => {
            here.render.finished(&summary);
            summary.code
        }
        Err(problem) => {
            here.render.ended_by(&account.ended_by(&problem), &problem);
            problem.code
        }
    }
}

async fn follow(
    here: &Here,
    arguments: &ControlArguments,
    path: &str,
    account: &mut Account,
) -> Result<Summary, Problem> {
    let agent = running_agent(here, &arguments.target, &arguments.folder).await?;
    account.url = Some(agent.connection().url().to_string());
    let answer = agent.ask(Method::POST, path, Default::default()).await?;
    let sent = send::follow(&agent, answer, &mut |event| {
        here.render.event(event);
        Then::GoOn
    })
    .await?;
    account.traffic = agent.connection().traffic();
    match sent {
        // The tree on the agent is still the last pushed one: nothing to remember.
        Sent::Finished(report) => Ok(account.reported(report)),
        _ => Err(Problem::unreachable("the agent forgot what it was doing")),
    }
}

/// Stops the app; on this machine the agent too.
pub(crate) async fn stop(here: &Here, arguments: &StopArguments) -> Result<(), Problem> {
    if arguments.target.local {
        let place = Place::find(&arguments.folder)?;
        let was_there = local::end(here, &place, &arguments.target.key).await?;
        here.render.line(if was_there {
            "stopped the agent"
        } else {
            "no agent runs here"
        });
        return Ok(());
    }
    let agent = running_agent(here, &arguments.target, &arguments.folder).await?;
    let path = format!("{CONTROL_PREFIX}stop");
    agent.ask(Method::POST, &path, Default::default()).await?;
    here.render.line("stopped the app");
    Ok(())
}

pub(crate) async fn cancel(here: &Here, arguments: &CancelArguments) -> Result<(), Problem> {
    let agent = running_agent(here, &arguments.target, &arguments.folder).await?;
    let push = match arguments.push {
        Some(push) => Some(push),
        None => agent.status().await?.push,
    };
    let Some(push) = push else {
        here.render.line("no push is under way");
        return Ok(());
    };
    let path = format!("{CONTROL_PREFIX}cancel?push={push}");
    let answer = agent.ask(Method::POST, &path, Default::default()).await?;
    match agent.read(answer).await? {
        true => here.render.line(format_args!("cancelled push {push}")),
        false => here
            .render
            .line(format_args!("push {push} is not under way")),
    }
    Ok(())
}

/// Remembers, forgets or shows the service that a project goes to.
pub(crate) fn remember(here: &Here, arguments: &UseArguments) -> Result<(), Problem> {
    let place = Place::find(&arguments.folder)?;
    let state = here.folders.project_state(&place.id);
    let service = match &arguments.url {
        Some(url) => Some(ServiceUrl::parse(url)?.to_string()),
        None if arguments.forget => None,
        None => {
            let kept = checkout::load(&state).and_then(|checkout| checkout.service);
            here.render
                .line(kept.as_deref().unwrap_or("no service is remembered"));
            return Ok(());
        }
    };
    checkout::remember_service(&state, &place.folder, service).or_cannot("remember the service")
}

pub(crate) fn key(here: &Here, arguments: &KeyArguments) -> Result<(), Problem> {
    here.render
        .line(service::key(here, &arguments.key)?.public());
    Ok(())
}

/// Prints the header that signs a request, for curl.
pub(crate) async fn sign(here: &Here, arguments: &SignArguments) -> Result<(), Problem> {
    let body = match &arguments.body {
        Some(file) => fs::read(file).map_err(|error| {
            Problem::usage(format!("cannot read `{}`: {error}", file.display()))
        })?,
        None => Vec::new(),
    };
    let agent = running_agent(here, &arguments.target, &arguments.folder).await?;
    agent.introduce().await?;
    let method = arguments.method.to_uppercase();
    let header =
        agent
            .signer()
            .sign(&method, &arguments.path, &arguments.content_encoding, &body)?;
    let header = header.ok_or_else(|| Problem::unexpected("nothing says what to sign for"))?;
    here.render.line(header_line(&header));
    Ok(())
}

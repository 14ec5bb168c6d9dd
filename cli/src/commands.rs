//! One function for each command, and what all of them share.

use std::{process, time::Instant};

use rrun_protocol::ExitCode;
use tokio::runtime::{Builder, Runtime};

#[cfg(unix)]
use crate::agent;
use crate::{
    arguments::Command,
    call::Call,
    control,
    folders::Folders,
    problem::{Context as _, Problem},
    push,
    render::{Render, Style},
};

/// What every command works with.
pub(crate) struct Here {
    pub(crate) folders: Folders,
    pub(crate) call: Call,
    pub(crate) render: Render,
    pub(crate) started: Instant,
}

/// Runs one command to its end.
pub(crate) fn run(command: Command, started: Instant) -> process::ExitCode {
    #[cfg(unix)]
    if let Command::Agent(command_line) = command {
        return agent::run(*command_line);
    }
    let render = Render::new(Style::from_json(command.is_json()));
    let (folders, runtime) = match set_up() {
        Ok(prepared) => prepared,
        Err(problem) => {
            render.unstarted(&problem);
            render.problem(&problem);
            return process::ExitCode::from(problem.code as u8);
        }
    };
    let here = Here {
        folders,
        call: Call::of_this_process(),
        render,
        started,
    };
    let code = runtime.block_on(dispatch(&here, command));
    // A name that is still being looked up is nothing to wait for.
    runtime.shutdown_background();
    process::ExitCode::from(code as u8)
}

fn set_up() -> Result<(Folders, Runtime), Problem> {
    let folders = Folders::find()?;
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .or_cannot("start")?;
    Ok((folders, runtime))
}

async fn dispatch(here: &Here, command: Command) -> ExitCode {
    let done = match &command {
        Command::Push(arguments) => return push::run(here, arguments).await,
        Command::Rollback(arguments) => return control::rollback(here, arguments).await,
        Command::Restart(arguments) => return control::restart(here, arguments).await,
        Command::Status(arguments) => control::status(here, arguments).await,
        Command::History(arguments) => control::history(here, arguments).await,
        Command::Logs(arguments) => control::logs(here, arguments).await,
        Command::Stop(arguments) => control::stop(here, arguments).await,
        Command::Cancel(arguments) => control::cancel(here, arguments).await,
        Command::Use(arguments) => control::remember(here, arguments),
        Command::Key(arguments) => control::key(here, arguments),
        Command::Sign(arguments) => control::sign(here, arguments).await,
        #[cfg(unix)]
        Command::Agent(_) => Ok(()),
    };
    match done {
        Ok(()) => ExitCode::Success,
        Err(problem) => {
            here.render.problem(&problem);
            problem.code
        }
    }
}

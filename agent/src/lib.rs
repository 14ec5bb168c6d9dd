//! The container side of rrun: receives pushed source, builds it against a warm target directory, and swaps the running app.
//!
//! ```text
//! receive → verify → apply → compile → publish → swap
//! ```
//!
//! [`run`] is the whole program, for the `rrun-agent` binary and for `rrun push --local`, which runs it on the laptop.
//! Nothing of this crate is in a production image.

pub mod app;
pub mod clock;
pub mod front;
pub mod output;
pub mod proxy;
pub mod service;
pub mod upstream;

mod authorize;
mod child;
mod compile;
mod control;
mod deploy;
mod exchange;
mod fault;
mod freshness;
mod headers;
mod keeper;
mod layout;
mod page;
mod platform;
mod publish;
mod queue;
mod receive;
mod recipe;
mod record;
mod room;
mod serve;
mod shared;
mod toolchain;
mod tree;
mod uploads;
mod warm;
mod wire;

pub use control::TABLE as CONTROL_ROUTES;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};

/// What `rrun-agent` is told.
#[derive(Debug, Parser)]
#[command(
    name = "rrun-agent",
    version,
    about,
    args_conflicts_with_subcommands = true
)]
pub struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: serve::Arguments,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Own the port, take pushes, run the app (the default)
    Serve(serve::Arguments),
    /// Build the tree that lies in the workspace as a push would, so that the first push is incremental
    Warm(warm::Arguments),
}

/// Where the agent keeps everything.
#[derive(Args, Debug)]
struct Workspace {
    /// Folder that holds tree, target directory, generations and state
    #[arg(
        long = "workspace",
        value_name = "DIR",
        env = "RRUN_WORKSPACE",
        default_value = "/rrun"
    )]
    folder: PathBuf,
}

/// Runs the agent until it is told to stop, and gives its exit code: 0 after a stop, 1 after an error, which it has logged.
pub fn run(command_line: CommandLine) -> ExitCode {
    start_logging();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match command_line.command {
            None => serve::serve(command_line.serve).await,
            Some(Command::Serve(arguments)) => serve::serve(arguments).await,
            Some(Command::Warm(arguments)) => warm::warm(arguments).await,
        }
    });
    // What still blocks here (a receive under way) must not keep the container alive.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The agent's own log goes to standard error, beside the app's output.
fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("RRUN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(false);
    // A second start in one process keeps the first one's subscriber.
    let _ = subscriber.with_writer(std::io::stderr).try_init();
}

//! The command line: commands, flags, and the environment variables that stand in for them.
//!
//! Only what can be said is defined here; what it means is decided by the command that gets it.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand, ValueEnum};
use rrun_protocol::{DEFAULT_MAX_UPLOAD_BYTES, PushId, Selection, SwapMode};

use crate::{
    problem::Problem,
    render::{Render, Style},
};

/// Pushes changed Rust source to a running container, builds it there and swaps the app without dropping a request.
#[derive(Debug, Parser)]
#[command(name = "rrun", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Sends what changed, builds it on the agent and swaps the app
    Push(PushArguments),
    /// Shows what the agent runs
    Status(QuestionArguments),
    /// Shows what the app prints
    Logs(LogsArguments),
    /// Shows the pushes that the agent got
    History(QuestionArguments),
    /// Goes back to an earlier version that is still kept, without a build
    Rollback(RollbackArguments),
    /// Starts the serving version anew
    Restart(ControlArguments),
    /// Stops the app; with --local the agent too
    Stop(StopArguments),
    /// Cancels the push under way
    Cancel(CancelArguments),
    /// Remembers which service a project is pushed to
    Use(UseArguments),
    /// Prints the public key that an agent has to know; makes the pair if there is none
    Key(KeyArguments),
    /// Prints the header that signs a request, for curl
    Sign(SignArguments),
    /// The agent itself; `rrun push --local` starts it
    #[cfg(unix)]
    #[command(hide = true)]
    Agent(Box<crate::agent::CommandLine>),
}

/// Which agent is meant.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Target {
    /// Address of the service, as https://… (http:// only to this machine)
    #[arg(long, env = "RRUN_URL", value_name = "URL")]
    pub(crate) url: Option<String>,
    /// An agent on this machine, one for each project
    #[arg(long)]
    pub(crate) local: bool,
    #[command(flatten)]
    pub(crate) key: KeyFile,
}

/// Which key signs.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct KeyFile {
    /// File with the private key [default: rrun/key.pem in the user's configuration folder]
    #[arg(long, env = "RRUN_KEY_FILE", value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct PushArguments {
    /// Folder of the package or workspace
    #[arg(default_value = ".", value_name = "DIR")]
    pub(crate) folder: PathBuf,
    #[command(flatten)]
    pub(crate) target: Target,
    /// Port of the agent on this machine [default: 8080]
    #[arg(long, env = "RRUN_PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: Option<u16>,
    #[command(flatten)]
    pub(crate) choice: Choice,
    /// Send every file, whatever the agent has
    #[arg(long)]
    pub(crate) full: bool,
    /// Send and apply, and leave the build to the next push
    #[arg(long)]
    pub(crate) no_build: bool,
    /// List what would be sent and what is left out, each with the rule that says so
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Leave as soon as the agent has the push
    #[arg(long)]
    pub(crate) detach: bool,
    /// Events as one JSON object a line, the last one how it ended
    #[arg(long)]
    pub(crate) json: bool,
    /// Stop before more than this is sent
    #[arg(long, env = "RRUN_MAX_UPLOAD", value_name = "BYTES", default_value_t = DEFAULT_MAX_UPLOAD_BYTES)]
    pub(crate) max_upload: u64,
}

/// What to build.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Choice {
    /// Package that holds the binary
    #[arg(short, long, value_name = "PACKAGE")]
    package: Option<String>,
    /// Binary to run
    #[arg(long, value_name = "BIN")]
    bin: Option<String>,
    /// Build with the release profile
    #[arg(short, long)]
    release: bool,
    /// Features to switch on, separated by commas or spaces
    #[arg(short = 'F', long, value_delimiter = ',')]
    features: Vec<String>,
    /// How the new version takes over
    #[arg(long, value_enum)]
    swap: Option<Swap>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Swap {
    /// Start the new version, switch when it is ready, drain the old one
    Hot,
    /// Stop the old version first, for apps that cannot run twice at once
    Restart,
    /// Replace the agent itself by the app
    Exec,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct QuestionArguments {
    /// Folder of the project
    #[arg(default_value = ".", value_name = "DIR")]
    pub(crate) folder: PathBuf,
    #[command(flatten)]
    pub(crate) target: Target,
    /// The answer as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct LogsArguments {
    /// Folder of the project
    #[arg(default_value = ".", value_name = "DIR")]
    pub(crate) folder: PathBuf,
    #[command(flatten)]
    pub(crate) target: Target,
    /// Go on until stopped
    #[arg(short, long)]
    pub(crate) follow: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ControlArguments {
    /// Folder of the project
    #[arg(default_value = ".", value_name = "DIR")]
    pub(crate) folder: PathBuf,
    #[command(flatten)]
    pub(crate) target: Target,
    /// Events as one JSON object a line, the last one how it ended
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct RollbackArguments {
    #[command(flatten)]
    pub(crate) control: ControlArguments,
    /// Which one [default: the one before]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) generation: Option<u64>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct StopArguments {
    /// Folder of the project
    #[arg(default_value = ".", value_name = "DIR")]
    pub(crate) folder: PathBuf,
    #[command(flatten)]
    pub(crate) target: Target,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct CancelArguments {
    /// Folder of the project
    #[arg(default_value = ".", value_name = "DIR")]
    pub(crate) folder: PathBuf,
    #[command(flatten)]
    pub(crate) target: Target,
    /// Only if it is this one
    #[arg(long, value_name = "ID")]
    pub(crate) push: Option<PushId>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct UseArguments {
    /// Address of the service; without it, the remembered one is shown
    #[arg(value_name = "URL", conflicts_with = "forget")]
    pub(crate) url: Option<String>,
    /// Folder of the project
    #[arg(default_value = ".", value_name = "DIR")]
    pub(crate) folder: PathBuf,
    /// Forget the remembered one
    #[arg(long)]
    pub(crate) forget: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct KeyArguments {
    #[command(flatten)]
    pub(crate) key: KeyFile,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct SignArguments {
    /// As in the request line
    #[arg(value_name = "METHOD")]
    pub(crate) method: String,
    /// With its query, as in the request line: /_rrun/status
    #[arg(value_name = "PATH")]
    pub(crate) path: String,
    /// Folder of the project
    #[arg(default_value = ".", value_name = "DIR")]
    pub(crate) folder: PathBuf,
    #[command(flatten)]
    pub(crate) target: Target,
    /// File that is sent
    #[arg(long, value_name = "FILE")]
    pub(crate) body: Option<PathBuf>,
    /// The request's Content-Encoding, if it has one
    #[arg(long, value_name = "NAME", default_value = "")]
    pub(crate) content_encoding: String,
}

impl Command {
    /// Whether the answer is wanted as JSON.
    pub(crate) fn is_json(&self) -> bool {
        match self {
            Self::Push(push) => push.json,
            Self::Status(question) | Self::History(question) => question.json,
            Self::Rollback(rollback) => rollback.control.json,
            Self::Restart(control) => control.json,
            _ => false,
        }
    }
}

impl Choice {
    /// The choice as the project's settings are merged with it.
    pub(crate) fn selection(&self) -> Selection {
        Selection {
            package: self.package.clone(),
            bin: self.bin.clone(),
            features: self
                .features
                .iter()
                .flat_map(|list| list.split_whitespace())
                .map(str::to_owned)
                .collect(),
            release: self.release,
            swap: self.swap.map(|swap| match swap {
                Swap::Hot => SwapMode::Hot,
                Swap::Restart => SwapMode::Restart,
                Swap::Exec => SwapMode::Exec,
            }),
        }
    }
}

/// The command line says nothing that can be done: wrong, or a question for help.
pub(crate) struct Refused {
    error: clap::Error,
    json: bool,
}

impl Refused {
    /// Shows it, and says how `rrun` exits: 0 for help that was asked for, 2 for a mistake.
    pub(crate) fn show(self) -> ExitCode {
        let render = Render::new(Style::from_json(self.json && self.error.use_stderr()));
        render.command_line(&self.error.render(), self.error.use_stderr());
        if self.error.use_stderr() {
            let first = self.error.render().to_string();
            let first = first.lines().next().unwrap_or_default();
            render.unstarted(&Problem::usage(
                first.strip_prefix("error: ").unwrap_or(first),
            ));
        }
        ExitCode::from(u8::try_from(self.error.exit_code()).unwrap_or(2))
    }
}

/// Reads the process's own command line.
pub(crate) fn parse() -> Result<Command, Refused> {
    parse_from(std::env::args_os().collect())
}

fn parse_from(arguments: Vec<OsString>) -> Result<Command, Refused> {
    let json = arguments.iter().any(|argument| argument == "--json");
    Arguments::try_parse_from(arguments)
        .map(|arguments| arguments.command)
        .map_err(|error| Refused { error, json })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn push(arguments: &[&str]) -> PushArguments {
        let all = ["rrun", "push"].iter().chain(arguments);
        match Arguments::try_parse_from(all).unwrap().command {
            Command::Push(push) => push,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_push_takes_what_its_help_says() {
        let line = "app --local --port 9000 -p web --bin server --release --features a,b --features c --no-build";
        let arguments = push(&line.split(' ').collect::<Vec<_>>());
        assert_eq!(arguments.folder, PathBuf::from("app"));
        assert!(arguments.target.local && arguments.no_build);
        assert_eq!(arguments.port, Some(9000));
        let selection = arguments.choice.selection();
        assert_eq!(selection.package.as_deref(), Some("web"));
        assert_eq!(selection.bin.as_deref(), Some("server"));
        assert_eq!(selection.features, ["a", "b", "c"]);
        assert!(selection.release);
        assert_eq!(push(&[]).max_upload, DEFAULT_MAX_UPLOAD_BYTES);
    }

    #[test]
    fn a_wrong_command_line_exits_with_2_and_help_with_0() {
        let code = |line: &[&str]| {
            let error = Arguments::try_parse_from(line).unwrap_err();
            error.exit_code()
        };
        assert_eq!(code(&["rrun", "push", "--prot", "1"]), 2);
        assert_eq!(code(&["rrun"]), 2);
        assert_eq!(code(&["rrun", "push", "--port", "0"]), 2);
        assert_eq!(code(&["rrun", "push", "--help"]), 0);
    }
}

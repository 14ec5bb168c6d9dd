//! The hidden `rrun agent`: the agent itself, so that one program is all that a newcomer needs.
//!
//! Everything about it lies in the agent's own crate.

// PLACEHOLDER until the agent's library has them: pub(crate) use rrun_agent::{CommandLine, run};
#[derive(Debug, clap::Args)]
pub(crate) struct CommandLine {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _rest: Vec<String>,
}

pub(crate) fn run(_: CommandLine) -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}

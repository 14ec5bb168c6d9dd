//! The agent's binary; everything is in the library.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    rrun_agent::run(rrun_agent::CommandLine::parse())
}

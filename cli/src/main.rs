//! The laptop side of rrun: reads the project, pushes what changed, and shows what came of it.
//!
//! `main` only wires: arguments in, one command, an exit code out. It decides nothing itself.

mod account;
#[cfg(unix)]
mod agent;
mod arguments;
mod ask;
mod cache;
mod call;
mod cargo_config;
mod checkout;
mod commands;
mod connection;
mod control;
mod diff;
mod discover;
#[cfg(test)]
mod fake_agent;
#[cfg(test)]
mod fixture;
mod folders;
mod interrupt;
mod keys;
mod local;
mod pack;
mod pauses;
mod problem;
mod process;
mod push;
mod render;
mod scan;
mod send;
mod service;
mod sign;
mod upload;
mod weigh;

use std::{process::ExitCode, time::Instant};

fn main() -> ExitCode {
    let started = Instant::now();
    match arguments::parse() {
        Ok(command) => commands::run(command, started),
        Err(refused) => refused.show(),
    }
}

//! The promises end to end: the real client, the real agent, real cargo, real processes and sockets.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    missing_docs,
    reason = "tests stop at the first surprise, and start programs as a person would"
)]

mod connection;
mod control;
mod crash;
#[cfg(target_os = "linux")]
mod full_disk;
mod handover;
mod harness;
mod hostile;
mod keys;
mod laptop;
mod names;
mod order;
mod proxy;
mod push;
mod sent;
mod swap;
#[cfg(target_os = "linux")]
mod termination;
mod time;

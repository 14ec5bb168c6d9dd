//! From "there is an executable in a folder" to "requests are answered by it": real processes, real sockets.

#![expect(clippy::unwrap_used, reason = "what cannot happen here fails the test")]

mod front;
mod grpc;
mod harness;
mod interim;
mod proxy;
mod readiness;
mod retry;
mod stopping;
mod swap;
#[path = "../app/words.rs"]
mod words;

//! From "there is an executable in a folder" to "requests are answered by it": real processes, real sockets.

#![expect(clippy::unwrap_used, reason = "what cannot happen here fails the test")]

mod harness;
mod proxy;
mod readiness;
mod stopping;
mod swap;

//! From "there is an executable in a folder" to "requests are answered by it": real processes, real sockets.

mod harness;
mod proxy;
mod readiness;
mod stopping;
mod swap;

//! The container side of rrun.

mod app;
mod child;
pub mod clock;
pub mod front;
mod headers;
mod keeper;
pub mod output;
mod page;
mod platform;
pub mod proxy;
pub mod service;
pub mod upstream;

pub use child::reap_orphans;

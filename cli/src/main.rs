//! The laptop side of rrun.
#![expect(dead_code, reason = "the commands that use these stages come next")]

mod cache;
mod cargo_config;
mod diff;
mod discover;
#[cfg(test)]
mod fixture;
mod pack;
mod scan;
mod weigh;

fn main() {}

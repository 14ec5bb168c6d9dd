//! The app that the tests run.
fn main() {}

//! The laptop side of rrun.
fn main() {}

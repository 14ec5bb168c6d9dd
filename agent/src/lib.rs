//! The container side of rrun.

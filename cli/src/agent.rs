//! The hidden `rrun agent`: the agent itself, so that one program is all that a newcomer needs.
//!
//! Everything about it lies in the agent's own crate.

pub(crate) use rrun_agent::{CommandLine, run};

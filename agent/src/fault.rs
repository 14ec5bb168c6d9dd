//! Points at which a test lets the agent die or wait, so that every step of a push can be interrupted on purpose.
//!
//! They exist in test builds alone: without the feature `fault-points`, which only development dependencies switch on, the
//! macro leaves nothing behind, not even the names. What is to happen is read from a file at each point, so that a test
//! decides while the agent runs: a line `die at NAME` or `wait at NAME`.

/// Dies or waits here, if a test says so.
#[cfg(feature = "fault-points")]
macro_rules! fault_point {
    ($name:literal) => {
        $crate::fault::reached($name)
    };
}

/// Nothing, outside of tests.
#[cfg(not(feature = "fault-points"))]
macro_rules! fault_point {
    ($name:literal) => {};
}

pub(crate) use fault_point;

/// Environment variable that names the file.
#[cfg(feature = "fault-points")]
const ORDER_FILE: &str = "RRUN_FAULT_POINT_FILE";

/// Carries out the order for the point `name`: SIGKILL, or a pause until the order is withdrawn.
#[cfg(feature = "fault-points")]
pub(crate) fn reached(name: &str) {
    use rustix::process::{Signal, getpid, kill_process};
    use std::{fs, path::PathBuf, thread, time::Duration};

    let Some(file) = std::env::var_os(ORDER_FILE).map(PathBuf::from) else {
        return;
    };
    let ordered = |verb: &str| {
        fs::read_to_string(&file).is_ok_and(|order| order.trim() == format!("{verb} at {name}"))
    };
    if ordered("die") {
        let _ = kill_process(getpid(), Signal::KILL).is_ok();
        thread::park();
    }
    while ordered("wait") {
        // Whoever waits for the pause sees this file.
        let _ = fs::write(file.with_extension("reached"), name).is_ok();
        thread::sleep(Duration::from_millis(2));
    }
}

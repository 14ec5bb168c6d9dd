//! The one place where rrun makes a process: its own agent, detached. Also what can be asked of one by its number.
//!
//! The child gets an environment without what cargo and rrun put there for this process alone.

use std::{
    ffi::OsString,
    fs::File,
    io,
    path::Path,
    process::{Child, Command, Stdio},
};

/// Starts this program again with `arguments`, detached from the terminal: it outlives rrun and hears no Ctrl-C.
pub(crate) fn start_detached(
    arguments: &[OsString],
    environment: &[(&str, String)],
    folder: &Path,
    log: &File,
) -> io::Result<Child> {
    let program = std::env::current_exe()?;
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place, and it demands folder and environment"
    )]
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .envs(clean(std::env::vars_os()))
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?);
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command.spawn()
}

/// The user's own environment: without rrun's variables, and, if cargo runs this process, without what cargo adds.
fn clean(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Vec<(OsString, OsString)> {
    let variables: Vec<_> = variables.into_iter().collect();
    let by_cargo = variables.iter().any(|(name, _)| name == "CARGO");
    let is_kept = |name: &str| {
        let added = name == "CARGO"
            || name == "OUT_DIR"
            || name == "RUSTUP_TOOLCHAIN"
            || name == "RUST_RECURSION_COUNT"
            || [
                "CARGO_MANIFEST_",
                "CARGO_PKG_",
                "CARGO_BIN_",
                "CARGO_CRATE_",
                "CARGO_PRIMARY_",
                "CARGO_TARGET_TMP",
            ]
            .iter()
            .any(|start| name.starts_with(start));
        !(name.starts_with("RRUN_") || by_cargo && added)
    };
    variables
        .into_iter()
        .filter(|(name, _)| name.to_str().is_none_or(is_kept))
        .collect()
}

/// Whether a process with this number runs. One that ended and that nobody has waited for does not.
#[cfg(unix)]
pub(crate) fn is_running(process: u32) -> bool {
    let Some(id) = id(process) else {
        return false;
    };
    // A process of another user cannot be an agent of this one.
    rustix::process::test_kill_process(id).is_ok() && !is_zombie(process)
}

/// In a container without an init process, an ended agent stays in the table; only Linux shows that without a library.
#[cfg(unix)]
fn is_zombie(process: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat"))
        .ok()
        .and_then(|stat| Some(stat.rsplit_once(") ")?.1.starts_with('Z')))
        .unwrap_or(false)
}

/// Asks a process to end.
#[cfg(unix)]
pub(crate) fn terminate(process: u32) {
    if let Some(id) = id(process) {
        // One that is gone already is what was wanted.
        let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
    }
}

#[cfg(unix)]
fn id(process: u32) -> Option<rustix::process::Pid> {
    i32::try_from(process)
        .ok()
        .filter(|raw| *raw > 1)
        .and_then(rustix::process::Pid::from_raw)
}

/// There is no agent to ask for: it runs on Linux and macOS.
#[cfg(not(unix))]
pub(crate) fn is_running(_: u32) -> bool {
    false
}

/// There is no agent to end.
#[cfg(not(unix))]
pub(crate) fn terminate(_: u32) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(variables: &[&str]) -> Vec<String> {
        let variables = variables.iter().map(|name| (name.into(), "x".into()));
        let kept = clean(variables).into_iter();
        kept.map(|(name, _)| name.into_string().unwrap()).collect()
    }

    #[test]
    fn an_agent_inherits_neither_what_cargo_adds_nor_what_is_for_rrun() {
        let added = [
            "PATH",
            "CARGO",
            "CARGO_PKG_NAME",
            "CARGO_MANIFEST_DIR",
            "RUSTUP_TOOLCHAIN",
        ];
        assert_eq!(names(&added), ["PATH"]);
        let own = [
            "RUSTUP_TOOLCHAIN",
            "CARGO_HOME",
            "CARGO_TARGET_DIR",
            "RRUN_URL",
            "RRUN_KEY_FILE",
        ];
        assert_eq!(
            names(&own),
            ["RUSTUP_TOOLCHAIN", "CARGO_HOME", "CARGO_TARGET_DIR"]
        );
    }

    #[cfg(unix)]
    #[test]
    fn this_process_runs_and_an_impossible_one_does_not() {
        assert!(is_running(std::process::id()));
        assert!(!is_running(0));
        assert!(!is_running(u32::MAX));
    }
}

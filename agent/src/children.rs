//! The one place where the agent makes child processes: always with a folder, an environment and arguments as a list, and
//! each in a process group of its own so that all of it can be ended.

use std::{
    ffi::{OsStr, OsString},
    io,
    path::Path,
    process::Stdio,
    time::Duration,
};

use process_wrap::tokio::{ChildWrapper, CommandWrap, KillOnDrop, ProcessGroup};
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};

/// What to start.
#[derive(Clone, Debug)]
pub struct Command {
    /// Program, looked up in the environment's `PATH`.
    pub program: OsString,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Its working directory.
    pub folder: std::path::PathBuf,
    /// Its whole environment.
    pub environment: Vec<(OsString, OsString)>,
}

/// How often a process group that is being ended is looked at.
const POLL_EVERY: Duration = Duration::from_millis(2);

impl Command {
    /// A command of `program` in `folder` with exactly `environment`.
    pub fn new(program: impl AsRef<OsStr>, folder: &Path, environment: Vec<(OsString, OsString)>) -> Self {
        Self { program: program.as_ref().to_owned(), arguments: Vec::new(), folder: folder.to_owned(), environment }
    }

    /// Appends arguments.
    pub fn arguments(mut self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Starts it with both outputs piped and no input. Dropping the child kills its group.
    pub fn start(&self) -> io::Result<Box<dyn ChildWrapper>> {
        #[expect(clippy::disallowed_methods, reason = "this is the one place")]
        let mut command = tokio::process::Command::new(&self.program);
        command
            .args(&self.arguments)
            .current_dir(&self.folder)
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        CommandWrap::from(command).wrap(ProcessGroup::leader()).wrap(KillOnDrop).spawn()
    }

    /// Runs it to its end and gives its standard output.
    ///
    /// # Errors
    ///
    /// It could not be started, or ended with another code than 0; then the error holds its standard error.
    pub async fn output(&self) -> io::Result<Vec<u8>> {
        let output = Box::into_pin(self.start()?.wait_with_output()).await?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}

/// Ends a process group: `first`, then after `grace` SIGKILL, until no process of it is left.
pub async fn end_group(child: &mut Box<dyn ChildWrapper>, first: Signal, grace: Duration) {
    let Some(group) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else { return };
    let gone = async |child: &mut Box<dyn ChildWrapper>| {
        let _ = child.inner_mut().wait().await;
        while test_kill_process_group(group).is_ok() {
            tokio::time::sleep(POLL_EVERY).await;
        }
    };
    let _ = kill_process_group(group, first);
    if crate::clock::running_timeout(grace, gone(child)).await.is_err() {
        let _ = kill_process_group(group, Signal::KILL);
        gone(child).await;
    }
}

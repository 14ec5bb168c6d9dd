//! What went wrong, as people read it: the error, what to do next, and the exit code.
//!
//! Every stage has its own typed errors; here they become one thing that can be shown. Nothing is printed here.

use rrun_protocol::{ExitCode, Outcome};

/// An error on its way to the user.
#[derive(Debug)]
pub(crate) struct Problem {
    /// A lower-case fragment that names what it is about.
    pub(crate) error: String,
    /// What to do next.
    pub(crate) hint: Option<String>,
    /// How `rrun` exits.
    pub(crate) code: ExitCode,
    /// What a push that ends so is called.
    pub(crate) outcome: Outcome,
}

impl Problem {
    /// A mistake in the command line, the settings or the project.
    pub(crate) fn usage(error: impl ToString) -> Self {
        Self::new(error, ExitCode::Usage, Outcome::Failed)
    }

    /// No agent, or none that answers.
    pub(crate) fn unreachable(error: impl ToString) -> Self {
        Self::new(error, ExitCode::Agent, Outcome::Failed)
    }

    /// The agent said no.
    pub(crate) fn refused(error: impl ToString) -> Self {
        Self::new(error, ExitCode::Agent, Outcome::Refused)
    }

    /// Neither the project nor the agent is at fault.
    pub(crate) fn unexpected(error: impl ToString) -> Self {
        Self::new(error, ExitCode::Unexpected, Outcome::Failed)
    }

    /// The user stopped it.
    pub(crate) fn cancelled(error: impl ToString) -> Self {
        Self::new(error, ExitCode::Cancelled, Outcome::Cancelled)
    }

    fn new(error: impl ToString, code: ExitCode, outcome: Outcome) -> Self {
        Self {
            error: error.to_string(),
            hint: None,
            code,
            outcome,
        }
    }

    /// The same with what to do next.
    pub(crate) fn hint(mut self, hint: impl Into<Option<String>>) -> Self {
        self.hint = hint.into();
        self
    }
}

/// Puts what was being done in front of an error that would not say it.
pub(crate) trait Context<T> {
    /// The error as an unexpected problem: `cannot <doing>: <error>`.
    fn or_cannot(self, doing: impl std::fmt::Display) -> Result<T, Problem>;
}

impl<T, E: std::fmt::Display> Context<T> for Result<T, E> {
    fn or_cannot(self, doing: impl std::fmt::Display) -> Result<T, Problem> {
        self.map_err(|error| Problem::unexpected(format!("cannot {doing}: {error}")))
    }
}

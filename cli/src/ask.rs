//! One signed request to the agent and its answer.
//!
//! A refused signature is made again once, for the boot and the time that the refusal names. Every answer that is no success
//! becomes a typed error here; what to do about it is decided by who asked.

use std::{cell::Cell, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming};
use rrun_protocol::{BOOT_HEADER, ExitCode, Refusal, SIGNATURE_HEADER, Status};
use serde::de::DeserializeOwned;

use crate::{
    connection::{Connection, RequestError, ServiceUrl, innermost},
    problem::Problem,
    sign::Signer,
};

/// How long nothing may come or go before an answer starts: an instance may have to start first.
const SILENCE: Duration = Duration::from_secs(5 * 60);
/// Largest answer that is no stream: the manifest of the largest tree.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Largest refusal that is read.
const MAX_REFUSAL_BYTES: usize = 64 << 10;

/// The agent of one service, as this laptop talks to it.
pub(crate) struct Agent {
    connection: Connection,
    signer: Signer,
    /// Whether only the boot that is known is the right one.
    is_pinned: bool,
    boot_changed: Cell<bool>,
}

/// Why there is no answer to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// Nobody listens; the request never left.
    #[error("no agent can be reached at {url}: {source}")]
    Unreachable {
        url: ServiceUrl,
        source: RequestError,
    },
    /// The connection failed with the request under way.
    #[error("the connection to {url} broke: {why}")]
    Broken { url: ServiceUrl, why: String },
    /// Something answers that is no agent.
    #[error("no rrun agent answers at {url} ({what})")]
    NoAgent { url: ServiceUrl, what: String },
    /// Another agent than the one that was meant.
    #[error("another agent answers at {url}")]
    OtherAgent { url: ServiceUrl },
    /// The agent said no.
    #[error("the agent at {url} refused: {}", refusal.error)]
    Refused {
        url: ServiceUrl,
        status: StatusCode,
        refusal: Box<Refusal>,
    },
    /// The laptop's own side failed.
    #[error("{}", .0.error)]
    Here(Problem),
}

impl AskError {
    /// Whether the agent that was meant is not there at all.
    pub(crate) fn is_absence(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::OtherAgent { .. } | Self::NoAgent { .. }
        )
    }

    /// Whether the agent does not know this key.
    pub(crate) fn is_stranger(&self) -> bool {
        self.refused_with(StatusCode::UNAUTHORIZED).is_some()
    }

    /// Whether asking once more may help.
    pub(crate) fn is_broken(&self) -> bool {
        matches!(self, Self::Broken { .. } | Self::Unreachable { .. })
    }

    /// Whether the same request may be taken in a moment: it broke on its way, or the agent had its hands full.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Broken { .. })
            || self.refused_with(StatusCode::SERVICE_UNAVAILABLE).is_some()
    }

    /// The refusal with this status, if it is one.
    pub(crate) fn refused_with(&self, expected: StatusCode) -> Option<&Refusal> {
        match self {
            Self::Refused {
                status, refusal, ..
            } if *status == expected => Some(refusal),
            _ => None,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { .. } => Some(
                "is the address right, and does the service run? `--local` starts an agent on this machine".to_owned(),
            ),
            Self::NoAgent { .. } => Some(
                "after a hand-over, and in production, the app itself answers: start an instance with the agent"
                    .to_owned(),
            ),
            Self::Refused { refusal, .. } => refusal.hint.clone(),
            Self::Here(problem) => problem.hint.clone(),
            Self::OtherAgent { .. } => {
                Some("`push --local` starts the right one, on another port with `--port`".to_owned())
            }
            Self::Broken { .. } => None,
        }
    }
}

impl From<Problem> for AskError {
    fn from(problem: Problem) -> Self {
        Self::Here(problem)
    }
}

impl From<AskError> for Problem {
    fn from(error: AskError) -> Self {
        let hint = error.hint();
        let problem = match error {
            AskError::Refused { .. } => Self::refused(error),
            AskError::Here(problem) => return problem,
            _ => Self::unreachable(error),
        };
        debug_assert_eq!(problem.code, ExitCode::Agent);
        problem.hint(hint)
    }
}

impl Agent {
    pub(crate) fn new(connection: Connection, signer: Signer) -> Self {
        Self {
            connection,
            signer,
            is_pinned: false,
            boot_changed: Cell::new(false),
        }
    }

    /// Takes no other boot for the right agent than the one that is known.
    pub(crate) fn pinned(mut self) -> Self {
        self.is_pinned = true;
        self
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(crate) fn signer(&self) -> &Signer {
        &self.signer
    }

    /// Whether another boot answered than the one known from earlier.
    pub(crate) fn boot_changed(&self) -> bool {
        self.boot_changed.get()
    }

    /// Asks, and signs again once if that is all that is wrong. Gives only successful answers.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, AskError> {
        match self.ask_once(&method, path, &body).await {
            Err(AskError::Refused {
                status, refusal, ..
            }) if status == StatusCode::UNAUTHORIZED => self.learn(status, refusal)?,
            answer => return answer,
        }
        self.ask_once(&method, path, &body).await
    }

    /// Asks for a JSON value.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, AskError> {
        let answer = self.ask(Method::GET, path, Bytes::new()).await?;
        self.read(answer).await
    }

    /// Reads an answer that is a JSON value.
    pub(crate) async fn read<T: DeserializeOwned>(
        &self,
        answer: Response<Incoming>,
    ) -> Result<T, AskError> {
        let body = self.collect(answer, MAX_ANSWER_BYTES).await?;
        serde_json::from_slice(&body).map_err(|_| self.no_agent("its answer is not an agent's"))
    }

    pub(crate) async fn status(&self) -> Result<Status, AskError> {
        self.get(&format!("{}status", rrun_protocol::CONTROL_PREFIX))
            .await
    }

    /// Makes sure that it is known what to sign for, with one unsigned request if need be.
    pub(crate) async fn introduce(&self) -> Result<(), AskError> {
        if self.signer.known().boot.is_some() {
            return Ok(());
        }
        let path = format!("{}status", rrun_protocol::CONTROL_PREFIX);
        match self.ask_once(&Method::GET, &path, &Bytes::new()).await {
            Err(AskError::Refused {
                status, refusal, ..
            }) if status == StatusCode::UNAUTHORIZED => {
                self.learn(status, refusal)?;
                Ok(())
            }
            Err(error) => Err(error),
            Ok(_) => Err(self.no_agent("it answers unsigned requests")),
        }
    }

    /// An answer that no agent would give.
    pub(crate) fn no_agent(&self, what: impl ToString) -> AskError {
        AskError::NoAgent {
            url: self.connection.url().clone(),
            what: what.to_string(),
        }
    }

    /// The connection failed with something under way.
    pub(crate) fn broken(&self, why: impl ToString) -> AskError {
        AskError::Broken {
            url: self.connection.url().clone(),
            why: why.to_string(),
        }
    }

    fn refused(&self, status: StatusCode, refusal: Box<Refusal>) -> AskError {
        AskError::Refused {
            url: self.connection.url().clone(),
            status,
            refusal,
        }
    }

    /// Takes over what a refused signature has to be made for, or gives the refusal back if it does not tell.
    fn learn(&self, status: StatusCode, refusal: Box<Refusal>) -> Result<(), AskError> {
        let before = self.signer.known().boot;
        let is_other = before.is_some() && before != refusal.boot;
        if self.is_pinned && is_other {
            return Err(AskError::OtherAgent {
                url: self.connection.url().clone(),
            });
        }
        if !self.signer.learn(&refusal) {
            return Err(self.refused(status, refusal));
        }
        if is_other {
            self.boot_changed.set(true);
        }
        Ok(())
    }

    async fn ask_once(
        &self,
        method: &Method,
        path: &str,
        body: &Bytes,
    ) -> Result<Response<Incoming>, AskError> {
        let header = self.signer.sign(method.as_str(), path, "", body);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.connection.url()));
        if let Some(header) = header? {
            request = request.header(SIGNATURE_HEADER, header);
        }
        let request = request
            .body(Full::new(body.clone()))
            .map_err(Problem::usage)?;
        let answer = self.connection.request(request, SILENCE).await;
        let answer = answer.map_err(|source| match source.is_connect() {
            true => AskError::Unreachable {
                url: self.connection.url().clone(),
                source,
            },
            false => self.broken(source),
        })?;
        if answer.status().is_success() {
            match answer.headers().contains_key(BOOT_HEADER) {
                true => Ok(answer),
                false => Err(self.no_agent("an app answers in its place")),
            }
        } else {
            Err(self.read_refusal(answer).await)
        }
    }

    /// What an answer that is no success says. Only an agent answers with a [`Refusal`].
    async fn read_refusal(&self, answer: Response<Incoming>) -> AskError {
        let status = answer.status();
        let body = match self.collect(answer, MAX_REFUSAL_BYTES).await {
            Ok(body) => body,
            Err(error) => return error,
        };
        match serde_json::from_slice(&body) {
            Ok(refusal) => self.refused(status, Box::new(refusal)),
            Err(_) => self.no_agent(format_args!("it answers {status}")),
        }
    }

    async fn collect(&self, answer: Response<Incoming>, most: usize) -> Result<Bytes, AskError> {
        match Limited::new(answer.into_body(), most).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) => match error.downcast_ref::<http_body_util::LengthLimitError>() {
                Some(_) => Err(self.no_agent("its answer is too long")),
                None => Err(self.broken(innermost(error.as_ref()))),
            },
        }
    }
}

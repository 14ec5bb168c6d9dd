//! Sends a packed push and follows its events to the terminal one.
//!
//! A stream that breaks, or that ends without its terminal event, is taken up at the last event seen, on a new connection.
//! Where something between laptop and agent holds streams back until they end, what happened is asked for again and again
//! beside the stream, which stays open: Cloud Run gives a container CPU only while it answers a request.
//! What the agent's tree is, and whether a push has to be packed again, is told to the caller, who knows the files.

use std::{pin::pin, time::Duration};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::{Method, Response, StatusCode, body::Incoming};
use rrun_protocol::{
    CONTROL_PREFIX, Digest, Event, EventKind, ExitCode, HEARTBEAT_EVERY, MAX_EVENT_LINE_BYTES,
    Manifest, Preamble, PushId, Report, TreeDigest, UNASKED_BODY_BYTES, UPLOAD_PART_BYTES,
    push_path,
};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::{
    ask::{Agent, AskError},
    cache::Cache,
    connection::innermost,
    pauses::Pauses,
    upload::upload,
};

/// Longest silence before a stream counts as broken: several heartbeats may get lost.
const SILENCE: Duration = Duration::from_secs(4 * HEARTBEAT_EVERY.as_secs());
/// How long a stream may take until its first line, which the agent sends at once; beyond it the events are asked for.
const FIRST_LINE_LIMIT: Duration = Duration::from_millis(2500);
/// The same between two lines: a heartbeat is late.
const NEXT_LINE_LIMIT: Duration = Duration::from_secs(HEARTBEAT_EVERY.as_secs() + 3);
/// How often the events are asked for while the stream tells none.
const POLL_EVERY: Duration = Duration::from_secs(1);

/// How sending ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// With the terminal event.
    Finished(Report),
    /// The agent has another tree than the one that was packed against.
    OtherTree(TreeDigest),
    /// The agent does not know the push any more.
    Lost,
    /// The caller has seen enough.
    Left,
}

impl Sent {
    /// Whether the pushed version serves, or was left to do so.
    pub(crate) fn is_success(&self) -> bool {
        match self {
            Self::Finished(report) => report.outcome.exit_code() == ExitCode::Success,
            _ => false,
        }
    }
}

/// What the caller says to each event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    GoOn,
    Leave,
}

/// A push on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Push<'a> {
    pub(crate) id: PushId,
    /// The tree that the body was packed against.
    pub(crate) base: TreeDigest,
    pub(crate) body: &'a Bytes,
}

/// Posts the push and follows it to its end. `see` gets each event once.
pub(crate) async fn send(
    agent: &Agent,
    push: Push<'_>,
    see: &mut impl FnMut(&Event) -> Then,
) -> Result<Sent, AskError> {
    if push.body.len() as u64 > UNASKED_BODY_BYTES {
        let tree = agent.status().await?.tree;
        if tree != push.base {
            return Ok(Sent::OtherTree(tree));
        }
    }
    let letter = Letter::of(push);
    let mut follower = Follower::new(agent, Some(push.id), see);
    let mut pauses = Pauses::default();
    letter.send_ahead(agent).await?;
    loop {
        match follower
            .open(Method::POST, &letter.path, &letter.body)
            .await
        {
            Met::End(sent) => return Ok(sent),
            Met::Stream(Ok(answer)) => return follower.follow(answer).await,
            // The same id again is applied once, so a push that may have arrived can be sent again.
            Met::Stream(Err(error)) if error.is_passing() => pauses.wait(error).await?,
            Met::Stream(Err(error)) if letter.is_missed(&error) => {
                pauses.wait(error).await?;
                letter.send_ahead(agent).await?;
            }
            Met::Stream(Err(error)) => {
                let refusal = error.refused_with(StatusCode::CONFLICT);
                return match refusal.and_then(|refusal| refusal.tree) {
                    Some(tree) => Ok(Sent::OtherTree(tree)),
                    None => Err(error),
                };
            }
        }
    }
}

/// A push as it goes over the wire.
struct Letter {
    path: String,
    body: Bytes,
    /// What goes ahead in parts.
    upload: Option<(Digest, Bytes)>,
}

impl Letter {
    fn of(push: Push<'_>) -> Self {
        let payload = Preamble::from_body(push.body).map_or(0, |(_, payload)| payload.len());
        if payload as u64 <= UPLOAD_PART_BYTES {
            return Self {
                path: push_path(push.id, None),
                body: push.body.clone(),
                upload: None,
            };
        }
        let preamble = push.body.slice(..push.body.len() - payload);
        let payload = push.body.slice(preamble.len()..);
        let digest = Digest::of(&payload);
        Self {
            path: push_path(push.id, Some(&digest)),
            body: preamble,
            upload: Some((digest, payload)),
        }
    }

    async fn send_ahead(&self, agent: &Agent) -> Result<(), AskError> {
        match &self.upload {
            Some((digest, payload)) => upload(agent, digest, payload).await,
            None => Ok(()),
        }
    }

    /// Whether the agent does not have the upload any more.
    fn is_missed(&self, error: &AskError) -> bool {
        self.upload.is_some() && error.refused_with(StatusCode::NOT_FOUND).is_some()
    }
}

/// Follows an event stream to its end. Which push it tells of is told by the stream itself.
pub(crate) async fn follow(
    agent: &Agent,
    answer: Response<Incoming>,
    see: &mut impl FnMut(&Event) -> Then,
) -> Result<Sent, AskError> {
    Follower::new(agent, None, see).follow(answer).await
}

/// Sees the events of one push, from one stream after the other and from what is asked for beside them.
struct Follower<'a, S> {
    agent: &'a Agent,
    id: Option<PushId>,
    /// Number of the last event seen.
    seen: u64,
    see: &'a mut S,
    pauses: Pauses,
    /// When the agent was last heard, by the stream or beside it.
    heard: Instant,
    /// When to ask beside the stream, unless it tells something.
    poll_at: Instant,
}

/// What came first.
enum Met<T> {
    /// What the stream was waited for with.
    Stream(T),
    /// The end, from what was asked for beside the stream.
    End(Sent),
}

impl<'a, S: FnMut(&Event) -> Then> Follower<'a, S> {
    fn new(agent: &'a Agent, id: Option<PushId>, see: &'a mut S) -> Self {
        let now = Instant::now();
        Self {
            agent,
            id,
            seen: 0,
            see,
            pauses: Pauses::default(),
            heard: now,
            poll_at: now + FIRST_LINE_LIMIT,
        }
    }

    /// Asks for a stream.
    async fn open(
        &mut self,
        method: Method,
        path: &str,
        body: &Bytes,
    ) -> Met<Result<Response<Incoming>, AskError>> {
        self.poll_at = Instant::now() + FIRST_LINE_LIMIT;
        let agent = self.agent;
        self.or_poll(agent.ask(method, path, body.clone())).await
    }

    async fn follow(mut self, answer: Response<Incoming>) -> Result<Sent, AskError> {
        let mut lines = Lines::new(answer);
        self.heard = Instant::now();
        loop {
            let why = match self.next_line(&mut lines).await {
                Met::End(sent) => return Ok(sent),
                Met::Stream(Line::Event(event)) => match self.take(event) {
                    Some(sent) => return Ok(sent),
                    None => continue,
                },
                Met::Stream(Line::Junk) if self.seen == 0 => {
                    return Err(self.agent.no_agent("its answer is not an agent's"));
                }
                Met::Stream(Line::Junk) => "the agent's answer cannot be read".to_owned(),
                Met::Stream(Line::Cut(why)) => why,
            };
            let Some(id) = self.id else {
                return Err(self.agent.broken(why));
            };
            self.pauses.wait(self.agent.broken(why)).await?;
            lines = match self.take_up(id).await? {
                Met::End(sent) => return Ok(sent),
                Met::Stream(Some(answer)) => Lines::new(answer),
                Met::Stream(None) => return Ok(Sent::Lost),
            };
        }
    }

    /// Asks for the events after those seen; `None` if the agent does not know the push.
    async fn take_up(&mut self, id: PushId) -> Result<Met<Option<Response<Incoming>>>, AskError> {
        loop {
            let path = events_path(id, self.seen);
            match self.open(Method::GET, &path, &Bytes::new()).await {
                Met::End(sent) => return Ok(Met::End(sent)),
                Met::Stream(Ok(answer)) => {
                    self.heard = Instant::now();
                    return Ok(Met::Stream(Some(answer)));
                }
                Met::Stream(Err(error)) if error.refused_with(StatusCode::NOT_FOUND).is_some() => {
                    return Ok(Met::Stream(None));
                }
                Met::Stream(Err(error)) if error.is_broken() => self.pauses.wait(error).await?,
                Met::Stream(Err(error)) => return Err(error),
            }
        }
    }

    /// The stream's next line. Silence on the stream is none as long as the agent answers beside it.
    async fn next_line(&mut self, lines: &mut Lines) -> Met<Line> {
        loop {
            let deadline = self.heard + SILENCE;
            match timeout_at(deadline, self.or_poll(lines.next())).await {
                Ok(met) => {
                    self.heard = Instant::now();
                    self.poll_at = self.heard + NEXT_LINE_LIMIT;
                    return met;
                }
                Err(_) if self.heard + SILENCE > deadline => {}
                Err(_) => {
                    let why = format!("nothing came for {} s", SILENCE.as_secs());
                    return Met::Stream(Line::Cut(why));
                }
            }
        }
    }

    /// Waits for the stream, and asks beside it while it tells nothing for too long.
    async fn or_poll<T>(&mut self, waiting: impl Future<Output = T>) -> Met<T> {
        let mut waiting = pin!(waiting);
        loop {
            tokio::select! {
                biased;
                met = &mut waiting => return Met::Stream(met),
                () = sleep_until(self.poll_at), if self.id.is_some() => {}
            }
            tokio::select! {
                biased;
                met = &mut waiting => return Met::Stream(met),
                end = self.poll() => if let Some(end) = end {
                    return Met::End(end);
                },
            }
            self.poll_at = Instant::now() + POLL_EVERY;
        }
    }

    /// Asks for what happened until now. That the agent does not know the push means nothing while it may be on its way, and
    /// what is wrong with the connection shows on the stream.
    async fn poll(&mut self) -> Option<Sent> {
        let path = events_path(self.id?, self.seen) + "&wait=false";
        let answer = self.agent.ask(Method::GET, &path, Bytes::new()).await;
        let mut lines = Lines::new(answer.ok()?);
        while let Line::Event(event) = lines.next().await {
            self.heard = Instant::now();
            if let Some(sent) = self.take(event) {
                return Some(sent);
            }
        }
        self.heard = Instant::now();
        None
    }

    /// Shows an event that was not seen before. Gives the end, if this is it.
    fn take(&mut self, event: Event) -> Option<Sent> {
        if let EventKind::Received { push, .. } = &event.kind {
            self.id = Some(*push);
        }
        if event.kind.is_kept() && event.seq <= self.seen {
            return None;
        }
        self.seen = self.seen.max(event.seq);
        self.pauses.reset();
        let then = (self.see)(&event);
        match event.kind {
            EventKind::Finished(report) => Some(Sent::Finished(report)),
            _ => (then == Then::Leave).then_some(Sent::Left),
        }
    }
}

fn events_path(id: PushId, seen: u64) -> String {
    format!("{CONTROL_PREFIX}pushes/{id}/events?from={seen}")
}

/// The agent's tree to pack against: the one remembered, or asked for.
pub(crate) async fn tree(
    agent: &Agent,
    cache: &Cache,
    digest: Option<TreeDigest>,
) -> Result<Manifest, AskError> {
    if let Some(tree) = digest.and_then(|digest| cache.tree(&digest)) {
        return Ok(tree);
    }
    agent.get(&format!("{CONTROL_PREFIX}tree")).await
}

/// An answer, line by line.
struct Lines {
    body: Incoming,
    unread: BytesMut,
}

enum Line {
    Event(Event),
    /// A whole line that is no event.
    Junk,
    /// No more lines.
    Cut(String),
}

impl Lines {
    fn new(answer: Response<Incoming>) -> Self {
        Self {
            body: answer.into_body(),
            unread: BytesMut::new(),
        }
    }

    async fn next(&mut self) -> Line {
        let mut searched = 0;
        loop {
            if let Some(end) = self.unread[searched..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                let line = self.unread.split_to(searched + end + 1);
                return serde_json::from_slice(&line).map_or(Line::Junk, Line::Event);
            }
            searched = self.unread.len();
            if searched > MAX_EVENT_LINE_BYTES {
                return Line::Junk;
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.unread.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Line::Cut(innermost(&error)),
                None => return Line::Cut("it ended too early".to_owned()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rrun_protocol::{BootId, Outcome, PrivateKey, Refusal, Timings};

    use super::*;
    use crate::{
        connection::Connection,
        fake_agent::{Answer, FakeAgent},
        sign::Signer,
    };

    const ID: [u8; 9] = *b"push-push";

    fn tree_digest() -> TreeDigest {
        Manifest::default().tree_digest()
    }

    fn event(seq: u64, kind: EventKind) -> String {
        let mut line = serde_json::to_string(&Event { seq, kind }).unwrap();
        line.push('\n');
        line
    }

    fn received() -> String {
        let kind = EventKind::Received {
            push: PushId::from_random(ID),
            tree: tree_digest(),
            changed: 1,
            deleted: 0,
        };
        event(1, kind)
    }

    fn log(seq: u64) -> String {
        let text = format!("line {seq}");
        event(seq, EventKind::Log { text })
    }

    fn finished(seq: u64) -> String {
        event(
            seq,
            EventKind::Finished(Report {
                outcome: Outcome::Live,
                tree: tree_digest(),
                generation: Some(2),
                reason: None,
                hint: None,
                superseded_by: None,
                timings_ms: Timings::default(),
            }),
        )
    }

    fn refusal(boot: u8, tree: Option<TreeDigest>) -> Refusal {
        Refusal {
            error: "no".to_owned(),
            hint: None,
            boot: Some(BootId::from_random([boot; 9])),
            time: Some(1_000_000),
            tree,
        }
    }

    /// Talks to `fake` with a boot known, and gives the end and the numbers of the events seen.
    async fn push(fake: &FakeAgent) -> (Result<Sent, AskError>, Vec<u64>) {
        let folder = tempfile::tempdir().unwrap();
        let services = Cache::open(folder.path().to_owned()).unwrap();
        let key = PrivateKey::from_seed(&[7; 32]);
        let signer = Signer::new(key, services, fake.url().as_str());
        signer.set_boot(BootId::from_random([1; 9]));
        let agent = Agent::new(Connection::new(fake.url()).unwrap(), signer);
        let mut seen = Vec::new();
        let push = Push {
            id: PushId::from_random(ID),
            base: tree_digest(),
            body: &Bytes::from_static(b"body"),
        };
        let sent = send(&agent, push, &mut |event| {
            seen.push(event.seq);
            Then::GoOn
        })
        .await;
        (sent, seen)
    }

    #[tokio::test]
    async fn a_stream_that_ends_too_early_is_taken_up_and_no_event_is_seen_twice() {
        let fake = FakeAgent::start(|request| match request.number {
            1 => Answer::text(200, received() + &log(2)),
            // The agent repeats one, and the line after it is cut in the middle.
            2 => Answer::text(200, log(2) + &log(3) + &log(4)[..9]),
            _ => Answer::text(200, log(4) + &finished(5)),
        })
        .await;
        let (sent, seen) = push(&fake).await;
        assert!(matches!(sent, Ok(Sent::Finished(_))), "{sent:?}");
        assert_eq!(seen, [1, 2, 3, 4, 5]);
        let id = PushId::from_random(ID);
        assert_eq!(
            fake.requests(),
            [
                format!("POST /_rrun/pushes/{id}"),
                format!("GET /_rrun/pushes/{id}/events?from=2"),
                format!("GET /_rrun/pushes/{id}/events?from=3"),
            ]
        );
    }

    #[tokio::test]
    async fn a_connection_that_breaks_before_the_answer_sends_the_same_push_again() {
        let fake = FakeAgent::start(|request| match request.number {
            1 => Answer::hang_up(),
            _ => Answer::text(200, received() + &finished(2)),
        })
        .await;
        let (sent, seen) = push(&fake).await;
        assert!(matches!(sent, Ok(Sent::Finished(_))), "{sent:?}");
        assert_eq!(seen, [1, 2]);
        assert_eq!(fake.requests()[0], fake.requests()[1]);
    }

    #[tokio::test]
    async fn a_signature_is_made_again_once_for_the_boot_that_is_named() {
        let fake = FakeAgent::start(|request| match request.boot() {
            Some(boot) if boot == BootId::from_random([2; 9]) => {
                Answer::text(200, received() + &finished(2))
            }
            _ => Answer::json(401, &refusal(2, None)),
        })
        .await;
        assert!(matches!(push(&fake).await.0, Ok(Sent::Finished(_))));
        assert_eq!(fake.requests().len(), 2);

        let stranger = FakeAgent::start(|_| Answer::json(401, &refusal(2, None))).await;
        let error = push(&stranger).await.0.unwrap_err();
        assert!(error.refused_with(StatusCode::UNAUTHORIZED).is_some());
        assert_eq!(stranger.requests().len(), 2);
    }

    #[tokio::test]
    async fn another_tree_is_told_to_the_caller() {
        let fake = FakeAgent::start(|_| Answer::json(409, &refusal(1, Some(tree_digest())))).await;
        assert_eq!(push(&fake).await.0.unwrap(), Sent::OtherTree(tree_digest()));
    }

    #[tokio::test]
    async fn a_push_that_the_agent_forgot_is_lost() {
        let fake = FakeAgent::start(|request| match request.number {
            1 => Answer::text(200, received()),
            _ => Answer::json(404, &refusal(1, None)),
        })
        .await;
        assert_eq!(push(&fake).await.0.unwrap(), Sent::Lost);
    }

    #[tokio::test]
    async fn an_app_that_answers_is_no_agent() {
        for (status, text) in [(404, "nothing here"), (200, "<html>\n</html>\n")] {
            let fake = FakeAgent::start(move |_| Answer::text(status, text)).await;
            let error = push(&fake).await.0.unwrap_err();
            assert!(matches!(error, AskError::NoAgent { .. }), "{error}");
            assert_eq!(crate::problem::Problem::from(error).code as u8, 3);
        }
    }

    #[tokio::test]
    async fn nobody_listening_is_told_at_once() {
        let fake = FakeAgent::start(|_| Answer::text(200, "")).await;
        let url = fake.url();
        fake.stop().await;
        let fake = FakeAgent::at(url);
        let error = push(&fake).await.0.unwrap_err();
        assert!(matches!(error, AskError::Unreachable { .. }), "{error}");
    }
}

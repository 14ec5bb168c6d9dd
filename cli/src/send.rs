//! Sends a packed push and follows its events to the terminal one.
//!
//! A stream that breaks, or that ends without its terminal event, is taken up at the last event seen, on a new connection.
//! What the agent's tree is, and whether a push has to be packed again, is told to the caller, who knows the files.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::{Method, Response, StatusCode, body::Incoming};
use rrun_protocol::{
    CONTROL_PREFIX, Event, EventKind, ExitCode, HEARTBEAT_EVERY, MAX_EVENT_LINE_BYTES, Manifest,
    PushId, Report, TreeDigest, UNASKED_BODY_BYTES,
};

use crate::{
    ask::{Agent, AskError},
    cache::Cache,
    connection::innermost,
};

/// Longest silence before a stream counts as broken: several heartbeats may get lost.
const SILENCE: Duration = Duration::from_secs(4 * HEARTBEAT_EVERY.as_secs());
/// How often a stream is taken up again without a new event in between.
const MAX_RETRIES: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

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
    let path = format!("{CONTROL_PREFIX}pushes/{}", push.id);
    let mut pauses = Pauses::default();
    let answer = loop {
        match agent.ask(Method::POST, &path, push.body.clone()).await {
            Ok(answer) => break answer,
            // The same id again is applied once, so a push that may have arrived can be sent again.
            Err(error @ AskError::Broken { .. }) => pauses.wait(error).await?,
            Err(error) => {
                let refusal = error.refused_with(StatusCode::CONFLICT);
                return match refusal.and_then(|refusal| refusal.tree) {
                    Some(tree) => Ok(Sent::OtherTree(tree)),
                    None => Err(error),
                };
            }
        }
    };
    follow(agent, Some(push.id), answer, see).await
}

/// Follows an event stream to its end. `id` may be told by the stream itself.
pub(crate) async fn follow(
    agent: &Agent,
    mut id: Option<PushId>,
    answer: Response<Incoming>,
    see: &mut impl FnMut(&Event) -> Then,
) -> Result<Sent, AskError> {
    let mut lines = Lines::new(answer);
    let mut seen = 0;
    let mut pauses = Pauses::default();
    loop {
        let why = match lines.next().await {
            Line::Event(event) => {
                if let EventKind::Received { push, .. } = &event.kind {
                    id = Some(*push);
                }
                if event.kind.is_kept() && event.seq <= seen {
                    continue;
                }
                seen = seen.max(event.seq);
                pauses = Pauses::default();
                let then = see(&event);
                match event.kind {
                    EventKind::Finished(report) => return Ok(Sent::Finished(report)),
                    _ if then == Then::Leave => return Ok(Sent::Left),
                    _ => continue,
                }
            }
            Line::Junk if seen == 0 => {
                return Err(agent.no_agent("its answer is not an agent's"));
            }
            Line::Junk => "the agent's answer cannot be read".to_owned(),
            Line::Cut(why) => why,
        };
        let Some(id) = id else {
            return Err(agent.broken(why));
        };
        pauses.wait(agent.broken(why)).await?;
        lines = match take_up(agent, id, seen, &mut pauses).await? {
            Some(answer) => Lines::new(answer),
            None => return Ok(Sent::Lost),
        };
    }
}

/// Asks for the events after `seen`; `None` if the agent does not know the push.
async fn take_up(
    agent: &Agent,
    id: PushId,
    seen: u64,
    pauses: &mut Pauses,
) -> Result<Option<Response<Incoming>>, AskError> {
    let path = format!("{CONTROL_PREFIX}pushes/{id}/events?from={seen}");
    loop {
        match agent.ask(Method::GET, &path, Bytes::new()).await {
            Ok(answer) => return Ok(Some(answer)),
            Err(error) if error.refused_with(StatusCode::NOT_FOUND).is_some() => return Ok(None),
            Err(error) if error.is_broken() => pauses.wait(error).await?,
            Err(error) => return Err(error),
        }
    }
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

/// Waits longer from try to try, and gives up after some.
#[derive(Debug, Default)]
struct Pauses(u32);

impl Pauses {
    async fn wait(&mut self, error: AskError) -> Result<(), AskError> {
        if self.0 == MAX_RETRIES {
            return Err(error);
        }
        let pause = FIRST_PAUSE * 2u32.pow(self.0);
        self.0 += 1;
        tokio::time::sleep(pause.min(LONGEST_PAUSE)).await;
        Ok(())
    }
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
            match tokio::time::timeout(SILENCE, self.body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.unread.extend_from_slice(&data);
                    }
                }
                Ok(Some(Err(error))) => return Line::Cut(innermost(&error)),
                Ok(None) => return Line::Cut("it ended too early".to_owned()),
                Err(_) => {
                    return Line::Cut(format!("nothing came for {} s", SILENCE.as_secs()));
                }
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

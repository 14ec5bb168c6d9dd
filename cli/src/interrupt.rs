//! Ctrl-C: the first one cancels the push and waits for its end, the second one just leaves.

use std::time::Duration;

use hyper::Method;
use rrun_protocol::{CONTROL_PREFIX, PushId};
use tokio::sync::watch;

use crate::{
    ask::{Agent, AskError},
    problem::Problem,
};

/// How long the agent may take to confirm. Its grace for a build is shorter.
const PATIENCE: Duration = Duration::from_secs(10);

/// Counts how often the user pressed Ctrl-C. From here on it does not end the process by itself.
pub(crate) fn listen() -> watch::Receiver<u32> {
    let (presses, receiver) = watch::channel(0);
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            presses.send_modify(|count| *count += 1);
        }
    });
    receiver
}

/// Waits for `conversation`, the push `id`, to end. A first press asks the agent to cancel it.
///
/// Gives what the conversation gave and whether it was interrupted, or the problem of having left before its end.
pub(crate) async fn or_cancel<T>(
    agent: &Agent,
    id: PushId,
    presses: &mut watch::Receiver<u32>,
    conversation: impl Future<Output = Result<T, AskError>>,
) -> Result<(T, bool), AskError> {
    let mut conversation = std::pin::pin!(conversation);
    tokio::select! {
        biased;
        ended = &mut conversation => return ended.map(|end| (end, false)),
        Ok(()) = presses.changed() => {}
    }
    let path = format!("{CONTROL_PREFIX}cancel?push={id}");
    let mut asking = std::pin::pin!(agent.ask(Method::POST, &path, Default::default()));
    let mut asked = false;
    let mut patience = std::pin::pin!(tokio::time::sleep(PATIENCE));
    loop {
        tokio::select! {
            biased;
            ended = &mut conversation => return ended.map(|end| (end, true)),
            answer = &mut asking, if !asked => match answer {
                Ok(_) => asked = true,
                Err(error) => {
                    return Err(Problem::cancelled(format!("left; the agent did not take the cancellation: {error}")).into());
                }
            },
            Ok(()) = presses.changed() => {
                return Err(Problem::cancelled("left before the agent confirmed the cancellation").into());
            }
            () = &mut patience => {
                return Err(Problem::cancelled("left; the agent did not confirm the cancellation in time").into());
            }
        }
    }
}

/// Waits for something that can be left at any time.
pub(crate) async fn or_leave<T>(
    presses: &mut watch::Receiver<u32>,
    waiting: impl Future<Output = Result<T, Problem>>,
) -> Result<T, Problem> {
    tokio::select! {
        biased;
        done = waiting => done,
        Ok(()) = presses.changed() => Err(Problem::cancelled("cancelled before anything was sent")),
    }
}

#[cfg(test)]
mod tests {
    use rrun_protocol::{BootId, ExitCode, PrivateKey};
    use tokio::sync::oneshot;

    use super::*;
    use crate::{
        cache::Cache,
        connection::Connection,
        fake_agent::{Answer, FakeAgent},
        sign::Signer,
    };

    fn agent(fake: &FakeAgent) -> Agent {
        let folder = tempfile::tempdir().unwrap();
        let services = Cache::open(folder.path().to_owned()).unwrap();
        let signer = Signer::new(PrivateKey::from_seed(&[7; 32]), services, "fake");
        signer.set_boot(BootId::from_random([1; 9]));
        Agent::new(Connection::new(fake.url()).unwrap(), signer)
    }

    fn id() -> PushId {
        PushId::from_random([1; 9])
    }

    #[tokio::test]
    async fn the_first_press_asks_the_agent_and_waits_for_the_end() {
        let (asked, is_asked) = oneshot::channel();
        let asked = std::sync::Mutex::new(Some(asked));
        let fake = FakeAgent::start(move |_| {
            let _ = asked.lock().unwrap().take().unwrap().send(());
            Answer::text(200, "{}")
        })
        .await;
        let (presses, mut receiver) = watch::channel(0);
        presses.send_modify(|count| *count += 1);
        let conversation = async {
            is_asked.await.unwrap();
            Ok("the end")
        };
        let end = or_cancel(&agent(&fake), id(), &mut receiver, conversation).await;
        assert_eq!(end.unwrap(), ("the end", true));
        let path = format!("POST /_rrun/cancel?push={}", id());
        assert_eq!(fake.requests(), [path]);
    }

    #[tokio::test]
    async fn the_second_press_leaves_at_once() {
        let (presses, mut receiver) = watch::channel(0);
        presses.send_modify(|count| *count += 1);
        let fake = FakeAgent::start(move |_| {
            presses.send_modify(|count| *count += 1);
            Answer::text(200, "{}")
        })
        .await;
        let never = std::future::pending::<Result<(), AskError>>();
        let left = or_cancel(&agent(&fake), id(), &mut receiver, never).await;
        let problem = Problem::from(left.unwrap_err());
        assert_eq!(problem.code, ExitCode::Cancelled);
    }
}

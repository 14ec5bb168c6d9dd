//! Sends the payload of a large push ahead in parts, so that a broken connection costs one part.
//!
//! The agent is asked first which parts it has: an upload that broke, in this `rrun push` or an earlier one, goes on where it
//! was. What the payload holds, and the push that names the upload, is the caller's.

use bytes::Bytes;
use hyper::Method;
use rrun_protocol::{Arrived, Digest, part_path, parts, upload_path};

use crate::{
    ask::{Agent, AskError},
    pauses::Pauses,
};

/// Sends what the agent does not have of `payload`.
pub(crate) async fn upload(
    agent: &Agent,
    digest: &Digest,
    payload: &Bytes,
) -> Result<(), AskError> {
    let mut pauses = Pauses::default();
    let arrived = arrived(agent, digest, &mut pauses).await?;
    for (part, range) in parts(payload.len()) {
        if !arrived.parts.contains(&part) {
            send_part(
                agent,
                &part_path(digest, part),
                payload.slice(range),
                &mut pauses,
            )
            .await?;
        }
    }
    Ok(())
}

async fn arrived(agent: &Agent, digest: &Digest, pauses: &mut Pauses) -> Result<Arrived, AskError> {
    loop {
        match agent.get(&upload_path(digest)).await {
            Err(error) if error.is_passing() => pauses.wait(error).await?,
            answer => return answer,
        }
    }
}

async fn send_part(
    agent: &Agent,
    path: &str,
    part: Bytes,
    pauses: &mut Pauses,
) -> Result<(), AskError> {
    loop {
        match agent.ask(Method::PUT, path, part.clone()).await {
            Ok(_) => {
                pauses.reset();
                return Ok(());
            }
            Err(error) if error.is_passing() => pauses.wait(error).await?,
            Err(error) => return Err(error),
        }
    }
}

//! Large pushes in parts, so that a broken connection costs one part and no request grows beyond what Cloud Run takes.
//!
//! ```text
//! GET  /_rrun/uploads/{digest}           which parts arrived: {"parts":[0,1]}
//! PUT  /_rrun/uploads/{digest}/{part}    one part, signed like every body
//! POST /_rrun/pushes/{id}?upload={digest}
//! ```
//!
//! The push is the POST's body followed by the upload. A client sends the preamble as body and the payload as upload: the
//! preamble numbers each scan, the payload is the same bytes as long as the same files go against the same base, so that
//! the next `rrun push` goes on where a broken one ended. The digest is SHA-256 over the whole upload; the agent checks it
//! before any decoder sees a byte. The signature of the POST covers its query, and so the upload.

use serde::{Deserialize, Serialize};

use crate::{CONTROL_PREFIX, digest::Digest, id::PushId, limits::UPLOAD_PART_BYTES};

/// Answer of `GET /_rrun/uploads/{digest}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrived {
    /// Numbers of the parts that the agent has, from 0, rising.
    pub parts: Vec<u32>,
}

/// Where to ask which parts of an upload arrived.
pub fn upload_path(upload: &Digest) -> String {
    format!("{CONTROL_PREFIX}uploads/{upload}")
}

/// Where a part of an upload goes.
pub fn part_path(upload: &Digest, part: u32) -> String {
    format!("{CONTROL_PREFIX}uploads/{upload}/{part}")
}

/// Where a push goes, behind whose body `upload` follows.
pub fn push_path(push: PushId, upload: Option<&Digest>) -> String {
    match upload {
        Some(upload) => format!("{CONTROL_PREFIX}pushes/{push}?upload={upload}"),
        None => format!("{CONTROL_PREFIX}pushes/{push}"),
    }
}

/// The parts of an upload of `length` bytes: the number of each, and which bytes it holds.
pub fn parts(length: usize) -> impl Iterator<Item = (u32, std::ops::Range<usize>)> {
    let size = UPLOAD_PART_BYTES as usize;
    let ranges = (0..length)
        .step_by(size)
        .map(move |start| start..length.min(start + size));
    (0..).zip(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Authorization, BootId, Nonce, PrivateKey, SignedRequest};

    fn signed(method: &str, path: &str, body: &[u8]) -> String {
        let request = SignedRequest {
            method,
            path_and_query: path,
            content_encoding: "",
            body: Digest::of(body),
        };
        let (nonce, boot) = (Nonce::from_random([1; 12]), BootId::from_random([2; 9]));
        let key = PrivateKey::from_seed(&[7; 32]);
        let header = Authorization::sign(&key, &request, 1_700_000_000, nonce, boot);
        format!("{method} {path}\n{header}\n")
    }

    /// Any change here is a change of the protocol.
    #[test]
    fn the_requests_of_an_upload_have_their_committed_form() {
        let upload = Digest::of(b"payload");
        let push = PushId::from_random(*b"push-push");
        let arrived = Arrived { parts: vec![0, 2] };
        let requests = [
            signed("GET", &upload_path(&upload), b""),
            serde_json::to_string(&arrived).unwrap() + "\n",
            signed("PUT", &part_path(&upload, 1), b"part"),
            signed("POST", &push_path(push, Some(&upload)), b"preamble"),
            signed("POST", &push_path(push, None), b"preamble and payload"),
        ];
        assert_eq!(requests.concat(), include_str!("../vectors/upload.txt"));
    }

    #[test]
    fn parts_are_of_one_size_but_the_last() {
        let size = UPLOAD_PART_BYTES as usize;
        let ranges = |length| parts(length).collect::<Vec<_>>();
        assert_eq!(ranges(0), []);
        assert_eq!(ranges(size), [(0, 0..size)]);
        assert_eq!(ranges(size + 1), [(0, 0..size), (1, size..size + 1)]);
    }
}

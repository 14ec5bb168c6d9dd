//! Signs requests for one service, and remembers what a signature has to be made for.
//!
//! A signature holds for one boot of the agent and near its clock. Both are told by the agent when it refuses, and kept in the
//! user's cache, so that the next request is right at once. Whether to ask again is decided by who sends.

use std::{
    cell::Cell,
    time::{SystemTime, UNIX_EPOCH},
};

use rrun_protocol::{
    Authorization, BootId, Digest, Nonce, PrivateKey, Refusal, SIGNATURE_HEADER, SignedRequest,
    TreeDigest,
};
use serde::{Deserialize, Serialize};

use crate::{
    cache::Cache,
    checkout::random,
    problem::{Context as _, Problem},
};

/// What is known of a service from earlier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Known {
    pub(crate) boot: Option<BootId>,
    /// How far the agent's clock is ahead of this machine's, in seconds.
    clock_offset: i64,
    /// The tree that the agent acknowledged last.
    pub(crate) tree: Option<TreeDigest>,
}

/// The user's key, and what is known of the service that it signs for.
pub(crate) struct Signer {
    key: PrivateKey,
    known: Cell<Known>,
    services: Cache,
    name: String,
}

impl Signer {
    /// Takes up what `services` remembers of `service`, an address or another name of its own.
    pub(crate) fn new(key: PrivateKey, services: Cache, service: &str) -> Self {
        let name = Digest::of(service.as_bytes()).to_string();
        let known = services.load(&name).unwrap_or_default();
        Self {
            key,
            known: Cell::new(known),
            services,
            name,
        }
    }

    pub(crate) fn known(&self) -> Known {
        self.known.get()
    }

    /// Takes the boot id from a source other than the agent's answer.
    pub(crate) fn set_boot(&self, boot: BootId) {
        self.known.set(Known {
            boot: Some(boot),
            ..self.known.get()
        });
    }

    /// The signature header's value, if it is known what to sign for.
    pub(crate) fn sign(
        &self,
        method: &str,
        path_and_query: &str,
        content_encoding: &str,
        body: &[u8],
    ) -> Result<Option<String>, Problem> {
        let known = self.known.get();
        let Some(boot) = known.boot else {
            return Ok(None);
        };
        let nonce = Nonce::from_random(random().or_cannot("draw random bytes")?);
        let request = SignedRequest {
            method,
            path_and_query,
            content_encoding,
            body: Digest::of(body),
        };
        let time = now().saturating_add_signed(known.clock_offset);
        let signed = Authorization::sign(&self.key, &request, time, nonce, boot);
        Ok(Some(signed.to_string()))
    }

    /// Learns from a refused signature what the next one has to be made for. Says whether that is told.
    pub(crate) fn learn(&self, refusal: &Refusal) -> bool {
        let (Some(boot), Some(time)) = (refusal.boot, refusal.time) else {
            return false;
        };
        self.change(Known {
            boot: Some(boot),
            clock_offset: i64::try_from(i128::from(time) - i128::from(now())).unwrap_or_default(),
            ..self.known.get()
        });
        true
    }

    /// Remembers the tree that the agent has now.
    pub(crate) fn remember_tree(&self, tree: TreeDigest) {
        self.change(Known {
            tree: Some(tree),
            ..self.known.get()
        });
    }

    fn change(&self, known: Known) {
        if self.known.replace(known) != known {
            // Losing it costs a round trip next time, nothing else.
            let _ = self.services.store(&self.name, &known);
        }
    }
}

fn now() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    #[cfg(debug_assertions)]
    let now = now.saturating_add_signed(wrong_clock());
    now
}

/// How wrong this machine's clock is to be taken for, in seconds: lets the tests be a laptop with a wrong clock.
#[cfg(debug_assertions)]
fn wrong_clock() -> i64 {
    let offset = std::env::var("RRUN_TEST_CLOCK_OFFSET").ok();
    offset
        .and_then(|offset| offset.parse().ok())
        .unwrap_or_default()
}

/// The header as a line for curl's `-H`.
pub(crate) fn header_line(value: &str) -> String {
    format!("{SIGNATURE_HEADER}: {value}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signer(folder: &std::path::Path) -> Signer {
        let services = Cache::open(folder.to_owned()).unwrap();
        Signer::new(PrivateKey::from_seed(&[7; 32]), services, "https://a")
    }

    fn refusal(boot: u8, time: u64) -> Refusal {
        Refusal {
            error: "stale".to_owned(),
            hint: None,
            boot: Some(BootId::from_random([boot; 9])),
            time: Some(time),
            tree: None,
        }
    }

    #[test]
    fn what_a_refusal_tells_is_signed_for_from_then_on_also_by_the_next_process() {
        let folder = tempfile::tempdir().unwrap();
        let first = signer(folder.path());
        assert_eq!(first.sign("GET", "/_rrun/status", "", b"").unwrap(), None);
        assert!(first.learn(&refusal(1, now() + 3600)));
        for signer in [first, signer(folder.path())] {
            let header = signer.sign("GET", "/_rrun/status", "", b"").unwrap();
            let header: Authorization = header.unwrap().parse().unwrap();
            assert_eq!(header.boot, BootId::from_random([1; 9]));
            assert!(header.time.abs_diff(now() + 3600) < 60);
            let public = PrivateKey::from_seed(&[7; 32]).public_key("");
            header.verify(&public, "GET", "/_rrun/status", "").unwrap();
        }
    }

    #[test]
    fn a_refusal_without_a_boot_teaches_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut refusal = refusal(1, 2);
        refusal.boot = None;
        assert!(!signer(folder.path()).learn(&refusal));
    }
}

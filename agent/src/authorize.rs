//! Who may use the control routes: nothing is answered that is not signed by a known key, now, for this boot, and for the
//! first time.
//!
//! Verifies headers only, before a byte of a body is read. That a body has the digest that was signed is checked where it
//! is read.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::http::{HeaderMap, StatusCode, header::CONTENT_ENCODING};
use rrun_protocol::{
    Authorization, BootId, Digest, MAX_CLOCK_SKEW, MAX_NONCES, Nonce, PROTOCOL_VERSION, PublicKey,
    Refusal, SIGNATURE_HEADER, SignatureError,
};

/// Checks every request's signature. One for the agent's life.
pub(crate) struct Gate {
    keys: Vec<PublicKey>,
    boot: BootId,
    nonces: Mutex<Nonces>,
}

/// Who signed a request, and for which body.
#[derive(Clone, Debug)]
pub(crate) struct Signer {
    /// The key's comment, which names the person; the key's id where there is none.
    pub name: String,
    /// Digest that the body has to have.
    pub body: Digest,
}

impl Gate {
    /// A gate for the owners of `keys`.
    pub(crate) fn new(keys: Vec<PublicKey>, boot: BootId) -> Self {
        Self {
            keys,
            boot,
            nonces: Mutex::default(),
        }
    }

    /// Lets a request through or says why not. `path_and_query` is raw, as in the request line.
    pub(crate) fn check(
        &self,
        method: &str,
        path_and_query: &str,
        headers: &HeaderMap,
    ) -> Result<Signer, (StatusCode, Refusal)> {
        let now = seconds_since_1970();
        let refuse = |error: &str| (StatusCode::UNAUTHORIZED, self.refusal(error, now));
        let mut signatures = headers.get_all(SIGNATURE_HEADER).iter();
        let (Some(header), None) = (signatures.next(), signatures.next()) else {
            return Err(refuse("the request is not signed"));
        };
        let text = header
            .to_str()
            .map_err(|_| refuse("the signature header is malformed"))?;
        let authorization: Authorization = text.parse().map_err(|error| match error {
            SignatureError::Version { client } => {
                (StatusCode::UPGRADE_REQUIRED, other_version(client))
            }
            error => refuse(&error.to_string()),
        })?;
        let key = self.keys.iter().find(|key| key.id() == authorization.key);
        let key = key.ok_or_else(|| {
            let mut refusal = self.refusal("the key is not among the agent's authorized keys", now);
            refusal.hint =
                Some("add the line that `rrun key` prints to RRUN_AUTHORIZED_KEYS".to_owned());
            (StatusCode::UNAUTHORIZED, refusal)
        })?;
        let encoding = headers
            .get(CONTENT_ENCODING)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        authorization
            .verify(key, method, path_and_query, encoding)
            .map_err(|error| refuse(&error.to_string()))?;
        if authorization.boot != self.boot {
            return Err(refuse("the signature is for another boot of the agent"));
        }
        if authorization.time.abs_diff(now) > MAX_CLOCK_SKEW.as_secs() {
            return Err(refuse(
                "the signature's time is too far from the agent's clock",
            ));
        }
        let mut nonces = self.nonces.lock().unwrap_or_else(PoisonError::into_inner);
        nonces
            .take(authorization.nonce, authorization.time, now)
            .map_err(refuse)?;
        let name = if key.comment().is_empty() {
            key.id().to_string()
        } else {
            key.comment().to_owned()
        };
        Ok(Signer {
            name,
            body: authorization.body,
        })
    }

    fn refusal(&self, error: &str, now: u64) -> Refusal {
        let (boot, time) = (Some(self.boot), Some(now));
        Refusal {
            error: error.to_owned(),
            hint: None,
            boot,
            time,
            tree: None,
        }
    }
}

fn other_version(client: u32) -> Refusal {
    let older = if client < PROTOCOL_VERSION {
        "update rrun on the laptop"
    } else {
        "deploy the agent again"
    };
    Refusal {
        error: SignatureError::Version { client }.to_string(),
        hint: Some(format!("{older}, so that both are of one version")),
        boot: None,
        time: None,
        tree: None,
    }
}

/// Nonces of verified requests, kept for as long as their time would be accepted.
#[derive(Default)]
struct Nonces(HashMap<Nonce, u64>);

impl Nonces {
    fn take(&mut self, nonce: Nonce, time: u64, now: u64) -> Result<(), &'static str> {
        if self.0.contains_key(&nonce) {
            return Err("the request was sent before");
        }
        if self.0.len() >= MAX_NONCES {
            self.0.retain(|_, expiry| *expiry >= now);
        }
        if self.0.len() >= MAX_NONCES {
            return Err("too many requests within ten minutes");
        }
        self.0
            .insert(nonce, time.saturating_add(MAX_CLOCK_SKEW.as_secs()));
        Ok(())
    }
}

/// The agent's clock as signatures use it.
pub(crate) fn seconds_since_1970() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use rrun_protocol::{PrivateKey, SignedRequest};

    const PATH: &str = "/_rrun/status";

    struct Request {
        key: u8,
        path: &'static str,
        time: u64,
        nonce: u8,
        boot: u8,
    }

    impl Default for Request {
        fn default() -> Self {
            Self {
                key: 1,
                path: PATH,
                time: seconds_since_1970(),
                nonce: 1,
                boot: 1,
            }
        }
    }

    fn gate() -> Gate {
        Gate::new(
            vec![PrivateKey::from_seed(&[1; 32]).public_key("ann")],
            BootId::from_random([1; 9]),
        )
    }

    fn check(gate: &Gate, request: &Request) -> Result<Signer, (StatusCode, Refusal)> {
        let signed = SignedRequest {
            method: "GET",
            path_and_query: request.path,
            content_encoding: "",
            body: Digest::of(b""),
        };
        let key = PrivateKey::from_seed(&[request.key; 32]);
        let (nonce, boot) = (
            Nonce::from_random([request.nonce; 12]),
            BootId::from_random([request.boot; 9]),
        );
        let text = Authorization::sign(&key, &signed, request.time, nonce, boot).to_string();
        let mut headers = HeaderMap::new();
        headers.insert(SIGNATURE_HEADER, HeaderValue::from_str(&text).unwrap());
        gate.check("GET", PATH, &headers)
    }

    #[test]
    fn a_signed_request_passes_once() {
        let gate = gate();
        assert_eq!(check(&gate, &Request::default()).unwrap().name, "ann");
        let (status, refusal) = check(&gate, &Request::default()).unwrap_err();
        assert_eq!(
            (status, refusal.error.as_str()),
            (StatusCode::UNAUTHORIZED, "the request was sent before")
        );
        check(
            &gate,
            &Request {
                nonce: 2,
                ..Request::default()
            },
        )
        .unwrap();
    }

    #[test]
    fn everything_else_is_refused_and_told_boot_and_time() {
        let now = seconds_since_1970();
        let skew = MAX_CLOCK_SKEW.as_secs();
        for (request, part) in [
            (
                Request {
                    key: 2,
                    ..Request::default()
                },
                "authorized keys",
            ),
            (
                Request {
                    path: "/_rrun/tree",
                    ..Request::default()
                },
                "does not fit",
            ),
            (
                Request {
                    time: now - skew - 5,
                    ..Request::default()
                },
                "too far",
            ),
            (
                Request {
                    time: now + skew + 5,
                    ..Request::default()
                },
                "too far",
            ),
            (
                Request {
                    boot: 2,
                    ..Request::default()
                },
                "another boot",
            ),
        ] {
            let gate = gate();
            let (status, refusal) = check(&gate, &request).unwrap_err();
            assert_eq!(status, StatusCode::UNAUTHORIZED);
            assert!(refusal.error.contains(part), "{}", refusal.error);
            assert_eq!(refusal.boot, Some(gate.boot));
            assert!(refusal.time.unwrap().abs_diff(now) <= 1);
            // What is refused uses up no nonce.
            check(&gate, &Request::default()).unwrap();
        }
        let (status, _) = gate().check("GET", PATH, &HeaderMap::new()).unwrap_err();
        assert_eq!(status, StatusCode::UNAUTHORIZED);
    }

    #[test]
    fn another_protocol_version_is_named_with_what_to_do() {
        let mut headers = HeaderMap::new();
        headers.insert(
            SIGNATURE_HEADER,
            HeaderValue::from_static("999 a b c d e f"),
        );
        let (status, refusal) = gate().check("GET", PATH, &headers).unwrap_err();
        assert_eq!(status, StatusCode::UPGRADE_REQUIRED);
        assert!(
            refusal.error.contains("999") && refusal.hint.unwrap().contains("deploy the agent")
        );
    }

    #[test]
    fn the_set_of_nonces_is_bounded_and_makes_room_as_they_expire() {
        let mut nonces = Nonces::default();
        for number in 0..MAX_NONCES {
            let mut bytes = [0; 12];
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            nonces.take(Nonce::from_random(bytes), 1000, 1000).unwrap();
        }
        assert!(
            nonces
                .take(Nonce::from_random([9; 12]), 1000, 1000)
                .is_err()
        );
        let later = 1001 + MAX_CLOCK_SKEW.as_secs();
        nonces
            .take(Nonce::from_random([9; 12]), later, later)
            .unwrap();
        assert_eq!(nonces.0.len(), 1);
    }
}

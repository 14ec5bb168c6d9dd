//! Who may push: Ed25519 keys, and the one header that signs a request.
//!
//! The laptop holds the private key, the agent public keys only. A signature covers everything that decides what a request
//! does, and the agent's boot id, so that a recorded request is worth nothing to another instance or after a restart.
//! Whether the time is near enough and the nonce new is for the agent to judge; this module has no clock.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use ed25519_dalek::{
    Signature, Signer as _, SigningKey, VerifyingKey,
    pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, spki::der::pem::LineEnding},
};

use crate::{
    PROTOCOL_VERSION,
    digest::Digest,
    id::{BootId, IdError, KeyId, Nonce},
    limits::{MAX_KEY_COMMENT_BYTES, MAX_SIGNATURE_HEADER_BYTES},
};

/// First word of a public key's line, as in an `authorized_keys` file.
const KEY_TYPE: &str = "rrun-ed25519";

/// Stands in the header for the digest of an empty body.
const EMPTY_BODY: &str = "-";

/// A request as both sides see it.
#[derive(Clone, Copy, Debug)]
pub struct SignedRequest<'a> {
    /// Upper case, as in the request line.
    pub method: &'a str,
    /// Raw, as in the request line.
    pub path_and_query: &'a str,
    /// `Content-Encoding`, or empty.
    pub content_encoding: &'a str,
    /// Digest of the body as it is sent.
    pub body: Digest,
}

/// The signature header's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    /// The key that signed.
    pub key: KeyId,
    /// When, in seconds since 1970 by the client's clock.
    pub time: u64,
    /// For this request alone.
    pub nonce: Nonce,
    /// The agent it is meant for.
    pub boot: BootId,
    /// Digest of the body.
    pub body: Digest,
    signature: Signature,
}

/// Why a signature header does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// Not of the header's form.
    #[error("the signature header is malformed")]
    Malformed,
    /// Made by another version of the protocol.
    #[error("the client speaks protocol {client}, this agent {PROTOCOL_VERSION}")]
    Version {
        /// The client's version.
        client: u32,
    },
    /// The signature is not this key's, or covers another request.
    #[error("the signature does not fit the request")]
    Wrong,
}

impl From<IdError> for SignatureError {
    fn from(_: IdError) -> Self {
        Self::Malformed
    }
}

impl SignedRequest<'_> {
    /// What is signed: each field preceded by its length, so that no two requests share it.
    fn message(&self, time: u64, nonce: &Nonce, boot: &BootId) -> Vec<u8> {
        let mut message = Vec::with_capacity(256);
        for field in [
            b"rrun request".as_slice(),
            &PROTOCOL_VERSION.to_le_bytes(),
            self.method.as_bytes(),
            self.path_and_query.as_bytes(),
            self.content_encoding.as_bytes(),
            self.body.as_bytes(),
            &time.to_le_bytes(),
            nonce.as_bytes(),
            boot.as_bytes(),
        ] {
            message.extend_from_slice(&(field.len() as u32).to_le_bytes());
            message.extend_from_slice(field);
        }
        message
    }
}

impl Authorization {
    /// Signs `request` at `time` (seconds since 1970) for the agent that booted as `boot`.
    pub fn sign(
        key: &PrivateKey,
        request: &SignedRequest<'_>,
        time: u64,
        nonce: Nonce,
        boot: BootId,
    ) -> Self {
        let signature = key.0.sign(&request.message(time, &nonce, &boot));
        Self {
            key: key.public_key("").id(),
            time,
            nonce,
            boot,
            body: request.body,
            signature,
        }
    }

    /// Checks that `key` signed the request that consists of these parts and [`Self::body`].
    pub fn verify(
        &self,
        key: &PublicKey,
        method: &str,
        path_and_query: &str,
        content_encoding: &str,
    ) -> Result<(), SignatureError> {
        let request = SignedRequest {
            method,
            path_and_query,
            content_encoding,
            body: self.body,
        };
        let message = request.message(self.time, &self.nonce, &self.boot);
        key.key
            .verify_strict(&message, &self.signature)
            .map_err(|_| SignatureError::Wrong)
    }
}

impl fmt::Display for Authorization {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            key,
            time,
            nonce,
            boot,
            body,
            signature,
        } = self;
        write!(formatter, "{PROTOCOL_VERSION} {key} {time} {nonce} {boot} ")?;
        if *body == Digest::of(b"") {
            formatter.write_str(EMPTY_BODY)?;
        } else {
            formatter.write_str(&BASE64.encode(body.as_bytes()))?;
        }
        write!(formatter, " {}", BASE64.encode(signature.to_bytes()))
    }
}

impl FromStr for Authorization {
    type Err = SignatureError;

    fn from_str(text: &str) -> Result<Self, SignatureError> {
        if text.len() > MAX_SIGNATURE_HEADER_BYTES {
            return Err(SignatureError::Malformed);
        }
        let (version, rest) = text.split_once(' ').ok_or(SignatureError::Malformed)?;
        let client: u32 = version.parse().map_err(|_| SignatureError::Malformed)?;
        if client != PROTOCOL_VERSION {
            return Err(SignatureError::Version { client });
        }
        let fields: Vec<&str> = rest.split(' ').collect();
        let [key, time, nonce, boot, body, signature] = fields[..] else {
            return Err(SignatureError::Malformed);
        };
        let body = match body {
            EMPTY_BODY => Digest::of(b""),
            digest => Digest::from_bytes(decode(digest)?),
        };
        Ok(Self {
            key: key.parse()?,
            time: time.parse().map_err(|_| SignatureError::Malformed)?,
            nonce: nonce.parse()?,
            boot: boot.parse()?,
            body,
            signature: Signature::from_bytes(&decode(signature)?),
        })
    }
}

fn decode<const N: usize>(text: &str) -> Result<[u8; N], SignatureError> {
    let bytes = BASE64.decode(text).map_err(|_| SignatureError::Malformed)?;
    bytes.try_into().map_err(|_| SignatureError::Malformed)
}

/// The laptop's half of a key pair.
pub struct PrivateKey(SigningKey);

/// The agent's half, with a comment that names the person in messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    key: VerifyingKey,
    comment: String,
}

/// Why a text is not a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a PKCS#8 PEM file with an Ed25519 key.
    #[error("not an Ed25519 private key in PEM (PKCS#8)")]
    Private,
    /// Not a line of the form that `rrun key` prints.
    #[error("not a public key of the form `{KEY_TYPE} BASE64 NAME`: `{0}`")]
    Public(String),
}

impl PrivateKey {
    /// A key from 32 random bytes.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// Reads PKCS#8 PEM, the form that `openssl genpkey -algorithm ed25519` writes too.
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        SigningKey::from_pkcs8_pem(text)
            .map(Self)
            .map_err(|_| KeyError::Private)
    }

    /// The key as PKCS#8 PEM.
    pub fn to_pem(&self) -> String {
        self.0
            .to_pkcs8_pem(LineEnding::LF)
            .expect("an Ed25519 key always encodes")
            .to_string()
    }

    /// The other half, with a comment that names its owner. Control characters and what is too long are left out of it.
    pub fn public_key(&self, comment: &str) -> PublicKey {
        PublicKey {
            key: self.0.verifying_key(),
            comment: clean_comment(comment),
        }
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("PrivateKey(…)")
    }
}

impl PublicKey {
    /// Names the key in headers.
    pub fn id(&self) -> KeyId {
        let digest = Digest::of(self.key.as_bytes());
        let mut id = [0; 6];
        id.copy_from_slice(&digest.as_bytes()[..6]);
        KeyId::from_random(id)
    }

    /// Who it belongs to, for messages; may be empty.
    pub fn comment(&self) -> &str {
        &self.comment
    }

    /// Reads a list of keys: one a line (or between commas), empty lines and `#` comments left out.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, KeyError> {
        text.split(['\n', ','])
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(str::parse)
            .collect()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{KEY_TYPE} {}",
            BASE64.encode(self.key.as_bytes())
        )?;
        if self.comment.is_empty() {
            Ok(())
        } else {
            write!(formatter, " {}", self.comment)
        }
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let error = || KeyError::Public(text.chars().take(80).collect());
        let mut words = text.trim().splitn(3, ' ');
        let (Some(KEY_TYPE), Some(key)) = (words.next(), words.next()) else {
            return Err(error());
        };
        let key =
            VerifyingKey::from_bytes(&decode(key).map_err(|_| error())?).map_err(|_| error())?;
        if key.is_weak() {
            return Err(error());
        }
        Ok(Self {
            key,
            comment: clean_comment(words.next().unwrap_or_default()),
        })
    }
}

fn clean_comment(comment: &str) -> String {
    let mut clean: String = comment
        .chars()
        .filter(|letter| !letter.is_control() && *letter != ',')
        .collect();
    while clean.len() > MAX_KEY_COMMENT_BYTES {
        clean.pop();
    }
    // Last, because what is left out may stand between a letter and a space.
    clean.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> PrivateKey {
        PrivateKey::from_seed(&[7; 32])
    }

    fn request<'a>() -> SignedRequest<'a> {
        SignedRequest {
            method: "POST",
            path_and_query: "/_rrun/pushes/1?a=b",
            content_encoding: "",
            body: Digest::of(b"body"),
        }
    }

    fn signed() -> Authorization {
        Authorization::sign(
            &key(),
            &request(),
            1_700_000_000,
            Nonce::from_random([1; 12]),
            BootId::from_random([2; 9]),
        )
    }

    /// Any change here is a change of the protocol.
    #[test]
    fn the_header_has_its_committed_form() {
        assert_eq!(
            signed().to_string(),
            include_str!("../vectors/signature.txt").trim_end()
        );
    }

    #[test]
    fn a_header_reads_back_and_holds_for_its_request_only() {
        let authorization: Authorization = signed().to_string().parse().unwrap();
        assert_eq!(authorization, signed());
        let public = key().public_key("ann@laptop");
        let SignedRequest {
            method,
            path_and_query: path,
            ..
        } = request();
        authorization.verify(&public, method, path, "").unwrap();
        let wrong = Err(SignatureError::Wrong);
        assert_eq!(authorization.verify(&public, "GET", path, ""), wrong);
        assert_eq!(
            authorization.verify(&public, method, "/_rrun/pushes/1?a=c", ""),
            wrong
        );
        assert_eq!(authorization.verify(&public, method, path, "gzip"), wrong);
        assert_eq!(
            authorization.verify(
                &PrivateKey::from_seed(&[8; 32]).public_key(""),
                method,
                path,
                ""
            ),
            wrong
        );
        let changes: [fn(&mut Authorization); 4] = [
            |changed| changed.time += 1,
            |changed| changed.nonce = Nonce::from_random([3; 12]),
            |changed| changed.boot = BootId::from_random([3; 9]),
            |changed| changed.body = Digest::of(b"other"),
        ];
        for change in changes {
            let mut changed = authorization.clone();
            change(&mut changed);
            assert_eq!(changed.verify(&public, method, path, ""), wrong);
        }
    }

    #[test]
    fn another_protocol_version_is_named_and_junk_is_refused() {
        let text = signed().to_string();
        let other = text.replacen('1', "2", 1);
        assert_eq!(
            other.parse::<Authorization>(),
            Err(SignatureError::Version { client: 2 })
        );
        for junk in [
            "",
            "1",
            "1 a b c",
            &text[..text.len() - 1],
            &format!("{text} x"),
            &"1 ".repeat(400),
        ] {
            assert_eq!(
                junk.parse::<Authorization>(),
                Err(SignatureError::Malformed),
                "{junk}"
            );
        }
    }

    #[test]
    fn a_key_s_name_has_no_space_at_its_ends_whatever_is_left_out_there() {
        for comment in [
            "ann",
            " ann ",
            "ann \u{1b}",
            ", ann ,",
            &format!("ann{:200}b", ""),
        ] {
            let public = key().public_key(comment);
            assert_eq!(public.comment(), "ann");
            assert_eq!(public.to_string().parse(), Ok(public));
        }
    }

    #[test]
    fn keys_read_back_from_their_text() {
        let pem = key().to_pem();
        let public = PrivateKey::from_pem(&pem)
            .unwrap()
            .public_key("ann@laptop, \u{1b}[2J");
        assert_eq!(public.comment(), "ann@laptop [2J");
        let list = format!("# team\n{public}\n\n{public}, {public}");
        assert_eq!(PublicKey::parse_list(&list).unwrap(), vec![public; 3]);
        assert!(PublicKey::parse_list("ssh-ed25519 AAAA").is_err());
        assert!(!format!("{:?}", key()).contains("7"));
    }
}

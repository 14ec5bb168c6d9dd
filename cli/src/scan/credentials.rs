//! Recognises private keys and account files, so that they do not leave the laptop by mistake.
//!
//! Exists because a folder that is pushed often holds what was only meant to lie there. It looks for a few unmistakable forms and not for
//! everything that could be a secret: source and documentation that merely mention keys have to pass.

use memchr::memmem;
use serde::{Deserialize, Serialize};

/// File names that are always credentials.
const NAMES: [&str; 5] = ["id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", ".env"];
/// Where cargo keeps registry tokens.
const CARGO_CREDENTIALS: [&str; 2] = [".cargo/credentials.toml", ".cargo/credentials"];
/// An unbroken run of base64 this long behind a PEM header is a key; the shortest one has 64.
const SHORTEST_KEY: usize = 40;

/// What a file was recognised as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Finding {
    /// By its name.
    Name,
    /// A PEM private key in its content.
    PrivateKey,
    /// A service account's key file.
    ServiceAccount,
}

impl Finding {
    /// Why, for people.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Name => "its name is that of a credentials file",
            Self::PrivateKey => "it holds a private key",
            Self::ServiceAccount => "it holds a service account's key",
        }
    }
}

/// Judges a file by its path.
pub(crate) fn by_name(path: &str) -> Option<Finding> {
    let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
    let is_of_cargo = || {
        CARGO_CREDENTIALS.iter().any(|end| {
            path.strip_suffix(end)
                .is_some_and(|before| before.is_empty() || before.ends_with('/'))
        })
    };
    (NAMES.contains(&name) || is_of_cargo()).then_some(Finding::Name)
}

/// Judges a file by its content.
pub(crate) fn by_content(content: &[u8]) -> Option<Finding> {
    if is_service_account(content) {
        Some(Finding::ServiceAccount)
    } else if holds_private_key(content) {
        Some(Finding::PrivateKey)
    } else {
        None
    }
}

/// A PEM header `-----BEGIN … PRIVATE KEY-----` with a key behind it.
fn holds_private_key(content: &[u8]) -> bool {
    const END: &[u8] = b"PRIVATE KEY-----";
    memmem::find_iter(content, END).any(|at| {
        let before = &content[at.saturating_sub(40)..at];
        let is_header = memmem::rfind(before, b"-----BEGIN ").is_some_and(|begin| {
            before[begin + 11..]
                .iter()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b' ')
        });
        is_header && key_follows(&content[at + END.len()..])
    })
}

/// Whether base64 comes next, perhaps behind the header lines of an encrypted key, perhaps in a string with escaped line ends.
fn key_follows(after: &[u8]) -> bool {
    let mut rest = &after[..after.len().min(1024)];
    loop {
        rest = match rest {
            [b'\\', b'n' | b'r', rest @ ..] => rest,
            [b'\\' | b'"' | b'\'' | b',' | b'+', rest @ ..] => rest,
            [byte, rest @ ..] if byte.is_ascii_whitespace() => rest,
            _ => break,
        };
    }
    for header in [&b"Proc-Type:"[..], b"DEK-Info:"] {
        if let Some(line) = rest.strip_prefix(header) {
            let end = line
                .iter()
                .position(|byte| *byte == b'\n' || *byte == b'\\');
            return end.is_some_and(|end| key_follows(&line[end..]));
        }
    }
    let run = rest
        .iter()
        .take_while(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'='))
        .count();
    run >= SHORTEST_KEY
}

/// A JSON object with a private key, as Google hands it out.
fn is_service_account(content: &[u8]) -> bool {
    let start = content.trim_ascii_start();
    start.starts_with(b"{")
        && memmem::find(start, b"\"private_key\"").is_some()
        && (memmem::find(start, b"-----BEGIN").is_some()
            || memmem::find(start, b"\"service_account\"").is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &str = "MC4CAQAwBQYDK2VwBCIEIBkQ2M2nRl2wzS0yQ2M2nRl2wzS0yQ2M2nRl2wzS0yQ2";

    #[test]
    fn keys_are_recognised_in_all_their_forms() {
        for kind in ["", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "] {
            let pem = format!("x\n-----BEGIN {kind}PRIVATE KEY-----\n{BODY}\n-----END");
            assert_eq!(
                by_content(pem.as_bytes()),
                Some(Finding::PrivateKey),
                "{pem}"
            );
        }
        let encrypted = format!(
            "-----BEGIN RSA PRIVATE KEY-----\r\nProc-Type: 4,ENCRYPTED\r\nDEK-Info: AES-128-CBC,00\r\n\r\n{BODY}"
        );
        assert_eq!(by_content(encrypted.as_bytes()), Some(Finding::PrivateKey));
        let in_source =
            format!("const KEY: &str = \"-----BEGIN PRIVATE KEY-----\\n\\\n  {BODY}\";");
        assert_eq!(by_content(in_source.as_bytes()), Some(Finding::PrivateKey));
    }

    #[test]
    fn a_service_account_is_recognised() {
        let json = format!(
            "{{\"type\": \"service_account\", \"private_key\": \"-----BEGIN PRIVATE KEY-----\\n{BODY}\"}}"
        );
        assert_eq!(by_content(json.as_bytes()), Some(Finding::ServiceAccount));
    }

    #[test]
    fn what_merely_mentions_keys_passes() {
        for text in [
            "if text.contains(\"-----BEGIN PRIVATE KEY-----\") { return }",
            "A PEM file starts with `-----BEGIN RSA PRIVATE KEY-----` and ends with `-----END RSA PRIVATE KEY-----`.",
            "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----\n",
            "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIUJ7z3zZ3zZ3zZ3zZ3zZ3zZ3zZ3zZ3zZ3zZ3zZ3zZ3zZ3\n-----END CERTIFICATE-----",
            "let key = json[\"private_key\"]; // of a \"service_account\"",
            "{\"private_key\": null}",
            "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=",
        ] {
            assert_eq!(by_content(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn names_are_taken_whole() {
        for name in [
            "id_rsa",
            "keys/id_ed25519",
            ".env",
            "a/.env",
            ".cargo/credentials.toml",
        ] {
            assert!(by_name(name).is_some(), "{name}");
        }
        for name in [
            "src/id_map.rs",
            "id_rsa.pub",
            ".env.example",
            "env",
            "credentials.toml",
        ] {
            assert!(by_name(name).is_none(), "{name}");
        }
    }
}

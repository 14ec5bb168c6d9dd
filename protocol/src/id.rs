//! Ids made of random bytes, each with one text form for headers, addresses and JSON.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The text is not an id of the expected length.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an id")]
pub struct IdError(String);

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $bytes]);

        impl $name {
            /// Takes bytes that the caller drew at random.
            pub fn from_random(bytes: [u8; $bytes]) -> Self {
                Self(bytes)
            }

            /// The id's bytes.
            pub fn as_bytes(&self) -> &[u8] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&BASE64.encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, formatter)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let bytes = BASE64.decode(text).ok().and_then(|bytes| bytes.try_into().ok());
                bytes.map(Self).ok_or_else(|| IdError(text.chars().take(80).collect()))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; $bytes]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

random_id!(
    /// Drawn by an agent each time it starts; a signature holds for one boot only.
    BootId, 9
);
random_id!(
    /// Drawn for each request; the agent takes each one once.
    Nonce, 12
);
random_id!(
    /// Names a public key in a header: the start of the key's SHA-256.
    KeyId, 6
);
random_id!(
    /// Names a push; drawn by the laptop, so that a push can be taken up again and is never applied twice.
    PushId, 9
);
random_id!(
    /// Names a checkout on a laptop; its pushes carry rising numbers.
    CheckoutId, 9
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_back_from_text_and_json() {
        let id = PushId::from_random(*b"123456789");
        assert_eq!(id.to_string(), "MTIzNDU2Nzg5");
        assert_eq!("MTIzNDU2Nzg5".parse(), Ok(id));
        assert_eq!(
            serde_json::from_str::<PushId>("\"MTIzNDU2Nzg5\"").unwrap(),
            id
        );
        for bad in [
            "",
            "MTIzNDU2Nzg",
            "MTIzNDU2Nzg5MTIz",
            "MTIzNDU2Nzg=",
            "../../etc/pw",
        ] {
            assert!(bad.parse::<PushId>().is_err(), "{bad}");
        }
    }
}

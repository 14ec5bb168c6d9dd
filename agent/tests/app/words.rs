//! The gRPC messages of the test app and its tests: plain words, so that neither `protoc` nor a generator is needed.

use bytes::{Buf, BufMut};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// Name of the service.
pub(crate) const SERVICE: &str = "test.Words";

/// A message is its text.
#[derive(Clone, Copy, Default)]
pub(crate) struct Words;

impl Codec for Words {
    type Encode = String;
    type Decode = String;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Words {
    type Item = String;
    type Error = Status;

    fn encode(&mut self, words: String, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(words.as_bytes());
        Ok(())
    }
}

impl Decoder for Words {
    type Item = String;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<String>, Status> {
        let words = buffer.copy_to_bytes(buffer.remaining());
        Ok(Some(String::from_utf8_lossy(&words).into_owned()))
    }
}

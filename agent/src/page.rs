//! The page that says why there is no answer of the app. One file, no requests of its own.

use std::fmt::Write as _;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Response, StatusCode,
    header::{ACCEPT, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER},
};

const HTML: &str = "text/html; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
const GRPC: &str = "application/grpc";
/// gRPC's codes for "try again" and for everything else.
const GRPC_UNAVAILABLE: &str = "14";
const GRPC_INTERNAL: &str = "13";

/// Who reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reader {
    /// Somebody before a browser: HTML.
    Person,
    /// A gRPC client: a status without messages, because it would take any text for a broken message.
    GrpcClient,
    /// Everything else: plain text.
    Program,
}

impl Reader {
    /// Who sent these headers.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let says = |name, what: &str| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .is_some_and(|value| value.contains(what))
        };
        if says(CONTENT_TYPE, GRPC) {
            Self::GrpcClient
        } else if says(ACCEPT, "text/html") {
            Self::Person
        } else {
            Self::Program
        }
    }
}

/// The same for a request that was not understood for certain: nothing more is read from its connection.
pub(crate) fn refusal(status: StatusCode, why: &str, reader: Reader) -> Response<Full<Bytes>> {
    let mut response = response(status, why, reader);
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(CONNECTION, close);
    response
}

/// A response that says `why`, in a form that its reader understands.
pub(crate) fn response(status: StatusCode, why: &str, reader: Reader) -> Response<Full<Bytes>> {
    let (kind, text) = match reader {
        Reader::GrpcClient => return grpc_status(status, why),
        Reader::Person => (HTML, page(status, why)),
        Reader::Program => (TEXT, format!("rrun: {why}\n")),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

fn grpc_status(status: StatusCode, why: &str) -> Response<Full<Bytes>> {
    let code = match status {
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY => GRPC_UNAVAILABLE,
        _ => GRPC_INTERNAL,
    };
    let message = HeaderValue::from_str(&percent_encode(&format!("rrun: {why}")))
        .expect("nothing but visible ASCII and spaces is left");
    let mut response = Response::new(Full::default());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(GRPC));
    headers.insert("grpc-status", HeaderValue::from_static(code));
    headers.insert("grpc-message", message);
    response
}

fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'%' | 0..b' ' | 0x7f.. => {
                write!(encoded, "%{byte:02X}").expect("a string takes everything");
            }
            visible => encoded.push(visible.into()),
        }
    }
    encoded
}

fn page(status: StatusCode, why: &str) -> String {
    let why = escape(why);
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{status}</title><style>body{{font:16px/1.5 system-ui,sans-serif;max-width:40em;margin:20vh auto;padding:0 1em}}\
         @media(prefers-color-scheme:dark){{body{{background:#111;color:#ddd}}}}</style>\
         <h1>{status}</h1><p>{why}</p><p><small>rrun</small></p></html>\n"
    )
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_app_said_cannot_become_markup() {
        let page = page(StatusCode::BAD_GATEWAY, "<script>'\"&");
        assert!(page.contains("&lt;script&gt;&#39;&quot;&amp;"));
        assert!(!page.contains("<script>"));
    }

    #[test]
    fn a_grpc_client_gets_a_status_that_survives_any_text() {
        let response = response(
            StatusCode::BAD_GATEWAY,
            "50 %\nfür \u{7f}",
            Reader::GrpcClient,
        );
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "14");
        let message = &response.headers()["grpc-message"];
        assert_eq!(message, "rrun: 50 %25%0Af%C3%BCr %7F");
    }
}

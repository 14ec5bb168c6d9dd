//! What has to change in a message's head on its way through the proxy, and nothing more.
//!
//! Headers that belong to one connection are removed: those with a name that says so, and those that `Connection` lists.
//! Everything else, `Host` and `X-Forwarded-*` included, passes as it came.

use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Uri, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, HOST, HeaderName, HeaderValue, TE,
        TRANSFER_ENCODING, UPGRADE,
    },
    http::uri::PathAndQuery,
};
use rrun_protocol::SIGNATURE_HEADER;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// `Connection` cannot take these away: they decide where a message ends and where it goes.
const NEVER_LISTED: [HeaderName; 3] = [HOST, CONTENT_LENGTH, TRANSFER_ENCODING];

/// Why a request is not passed on.
pub(crate) type Refused = (StatusCode, &'static str);

/// Refuses requests that could mean one thing here and another in the app.
pub(crate) fn check<B>(request: &Request<B>) -> Result<(), Refused> {
    if request.method() == Method::CONNECT {
        return Err((StatusCode::METHOD_NOT_ALLOWED, "there is no tunnel here"));
    }
    let mut codings = request.headers().get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(_), _) if request.headers().contains_key(CONTENT_LENGTH) => {
            Err((StatusCode::BAD_REQUEST, "two lengths for one body"))
        }
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err((
            StatusCode::NOT_IMPLEMENTED,
            "no transfer coding but `chunked` is understood",
        )),
    }
}

/// Whether the request asks to leave HTTP. `h2c` is no such wish: who wants it gets it from this proxy by prior knowledge.
pub(crate) fn wants_upgrade<B>(request: &Request<B>) -> bool {
    request.version() == Version::HTTP_11
        && lists(request.headers(), "upgrade")
        && request
            .headers()
            .get(UPGRADE)
            .is_some_and(|protocol| !protocol.as_bytes().eq_ignore_ascii_case(b"h2c"))
}

/// Makes a received request one that can be sent to the app.
pub(crate) fn prepare_request<B>(request: &mut Request<B>, upgrade: bool, http2: bool) {
    let received = request.version();
    let trailers = request
        .headers()
        .get(TE)
        .is_some_and(|te| te.to_str().is_ok_and(|te| has_token(te, "trailers")));
    let headers = request.headers_mut();
    remove_hop_by_hop(headers, upgrade);
    headers.remove(HTTP2_SETTINGS);
    headers.remove(SIGNATURE_HEADER);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if http2 {
        *request.version_mut() = Version::HTTP_2;
        return;
    }
    if received == Version::HTTP_2 {
        join_cookies(request.headers_mut());
    }
    *request.version_mut() = Version::HTTP_11;
    make_origin_form(request);
}

/// Makes a response of the app one that can be sent to the client.
pub(crate) fn prepare_response<B>(response: &mut Response<B>) {
    let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    // The version is this proxy's own: a client that is told HTTP/1.0 would close its connection.
    *response.version_mut() = Version::HTTP_11;
    let headers = response.headers_mut();
    remove_hop_by_hop(headers, upgraded);
    headers.remove(TRANSFER_ENCODING);
}

/// Whether the response has no end of its own: an event stream, or a gRPC call that may stream for as long as it likes.
pub(crate) fn is_endless<B>(response: &Response<B>) -> bool {
    let content_type = response.headers().get(CONTENT_TYPE);
    content_type.is_some_and(|value| {
        let value = value.as_bytes();
        starts_with_ignoring_case(value, b"text/event-stream")
            || starts_with_ignoring_case(value, b"application/grpc")
    })
}

fn starts_with_ignoring_case(value: &[u8], prefix: &[u8]) -> bool {
    value
        .get(..prefix.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

fn remove_hop_by_hop(headers: &mut HeaderMap, upgrade: bool) {
    if headers.contains_key(CONNECTION) {
        for name in listed(headers) {
            if !(NEVER_LISTED.contains(&name) || upgrade && name == UPGRADE) {
                headers.remove(name);
            }
        }
    }
    if upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    } else {
        headers.remove(CONNECTION);
        headers.remove(UPGRADE);
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(TE);
}

fn listed(headers: &HeaderMap) -> Vec<HeaderName> {
    connection_values(headers)
        .flat_map(|value| value.split(','))
        .filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok())
        .collect()
}

fn lists(headers: &HeaderMap, token: &str) -> bool {
    connection_values(headers).any(|value| has_token(value, token))
}

fn connection_values(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
}

fn has_token(list: &str, token: &str) -> bool {
    list.split(',')
        .any(|listed| listed.trim().eq_ignore_ascii_case(token))
}

/// HTTP/2 may split cookies into several headers, HTTP/1 must not.
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<_> = headers.get_all(COOKIE).iter().cloned().collect();
    if cookies.len() < 2 {
        return;
    }
    let joined = cookies
        .iter()
        .map(HeaderValue::as_bytes)
        .collect::<Vec<_>>()
        .join(&b"; "[..]);
    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
        headers.insert(COOKIE, joined);
    }
}

/// The request line names the path alone; a host that stood there goes into `Host`, where it wins as HTTP demands.
fn make_origin_form<B>(request: &mut Request<B>) {
    if request.uri().authority().is_none() {
        return;
    }
    let parts = std::mem::take(request.uri_mut()).into_parts();
    if let Some(host) = parts
        .authority
        .and_then(|authority| HeaderValue::from_str(authority.as_str()).ok())
    {
        request.headers_mut().insert(HOST, host);
    }
    let path = parts
        .path_and_query
        .unwrap_or_else(|| PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from(path);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(lines: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder().uri("/");
        for (name, value) in lines {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    fn prepared(lines: &[(&str, &str)]) -> Vec<(String, String)> {
        let mut request = request(lines);
        let upgrade = wants_upgrade(&request);
        prepare_request(&mut request, upgrade, false);
        let headers = request.headers().iter();
        sorted(headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())))
    }

    fn pairs(lines: &[(&str, &str)]) -> Vec<(String, String)> {
        let lines = lines.iter();
        sorted(lines.map(|(name, value)| (name.to_string(), value.to_string())))
    }

    /// The order of different headers means nothing.
    fn sorted(headers: impl Iterator<Item = (String, String)>) -> Vec<(String, String)> {
        let mut headers: Vec<_> = headers.collect();
        headers.sort();
        headers
    }

    #[test]
    fn headers_of_one_connection_go_and_all_others_stay() {
        let passed = [
            ("host", "example.org"),
            ("x-forwarded-for", "10.0.0.1"),
            ("authorization", "Bearer x"),
        ];
        let mut sent = passed.to_vec();
        sent.extend([
            ("connection", "close, x-hop"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("te", "gzip"),
            ("rrun-signature", "secret"),
        ]);
        assert_eq!(prepared(&sent), pairs(&passed));
    }

    #[test]
    fn connection_cannot_take_away_what_frames_a_message() {
        let sent = [
            ("connection", "content-length, host, transfer-encoding"),
            ("host", "a"),
            ("content-length", "3"),
        ];
        assert_eq!(prepared(&sent), pairs(&sent[1..]));
    }

    #[test]
    fn an_upgrade_keeps_its_two_headers_and_h2c_is_none() {
        let websocket = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
        ];
        assert_eq!(
            prepared(&websocket),
            pairs(&[("upgrade", "websocket"), ("connection", "upgrade")])
        );
        let h2c = [
            ("connection", "Upgrade, HTTP2-Settings"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMAAABk"),
        ];
        assert_eq!(prepared(&h2c), pairs(&[]));
    }

    #[test]
    fn trailers_stay_wanted() {
        assert_eq!(
            prepared(&[("te", "trailers"), ("connection", "te")]),
            pairs(&[("te", "trailers")])
        );
    }

    #[test]
    fn a_host_in_the_request_line_wins() {
        let mut request = request(&[("host", "other")]);
        *request.uri_mut() = "http://example.org:81/a?b".parse().unwrap();
        prepare_request(&mut request, false, false);
        assert_eq!(request.uri(), "/a?b");
        assert_eq!(request.headers()[HOST], "example.org:81");
    }

    #[test]
    fn cookies_of_http2_become_one_header() {
        let mut request = request(&[("cookie", "a=1"), ("cookie", "b=2")]);
        *request.version_mut() = Version::HTTP_2;
        prepare_request(&mut request, false, false);
        assert_eq!(request.headers()[COOKIE], "a=1; b=2");
        assert_eq!(request.headers().get_all(COOKIE).iter().count(), 1);
    }

    #[test]
    fn two_ways_to_end_a_body_are_refused() {
        let refused = [
            &[("transfer-encoding", "chunked"), ("content-length", "3")][..],
            &[
                ("transfer-encoding", "chunked"),
                ("transfer-encoding", "chunked"),
            ],
            &[("transfer-encoding", "chunked, chunked")],
            &[("transfer-encoding", "xchunked")],
        ];
        for lines in refused {
            assert!(check(&request(lines)).is_err(), "{lines:?}");
        }
        assert!(check(&request(&[("transfer-encoding", "Chunked")])).is_ok());
    }
}

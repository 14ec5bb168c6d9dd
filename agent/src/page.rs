//! The page that says why there is no answer of the app. One file, no requests of its own.

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Response, StatusCode,
    header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER},
};

/// The same for a request that was not understood for certain: nothing more is read from its connection.
pub(crate) fn refusal(status: StatusCode, why: &str, html: bool) -> Response<Full<Bytes>> {
    let mut response = response(status, why, html);
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(CONNECTION, close);
    response
}

/// A response that says `why`, as HTML for browsers and as plain text for everything else.
pub(crate) fn response(status: StatusCode, why: &str, html: bool) -> Response<Full<Bytes>> {
    let (kind, text) = if html {
        ("text/html; charset=utf-8", page(status, why))
    } else {
        ("text/plain; charset=utf-8", format!("rrun: {why}\n"))
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
}

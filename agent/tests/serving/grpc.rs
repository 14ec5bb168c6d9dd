//! gRPC over plaintext HTTP/2: tonic asks through the front, tonic answers behind it.

use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use hyper::http::uri::PathAndQuery;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{
    Code, IntoStreamingRequest, Request, Response, Status, Streaming,
    client::Grpc,
    metadata::{MetadataMap, MetadataValue},
    transport::Channel,
};

use crate::{
    harness::{PATIENCE, Stand, eventually, is_alive},
    words::{SERVICE, Words},
};

async fn serving() -> Stand {
    let mut stand = Stand::new().await;
    stand.push(1, &["grpc"]).await.unwrap();
    stand
}

struct Speaker {
    grpc: Grpc<Channel>,
}

impl Speaker {
    async fn connect(stand: &Stand) -> Self {
        let channel = Channel::from_shared(format!("http://{}", stand.address))
            .unwrap()
            .timeout(PATIENCE)
            .connect()
            .await
            .unwrap();
        Self {
            grpc: Grpc::new(channel),
        }
    }

    async fn ready(&mut self, method: &str) -> PathAndQuery {
        self.grpc.ready().await.unwrap();
        format!("/{SERVICE}/{method}").parse().unwrap()
    }

    async fn say(&mut self, words: Request<String>) -> Result<Response<String>, Status> {
        let path = self.ready("Say").await;
        self.grpc.unary(words, path, Words).await
    }

    async fn said(&mut self, words: &str) -> String {
        let said = self.say(Request::new(words.into())).await;
        said.unwrap().into_inner()
    }

    async fn spell(&mut self, words: &str) -> Streaming<String> {
        let path = self.ready("Spell").await;
        let request = Request::new(words.into());
        let spelled = self.grpc.server_streaming(request, path, Words).await;
        spelled.unwrap().into_inner()
    }

    async fn join(&mut self, words: &[&str]) -> String {
        let path = self.ready("Join").await;
        let words: Vec<_> = words.iter().map(|word| word.to_string()).collect();
        let request = stream::iter(words).into_streaming_request();
        let joined = self.grpc.client_streaming(request, path, Words).await;
        joined.unwrap().into_inner()
    }

    async fn chat(&mut self) -> Chat {
        let path = self.ready("Chat").await;
        let (speak, spoken) = mpsc::unbounded_channel();
        let request = UnboundedReceiverStream::new(spoken).into_streaming_request();
        let answers = self.grpc.streaming(request, path, Words).await;
        Chat {
            speak,
            answers: answers.unwrap().into_inner(),
        }
    }
}

struct Chat {
    speak: mpsc::UnboundedSender<String>,
    answers: Streaming<String>,
}

impl Chat {
    async fn answer(&mut self, words: &str) -> String {
        self.speak.send(words.into()).unwrap();
        next(&mut self.answers).await.unwrap().unwrap()
    }
}

async fn next<S: Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    tokio::time::timeout(PATIENCE, stream.next())
        .await
        .expect("hangs")
}

fn annotate(metadata: &mut MetadataMap) {
    metadata.insert("x-text", "a b".parse().unwrap());
    let bytes = MetadataValue::from_bytes(&[0, 255, 10]);
    metadata.insert_bin("x-bytes-bin", bytes);
}

fn is_annotated(metadata: &MetadataMap) -> bool {
    let bytes = metadata.get_bin("x-bytes-bin").unwrap().to_bytes().unwrap();
    metadata.get("x-text").unwrap() == "a b" && bytes[..] == [0, 255, 10]
}

#[tokio::test]
async fn calls_of_all_four_kinds_reach_the_app() {
    let stand = serving().await;
    let mut speaker = Speaker::connect(&stand).await;
    assert_eq!(speaker.said("hello").await, "1 hello");
    let spelled: Vec<_> = speaker.spell("abc").await.try_collect().await.unwrap();
    assert_eq!(spelled, ["1 a", "1 b", "1 c"]);
    assert_eq!(speaker.join(&["x", "y", "z"]).await, "1 x-y-z");
    let mut chat = speaker.chat().await;
    assert_eq!(chat.answer("one").await, "1 one");
    assert_eq!(chat.answer("two").await, "1 two");
    drop(chat.speak);
    assert!(next(&mut chat.answers).await.is_none());
}

#[tokio::test]
async fn messages_of_megabytes_pass_both_ways() {
    let stand = serving().await;
    let mut speaker = Speaker::connect(&stand).await;
    let long = "x".repeat(3 << 20);
    assert_eq!(speaker.said(&long).await, format!("1 {long}"));
}

#[tokio::test]
async fn metadata_passes_both_ways_with_an_answer_and_with_an_error() {
    let stand = serving().await;
    let mut speaker = Speaker::connect(&stand).await;
    for words in ["hello", "fail"] {
        let mut request = Request::new(words.to_owned());
        annotate(request.metadata_mut());
        match speaker.say(request).await {
            Ok(response) => assert!(is_annotated(response.metadata())),
            Err(status) => {
                assert_eq!(status.code(), Code::FailedPrecondition);
                assert_eq!(status.message(), "this is not said: \u{fc}");
                assert_eq!(status.details(), b"details");
                assert!(is_annotated(status.metadata()));
            }
        }
    }
}

#[tokio::test]
async fn an_error_after_some_messages_arrives_after_them_in_the_trailers() {
    let stand = serving().await;
    let mut speaker = Speaker::connect(&stand).await;
    let mut spelled = speaker.spell("ab.c").await;
    assert_eq!(next(&mut spelled).await.unwrap().unwrap(), "1 a");
    assert_eq!(next(&mut spelled).await.unwrap().unwrap(), "1 b");
    let status = next(&mut spelled).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.message(), "out of letters");
    assert!(next(&mut spelled).await.is_none());
}

#[tokio::test]
async fn a_method_that_the_app_does_not_know_is_unimplemented() {
    let stand = serving().await;
    let mut speaker = Speaker::connect(&stand).await;
    let path = speaker.ready("Sing").await;
    let request = Request::new(String::new());
    let sung: Result<Response<String>, _> = speaker.grpc.unary(request, path, Words).await;
    assert_eq!(sung.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test]
async fn a_stream_opened_before_a_swap_lives_on_in_the_old_generation_and_new_calls_go_to_the_new_one()
 {
    let mut stand = Stand::new().await;
    let mut spec = stand.spec(1, &["grpc"]);
    // So that only what counts as a stream outlives the swap.
    spec.run.drain_limit = std::time::Duration::ZERO;
    stand.replace(spec).await.unwrap();
    let old = stand.service.status().process.unwrap();
    let mut speaker = Speaker::connect(&stand).await;
    let mut chat = speaker.chat().await;
    assert_eq!(chat.answer("before").await, "1 before");

    stand.push(2, &["grpc"]).await.unwrap();
    for _ in 0..20 {
        // Over the same connection, from the client to the front.
        assert_eq!(speaker.said("hello").await, "2 hello");
        assert_eq!(chat.answer("after").await, "1 after");
    }
    assert_eq!(speaker.chat().await.answer("new").await, "2 new");
    assert!(is_alive(old));
    drop(chat.speak);
    assert!(next(&mut chat.answers).await.is_none());
    drop(chat.answers);
    eventually(|| !is_alive(old)).await;
}

#[tokio::test]
async fn a_stream_that_exceeds_its_limit_is_cut_with_an_error() {
    let mut stand = Stand::new().await;
    let mut spec = stand.spec(1, &["grpc"]);
    spec.run.stream_drain_limit = std::time::Duration::from_millis(100);
    spec.run.drain_limit = spec.run.stream_drain_limit;
    stand.replace(spec).await.unwrap();
    let mut speaker = Speaker::connect(&stand).await;
    let mut chat = speaker.chat().await;
    chat.answer("before").await;
    stand.push(2, &["grpc"]).await.unwrap();
    let cut = next(&mut chat.answers).await.unwrap();
    assert_ne!(cut.unwrap_err().code(), Code::Ok);
    assert_eq!(speaker.said("hello").await, "2 hello");
}

#[tokio::test]
async fn a_call_that_nothing_can_answer_is_unavailable_and_told_why() {
    let stand = Stand::new().await;
    let mut speaker = Speaker::connect(&stand).await;
    let status = speaker.say(Request::new("hello".into())).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(
        status
            .message()
            .starts_with("rrun: no version has been pushed yet"),
        "{status}"
    );
}

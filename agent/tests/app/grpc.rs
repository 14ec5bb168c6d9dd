//! A gRPC server made of tonic: one service with a call of each kind, which names the generation in every answer.

use std::{convert::Infallible, future::Future, pin::Pin};

use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use hyper::Request as HttpRequest;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    metadata::MetadataMap,
    server::{Grpc, NamedService},
    transport::Server,
};
use tower::{Service, service_fn};

use crate::{
    generation,
    words::{SERVICE, Words},
};

pub(crate) async fn serve(listener: TcpListener) {
    Server::builder()
        .add_service(Speaker)
        .serve_with_incoming(TcpListenerStream::new(listener))
        .await
        .unwrap();
}

#[derive(Clone)]
struct Speaker;

impl NamedService for Speaker {
    const NAME: &'static str = SERVICE;
}

type Answer = Pin<Box<dyn Future<Output = Result<hyper::Response<Body>, Infallible>> + Send>>;

impl Service<HttpRequest<Body>> for Speaker {
    type Response = hyper::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequest<Body>) -> Answer {
        Box::pin(async move {
            let mut grpc = Grpc::new(Words);
            let method = request.uri().path().rsplit('/').next().unwrap().to_owned();
            Ok(match method.as_str() {
                "Say" => grpc.unary(service_fn(say), request).await,
                "Spell" => grpc.server_streaming(service_fn(spell), request).await,
                "Join" => grpc.client_streaming(service_fn(join), request).await,
                "Chat" => grpc.streaming(service_fn(chat), request).await,
                _ => Status::unimplemented(method).into_http(),
            })
        })
    }
}

fn named(words: &str) -> String {
    format!("{} {words}", generation())
}

/// What came as metadata goes back the same way.
fn echoed(metadata: &MetadataMap) -> MetadataMap {
    let mut echo = MetadataMap::new();
    if let Some(text) = metadata.get("x-text") {
        echo.insert("x-text", text.clone());
    }
    if let Some(bytes) = metadata.get_bin("x-bytes-bin") {
        echo.insert_bin("x-bytes-bin", bytes.clone());
    }
    echo
}

async fn say(request: Request<String>) -> Result<Response<String>, Status> {
    let metadata = echoed(request.metadata());
    if request.get_ref() == "fail" {
        let message = "this is not said: \u{fc}";
        let code = tonic::Code::FailedPrecondition;
        return Err(Status::with_details_and_metadata(
            code,
            message,
            "details".into(),
            metadata,
        ));
    }
    let mut response = Response::new(named(request.get_ref()));
    *response.metadata_mut() = metadata;
    Ok(response)
}

type Spelled = Pin<Box<dyn Stream<Item = Result<String, Status>> + Send>>;

/// Letter by letter; a full stop ends the call with an error after what was spelled.
async fn spell(request: Request<String>) -> Result<Response<Spelled>, Status> {
    let letters: Vec<_> = request.into_inner().chars().collect();
    let spelled = stream::iter(letters).map(|letter| match letter {
        '.' => Err(Status::resource_exhausted("out of letters")),
        letter => Ok(named(&letter.to_string())),
    });
    Ok(Response::new(Box::pin(spelled)))
}

async fn join(request: Request<Streaming<String>>) -> Result<Response<String>, Status> {
    let words: Vec<String> = request.into_inner().try_collect().await?;
    Ok(Response::new(named(&words.join("-"))))
}

/// Answers each message when it comes.
async fn chat(request: Request<Streaming<String>>) -> Result<Response<Spelled>, Status> {
    let answers = request.into_inner().map_ok(|words| named(&words));
    Ok(Response::new(Box::pin(answers)))
}

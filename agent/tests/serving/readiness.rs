//! When a version counts as ready, and what is said when it does not.

use std::time::{Duration, Instant};

use rrun_agent::service::{AppSpec, ReplaceError};

use crate::harness::{PATIENCE, Stand};

/// The reason, the hint and the output of a version that must not get ready; the old one has to serve on.
async fn refused(stand: &mut Stand, spec: AppSpec) -> (String, Option<String>, Vec<String>) {
    let outcome = stand.replace(spec).await;
    assert_eq!(stand.get("/").await.1, "1");
    assert_eq!(stand.service.serving(), Some(1));
    match outcome {
        Err(ReplaceError::NotReady {
            reason,
            hint,
            output,
        }) => (
            reason,
            hint,
            output.into_iter().map(|line| line.text).collect(),
        ),
        other => panic!("{other:?}"),
    }
}

async fn serving() -> Stand {
    let mut stand = Stand::new().await;
    stand.push(1, &[]).await.unwrap();
    stand
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[tokio::test]
async fn a_version_that_exits_at_once_is_refused_with_what_it_printed() {
    let mut stand = serving().await;
    let spec = stand.spec(2, &["exit", "3"]);
    let (reason, _, output) = refused(&mut stand, spec).await;
    assert_eq!(reason, "exited with code 3 before it was ready");
    assert_eq!(output.last().unwrap(), "\x1b[31mgiving up\x1b[0m");
}

#[tokio::test]
async fn a_version_that_panics_is_refused_with_its_panic() {
    let mut stand = serving().await;
    let spec = stand.spec(2, &["panic"]);
    let (reason, _, output) = refused(&mut stand, spec).await;
    assert_eq!(reason, "exited with code 101 before it was ready");
    assert!(
        output.iter().any(|line| line == "this app panics"),
        "{output:?}"
    );
}

#[tokio::test]
async fn a_version_that_never_listens_is_refused_after_its_time() {
    let mut stand = serving().await;
    let mut spec = stand.spec(2, &["never"]);
    spec.run.ready_timeout = Duration::from_millis(300);
    let (reason, hint, _) = refused(&mut stand, spec).await;
    assert!(reason.starts_with("did not listen on $PORT ("), "{reason}");
    assert!(reason.ends_with(" within 0.3 s"), "{reason}");
    assert!(hint.unwrap().contains("ready-timeout"));
}

#[tokio::test]
async fn a_version_that_opens_another_port_first_goes_live_when_it_listens_on_its_own() {
    let mut stand = serving().await;
    let admin = free_port().to_string();
    // Longer than several looks at where it listens.
    let since = Instant::now();
    stand
        .push(2, &["admin-first", &admin, "2000"])
        .await
        .unwrap();
    assert!(since.elapsed() >= Duration::from_secs(2));
    assert_eq!(stand.get("/").await.1, "2");
}

#[tokio::test]
async fn a_version_that_listens_elsewhere_is_told_where() {
    let mut stand = serving().await;
    let free = free_port();
    let spec = stand.spec(2, &["elsewhere", &free.to_string()]);
    let (reason, hint, output) = refused(&mut stand, spec).await;
    let port = output[0].strip_prefix("port ").unwrap();
    assert_eq!(reason, format!("listens on {free}, not on $PORT ({port})"));
    assert!(hint.unwrap().contains("PORT"));
}

#[tokio::test]
async fn an_executable_that_is_none_is_named() {
    let mut stand = serving().await;
    let mut spec = stand.spec(2, &[]);
    spec.executable = stand.file("missing");
    match stand.replace(spec).await {
        Err(error @ ReplaceError::Start { .. }) => assert!(error.to_string().contains("/missing ")),
        other => panic!("{other:?}"),
    }
    assert_eq!(stand.get("/").await.1, "1");
}

#[tokio::test]
async fn a_foreign_listener_on_the_private_port_is_not_taken_for_the_app() {
    let mut stand = serving().await;
    let go = stand.file("go");
    let spec = stand.spec(2, &["after", go.to_str().unwrap()]);
    let output = stand.output.clone();
    let ports = async {
        let mut ports = Vec::new();
        let mut thieves = Vec::new();
        let mut lines = Box::pin(output.follow());
        while ports.len() < 2 {
            let line = futures_util::StreamExt::next(&mut lines).await.unwrap();
            if let (2, Some(port)) = (line.generation, line.text.strip_prefix("port ")) {
                ports.push(port.parse::<u16>().unwrap());
                if ports.len() == 1 {
                    thieves.push(std::net::TcpListener::bind(("0.0.0.0", ports[0])).unwrap());
                }
            }
        }
        std::fs::write(&go, "").unwrap();
        (ports, thieves)
    };
    let ports = async { tokio::time::timeout(PATIENCE, ports).await.expect("hangs") };
    let (replaced, (ports, _thieves)) = tokio::join!(stand.replace(spec), ports);
    replaced.unwrap();
    assert_ne!(ports[0], ports[1]);
    assert_eq!(stand.get("/").await.1, "2");
}

#[tokio::test]
async fn an_app_that_only_this_machine_reaches_is_warned_of() {
    let mut stand = Stand::new().await;
    let replaced = stand.push(1, &["loopback"]).await.unwrap();
    assert_eq!(
        replaced.warnings[0].0,
        "the app listens on 127.0.0.1 only, where production would not reach it"
    );
    assert_eq!(stand.get("/").await.1, "1");
    for args in [&[][..], &["ipv6"]] {
        assert_eq!(stand.push(2, args).await.unwrap().warnings, []);
        assert_eq!(stand.get("/").await.1, "2");
    }
}

#[tokio::test]
async fn the_ready_path_has_to_answer_below_500() {
    let mut stand = serving().await;
    let mut spec = stand.spec(2, &[]);
    spec.run.ready_path = Some("/broken".into());
    spec.run.ready_timeout = Duration::from_secs(3);
    let (reason, ..) = refused(&mut stand, spec.clone()).await;
    assert_eq!(reason, "/broken answered 500 for 3 s");
    spec.run.ready_path = Some("/".into());
    stand.replace(spec.clone()).await.unwrap();
    assert_eq!(stand.get("/").await.1, "2");
    spec.run.args = vec!["http2".into()];
    stand.replace(spec).await.unwrap();
}

#[tokio::test]
async fn the_app_gets_its_environment_and_arguments_expanded_and_nothing_else() {
    let mut stand = Stand::new().await;
    let mut spec = stand.spec(1, &[]);
    spec.executable = "/bin/sh".into();
    spec.run.args = vec![
        "-c".into(),
        "env; echo $0; pwd; exit 1".into(),
        "arg-${PORT}".into(),
    ];
    spec.run
        .environment
        .insert("ADDRESS".into(), "0.0.0.0:$PORT".into());
    let Err(ReplaceError::NotReady { output, .. }) = stand.replace(spec).await else {
        panic!("it exits");
    };
    let lines: Vec<_> = output.iter().map(|line| line.text.as_str()).collect();
    let port = lines
        .iter()
        .find_map(|line| line.strip_prefix("PORT="))
        .unwrap();
    assert!(lines.contains(&format!("ADDRESS=0.0.0.0:{port}").as_str()));
    assert!(lines.contains(&format!("arg-{port}").as_str()));
    assert!(
        lines.contains(
            &stand
                .folder
                .path()
                .canonicalize()
                .unwrap()
                .to_str()
                .unwrap()
        )
    );
    assert!(
        !lines.iter().any(|line| line.starts_with("CARGO")),
        "{lines:?}"
    );
}

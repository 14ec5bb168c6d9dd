//! How apps end: by themselves, when told, and with everything they started.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{PATIENCE, Stand, eventually, is_alive};

/// The processes of a family that ignore SIGTERM, one of them in a group of its own.
async fn stubborn(stand: &Stand) -> Vec<u32> {
    let lines = stand.output.follow().filter_map(|line| {
        let number = line.text.strip_prefix("stubborn ");
        std::future::ready(number.map(|number| number.parse::<u32>().unwrap()))
    });
    tokio::time::timeout(PATIENCE, lines.take(2).collect())
        .await
        .expect("hangs")
}

/// Everything that runs in the stand's folder: nobody else would.
#[cfg(target_os = "linux")]
fn in_folder(folder: &std::path::Path) -> Vec<u32> {
    let folder = folder.canonicalize().unwrap();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|process| {
            std::fs::read_link(format!("/proc/{process}/cwd")).is_ok_and(|cwd| cwd == folder)
        })
        .collect()
}

/// The leader is dead, so nothing connects what it left behind with it but the port in its environment.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn what_a_crash_leaves_behind_is_gone_down_to_the_last_descendant() {
    let mut stand = Stand::new().await;
    stand.push(1, &["family"]).await.unwrap();
    stubborn(&stand).await;
    // Two shells that left the app's reach, and what each of them runs.
    eventually(|| in_folder(stand.folder.path()).len() == 5).await;
    stand.get("/crash").await;
    eventually(|| stand.service.status().state == "restarting").await;
    let Stand {
        service, folder, ..
    } = stand;
    service.shutdown(Duration::from_secs(5)).await;
    assert!(in_folder(folder.path()).is_empty());
}

/// What is started between a look at the processes and their end stands in no list.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_app_that_starts_processes_faster_than_they_are_listed_is_stopped_whole() {
    for _ in 0..5 {
        let mut stand = Stand::new().await;
        stand.push(1, &["breeder"]).await.unwrap();
        stand.get("/crash").await;
        eventually(|| stand.service.status().state == "restarting").await;
        let Stand {
            service, folder, ..
        } = stand;
        service.shutdown(Duration::from_secs(5)).await;
        assert!(in_folder(folder.path()).is_empty());
    }
}

#[tokio::test]
async fn an_app_that_crashes_is_started_again_and_requests_wait_for_it() {
    let mut stand = Stand::new().await;
    stand.push(1, &[]).await.unwrap();
    for restarts in 1..=3 {
        let process = stand.service.status().process.unwrap();
        let (status, why) = stand.get("/crash").await;
        assert_eq!(status, 502, "{why}");
        eventually(|| stand.service.status().state == "restarting").await;
        assert_eq!(stand.get("/").await, (hyper::StatusCode::OK, "1".into()));
        let status = stand.service.status();
        assert_eq!((status.state, status.restarts), ("serving", restarts));
        assert_ne!(status.process.unwrap(), process);
    }
}

#[tokio::test]
async fn an_app_that_is_killed_from_outside_is_started_again() {
    let mut stand = Stand::new().await;
    stand.push(1, &["family"]).await.unwrap();
    let left_behind = stubborn(&stand).await;
    let process = stand.service.status().process.unwrap();
    let pid = Pid::from_raw(process.try_into().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    eventually(|| {
        stand
            .service
            .status()
            .process
            .is_some_and(|now| now != process)
    })
    .await;
    assert_eq!(stand.get("/").await.1, "1");
    assert!(left_behind.iter().all(|process| !is_alive(*process)));
}

#[tokio::test]
async fn shutting_down_takes_along_grandchildren_that_ignore_sigterm() {
    let mut stand = Stand::new().await;
    stand.push(1, &["family"]).await.unwrap();
    let mut processes = stubborn(&stand).await;
    processes.push(stand.service.status().process.unwrap());
    let since = Instant::now();
    let limit = Duration::from_secs(3);
    stand.service.shutdown(limit).await;
    assert!(since.elapsed() < limit + Duration::from_secs(1));
    assert!(processes.iter().all(|process| !is_alive(*process)));
}

#[tokio::test]
async fn shutting_down_does_not_wait_for_requests_longer_than_there_is_time() {
    let mut stand = Stand::new().await;
    stand.push(1, &["stubborn"]).await.unwrap();
    let address = stand.address;
    let hanging = tokio::spawn(async move {
        let mut client = crate::harness::Client::connect(address).await;
        client.get("/after/nothing").await
    });
    stand.printed(1, "waiting").await;
    let process = stand.service.status().process.unwrap();
    let since = Instant::now();
    stand.service.shutdown(Duration::from_secs(2)).await;
    assert!(since.elapsed() < Duration::from_secs(3));
    assert!(!is_alive(process));
    assert_eq!(hanging.await.unwrap().0, 503);
}

#[tokio::test]
async fn dropping_the_service_kills_everything() {
    let mut stand = Stand::new().await;
    stand.push(1, &["family"]).await.unwrap();
    let mut processes = stubborn(&stand).await;
    processes.push(stand.service.status().process.unwrap());
    drop(stand);
    eventually(|| processes.iter().all(|process| !is_alive(*process))).await;
}

#[tokio::test]
async fn stopping_says_why_from_then_on() {
    let mut stand = Stand::new().await;
    stand.push(1, &[]).await.unwrap();
    let process = stand.service.status().process.unwrap();
    stand
        .service
        .stop("ada stopped it", Duration::from_secs(5))
        .await;
    assert!(!is_alive(process));
    assert_eq!(stand.service.status().state, "nothing");
    let (status, body) = stand.get("/").await;
    assert_eq!(
        (status.as_u16(), body.as_str()),
        (503, "rrun: ada stopped it\n")
    );
}

#[tokio::test]
async fn a_restart_on_request_is_a_new_process_of_the_same_generation() {
    let mut stand = Stand::new().await;
    stand.push(4, &[]).await.unwrap();
    let process = stand.service.status().process;
    stand.service.restart().await.unwrap();
    assert_eq!(stand.service.serving(), Some(4));
    assert_ne!(stand.service.status().process, process);
    assert_eq!(stand.get("/").await.1, "4");
}

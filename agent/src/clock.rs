//! Deadlines that count running time.
//!
//! A container without CPU is frozen in the middle of whatever it does. When it wakes up, the clock has moved by minutes
//! or hours and every ordinary limit is long past, although nothing had a chance to happen. Here a limit is spent in
//! ticks, and a tick counts for at most [`TICK`], however long it really took.
//!
//! This is not for measuring: what is shown to people is real time.

use std::{
    fmt,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Instant;

/// The most that one tick counts for.
const TICK: Duration = Duration::from_secs(1);

/// The limit passed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the time limit passed")]
pub struct Elapsed;

/// Waits for `future` for at most `limit` of running time.
pub async fn running_timeout<F: Future>(limit: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    tokio::select! {
        biased;
        output = &mut future => Ok(output),
        () = running_sleep(limit) => Err(Elapsed),
    }
}

/// Sleeps for `limit` of running time.
pub async fn running_sleep(limit: Duration) {
    let mut remaining = limit;
    while !remaining.is_zero() {
        let started = Instant::now();
        tokio::time::sleep(remaining.min(TICK)).await;
        remaining = remaining.saturating_sub(started.elapsed().min(TICK));
    }
}

/// Gives hyper's own deadlines running time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunningTimer;

impl hyper::rt::Timer for RunningTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(RunningSleep(Box::pin(running_sleep(duration))))
    }

    fn sleep_until(&self, deadline: std::time::Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep(deadline.saturating_duration_since(std::time::Instant::now()))
    }
}

struct RunningSleep(Pin<Box<dyn Future<Output = ()> + Send + Sync>>);

impl Future for RunningSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(context)
    }
}

impl hyper::rt::Sleep for RunningSleep {}

impl fmt::Debug for RunningSleep {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("RunningSleep")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_limit_passes_after_its_time() {
        let started = Instant::now();
        let outcome =
            running_timeout(Duration::from_millis(2500), std::future::pending::<()>()).await;
        assert_eq!(outcome, Err(Elapsed));
        assert!(started.elapsed() >= Duration::from_millis(2500));
        assert!(started.elapsed() < Duration::from_millis(2600));
    }

    #[tokio::test(start_paused = true)]
    async fn a_frozen_hour_counts_for_one_tick() {
        let limited = tokio::spawn(running_timeout(
            Duration::from_secs(30),
            std::future::pending::<()>(),
        ));
        tokio::task::yield_now().await;
        tokio::time::advance(Duration::from_secs(3600)).await;
        for _ in 0..28 {
            tokio::time::sleep(TICK).await;
            assert!(!limited.is_finished());
        }
        assert_eq!(limited.await.unwrap(), Err(Elapsed));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_ready_wins_over_a_limit_that_passed_in_the_freeze() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let limited = tokio::spawn(running_timeout(Duration::from_millis(500), receiver));
        tokio::task::yield_now().await;
        sender.send(()).unwrap();
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(limited.await.unwrap(), Ok(Ok(())));
    }
}

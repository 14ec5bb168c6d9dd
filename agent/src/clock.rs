//! Deadlines that count running time.
//!
//! A container without CPU is frozen in the middle of whatever it does. When it wakes up, the clock has moved by minutes
//! or hours and every ordinary limit is long past, although nothing had a chance to happen. Here a limit is spent in
//! ticks, and one that took far longer than it was meant to counts for no more than that. So a freeze costs a tenth of
//! what was left, a second at most, and never ends a limit by itself: whoever was frozen too has a moment to go on.
//!
//! This is not for measuring: what is shown to people is real time.

use std::{pin::pin, time::Duration};

use tokio::time::Instant;

/// The longest tick: what a freeze costs at most.
const LONGEST_TICK: Duration = Duration::from_secs(1);
/// The shortest: each tick wakes the process up.
const SHORTEST_TICK: Duration = Duration::from_millis(100);
/// A tick is this part of what is left.
const TICKS_LEFT: u32 = 10;
/// A tick that took so much longer than asked for was a freeze. A busy machine is late by less, and what it is late by
/// counts: otherwise a limit would stretch with each tick.
const FROZEN_FOR: Duration = Duration::from_secs(1);

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
        let tick = tick(remaining);
        let started = Instant::now();
        tokio::time::sleep(tick).await;
        let took = started.elapsed();
        remaining = if took < tick + FROZEN_FOR {
            remaining.saturating_sub(took)
        } else {
            remaining.saturating_sub(tick).max(SHORTEST_TICK)
        };
    }
}

fn tick(remaining: Duration) -> Duration {
    (remaining / TICKS_LEFT)
        .clamp(SHORTEST_TICK, LONGEST_TICK)
        .min(remaining)
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
            tokio::time::sleep(LONGEST_TICK).await;
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

    /// A limit of which `left` is left when the container is frozen for an hour.
    async fn frozen_with(left: Duration) -> impl Future<Output = Duration> {
        let limit = Duration::from_millis(5500);
        let limited = tokio::spawn(running_sleep(limit));
        tokio::time::sleep(limit - left).await;
        tokio::time::advance(Duration::from_secs(3600)).await;
        let woken = Instant::now();
        async move {
            limited.await.unwrap();
            woken.elapsed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_that_was_left_when_the_container_froze_is_left_when_it_wakes() {
        let rest = frozen_with(Duration::from_secs(1)).await.await;
        assert!(rest >= Duration::from_millis(850), "{rest:?}");
        assert!(rest <= Duration::from_millis(1000), "{rest:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn waking_never_ends_a_limit_by_itself() {
        for left in [1, 20, 99, 300] {
            let rest = frozen_with(Duration::from_millis(left)).await.await;
            assert!(
                rest >= Duration::from_millis(99),
                "{left} ms left: {rest:?}"
            );
        }
    }

    #[test]
    fn a_limit_of_minutes_wakes_the_process_up_once_a_second() {
        assert_eq!(tick(Duration::from_secs(650)), LONGEST_TICK);
        assert_eq!(tick(Duration::from_secs(1)), Duration::from_millis(100));
        assert_eq!(tick(Duration::from_millis(7)), Duration::from_millis(7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_machine_that_is_late_with_every_tick_does_not_stretch_a_limit() {
        let started = Instant::now();
        let limited = tokio::spawn(running_sleep(Duration::from_secs(3)));
        while !limited.is_finished() {
            tokio::task::yield_now().await;
            tokio::time::advance(Duration::from_millis(400)).await;
            tokio::task::yield_now().await;
        }
        assert!(started.elapsed() <= Duration::from_millis(3600));
    }
}

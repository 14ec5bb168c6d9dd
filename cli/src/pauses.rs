//! Waits between tries: longer from try to try, and not for ever.

use std::time::Duration;

use crate::ask::AskError;

/// How often something is tried again without any success in between.
const MAX_RETRIES: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Tries that failed since the last success.
#[derive(Debug, Default)]
pub(crate) struct Pauses(u32);

impl Pauses {
    /// Waits before the next try, or gives `error` back where there were enough.
    pub(crate) async fn wait(&mut self, error: AskError) -> Result<(), AskError> {
        if self.0 == MAX_RETRIES {
            return Err(error);
        }
        let pause = FIRST_PAUSE * 2u32.pow(self.0);
        self.0 += 1;
        tokio::time::sleep(pause.min(LONGEST_PAUSE)).await;
        Ok(())
    }

    /// Something succeeded.
    pub(crate) fn reset(&mut self) {
        self.0 = 0;
    }
}

//! An append-only, bounded record that others follow from any point: a push's events, a build's log.
//!
//! Who writes never waits for who reads. A follower gets every kept item once and in order, and the end; what was dropped
//! because nobody fetched it in time shows as a gap in the numbers. Nothing is written to disk.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{Stream, stream};
use tokio::sync::watch;

/// One record, shared by its writer and any number of followers.
pub(crate) struct Record<T> {
    state: Mutex<State<T>>,
    /// Rises with every change; followers wait for it.
    version: watch::Sender<u64>,
    capacity: usize,
}

struct State<T> {
    items: VecDeque<T>,
    /// Items dropped at the front; the first kept item has the number after it.
    dropped: u64,
    /// Shown to who follows now and never kept, with a number of its own.
    passing: Option<(u64, T)>,
    passing_shown: u64,
    finished: bool,
}

/// What a follower gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Item<T> {
    /// Number (from 1) and item.
    Kept(u64, T),
    /// Something that is not kept, with the number of the last kept item.
    Passing(u64, T),
}

impl<T: Clone + Send + 'static> Record<T> {
    /// An empty record that keeps the last `capacity` items.
    pub(crate) fn new(capacity: usize) -> Arc<Self> {
        let state = State {
            items: VecDeque::new(),
            dropped: 0,
            passing: None,
            passing_shown: 0,
            finished: false,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            version: watch::Sender::new(0),
            capacity,
        })
    }

    /// Appends `item`; after [`Self::finish`] it is ignored.
    pub(crate) fn append(&self, item: T) {
        self.change(|state| {
            if state.finished {
                return;
            }
            state.items.push_back(item);
            state.passing = None;
            if state.items.len() > self.capacity {
                state.items.pop_front();
                state.dropped += 1;
            }
        });
    }

    /// Shows `item` to who follows now; a later one replaces it, and nobody gets it afterwards.
    pub(crate) fn show(&self, item: T) {
        self.change(|state| {
            state.passing_shown += 1;
            state.passing = Some((state.passing_shown, item));
        });
    }

    /// Ends the record.
    pub(crate) fn finish(&self) {
        self.change(|state| state.finished = true);
    }

    /// Every item after number `from`, those to come included, until the record ends.
    pub(crate) fn follow(
        self: &Arc<Self>,
        from: u64,
    ) -> impl Stream<Item = Item<T>> + Send + use<T> {
        struct Follower<T> {
            record: Arc<Record<T>>,
            version: watch::Receiver<u64>,
            next: u64,
            passing_seen: u64,
        }
        let follower = Follower {
            record: Arc::clone(self),
            version: self.version.subscribe(),
            next: from.saturating_add(1),
            passing_seen: self.lock().passing_shown,
        };
        stream::unfold(follower, |mut follower| async move {
            loop {
                follower.version.mark_unchanged();
                {
                    let state = follower.record.lock();
                    follower.next = follower.next.max(state.dropped + 1);
                    let index =
                        usize::try_from(follower.next - state.dropped - 1).unwrap_or(usize::MAX);
                    if let Some(item) = state.items.get(index).cloned() {
                        drop(state);
                        follower.next += 1;
                        return Some((Item::Kept(follower.next - 1, item), follower));
                    }
                    if state.finished {
                        return None;
                    }
                    if let Some((number, item)) = state
                        .passing
                        .clone()
                        .filter(|(number, _)| *number > follower.passing_seen)
                    {
                        drop(state);
                        follower.passing_seen = number;
                        return Some((Item::Passing(follower.next - 1, item), follower));
                    }
                }
                // The sender lives in the record that the follower holds, so this cannot fail.
                follower.version.changed().await.ok()?;
            }
        })
    }

    /// The kept items after number `from`, as they are now.
    pub(crate) fn kept_after(&self, from: u64) -> Vec<(u64, T)> {
        let state = self.lock();
        let numbered = (state.dropped + 1..).zip(state.items.iter().cloned());
        numbered.filter(|(number, _)| *number > from).collect()
    }

    fn change(&self, change: impl FnOnce(&mut State<T>)) {
        change(&mut self.lock());
        self.version.send_modify(|version| *version += 1);
    }

    /// A panic while appending leaves nothing half done, so a poisoned lock is taken all the same.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt as _;

    async fn kept(record: &Arc<Record<u32>>, from: u64) -> Vec<(u64, u32)> {
        let kept = record.follow(from).filter_map(async |item| match item {
            Item::Kept(number, item) => Some((number, item)),
            Item::Passing(..) => None,
        });
        kept.collect().await
    }

    #[tokio::test]
    async fn a_follower_gets_what_it_missed_and_what_comes_until_the_end() {
        let record = Record::new(10);
        record.append(1);
        let follower = tokio::spawn({
            let record = Arc::clone(&record);
            async move { kept(&record, 0).await }
        });
        tokio::task::yield_now().await;
        record.append(2);
        record.show(99);
        record.finish();
        record.append(3);
        assert_eq!(follower.await.unwrap(), [(1, 1), (2, 2)]);
        assert_eq!(kept(&record, 1).await, [(2, 2)]);
        assert_eq!(kept(&record, u64::MAX).await, []);
    }

    #[tokio::test]
    async fn only_the_newest_are_kept_and_the_gap_shows() {
        let record = Record::new(2);
        (1..=5).for_each(|item| record.append(item));
        record.finish();
        assert_eq!(kept(&record, 0).await, [(4, 4), (5, 5)]);
        assert_eq!(record.kept_after(0), [(4, 4), (5, 5)]);
        assert_eq!(record.kept_after(4), [(5, 5)]);
        assert_eq!(record.kept_after(u64::MAX), []);
    }

    #[tokio::test]
    async fn what_passes_is_shown_once_and_not_kept() {
        let record = Record::new(2);
        record.show(1);
        let mut early = Box::pin(record.follow(0));
        record.show(2);
        record.show(3);
        assert_eq!(early.next().await, Some(Item::Passing(0, 3)));
        record.append(4);
        record.finish();
        assert_eq!(early.next().await, Some(Item::Kept(1, 4)));
        assert_eq!(early.next().await, None);
    }
}

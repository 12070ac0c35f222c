//! Batches that are made before they are needed.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use crate::{Error, Result, train::random::step_seed};

/// Makes batches on background threads, in the order of their indices.
///
/// A batch depends on the seed and its index only, so a resumed run gets the same batches as an
/// uninterrupted one.
pub struct Loader<B> {
    queues: Vec<Receiver<Result<B>>>,
    next: usize,
}

impl<B: Send + 'static> Loader<B> {
    /// Starts `threads` threads that make the batches of `indices`. `make` gets [`step_seed`] of
    /// `seed` and the index.
    pub fn start(
        make: impl Fn(u64) -> Result<B> + Send + Sync + 'static,
        seed: u64,
        indices: impl Iterator<Item = u64> + Clone + Send + 'static,
        threads: usize,
    ) -> Self {
        let (threads, make) = (threads.max(1), Arc::new(make));
        let queues = (0..threads).map(|i| {
            let (to, from) = sync_channel(2);
            let make = make.clone();
            let indices = indices.clone().skip(i).step_by(threads);
            thread::spawn(move || {
                // Batches must not wait for the threads of the network.
                let pool = rayon::ThreadPoolBuilder::new().num_threads(1);
                let _alone = pool.use_current_thread().build();
                fill(&*make, seed, indices, &to);
            });
            from
        });
        Self {
            queues: queues.collect(),
            next: 0,
        }
    }

    /// Returns the next batch.
    ///
    /// # Errors
    /// Those of `make`; [`Error::Thread`] when its thread has panicked.
    pub fn next_batch(&mut self) -> Result<B> {
        let queue = &self.queues[self.next];
        self.next = (self.next + 1) % self.queues.len();
        let died = || {
            Err(Error::Thread(
                "a thread that makes training pairs has panicked".into(),
            ))
        };
        queue.recv().unwrap_or_else(|_| died())
    }
}

/// Makes the batches of `indices` until the loader is dropped.
fn fill<B>(
    make: impl Fn(u64) -> Result<B>,
    seed: u64,
    indices: impl Iterator<Item = u64>,
    to: &SyncSender<Result<B>>,
) {
    for index in indices {
        if to.send(make(step_seed(seed, index))).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_come_in_order_with_any_number_of_threads_and_from_any_step() {
        let take = |first, threads| {
            let mut loader = Loader::start(Ok, 5, first.., threads);
            (0..7)
                .map(|_| loader.next_batch().unwrap())
                .collect::<Vec<_>>()
        };
        let want: Vec<_> = (3..10).map(|i| step_seed(5, i)).collect();
        assert_eq!(take(3, 1), want);
        assert_eq!(take(3, 4), want);
    }

    #[test]
    fn an_error_arrives_in_the_order_of_its_batch() {
        let bad = step_seed(1, 1);
        let make = move |seed| {
            if seed == bad {
                Err(Error::Data("broken".into()))
            } else {
                Ok(())
            }
        };
        let mut loader = Loader::start(make, 1, 0.., 2);
        let good = [0, 1, 2].map(|_| loader.next_batch().is_ok());
        assert_eq!(good, [true, false, true]);
    }
}

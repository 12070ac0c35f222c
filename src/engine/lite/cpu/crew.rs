//! Threads that work their way through a frame side by side.
//!
//! The frame's columns are divided into blocks. Every block goes through the same steps, and a step of a block may
//! begin when the block itself and its two neighbours are done with the step before: that is as far as a layer sees.
//! A thread takes the steps of a block of its own, and those of others when its own has to wait for long, so that
//! nothing stands still while a thread is kept from working, and one thread alone gets everything done.

use std::{
    hint,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use rayon::prelude::*;

/// Looks at one's own block before one looks at the others', and at all of them before the core is offered to other
/// threads: a few microseconds each.
const PATIENCE: usize = 100;

/// How far a block is. Alone in its cache line.
#[derive(Default)]
#[repr(align(128))]
struct Progress {
    /// Steps that some thread has begun.
    begun: AtomicUsize,
    /// Steps that are finished.
    done: AtomicUsize,
}

/// The progress of all blocks.
#[derive(Default)]
pub(super) struct Crew {
    blocks: Vec<Progress>,
    failed: AtomicBool,
}

impl Crew {
    /// For `blocks` blocks.
    pub fn new(blocks: usize) -> Self {
        Self {
            blocks: (0..blocks).map(|_| Progress::default()).collect(),
            failed: AtomicBool::new(false),
        }
    }

    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Calls `work(block, step)` for each block and each of `steps` steps on the current rayon pool. While it works on
    /// a step of a block, the neighbours are at the same step or have finished the one before.
    pub fn run(&mut self, steps: usize, work: impl Fn(usize, usize) + Sync) {
        for block in &mut self.blocks {
            *block = Progress::default();
        }
        self.failed = AtomicBool::new(false);
        if let [_] = self.blocks[..] {
            return (0..steps).for_each(|step| work(0, step));
        }
        let crew = &*self;
        let members = (0..crew.blocks()).into_par_iter().with_max_len(1);
        members.for_each(|member| crew.member(member, steps, &work));
    }

    fn member(&self, own: usize, steps: usize, work: &(impl Fn(usize, usize) + Sync)) {
        let _guard = Guard(&self.failed);
        let mut waited = 0;
        while !self.failed.load(Ordering::Relaxed) {
            let blocks = self.blocks.len();
            let others = (1..blocks).map(|i| (own + i) % blocks);
            let worked = self.take(own, steps, work)
                || (waited >= PATIENCE && others.into_iter().any(|b| self.take(b, steps, work)));
            if worked {
                waited = 0;
                continue;
            }
            if self
                .blocks
                .iter()
                .all(|b| b.begun.load(Ordering::Relaxed) == steps)
            {
                return;
            }
            waited += 1;
            match waited < 2 * PATIENCE {
                true => hint::spin_loop(),
                false => thread::yield_now(),
            }
        }
    }

    /// Does the next step of `block` if it may begin.
    fn take(&self, block: usize, steps: usize, work: &(impl Fn(usize, usize) + Sync)) -> bool {
        let progress = &self.blocks[block];
        let step = progress.done.load(Ordering::Acquire);
        let ready = |b: Option<&Progress>| b.is_none_or(|b| b.done.load(Ordering::Acquire) >= step);
        let left = block.checked_sub(1).map(|b| &self.blocks[b]);
        if step == steps || !ready(left) || !ready(self.blocks.get(block + 1)) {
            return false;
        }
        let begin =
            progress
                .begun
                .compare_exchange(step, step + 1, Ordering::Relaxed, Ordering::Relaxed);
        if begin.is_err() {
            return false;
        }
        work(block, step);
        progress.done.store(step + 1, Ordering::Release);
        true
    }
}

/// Lets the others go when a thread panics: what they wait for will not come.
struct Guard<'a>(&'a AtomicBool);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
    }

    #[test]
    fn a_step_begins_when_the_neighbours_are_done_with_the_one_before() {
        for (blocks, threads) in [(1, 1), (2, 2), (3, 2), (5, 3), (7, 1)] {
            let mut crew = Crew::new(blocks);
            let done: Vec<_> = (0..blocks).map(|_| AtomicUsize::new(0)).collect();
            pool(threads).install(|| {
                crew.run(50, |block, step| {
                    let near = block.saturating_sub(1)..(block + 2).min(blocks);
                    for near in &done[near] {
                        assert!(near.load(Ordering::Relaxed) >= step, "{block} at {step}");
                    }
                    assert_eq!(done[block].fetch_add(1, Ordering::Relaxed), step);
                });
            });
            assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 50));
        }
    }

    /// Both threads of the pool begin a crew of two; were they to wait for a second thread, neither would end.
    #[test]
    fn two_crews_get_done_in_one_pool() {
        pool(2).install(|| {
            let count = AtomicUsize::new(0);
            let crew = || Crew::new(2).run(2000, |_, _| _ = count.fetch_add(1, Ordering::Relaxed));
            rayon::join(crew, crew);
            assert_eq!(count.into_inner(), 8000);
        });
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        let result = panic::catch_unwind(|| {
            pool(2).install(|| Crew::new(2).run(10, |block, step| assert!(block != 1 || step < 5)));
        });
        assert!(result.is_err());
    }
}

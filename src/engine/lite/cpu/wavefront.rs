//! Wavefront scheduling of a frame's blocks of columns over threads.
//!
//! All blocks go through the same steps. A step of a block may begin when the block and its two
//! neighbours have finished the step before, because a layer reads no further than a neighbour.
//! Each thread works on a block of its own. If that block has to wait for long, the thread runs
//! steps of other blocks, so a thread that the system suspends does not stop the others, and one
//! thread can finish all blocks alone.

#[cfg(not(loom))]
use std::{
    hint,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

// tests/loom checks this file.
#[cfg(loom)]
use loom::{
    hint,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};
use rayon::prelude::*;

/// Number of failed attempts at its own block after which a thread tries the other blocks, and then
/// number of failed attempts at all blocks after which it yields its core: a few microseconds each.
const SPINS: usize = if cfg!(loom) { 1 } else { 100 };

/// Progress of a block, alone in its cache line.
#[derive(Default)]
#[repr(align(128))]
struct Progress {
    /// Number of steps that a thread has begun.
    begun: AtomicUsize,
    /// Number of finished steps.
    done: AtomicUsize,
}

/// Progress of all blocks.
#[derive(Default)]
pub(super) struct Wavefront {
    blocks: Vec<Progress>,
    failed: AtomicBool,
}

impl Wavefront {
    /// Creates the state of `blocks` blocks.
    pub fn new(blocks: usize) -> Self {
        Self {
            blocks: (0..blocks).map(|_| Progress::default()).collect(),
            failed: AtomicBool::new(false),
        }
    }

    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Calls `work(block, step)` for each block and each of `steps` steps on the current rayon
    /// pool. During a call, the neighbours of the block are at the same step or have finished the
    /// step before.
    pub fn run(&mut self, steps: usize, work: impl Fn(usize, usize) + Sync) {
        for block in &mut self.blocks {
            *block = Progress::default();
        }
        self.failed = AtomicBool::new(false);
        if let [_] = self.blocks[..] {
            return (0..steps).for_each(|step| work(0, step));
        }
        let wavefront = &*self;
        let threads = (0..wavefront.blocks()).into_par_iter().with_max_len(1);
        threads.for_each(|own| wavefront.work_from(own, steps, &work));
    }

    /// Runs steps until all are begun, those of block `own` first.
    pub fn work_from(&self, own: usize, steps: usize, work: &(impl Fn(usize, usize) + Sync)) {
        let _guard = Guard(&self.failed);
        let mut waited = 0;
        while !self.failed.load(Ordering::Relaxed) {
            let blocks = self.blocks.len();
            let others = (1..blocks).map(|i| (own + i) % blocks);
            let worked = self.try_step(own, steps, work)
                || (waited >= SPINS && others.into_iter().any(|b| self.try_step(b, steps, work)));
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
            if waited < 2 * SPINS {
                hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
    }

    /// Runs the next step of `block` if it may begin. Returns `true` in that case.
    fn try_step(&self, block: usize, steps: usize, work: &(impl Fn(usize, usize) + Sync)) -> bool {
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

/// Stops the other threads when one panics, because they would wait for it forever.
struct Guard<'a>(&'a AtomicBool);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, not(loom)))]
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
    fn a_step_begins_when_the_neighbours_have_finished_the_one_before() {
        for (blocks, threads) in [(1, 1), (2, 2), (3, 2), (5, 3), (7, 1)] {
            let mut wavefront = Wavefront::new(blocks);
            let done: Vec<_> = (0..blocks).map(|_| AtomicUsize::new(0)).collect();
            pool(threads).install(|| {
                wavefront.run(50, |block, step| {
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

    /// Each thread of the pool runs a wavefront of two blocks. If a wavefront needed a second
    /// thread, neither would end.
    #[test]
    fn two_wavefronts_finish_in_one_pool() {
        pool(2).install(|| {
            let count = AtomicUsize::new(0);
            let run =
                || Wavefront::new(2).run(2000, |_, _| _ = count.fetch_add(1, Ordering::Relaxed));
            rayon::join(run, run);
            assert_eq!(count.into_inner(), 8000);
        });
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        let result = panic::catch_unwind(|| {
            pool(2).install(|| {
                Wavefront::new(2).run(10, |block, step| assert!(block != 1 || step < 5))
            });
        });
        assert!(result.is_err());
    }
}

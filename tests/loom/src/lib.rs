//! Model checking of the engine's scheduling: loom runs small wavefronts with every order of the
//! threads' accesses to memory, up to a number of preemptions. `scripts/sanitize.sh` runs it.
#![cfg(all(test, loom))]

#[allow(dead_code, reason = "the threads of `run` are those of rayon, which loom does not know")]
#[path = "../../../src/engine/lite/cpu/wavefront.rs"]
mod wavefront;

use loom::{cell::UnsafeCell, model::Builder, sync::Arc, thread};
use wavefront::Wavefront;

/// Results of a wavefront: one cell for each block and step.
struct Results(Vec<Vec<UnsafeCell<usize>>>);

// SAFETY: loom checks the accesses.
unsafe impl Sync for Results {}

/// Checks that each step runs once, and sees the results that the block and its neighbours had in
/// the step before. Loom reports accesses that are not ordered, and threads that wait forever.
fn check(blocks: usize, steps: usize, threads: usize, preemptions: usize) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    builder.check(move || {
        let row = || (0..steps).map(|_| UnsafeCell::new(0)).collect();
        let results = Results((0..blocks).map(|_| row()).collect());
        let shared = Arc::new((Wavefront::new(blocks), results));
        let run = move |own: usize, shared: Arc<(Wavefront, Results)>| {
            let (wavefront, results) = &*shared;
            wavefront.work_from(own, steps, &|block, step| {
                let near = block.saturating_sub(1)..(block + 2).min(blocks);
                let read = |b: usize| results.0[b][step - 1].with(|value| unsafe { *value });
                let sum: usize = if step == 0 { 1 } else { near.map(read).sum() };
                results.0[block][step].with_mut(|value| unsafe {
                    assert_eq!(*value, 0, "a step ran twice");
                    *value = sum;
                });
            });
        };
        let others: Vec<_> = (1..threads)
            .map(|own| {
                let shared = shared.clone();
                thread::spawn(move || run(own, shared))
            })
            .collect();
        run(0, shared.clone());
        others.into_iter().for_each(|other| other.join().unwrap());
        // The number of paths through the neighbours.
        let mut want = vec![1; blocks];
        for step in 0..steps {
            for (block, want) in want.iter().enumerate() {
                let got = shared.1.0[block][step].with(|value| unsafe { *value });
                assert_eq!(got, *want, "block {block}, step {step}");
            }
            let near = |b: usize| b.saturating_sub(1)..(b + 2).min(blocks);
            want = (0..blocks).map(|b| want[near(b)].iter().sum()).collect();
        }
    });
}

#[test]
fn two_threads_run_two_blocks() {
    check(2, 3, 2, 3);
}

#[test]
fn two_threads_run_three_blocks() {
    check(3, 2, 2, 3);
}

#[test]
fn three_threads_run_three_blocks() {
    check(3, 2, 3, 1);
}

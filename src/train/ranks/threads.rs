//! Ranks that are threads of one process, for tests.

use std::{
    fmt,
    sync::{Arc, Barrier, Mutex},
    thread,
};

use super::Ranks;
use crate::Result;

struct Shared {
    barrier: Barrier,
    /// Values of each rank.
    values: Mutex<Vec<Vec<u64>>>,
}

#[derive(Clone)]
struct Rank {
    rank: usize,
    count: usize,
    shared: Arc<Shared>,
}

impl fmt::Debug for Rank {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} of {}", self.rank, self.count)
    }
}

impl Ranks for Rank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.count
    }

    fn sum(&self, values: &mut [f32]) -> Result<()> {
        let bits: Vec<u64> = values.iter().map(|v| v.to_bits().into()).collect();
        let all = self.gather(&bits)?;
        values.fill(0.0);
        for rank in all.chunks_exact(bits.len()) {
            let rank = rank.iter().map(|bits| f32::from_bits(*bits as u32));
            values.iter_mut().zip(rank).for_each(|(sum, v)| *sum += v);
        }
        Ok(())
    }

    fn gather(&self, values: &[u64]) -> Result<Vec<u64>> {
        self.shared.values.lock().unwrap()[self.rank] = values.to_vec();
        self.shared.barrier.wait();
        let all = self.shared.values.lock().unwrap().concat();
        self.shared.barrier.wait();
        Ok(all)
    }
}

/// Calls `work` on `count` ranks, which are threads. Returns the results in the order of the ranks.
pub fn on_ranks<T: Send>(count: usize, work: impl Fn(Arc<dyn Ranks>) -> T + Sync) -> Vec<T> {
    let shared = Arc::new(Shared {
        barrier: Barrier::new(count),
        values: Mutex::new(vec![Vec::new(); count]),
    });
    thread::scope(|scope| {
        let work = &work;
        let ranks = (0..count).map(|rank| {
            let shared = shared.clone();
            scope.spawn(move || {
                work(Arc::new(Rank {
                    rank,
                    count,
                    shared,
                }))
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

//! Ranks that are threads of one process, and other helpers for tests of training by several ranks.

use std::{
    fmt,
    path::Path,
    sync::{Arc, Barrier, Mutex},
    thread,
};

use candle_core::DType;
use image::{Rgb, RgbImage};

use super::Ranks;
use crate::{
    Result,
    train::checkpoint::{self, CHECKPOINT},
};

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

/// Writes three photos to `folder`.
pub fn photos(folder: &Path) {
    for n in 0..3 {
        let photo = RgbImage::from_fn(160, 120, |x, y| {
            Rgb([(x * y + n) as u8, (x / 3 + y) as u8 ^ 90, (7 * x) as u8])
        });
        photo.save(folder.join(format!("{n}.png"))).unwrap();
    }
}

/// Returns the largest difference between values of the checkpoints in two folders.
pub fn difference(one: &Path, other: &Path) -> f64 {
    let tensors = |folder: &Path| {
        let loaded = checkpoint::load::<serde_json::Value>(&folder.join(CHECKPOINT));
        loaded.unwrap().0
    };
    let (one, other) = (tensors(one), tensors(other));
    assert_eq!(one.len(), other.len());
    let apart = one.iter().map(|(name, tensor)| {
        let apart = (tensor - &other[name]).unwrap().abs().unwrap();
        let largest = apart.flatten_all().unwrap().max(0).unwrap();
        let largest = largest.to_dtype(DType::F64).unwrap();
        largest.to_scalar::<f64>().unwrap()
    });
    apart.fold(0.0, f64::max)
}

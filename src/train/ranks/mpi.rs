//! Ranks of the Message Passing Interface.

use std::{fmt, thread};

use mpi::{
    Threading,
    environment::Universe,
    traits::{Communicator, CommunicatorCollectives},
};

use super::Ranks;
use crate::{Error, Result};

/// Processes that an MPI launcher such as `mpirun` has started. A failed call ends all of them.
pub struct Mpi {
    universe: Universe,
}

impl Mpi {
    /// Joins the processes. Call it once, on the thread that makes all further calls.
    ///
    /// # Errors
    /// [`Error::Setting`] when the process has joined before.
    pub fn join() -> Result<Self> {
        let joined = mpi::initialize_with_threading(Threading::Funneled);
        let again = || Error::Setting("MPI is initialised already".into());
        let (universe, _) = joined.ok_or_else(again)?;
        Ok(Self { universe })
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "MPI rank {} of {}", self.rank(), self.count())
    }
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        self.universe.world().rank() as usize
    }

    fn count(&self) -> usize {
        self.universe.world().size() as usize
    }

    /// Each rank adds one part of the values, so that none receives all values of all ranks.
    fn sum(&self, values: &mut [f32]) -> Result<()> {
        let (world, count) = (self.universe.world(), self.count());
        let part = values.len().div_ceil(count);
        let mut all = values.to_vec();
        all.resize(part * count, 0.0);
        let mut parts = vec![0.0; part * count];
        world.all_to_all_into(&all[..], &mut parts[..]);
        let mut sum = vec![0f32; part];
        for rank in parts.chunks_exact(part.max(1)) {
            sum.iter_mut().zip(rank).for_each(|(sum, v)| *sum += v);
        }
        world.all_gather_into(&sum[..], &mut all[..]);
        values.copy_from_slice(&all[..values.len()]);
        Ok(())
    }

    fn gather(&self, values: &[u64]) -> Result<Vec<u64>> {
        let mut all = vec![0; values.len() * self.count()];
        if values.is_empty() {
            self.universe.world().barrier();
        } else {
            self.universe.world().all_gather_into(values, &mut all[..]);
        }
        Ok(all)
    }

    fn abort(&self) {
        if self.count() > 1 {
            self.universe.world().abort(1);
        }
    }
}

impl Drop for Mpi {
    /// Ends the other ranks after a panic. They would wait for this one.
    fn drop(&mut self) {
        if thread::panicking() {
            self.abort();
        }
    }
}

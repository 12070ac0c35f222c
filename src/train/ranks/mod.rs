//! Training by several processes: each takes a share of the batches of a step, and all apply the
//! sum of the gradients.
//!
//! All ranks hold the same weights and take the same steps. They read the same data and the same
//! folder of the run; only the first rank writes there. Values are added in the order of the ranks,
//! so the result of a run is reproducible for a number of ranks.

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(test)]
pub mod threads;

use std::{fmt::Debug, iter::StepBy, ops::RangeFrom};

use candle_core::{Device, Tensor, backprop::GradStore};

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
use super::optim::Parameter;
use crate::{Error, Result};

/// Processes that train one model. Every call is collective: it returns when all ranks have made
/// it.
pub trait Ranks: Debug + Send + Sync {
    /// Returns the number of this process, from 0.
    fn rank(&self) -> usize;

    /// Returns the number of processes.
    fn count(&self) -> usize;

    /// Replaces the values, as many on each rank, by their sums over all ranks, added in the order
    /// of the ranks.
    ///
    /// # Errors
    /// When the ranks cannot communicate.
    fn sum(&self, values: &mut [f32]) -> Result<()>;

    /// Returns the values of all ranks, as many on each, in the order of the ranks.
    ///
    /// # Errors
    /// When the ranks cannot communicate.
    fn gather(&self, values: &[u64]) -> Result<Vec<u64>>;

    /// Ends the processes of all ranks, if there are others. Call it after an error, because the
    /// other ranks may wait for this one.
    fn abort(&self) {}
}

/// The only process of a run.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn count(&self) -> usize {
        1
    }

    fn sum(&self, _values: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn gather(&self, values: &[u64]) -> Result<Vec<u64>> {
        Ok(values.to_vec())
    }
}

impl dyn Ranks + '_ {
    /// Returns `true` for the rank that prints, logs and saves.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Waits for all ranks.
    ///
    /// # Errors
    /// As [`Ranks::gather`].
    pub fn wait(&self) -> Result<()> {
        self.gather(&[]).map(drop)
    }

    /// Returns `true` if `value` is on any rank.
    ///
    /// # Errors
    /// As [`Ranks::gather`].
    pub fn any(&self, value: bool) -> Result<bool> {
        Ok(self.gather(&[value.into()])?.contains(&1))
    }

    /// Replaces the values, as many on each rank, by their sums over all ranks.
    ///
    /// # Errors
    /// As [`Ranks::gather`].
    pub fn total(&self, values: &mut [f64]) -> Result<()> {
        let bits: Vec<u64> = values.iter().map(|v| v.to_bits()).collect();
        let all = self.gather(&bits)?;
        for (i, value) in values.iter_mut().enumerate() {
            let each = all.iter().skip(i).step_by(bits.len());
            *value = each.map(|bits| f64::from_bits(*bits)).sum();
        }
        Ok(())
    }

    /// Checks that all ranks have the same `value`.
    ///
    /// # Errors
    /// [`Error::Setting`] that names `what` and a rank where it differs from the first rank.
    pub fn check_same(&self, what: &str, value: u64) -> Result<()> {
        let all = self.gather(&[value])?;
        match all.iter().position(|v| *v != all[0]) {
            Some(rank) => Err(Error::Setting(format!(
                "rank {rank} has other {what} than rank 0: all ranks need the same program, \
                 recipe and files"
            ))),
            None => Ok(()),
        }
    }

    /// Calls `work` on the first rank, then on all others, which find the files that the first one
    /// has made.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn first_then_others<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if !self.is_first() {
            self.wait()?;
            return work();
        }
        let result = work()?;
        self.wait()?;
        Ok(result)
    }

    /// Calls `work` for all `items`, each on one rank. Returns the results on all ranks.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn shared_work<T, const N: usize>(
        &self,
        items: &[T],
        work: impl Fn(&T) -> Result<[f64; N]>,
    ) -> Result<Vec<[f64; N]>> {
        let mut results = vec![[0.0; N]; items.len()];
        let own = results.iter_mut().zip(items).enumerate();
        for (_, (result, item)) in own.filter(|(i, _)| i % self.count() == self.rank()) {
            *result = work(item)?;
        }
        self.total(results.as_flattened_mut())?;
        Ok(results)
    }

    /// Returns this rank's number of `batches` batches in a step.
    pub fn share(&self, batches: usize) -> usize {
        batches / self.count()
    }

    /// Returns the indices in the whole run of this rank's batches of step `step`, which has
    /// `batches` batches. They are dealt to the ranks one by one.
    pub fn indices(&self, step: u64, batches: usize) -> StepBy<RangeFrom<u64>> {
        (step * batches as u64 + self.rank() as u64..).step_by(self.count())
    }

    /// Replaces the gradients of `parameters` and the `values` by their sums over all ranks.
    ///
    /// # Errors
    /// When a gradient is not F32, or the ranks cannot communicate.
    pub fn sum_gradients(
        &self,
        grads: &mut GradStore,
        parameters: &[Parameter],
        values: &mut [f64],
    ) -> Result<()> {
        if self.count() == 1 {
            return Ok(());
        }
        // A parameter may have a gradient on some ranks only. Its flag follows the gradients.
        let mut flat = Vec::new();
        let mut found = vec![0.0; parameters.len()];
        for ((_, var), found) in parameters.iter().zip(&mut found) {
            match grads.get(var) {
                Some(gradient) => {
                    flat.extend(gradient.flatten_all()?.to_vec1::<f32>()?);
                    *found = 1.0;
                }
                None => flat.resize(flat.len() + var.elem_count(), 0.0),
            }
        }
        flat.extend(&found);
        self.sum(&mut flat)?;
        let mut rest = flat.as_slice();
        let found = rest[flat.len() - parameters.len()..].to_vec();
        for ((_, var), found) in parameters.iter().zip(found) {
            let (gradient, behind) = rest.split_at(var.elem_count());
            rest = behind;
            if found > 0.0 {
                let gradient = Tensor::from_slice(gradient, var.shape(), &Device::Cpu)?;
                grads.insert(var, gradient.to_device(var.device())?);
            }
        }
        self.total(values)
    }
}

/// Shares a step of `accumulate` batches of `batch` pairs among `count` ranks. Returns both numbers
/// with a multiple of `count` batches and as many pairs in all.
///
/// # Errors
/// [`Error::Setting`] when neither the batches nor the pairs of a batch can be shared.
pub fn shared(batch: usize, accumulate: usize, count: usize) -> Result<(usize, usize)> {
    if accumulate.is_multiple_of(count) {
        Ok((batch, accumulate))
    } else if batch.is_multiple_of(count) {
        Ok((batch / count, accumulate * count))
    } else {
        Err(Error::Setting(format!(
            "{count} ranks cannot share a step of {accumulate} batches of {batch} pairs: make \
             one of the numbers a multiple of {count}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::{threads::on_ranks, *};

    #[test]
    fn sums_and_batches_of_ranks_are_those_of_one_process() {
        let results = on_ranks(3, |ranks| {
            let mut values = [ranks.rank() as f32, 1.0];
            ranks.sum(&mut values).unwrap();
            let mut total = [0.5, ranks.rank() as f64];
            ranks.total(&mut total).unwrap();
            let indices: Vec<u64> = ranks.indices(2, 6).take(ranks.share(6)).collect();
            let stopped = ranks.any(ranks.rank() == 2).unwrap();
            let alike = ranks.check_same("data", ranks.rank() as u64 / 2);
            (
                values,
                total,
                indices,
                stopped,
                alike.unwrap_err().to_string(),
            )
        });
        for (values, total, _, stopped, error) in &results {
            assert_eq!(values, &[3.0, 3.0]);
            assert_eq!(total, &[1.5, 3.0]);
            assert!(stopped);
            assert!(
                error.starts_with("rank 2 has other data than rank 0"),
                "{error}"
            );
        }
        let indices: Vec<_> = results.into_iter().map(|r| r.2).collect();
        assert_eq!(indices, [[12, 15], [13, 16], [14, 17]]);
    }

    #[test]
    fn gradients_that_only_some_ranks_have_are_summed() {
        let sums = on_ranks(2, |ranks| {
            let var = |value: f32| Var::from_tensor(&Tensor::full(value, 2, &Device::Cpu)?);
            let vars = [1.0, 2.0, 3.0].map(|v| var(v).unwrap());
            // The loss is x0^2 on both ranks, and x1^2 on the second.
            let mut loss = vars[0].sqr().unwrap();
            if ranks.rank() == 1 {
                loss = (loss + vars[1].sqr().unwrap()).unwrap();
            }
            let mut grads = loss.sum_all().unwrap().backward().unwrap();
            let parameters = vars.map(|var| (String::new(), var));
            ranks
                .sum_gradients(&mut grads, &parameters, &mut [])
                .unwrap();
            parameters.map(|(_, var)| grads.get(&var).map(|g| g.to_vec1::<f32>().unwrap()))
        });
        for sum in sums {
            assert_eq!(sum, [Some(vec![4.0, 4.0]), Some(vec![4.0, 4.0]), None]);
        }
    }

    #[test]
    fn a_step_is_shared_with_the_same_number_of_pairs() {
        assert_eq!(shared(16, 1, 1).unwrap(), (16, 1));
        assert_eq!(shared(16, 1, 4).unwrap(), (4, 4));
        assert_eq!(shared(15, 8, 4).unwrap(), (15, 8));
        let error = shared(15, 1, 4).unwrap_err().to_string();
        assert!(error.contains("a step of 1 batches of 15 pairs"), "{error}");
    }
}

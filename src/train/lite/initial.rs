//! Initial weights of a student from a model file or another run.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use rand::{SeedableRng, rngs::StdRng};

use super::Latent;
use crate::{
    Error, Result,
    model::LiteModel,
    nn::lite::{LatentStats, LayerSpec, Student, StudentConfig},
    train::{checkpoint, random::normal},
};

/// Trained student with folded kernels.
#[derive(Clone, Debug)]
pub struct InitialWeights {
    /// Name of the model, for messages.
    pub name: String,
    pub student: StudentConfig,
    /// Range of scales that it serves.
    pub scales: [f64; 2],
    pub stats: LatentStats,
    pub(super) tensors: HashMap<String, Tensor>,
}

impl InitialWeights {
    /// Reads `name`, a model file or the name of a bundled model.
    ///
    /// # Errors
    /// [`Error::UnknownModel`], [`Error::Model`] and [`Error::Io`] for the file, [`Error::Setting`]
    /// for the name of a group.
    pub fn of_model(name: &str) -> Result<Self> {
        let mut models = LiteModel::find(name)?;
        if models.len() > 1 {
            let names: Vec<_> = models.iter().map(|m| m.metadata.name.as_str()).collect();
            let text = format!(
                "'{name}' stands for {}: name one of them",
                names.join(" and ")
            );
            return Err(Error::Setting(text));
        }
        let unknown = || Error::UnknownModel(format!("no model '{name}'"));
        let model = models.pop().ok_or_else(unknown)?;
        Ok(Self {
            tensors: model.tensors()?,
            name: model.metadata.name,
            student: model.metadata.student,
            scales: model.metadata.scales,
            stats: model.stats,
        })
    }

    /// Checks that a run of `student` with kernels of `expand` channels can begin with these
    /// weights. The run may have dials that they lack. These have no effect at first. A run without
    /// the dial `detail` begins with the weights at 0.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the differences.
    pub fn check_student(&self, student: &StudentConfig, expand: usize) -> Result<()> {
        let mut found = checkpoint::differences(
            &self.plain(),
            &StudentConfig {
                conditioning: Default::default(),
                memory: if self.student.memory == 0 {
                    0
                } else {
                    student.memory
                },
                ..*student
            },
        );
        if self.student.conditioning.denoise && !student.conditioning.denoise {
            found.push("it is conditioned on denoise, the run is not".into());
        }
        if self.student.memory > 0 && student.memory == 0 {
            found.push("it has memory, the run has none".into());
        }
        let (has, wanted) = (self.student.conditioning, student.conditioning);
        if has.detail && wanted.detail && has.detail_rank != wanted.detail_rank {
            let [has, wanted] = [has, wanted].map(|c| c.detail_rank);
            found.push(format!("it has detail_rank {has}, the run {wanted}"));
        }
        if !found.is_empty() {
            let (name, found) = (&self.name, found.join("; "));
            return Err(Error::Setting(format!(
                "cannot begin with '{name}', which is of another student: {found}"
            )));
        }
        let widest = student.layers().iter().map(|l| l.co).max().unwrap_or(0);
        if (1..widest).contains(&expand) {
            return Err(Error::Setting(format!(
                "expand = {expand}: 0, or at least the {widest} channels of the model that the training \
                 begins with"
            )));
        }
        Ok(())
    }

    /// As [`Self::check_student`], for a run on `latent`.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self, student: &StudentConfig, expand: usize, latent: &Latent) -> Result<()> {
        self.check_student(student, expand)?;
        if self.stats != latent.stats {
            let text =
                "the latent's statistics are not those of the model that the training begins with";
            return Err(Error::Setting(text.into()));
        }
        Ok(())
    }

    fn plain(&self) -> StudentConfig {
        StudentConfig {
            conditioning: Default::default(),
            ..self.student
        }
    }

    /// Returns the parameters of a run of `student` whose kernels are products over `expand`
    /// channels, or plain kernels for 0. The products are equal to the kernels; `seed` selects one
    /// of many. [`Self::check_student`] must have passed.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub(super) fn parameters(
        &self,
        student: &StudentConfig,
        expand: usize,
        seed: u64,
    ) -> Result<HashMap<String, Tensor>> {
        let mut parameters = HashMap::new();
        let mut rng = StdRng::seed_from_u64(seed);
        for layer in student.layers() {
            let kernel = self.kernel(&layer, &mut rng)?;
            if expand == 0 {
                parameters.insert(format!("{}.weight", layer.name), kernel);
            } else {
                let [squeeze, wide] = product(&kernel, expand, &mut rng)?;
                parameters.insert(format!("{}.squeeze", layer.name), squeeze);
                parameters.insert(format!("{}.expand", layer.name), wide);
            }
            let bias = format!("{}.bias", layer.name);
            let mut value = self.tensor(&bias, &[layer.co])?;
            if student.memory > 0 && self.student.memory == 0 && layer.name == "tail" {
                value = (value + closed_gates(student)?)?;
            }
            parameters.insert(bias, value);
            for c in layer.conditions(&student.conditioning) {
                for (name, shape) in c.tensors() {
                    let value = if name.ends_with(".down") && !self.tensors.contains_key(name) {
                        random(shape, (1.0 / (9 * layer.ci) as f32).sqrt(), &mut rng)?
                    } else {
                        self.tensor(name, shape)?
                    };
                    parameters.insert(name.to_string(), value);
                }
            }
        }
        Ok(parameters)
    }

    /// Returns the kernel of `layer`. New channels of an input have no effect. Those of an output
    /// are random, as a state of zeros with no effect would not learn.
    fn kernel(&self, layer: &LayerSpec, rng: &mut StdRng) -> Result<Tensor> {
        let (name, shape) = (format!("{}.weight", layer.name), [layer.co, layer.ci, 3, 3]);
        let kernel = self.tensor(&name, &shape)?;
        let known = self.tensors.get(&name).map_or(layer.co, |t| t.dims()[0]);
        if known == layer.co {
            return Ok(kernel);
        }
        let shape = [layer.co - known, layer.ci, 3, 3];
        let deviation = NEW_OUTPUTS * (2.0 / (9 * layer.ci) as f32).sqrt();
        let random = random(&shape, deviation, rng)?;
        Ok(Tensor::cat(&[kernel.narrow(0, 0, known)?, random], 0)?)
    }

    /// Returns the tensor of this name with zeros in the channels that it lacks, or zeros.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Some(tensor) = self.tensors.get(name) else {
            return Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?);
        };
        let mut tensor = tensor.clone();
        for (dim, &len) in shape.iter().enumerate() {
            let found = tensor.dim(dim)?;
            if found < len {
                tensor = tensor.pad_with_zeros(dim, 0, len - found)?;
            }
        }
        Ok(tensor.reshape(shape)?)
    }
}

/// Returns random values of a normal distribution.
fn random(shape: &[usize], deviation: f32, rng: &mut StdRng) -> Result<Tensor> {
    let values = (0..shape.iter().product()).map(|_| deviation * normal(rng));
    Ok(Tensor::from_vec(values.collect(), shape, &Device::Cpu)?)
}

/// Size of the random weights of new outputs, in that of new kernels.
const NEW_OUTPUTS: f32 = 0.3;

/// Bias of new gates, which are nearly closed.
const NEW_GATES: f32 = -1.5;

/// Returns what is added to the biases of the last layer for new gates.
fn closed_gates(student: &StudentConfig) -> Result<Tensor> {
    let z = student.latent.channels(student.r);
    let mut bias = vec![0f32; student.outputs()];
    bias[z..2 * z].fill(NEW_GATES);
    Ok(Tensor::new(bias, &Device::Cpu)?)
}

/// Returns `squeeze` `[co, width]` and `expand` `[width, ci, 3, 3]` whose product is `kernel` `[co,
/// ci, 3, 3]`. The rows of `squeeze` are orthonormal. The part of `expand` in its null space is
/// random, of the size of new weights.
fn product(kernel: &Tensor, width: usize, rng: &mut StdRng) -> Result<[Tensor; 2]> {
    let (co, ci, kh, kw) = kernel.dims4()?;
    let inputs = ci * kh * kw;
    let mut rows: Vec<Vec<f64>> = Vec::new();
    while rows.len() < co {
        let mut row: Vec<f64> = (0..width).map(|_| normal(rng).into()).collect();
        for done in &rows {
            let along: f64 = row.iter().zip(done).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(done).for_each(|(a, b)| *a -= along * b);
        }
        let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        // A row in the span of the others is sampled again.
        if norm > 1e-3 {
            rows.push(row.into_iter().map(|v| v / norm).collect());
        }
    }
    let squeeze = rows.iter().flatten().map(|&v| v as f32).collect();
    let squeeze = Tensor::from_vec::<_, f32>(squeeze, (co, width), &Device::Cpu)?;
    let random = random(&[width, inputs], (2.0 / inputs as f32).sqrt(), rng)?;
    // S (S^T (W - S R) + R) = W for orthonormal rows.
    let missing = (kernel.reshape((co, inputs))? - squeeze.matmul(&random)?)?;
    let expand = (random + squeeze.t()?.matmul(&missing)?)?;
    Ok([squeeze, expand.reshape((width, ci, kh, kw))?])
}

/// Creates a student whose kernels are products over `expand` channels, or plain kernels for 0.
pub(super) fn build(
    config: StudentConfig,
    expand: usize,
    vb: VarBuilder,
) -> candle_core::Result<Student> {
    match expand {
        0 => Student::new(config, vb),
        width => Student::expanded(config, width, vb),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::lite::{Condition, Conditioning};
    use crate::testing::normal;

    #[test]
    fn expanded_kernels_are_those_of_the_model_and_dials_that_it_lacks_do_nothing() {
        let model = LiteModel::find("tiny-x4").unwrap().remove(0);
        let plain = model.folded(&Condition::at(3.0));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), plain.to_bytes(false).unwrap()).unwrap();
        let begin = InitialWeights::of_model(file.path().to_str().unwrap()).unwrap();
        let z = normal(0.0, 1.0, (1, 12, 12, 16));
        let at = Condition {
            scale: 3.0,
            denoise: 0.4,
            detail: 0.7,
        };
        let forward = |student: Student| student.forward(&z, &at).unwrap();
        let want = forward(plain.student().unwrap());
        let dials = |denoise, detail, detail_rank| Conditioning {
            denoise,
            detail,
            detail_rank,
        };
        for (expand, conditioning) in [
            (0, Conditioning::default()),
            (32, Conditioning::default()),
            (64, dials(true, true, 0)),
            (64, dials(true, true, 5)),
        ] {
            let student = StudentConfig {
                conditioning,
                ..begin.student
            };
            let parameters = begin.parameters(&student, expand, 3).unwrap();
            let vb = VarBuilder::from_tensors(parameters, DType::F32, &Device::Cpu);
            let got = forward(build(student, expand, vb).unwrap());
            let difference = (got - &want).unwrap().abs().unwrap();
            let worst = difference.max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(worst < 1e-5, "{worst} at {expand} channels");
        }
        assert!(begin.check_student(&begin.student, 31).is_err());
        assert!(begin.check_student(&StudentConfig::tiny(2), 0).is_err());
    }
}

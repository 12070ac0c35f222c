//! Model files of the lite family: small networks for real time.
//!
//! A file is untrusted input. Its size, header, format version, names, shapes and values are
//! checked. The error names the invalid one.

use std::{
    borrow::Cow,
    collections::HashMap,
    convert::Infallible,
    io::{Cursor, Read, Seek},
    iter,
    path::Path,
};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use half::f16;
use safetensors::{Dtype, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::container::{
    self, CONDITIONED_VERSION, FORMAT_VERSION, MEMORY_VERSION, METADATA_KEY, Reader,
};
use crate::{
    Error, Result,
    nn::lite::{
        Condition, ConditionSpec, Conditioning, LatentStats, LayerSpec, Student, StudentConfig,
    },
};

/// Name of the family in the metadata.
pub(super) const FAMILY: &str = "lite";

/// Metadata of a model file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    pub format_version: u32,
    /// Name of the family, `lite`.
    pub family: String,
    pub name: String,
    pub student: StudentConfig,
    /// Supported scales: above the first, up to and including the second, within 1 to 4.
    pub scales: [f64; 2],
    /// Meaning of the network's input samples.
    pub color: String,
    pub licence: String,
    /// Data, steps and losses of its training, in free form.
    pub training: serde_json::Value,
}

/// Parameters of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    pub spec: LayerSpec,
    /// `[co, ci, 3, 3]`
    pub weight: Vec<f32>,
    /// `[co]`
    pub bias: Vec<f32>,
    /// Dependence of both on the inputs, of which the scale is the first.
    pub conditions: Vec<LayerCondition>,
}

/// Dependence of a layer on one input of `n` features. [`ConditionSpec`] has the shapes.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerCondition {
    pub spec: ConditionSpec,
    pub shift: Vec<f32>,
    /// Empty if the kernel has no factor that depends on the input.
    pub gain: Vec<f32>,
    /// The kernels that are added, or their two factors. Empty if there are none.
    pub kernels: Vec<Vec<f32>>,
}

impl LayerCondition {
    /// Reads the tensors by `take` of a name and a shape.
    ///
    /// # Errors
    /// As `take`.
    pub fn read<E>(
        spec: ConditionSpec,
        mut take: impl FnMut(&str, &[usize]) -> std::result::Result<Vec<f32>, E>,
    ) -> std::result::Result<Self, E> {
        let shift = take(&spec.shift.0, &spec.shift.1)?;
        let gain = match &spec.gain {
            Some((name, shape)) => take(name, shape)?,
            None => Vec::new(),
        };
        let kernels = spec.kernels.iter();
        let kernels = kernels.map(|(name, shape)| take(name, shape));
        Ok(Self {
            kernels: kernels.collect::<std::result::Result<_, _>>()?,
            spec,
            shift,
            gain,
        })
    }

    /// Makes a layer that does not depend on the input.
    pub fn zero(spec: ConditionSpec) -> Self {
        let zeros = |_: &str, shape: &[usize]| Ok(vec![0.0; shape.iter().product()]);
        match Self::read::<Infallible>(spec, zeros) {
            Ok(zero) => zero,
            Err(never) => match never {},
        }
    }

    /// Returns names, shapes and values of its tensors.
    fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], &[f32])> {
        let spec = &self.spec;
        let gain = spec.gain.is_some().then_some(&self.gain);
        let values = iter::once(&self.shift).chain(gain).chain(&self.kernels);
        let named = spec.tensors().zip(values);
        named.map(|((name, shape), values)| (name, shape, values.as_slice()))
    }

    /// Returns the kernels `[n, co, ci, 3, 3]` that are added to one of `inputs` values for each
    /// output. Factors are multiplied out.
    fn added(&self, inputs: usize) -> Cow<'_, [f32]> {
        match self.kernels.as_slice() {
            [] => Cow::Borrowed(&[]),
            [up, down] => {
                let mut product = vec![0.0; self.spec.shift.1[0] * inputs];
                let rank = self.spec.kernels[0].1[1];
                let rows = product.chunks_exact_mut(inputs).zip(up.chunks_exact(rank));
                for (to, factors) in rows {
                    for (row, factor) in down.chunks_exact(inputs).zip(factors) {
                        to.iter_mut().zip(row).for_each(|(to, v)| *to += factor * v);
                    }
                }
                Cow::Owned(product)
            }
            [all, ..] => Cow::Borrowed(all),
        }
    }
}

impl Layer {
    /// Makes a layer without dials from a kernel `weight` and a `bias`, which depends on the scale
    /// by `scale` `[co, 2]`.
    pub fn new(weight: Vec<f32>, bias: Vec<f32>, scale: Vec<f32>, spec: LayerSpec) -> Self {
        let mut conditions = spec.conditions(&Conditioning::default());
        let conditions = conditions.drain(..).map(|spec| LayerCondition {
            shift: scale.clone(),
            ..LayerCondition::zero(spec)
        });
        Self {
            conditions: conditions.collect(),
            spec,
            weight,
            bias,
        }
    }

    /// Returns kernel `[co, ci, 3, 3]` and bias `[co]` at `at` for a grid cell of side `r`.
    pub fn fold(&self, at: &Condition, r: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut kernel, mut bias) = (self.weight.clone(), self.bias.clone());
        let mut factors = vec![1.0; bias.len()];
        let add = |to: &mut [f32], rows: &[f32], features: &[f32]| {
            for (to, row) in to.iter_mut().zip(rows.chunks_exact(features.len())) {
                *to += row.iter().zip(features).map(|(a, b)| a * b).sum::<f32>();
            }
        };
        for condition in &self.conditions {
            let features = condition.spec.input.features(at, r);
            add(&mut bias, &condition.shift, &features);
            add(&mut factors, &condition.gain, &features);
            let added = condition.added(9 * self.spec.ci);
            let parts = added.chunks_exact(kernel.len().max(1));
            for (part, f) in parts.zip(&features) {
                kernel.iter_mut().zip(part).for_each(|(k, p)| *k += f * p);
            }
        }
        let rows = kernel.chunks_exact_mut(9 * self.spec.ci);
        for (row, factor) in rows.zip(factors) {
            row.iter_mut().for_each(|k| *k *= factor);
        }
        (kernel, bias)
    }

    /// Removes all inputs but the first `ci`.
    fn narrow_inputs(&mut self, ci: usize) {
        let (from, to) = (9 * self.spec.ci, 9 * ci);
        let narrow = |kernels: &mut Vec<f32>| {
            let rows = kernels.chunks_exact(from);
            *kernels = rows.flat_map(|row| &row[..to]).copied().collect();
        };
        narrow(&mut self.weight);
        for condition in &mut self.conditions {
            // The kernels, or the second factor.
            condition.kernels.last_mut().map(narrow);
        }
        self.respecify(self.spec.co, ci);
    }

    /// Removes all outputs but the first `co`.
    fn narrow_outputs(&mut self, co: usize) {
        let share = |values: &mut Vec<f32>, outputs: usize| {
            values.truncate(values.len() / outputs * co);
        };
        let outputs = self.spec.co;
        share(&mut self.weight, outputs);
        share(&mut self.bias, outputs);
        for condition in &mut self.conditions {
            share(&mut condition.shift, outputs);
            share(&mut condition.gain, outputs);
            // The kernels, of one feature, or the first factor.
            let kernels = condition.kernels.first_mut();
            kernels.into_iter().for_each(|k| share(k, outputs));
        }
        self.respecify(co, self.spec.ci);
    }

    /// Sets the channels of the specifications.
    fn respecify(&mut self, co: usize, ci: usize) {
        (self.spec.co, self.spec.ci) = (co, ci);
        for LayerCondition { spec, .. } in &mut self.conditions {
            spec.shift.1[0] = co;
            if let Some((_, shape)) = &mut spec.gain {
                shape[0] = co;
            }
            match spec.kernels.as_mut_slice() {
                [(_, up), (_, down)] => (up[0], down[1]) = (co, ci),
                all => all.iter_mut().for_each(|(_, s)| (s[1], s[2]) = (co, ci)),
            }
        }
    }

    /// Returns names, shapes and values of all tensors.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>, &[f32])> {
        let (name, co, ci) = (&self.spec.name, self.spec.co, self.spec.ci);
        let mut all = vec![
            (
                format!("{name}.weight"),
                vec![co, ci, 3, 3],
                self.weight.as_slice(),
            ),
            (format!("{name}.bias"), vec![co], self.bias.as_slice()),
        ];
        let conditions = self.conditions.iter().flat_map(LayerCondition::tensors);
        all.extend(conditions.map(|(name, shape, v)| (name.to_string(), shape.to_vec(), v)));
        all
    }

    /// Returns the mutable values of [`Self::tensors`].
    pub fn values_mut(&mut self) -> Vec<&mut Vec<f32>> {
        let mut all = vec![&mut self.weight, &mut self.bias];
        for condition in &mut self.conditions {
            let spec = &condition.spec;
            all.push(&mut condition.shift);
            all.extend(spec.gain.is_some().then_some(&mut condition.gain));
            all.extend(&mut condition.kernels);
        }
        all
    }
}

/// Ranges and means of a network's values, for inference in integers.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// Minimum, maximum and mean of each channel, for the input of the network and for the output
    /// of every layer but the last, including the skip of a pair.
    pub ranges: Vec<Vec<[f32; 3]>>,
}

impl Calibration {
    /// Returns names and channels of the tensors for these layers.
    fn tensors(layers: &[LayerSpec]) -> Vec<(String, usize)> {
        let Some((_, inner)) = layers.split_last() else {
            return Vec::new();
        };
        let latent = ("latent.range".to_string(), layers[0].ci);
        let inner = inner.iter().map(|l| (format!("{}.range", l.name), l.co));
        iter::once(latent).chain(inner).collect()
    }

    fn take(
        reader: &mut Reader<impl Read + Seek>,
        layers: &[LayerSpec],
    ) -> std::result::Result<Self, String> {
        let mut ranges = Vec::new();
        for (name, channels) in Self::tensors(layers) {
            let values = reader.take(&name, &[channels, 3])?;
            let values = values.as_chunks::<3>().0.to_vec();
            if values
                .iter()
                .any(|[low, high, mean]| !(low <= mean && mean <= high))
            {
                return Err(format!("'{name}' has a mean outside of its range"));
            }
            ranges.push(values);
        }
        Ok(Self { ranges })
    }
}

/// A lite model with the content of its file.
#[derive(Clone, Debug, PartialEq)]
pub struct LiteModel {
    pub metadata: Metadata,
    pub stats: LatentStats,
    pub layers: Vec<Layer>,
    /// Required for inference in integers.
    pub calibration: Option<Calibration>,
}

impl Metadata {
    /// Makes the metadata of a new lite model.
    pub fn lite(name: &str, student: StudentConfig, scales: [f64; 2]) -> Self {
        Self {
            format_version: match (student.memory, student.conditioning.is_none()) {
                (0, true) => FORMAT_VERSION,
                (0, false) => CONDITIONED_VERSION,
                _ => MEMORY_VERSION,
            },
            family: FAMILY.into(),
            name: name.into(),
            student,
            scales,
            color:
                "Y'CbCr of the stream's own matrix; luma 0 (black) to 1 (white), chroma -0.5 to 0.5"
                    .into(),
            licence: "MIT OR Apache-2.0".into(),
            training: serde_json::Value::Null,
        }
    }

    fn check(&self) -> std::result::Result<(), String> {
        container::check_label(
            self.format_version,
            MEMORY_VERSION,
            &self.family,
            &self.name,
        )?;
        if self.format_version < CONDITIONED_VERSION && !self.student.conditioning.is_none() {
            return Err(format!(
                "dials in a file of format version {}",
                self.format_version
            ));
        }
        if self.format_version < MEMORY_VERSION && self.student.memory > 0 {
            return Err(format!(
                "memory in a file of format version {}",
                self.format_version
            ));
        }
        let [low, high] = self.scales;
        if !(1.0 <= low && low < high && high <= 4.0) {
            return Err(format!("scales {low} to {high}, not within 1 to 4"));
        }
        self.student.check()
    }
}

impl LiteModel {
    /// Reads a model file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Model`] if it is not a valid model.
    pub fn read(path: &Path) -> Result<Self> {
        Self::load(container::open(path)?, path)
    }

    /// Parses the bytes of a model file. `path` is for error messages.
    ///
    /// # Errors
    /// [`Error::Model`] with the reason.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::load(Cursor::new(bytes), path)
    }

    fn load(source: impl Read + Seek, path: &Path) -> Result<Self> {
        let load = || Self::from_reader(Reader::new(source)?);
        load().map_err(|reason| Error::model(path, reason))
    }

    pub(super) fn from_reader(
        mut reader: Reader<impl Read + Seek>,
    ) -> std::result::Result<Self, String> {
        let metadata: Metadata = reader.metadata(FAMILY)?;
        metadata.check()?;
        let z = metadata.student.latent.channels(metadata.student.r);
        let stats = LatentStats {
            input_mean: reader.take("latent.input_mean", &[z])?,
            input_std: reader.take("latent.input_std", &[z])?,
            residual_std: reader.take("latent.residual_std", &[z])?,
        };
        if stats
            .input_std
            .iter()
            .chain(&stats.residual_std)
            .any(|&s| s <= 0.0)
        {
            return Err("a standard deviation of the latent is not positive".into());
        }
        let layer = |spec: LayerSpec| -> std::result::Result<Layer, String> {
            let (co, ci) = (spec.co, spec.ci);
            Ok(Layer {
                weight: reader.take(&format!("{}.weight", spec.name), &[co, ci, 3, 3])?,
                bias: reader.take(&format!("{}.bias", spec.name), &[co])?,
                conditions: spec
                    .conditions(&metadata.student.conditioning)
                    .into_iter()
                    .map(|spec| LayerCondition::read(spec, |name, shape| reader.take(name, shape)))
                    .collect::<std::result::Result<_, _>>()?,
                spec,
            })
        };
        let specs = metadata.student.layers();
        let layers = specs.iter().cloned().map(layer);
        let layers = layers.collect::<std::result::Result<_, _>>()?;
        let calibration = if reader.has("latent.range") {
            Some(Calibration::take(&mut reader, &specs)?)
        } else {
            None
        };
        reader.finish()?;
        Ok(Self {
            metadata,
            stats,
            layers,
            calibration,
        })
    }

    /// Returns the number of multiplications per input pixel at `scale`, those of conditioning and
    /// interpolation not included.
    pub fn multiplications(&self, scale: f64) -> f64 {
        let weights: usize = self.layers.iter().map(|layer| layer.weight.len()).sum();
        weights as f64 * (scale / self.metadata.student.r as f64).powi(2)
    }

    /// Returns the model as a differentiable network.
    ///
    /// # Errors
    /// If the layers are not those of the metadata's architecture.
    pub fn student(&self) -> Result<Student> {
        let tensors = self.tensors()?;
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        Ok(Student::new(self.metadata.student, vb)?)
    }

    /// Returns a model without dials that has the weights of this one at `at` for all scales.
    pub fn folded(&self, at: &Condition) -> Self {
        let r = self.metadata.student.r;
        let fold = |layer: &Layer| {
            let (weight, bias) = layer.fold(at, r);
            let scale = vec![0.0; 2 * layer.spec.co];
            Layer::new(weight, bias, scale, layer.spec.clone())
        };
        let mut folded = Self {
            layers: self.layers.iter().map(fold).collect(),
            metadata: self.metadata.clone(),
            stats: self.stats.clone(),
            calibration: self.calibration.clone(),
        };
        folded.metadata.student.conditioning = Conditioning::default();
        folded
    }

    /// Returns the model without memory: the one that computes the first frame.
    pub fn without_memory(&self) -> Self {
        let mut model = self.clone();
        if self.metadata.student.memory == 0 {
            return model;
        }
        model.metadata.student.memory = 0;
        let z = self.stats.input_mean.len();
        if let Some(calibration) = &mut model.calibration {
            calibration
                .ranges
                .iter_mut()
                .take(1)
                .for_each(|r| r.truncate(z));
        }
        if let Some(head) = model.layers.first_mut() {
            head.narrow_inputs(z);
        }
        if let Some(tail) = model.layers.last_mut() {
            tail.narrow_outputs(z);
        }
        model
    }

    /// Returns the tensors of the layers by name.
    ///
    /// # Errors
    /// If a tensor does not have the shape of its layer.
    pub fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        let all = self.layers.iter().flat_map(Layer::tensors);
        let tensor = |(name, shape, values): (String, Vec<usize>, &[f32])| {
            Ok((name, Tensor::from_slice(values, shape, &Device::Cpu)?))
        };
        all.map(tensor).collect()
    }

    /// Returns the bytes of the model file. Weights are in f16 if `half` is set. The statistics of
    /// the latent and the calibration are in f32.
    ///
    /// # Errors
    /// [`Error::Model`] if a weight does not fit in f16 or the metadata cannot be written.
    pub fn to_bytes(&self, half: bool) -> Result<Vec<u8>> {
        let mut data: Vec<(String, Vec<usize>, Dtype, Vec<u8>)> = Vec::new();
        let f32_bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let z = self.stats.input_mean.len();
        for (name, values) in [
            ("input_mean", &self.stats.input_mean),
            ("input_std", &self.stats.input_std),
            ("residual_std", &self.stats.residual_std),
        ] {
            data.push((
                format!("latent.{name}"),
                vec![z],
                Dtype::F32,
                f32_bytes(values),
            ));
        }
        for layer in &self.layers {
            for (name, shape, values) in layer.tensors() {
                if !half {
                    data.push((name, shape, Dtype::F32, f32_bytes(values)));
                    continue;
                }
                let values: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                if values.iter().any(|v| !v.is_finite()) {
                    return Err(Error::model(
                        &self.metadata.name,
                        format!("'{name}' does not fit in f16"),
                    ));
                }
                let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                data.push((name, shape, Dtype::F16, bytes));
            }
        }
        if let Some(calibration) = &self.calibration {
            let names = Calibration::tensors(&self.metadata.student.layers());
            for ((name, channels), ranges) in names.into_iter().zip(&calibration.ranges) {
                let bytes = f32_bytes(ranges.as_flattened());
                data.push((name, vec![channels, 3], Dtype::F32, bytes));
            }
        }
        let wrong = |e: String| Error::model(&self.metadata.name, e);
        let json = serde_json::to_string(&self.metadata).map_err(|e| wrong(e.to_string()))?;
        let views = data
            .iter()
            .map(|(name, shape, dtype, bytes)| {
                Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
            })
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|e| wrong(e.to_string()))?;
        safetensors::serialize(
            views,
            Some(HashMap::from([(METADATA_KEY.to_string(), json)])),
        )
        .map_err(|e| wrong(e.to_string()))
    }
}

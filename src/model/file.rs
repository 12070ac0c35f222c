//! The model file: tensors by name in safetensors, everything else as JSON under the metadata key `tadsr`.
//!
//! A file is untrusted input. Its size, the header, the format version, every name, shape and value are checked, and
//! the error says which one is wrong.

use std::{collections::HashMap, fs, io::Read, path::Path};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    nn::lite::{LatentStats, LayerSpec, Student, StudentConfig, scale_features},
};

/// The version of the format that this library writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// The largest model file that is read, in bytes.
const MAX_FILE: u64 = 2 << 30;

const METADATA_KEY: &str = "tadsr";

/// What a model file says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    pub format_version: u32,
    /// The family of networks: `lite`.
    pub family: String,
    pub name: String,
    pub student: StudentConfig,
    /// Scales served: above the first, up to and including the second; within 1 to 4.
    pub scales: [f64; 2],
    /// What the samples mean that the network sees.
    pub color: String,
    pub licence: String,
    /// How it was trained: data, steps, losses; free form.
    pub training: serde_json::Value,
}

/// A layer's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    pub spec: LayerSpec,
    /// `[co, ci, 3, 3]`
    pub weight: Vec<f32>,
    /// `[co]`
    pub bias: Vec<f32>,
    /// `[co, 2]`: the bias's dependence on [`scale_features`].
    pub scale: Vec<f32>,
}

impl Layer {
    /// The bias at `scale`.
    pub fn bias_at(&self, scale: f64, r: usize) -> Vec<f32> {
        let f = scale_features(scale, r);
        let at = |(b, s): (&f32, &[f32])| b + s[0] * f[0] + s[1] * f[1];
        self.bias
            .iter()
            .zip(self.scale.chunks_exact(2))
            .map(at)
            .collect()
    }
}

/// A student of the lite family, as its file holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct LiteModel {
    pub metadata: Metadata,
    pub stats: LatentStats,
    pub layers: Vec<Layer>,
}

impl Metadata {
    /// The metadata of a new model of the lite family.
    pub fn lite(name: &str, student: StudentConfig, scales: [f64; 2]) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            family: "lite".into(),
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
        if self.format_version != FORMAT_VERSION {
            return Err(format!(
                "format version {}, this library reads version {FORMAT_VERSION}: use a matching release",
                self.format_version
            ));
        }
        let printable = |s: &str| s.len() <= 100 && !s.chars().any(char::is_control);
        if !printable(&self.name) || !printable(&self.family) {
            return Err("its name or family is longer than 100 bytes or not printable".into());
        }
        if self.family != "lite" {
            return Err(format!(
                "family '{}', this library runs 'lite'",
                self.family
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
    /// [`Error::Io`] when the file cannot be read, [`Error::Model`] when it is no usable model.
    pub fn read(path: &Path) -> Result<Self> {
        let found = fs::metadata(path).map_err(Error::io(path))?;
        if !found.is_file() {
            return Err(Error::model(path, "not a regular file"));
        }
        // Files below /proc claim to be empty and can block the reader.
        if found.len() == 0 {
            return Err(Error::model(path, "an empty file"));
        }
        let file = fs::File::open(path).map_err(Error::io(path))?;
        let mut bytes = Vec::new();
        let read = file.take(MAX_FILE + 1).read_to_end(&mut bytes);
        if read.map_err(Error::io(path))? as u64 > MAX_FILE {
            let reason = format!("more than {MAX_FILE} bytes, which no model has");
            return Err(Error::model(path, reason));
        }
        Self::parse(&bytes, path)
    }

    /// Parses the bytes of a model file; `path` is for error messages.
    ///
    /// # Errors
    /// [`Error::Model`] with what is wrong.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::parse_inner(bytes).map_err(|reason| Error::model(path, reason))
    }

    fn parse_inner(bytes: &[u8]) -> std::result::Result<Self, String> {
        let foreign = |e| format!("not a safetensors file or a truncated one ({e})");
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(foreign)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(foreign)?;
        let json = header
            .metadata()
            .as_ref()
            .and_then(|m| m.get(METADATA_KEY))
            .ok_or("a safetensors file, but no model of this project (no 'tadsr' metadata)")?;
        let metadata: Metadata = serde_json::from_str(json)
            .map_err(|e| format!("metadata cannot be understood: {e}"))?;
        metadata.check()?;
        let mut reader = Reader::new(&tensors);
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
                scale: reader.take(&format!("{}.scale", spec.name), &[co, 2])?,
                spec,
            })
        };
        let layers = metadata.student.layers().into_iter().map(layer);
        let layers = layers.collect::<std::result::Result<_, _>>()?;
        reader.finish()?;
        Ok(Self {
            metadata,
            stats,
            layers,
        })
    }

    /// The model as a differentiable network.
    ///
    /// # Errors
    /// When the layers are not those of the metadata's student.
    pub fn student(&self) -> Result<Student> {
        let mut tensors = HashMap::new();
        for l in &self.layers {
            let (co, ci) = (l.spec.co, l.spec.ci);
            for (name, shape, values) in [
                ("weight", vec![co, ci, 3, 3], &l.weight),
                ("bias", vec![co], &l.bias),
                ("scale", vec![co, 2], &l.scale),
            ] {
                let t = Tensor::from_slice(values, shape, &Device::Cpu)?;
                tensors.insert(format!("{}.{name}", l.spec.name), t);
            }
        }
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        Ok(Student::new(self.metadata.student, vb)?)
    }

    /// The bytes of the model file, weights in f16 when `half` is set, the latent's statistics always in f32.
    ///
    /// # Errors
    /// [`Error::Model`] when a weight does not fit in f16 or the metadata cannot be written.
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
            let (co, ci) = (layer.spec.co, layer.spec.ci);
            for (name, shape, values) in [
                ("weight", vec![co, ci, 3, 3], &layer.weight),
                ("bias", vec![co], &layer.bias),
                ("scale", vec![co, 2], &layer.scale),
            ] {
                let name = format!("{}.{name}", layer.spec.name);
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

/// Takes tensors out of a file and keeps account of what is missing and what is left.
struct Reader<'a> {
    tensors: HashMap<String, TensorView<'a>>,
}

impl<'a> Reader<'a> {
    fn new(tensors: &SafeTensors<'a>) -> Self {
        Self {
            tensors: tensors.tensors().into_iter().collect(),
        }
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> std::result::Result<Vec<f32>, String> {
        let t = self
            .tensors
            .remove(name)
            .ok_or_else(|| format!("tensor '{name}' is missing"))?;
        if t.shape() != shape {
            return Err(format!(
                "tensor '{name}' has shape {:?}, not {shape:?}",
                t.shape()
            ));
        }
        let values: Vec<f32> = match t.dtype() {
            Dtype::F32 => t
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            Dtype::F16 => t
                .data()
                .chunks_exact(2)
                .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            other => {
                return Err(format!(
                    "tensor '{name}' has type {other:?}, not F32 or F16"
                ));
            }
        };
        if values.iter().any(|v| !v.is_finite()) {
            return Err(format!("tensor '{name}' holds a value that is not finite"));
        }
        Ok(values)
    }

    fn finish(self) -> std::result::Result<(), String> {
        let mut left: Vec<_> = self.tensors.into_keys().collect();
        if left.is_empty() {
            return Ok(());
        }
        left.sort();
        left.truncate(8);
        Err(format!(
            "tensors that the architecture does not have: {}",
            left.join(", ")
        ))
    }
}

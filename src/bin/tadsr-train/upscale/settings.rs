//! Options of the model.

use std::{fs, path::PathBuf, str::FromStr};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tadsr::{
    Device, Error, Precision, Upscaler,
    engine::{ColorFix, NoiseField, Setting, Temporal, Tile},
    frame::FrameInfo,
    ladder,
    model::DEFAULT_MODEL,
    train::checkpoint::write_atomically,
};
#[cfg(feature = "video")]
use tadsr::{model::checksum, video::MadeOf};

/// Name of the model in [`Settings::made_of`].
#[cfg(feature = "video")]
pub const MODEL: &str = "model";

/// Frames before a segment of a video that bring the temporal filter, the memory of a network and
/// the automatic denoise close to their state after all frames before.
#[cfg(feature = "video")]
const HISTORY: usize = 12;

/// Name of the noise tensor in a file.
const NOISE: &str = "noise";

const RESSHIFT: &str = "ResShift, SinSR and TAD-SR models";

/// Model, scale and settings.
#[derive(Debug, clap::Args)]
pub struct Settings {
    /// Name of a bundled model or path of a model file. auto is the largest bundled model for
    /// images, and for videos the largest that this machine runs in real time
    #[arg(long, default_value = ladder::AUTO, value_name = "NAME_OR_PATH")]
    model: String,
    /// Factor for width and height, 1 to the maximum of the model [default: 2, or the default of
    /// the model]
    #[arg(long)]
    scale: Option<f64>,
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_parser = Device::from_str)]
    device: Device,
    /// Threads for a frame; 0 is one per core
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024))]
    threads: u16,
    /// Share of the network's detail that is added, 0 to 1; 0 is bicubic interpolation
    #[arg(long, default_value_t = 1.0, value_parser = fraction)]
    strength: f32,
    /// Degradation of the input, 0 (clean) to 1 (heavily compressed), for models with this dial
    /// [default: automatic]
    #[arg(long, value_parser = fraction)]
    denoise: Option<f32>,
    /// Invented detail, 0 (faithful) to 1 (generative), for models with this dial [default: 0.5 at
    /// scales above 2, otherwise 0]
    #[arg(long, value_parser = fraction)]
    detail: Option<f32>,
    /// Use of previous frames of a video: auto, off, filter (mixes in the previous result where the
    /// input stands still) or memory (of networks that have one). For models of the lite family on
    /// the CPU
    #[arg(long, default_value = "auto", value_parser = Temporal::from_str)]
    temporal: Temporal,
    /// Numeric precision: auto (the fastest that the processor supports), f32 or bf16; int16 or
    /// int8 for calibrated models; f16 on a CUDA device. ResShift models: f32 on the CPU; f16, bf16
    /// or f32 on CUDA
    #[arg(long, default_value = "auto", value_parser = Precision::from_str)]
    precision: Precision,
    /// Steps of the sampler: 1 for a distilled model, or as many as a teacher was trained with
    /// [default: 1]
    #[arg(long, help_heading = RESSHIFT)]
    steps: Option<usize>,
    /// Seed of the noise; the same seed and tiles give the same picture [default: 0]
    #[arg(long, help_heading = RESSHIFT)]
    seed: Option<u64>,
    /// Share of the initial noise, 0 to 1; less noise invents less detail [default: 1]
    #[arg(long, value_parser = fraction, help_heading = RESSHIFT)]
    noise: Option<f32>,
    /// Side of the tiles of a frame, in pixels of the input; auto depends on the free memory, whole
    /// is one tile
    #[arg(long, value_parser = tile, value_name = "auto|whole|SIDE", help_heading = RESSHIFT)]
    tile: Option<Tile>,
    /// Overlap of neighbouring tiles in pixels of the input [default: 16]
    #[arg(long, value_name = "PIXELS", help_heading = RESSHIFT)]
    tile_overlap: Option<usize>,
    /// Method that restores the colours of the input [default: wavelet]
    #[arg(long, value_enum, help_heading = RESSHIFT)]
    color_fix: Option<Fix>,
    /// Read the noise from this safetensors file: tensor `noise`, [1, channels, height, width], f32
    #[arg(long, value_name = "FILE", conflicts_with = "seed", help_heading = RESSHIFT)]
    noise_file: Option<PathBuf>,
    /// Write the noise to this file, to compare with others. All frames of a video have the same
    /// noise
    #[arg(long, value_name = "FILE", help_heading = RESSHIFT)]
    pub save_noise: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Fix {
    /// Coarse colours from the input, fine detail from the network
    Wavelet,
    /// Mean and standard deviation of each colour from the input
    Adain,
    /// Colours of the network
    None,
}

fn fraction(s: &str) -> Result<f32, String> {
    match s.parse() {
        Ok(v) if (0.0..=1.0).contains(&v) => Ok(v),
        _ => Err("a number from 0 to 1".into()),
    }
}

fn tile(s: &str) -> Result<Tile, String> {
    match s.parse() {
        _ if s == "auto" => Ok(Tile::Auto),
        _ if s == "whole" => Ok(Tile::Whole),
        Ok(side) if side > 0 => Ok(Tile::Side(side)),
        _ => Err("auto, whole, or a number of pixels".into()),
    }
}

impl Settings {
    /// Returns `true` if the size of the input chooses the model.
    pub fn is_auto(&self) -> bool {
        self.model == ladder::AUTO
    }

    /// Loads the model, or the default model if the input chooses it later.
    pub fn load(&self) -> Result<Upscaler> {
        self.load_model(if self.is_auto() {
            DEFAULT_MODEL
        } else {
            &self.model
        })
    }

    /// Loads `model` and applies the settings.
    pub fn load_model(&self, model: &str) -> Result<Upscaler> {
        let mut upscaler = Upscaler::load(model, self.device)?;
        upscaler.set_threads(self.threads.into())?;
        upscaler.set_strength(self.strength)?;
        upscaler.set_precision(self.precision)?;
        upscaler.set_temporal(self.temporal)?;
        if let Some(denoise) = self.denoise {
            upscaler.set_denoise(Some(denoise))?;
        }
        if let Some(detail) = self.detail {
            upscaler.set_detail(Some(detail))?;
        }
        if let Some(scale) = self.scale {
            upscaler.set_scale(scale)?;
        }
        if let Some(steps) = self.steps {
            upscaler.set_steps(steps)?;
        }
        if let Some(seed) = self.seed {
            upscaler.set_seed(seed)?;
        }
        if let Some(noise) = self.noise {
            upscaler.set_noise(noise)?;
        }
        if let Some(tile) = self.tile {
            upscaler.set_tile(tile)?;
        }
        if let Some(pixels) = self.tile_overlap {
            upscaler.set_tile_overlap(pixels)?;
        }
        if let Some(fix) = self.color_fix {
            upscaler.set_color_fix(match fix {
                Fix::Wavelet => ColorFix::Wavelet,
                Fix::Adain => ColorFix::Adain,
                Fix::None => ColorFix::None,
            })?;
        }
        if self.noise_file.is_some() || self.save_noise.is_some() {
            upscaler.require(Setting::NoiseField)?;
            upscaler.set_noise_field(self.read_noise()?)?;
        }
        Ok(upscaler)
    }

    /// Returns the model `name` and all settings that change the output, by name.
    #[cfg(feature = "video")]
    pub fn made_of(&self, name: &str) -> Result<MadeOf> {
        fn given(value: &Option<impl std::fmt::Debug>) -> String {
            let value = value.as_ref();
            value.map_or("default".into(), |value| format!("{value:?}"))
        }
        let name = if self.is_auto() { name } else { &self.model };
        let noise = match &self.noise_file {
            None => "none".into(),
            Some(path) => {
                let bytes = fs::read(path).with_context(|| format!("'{}'", path.display()))?;
                format!(
                    "{} bytes, checksum {:08x}",
                    bytes.len(),
                    crc32fast::hash(&bytes)
                )
            }
        };
        let values = [
            (MODEL, name.to_string()),
            ("model checksum", format!("{:08x}", checksum(name)?)),
            ("device", self.device.to_string()),
            ("strength", self.strength.to_string()),
            ("denoise", given(&self.denoise)),
            ("detail", given(&self.detail)),
            ("temporal", format!("{:?}", self.temporal)),
            ("precision", format!("{:?}", self.precision)),
            ("steps", given(&self.steps)),
            ("seed", given(&self.seed)),
            ("noise", given(&self.noise)),
            ("tile", given(&self.tile)),
            ("tile-overlap", given(&self.tile_overlap)),
            ("color-fix", given(&self.color_fix)),
            ("noise-file", noise),
        ];
        Ok(values.map(|(name, value)| (name.into(), value)).into())
    }

    /// Returns the number of frames before a frame on which its result may depend noticeably.
    #[cfg(feature = "video")]
    pub fn history(&self, upscaler: &Upscaler) -> usize {
        let has = |setting| upscaler.capabilities().has(setting);
        let is_estimated = self.denoise.is_none() && has(Setting::Denoise);
        let sees_past = self.temporal != Temporal::Off && has(Setting::Temporal);
        if is_estimated || sees_past {
            HISTORY
        } else {
            0
        }
    }

    fn read_noise(&self) -> Result<Option<NoiseField>> {
        let Some(path) = &self.noise_file else {
            return Ok(None);
        };
        let bytes = fs::read(path).with_context(|| format!("'{}'", path.display()))?;
        let field = parse_noise(&bytes).with_context(|| format!("'{}'", path.display()))?;
        Ok(Some(field))
    }

    /// # Errors
    /// If the file for the noise exists and may not be replaced.
    pub fn check_noise_target(&self, overwrite: bool) -> Result<()> {
        match &self.save_noise {
            Some(path) if path.exists() && !overwrite => {
                bail!("'{}' exists; --overwrite replaces it", path.display())
            }
            _ => Ok(()),
        }
    }

    /// Writes the noise of frames like `info`.
    pub fn save_noise(&self, upscaler: &Upscaler, info: &FrameInfo) -> tadsr::Result<()> {
        let Some(path) = &self.save_noise else {
            return Ok(());
        };
        let wrong = |e: &str| Error::Setting(format!("'{}': {e}", path.display()));
        let field = upscaler.noise_field(info.width, info.height);
        let field = field.ok_or_else(|| wrong("the model does not start from noise"))?;
        let bytes: Vec<u8> = field
            .values()
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        let [c, h, w] = field.shape();
        let file = TensorView::new(Dtype::F32, vec![1, c, h, w], &bytes)
            .and_then(|view| safetensors::serialize([(NOISE, view)], None));
        write_atomically(path, &file.map_err(|e| wrong(&e.to_string()))?)
    }
}

fn parse_noise(bytes: &[u8]) -> Result<NoiseField> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|e| anyhow!("not a safetensors file or a truncated one ({e})"))?;
    let tensor = file.tensor(NOISE).map_err(|_| {
        anyhow!(
            "it has no tensor '{NOISE}', only {}",
            file.names().join(", ")
        )
    })?;
    let (Dtype::F32, &[1, c, h, w]) = (tensor.dtype(), tensor.shape()) else {
        bail!(
            "tensor '{NOISE}' is {:?} {:?}, not F32 [1, channels, height, width]",
            tensor.dtype(),
            tensor.shape()
        );
    };
    let values = tensor.data().chunks_exact(4);
    let values = values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(NoiseField::new(c, h, w, values.collect())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_of_another_kind_is_refused_with_what_it_is() {
        let bytes = [0; 24];
        let file = |name: &str, dtype, shape: Vec<usize>| {
            let view = TensorView::new(dtype, shape, &bytes).unwrap();
            safetensors::serialize([(name, view)], None).unwrap()
        };
        let field = parse_noise(&file("noise", Dtype::F32, vec![1, 3, 1, 2])).unwrap();
        assert_eq!(field.shape(), [3, 1, 2]);
        let refused = |file: &[u8]| format!("{:#}", parse_noise(file).unwrap_err());
        assert!(refused(b"nothing").contains("not a safetensors file"));
        assert!(refused(&file("eps", Dtype::F32, vec![6])).contains("only eps"));
        assert!(refused(&file("noise", Dtype::F32, vec![3, 1, 2])).contains("[3, 1, 2]"));
        assert!(refused(&file("noise", Dtype::F16, vec![1, 3, 2, 2])).contains("F16"));
    }

    #[test]
    fn tiles_and_fractions_are_checked() {
        assert_eq!(tile("auto"), Ok(Tile::Auto));
        assert_eq!(tile("whole"), Ok(Tile::Whole));
        assert_eq!(tile("128"), Ok(Tile::Side(128)));
        assert!(tile("0").is_err() && tile("").is_err() && tile("-1").is_err());
        assert!(fraction("0.5").is_ok() && fraction("1.01").is_err() && fraction("nan").is_err());
    }
}

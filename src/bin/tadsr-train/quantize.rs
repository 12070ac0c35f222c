//! `tadsr-train quantize`: calibrates a model for inference in integers.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Result, bail, ensure};
use candle_core::{Device, Tensor};
use tadsr::{
    Precision,
    engine::lite::cpu::{Patches, calibrate, residual_of},
    model::LiteModel,
    nn::lite::{Condition, latent::Grid},
    train::{
        checkpoint::write_atomically,
        data::pairs::{Batch, DegradedPhotos, PairSpec},
        degradation::DegradationRecipe,
        lite::train_scales,
        load_photos,
    },
};

use crate::{stop::Stop, training::Console};

/// Calibrate a model on photos for inference in int16 and int8.
///
/// Measures the ranges of values in the network on patches of the photos, degraded by the preset
/// `stills`, and writes them into a model file. The weights stay as they are. A network with memory
/// sees clips of a camera that moves over photos. Prints the PSNR in dB of the precisions f32,
/// bf16, int16 and int8 on held-out photos, one of 20, without memory.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  tadsr-train quantize --model runs/my-x2/model.safetensors --data photos --out my-x2.safetensors
  tadsr-train upscale clip.mp4 large.mp4 --model my-x2.safetensors --precision int8")]
pub struct Args {
    /// Name of a bundled model or path of a model file
    #[arg(long, value_name = "NAME_OR_PATH")]
    model: String,
    /// Folders or files with photos (JPEG, PNG)
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Model file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Name of the new model [default: that of the model]
    #[arg(long)]
    name: Option<String>,
    /// Batches of 16 patches for the calibration, 4 to 4096; a quarter as many for the measurement
    #[arg(long, default_value_t = 32, value_name = "N")]
    batches: u64,
    /// Seed; the same seed, data and options make the same model
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the weights in f32 instead of f16
    #[arg(long)]
    full: bool,
}

pub fn run(args: Args) -> Result<()> {
    ensure!(
        (4..=4096).contains(&args.batches),
        "--batches {}: 4 to 4096",
        args.batches
    );
    let mut models = LiteModel::find(&args.model)?;
    if models.len() > 1 {
        let names: Vec<_> = models.iter().map(|m| m.metadata.name.clone()).collect();
        bail!(
            "'{}' is a group: name one of {}",
            args.model,
            names.join(", ")
        );
    }
    let mut model = models.remove(0);
    if let Some(name) = args.name {
        model.metadata.name = name;
    }
    let spec = spec(&model);
    let console = Console::new(Stop::default(), true);
    let [photos, held_out] = load_photos(&args.data, spec.patch, &console)?;
    let batches = |photos, seed: u64, count: u64| -> Result<Vec<Batch>> {
        let source = DegradedPhotos {
            photos: Arc::new(photos),
            recipe: DegradationRecipe::stills(),
        };
        let batch = |i| {
            spec.batch(
                &source,
                &model.stats,
                seed.wrapping_mul(1 << 32).wrapping_add(i),
            )
        };
        Ok((0..count).map(batch).collect::<tadsr::Result<_>>()?)
    };
    let measured = batches(held_out, args.seed, args.batches / 4)?;
    let patches = batches(photos, args.seed.wrapping_add(1), args.batches)?;
    let patches = patches
        .iter()
        .map(|batch| as_patches(&model, batch, spec.grid()))
        .collect::<Result<Vec<_>>>()?
        .concat();
    model.calibration = Some(calibrate(&model, &patches));
    for precision in [
        Precision::F32,
        Precision::Bf16,
        Precision::Int16,
        Precision::Int8,
    ] {
        let decibels = decibels(&model, &spec, &measured, precision)?;
        println!("{:5} {decibels:.3} dB", precision.to_string());
    }
    write_atomically(&args.out, &model.to_bytes(!args.full)?)?;
    println!("{}: '{}'", model.metadata.name, args.out.display());
    Ok(())
}

/// Returns patches like those that the model was trained on.
fn spec(model: &LiteModel) -> PairSpec {
    let (student, [low, high]) = (&model.metadata.student, model.metadata.scales);
    PairSpec {
        latent: student.latent,
        r: student.r,
        // The measurement leaves out a border as wide as the network is deep.
        patch: (2 * model.layers.len() + 16).next_multiple_of(48) * student.r.next_multiple_of(2),
        batch: 16,
        scales: train_scales(low, high),
        native: 0.5,
        alike: student.conditioning.denoise,
        frames: if student.memory > 0 { CLIP } else { 1 },
    }
}

/// Frames of the clips that a network with memory is measured on.
const CLIP: usize = 3;

/// Returns the inputs of `model` for a batch at the dial positions of its degradation, and at both
/// ends of each dial.
fn as_patches(model: &LiteModel, batch: &Batch, grid: Grid) -> Result<Vec<Patches>> {
    let dials = model.metadata.student.conditioning;
    let at = batch.condition();
    let mut all = vec![at];
    for denoise in [0.0, 1.0].into_iter().filter(|_| dials.denoise) {
        all.push(Condition { denoise, ..at });
    }
    if dials.detail {
        let detailed = |at: &Condition| Condition { detail: 1.0, ..*at };
        all.extend(all.clone().iter().map(detailed));
    }
    let patches = |at| {
        let Some(motion) = &batch.motion else {
            return Ok(Patches {
                at,
                grid,
                inputs: batch.base.clone(),
            });
        };
        let clips = motion.tensors(&model.stats, &Device::Cpu)?;
        let shape = ((), grid.height, grid.width, grid.channels);
        let z = Tensor::new(batch.base.as_slice(), &Device::Cpu)?.reshape(shape)?;
        let inputs = model.student()?.clip_inputs(&z, &at, &clips)?;
        Ok(Patches {
            at,
            grid: Grid {
                channels: model.metadata.student.inputs(),
                ..grid
            },
            inputs: inputs.flatten_all()?.to_vec1()?,
        })
    };
    all.into_iter().map(patches).collect()
}

/// Returns the PSNR of luma in dB, without the border that depends on the padding.
fn decibels(
    model: &LiteModel,
    spec: &PairSpec,
    batches: &[Batch],
    precision: Precision,
) -> Result<f64> {
    let (grid, margin) = (spec.grid(), model.layers.len());
    let inside = Grid {
        width: grid.width - 2 * margin,
        height: grid.height - 2 * margin,
        ..grid
    };
    let luma = model.metadata.student.r.pow(2);
    let (mut squares, mut count) = (0.0, 0.0);
    for batch in batches {
        let model = model.folded(&batch.condition());
        let patches = batch
            .base
            .chunks_exact(grid.len())
            .zip(batch.residual.chunks_exact(grid.len()));
        for (base, truth) in patches {
            let found = residual_of(
                &model,
                batch.scale,
                base,
                Grid { margin, ..grid },
                precision,
            )?;
            for (y, row) in found.chunks_exact(inside.width * grid.channels).enumerate() {
                let first = ((y + margin) * grid.width + margin) * grid.channels;
                let cells = row
                    .chunks_exact(grid.channels)
                    .zip(truth[first..].chunks_exact(grid.channels));
                for (found, truth) in cells {
                    for c in 0..luma {
                        let error = f64::from((found[c] - truth[c]) * model.stats.residual_std[c]);
                        (squares, count) = (squares + error * error, count + 1.0);
                    }
                }
            }
        }
    }
    Ok(-10.0 * (squares / count).log10())
}

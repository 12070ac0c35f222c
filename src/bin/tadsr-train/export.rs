//! `tadsr-train export`: writes a model for other runtimes.

use std::{collections::HashMap, path::PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use clap::ValueEnum;
use tadsr::{
    Precision,
    engine::lite::cpu::residual_of,
    frame::{
        ChromaSite, Component, FrameInfo, PixelFormat,
        resample::{Kernel, Resampler},
    },
    model::{LiteModel, OnnxEnds},
    nn::lite::{
        Condition, LatentKind,
        latent::{Grid, chroma_slot, luma_slot, shuffle_add, unshuffle},
    },
    train::checkpoint::write_atomically,
};

/// Write a real-time model as an ONNX file for other runtimes.
///
/// The file holds the network for one scale and takes images of any size. With --ends picture it
/// takes the original image. Otherwise the caller enlarges it by bicubic interpolation, and the
/// network improves it.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  tadsr-train export --model tiny --onnx tiny-x2.onnx
  # From a picture of any size to the upscaled one:
  tadsr-train export --model tiny --onnx tiny-x2.onnx --ends picture
  # With an example of input and output, to test another runtime:
  tadsr-train export --model runs/my-x4/model.safetensors --scale 4 --onnx my-x4.onnx \\
      --example my-x4.safetensors")]
pub struct Args {
    /// Name of a bundled model or path of a model file
    #[arg(long, value_name = "NAME_OR_PATH")]
    model: String,
    /// ONNX file to write
    #[arg(long, value_name = "FILE")]
    onnx: PathBuf,
    /// Scale that the network is written for, 1 to 4
    #[arg(long, default_value_t = 2.0)]
    scale: f64,
    /// Degradation of the input, 0 (clean) to 1 (heavily compressed), for models with this dial
    #[arg(long, default_value_t = 0.0, value_parser = dial)]
    denoise: f64,
    /// Invented detail, 0 (faithful) to 1 (generative), for models with this dial
    #[arg(long, default_value_t = 0.0, value_parser = dial)]
    detail: f64,
    /// Input and output of the network
    #[arg(long, value_enum, default_value = "planes")]
    ends: Ends,
    /// Write an input and its output, too: tensors with the names of the ONNX file (safetensors)
    #[arg(long, value_name = "FILE")]
    example: Option<PathBuf>,
    /// Sides of the example of a picture
    #[arg(long, value_name = "WIDTHxHEIGHT", default_value = "45x31", value_parser = sides)]
    example_size: (usize, usize),
}

fn sides(s: &str) -> Result<(usize, usize), String> {
    let side = |text: &str| text.parse().ok().filter(|side| (1..=4096).contains(side));
    let sides = s
        .split_once('x')
        .and_then(|(w, h)| Some((side(w)?, side(h)?)));
    sides.ok_or_else(|| "two numbers from 1 to 4096, such as 45x31".into())
}

fn dial(s: &str) -> Result<f64, String> {
    match s.parse() {
        Ok(v) if (0.0..=1.0).contains(&v) => Ok(v),
        _ => Err("a number from 0 to 1".into()),
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Ends {
    /// Enlarged planes to improved planes: y (and u, v at half the size) to y_out (u_out, v_out);
    /// luma 0 to 1, chroma -0.5 to 0.5, sides in multiples of the grid cell r
    Planes,
    /// A picture of any size to the upscaled picture, with the bicubic interpolation inside: planes
    /// as above, but of the original size, and at a whole scale; chroma sited in the centre, its
    /// sides rounded up
    Picture,
    /// Whitened latent to whitened residual, the bare network
    Latent,
}

pub fn run(args: Args) -> Result<()> {
    let models = LiteModel::find(&args.model)?;
    let serves = |m: &&LiteModel| args.scale >= 1.0 && args.scale <= m.metadata.scales[1];
    let Some(model) = models.iter().find(serves) else {
        let max = models
            .iter()
            .map(|m| m.metadata.scales[1])
            .fold(1.0, f64::max);
        bail!(
            "model '{}' serves scales 1 to {max}, not {}",
            args.model,
            args.scale
        );
    };
    let dials = model.metadata.student.conditioning;
    for (name, has, value) in [
        ("denoise", dials.denoise, args.denoise),
        ("detail", dials.detail, args.detail),
    ] {
        ensure!(
            has || value == 0.0,
            "--{name}: model '{}' has no such dial",
            model.metadata.name
        );
    }
    let folded = model.folded(&Condition {
        scale: args.scale,
        denoise: args.denoise,
        detail: args.detail,
    });
    let model = &folded.without_memory();
    ensure!(
        !matches!(args.ends, Ends::Picture) || args.scale.fract() == 0.0,
        "--scale {}: a network from picture to picture has a whole scale",
        args.scale
    );
    let ends = match args.ends {
        Ends::Planes => OnnxEnds::Planes,
        Ends::Picture => OnnxEnds::Picture,
        Ends::Latent => OnnxEnds::Latent,
    };
    let bytes = model.to_onnx(args.scale, ends);
    write_atomically(&args.onnx, &bytes)?;
    if let Some(path) = &args.example {
        let tensors = match args.ends {
            Ends::Planes => planes_example(model, args.scale)?,
            Ends::Picture => picture_example(model, args.scale, args.example_size)?,
            Ends::Latent => latent_example(model, args.scale)?,
        };
        candle_core::safetensors::save(&tensors, path)
            .with_context(|| format!("cannot write '{}'", path.display()))?;
    }
    println!(
        "{} at scale {}: '{}'",
        model.metadata.name,
        args.scale,
        args.onnx.display()
    );
    Ok(())
}

/// Grid cells of the examples in x and y; no multiples of a tile.
const CELLS: (usize, usize) = (45, 31);

type Tensors = HashMap<String, Tensor>;

/// Returns a latent and its residual, without the border that depends on the padding.
fn latent_example(model: &LiteModel, scale: f64) -> Result<Tensors> {
    let student = &model.metadata.student;
    let grid = Grid {
        width: CELLS.0,
        height: CELLS.1,
        channels: student.latent.channels(student.r),
        margin: model.layers.len(),
    };
    let latent: Vec<f32> = (0..grid.len()).map(wave).collect();
    let residual = residual_of(model, scale, &latent, grid, Precision::F32)?;
    let tensor = |values: Vec<f32>, grid: Grid| -> Result<Tensor> {
        let nhwc = Tensor::from_vec(
            values,
            (1, grid.height, grid.width, grid.channels),
            &Device::Cpu,
        )?;
        Ok(nhwc.permute((0, 3, 1, 2))?.contiguous()?)
    };
    Ok(Tensors::from([
        ("latent".into(), tensor(latent, grid)?),
        ("residual".into(), tensor(residual, grid.with_margin(0))?),
    ]))
}

/// Returns planes and the model's result for them.
fn planes_example(model: &LiteModel, scale: f64) -> Result<Tensors> {
    let (student, stats) = (&model.metadata.student, &model.stats);
    let r = student.r;
    let mut planes = vec![("y", luma_slot(r))];
    if student.latent == LatentKind::Yuv {
        planes.extend([("u", chroma_slot(r, 0)), ("v", chroma_slot(r, 1))]);
    }
    let cells = Grid::new(student.latent, r, CELLS.0 * r, CELLS.1 * r);
    let grid = cells.with_margin(model.layers.len());
    let mut latent = vec![0.0; grid.len()];
    let mut bases = Vec::new();
    for &(_, slot) in &planes {
        let width = CELLS.0 * slot.r;
        let base: Vec<f32> = (0..width * CELLS.1 * slot.r)
            .map(|i| 0.5 + 0.4 * wave(i))
            .collect();
        unshuffle(
            &base,
            width,
            slot,
            grid,
            &stats.input_mean,
            &stats.input_std,
            &mut latent,
        );
        bases.push(base);
    }
    let residual = residual_of(model, scale, &latent, grid, Precision::F32)?;
    let mut tensors = Tensors::new();
    for (&(name, slot), base) in planes.iter().zip(bases) {
        let (width, height) = (CELLS.0 * slot.r, CELLS.1 * slot.r);
        let mut sum = base.clone();
        shuffle_add(&residual, slot, cells, &stats.residual_std, &mut sum, width);
        let tensor = |values| Tensor::from_vec(values, (1, 1, height, width), &Device::Cpu);
        tensors.insert(name.into(), tensor(base)?);
        tensors.insert(format!("{name}_out"), tensor(sum)?);
    }
    Ok(tensors)
}

/// Returns the planes of a picture and the upscaled planes.
fn picture_example(model: &LiteModel, scale: f64, (w, h): (usize, usize)) -> Result<Tensors> {
    let (student, stats) = (&model.metadata.student, &model.stats);
    let r = student.r;
    let mut info = FrameInfo::new(PixelFormat::I420, w, h);
    info.chroma_site = ChromaSite {
        horizontal_cosited: false,
        vertical_cosited: false,
    };
    let (width, height) = (w * scale as usize, h * scale as usize);
    let mut planes = vec![("y", luma_slot(r), Component::Y)];
    if student.latent == LatentKind::Yuv {
        let (u, v) = (chroma_slot(r, 0), chroma_slot(r, 1));
        planes.extend([("u", u, Component::U), ("v", v, Component::V)]);
    }
    let count = (width.div_ceil(r), height.div_ceil(r));
    let cells = Grid::new(student.latent, r, count.0 * r, count.1 * r);
    let grid = cells.with_margin(model.layers.len());
    let mut latent = vec![0.0; grid.len()];
    let mut tensors = Tensors::new();
    let mut bases = Vec::new();
    let tensor = |values, (w, h)| Tensor::from_vec(values, (1, 1, h, w), &Device::Cpu);
    for &(name, slot, component) in &planes {
        let small = info.format.component_size(component, w, h);
        let large = info.format.component_size(component, width, height);
        let samples: Vec<f32> = (0..small.0 * small.1)
            .map(|i| 0.5 + 0.4 * wave(i))
            .collect();
        let resampler =
            Resampler::for_component(&info, component, width, height, Kernel::Bicubic, false)?;
        let mut base = vec![0.0; large.0 * large.1];
        resampler.run(&samples, &mut base);
        tensors.insert(name.into(), tensor(samples, small)?);
        // The last cells are filled by repetition.
        let whole = (count.0 * slot.r, count.1 * slot.r);
        let at =
            |i: usize| (i / whole.0).min(large.1 - 1) * large.0 + (i % whole.0).min(large.0 - 1);
        let base: Vec<f32> = (0..whole.0 * whole.1).map(|i| base[at(i)]).collect();
        let (mean, std) = (&stats.input_mean, &stats.input_std);
        unshuffle(&base, whole.0, slot, grid, mean, std, &mut latent);
        bases.push((base, whole.0, large));
    }
    let residual = residual_of(model, scale, &latent, grid, Precision::F32)?;
    for (&(name, slot, _), (mut sum, row, large)) in planes.iter().zip(bases) {
        shuffle_add(&residual, slot, cells, &stats.residual_std, &mut sum, row);
        let rows = sum.chunks(row).take(large.1);
        let shown: Vec<f32> = rows.flat_map(|row| &row[..large.0]).copied().collect();
        tensors.insert(format!("{name}_out"), tensor(shown, large)?);
    }
    Ok(tensors)
}

/// Sample `i` of an example, from -1 to 1.
fn wave(i: usize) -> f32 {
    let i = i as f32;
    0.6 * (i * 0.37).sin() + 0.4 * (i * i * 1e-3).cos()
}

//! Check of a device before its first frame.

use std::sync::Arc;

use super::{
    Context, Runner,
    program::{COLUMNS, ROWS},
};
use crate::{
    Error, Precision, Result,
    engine::lite::cpu,
    frame::{Component, Frame, FrameInfo, PixelFormat},
    model::LiteModel,
};

/// Sides of a small frame: odd, and in each direction several blocks of every kernel for usual
/// models.
const SMALL: (usize, usize) = (71, 19);

/// Maximum change of a sample by f16, the order of sums and rounding, in steps of 1/255: two codes
/// of 8-bit video, of limited range too.
const TOLERANCE: f32 = 2.5;

/// Formats that use other conversions between a frame and the latent than I420.
const FORMATS: [PixelFormat; 3] = [PixelFormat::Rgb, PixelFormat::Nv12, PixelFormat::P010Le];

/// Blocks that a multiprocessor runs at the same time, at most.
const RESIDENT: usize = 8;

/// Implements [`Context::check`].
pub(super) fn check(context: &Arc<Context>, model: &LiteModel) -> Result<()> {
    for format in FORMATS {
        check_frame(context, model, format, SMALL, 1)?;
    }
    let large = more_than_a_wave(context, model);
    check_frame(context, model, PixelFormat::I420, large, 2)
}

/// Returns the sides of a frame whose convolutions have more blocks than run at the same time. A
/// missing dependency between blocks shows only there.
fn more_than_a_wave(context: &Arc<Context>, model: &LiteModel) -> (usize, usize) {
    let blocks = RESIDENT * context.driver().info().multiprocessors + 1;
    // Blocks are four times as wide as high.
    let columns = blocks.div_ceil(4).isqrt().max(1);
    let rows = blocks.div_ceil(columns);
    let pixels = |cells: usize| {
        let large = cells * model.metadata.student.r;
        (large as f64 / model.metadata.scales[1]).ceil() as usize | 1
    };
    (pixels(columns * COLUMNS), pixels(rows * ROWS))
}

/// Upscales a frame of `format` on the device, `runs` times, and on the CPU.
fn check_frame(
    context: &Arc<Context>,
    model: &LiteModel,
    format: PixelFormat,
    (width, height): (usize, usize),
    runs: usize,
) -> Result<()> {
    let src = pattern(FrameInfo::new(format, width, height))?;
    let scale = model.metadata.scales[1];
    let side = |len: usize| (len as f64 * scale) as usize;
    let dst = src.info().with_size(side(width), side(height));

    let mut runner = Runner::new(context, model, *src.info(), dst, 1)?;
    let mut results = vec![Frame::new(dst)?; runs];
    for out in &mut results {
        runner.run(&src.as_ref(), &mut out.as_mut(), 1.0)?;
    }
    let mut want = Frame::new(dst)?;
    cpu::Runner::new(model, *src.info(), dst, Precision::F32)?.run(
        &src.as_ref(),
        &mut want.as_mut(),
        1.0,
    )?;
    let wrong = |reason: &str| {
        Err(Error::Device(format!(
            "{} computes model '{}' wrongly: {reason} ({} frame of {width}x{height})",
            context.driver().info().name,
            model.metadata.name,
            format.name()
        )))
    };
    let same = |a: &Frame, b: &Frame| (0..format.planes()).all(|i| a.plane(i) == b.plane(i));
    if !results.iter().all(|result| same(result, &results[0])) {
        return wrong("the same frame has two results");
    }
    let error = max_difference(&results[0], &want)?;
    if error <= TOLERANCE {
        Ok(())
    } else {
        wrong(&format!(
            "a sample of the test frame differs by {error:.1} of 255 from the CPU"
        ))
    }
}

/// Returns the maximum difference of the samples of two frames in steps of 1/255.
fn max_difference(a: &Frame, b: &Frame) -> Result<f32> {
    let info = a.info();
    let mut max = 0f32;
    for component in info.format.components().iter().map(|c| c.component) {
        let (width, height) = info
            .format
            .component_size(component, info.width, info.height);
        let mut samples = [vec![0.0; width * height], vec![0.0; width * height]];
        for (frame, samples) in [a, b].into_iter().zip(&mut samples) {
            frame.as_ref().read(component, samples)?;
        }
        let differences = samples[0]
            .iter()
            .zip(&samples[1])
            .map(|(a, b)| (a - b).abs());
        max = differences.fold(max, f32::max);
    }
    Ok(255.0 * max)
}

/// Returns soft noise with edges. Samples near black or white would hide errors by clamping.
fn pattern(info: FrameInfo) -> Result<Frame> {
    let mut frame = Frame::new(info)?;
    let mut state = 1u32;
    for component in info.format.components().iter().map(|c| c.component) {
        let (width, height) = info
            .format
            .component_size(component, info.width, info.height);
        let middle = match component {
            Component::U | Component::V => 0.0,
            _ => 0.5,
        };
        let samples: Vec<f32> = (0..width * height)
            .map(|i| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                let noise = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
                let edge = if (i % width / 7 + i / width / 5) % 2 == 0 {
                    0.1
                } else {
                    -0.1
                };
                middle + edge + 0.1 * noise
            })
            .collect();
        frame.as_mut().write(component, &samples)?;
    }
    Ok(frame)
}

//! Check of a device before its first frame.

use std::sync::Arc;

use super::{Context, Runner};
use crate::{
    Error, Precision, Result,
    engine::lite::cpu,
    frame::{Component, Frame, FrameInfo, PixelFormat},
    model::LiteModel,
};

/// Sides of the frame: odd, and in each direction several blocks of every kernel for usual models.
const SIZE: (usize, usize) = (71, 19);

/// Maximum change of a sample by f16, the order of sums and rounding, in codes of 8-bit video.
const TOLERANCE: u8 = 2;

/// Formats that use different conversions between a frame and the latent.
const FORMATS: [PixelFormat; 2] = [PixelFormat::I420, PixelFormat::Rgb];

/// Implements [`Context::check`].
pub(super) fn check(context: &Arc<Context>, model: &LiteModel) -> Result<()> {
    FORMATS
        .into_iter()
        .try_for_each(|format| check_format(context, model, format))
}

fn check_format(context: &Arc<Context>, model: &LiteModel, format: PixelFormat) -> Result<()> {
    let src = pattern(FrameInfo::new(format, SIZE.0, SIZE.1))?;
    let scale = model.metadata.scales[1];
    let side = |len: usize| (len as f64 * scale) as usize;
    let dst = src.info().with_size(side(SIZE.0), side(SIZE.1));

    let mut got = Frame::new(dst)?;
    Runner::new(context, model, *src.info(), dst, 1)?.run(&src.as_ref(), &mut got.as_mut(), 1.0)?;
    let mut want = Frame::new(dst)?;
    cpu::Runner::new(model, *src.info(), dst, Precision::F32)?.run(
        &src.as_ref(),
        &mut want.as_mut(),
        1.0,
    )?;
    let max_error = (0..dst.format.planes())
        .flat_map(|plane| got.plane(plane).iter().zip(want.plane(plane)))
        .map(|(got, want)| got.abs_diff(*want))
        .max();
    match max_error {
        Some(error) if error > TOLERANCE => Err(Error::Device(format!(
            "{} computes model '{}' wrongly: a sample of the test frame differs by {error} of 255 \
             from the CPU",
            context.driver().info().name,
            model.metadata.name
        ))),
        _ => Ok(()),
    }
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

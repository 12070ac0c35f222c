//! What a device has to get right before it is trusted.

use std::sync::Arc;

use super::{Context, Runner};
use crate::{
    Error, Precision, Result,
    engine::lite::cpu,
    frame::{Component, Frame, FrameInfo, PixelFormat},
    model::LiteModel,
};

/// Sides of the frame: odd, and several blocks of every kernel in each direction with any of the usual cells.
const SIZE: (usize, usize) = (71, 19);

/// Codes of 8-bit video by which f16 and the order of sums may move a sample, rounding included.
const TOLERANCE: u8 = 2;

/// Formats that take the kernels' different ways between a frame and the latent.
const FORMATS: [PixelFormat; 2] = [PixelFormat::I420, PixelFormat::Rgb];

/// See [`Context::check`].
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
    let far = (0..dst.format.planes())
        .flat_map(|plane| got.plane(plane).iter().zip(want.plane(plane)))
        .map(|(got, want)| got.abs_diff(*want))
        .max();
    match far {
        Some(far) if far > TOLERANCE => Err(Error::Device(format!(
            "{} computes model '{}' wrongly: a sample of the test frame is {far} of 255 from the CPU's",
            context.driver().info().name,
            model.metadata.name
        ))),
        _ => Ok(()),
    }
}

/// Soft noise with edges, away from black and white, where a wrong sample would be clamped to the right one.
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

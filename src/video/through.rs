//! Processing of frames by part of a pipeline, in memory.

use std::time::{Duration, Instant};

use gst::{ClockTime, prelude::*};
use gst_app::{AppSink, AppSrc};

use super::{
    StreamInfo,
    bus::{Bus, Running, make},
};
use crate::{Error, Result, frame::Frame};

/// Interval of checks for errors while no frame arrives.
const POLL: ClockTime = ClockTime::from_mseconds(20);
/// Time without a frame after which processing fails.
const STALLED: Duration = Duration::from_secs(120);

/// Passes `frames` of `stream` through `elements`, written as in a launch line such as `x264enc !
/// avdec_h264`. Returns the resulting frames, with the description of the input.
///
/// All frames are in memory at once, so this is for short clips.
///
/// # Errors
/// [`Error::Setting`] if the elements are missing, fail, or return frames of another kind or
/// number.
pub fn through(stream: &StreamInfo, frames: &[Frame], elements: &str) -> Result<Vec<Frame>> {
    super::init()?;
    let failed = |reason: String| Error::Setting(format!("'{elements}': {reason}"));
    let (pipeline, source, sink) = build(stream, elements).map_err(failed)?;
    let running = Running(pipeline);
    let mut bus = Bus::of(&running.0)?;
    // Failures are reported on the bus.
    let _ = running.0.set_state(gst::State::Playing);
    let step = stream.frame_duration().unwrap_or(Duration::from_millis(40));
    for (frame, i) in frames.iter().zip(0u32..) {
        let mut buffer = stream.write(frame).map_err(failed)?;
        if let Some(buffer) = buffer.get_mut() {
            buffer.set_pts(ClockTime::try_from(step * i).ok());
            buffer.set_duration(ClockTime::try_from(step).ok());
        }
        // If the buffer is refused, the reason is on the bus.
        let _ = source.push_buffer(buffer);
    }
    let _ = source.end_of_stream();
    let mut made = Vec::with_capacity(frames.len());
    let mut since = Instant::now();
    while !sink.is_eos() {
        if let Some(sample) = sink.try_pull_sample(POLL) {
            let buffer = sample.buffer().ok_or_else(|| failed("no frame".into()))?;
            made.push(stream.read(buffer).map_err(failed)?);
            since = Instant::now();
        } else if let Some(failure) = bus.failure(ClockTime::ZERO) {
            return Err(failed(failure.reason));
        } else if since.elapsed() > STALLED {
            return Err(failed(format!("no frame for {} s", STALLED.as_secs())));
        }
    }
    if made.len() != frames.len() {
        return Err(failed(format!(
            "{} frames went in, {} came out",
            frames.len(),
            made.len()
        )));
    }
    Ok(made)
}

/// Builds appsrc ! videoconvert ! elements ! videoconvert ! appsink.
fn build(stream: &StreamInfo, elements: &str) -> Result<(gst::Pipeline, AppSrc, AppSink), String> {
    let source = AppSrc::builder()
        .caps(stream.caps())
        .format(gst::Format::Time)
        .max_bytes(0)
        .build();
    let middle = gst::parse::bin_from_description(elements, true).map_err(|e| e.to_string())?;
    // The caps do not state colours. A codec that loses them must not cause a conversion.
    let info = stream.frame();
    let caps = gst::Caps::builder("video/x-raw")
        .field("format", info.format.name())
        .field("width", info.width as i32)
        .field("height", info.height as i32)
        .build();
    let sink = AppSink::builder().caps(&caps).sync(false).build();
    let pipeline = gst::Pipeline::new();
    let (before, after) = (make("videoconvert")?, make("videoconvert")?);
    let chain = [
        source.upcast_ref(),
        &before,
        middle.upcast_ref(),
        &after,
        sink.upcast_ref(),
    ];
    pipeline.add_many(chain).map_err(|e| e.to_string())?;
    gst::Element::link_many(chain).map_err(|e| e.to_string())?;
    Ok((pipeline, source, sink))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{FrameInfo, PixelFormat};

    fn clip(info: FrameInfo, len: usize) -> Vec<Frame> {
        let frame = |t: usize| {
            let mut frame = Frame::new(info).unwrap();
            for plane in 0..info.format.planes() {
                let bytes = frame.plane_mut(plane).iter_mut().enumerate();
                bytes.for_each(|(i, b)| *b = (100 + (i * 3 + t * 20 + plane * 9) % 50) as u8);
            }
            frame
        };
        (0..len).map(frame).collect()
    }

    #[test]
    fn frames_that_nothing_changes_come_out_as_they_went_in() {
        let stream = StreamInfo::new(
            FrameInfo::new(PixelFormat::I420, 33, 18),
            Some((30000, 1001)),
        )
        .unwrap();
        let frames = clip(*stream.frame(), 5);
        let made = through(&stream, &frames, "identity ! queue").unwrap();
        for (made, frame) in made.iter().zip(&frames) {
            assert_eq!(made.info(), frame.info());
            (0..3).for_each(|p| assert_eq!(made.plane(p), frame.plane(p)));
        }
    }

    #[test]
    fn failures_are_errors_that_name_the_elements() {
        let info = FrameInfo::new(PixelFormat::I420, 32, 16);
        let stream = StreamInfo::new(info, None).unwrap();
        let frames = clip(info, 5);
        for (elements, reason) in [
            ("nosuchelement", "nosuchelement"),
            ("identity error-after=2", "identity"),
            (
                "identity drop-buffer-flags=0 eos-after=3",
                "5 frames went in",
            ),
        ] {
            let text = through(&stream, &frames, elements).unwrap_err().to_string();
            assert!(text.contains(reason), "{elements}: {text}");
        }
    }
}

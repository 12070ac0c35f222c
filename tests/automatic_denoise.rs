//! The automatic position of the dial `denoise`.

#![cfg(feature = "train")]

use tadsr::{
    Device, Upscaler,
    frame::{Frame, FrameInfo, PixelFormat},
};

/// Returns a scene of waves, edges and noise like that of a sensor, after JPEG compression of
/// `quality` if it is below 100.
fn photo(width: usize, height: usize, quality: u8) -> Frame {
    let mut state = 7u32;
    let mut rgb = Vec::new();
    for i in 0..width * height {
        let (x, y) = ((i % width) as f32, (i / width) as f32);
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        let noise = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
        let wave = (x / 9.0 + (y / 23.0).sin()).sin() * (y / 17.0).cos();
        let edge = f32::from(((x - y / 3.0) as i32 / 40) % 2 == 0);
        let v = (120.0 + 60.0 * wave + 40.0 * edge + 10.0 * noise) as u8;
        rgb.extend([v, v.saturating_add(9), v.saturating_sub(7)]);
    }
    if quality < 100 {
        let mut jpeg = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, quality);
        let picture = image::RgbImage::from_raw(width as u32, height as u32, rgb).unwrap();
        picture.write_with_encoder(encoder).unwrap();
        rgb = image::load_from_memory(&jpeg).unwrap().to_rgb8().into_raw();
    }
    Frame::from_rgb8(width, height, &rgb).unwrap()
}

fn bytes(frame: &Frame) -> Vec<Vec<u8>> {
    (0..frame.info().format.planes())
        .map(|p| frame.plane(p).to_vec())
        .collect()
}

#[test]
fn an_automatic_denoise_is_higher_for_degraded_input_and_the_same_as_that_value() {
    let mut upscaler = Upscaler::load("tiny", Device::Cpu).unwrap();
    let mut positions = Vec::new();
    for quality in [100, 30] {
        let photo = photo(240, 200, quality);
        upscaler.reset();
        upscaler.set_denoise(None).unwrap();
        let automatic = upscaler.upscale(&photo).unwrap();
        let position = upscaler.active_denoise().unwrap();
        upscaler.set_denoise(Some(position)).unwrap();
        let set = upscaler.upscale(&photo).unwrap();
        assert_eq!(bytes(&automatic), bytes(&set), "quality {quality}");
        positions.push(position);
    }
    assert!(positions[1] > positions[0] + 0.2, "{positions:?}");
}

#[test]
fn an_automatic_denoise_changes_slowly_until_it_is_reset() {
    let mut upscaler = Upscaler::load("tiny", Device::Cpu).unwrap();
    let mut position_after = |photo: &Frame| {
        upscaler.upscale(photo).unwrap();
        upscaler.active_denoise().unwrap()
    };
    let (clean, degraded) = (photo(240, 200, 100), photo(240, 200, 30));
    let first = position_after(&clean);
    let second = position_after(&degraded);
    assert!((second - first).abs() < 0.1, "{first} {second}");
    let later = (0..40).map(|_| position_after(&degraded)).last().unwrap();
    assert!(later > second + 0.1, "{second} {later}");
    upscaler.reset();
    upscaler.upscale(&clean).unwrap();
    assert_eq!(upscaler.active_denoise(), Some(first));
}

#[test]
fn an_automatic_denoise_needs_frames_that_show_something() {
    let mut upscaler = Upscaler::load("tiny", Device::Cpu).unwrap();
    let flat = Frame::new(FrameInfo::new(PixelFormat::I420, 320, 240)).unwrap();
    let small = photo(32, 24, 30);
    for frame in [&flat, &small] {
        upscaler.upscale(frame).unwrap();
        assert_eq!(upscaler.active_denoise(), Some(0.4));
    }
    // A black beginning does not decide.
    upscaler.upscale(&photo(240, 200, 30)).unwrap();
    let position = upscaler.active_denoise().unwrap();
    upscaler.reset();
    upscaler.upscale(&photo(240, 200, 30)).unwrap();
    assert_eq!(upscaler.active_denoise(), Some(position));
}

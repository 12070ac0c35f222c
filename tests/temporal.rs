//! The temporal filter and the memory of a network: their benefit, their limits, and what makes
//! them forget.

use tadsr::{
    Device, Error, Upscaler,
    engine::{Setting, Temporal},
    frame::{Component, Frame, FrameInfo, PixelFormat},
};

const SIZE: (usize, usize) = (96, 64);

/// Returns pseudo-random values of at most `size` codes.
fn noise(size: f32, seed: u32) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
    })
}

/// Returns luma of waves and edges that are `shift` pixels to the right, with noise of `size`
/// codes.
fn luma(shift: usize, size: f32, seed: u32) -> Vec<f32> {
    let pixel = |(i, noise): (usize, f32)| {
        let (x, y) = ((i % SIZE.0 + SIZE.0 - shift) as f32, (i / SIZE.0) as f32);
        let wave = 40.0 * (0.3 * x + 0.11 * y).sin() + 20.0 * (0.17 * y - 0.1 * x).cos();
        let edge = if (x as usize / 24).is_multiple_of(2) {
            30.0
        } else {
            -30.0
        };
        (128.0 + wave + edge + noise) / 255.0
    };
    let pixels = (0..SIZE.0 * SIZE.1).zip(noise(size, seed));
    pixels.map(pixel).collect()
}

fn frame(luma: &[f32]) -> Frame {
    let mut frame = Frame::new(FrameInfo::new(PixelFormat::I420, SIZE.0, SIZE.1)).unwrap();
    frame.as_mut().write(Component::Y, luma).unwrap();
    frame
}

/// Returns a still picture with the noise `seed` of 1.2 codes.
fn still(seed: u32) -> Frame {
    frame(&luma(0, 1.2, seed))
}

fn upscaler(model: &str, temporal: Temporal) -> Upscaler {
    let mut upscaler = Upscaler::load(model, Device::Cpu).unwrap();
    upscaler.set_denoise(Some(0.6)).unwrap();
    upscaler.set_temporal(temporal).unwrap();
    upscaler
}

fn filtering() -> Upscaler {
    upscaler("tiny", Temporal::Filter)
}

/// Returns the planes of the result.
fn planes(upscaler: &mut Upscaler, frame: &Frame) -> Vec<Vec<u8>> {
    let large = upscaler.upscale(frame).unwrap();
    let planes = 0..large.info().format.planes();
    planes.map(|p| large.plane(p).to_vec()).collect()
}

/// Returns the mean difference of luma from frame to frame of a still picture with noise.
fn flicker(upscaler: &mut Upscaler) -> f64 {
    let results: Vec<_> = (0..12)
        .map(|t| planes(upscaler, &still(t)).remove(0))
        .collect();
    // The filter settles within a few frames.
    let pairs = results[4..].windows(2).map(|w| {
        let differences = w[0]
            .iter()
            .zip(&w[1])
            .map(|(a, b)| f64::from(a.abs_diff(*b)));
        differences.sum::<f64>() / w[0].len() as f64
    });
    pairs.sum::<f64>() / 7.0
}

#[test]
fn a_still_picture_with_noise_flickers_less() {
    for (model, scale) in [("tiny", 2.0), ("tiny", 1.5), ("tiny", 3.5), ("small", 2.0)] {
        let measure = |temporal| {
            let mut upscaler = upscaler(model, temporal);
            upscaler.set_scale(scale).unwrap();
            flicker(&mut upscaler)
        };
        let (off, filter) = (measure(Temporal::Off), measure(Temporal::Filter));
        assert!(
            filter < 0.75 * off,
            "{model} x{scale}: {filter} against {off}"
        );
    }
}

#[test]
fn a_picture_without_change_keeps_its_result() {
    let mut upscaler = filtering();
    let first = planes(&mut upscaler, &still(0));
    for _ in 0..3 {
        assert_eq!(planes(&mut upscaler, &still(0)), first);
    }
}

#[test]
fn a_frame_after_a_reset_is_a_first_frame() {
    let mut upscaler = filtering();
    let first = planes(&mut upscaler, &still(1));
    planes(&mut upscaler, &still(0));
    let after = planes(&mut upscaler, &still(1));
    assert_ne!(after, first, "the filter has no effect");
    upscaler.reset();
    assert_eq!(planes(&mut upscaler, &still(1)), first);
}

#[test]
fn the_first_frame_of_another_scene_is_a_first_frame() {
    // Half of the picture stands still, so that only the cut keeps the filter off it.
    let mut scene = luma(0, 1.2, 1);
    let other = luma(48, 1.2, 2);
    let half = scene.len() / 2;
    scene[half..].copy_from_slice(&other[half..].iter().map(|v| 1.0 - v).collect::<Vec<_>>());
    let (scene, mut upscaler) = (frame(&scene), filtering());
    planes(&mut upscaler, &still(0));
    let after_cut = planes(&mut upscaler, &scene);
    assert_eq!(after_cut, planes(&mut filtering(), &scene));
}

#[test]
fn what_moves_is_the_same_as_without_the_filter() {
    // The left part moves and has contrast everywhere, the right part stands still.
    let moving = |shift: usize, seed: u32| {
        let still = luma(0, 1.2, seed);
        let checks = |i: usize| {
            let (x, y) = (i % SIZE.0 + 2 * SIZE.0 - shift, i / SIZE.0);
            if (x / 2 + y / 2).is_multiple_of(2) {
                0.45
            } else {
                0.55
            }
        };
        let pixel = |(i, still): (usize, &f32)| if i % SIZE.0 < 32 { checks(i) } else { *still };
        frame(&still.iter().enumerate().map(pixel).collect::<Vec<_>>())
    };
    let (mut filter, mut off) = (filtering(), upscaler("tiny", Temporal::Off));
    let mut differences = [0, 0];
    for t in 0..6 {
        let frame = moving(2 * t, t as u32);
        let (a, b) = (planes(&mut filter, &frame), planes(&mut off, &frame));
        assert_eq!(a[1..], b[1..], "chroma");
        for (i, (a, b)) in a[0].iter().zip(&b[0]).enumerate() {
            let part = usize::from(i % (2 * SIZE.0) >= 64);
            differences[part] += usize::from(a.abs_diff(*b));
        }
    }
    assert!(differences[0] == 0 && differences[1] > 0, "{differences:?}");
}

#[test]
fn a_slow_fade_lags_by_less_than_a_code() {
    let (mut filter, mut off) = (filtering(), upscaler("tiny", Temporal::Off));
    for t in 0..20 {
        let faded: Vec<f32> = luma(0, 0.0, 0)
            .iter()
            .map(|v| v - t as f32 * 0.5 / 255.0)
            .collect();
        let frame = frame(&faded);
        let (a, b) = (planes(&mut filter, &frame), planes(&mut off, &frame));
        let sum: f64 = a[0]
            .iter()
            .zip(&b[0])
            .map(|(a, b)| f64::from(*a) - f64::from(*b))
            .sum();
        let mean = sum / a[0].len() as f64;
        assert!(mean.abs() < 1.0, "frame {t}: {mean}");
    }
}

#[test]
fn the_filter_is_off_for_clean_input() {
    let mut upscaler = filtering();
    upscaler.set_denoise(Some(0.0)).unwrap();
    let first = planes(&mut upscaler, &still(1));
    planes(&mut upscaler, &still(0));
    assert_eq!(planes(&mut upscaler, &still(1)), first);
}

#[test]
fn off_upscales_every_frame_on_its_own() {
    let mut upscaler = upscaler("tiny", Temporal::Off);
    let first = planes(&mut upscaler, &still(1));
    planes(&mut upscaler, &still(0));
    assert_eq!(planes(&mut upscaler, &still(1)), first);
}

#[test]
fn a_stream_is_the_same_on_any_number_of_threads() {
    for (scale, format) in [(2.0, PixelFormat::I420), (1.7, PixelFormat::Rgb)] {
        let stream = |threads: usize| -> Vec<Vec<Vec<u8>>> {
            let mut upscaler = filtering();
            upscaler.set_threads(threads).unwrap();
            upscaler.set_scale(scale).unwrap();
            let frames = (0..4).map(|t| {
                let rgb = still(t).to_rgb8().unwrap();
                let info = FrameInfo::new(format, SIZE.0, SIZE.1);
                Frame::from_rgb8_as(info, &rgb).unwrap()
            });
            frames.map(|frame| planes(&mut upscaler, &frame)).collect()
        };
        let one = stream(1);
        assert_eq!(one, stream(2), "{format:?}");
        assert_eq!(one, stream(5), "{format:?}");
    }
}

#[test]
fn a_change_of_settings_or_size_forgets_the_previous_frame() {
    type Change = fn(&mut Upscaler);
    let changes: [(&str, Change); 4] = [
        ("strength", |u| u.set_strength(0.8).unwrap()),
        ("denoise", |u| u.set_denoise(Some(0.5)).unwrap()),
        ("scale", |u| u.set_scale(1.5).unwrap()),
        ("model of the group", |u| u.set_scale(3.0).unwrap()),
    ];
    for (name, change) in changes {
        let mut upscaler = filtering();
        planes(&mut upscaler, &still(0));
        change(&mut upscaler);
        let mut fresh = filtering();
        change(&mut fresh);
        let (got, want) = (
            planes(&mut upscaler, &still(1)),
            planes(&mut fresh, &still(1)),
        );
        assert_eq!(got, want, "{name}");
    }
}

#[test]
fn a_setting_that_stays_the_same_forgets_nothing() {
    let (mut a, mut b) = (filtering(), filtering());
    for upscaler in [&mut a, &mut b] {
        planes(upscaler, &still(0));
    }
    a.set_denoise(Some(0.6)).unwrap();
    a.set_strength(1.0).unwrap();
    a.set_temporal(Temporal::Filter).unwrap();
    assert_eq!(planes(&mut a, &still(1)), planes(&mut b, &still(1)));
}

#[test]
fn names_are_read_as_they_are_written_and_others_refused() {
    for (temporal, name) in Temporal::ALL {
        assert_eq!(name.parse::<Temporal>().unwrap(), temporal);
        assert_eq!(temporal.to_string(), name);
    }
    let error = "motion".parse::<Temporal>().unwrap_err();
    assert!(
        matches!(&error, Error::Setting(text) if text.contains("filter")),
        "{error}"
    );
    let tiny = Upscaler::load("tiny", Device::Cpu).unwrap();
    assert!(tiny.capabilities().has(Setting::Temporal) && tiny.capabilities().history);
}

/// A network with memory.
const MEMORY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/models/tiny-x2-memory.safetensors"
);

#[test]
fn a_network_with_memory_flickers_less_with_it() {
    let off = flicker(&mut upscaler(MEMORY, Temporal::Off));
    let auto = flicker(&mut upscaler(MEMORY, Temporal::Auto));
    assert!(auto < 0.8 * off, "{auto} against {off}");
    assert_eq!(flicker(&mut upscaler(MEMORY, Temporal::Memory)), auto);
}

#[test]
fn memory_follows_the_motion() {
    // Noise of the frames before is removed, although the picture moves by a pixel a frame.
    let error = |temporal| {
        let mut upscaler = upscaler(MEMORY, temporal);
        let mut clean = self::upscaler(MEMORY, Temporal::Off);
        clean.set_denoise(Some(0.0)).unwrap();
        let mut sum = 0.0;
        for t in 0..8 {
            let noisy = planes(&mut upscaler, &frame(&luma(t, 2.5, t as u32)));
            let truth = planes(&mut clean, &frame(&luma(t, 0.0, 0)));
            let pairs = noisy[0].iter().zip(&truth[0]);
            let squares = pairs.map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2));
            sum += if t > 2 { squares.sum::<f64>() } else { 0.0 };
        }
        sum
    };
    let (off, memory) = (error(Temporal::Off), error(Temporal::Memory));
    assert!(memory < 0.95 * off, "{memory} against {off}");
}

#[test]
fn a_memory_is_empty_after_a_reset_a_cut_and_other_sizes_and_settings() {
    let first = planes(&mut upscaler(MEMORY, Temporal::Auto), &still(9));
    type Change = fn(&mut Upscaler);
    let changes: [Change; 4] = [
        Upscaler::reset,
        |upscaler| {
            let dark = frame(&[0.05; SIZE.0 * SIZE.1]);
            planes(upscaler, &dark);
        },
        |upscaler| {
            upscaler.set_strength(0.5).unwrap();
            upscaler.set_strength(1.0).unwrap();
        },
        |upscaler| {
            let small = Frame::new(FrameInfo::new(PixelFormat::I420, 40, 24)).unwrap();
            upscaler.upscale(&small).unwrap();
        },
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut upscaler = upscaler(MEMORY, Temporal::Auto);
        planes(&mut upscaler, &still(1));
        assert_ne!(planes(&mut upscaler, &still(9)), first, "it remembers");
        change(&mut upscaler);
        assert_eq!(planes(&mut upscaler, &still(9)), first, "change {i}");
    }
}

#[test]
fn a_network_without_memory_refuses_it() {
    let mut upscaler = Upscaler::load("tiny", Device::Cpu).unwrap();
    let error = upscaler.set_temporal(Temporal::Memory).unwrap_err();
    assert!(matches!(error, Error::Setting(_)), "{error:?}");
    assert!(error.to_string().contains("without memory"), "{error}");
    upscaler.set_temporal(Temporal::Filter).unwrap();
    // A network with memory can be filtered instead.
    let filtered = flicker(&mut self::upscaler(MEMORY, Temporal::Filter));
    let off = flicker(&mut self::upscaler(MEMORY, Temporal::Off));
    assert!(filtered < off);
}

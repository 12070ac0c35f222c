//! Tests of the library through `Upscaler`.

#[path = "support/yuv_model.rs"]
mod yuv_model;

use std::{
    ops::ControlFlow,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use tadsr::{
    Device, Error, Precision, Upscaler,
    engine::{ColorFix, NoiseField, Setting, Temporal, Tile},
    frame::{ChromaSite, Colorimetry, Component, Frame, FrameInfo, Matrix, PixelFormat, Range},
    model::{self, LayerCondition, LiteModel, Metadata, ResShiftMetadata},
    nn::resshift::ResShiftConfig,
};
use yuv_model::yuv_model;

/// Returns an image with edges, ramps and texture in every component.
fn image(info: FrameInfo) -> Frame {
    let mut frame = Frame::new(info).unwrap();
    for c in info.format.components() {
        let (w, h) = info
            .format
            .component_size(c.component, info.width, info.height);
        let chroma = matches!(c.component, Component::U | Component::V);
        let plane: Vec<f32> = (0..w * h)
            .map(|i| {
                let (x, y) = ((i % w) as f32 / w as f32, (i / w) as f32 / h as f32);
                let wave = 0.5 + 0.25 * (40.0 * x + 25.0 * y * y).sin() + 0.2 * f32::from(x > y);
                if chroma { 0.4 * (wave - 0.5) } else { wave }
            })
            .collect();
        frame.as_mut().write(c.component, &plane).unwrap();
    }
    frame
}

fn bytes(frame: &Frame) -> Vec<Vec<u8>> {
    (0..frame.info().format.planes())
        .map(|p| frame.plane(p).to_vec())
        .collect()
}

fn component(frame: &Frame, c: Component) -> Vec<f32> {
    let info = frame.info();
    let (w, h) = info.format.component_size(c, info.width, info.height);
    let mut samples = vec![0.0; w * h];
    frame.as_ref().read(c, &mut samples).unwrap();
    samples
}

fn upscaled(frame: &Frame, scale: f64, strength: f32) -> Frame {
    let mut upscaler = Upscaler::load("", Device::Cpu).unwrap();
    upscaler.set_scale(scale).unwrap();
    upscaler.set_strength(strength).unwrap();
    upscaler.upscale(frame).unwrap()
}

/// As [`yuv_model`], with dials.
fn dialled_model(dir: &tempfile::TempDir) -> PathBuf {
    let mut model = LiteModel::read(&yuv_model(dir)).unwrap();
    let student = &mut model.metadata.student;
    (student.conditioning.denoise, student.conditioning.detail) = (true, true);
    let student = *student;
    model.metadata = Metadata::lite("dialled", student, [1.0, 4.0]);
    for layer in &mut model.layers {
        let conditions = layer.spec.conditions(&student.conditioning).into_iter();
        layer.conditions = conditions.map(LayerCondition::zero).collect();
        for (i, values) in layer.values_mut().into_iter().enumerate().skip(2) {
            let value = |j| ((7 * i + j) % 11) as f32 / 50.0 - 0.1;
            *values = (0..values.len()).map(value).collect();
        }
    }
    let path = dir.path().join("dialled.safetensors");
    std::fs::write(&path, model.to_bytes(false).unwrap()).unwrap();
    path
}

#[test]
fn dials_take_effect_with_the_next_frame_and_have_no_later_effect() {
    let dir = tempfile::tempdir().unwrap();
    let path = dialled_model(&dir);
    // An automatic detail is 0 at scales up to 2.
    for (format, scale, detail) in [
        (PixelFormat::I420, 2.0, 0.0),
        (PixelFormat::I420, 2.5, 0.5),
        (PixelFormat::Rgb, 2.0, 0.0),
        (PixelFormat::Rgb, 4.0, 0.5),
    ] {
        let frame = image(FrameInfo::new(format, 20, 9));
        let at_scale = || {
            let mut upscaler = load(&path);
            upscaler.set_scale(scale).unwrap();
            upscaler
        };
        let fresh = |denoise, detail| {
            let mut upscaler = at_scale();
            upscaler.set_denoise(denoise).unwrap();
            upscaler.set_detail(Some(detail)).unwrap();
            bytes(&upscaler.upscale(&frame).unwrap())
        };
        let mut upscaler = at_scale();
        assert_eq!(upscaler.active_detail(scale), Some(detail));
        let automatic = bytes(&upscaler.upscale(&frame).unwrap());
        assert_eq!(automatic, fresh(Some(0.4), detail));
        let mut seen = vec![automatic.clone()];
        for (denoise, detail) in [(Some(0.0), 0.0), (Some(0.9), 0.0), (Some(0.9), 1.0)] {
            upscaler.set_denoise(denoise).unwrap();
            upscaler.set_detail(Some(detail)).unwrap();
            assert_eq!(upscaler.active_detail(scale), Some(detail));
            let changed = bytes(&upscaler.upscale(&frame).unwrap());
            assert_eq!(changed, fresh(denoise, detail), "{denoise:?} {detail}");
            assert!(
                !seen.contains(&changed),
                "{denoise:?} {detail} changes nothing"
            );
            seen.push(changed);
        }
        upscaler.set_denoise(None).unwrap();
        upscaler.set_detail(Some(f32::NAN)).unwrap();
        assert_eq!(bytes(&upscaler.upscale(&frame).unwrap()), automatic);
        upscaler.set_denoise(Some(7.0)).unwrap();
        assert_eq!(
            bytes(&upscaler.upscale(&frame).unwrap()),
            fresh(Some(1.0), detail)
        );
    }
}

#[test]
fn a_dial_takes_effect_in_every_precision() {
    let frame = image(FrameInfo::new(PixelFormat::I420, 40, 30));
    for precision in [
        Precision::F32,
        Precision::Bf16,
        Precision::Int16,
        Precision::Int8,
    ] {
        let open = |denoise| {
            let mut upscaler = load("tiny".as_ref());
            upscaler.set_precision(precision).unwrap();
            upscaler.set_denoise(Some(denoise)).unwrap();
            upscaler
        };
        let fresh = |denoise| bytes(&open(denoise).upscale(&frame).unwrap());
        let mut upscaler = open(0.0);
        let clean = bytes(&upscaler.upscale(&frame).unwrap());
        upscaler.set_denoise(Some(0.8)).unwrap();
        let degraded = bytes(&upscaler.upscale(&frame).unwrap());
        assert_ne!(clean, degraded, "{precision}");
        assert_eq!(degraded, fresh(0.8), "{precision}");
    }
}

#[test]
fn a_flat_colour_is_kept_in_every_format_and_odd_size() {
    for format in PixelFormat::ALL {
        for (matrix, range) in [
            (Matrix::Bt601, Range::Limited),
            (Matrix::Bt709, Range::Full),
            (Matrix::Bt2020, Range::Limited),
        ] {
            for (w, h) in [(1, 1), (2, 1), (3, 5), (7, 5), (16, 12)] {
                let info = FrameInfo {
                    colorimetry: Colorimetry { matrix, range },
                    ..FrameInfo::new(format, w, h)
                };
                let mut frame = Frame::new(info).unwrap();
                for (i, c) in format.components().iter().enumerate() {
                    let (w, h) = format.component_size(c.component, w, h);
                    let value = [0.6, 0.1, -0.2, 0.8][i];
                    let value = if format.is_rgb() {
                        0.2 + 0.2 * i as f32
                    } else {
                        value
                    };
                    frame
                        .as_mut()
                        .write(c.component, &vec![value; w * h])
                        .unwrap();
                }
                for scale in [2.0, 4.0] {
                    let large = upscaled(&frame, scale, 1.0);
                    for c in format.components() {
                        let small = component(&frame, c.component)[0];
                        // Rounding and the residual of a flat area.
                        let step = 1.01 / 219.0;
                        for v in component(&large, c.component) {
                            assert!(
                                (v - small).abs() <= step,
                                "{format:?} {matrix:?} {range:?} {w}x{h} x{scale} {:?}: {v}, \
                                 not {small}",
                                c.component
                            );
                        }
                    }
                }
            }
        }
    }
}

/// The residual of a flat area rounds to zero in 8-bit video, except for the larger model in int8.
#[test]
fn flat_areas_keep_their_level() {
    for precision in [
        Precision::Auto,
        Precision::F32,
        Precision::Bf16,
        Precision::Int16,
        Precision::Int8,
    ] {
        let mut upscaler = Upscaler::load("", Device::Cpu).unwrap();
        upscaler.set_precision(precision).unwrap();
        for scale in [1.5, 2.0, 3.0, 4.0] {
            let coarse = precision == Precision::Int8 && scale > 2.0;
            let allowed = if coarse { 1.01 } else { 0.501 };
            upscaler.set_scale(scale).unwrap();
            for level in 0..=20 {
                let level = level as f32 / 20.0;
                let mut frame = Frame::new(FrameInfo::new(PixelFormat::I420_10Le, 40, 40)).unwrap();
                frame.as_mut().write(Component::Y, &[level; 1600]).unwrap();
                let flat = component(&frame, Component::Y)[0];
                let large = component(&upscaler.upscale(&frame).unwrap(), Component::Y);
                let errors = large.iter().map(|v| 219.0 * (v - flat).abs());
                let max = errors.fold(0.0, f32::max);
                assert!(
                    max <= allowed,
                    "{precision} x{scale} level {level}: {max:.2} steps"
                );
            }
        }
    }
}

#[test]
fn bundled_models_keep_the_level_of_grey_at_any_dial() {
    for bundled in model::BUNDLED {
        let mut upscaler = Upscaler::load(bundled.name, Device::Cpu).unwrap();
        upscaler.set_precision(Precision::F32).unwrap();
        upscaler.set_scale(upscaler.max_scale()).unwrap();
        for detail in [0.0, 0.5, 1.0] {
            upscaler.set_detail(Some(detail)).unwrap();
            for denoise in [0.0, 0.4, 0.7, 0.8, 0.9] {
                upscaler.set_denoise(Some(denoise)).unwrap();
                for level in (16..=235).step_by(6) {
                    let mut frame = Frame::new(FrameInfo::new(PixelFormat::Gray8, 24, 24)).unwrap();
                    frame.plane_mut(0).fill(level);
                    let large = upscaler.upscale(&frame).unwrap();
                    let worst = large
                        .plane(0)
                        .iter()
                        .map(|v| v.abs_diff(level))
                        .max()
                        .unwrap();
                    let name = bundled.name;
                    assert!(
                        worst <= 3,
                        "{name}, denoise {denoise}, detail {detail}: {level} moves by {worst}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_result_does_not_depend_on_threads_or_previous_frames() {
    let frame = image(FrameInfo::new(PixelFormat::Nv12, 67, 45));
    let other = image(FrameInfo::new(PixelFormat::Nv12, 40, 30));
    let first = bytes(&upscaled(&frame, 2.0, 1.0));
    for threads in [1, 2, 3, 5] {
        let mut upscaler = Upscaler::load("tiny", Device::Cpu).unwrap();
        upscaler.set_threads(threads).unwrap();
        assert_eq!(
            bytes(&upscaler.upscale(&frame).unwrap()),
            first,
            "{threads} threads"
        );
        upscaler.upscale(&other).unwrap();
        assert_eq!(
            bytes(&upscaler.upscale(&frame).unwrap()),
            first,
            "after another frame"
        );
    }
}

#[test]
fn precisions_are_resolved_or_refused_and_differ_little() {
    let frame = image(FrameInfo::new(PixelFormat::I420, 90, 71));
    let luma = |model: &str, precision| {
        let mut upscaler = Upscaler::load(model, Device::Cpu).unwrap();
        upscaler.set_precision(precision).unwrap();
        let active = upscaler.active_precision(2.0);
        assert!(active != Precision::Auto && [active, Precision::Auto].contains(&precision));
        component(&upscaler.upscale(&frame).unwrap(), Component::Y)
    };
    // Calibration for int8 covers all positions of a dial, so its steps are wider.
    for model in ["tiny-x2", "small-x2"] {
        let exact = luma(model, Precision::F32);
        for precision in [
            Precision::Auto,
            Precision::Bf16,
            Precision::Int16,
            Precision::Int8,
        ] {
            let pairs = luma(model, precision).into_iter().zip(exact.iter());
            let squares: f32 = pairs.map(|(a, b)| (a - b) * (a - b)).sum();
            let error = 255.0 * (squares / exact.len() as f32).sqrt();
            assert!(error < 1.2, "{model} {precision}: {error} codes");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mut upscaler = load(&yuv_model(&dir));
    let error = upscaler.set_precision(Precision::Int8).unwrap_err();
    assert!(matches!(error, Error::Setting(_)), "{error}");
    assert!(
        upscaler.upscale(&frame).is_ok(),
        "the previous precision stays in force"
    );
}

#[test]
fn strength_goes_from_bicubic_to_the_full_residual() {
    let frame = image(FrameInfo::new(PixelFormat::Gray8, 48, 48));
    let [zero, half, full] =
        [0.0, 0.5, 1.0].map(|s| component(&upscaled(&frame, 2.0, s), Component::Y));
    assert!(
        zero.iter().zip(&full).any(|(a, b)| (a - b).abs() > 0.02),
        "the residual is not zero"
    );
    let inside = |v: f32| (0.02..0.98).contains(&v);
    for ((z, h), f) in zero.iter().zip(&half).zip(&full) {
        if inside(*z) && inside(*f) {
            assert!((h - 0.5 * (z + f)).abs() <= 1.01 / 255.0, "{z} {h} {f}");
        }
    }
}

#[test]
fn rgb_and_444_video_have_the_same_result() {
    let dir = tempfile::tempdir().unwrap();
    let path = yuv_model(&dir);
    let colorimetry = Colorimetry {
        matrix: Matrix::Bt709,
        range: Range::Full,
    };
    let info = |format| FrameInfo {
        colorimetry,
        chroma_site: ChromaSite {
            horizontal_cosited: false,
            vertical_cosited: false,
        },
        ..FrameInfo::new(format, 24, 20)
    };
    // Muted colours, because clamping differs between the formats.
    let soft: Vec<u8> = (0..24 * 20)
        .flat_map(|i| {
            let wave = |k: f32| (128.0 + 40.0 * (i as f32 * k).sin()) as u8;
            [wave(0.31), wave(0.37), wave(0.41)]
        })
        .collect();
    let rgb = Frame::from_rgb8_as(info(PixelFormat::Rgb), &soft).unwrap();
    let yuv = Frame::from_rgb8_as(info(PixelFormat::Y444), &soft).unwrap();
    let mut upscaler = Upscaler::load(path.to_str().unwrap(), Device::Cpu).unwrap();
    upscaler.set_scale(2.0).unwrap();
    // Random weights magnify the rounding of other precisions.
    upscaler.set_precision(Precision::F32).unwrap();
    let mut run = |frame: &Frame| upscaler.upscale(frame).unwrap().to_rgb8().unwrap();
    let (a, b) = (run(&rgb), run(&yuv));
    let max = a.iter().zip(&b).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(max <= 3, "RGB and Y444 differ by {max} of 255");
    upscaler.set_strength(0.0).unwrap();
    let base = upscaler.upscale(&rgb).unwrap().to_rgb8().unwrap();
    assert!(
        a.iter().zip(&base).any(|(a, b)| a.abs_diff(*b) > 8),
        "the residual is not zero"
    );
}

#[test]
fn a_yuv_model_supports_every_format_and_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = yuv_model(&dir);
    let mut upscaler = Upscaler::load(path.to_str().unwrap(), Device::Cpu).unwrap();
    for format in PixelFormat::ALL {
        for (w, h) in [(1, 1), (5, 3), (18, 14)] {
            for scale in [1.5, 2.0, 4.0] {
                upscaler.set_scale(scale).unwrap();
                let frame = image(FrameInfo::new(format, w, h));
                let large = upscaler.upscale(&frame).unwrap();
                let side = |n: usize| (n as f64 * scale).round() as usize;
                assert_eq!(
                    (large.info().width, large.info().height),
                    (side(w), side(h))
                );
            }
        }
    }
}

/// A horizontal ramp stays linear if only the width grows, and a vertical one if only the height
/// grows.
#[test]
fn each_direction_may_have_its_own_scale() {
    let info = FrameInfo::new(PixelFormat::Gray8, 24, 24);
    for wide in [true, false] {
        let mut frame = Frame::new(info).unwrap();
        let level = |i: usize| if wide { i % 24 } else { i / 24 } as f32 / 23.0;
        let samples: Vec<f32> = (0..576).map(level).collect();
        frame.as_mut().write(Component::Y, &samples).unwrap();
        let (w, h) = if wide { (61, 24) } else { (24, 61) };
        let mut upscaler = Upscaler::load("tiny", Device::Cpu).unwrap();
        let mut out = Frame::new(info.with_size(w, h)).unwrap();
        upscaler
            .upscale_into(&frame.as_ref(), &mut out.as_mut())
            .unwrap();
        let large = component(&out, Component::Y);
        for (i, v) in large.iter().enumerate() {
            let along = if wide { i % w } else { i / w } as f32;
            let want = ((along + 0.5) * 24.0 / 61.0 - 0.5) / 23.0;
            assert!(
                (v - want.clamp(0.0, 1.0)).abs() < 0.03,
                "{wide} at {i}: {v}, not {want}"
            );
        }
        let too_large = upscaler.upscale_into(
            &image(info.with_size(1, 100)).as_ref(),
            &mut Frame::new(info.with_size(1, 500)).unwrap().as_mut(),
        );
        assert!(matches!(too_large, Err(Error::Scale(_))));
    }
}

#[test]
fn invalid_scales_and_frames_are_errors() {
    let frame = image(FrameInfo::new(PixelFormat::I420, 16, 16));
    let mut upscaler = Upscaler::load("tiny", Device::Cpu).unwrap();
    for scale in [0.5, 4.1, f64::NAN, f64::INFINITY, -1.0] {
        assert!(
            matches!(upscaler.set_scale(scale), Err(Error::Scale(_))),
            "{scale}"
        );
    }
    let mut into = |info: FrameInfo| {
        let mut out = Frame::new(info).unwrap();
        upscaler.upscale_into(&frame.as_ref(), &mut out.as_mut())
    };
    let info = *frame.info();
    assert!(matches!(into(info.with_size(8, 16)), Err(Error::Scale(_))));
    assert!(matches!(
        into(info.with_size(100, 100)),
        Err(Error::Scale(_))
    ));
    let other = FrameInfo {
        format: PixelFormat::Nv12,
        ..info.with_size(32, 32)
    };
    assert!(matches!(into(other), Err(Error::Frame(_))));
    assert!(Upscaler::load("tiny", "cuda".parse().unwrap()).is_err());
}

#[test]
fn the_default_model_follows_the_scale() {
    let upscaler = Upscaler::load("", Device::Auto).unwrap();
    assert_eq!(upscaler.active_model(1.5), "tiny-x2");
    assert_eq!(upscaler.active_model(2.0), "tiny-x2");
    assert_eq!(upscaler.active_model(3.0), "tiny-x4");
    assert_eq!(upscaler.max_scale(), 4.0);
    let small = Upscaler::load("small", Device::Auto).unwrap();
    assert_eq!(
        [2.0, 2.25].map(|s| small.active_model(s)),
        ["small-x2", "small-x4"]
    );
    assert_eq!((small.scale(), small.max_scale()), (2.0, 4.0));
}

/// Writes a minimal ResShift model with random weights and the native scale `scale`: 4, or 1 like
/// models for faces. Returns the path.
fn resshift_model(dir: &tempfile::TempDir, scale: usize) -> PathBuf {
    let mut config = ResShiftConfig::realsr_x4();
    let (unet, autoencoder) = (&mut config.unet, &mut config.autoencoder);
    unet.model_channels = 32;
    unet.channel_mult = vec![1, 1];
    unet.num_res_blocks = vec![1, 1];
    (unet.image_size, unet.window_size, unet.lq_size) = (8, 4, 32 / scale);
    unet.attention_resolutions = vec![8, 4];
    (unet.swin_embed_dim, unet.num_head_channels) = (32, 16);
    (autoencoder.ch, autoencoder.ch_mult) = (32, vec![1; 3]);
    (autoencoder.num_res_blocks, autoencoder.n_embed) = (vec![1; 3], 64);
    config.diffusion.scale = scale;
    let metadata = ResShiftMetadata::new(&format!("random-x{scale}"), config, "none");
    let path = dir.path().join(format!("random-x{scale}.safetensors"));
    let mut seed = 0;
    let values = |name: &str, shape: &[usize]| {
        seed += 1;
        let noise = NoiseField::seeded(1, 1, shape.iter().product(), seed);
        let fan_in: usize = shape[1..].iter().product();
        let spread = match shape.len() {
            1 => 0.1,
            _ if name.contains("embedding") => 1.0,
            _ => (fan_in as f32).powf(-0.5),
        };
        let mean = f32::from(shape.len() == 1 && name.ends_with("weight"));
        Ok(noise.values().iter().map(|v| mean + spread * v).collect())
    };
    metadata
        .write(&path, model::Precision::F32, values)
        .unwrap();
    path
}

fn load(path: &std::path::Path) -> Upscaler {
    Upscaler::load(path.to_str().unwrap(), Device::Auto).unwrap()
}

#[test]
fn a_resshift_model_supports_its_native_scale_and_smaller_ones() {
    let dir = tempfile::tempdir().unwrap();
    let mut upscaler = load(&resshift_model(&dir, 4));
    assert_eq!(upscaler.active_model(4.0), "random-x4");
    assert_eq!(
        (upscaler.max_scale(), upscaler.native_scale()),
        (4.0, Some(4.0))
    );
    let frame = image(FrameInfo::new(PixelFormat::Nv12, 13, 5));
    let large = upscaler.upscale(&frame).unwrap();
    assert_eq!((large.info().width, large.info().height), (52, 20));
    upscaler.set_scale(2.0).unwrap();
    let smaller = upscaler.upscale(&frame).unwrap();
    assert_eq!((smaller.info().width, smaller.info().height), (26, 10));
    assert!(matches!(upscaler.set_scale(4.5), Err(Error::Scale(_))));

    let mut faces = load(&resshift_model(&dir, 1));
    assert_eq!((faces.max_scale(), faces.native_scale()), (1.0, Some(1.0)));
    let restored = faces.upscale(&frame).unwrap();
    assert_eq!(restored.info(), frame.info());
    assert_ne!(bytes(&restored), bytes(&frame));
}

#[test]
fn equal_frames_have_equal_results_until_the_seed_changes() {
    let dir = tempfile::tempdir().unwrap();
    let path = resshift_model(&dir, 4);
    let still = image(FrameInfo::new(PixelFormat::I420, 20, 9));
    let other = image(FrameInfo::new(PixelFormat::I420, 8, 8));
    let mut upscaler = load(&path);
    let first = bytes(&upscaler.upscale(&still).unwrap());
    upscaler.upscale(&other).unwrap();
    for threads in [1, 2, 3] {
        upscaler.set_threads(threads).unwrap();
        assert_eq!(
            bytes(&upscaler.upscale(&still).unwrap()),
            first,
            "{threads} threads"
        );
    }
    upscaler.set_seed(1).unwrap();
    assert_ne!(bytes(&upscaler.upscale(&still).unwrap()), first);
    upscaler.set_seed(0).unwrap();
    upscaler.set_noise(0.0).unwrap();
    assert_ne!(bytes(&upscaler.upscale(&still).unwrap()), first);
}

#[test]
fn the_noise_field_can_be_read_and_set() {
    let dir = tempfile::tempdir().unwrap();
    let mut upscaler = load(&resshift_model(&dir, 4));
    let frame = image(FrameInfo::new(PixelFormat::Rgb, 20, 9));
    upscaler.set_seed(5).unwrap();
    let expected = bytes(&upscaler.upscale(&frame).unwrap());
    let noise = upscaler.noise_field(20, 9).unwrap();
    assert_eq!(noise.shape(), [3, 16, 24]);
    upscaler.set_seed(6).unwrap();
    upscaler.set_noise_field(Some(noise)).unwrap();
    assert_eq!(bytes(&upscaler.upscale(&frame).unwrap()), expected);
    let other = image(FrameInfo::new(PixelFormat::Rgb, 40, 9));
    assert!(matches!(upscaler.upscale(&other), Err(Error::Setting(_))));
    assert!(
        Upscaler::load("tiny", Device::Cpu)
            .unwrap()
            .noise_field(20, 9)
            .is_none()
    );
}

#[test]
fn settings_of_resshift_models_are_checked_and_take_effect() {
    let dir = tempfile::tempdir().unwrap();
    let mut upscaler = load(&resshift_model(&dir, 4));
    let frame = image(FrameInfo::new(PixelFormat::Rgb, 20, 9));
    let plain = bytes(&upscaler.upscale(&frame).unwrap());
    assert_eq!(upscaler.max_steps(), Some(15));
    for steps in [0, 16] {
        assert!(matches!(upscaler.set_steps(steps), Err(Error::Setting(_))));
    }
    upscaler.set_steps(2).unwrap();
    assert_ne!(bytes(&upscaler.upscale(&frame).unwrap()), plain);
    upscaler.set_steps(1).unwrap();
    upscaler.set_color_fix(ColorFix::None).unwrap();
    assert_ne!(bytes(&upscaler.upscale(&frame).unwrap()), plain);
    upscaler.set_color_fix(ColorFix::Wavelet).unwrap();
    upscaler.set_tile(Tile::Side(16)).unwrap();
    upscaler.set_tile_overlap(4).unwrap();
    assert_ne!(bytes(&upscaler.upscale(&frame).unwrap()), plain);
    upscaler.set_tile(Tile::Whole).unwrap();
    assert_eq!(bytes(&upscaler.upscale(&frame).unwrap()), plain);
}

#[test]
fn a_setting_that_a_model_lacks_is_an_error_that_changes_nothing() {
    let frame = image(FrameInfo::new(PixelFormat::Rgb, 20, 9));
    let mut tiny = Upscaler::load("tiny", Device::Cpu).unwrap();
    let before = bytes(&tiny.upscale(&frame).unwrap());
    let field = NoiseField::seeded(3, 16, 24, 0);
    for (setting, result) in [
        (Setting::Noise, tiny.set_noise(0.5)),
        (Setting::Seed, tiny.set_seed(1)),
        (Setting::NoiseField, tiny.set_noise_field(Some(field))),
        (Setting::Steps, tiny.set_steps(2)),
        (Setting::Tile, tiny.set_tile(Tile::Whole)),
        (Setting::TileOverlap, tiny.set_tile_overlap(0)),
        (Setting::ColorFix, tiny.set_color_fix(ColorFix::None)),
    ] {
        let Err(Error::Setting(text)) = result else {
            panic!("{setting}: {result:?}");
        };
        assert_eq!(text, format!("model 'tiny-x4' has no setting '{setting}'"));
        assert!(!tiny.capabilities().has(setting));
    }
    assert_eq!(bytes(&tiny.upscale(&frame).unwrap()), before);
}

#[test]
fn every_model_accepts_the_default_of_every_setting() {
    let dir = tempfile::tempdir().unwrap();
    for mut upscaler in [
        Upscaler::load("tiny", Device::Cpu).unwrap(),
        load(&resshift_model(&dir, 4)),
    ] {
        upscaler.set_strength(1.0).unwrap();
        upscaler.set_precision(Precision::Auto).unwrap();
        upscaler.set_temporal(Temporal::Auto).unwrap();
        upscaler.set_temporal(Temporal::Off).unwrap();
        upscaler.set_noise(1.0).unwrap();
        upscaler.set_seed(0).unwrap();
        upscaler.set_noise_field(None).unwrap();
        upscaler.set_steps(1).unwrap();
        upscaler.set_tile(Tile::Auto).unwrap();
        upscaler.set_tile_overlap(16).unwrap();
        upscaler.set_color_fix(ColorFix::Wavelet).unwrap();
    }
}

#[test]
fn capabilities_are_those_of_the_model() {
    let tiny = Upscaler::load("tiny", Device::Cpu).unwrap();
    let lite = tiny.capabilities();
    assert_eq!(lite.scales, [1.0, 4.0]);
    let dials = [Setting::Denoise, Setting::Detail, Setting::Temporal];
    let settings = [Setting::Strength, Setting::Precision]
        .into_iter()
        .chain(dials);
    assert_eq!(lite.settings, settings.collect::<Vec<_>>());
    let precisions = [
        Precision::F32,
        Precision::Bf16,
        Precision::Int16,
        Precision::Int8,
    ];
    assert_eq!(lite.precisions, precisions);
    assert!(!lite.pipelined && lite.history);

    let dir = tempfile::tempdir().unwrap();
    let upscaler = load(&resshift_model(&dir, 4));
    let resshift = upscaler.capabilities();
    assert_eq!(
        (resshift.scales, resshift.native_scale),
        ([1.0, 4.0], Some(4.0))
    );
    for (setting, _) in Setting::ALL {
        let of_lite = [Setting::Denoise, Setting::Detail, Setting::Temporal];
        assert_eq!(
            resshift.has(setting),
            !of_lite.contains(&setting),
            "{setting}"
        );
    }
    assert_eq!(resshift.precisions, [Precision::F32]);
    assert_eq!((resshift.max_steps, resshift.history), (Some(15), false));
}

#[test]
fn a_reset_changes_nothing_for_models_without_history() {
    let frame = image(FrameInfo::new(PixelFormat::I420, 20, 9));
    let mut tiny = Upscaler::load("tiny", Device::Cpu).unwrap();
    let before = bytes(&tiny.upscale(&frame).unwrap());
    tiny.reset();
    assert_eq!(bytes(&tiny.upscale(&frame).unwrap()), before);
}

#[test]
fn the_observer_gets_the_progress_and_can_stop_a_frame() {
    let dir = tempfile::tempdir().unwrap();
    let mut upscaler = load(&resshift_model(&dir, 4));
    let frame = image(FrameInfo::new(PixelFormat::Gray8, 8, 8));
    let done = Arc::new(AtomicUsize::new(usize::MAX));
    let seen = done.clone();
    upscaler.set_observer(Some(Box::new(move |progress| {
        assert_eq!(progress.total, 3);
        seen.store(progress.done, Relaxed);
        ControlFlow::Continue(())
    })));
    upscaler.upscale(&frame).unwrap();
    assert_eq!(done.load(Relaxed), 3);
    upscaler.set_observer(Some(Box::new(|_| ControlFlow::Break(()))));
    assert!(matches!(upscaler.upscale(&frame), Err(Error::Cancelled)));
    upscaler.set_observer(None);
    upscaler.upscale(&frame).unwrap();
}

//! Tests of the runner with small networks.

use std::{collections::HashMap, ops::ControlFlow, path::PathBuf};

use candle_core::{DType, Device, Tensor, pickle, safetensors};
use candle_nn::VarBuilder;

use super::*;
use crate::{
    frame::{Colorimetry, Frame, Matrix, PixelFormat, Range},
    nn::resshift::{AutoencoderConfig, UnetConfig},
    ops::cuda::{emulated, host},
};

/// Returns the configuration of the fixtures.
fn mini() -> ResShiftConfig {
    let mut config = ResShiftConfig::realsr_x4();
    config.unet = UnetConfig {
        image_size: 16,
        model_channels: 32,
        channel_mult: vec![1, 2],
        num_res_blocks: vec![1; 2],
        attention_resolutions: vec![16, 8],
        num_head_channels: 16,
        swin_embed_dim: 32,
        lq_size: 16,
        ..config.unet
    };
    config.autoencoder = AutoencoderConfig {
        ch: 32,
        ch_mult: vec![1, 1, 2],
        num_res_blocks: vec![1; 3],
        n_embed: 128,
        ..config.autoencoder
    };
    config
}

/// Returns the smallest configuration with every part. The sides of tiles are multiples of 8
/// pixels.
fn tiny() -> ResShiftConfig {
    let mut config = mini();
    config.unet = UnetConfig {
        image_size: 8,
        attention_resolutions: vec![8, 4],
        window_size: 4,
        lq_size: 8,
        ..config.unet
    };
    config.autoencoder.ch_mult = vec![1; 3];
    config
}

/// Returns a configuration like that of the models for faces: a scale of 1, a latent of an eighth
/// of the size, and convolutions between input and latent. The sides of tiles are multiples of 64
/// pixels.
fn face() -> ResShiftConfig {
    let mut config = tiny();
    config.unet.lq_size = 64;
    config.unet.in_channels = 8;
    config.unet.out_channels = 8;
    config.autoencoder = AutoencoderConfig {
        ch_mult: vec![1; 4],
        num_res_blocks: vec![1; 4],
        z_channels: 8,
        embed_dim: 8,
        ..config.autoencoder
    };
    config.diffusion = ResShiftConfig::faceir().diffusion;
    config
}

fn builder(tensors: HashMap<String, Tensor>) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

/// Returns random weights that preserve the size of signals, except for the image, which is grey
/// with weak texture.
fn random(tensors: Vec<(String, Vec<usize>)>) -> VarBuilder<'static> {
    let weights = tensors.into_iter().enumerate().map(|(i, (name, shape))| {
        let len: usize = shape.iter().product();
        let fan_in: usize = shape[1..].iter().product();
        let (mean, spread) = match shape.len() {
            1 if name.ends_with("weight") => (1.0, 0.1),
            1 => (0.0, 0.1),
            _ if name.contains("embedding") => (0.0, 1.0),
            _ if name == "decoder.conv_out.weight" => (0.0, 0.1 * (fan_in as f32).powf(-0.5)),
            _ => (0.0, (fan_in as f32).powf(-0.5)),
        };
        let noise = NoiseField::seeded(1, 1, len, i as u64);
        let values: Vec<f32> = noise.values().iter().map(|v| mean + spread * v).collect();
        (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    });
    builder(weights.collect())
}

fn runner(config: &ResShiftConfig) -> Runner {
    let unet = Unet::new(&config.unet, random(config.unet.tensors())).unwrap();
    let autoencoder = &config.autoencoder;
    let autoencoder = Autoencoder::new(autoencoder, random(autoencoder.tensors())).unwrap();
    Runner::new(config, unet, autoencoder).unwrap()
}

/// Returns the networks and values of a fixture.
fn fixture(name: &str) -> (Runner, HashMap<String, Tensor>) {
    fixture_in(name, DType::F32)
}

/// As [`fixture`], with feature maps of type `dtype`.
fn fixture_in(name: &str, dtype: DType) -> (Runner, HashMap<String, Tensor>) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures");
    let config = mini();
    let mini = folder.join("mini");
    let unet = pickle::read_all_with_key(mini.join("unet.pth"), Some("state_dict")).unwrap();
    let autoencoder = pickle::read_all(mini.join("autoencoder.pth")).unwrap();
    let values = safetensors::load(folder.join(name).join("io.safetensors"), &Device::Cpu);
    let mut unet = Unet::new(&config.unet, builder(unet.into_iter().collect())).unwrap();
    let autoencoder = builder(autoencoder.into_iter().collect());
    let mut autoencoder = Autoencoder::new(&config.autoencoder, autoencoder).unwrap();
    unet.set_dtype(dtype);
    autoencoder.set_dtype(dtype);
    let runner = Runner::new(&config, unet, autoencoder).unwrap();
    (runner, values.unwrap())
}

/// Returns a tensor `[1, 3, h, w]` of -1 to 1 as planes of 0 to 1, and its width.
fn planes(t: &Tensor) -> (Planes, usize) {
    let (_, _, _, width) = t.dims4().unwrap();
    let plane = |c| {
        let plane = t.narrow(1, c, 1).unwrap().flatten_all().unwrap();
        plane.affine(0.5, 0.5).unwrap().to_vec1().unwrap()
    };
    ([plane(0), plane(1), plane(2)], width)
}

fn noise_field(t: &Tensor) -> NoiseField {
    let (_, c, h, w) = t.dims4().unwrap();
    NoiseField::new(c, h, w, t.flatten_all().unwrap().to_vec1().unwrap()).unwrap()
}

/// Returns an image with edges, ramps and texture, different in each plane.
fn image(w: usize, h: usize) -> Planes {
    [0.0, 1.0, 2.0].map(|c| {
        let at = |i: usize| {
            let (x, y) = ((i % w) as f32, (i / w) as f32);
            let wave = (0.31 * x + 0.17 * y * (1.0 + c)).sin() * (0.05 * x - 0.11 * y + c).cos();
            0.5 + 0.3 * wave + 0.15 * f32::from(x > 1.3 * y)
        };
        (0..w * h).map(at).collect()
    })
}

fn plain_options() -> Options {
    Options {
        tile: Tile::Whole,
        color_fix: ColorFix::None,
        ..Options::default()
    }
}

fn restore(runner: &mut Runner, rgb: &Planes, width: usize, options: &Options) -> Planes {
    runner.restore(rgb.clone(), width, options, None).unwrap()
}

/// Returns the norm of the difference divided by the norm of `b`.
fn relative(a: &Planes, b: &Planes) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let both = || a.iter().flatten().zip(b.iter().flatten());
    assert_eq!(a[0].len(), b[0].len());
    let difference: f64 = both().map(|(a, b)| square(a - b)).sum();
    (difference / both().map(|(_, b)| square(*b)).sum::<f64>()).sqrt()
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn one_step_gives_the_published_codes_image() {
    for name in ["mini", "mini_rect"] {
        let (mut runner, values) = fixture(name);
        let options = Options {
            noise_field: Some(noise_field(&values["noise"])),
            ..plain_options()
        };
        let (lq, width) = planes(&values["lq"]);
        let made = restore(&mut runner, &lq, width, &options);
        let image = values["image"].clamp(-1f32, 1.0).unwrap();
        let error = relative(&made, &planes(&image).0);
        assert!(error < 1e-4, "{name}: {error}");
    }
}

/// Tests the operators of candle, as used on other devices than the CPU, in f64 and in 16 bits.
/// Latent and image are compared separately, because rounding changes some codes and with them the
/// image.
#[test]
#[ignore = "needs the reference values in ../shared"]
fn composed_operators_give_the_published_codes_latent_and_image() {
    assert_resshift(DType::F64, [1e-5, 1e-5]);
    assert_resshift(DType::F16, [6e-3, 4e-3]);
    assert_resshift(DType::BF16, [5e-2, 3e-2]);
}

/// Tests the source of the CUDA kernels, compiled for the CPU.
#[test]
#[ignore = "needs the reference values in ../shared"]
fn cuda_kernels_give_the_published_codes_latent_and_image() {
    let before = host::launches();
    emulated(|| assert_resshift(DType::F16, [6e-3, 4e-3]));
    assert!(host::launches() > before + 100);
}

fn assert_resshift(dtype: DType, limits: [f32; 2]) {
    let (runner, values) = fixture_in("mini_rect", dtype);
    let nhwc = |name: &str| {
        values[name]
            .permute((0, 2, 3, 1))
            .unwrap()
            .contiguous()
            .unwrap()
    };
    let distance = |made: &Tensor, name: &str| {
        let norm = |t: &Tensor| {
            t.sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
                .sqrt()
        };
        assert_eq!(made.dtype(), DType::F32);
        norm(&(made - nhwc(name)).unwrap()) / norm(&nhwc(name))
    };
    let z0 = runner
        .unet
        .forward(&nhwc("unet_in"), &[14], Some(&nhwc("lq")))
        .unwrap();
    let zy = runner.autoencoder.encode(&nhwc("bicubic")).unwrap();
    let image = runner.autoencoder.decode(&nhwc("z0"), true).unwrap();
    let off = [
        distance(&z0, "z0").max(distance(&zy, "z_y")),
        distance(&image, "image"),
    ];
    assert!(
        off[0] < limits[0] && off[1] < limits[1],
        "{dtype:?}: {off:?}"
    );
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn a_result_that_is_not_finite_is_an_error() {
    let (mut runner, _) = fixture_in("mini", DType::F16);
    let mut rgb = image(16, 16);
    rgb[0][7] = f32::MAX;
    let result = runner.restore(rgb, 16, &plain_options(), None);
    assert!(matches!(result, Err(Error::Setting(text)) if text.contains("finite")));
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn the_teachers_steps_give_the_published_codes_latent() {
    let (mut runner, values) = fixture("mini");
    let options = Options {
        noise_field: Some(noise_field(&values["noise"])),
        steps: 15,
        ..plain_options()
    };
    let (lq, width) = planes(&values["lq"]);
    let made = restore(&mut runner, &lq, width, &options);
    let z = values["z_ddim"].permute((0, 2, 3, 1)).unwrap();
    let image = runner
        .autoencoder
        .decode(&z.contiguous().unwrap(), true)
        .unwrap();
    let image = image.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
    let image = image.clamp(-1f32, 1.0).unwrap();
    let error = relative(&made, &planes(&image).0);
    assert!(error < 1e-3, "{error}");
}

/// Returns the mean difference of horizontal neighbours for which `columns` accepts the left
/// column.
fn step(planes: &Planes, width: usize, columns: impl Fn(usize) -> bool) -> f64 {
    let rows = planes.iter().flat_map(|plane| plane.chunks_exact(width));
    let steps = rows.flat_map(|row| row.windows(2).enumerate().filter(|(x, _)| columns(*x)));
    let (sum, count) = steps.fold((0.0, 0), |(sum, count), (_, pair)| {
        (sum + f64::from((pair[0] - pair[1]).abs()), count + 1)
    });
    sum / f64::from(count)
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn tiles_leave_no_seams() {
    let (mut runner, _) = fixture("mini");
    let (w, h, side) = (80, 32, 48);
    let rgb = image(w, h);
    let mut tiled = |tile, tile_overlap| {
        let options = Options {
            tile,
            tile_overlap,
            ..plain_options()
        };
        restore(&mut runner, &rgb, w, &options)
    };
    let whole = tiled(Tile::Whole, 0);
    let cut = tiled(Tile::Side(side), 0);
    let blended = tiled(Tile::Side(side), 16);
    // The second tile begins at 32, the first ends at 48, and the middle of the blend is at 40.
    let seam = |planes: &Planes, columns: &[usize]| {
        let at = |x: usize| columns.contains(&(x + 1));
        step(planes, 4 * w, at) / step(planes, 4 * w, |x| !at(x))
    };
    let hard = seam(&cut, &[4 * 40]);
    assert!(
        hard > 1.3,
        "the measure does not detect a hard seam: {hard}"
    );
    let soft = seam(&blended, &[4 * 32, 4 * 40, 4 * 48]);
    assert!(
        soft < 1.1,
        "steps at the seams are {soft} times those elsewhere"
    );

    // The error of tiles is not larger where they are blended than elsewhere.
    let distance = |columns: std::ops::Range<usize>| {
        let rows = |planes: &Planes| -> Vec<Vec<f32>> {
            let rows = planes.iter().flat_map(|plane| plane.chunks(4 * w));
            rows.map(|row| row[columns.clone()].to_vec()).collect()
        };
        let (a, b) = (rows(&blended).concat(), rows(&whole).concat());
        let sum: f32 = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).sum();
        sum / a.len() as f32
    };
    let (inside, left, right) = (
        distance(4 * 32..4 * 48),
        distance(0..4 * 32),
        distance(4 * 48..4 * w),
    );
    assert!(inside < left.max(right), "{inside} {left} {right}");
}

#[test]
fn tiles_of_different_brightness_fade_into_each_other() {
    let (w, h, scale) = (112, 64, 4);
    let tiling = [TileAxis::new(w, 64, 16, 1), TileAxis::new(h, 64, 16, 1)];
    let mut image = TiledImage::new([0, 1, 2].map(|_| vec![0.5; w * h]), w, scale, tiling);
    for (tile, level) in [(0, -0.5), (1, 0.5)] {
        image.add(tile, &vec![level; 3 * 256 * 256], scale);
    }
    let [plane, ..] = image.finish(ColorFix::None, (w * scale, h * scale), scale);
    for row in plane.chunks_exact(w * scale) {
        assert_eq!((row[0], row[w * scale - 1]), (0.25, 0.75));
        let steps = row.windows(2).map(|p| p[1] - p[0]);
        let steepest = steps.clone().fold(0.0, f32::max);
        // The maximum slope of a raised cosine over 64 pixels is pi / 2 / 64.
        assert!(steepest < 0.5 * 1.58 / 64.0, "{steepest}");
        assert!(steps.clone().all(|s| s > -1e-6));
    }
}

fn frame(info: FrameInfo, value: impl Fn(usize, usize) -> f32) -> Frame {
    let mut frame = Frame::new(info).unwrap();
    for (c, at) in info.format.components().iter().enumerate() {
        let (w, h) = (info.format).component_size(at.component, info.width, info.height);
        let plane: Vec<f32> = (0..w * h).map(|i| value(c, i)).collect();
        frame.as_mut().write(at.component, &plane).unwrap();
    }
    frame
}

fn run(runner: &mut Runner, src: &Frame, to: (usize, usize), options: &Options) -> Frame {
    let mut dst = Frame::new(src.info().with_size(to.0, to.1)).unwrap();
    let result = runner.run(&src.as_ref(), &mut dst.as_mut(), options, None);
    result.unwrap();
    dst
}

fn mean(frame: &Frame, component: Component) -> f32 {
    let plane = frame.as_ref().read_plane(component).unwrap();
    plane.iter().sum::<f32>() / plane.len() as f32
}

/// The networks return grey, so the colours come from the input, by the matrix of the frame.
#[test]
fn a_flat_colour_keeps_its_colour_in_every_format_matrix_and_size() {
    let sizes = [(1, 1), (5, 3), (8, 8), (11, 2)];
    for (i, format) in PixelFormat::ALL.into_iter().enumerate() {
        let (w, h) = sizes[i % sizes.len()];
        let mut info = FrameInfo::new(format, w, h);
        let matrix = [Matrix::Bt601, Matrix::Bt709, Matrix::Bt2020][i % 3];
        let range = [Range::Limited, Range::Full][i % 2];
        info.colorimetry = Colorimetry { matrix, range };
        let colour = if format.is_rgb() {
            [0.7, 0.45, 0.35, 0.8]
        } else {
            [0.55, -0.12, 0.1, 0.0]
        };
        let flat = frame(info, |c, _| colour[c]);
        for fix in [ColorFix::Wavelet, ColorFix::Adain] {
            let options = Options {
                color_fix: fix,
                ..Options::default()
            };
            let large = run(&mut runner(&tiny()), &flat, (4 * w, 4 * h), &options);
            for at in format.components() {
                let (got, want) = (mean(&large, at.component), mean(&flat, at.component));
                let what = format!("{format:?} {w}x{h} {fix:?} {:?}", at.component);
                assert!(
                    (got - want).abs() < 1.5 / 255.0,
                    "{what}: {got}, not {want}"
                );
            }
        }
    }
}

#[test]
fn without_the_fix_the_colours_are_those_of_the_networks() {
    let flat = frame(FrameInfo::new(PixelFormat::Rgb, 8, 8), |c, _| {
        [0.7, 0.2, 0.3][c]
    });
    let large = run(&mut runner(&tiny()), &flat, (32, 32), &plain_options());
    assert!((mean(&large, Component::R) - 0.7).abs() > 0.05);
}

#[test]
fn ten_bits_are_not_rounded_to_eight() {
    let info = FrameInfo::new(PixelFormat::P010Le, 8, 8);
    let ramp = frame(
        info,
        |c, i| if c == 0 { 0.4 + i as f32 / 2000.0 } else { 0.0 },
    );
    let large = run(&mut runner(&tiny()), &ramp, (32, 32), &Options::default());
    let codes = large.plane(0).as_chunks::<2>().0;
    let fine = codes
        .iter()
        .filter(|c| (u16::from_le_bytes(**c) >> 6) % 4 != 0);
    assert!(fine.count() > 32 * 32 / 2);
}

#[test]
fn strength_weighs_between_interpolation_and_the_networks() {
    let info = FrameInfo::new(PixelFormat::I420_10Le, 10, 6);
    let src = frame(info, |c, i| {
        if c == 0 {
            0.3 + 0.004 * i as f32
        } else {
            0.02 * c as f32
        }
    });
    let mut runner = runner(&tiny());
    let mut at = |strength| {
        let options = Options {
            strength,
            ..Options::default()
        };
        let made = run(&mut runner, &src, (40, 24), &options);
        [Component::Y, Component::V].map(|c| made.as_ref().read_plane(c).unwrap())
    };
    let (none, half, full) = (at(0.0), at(0.5), at(1.0));
    let plain = interpolated(&src.as_ref(), Component::Y, &info.with_size(40, 24)).unwrap();
    assert!(
        none[0]
            .iter()
            .zip(&plain)
            .all(|(a, b)| (a - b).abs() < 1e-3)
    );
    assert!(
        none[0]
            .iter()
            .zip(&full[0])
            .any(|(a, b)| (a - b).abs() > 0.02)
    );
    for ((n, h), f) in none.iter().zip(&half).zip(&full) {
        for ((n, h), f) in n.iter().zip(h).zip(f) {
            assert!((h - 0.5 * (n + f)).abs() < 1.6 / 876.0, "{n} {h} {f}");
        }
    }
}

#[test]
fn smaller_sizes_are_shrunk_from_the_native_scale() {
    let src = frame(FrameInfo::new(PixelFormat::Rgb, 12, 12), |c, i| {
        0.2 + 0.2 * c as f32 + 0.002 * i as f32
    });
    let mut runner = runner(&tiny());
    let options = plain_options();
    let whole = run(&mut runner, &src, (48, 48), &options);
    for to in [(24, 24), (17, 30), (12, 12)] {
        let small = run(&mut runner, &src, to, &options);
        for c in [Component::R, Component::B] {
            assert!((mean(&small, c) - mean(&whole, c)).abs() < 0.01);
        }
    }
}

#[test]
fn a_face_model_keeps_the_size_of_its_input() {
    let mut runner = runner(&face());
    assert_eq!((runner.scale(), runner.steps()), (1, 4));
    assert_eq!(runner.noise(70, 3, &Options::default()).shape(), [8, 8, 16]);
    let (w, h) = (70, 3);
    let info = FrameInfo::new(PixelFormat::Rgb, w, h);
    let src = frame(info, |c, i| {
        0.3 + 0.1 * c as f32 + 0.2 * f32::from(i % 3 == 0)
    });
    for tile in [Tile::Whole, Tile::Side(64)] {
        let options = Options {
            tile,
            ..Options::default()
        };
        let made = run(&mut runner, &src, (w, h), &options);
        assert_ne!(made.plane(0), src.plane(0));
        assert!((mean(&made, Component::G) - mean(&src, Component::G)).abs() < 2.0 / 255.0);
        let options = Options {
            strength: 0.0,
            ..options
        };
        let none = run(&mut runner, &src, (w, h), &options);
        assert_eq!(none.plane(0), src.plane(0));
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let rgb = image(20, 10);
    let options = Options {
        tile: Tile::Side(16),
        tile_overlap: 4,
        ..Options::default()
    };
    let made = [1, 2, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let mut runner = runner(&tiny());
        let run = || [0, 1].map(|_| restore(&mut runner, &rgb, 20, &options));
        pool.build().unwrap().install(run)
    });
    assert!(made.iter().flatten().all(|m| *m == made[0][0]));
}

#[test]
fn noise_follows_the_options() {
    let mut runner = runner(&tiny());
    let rgb = image(12, 9);
    let mut with = |change: fn(&mut Options)| {
        let mut options = plain_options();
        change(&mut options);
        restore(&mut runner, &rgb, 12, &options)
    };
    let seeded = with(|_| ());
    assert_ne!(seeded, with(|o| o.seed = 1));
    let given = with(|o| o.noise_field = Some(NoiseField::seeded(3, 16, 16, 0)));
    assert_eq!(seeded, given);
    let none = with(|o| o.noise = 0.0);
    let zeros = with(|o| o.noise_field = NoiseField::new(3, 16, 16, vec![0.0; 768]).ok());
    assert_eq!(none, zeros);
    assert_ne!(none, seeded);
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let mut runner = runner(&tiny());
    let mut with = |change: fn(&mut Options)| {
        let mut options = Options::default();
        change(&mut options);
        runner.restore(image(12, 9), 12, &options, None)
    };
    for result in [
        with(|o| o.steps = 0),
        with(|o| o.steps = 16),
        with(|o| o.noise_field = Some(NoiseField::seeded(3, 9, 12, 0))),
        with(|o| o.noise_field = Some(NoiseField::seeded(4, 16, 16, 0))),
    ] {
        assert!(matches!(result, Err(Error::Setting(_))));
    }
}

#[test]
fn progress_counts_every_pass_and_a_break_stops_the_frame() {
    let mut runner = runner(&tiny());
    let options = Options {
        tile: Tile::Side(8),
        tile_overlap: 0,
        steps: 2,
        ..Options::default()
    };
    let mut seen = Vec::new();
    let mut all = |p: Progress| {
        seen.push(p);
        ControlFlow::Continue(())
    };
    let rgb = image(16, 8);
    let result = runner.restore(rgb.clone(), 16, &options, Some(&mut all));
    assert!(result.is_ok());
    let expected = (0..=8).map(|done| Progress {
        done,
        total: 8,
        tiles: 2,
    });
    assert_eq!(seen, expected.collect::<Vec<_>>());

    for last in [0, 1, 2, 3, 7, 8] {
        let mut calls = 0;
        let mut stop = |p: Progress| {
            calls += 1;
            if p.done == last {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let result = runner.restore(rgb.clone(), 16, &options, Some(&mut stop));
        assert!(matches!(result, Err(Error::Cancelled)), "{last}");
        assert_eq!(calls, last + 1);
    }
}

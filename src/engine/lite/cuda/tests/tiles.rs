//! Samples in tiles, and latents of four channels.

use super::*;
use crate::engine::lite::cuda::plan::Plan;

/// A network without layers between the first and the last.
fn shallow(latent: LatentKind, r: usize) -> LiteModel {
    model(Architecture::Plain, latent, r, 16, 0)
}

#[test]
fn the_usual_frames_need_two_kernels_besides_convolutions() {
    use LatentKind::{Luma, Yuv};
    for (format, latent, r, tiled) in [
        (PixelFormat::Nv12, Luma, 2, (2, 1)),
        (PixelFormat::Nv21, Luma, 4, (2, 1)),
        (PixelFormat::I420, Luma, 2, (3, 1)),
        (PixelFormat::P010Le, Luma, 4, (2, 1)),
        (PixelFormat::Y444, Luma, 4, (3, 1)),
        (PixelFormat::Gray16Le, Luma, 2, (1, 1)),
        (PixelFormat::A420, Luma, 2, (4, 1)),
        (PixelFormat::Nv12, Yuv, 4, (2, 2)),
        (PixelFormat::I420, Yuv, 4, (3, 3)),
        // The planes of the latent are sums of three components.
        (PixelFormat::Gbr, Luma, 4, (3, 0)),
        // Chroma is interpolated.
        (PixelFormat::Y444, Yuv, 4, (1, 1)),
        (PixelFormat::Rgb, Luma, 4, (0, 0)),
        (PixelFormat::Yuy2, Luma, 4, (0, 0)),
    ] {
        for (width, height) in [(1280, 720), (720, 480), (640, 360)] {
            let src = FrameInfo::new(format, 640, 360);
            let plan = Plan::new(&shallow(latent, r), &src, &src.with_size(width, height));
            let found = plan.unwrap().tiled;
            assert_eq!(found, tiled, "{format:?} {latent:?} {r} {width}");
        }
    }

    let fake = emulated::device((8, 0), PLENTY);
    let src = frame(PixelFormat::Nv12, 64, 36, 1);
    let dst = src.info().with_size(128, 72);
    let mut runner = Runner::new(
        &context(&fake),
        &shallow(LatentKind::Luma, 2),
        *src.info(),
        dst,
        1,
    )
    .unwrap();
    let stages = runner.stages(&src.as_ref(), 1.0).unwrap();
    let kernels: Vec<_> = stages.iter().map(|s| (s.kernel, s.channels)).collect();
    let few = 4;
    let want = [
        ("tadsr_unpack_tiles", few),
        ("tadsr_conv16_of4", 16),
        ("tadsr_conv8", few),
    ];
    assert_eq!(kernels, want);
}

#[test]
fn tiles_of_all_kinds_compute_as_the_cpu() {
    use LatentKind::{Luma, Yuv};
    let fake = emulated::device((8, 0), PLENTY);
    fake.set_kernels(emulated::checked);
    let context = context(&fake);
    for (format, latent, r, from, to) in [
        // Several tiles in both directions, of one side that is not whole cells.
        (PixelFormat::Nv12, Luma, 2, (259, 17), (517, 33)),
        (PixelFormat::Nv21, Luma, 4, (131, 9), (523, 35)),
        (PixelFormat::I420, Luma, 4, (177, 12), (531, 36)),
        (PixelFormat::P010Le, Luma, 2, (200, 11), (300, 17)),
        // Sharpening without another size has three taps.
        (PixelFormat::Gray8, Luma, 2, (270, 21), (270, 21)),
        (PixelFormat::I420_10Le, Luma, 4, (80, 5), (271, 5)),
        (PixelFormat::Nv12, Yuv, 4, (150, 20), (300, 40)),
        (PixelFormat::P012Le, Yuv, 4, (100, 9), (200, 19)),
        (PixelFormat::I420, Yuv, 4, (300, 14), (534, 22)),
        // Another direction shrinks.
        (PixelFormat::I420, Luma, 2, (60, 40), (120, 34)),
    ] {
        let model = shallow(latent, r);
        let src = frame(format, from.0, from.1, 7);
        let dst = src.info().with_size(to.0, to.1);
        let plan = Plan::new(&model, src.info(), &dst).unwrap();
        assert!(plan.tiled.0 > 0 && plan.tiled.1 > 0, "{format:?}");
        let mut runner = Runner::new(&context, &model, *src.info(), dst, 1).unwrap();
        let mut got = Frame::new(dst).unwrap();
        runner.run(&src.as_ref(), &mut got.as_mut(), 1.0).unwrap();
        let error = difference(&got, &by_cpu(&model, &src, dst, 1.0));
        let max = 1 << (format.depth() - 8);
        assert!(error <= max, "{format:?} {latent:?} {r} {to:?}: {error}");
    }
}

#[test]
fn bands_of_latents_of_four_channels_have_the_same_result() {
    for format in [PixelFormat::Nv12, PixelFormat::I420, PixelFormat::P010Le] {
        let (model, src) = (shallow(LatentKind::Luma, 2), frame(format, 20, 130, 1));
        let dst = src.info().with_size(40, 260);
        let run = |memory| {
            let fake = emulated::device((8, 6), memory);
            let mut runner = Runner::new(&context(&fake), &model, *src.info(), dst, 1).unwrap();
            let mut out = Frame::new(dst).unwrap();
            runner.run(&src.as_ref(), &mut out.as_mut(), 1.0).unwrap();
            (runner.bands(), runner.memory(), out)
        };
        let (bands, memory, whole) = run(PLENTY);
        assert_eq!(bands, 1);
        for share in [90, 60] {
            let (bands, _, out) = run(memory * share / 100);
            assert!(bands > 1, "{format:?} {share}");
            assert_eq!(difference(&out, &whole), 0, "{format:?} {bands}");
        }
    }
}

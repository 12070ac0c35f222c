//! Frames through the public API: every format, odd sizes, padding, bad planes.

use proptest::{prelude::*, sample::select};
use tadsr::{
    Error,
    frame::{
        Component, Frame, FrameInfo, FrameMut, FrameRef, PixelFormat, Plane, PlaneMut, Range,
        resample::{Axis, Kernel, Options, Resampler},
    },
};

/// Value of the padding between rows, which must not change.
const PADDING: u8 = 0xa5;

/// Planes of a frame in external memory.
#[derive(Clone, Debug, PartialEq)]
struct Planes(Vec<(Vec<u8>, usize)>);

impl Planes {
    /// Allocates planes with `padding` bytes after each row but the last.
    fn new(info: &FrameInfo, padding: usize) -> Self {
        let planes = (0..info.format.planes()).map(|p| {
            let (row, rows) = info.format.plane_size(p, info.width, info.height);
            let stride = row + padding;
            (vec![PADDING; stride * (rows - 1) + row], stride)
        });
        Self(planes.collect())
    }

    fn as_ref(&self, info: FrameInfo) -> FrameRef<'_> {
        let planes = self.0.iter().map(|(data, stride)| Plane {
            data,
            stride: *stride,
        });
        FrameRef::new(info, planes.collect()).expect("planes fit")
    }

    fn as_mut(&mut self, info: FrameInfo) -> FrameMut<'_> {
        let planes = self.0.iter_mut().map(|(data, stride)| PlaneMut {
            data,
            stride: *stride,
        });
        FrameMut::new(info, planes.collect()).expect("planes fit")
    }

    /// Stores the codes of `next` in every component, in the layout of GStreamer.
    fn fill(&mut self, info: &FrameInfo, mut next: impl FnMut() -> u16) {
        for at in info.format.components() {
            let (w, h) = info
                .format
                .component_size(at.component, info.width, info.height);
            let (data, stride) = &mut self.0[at.plane];
            for y in 0..h {
                for x in 0..w {
                    let i = y * *stride + at.offset + x * at.step;
                    if info.format.depth() == 8 {
                        data[i] = next() as u8;
                    } else {
                        let codes = u32::from(next()) & ((1 << info.format.depth()) - 1);
                        let stored = (codes << info.format.shift()) as u16;
                        data[i..i + 2].copy_from_slice(&stored.to_le_bytes());
                    }
                }
            }
        }
        let filler = match info.format.name() {
            "RGBx" | "BGRx" => Some(3),
            "xRGB" | "xBGR" => Some(0),
            _ => None,
        };
        let luma = match info.format.name() {
            "YUY2" | "YVYU" => Some(0),
            "UYVY" | "VYUY" => Some(1),
            _ => None,
        };
        let (data, stride) = &mut self.0[0];
        for row in data.chunks_mut(*stride) {
            if let Some(byte) = filler {
                row[..4 * info.width]
                    .chunks_mut(4)
                    .for_each(|pixel| pixel[byte] = 255);
            }
            // A row of odd width ends with half a group, whose second luma repeats the first.
            if let (Some(byte), 1) = (luma, info.width % 2) {
                row[2 * info.width + byte] = row[2 * info.width - 2 + byte];
            }
        }
    }
}

fn read(frame: &FrameRef, component: Component) -> Vec<f32> {
    let info = frame.info();
    let (w, h) = info
        .format
        .component_size(component, info.width, info.height);
    let mut samples = vec![f32::NAN; w * h];
    frame
        .read(component, &mut samples)
        .expect("a component that is there");
    samples
}

fn any_info() -> impl Strategy<Value = FrameInfo> {
    let format = select(PixelFormat::ALL.to_vec());
    let range = select(vec![Range::Limited, Range::Full]);
    (format, 1..=9usize, 1..=7usize, range).prop_map(|(format, w, h, range)| {
        let mut info = FrameInfo::new(format, w, h);
        info.colorimetry.range = range;
        info
    })
}

proptest! {
    #[test]
    fn reading_and_writing_returns_every_byte_and_leaves_the_padding(
        info in any_info(), padding in 0..40usize, seed in any::<u16>(),
    ) {
        let mut planes = Planes::new(&info, padding);
        let mut code = seed;
        planes.fill(&info, || { code = code.wrapping_mul(25173).wrapping_add(13849); code >> 3 });
        let mut copy = Planes::new(&info, padding);
        for at in info.format.components() {
            let samples = read(&planes.as_ref(info), at.component);
            copy.as_mut(info).write(at.component, &samples).unwrap();
        }
        prop_assert_eq!(copy, planes);
    }

    #[test]
    fn writing_one_component_leaves_the_others(info in any_info(), which in any::<prop::sample::Index>()) {
        let mut planes = Planes::new(&info, 3);
        let mut code = 0;
        planes.fill(&info, || { code += 77; code });
        let all = info.format.components();
        let written = all[which.index(all.len())].component;
        let before: Vec<_> = all.iter().map(|c| read(&planes.as_ref(info), c.component)).collect();
        let (w, h) = info.format.component_size(written, info.width, info.height);
        planes.as_mut(info).write(written, &vec![0.25; w * h]).unwrap();
        for (at, before) in all.iter().zip(before) {
            let after = read(&planes.as_ref(info), at.component);
            if at.component == written {
                prop_assert!(after.iter().all(|v| (v - 0.25).abs() < 0.003));
            } else {
                prop_assert_eq!(after, before);
            }
        }
    }

    #[test]
    fn short_planes_and_any_stride_are_refused_or_fit(
        info in any_info(), len in 0..200usize, stride in prop_oneof![0..64usize, Just(usize::MAX), Just(usize::MAX / 2)],
    ) {
        let data = vec![0; len];
        let planes = vec![Plane { data: &data, stride }; info.format.planes()];
        let fits = (0..info.format.planes()).all(|p| {
            let (row, rows) = info.format.plane_size(p, info.width, info.height);
            stride >= row && (rows as u128 - 1) * stride as u128 + row as u128 <= len as u128
        });
        match FrameRef::new(info, planes) {
            Ok(frame) => {
                prop_assert!(fits);
                for at in info.format.components() {
                    read(&frame, at.component);
                }
            }
            Err(_) => prop_assert!(!fits),
        }
    }

    #[test]
    fn resampling_does_not_depend_on_the_number_of_threads(
        from in (1..300usize, 1..200usize), to in (1..400usize, 1..300usize),
        kernel in select(vec![Kernel::Bicubic, Kernel::Lanczos3, Kernel::Area]), antialias: bool,
    ) {
        let options = Options { antialias, ..Options::default() };
        let resampler = Resampler::new(
            Axis::new(from.0, to.0, kernel, options),
            Axis::new(from.1, to.1, kernel, options),
        );
        let src: Vec<f32> = (0..from.0 * from.1).map(|i| (i * i % 251) as f32 / 251.0).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut dst = vec![f32::NAN; to.0 * to.1];
            pool.install(|| resampler.run(&src, &mut dst));
            dst
        };
        let one = run(1);
        prop_assert!(one.iter().all(|v| v.is_finite()));
        prop_assert!(one == run(4));
    }
}

#[test]
fn every_code_of_every_format_and_range_survives() {
    for format in PixelFormat::ALL {
        for range in [Range::Limited, Range::Full] {
            // All codes of 16 bits in an odd width.
            let mut info = FrameInfo::new(format, 257, 256);
            info.colorimetry.range = range;
            let mut planes = Planes::new(&info, 0);
            let mut code = 0_u16;
            planes.fill(&info, || {
                code = code.wrapping_add(1);
                code
            });
            let mut copy = Planes::new(&info, 0);
            for at in format.components() {
                let samples = read(&planes.as_ref(info), at.component);
                copy.as_mut(info).write(at.component, &samples).unwrap();
            }
            assert!(copy == planes, "{format:?} {range:?}");
        }
    }
}

/// Returns a frame with the samples of `frame` in another format of the same components.
fn repacked(frame: &Frame, format: PixelFormat) -> Frame {
    let info = FrameInfo {
        format,
        ..*frame.info()
    };
    let mut out = Frame::new(info).unwrap();
    for at in format.components() {
        let samples = read(&frame.as_ref(), at.component);
        out.as_mut().write(at.component, &samples).unwrap();
    }
    out
}

#[test]
fn packed_pixels_hold_the_samples_of_planes() {
    use PixelFormat::*;
    let cases: [(PixelFormat, PixelFormat, &[usize]); 8] = [
        // For each sample of a group of two pixels: its component and its index in the row.
        (Yuy2, Y42b, &[0, 1, 0, 2]),
        (Yvyu, Y42b, &[0, 2, 0, 1]),
        (Uyvy, Y42b, &[1, 0, 2, 0]),
        (Vyuy, Y42b, &[2, 0, 1, 0]),
        (Argb, Gbr, &[3, 2, 0, 1]),
        (Abgr, Gbr, &[3, 1, 0, 2]),
        (Xrgb, Gbr, &[3, 2, 0, 1]),
        (Xbgr, Gbr, &[3, 1, 0, 2]),
    ];
    for (packed, planar, order) in cases {
        for width in [1, 2, 5, 8] {
            let mut frame = Frame::new(FrameInfo::new(planar, width, 3)).unwrap();
            for plane in 0..3 {
                let bytes = frame.plane_mut(plane).iter_mut().enumerate();
                bytes.for_each(|(i, byte)| *byte = (80 * plane + 3 * i + 1) as u8);
            }
            let with_alpha = packed.component(Component::A).is_some();
            let mut made = Frame::new(FrameInfo {
                format: packed,
                ..*frame.info()
            })
            .unwrap();
            for at in planar.components() {
                let samples = read(&frame.as_ref(), at.component);
                made.as_mut().write(at.component, &samples).unwrap();
            }
            let groups = if planar == Y42b {
                width.div_ceil(2)
            } else {
                width
            };
            let row = |plane: usize, y: usize| {
                let (len, _) = planar.plane_size(plane, width, 3);
                &frame.plane(plane)[y * len..][..len]
            };
            let mut want = Vec::new();
            for (y, group) in (0..3).flat_map(|y| (0..groups).map(move |g| (y, g))) {
                let mut luma = 2 * group;
                for &plane in order {
                    want.push(match plane {
                        0 if planar == Y42b => {
                            luma += 1;
                            row(0, y)[(luma - 1).min(width - 1)]
                        }
                        // Alpha that is not written, and filler.
                        3 => {
                            if with_alpha {
                                0
                            } else {
                                255
                            }
                        }
                        _ => row(plane, y)[group],
                    });
                }
            }
            assert_eq!(made.plane(0), want, "{packed:?} {width}");
            let back = repacked(&made, planar);
            for plane in 0..3 {
                assert_eq!(back.plane(plane), frame.plane(plane), "{packed:?} {width}");
            }
        }
    }
}

#[test]
fn formats_of_one_depth_hold_the_same_samples() {
    use PixelFormat::*;
    let pairs = [
        (Gbr, Rgb),
        (Argb, Rgba),
        (Abgr, Bgra),
        (Argb64Le, Rgba64Le),
        (P012Le, I420_12Le),
        (Yuy2, Y42b),
        (Vyuy, Nv16),
        (A420, A420),
    ];
    for (one, other) in pairs {
        let info = FrameInfo::new(one, 7, 5);
        let mut planes = Planes::new(&info, 0);
        let mut code = 1;
        planes.fill(&info, || {
            code = (code * 3) % 4093;
            code
        });
        let mut frame = Frame::new(info).unwrap();
        for (plane, (bytes, _)) in planes.0.iter().enumerate() {
            frame.plane_mut(plane).copy_from_slice(bytes);
        }
        let there = repacked(&frame, other);
        let back = repacked(&there, one);
        for at in one.components() {
            let c = at.component;
            assert_eq!(
                read(&there.as_ref(), c),
                read(&frame.as_ref(), c),
                "{one:?} {c:?}"
            );
        }
        for plane in 0..one.planes() {
            assert_eq!(back.plane(plane), frame.plane(plane), "{one:?}");
        }
    }
}

#[test]
fn large_planes_are_read_and_written_by_several_threads_alike() {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(4)
        .build()
        .unwrap();
    for format in [
        PixelFormat::Nv12,
        PixelFormat::Bgrx,
        PixelFormat::I420_10Le,
        PixelFormat::Yuy2,
        PixelFormat::Rgba64Le,
    ] {
        let info = FrameInfo::new(format, 501, 601);
        let mut planes = Planes::new(&info, 9);
        let mut code = 0;
        planes.fill(&info, || {
            code = (code + 7) % 1024;
            code
        });
        let mut copy = Planes::new(&info, 9);
        pool.install(|| {
            for at in format.components() {
                let samples = read(&planes.as_ref(info), at.component);
                copy.as_mut(info).write(at.component, &samples).unwrap();
            }
        });
        assert!(copy == planes, "{format:?}");
    }
}

#[test]
fn codes_beyond_the_nominal_range_survive() {
    let mut frame = Frame::new(FrameInfo::new(PixelFormat::I420, 2, 1)).unwrap();
    frame.plane_mut(0).copy_from_slice(&[1, 254]);
    let samples = read(&frame.as_ref(), Component::Y);
    assert!(samples[0] < -0.06 && samples[1] > 1.08, "{samples:?}");
    frame.as_mut().write(Component::Y, &[-1.0, 2.0]).unwrap();
    assert_eq!(frame.plane(0), [0, 255]);
}

#[test]
fn sizes_lengths_and_components_that_do_not_fit_are_errors() {
    let info = FrameInfo::new(PixelFormat::Nv12, 4, 4);
    let mut frame = Frame::new(info).unwrap();
    let message = |result: tadsr::Result<()>| match result {
        Err(Error::Frame(text)) => text,
        other => panic!("{other:?}"),
    };
    assert!(message(frame.as_ref().read(Component::R, &mut [0.0; 16])).contains("NV12"));
    assert!(message(frame.as_ref().read(Component::Y, &mut [0.0; 15])).contains("15 samples"));
    assert!(message(frame.as_mut().write(Component::U, &[0.0; 5])).contains("5 samples"));
    for (w, h) in [
        (0, 4),
        (4, 0),
        (usize::MAX, 4),
        (4, usize::MAX),
        (40_000, 4),
    ] {
        let info = info.with_size(w, h);
        let (owned, borrowed) = (Frame::new(info), FrameRef::new(info, vec![]));
        assert!(matches!(owned, Err(Error::Frame(_))), "{w}x{h}");
        assert!(matches!(borrowed, Err(Error::Frame(_))), "{w}x{h}");
    }
    let plane = Plane {
        data: &[0; 64],
        stride: 4,
    };
    let one = FrameRef::new(info, vec![plane]);
    assert!(matches!(one, Err(Error::Frame(_))));
}

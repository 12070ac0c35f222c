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
                        let stored = (next() & 0x3ff) << info.format.shift();
                        data[i..i + 2].copy_from_slice(&stored.to_le_bytes());
                    }
                }
            }
        }
        if matches!(info.format, PixelFormat::Rgbx | PixelFormat::Bgrx) {
            let (data, stride) = &mut self.0[0];
            for row in data.chunks_mut(*stride) {
                row[..4 * info.width]
                    .chunks_mut(4)
                    .for_each(|pixel| pixel[3] = 255);
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
            let mut info = FrameInfo::new(format, 64, 64);
            info.colorimetry.range = range;
            let mut planes = Planes::new(&info, 0);
            let mut code = 0;
            planes.fill(&info, || {
                code += 1;
                code - 1
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

#[test]
fn large_planes_are_read_and_written_by_several_threads_alike() {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(4)
        .build()
        .unwrap();
    for format in [PixelFormat::Nv12, PixelFormat::Bgrx, PixelFormat::I420_10Le] {
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

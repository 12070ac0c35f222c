//! Frames in pinned memory of the application.

use super::*;
use crate::{
    cuda::{HostAllocator, HostMemory},
    frame::{Plane, PlaneMut},
};

/// Returns pinned memory with a copy of `frame`, and the layout of its planes.
fn pinned(allocator: &HostAllocator, frame: &Frame) -> (HostMemory, Vec<[usize; 4]>) {
    let (bytes, planes) = spread(frame.info());
    let mut memory = allocator.allocate(bytes.len()).unwrap();
    memory.as_mut().copy_from_slice(&bytes);
    for (&[offset, stride, row, rows], plane) in planes.iter().zip(frame.as_ref().planes()) {
        for y in 0..rows {
            memory.as_mut()[offset + y * stride..][..row]
                .copy_from_slice(&plane.data[y * plane.stride..][..row]);
        }
    }
    (memory, planes)
}

fn as_ref<'a>(info: &FrameInfo, data: &'a [u8], planes: &[[usize; 4]]) -> FrameRef<'a> {
    let planes = planes.iter().map(|&[offset, stride, ..]| Plane {
        data: &data[offset..],
        stride,
    });
    FrameRef::new(*info, planes.collect()).unwrap()
}

fn as_mut<'a>(info: &FrameInfo, data: &'a mut [u8], planes: &[[usize; 4]]) -> FrameMut<'a> {
    let mut rest = data;
    let mut used = 0;
    let planes = planes.iter().map(|&[offset, stride, row, rows]| {
        let (_, after) = std::mem::take(&mut rest).split_at_mut(offset - used);
        let (data, after) = after.split_at_mut((rows - 1) * stride + row);
        used = offset + data.len();
        rest = after;
        PlaneMut { data, stride }
    });
    FrameMut::new(*info, planes.collect()).unwrap()
}

fn count(log: &[String], call: &str) -> usize {
    log.iter().filter(|c| *c == call).count()
}

#[test]
fn frames_in_pinned_memory_are_copied_once() {
    let fake = emulated::device((8, 0), PLENTY);
    let context = context(&fake);
    let allocator = context.host_allocator();
    for format in PixelFormat::ALL {
        let src = frame(format, 13, 7, 7);
        let dst = src.info().with_size(27, 14);
        let mut runner = Runner::new(&context, &small(), *src.info(), dst, 2).unwrap();
        let mut want = Frame::new(dst).unwrap();
        runner.run(&src.as_ref(), &mut want.as_mut(), 0.8).unwrap();

        let (input, from) = pinned(&allocator, &src);
        let input = as_ref(src.info(), input.as_ref(), &from);
        let (mut output, to) = pinned(&allocator, &Frame::new(dst).unwrap());
        fake.log();
        let mut out = as_mut(&dst, output.as_mut(), &to);
        runner.run(&input, &mut out, 0.8).unwrap();
        let log = fake.log();
        assert_eq!(count(&log, "upload_rows"), format.planes(), "{format:?}");
        assert_eq!(count(&log, "download_rows"), format.planes());
        assert_eq!(count(&log, "download"), 0);
        // Only the strength.
        assert_eq!(count(&log, "upload"), 1);
        for (plane, &[offset, stride, row, rows]) in to.iter().enumerate() {
            let bytes = &output.as_ref()[offset..];
            for y in 0..rows {
                let want = &want.plane(plane)[y * row..][..row];
                assert_eq!(&bytes[y * stride..][..row], want, "{format:?}");
                let padding = &bytes[y * stride + row..(y + 1) * stride - 1];
                assert!(y + 1 == rows || padding.iter().all(|&b| b == 0xee));
            }
        }
    }
}

#[test]
fn pinned_and_other_frames_alternate_without_a_difference() {
    let fake = emulated::device((8, 0), PLENTY);
    let other = emulated::device((8, 0), PLENTY);
    let (context, other) = (context(&fake), context(&other));
    let frames: Vec<Frame> = (0..12)
        .map(|seed| frame(PixelFormat::Nv12, 24, 16, seed))
        .collect();
    let (src, dst) = (*frames[0].info(), frames[0].info().with_size(48, 32));
    let mut runner = Runner::new(&context, &small(), src, dst, 3).unwrap();
    let mut alone = Runner::new(&context, &small(), src, dst, 1).unwrap();
    let mut check = |runner: &mut Runner, n: usize| {
        let mut want = Frame::new(dst).unwrap();
        alone
            .run(&frames[n].as_ref(), &mut want.as_mut(), 1.0)
            .unwrap();
        // Memory of another device is copied as any other.
        let allocator = (if n % 4 == 2 { &other } else { &context }).host_allocator();
        let (mut output, to) = pinned(&allocator, &Frame::new(dst).unwrap());
        let mut got = Frame::new(dst).unwrap();
        if n.is_multiple_of(3) {
            runner.receive(&mut got.as_mut()).unwrap();
        } else {
            let mut out = as_mut(&dst, output.as_mut(), &to);
            runner.receive(&mut out).unwrap();
            for (plane, &[offset, stride, row, rows]) in to.iter().enumerate() {
                for y in 0..rows {
                    got.plane_mut(plane)[y * row..][..row]
                        .copy_from_slice(&output.as_ref()[offset + y * stride..][..row]);
                }
            }
        }
        assert_eq!(difference(&got, &want), 0, "frame {n}");
    };
    for (n, frame) in frames.iter().enumerate() {
        if n >= 3 {
            check(&mut runner, n - 3);
        }
        if n % 2 == 0 {
            runner.submit(&frame.as_ref(), 1.0).unwrap();
        } else {
            let (mut input, from) = pinned(&context.host_allocator(), frame);
            let view = as_ref(&src, input.as_ref(), &from);
            runner.submit(&view, 1.0).unwrap();
            // The samples have been copied.
            input.as_mut().fill(0);
        }
    }
    for n in frames.len() - 3..frames.len() {
        check(&mut runner, n);
    }
}

#[test]
fn pinned_memory_outlives_its_device() {
    let src = frame(PixelFormat::I420, 24, 16, 1);
    let dst = src.info().with_size(48, 32);
    for lost in [false, true] {
        let fake = emulated::device((8, 0), PLENTY);
        let context = context(&fake);
        let allocator = context.host_allocator();
        let mut runner = Runner::new(&context, &small(), *src.info(), dst, 2).unwrap();
        let (mut output, to) = pinned(&allocator, &Frame::new(dst).unwrap());
        let mut out = as_mut(&dst, output.as_mut(), &to);
        runner.run(&src.as_ref(), &mut out, 1.0).unwrap();
        if lost {
            runner.submit(&src.as_ref(), 1.0).unwrap();
            fake.hang();
            let mut out = as_mut(&dst, output.as_mut(), &to);
            let error = runner.receive(&mut out).unwrap_err();
            assert!(matches!(error, Error::DeviceLost(_)), "{error}");
            assert!(allocator.allocate(1).is_err());
        }
        drop((runner, context, allocator));
        assert_eq!(fake.alive(), 1);
        output.as_mut().fill(3);
        assert!(output.as_ref().iter().all(|&b| b == 3));
        assert!(crate::cuda::is_pinned(&output.as_ref()[7..]));
        drop(output);
        assert_eq!(fake.alive(), 0);
        assert!(!crate::cuda::is_pinned(&[0]));
    }
}

#[test]
fn failures_of_copies_from_pinned_memory_are_reported() {
    let src = frame(PixelFormat::Nv12, 24, 16, 1);
    let dst = src.info().with_size(48, 32);
    for call in ["upload_rows", "download_rows", "synchronize_event"] {
        for after in 0..2 {
            let fake = emulated::device((8, 0), PLENTY);
            let context = context(&fake);
            let mut runner = Runner::new(&context, &small(), *src.info(), dst, 2).unwrap();
            let allocator = context.host_allocator();
            let (input, from) = pinned(&allocator, &src);
            let (mut output, to) = pinned(&allocator, &Frame::new(dst).unwrap());
            fake.fail(call, after, 719);
            let input = as_ref(src.info(), input.as_ref(), &from);
            let mut out = as_mut(&dst, output.as_mut(), &to);
            let error = runner.run(&input, &mut out, 1.0).unwrap_err();
            assert!(matches!(error, Error::DeviceLost(_)), "{error}");
            assert_eq!(runner.in_flight(), 0);
        }
    }
}

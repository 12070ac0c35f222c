use super::*;
use crate::{
    cuda::{driver::Driver, emulator::Fake},
    engine::lite::cuda::emulated,
    frame::{Component, PixelFormat},
};

fn plug(fake: &Arc<Fake>) -> Device {
    fake.plug();
    Device::Cuda(fake.info().ordinal)
}

fn image(seed: usize) -> Frame {
    let mut frame = Frame::new(FrameInfo::new(PixelFormat::I420, 24, 18)).unwrap();
    let samples: Vec<f32> = (0..24 * 18)
        .map(|i| 0.3 + ((i + 7 * seed) * 37 % 11) as f32 * 0.04)
        .collect();
    frame.as_mut().write(Component::Y, &samples).unwrap();
    frame
}

fn upscaled(upscaler: &mut Upscaler, frame: &Frame, to: FrameInfo) -> Frame {
    let mut out = Frame::new(to).unwrap();
    upscaler
        .upscale_into(&frame.as_ref(), &mut out.as_mut())
        .unwrap();
    out
}

/// Returns the maximum difference of two 8-bit frames, in codes.
fn difference(a: &Frame, b: &Frame) -> u8 {
    let planes = 0..a.info().format.planes();
    let pairs = planes.flat_map(|p| a.plane(p).iter().zip(b.plane(p)));
    pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn a_device_computes_as_the_cpu() {
    let fake = emulated::device((8, 0), 1 << 30);
    let device = plug(&fake);
    let mut cpu = Upscaler::load("tiny", Device::Cpu).unwrap();
    cpu.set_precision(Precision::F32).unwrap();
    let mut cuda = Upscaler::load("tiny", device).unwrap();
    assert_eq!(cuda.active_device(), device);
    assert_eq!(cuda.active_precision(2.0), Precision::F16);
    let frame = image(0);
    for (width, height) in [(48, 36), (96, 72), (40, 30)] {
        let to = frame.info().with_size(width, height);
        let (got, want) = (
            upscaled(&mut cuda, &frame, to),
            upscaled(&mut cpu, &frame, to),
        );
        assert!(difference(&got, &want) <= 1, "{width}x{height}");
        assert!(cuda.device_memory() > 0);
    }
    drop(cuda);
    assert_eq!(fake.alive(), 0);
}

#[test]
fn frames_in_flight_are_returned_in_order_and_exclude_other_sizes() {
    let fake = emulated::device((8, 0), 1 << 30);
    let mut cuda = Upscaler::load("tiny", plug(&fake)).unwrap();
    assert_eq!(cuda.queue_depth(), 2);
    cuda.set_queue_depth(3);
    let to = image(0).info().with_size(48, 36);
    let frames: Vec<Frame> = (0..3).map(image).collect();
    for frame in &frames {
        cuda.submit(&frame.as_ref(), to).unwrap();
    }
    assert_eq!(cuda.in_flight(), 3);
    // A further frame, one of another size and one outside of the queue are refused. A change of
    // the precision to the one in force keeps the frames in flight.
    let other = to.with_size(40, 30);
    assert!(cuda.submit(&frames[0].as_ref(), to).is_err());
    assert!(cuda.submit(&frames[0].as_ref(), other).is_err());
    let mut out = Frame::new(to).unwrap();
    let between = cuda.upscale_into(&frames[0].as_ref(), &mut out.as_mut());
    assert!(matches!(between, Err(Error::InFlight(_))));
    cuda.set_precision(Precision::F16).unwrap();
    let mut got = Vec::new();
    for _ in 0..3 {
        let mut out = Frame::new(to).unwrap();
        let times = cuda.receive(&mut out.as_mut()).unwrap();
        assert!(times.compute > 0.0);
        got.push(out);
    }
    assert!(cuda.receive(&mut out.as_mut()).is_err());
    for (frame, got) in frames.iter().zip(&got) {
        assert_eq!(difference(&upscaled(&mut cuda, frame, to), got), 0);
    }

    cuda.submit(&frames[0].as_ref(), to).unwrap();
    cuda.flush();
    assert_eq!(cuda.in_flight(), 0);
    cuda.submit(&frames[1].as_ref(), to).unwrap();
    cuda.receive(&mut out.as_mut()).unwrap();
    assert_eq!(difference(&out, &got[1]), 0);
}

#[test]
fn a_device_that_computes_wrongly_is_not_used() {
    let fake = emulated::device((8, 0), 1 << 30);
    fake.set_kernels(emulated::defective);
    let error = Upscaler::load("tiny", plug(&fake)).err().unwrap();
    assert!(
        matches!(&error, Error::Device(text) if text.contains("wrongly") && text.contains("tiny")),
        "{error}"
    );
    assert_eq!(fake.alive(), 0);
}

#[test]
fn unsupported_precisions_and_calls_are_errors() {
    let fake = emulated::device((8, 0), 1 << 30);
    let mut cuda = Upscaler::load("tiny", plug(&fake)).unwrap();
    for precision in [
        Precision::F32,
        Precision::Bf16,
        Precision::Int16,
        Precision::Int8,
    ] {
        let error = cuda.set_precision(precision).unwrap_err().to_string();
        assert!(
            error.contains("f16") && error.contains("device=cpu"),
            "{error}"
        );
    }
    let error = cuda.set_temporal(Temporal::Filter).unwrap_err();
    let on_device = format!("no setting 'temporal' on {}", cuda.active_device());
    assert!(
        matches!(&error, Error::Setting(text) if text.contains(&on_device)),
        "{error}"
    );
    cuda.set_temporal(Temporal::Off).unwrap();
    let mut cpu = Upscaler::load("tiny", Device::Cpu).unwrap();
    cpu.set_precision(Precision::F16).unwrap();
    assert!([Precision::F32, Precision::Bf16].contains(&cpu.active_precision(2.0)));
    cpu.set_queue_depth(4);
    assert_eq!((cpu.queue_depth(), cpu.in_flight()), (1, 0));
    let frame = image(0);
    let to = frame.info().with_size(48, 36);
    assert!(matches!(
        cpu.submit(&frame.as_ref(), to),
        Err(Error::InFlight(_))
    ));
    let mut out = Frame::new(to).unwrap();
    assert!(matches!(
        cpu.receive(&mut out.as_mut()),
        Err(Error::InFlight(_))
    ));
}

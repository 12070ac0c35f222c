//! Frames of any format, size and stride through the engine. The result must be that of the
//! formulas. Strides, borders and the number of threads must not change a bit, and planes that are
//! too short must be refused.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tadsr::{
    Device, Precision, Upscaler,
    engine::{Temporal, lite::cpu::reference::Reference},
    frame::{
        ChromaSite, Colorimetry, Frame, FrameInfo, FrameMut, FrameRef, Matrix, PixelFormat, Plane,
        PlaneMut, Range,
    },
    model::LiteModel,
};

/// A network with memory.
const MEMORY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../models/tiny-x2-memory.safetensors"
);

/// Pixels of the largest result that is compared with the formulas.
const MAX_COMPARED: usize = 2048;

#[derive(Arbitrary, Debug)]
struct Input {
    format: u8,
    width: u8,
    height: u8,
    matrix: u8,
    full: bool,
    site: [bool; 2],
    to: [u8; 2],
    precision: u8,
    temporal: u8,
    threads: u8,
    strength: u8,
    dials: [u8; 2],
    padding: u8,
    missing: u16,
    samples: Vec<u8>,
}

/// Planes with padded rows.
struct Padded {
    planes: Vec<Vec<u8>>,
    strides: Vec<usize>,
}

impl Padded {
    fn new(info: &FrameInfo, padding: usize, fill: u8) -> Self {
        let sizes =
            (0..info.format.planes()).map(|p| info.format.plane_size(p, info.width, info.height));
        let (planes, strides) = sizes
            .map(|(row, rows)| {
                (
                    vec![fill; (row + padding) * (rows - 1) + row],
                    row + padding,
                )
            })
            .unzip();
        Self { planes, strides }
    }

    fn planes(&self) -> Vec<Plane<'_>> {
        let planes = self.planes.iter().zip(&self.strides);
        planes
            .map(|(data, &stride)| Plane { data, stride })
            .collect()
    }

    fn planes_mut(&mut self) -> Vec<PlaneMut<'_>> {
        let planes = self.planes.iter_mut().zip(&self.strides);
        planes
            .map(|(data, &stride)| PlaneMut { data, stride })
            .collect()
    }
}

fn info(input: &Input, width: usize, height: usize) -> FrameInfo {
    let formats = PixelFormat::ALL;
    FrameInfo {
        format: formats[usize::from(input.format) % formats.len()],
        width,
        height,
        colorimetry: Colorimetry {
            matrix: [Matrix::Bt601, Matrix::Bt709, Matrix::Bt2020][usize::from(input.matrix) % 3],
            range: if input.full {
                Range::Full
            } else {
                Range::Limited
            },
        },
        chroma_site: ChromaSite {
            horizontal_cosited: input.site[0],
            vertical_cosited: input.site[1],
        },
    }
}

/// Checks that `result` is what the formulas make of `frame`, up to rounding.
fn compare(frame: &Frame, result: &Frame, dials: [f64; 2], strength: f32) {
    let infos = [*frame.info(), *result.info()];
    let ratio = |side: fn(&FrameInfo) -> usize| side(&infos[1]) as f64 / side(&infos[0]) as f64;
    let scale = ratio(|info| info.width).max(ratio(|info| info.height));
    let name = if scale > 2.0 { "tiny-x4" } else { "tiny-x2" };
    let model = LiteModel::find(name).unwrap().remove(0);
    let planes = Reference::new(&model, infos, dials, strength).upscale(&frame.as_ref());
    let mut want = Frame::new(infos[1]).unwrap();
    for (component, plane) in &planes {
        want.as_mut().write(*component, plane).unwrap();
    }
    for (component, plane) in &planes {
        let read = |frame: &Frame| {
            let mut samples = vec![0.0; plane.len()];
            frame.as_ref().read(*component, &mut samples).unwrap();
            samples
        };
        let (got, want) = (read(result), read(&want));
        let differences = got.iter().zip(&want).map(|(a, b)| 255.0 * (a - b).abs());
        let largest = differences.fold(0.0, f32::max);
        assert!(
            largest <= 1.2,
            "{component:?}: error of {largest} codes, {infos:?}, dials {dials:?}, strength {strength}"
        );
    }
}

fuzz_target!(|input: Input| {
    let (width, height) = (
        usize::from(input.width % 64),
        usize::from(input.height % 48),
    );
    let from = info(&input, width, height);
    // Zero sides, and scales from below 1 to above 4.
    let to = info(
        &input,
        width + width * usize::from(input.to[0]) / 64,
        height + height * usize::from(input.to[1]) / 64,
    );
    let Ok(mut frame) = Frame::new(from) else {
        return;
    };
    let mut samples = input.samples.iter().cycle();
    for p in 0..from.format.planes() {
        let plane = frame.plane_mut(p).iter_mut();
        plane.for_each(|v| *v = *samples.next().unwrap_or(&0));
    }

    let temporal = [Temporal::Off, Temporal::Filter, Temporal::Memory];
    let temporal = temporal[usize::from(input.temporal) % 3];
    let name = match temporal {
        Temporal::Memory => MEMORY,
        _ => "tiny",
    };
    let mut upscaler = Upscaler::load(name, Device::Cpu).unwrap();
    upscaler.set_temporal(temporal).unwrap();
    let [denoise, detail] = input.dials.map(|dial| f32::from(dial) / 255.0);
    upscaler.set_denoise(Some(denoise)).unwrap();
    // The network with memory lacks this dial.
    let _ = upscaler.set_detail(Some(detail));
    let precisions = [
        Precision::F32,
        Precision::Bf16,
        Precision::Int16,
        Precision::Int8,
        Precision::Auto,
    ];
    // The network with memory is not calibrated for integers.
    let precision = precisions[usize::from(input.precision) % precisions.len()];
    let _ = upscaler.set_precision(precision);
    upscaler
        .set_strength(f32::from(input.strength) / 255.0)
        .unwrap();

    let padding = usize::from(input.padding);
    let mut padded = Padded::new(&from, padding, 0xa5);
    for (p, plane) in padded.planes.iter_mut().enumerate() {
        let (row, _) = from.format.plane_size(p, width, height);
        let rows = plane
            .chunks_mut(row + padding)
            .zip(frame.plane(p).chunks(row));
        rows.for_each(|(to, from)| to[..row].copy_from_slice(from));
    }

    // A plane that lacks bytes is refused.
    let mut short = padded.planes();
    let last = short.len() - 1;
    let missing = usize::from(input.missing).clamp(1, short[last].data.len());
    short[last].data = &short[last].data[..short[last].data.len() - missing];
    assert!(FrameRef::new(from, short).is_err());

    let Ok(mut tight) = Frame::new(to) else {
        return;
    };
    let mut run = |threads: usize, from: &FrameRef, to: &mut FrameMut| {
        upscaler.set_threads(threads).unwrap();
        upscaler.reset();
        // Twice, so that the filter has a past.
        upscaler
            .upscale_into(from, to)
            .and_then(|()| upscaler.upscale_into(from, to))
    };
    let result = run(1, &frame.as_ref(), &mut tight.as_mut());
    let source = FrameRef::new(from, padded.planes()).unwrap();
    let mut wide = Padded::new(&to, padding, 0x5a);
    let mut target = FrameMut::new(to, wide.planes_mut()).unwrap();
    let again = run(1 + usize::from(input.threads % 3), &source, &mut target);
    assert_eq!(result.is_ok(), again.is_ok());
    if result.is_err() {
        return;
    }
    // The formulas are slow, and do not replace the colours of transparent pixels.
    let is_compared = to.width * to.height <= MAX_COMPARED && !to.format.has_alpha();
    if precision == Precision::F32 && temporal == Temporal::Off && is_compared {
        let dials = [denoise.into(), detail.into()];
        compare(&frame, &tight, dials, f32::from(input.strength) / 255.0);
    }
    for (p, plane) in wide.planes.iter().enumerate() {
        let (row, _) = to.format.plane_size(p, to.width, to.height);
        let rows = plane.chunks(row + padding).zip(tight.plane(p).chunks(row));
        for (wide, tight) in rows {
            assert_eq!(wide[..row], *tight);
            assert!(
                wide[row..].iter().all(|v| *v == 0x5a),
                "padding was written"
            );
        }
    }
});

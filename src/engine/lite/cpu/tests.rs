//! Comparison of networks and whole frames with plain formulas, one layer and one plane at a time.

use super::{
    Patches, Runner, calibrate,
    grid_io::GridIo,
    history::LIMIT,
    network::Network,
    reference::{Bases, Reference, inside, luma, network},
    scale,
};
use crate::{
    Precision,
    frame::{
        Component::{self, *},
        FrameInfo, FrameMut, FrameRef, PixelFormat, Plane, PlaneMut, Range,
    },
    model::{Calibration, Layer, LiteModel, Metadata},
    nn::lite::{
        Architecture, Condition, LatentKind, LatentStats, StudentConfig,
        latent::{Grid, grid_resampler},
    },
};
use proptest::{prelude::*, sample::select};

fn values(len: usize, size: f32, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
    };
    (0..len).map(|_| next()).collect()
}

/// Returns a model of `student` whose weights preserve the size of the signal.
pub(super) fn model(student: StudentConfig, seed: u32) -> LiteModel {
    let layers = student.layers().into_iter().enumerate();
    let layers = layers.map(|(i, spec)| {
        let seed = seed.wrapping_add(3 * i as u32);
        Layer::new(
            values(spec.co * spec.ci * 9, (0.5 / spec.ci as f32).sqrt(), seed),
            values(spec.co, 0.1, seed + 1),
            values(spec.co * 2, 0.1, seed + 2),
            spec,
        )
    });
    LiteModel {
        metadata: Metadata::lite("test", student, [1.0, 4.0]),
        stats: LatentStats::nominal(student.latent, student.r),
        layers: layers.collect(),
        calibration: None,
    }
}

prop_compose! {
    fn students()(
        plain: bool, luma: bool, r in 1usize..5, channels in 1usize..40, depth in 0usize..4,
    ) -> StudentConfig {
        let r = if luma { r } else { r.next_multiple_of(2) };
        StudentConfig {
            architecture: if plain { Architecture::Plain } else { Architecture::Residual },
            latent: if luma { LatentKind::Luma } else { LatentKind::Yuv },
            r,
            channels: channels.min(16 * r * r),
            depth,
            conditioning: Default::default(),
            memory: 0,
        }
    }
}

pub(super) fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(work)
}

fn run(network: &mut Network, threads: usize, z: &[f32], grid: Grid) -> Vec<f32> {
    let mut residual = vec![f32::NAN; grid.with_margin(0).len()];
    on_threads(threads, || {
        network.divide();
        network.run(&GridIo::new(z, grid, &mut residual));
    });
    residual
}

/// Returns the root mean square.
fn rms(values: impl ExactSizeIterator<Item = f32>) -> f64 {
    let count = values.len().max(1) as f64;
    (values.map(|v| f64::from(v * v)).sum::<f64>() / count).sqrt()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_network_computes_the_formula_on_any_grid_and_number_of_threads(
        student in students(), width in 1usize..50, height in 1usize..24, threads in 2usize..4,
        seed: u32,
    ) {
        let mut model = model(student, seed);
        let cells = Grid { width, height, channels: student.latent.channels(student.r), margin: 0 };
        let grid = cells.with_margin(student.layers().len());
        let z = values(grid.len(), 1.0, seed ^ 1);
        let patch = Grid { width: 50, height: 50, ..cells };
        let latents = [2, 3].map(|n| values(patch.len(), 1.0, seed ^ n)).concat();
        let patches = Patches { at: Condition::at(1.5), grid: patch, inputs: latents };
        model.calibration = Some(calibrate(&model, &[patches]));
        let want = inside(&network(&model, &Condition::at(1.5), &z, grid), grid);
        let size = rms(want.iter().copied());
        // The transform magnifies the rounding of bf16, most of all where few products are
        // summed and few values averaged. An error in the code is as large as the values.
        let limits = [
            (Precision::F32, 1e-5),
            (Precision::Bf16, 0.15),
            (Precision::Int16, 0.15),
            (Precision::Int8, 0.15),
        ];
        for (precision, error) in limits {
            let mut network = Network::new(&model, 1.5, (width, height), precision).unwrap();
            let one = run(&mut network, 1, &z, grid);
            let many = run(&mut network, threads, &z, grid);
            prop_assert!(one == many, "{threads} threads change the result in {precision}");
            let again = run(&mut network, 1, &z, grid);
            prop_assert!(one == again, "a second run changes the result in {precision}");
            let difference = rms(one.iter().zip(&want).map(|(a, b)| a - b));
            prop_assert!(
                difference <= error * size,
                "{precision}: error of {difference} for values of {size}"
            );
        }
    }

    #[test]
    fn a_frame_is_upscaled_as_by_the_formulas_on_any_number_of_threads(case in frames()) {
        let want = case.written(&case.by_the_formulas(&case.frame()));
        for precision in [Precision::F32, Precision::Bf16, Precision::Int16, Precision::Int8] {
            let one = case.run(1, precision);
            let many = case.run(case.threads, precision);
            prop_assert!(one == many, "threads change the result in {precision}");
            case.compare(&one, &want, precision)?;
            prop_assert!(one.padding_is_unchanged(case.dst()), "bytes between rows have changed");
        }
    }

    #[test]
    fn a_frame_is_mixed_with_the_previous_one_as_by_the_formulas_on_any_number_of_threads(
        case in frames(), share in 0.1f32..0.9,
    ) {
        let want = case.written(&case.filtered_by_the_formulas(share));
        for precision in [Precision::F32, Precision::Int16, Precision::Int8] {
            let one = case.run_filtered(1, precision, share);
            let many = case.run_filtered(case.threads, precision, share);
            prop_assert!(one == many, "threads change the result in {precision}");
            if precision == Precision::F32 {
                case.compare(&one, &want, precision)?;
            }
            prop_assert!(one.padding_is_unchanged(case.dst()), "bytes between rows have changed");
        }
    }
}

/// Planes of a frame with padding between rows.
#[derive(Clone, Debug, PartialEq)]
struct Memory(Vec<(Vec<u8>, usize)>);

/// Value of the padding.
const PADDING: u8 = 0xa5;

impl Memory {
    /// Creates planes of zeros with `padding` bytes after each row but the last.
    fn new(info: FrameInfo, padding: usize) -> Self {
        let planes = (0..info.format.planes()).map(|p| {
            let (row, rows) = info.format.plane_size(p, info.width, info.height);
            let stride = row + padding;
            let mut bytes = vec![PADDING; stride * (rows - 1) + row];
            bytes.chunks_mut(stride).for_each(|r| r[..row].fill(0));
            (bytes, stride)
        });
        Self(planes.collect())
    }

    fn as_ref(&self, info: FrameInfo) -> FrameRef<'_> {
        let planes = self.0.iter().map(|(data, stride)| Plane {
            data,
            stride: *stride,
        });
        FrameRef::new(info, planes.collect()).unwrap()
    }

    fn as_mut(&mut self, info: FrameInfo) -> FrameMut<'_> {
        let planes = self.0.iter_mut().map(|(data, stride)| PlaneMut {
            data,
            stride: *stride,
        });
        FrameMut::new(info, planes.collect()).unwrap()
    }

    fn read(&self, info: FrameInfo, component: Component) -> Vec<f32> {
        let (w, h) = info
            .format
            .component_size(component, info.width, info.height);
        let mut samples = vec![f32::NAN; w * h];
        self.as_ref(info).read(component, &mut samples).unwrap();
        samples
    }

    fn padding_is_unchanged(&self, info: FrameInfo) -> bool {
        self.0.iter().enumerate().all(|(p, (bytes, stride))| {
            let row = info.format.plane_size(p, info.width, info.height).0;
            let mut rows = bytes.chunks(*stride);
            rows.all(|r| r[row..].iter().all(|&b| b == PADDING))
        })
    }
}

/// A frame, a model and a larger size, all random.
#[derive(Clone, Debug)]
struct Case {
    src: FrameInfo,
    size: (usize, usize),
    student: StudentConfig,
    padding: [usize; 2],
    strength: f32,
    threads: usize,
    seed: u32,
}

prop_compose! {
    fn frames()(
        format in select(PixelFormat::ALL.to_vec()), full: bool, from in (1usize..34, 1usize..20),
        by in (1.0f64..4.0, 1.0f64..4.0), student in students(), padding: [bool; 2],
        strength in 0.2f32..1.0, threads in 2usize..4, seed: u32,
    ) -> Case {
        // The plan for whole planes resamples chroma in a way that the formulas do not.
        let subsampled = format.chroma_shift() == (1, 1) || format.is_gray();
        let latent = if subsampled { student.latent } else { LatentKind::Luma };
        let mut src = FrameInfo::new(format, from.0, from.1);
        src.colorimetry.range = if full { Range::Full } else { Range::Limited };
        let side = |len: usize, by: f64| (len as f64 * by).round() as usize;
        Case {
            src,
            size: (side(from.0, by.0), side(from.1, by.1)),
            student: StudentConfig { latent, ..student },
            padding: padding.map(|p| if p { 13 } else { 0 }),
            strength, threads, seed,
        }
    }
}

impl Case {
    fn dst(&self) -> FrameInfo {
        self.src.with_size(self.size.0, self.size.1)
    }

    fn model(&self) -> LiteModel {
        let mut model = model(self.student, self.seed);
        // Wide enough for the receptive field of all layers.
        let reference = self.reference(&model, 1.0);
        let margin = 2 * model.layers.len();
        let (grid, _, latents) = reference.latent(&self.frame().as_ref(self.src), margin);
        let patches = Patches {
            at: Condition::at(scale(&self.src, &self.dst())),
            grid,
            inputs: latents,
        };
        model.calibration = Some(calibrate(&model, &[patches]));
        model
    }

    /// Returns a frame with smooth content and some noise.
    fn frame(&self) -> Memory {
        let mut memory = Memory::new(self.src, self.padding[0]);
        for layout in self.src.format.components() {
            let c = layout.component;
            let (w, h) = self
                .src
                .format
                .component_size(c, self.src.width, self.src.height);
            let middle = if matches!(c, U | V) { 0.0 } else { 0.5 };
            let noise = values(w * h, 0.1, self.seed ^ 9);
            let wave =
                |i: usize| (i as f32 * 0.37).sin() * 0.2 + (i as f32 / w as f32).cos() * 0.15;
            let plane: Vec<f32> = (0..w * h).map(|i| middle + wave(i) + noise[i]).collect();
            memory.as_mut(self.src).write(c, &plane).unwrap();
        }
        memory
    }

    fn run(&self, threads: usize, precision: Precision) -> Memory {
        let (src, dst) = (self.src, self.dst());
        let (frame, mut out) = (self.frame(), Memory::new(dst, self.padding[1]));
        let mut runner = Runner::new(&self.model(), src, dst, precision).unwrap();
        assert_eq!(runner.precision(), precision);
        on_threads(threads, || {
            // Twice, because the buffers hold values of the first frame during the second.
            for strength in [1.0, self.strength] {
                let ran = runner.run(&frame.as_ref(src), &mut out.as_mut(dst), strength);
                ran.unwrap();
            }
        });
        out
    }

    fn reference<'a>(&self, model: &'a LiteModel, strength: f32) -> Reference<'a> {
        Reference::new(model, [self.src, self.dst()], [0.0; 2], strength)
    }

    fn luma(&self, planes: &Bases) -> Vec<f32> {
        luma(&self.src, planes)
    }

    /// Returns the planes of the result before they are rounded.
    fn by_the_formulas(&self, frame: &Memory) -> Bases {
        let model = self.model();
        let reference = self.reference(&model, self.strength);
        reference.upscale(&frame.as_ref(self.src))
    }

    /// Checks that the samples differ by no more than the precision explains.
    fn compare(
        &self,
        got: &Memory,
        want: &Memory,
        precision: Precision,
    ) -> Result<(), TestCaseError> {
        let dst = self.dst();
        for layout in dst.format.components() {
            let read = |frame: &Memory| frame.read(dst, layout.component);
            let pairs: Vec<_> = read(got).into_iter().zip(read(want)).collect();
            // In 8-bit codes, of which the standard deviation of the residual is about 10.
            let errors = pairs.iter().map(|(a, b)| (a - b).abs() * 255.0);
            let max = errors.fold(0.0f32, f32::max);
            let error = 255.0 * rms(pairs.iter().map(|(a, b)| a - b));
            let (allowed, mean) = match precision {
                Precision::F32 => (1.2, 0.35),
                Precision::Int16 => (4.0, 0.5),
                _ => (14.0, 1.6),
            };
            prop_assert!(
                max <= allowed && error <= mean,
                "{precision} {:?}: error of {max} codes at most, {error} on average",
                layout.component
            );
        }
        Ok(())
    }

    fn written(&self, planes: &Bases) -> Memory {
        let (dst, mut out) = (self.dst(), Memory::new(self.dst(), self.padding[1]));
        for (c, plane) in planes {
            out.as_mut(dst).write(*c, plane).unwrap();
        }
        out
    }

    /// Returns the frame with little noise on its left half and more on the right.
    fn next_frame(&self) -> Memory {
        let (last, mut next) = (self.frame(), self.frame());
        for layout in self.src.format.components() {
            let mut plane = last.read(self.src, layout.component);
            let (src, c) = (self.src, layout.component);
            let (width, _) = src.format.component_size(c, src.width, src.height);
            let noise = values(plane.len(), 0.1, self.seed ^ 11);
            for (i, (v, noise)) in plane.iter_mut().zip(noise).enumerate() {
                *v += if i % width < width / 2 {
                    0.05 * noise
                } else {
                    noise
                };
            }
            next.as_mut(self.src)
                .write(layout.component, &plane)
                .unwrap();
        }
        next
    }

    /// Returns the share of the previous result, up to `max`, for each pixel of the result of
    /// [`Self::next_frame`] after [`Self::frame`].
    fn shares(&self, max: f32) -> Vec<f32> {
        let inputs = [self.frame(), self.next_frame()].map(|frame| {
            let components = self.src.format.components().iter().map(|c| c.component);
            self.luma(&components.map(|c| (c, frame.read(self.src, c))).collect())
        });
        let change = inputs[0].iter().zip(&inputs[1]).map(|(a, b)| (a - b).abs());
        let (r, (w, h), mut change) = (self.student.r, self.size, change.collect::<Vec<_>>());
        let (columns, rows) = (w.div_ceil(r), h.div_ceil(r));
        if let Some(resampler) = grid_resampler((self.src.width, self.src.height), self.size, r) {
            let mut cells = vec![0.0; columns * rows];
            resampler.run(&change, &mut cells);
            change = cells;
        }
        let share = |i: usize| {
            let (x, y) = (i % w / r, i / w / r);
            let near = |v: usize, len: usize| [v.saturating_sub(1), v, (v + 1).min(len - 1)];
            let around = near(y, rows).map(|y| near(x, columns).map(|x| change[y * columns + x]));
            let mean = around.as_flattened().iter().sum::<f32>() / 9.0;
            max * (1.0 - mean / LIMIT).max(0.0).powi(2)
        };
        (0..w * h).map(share).collect()
    }

    /// Returns the planes of the result of [`Self::next_frame`] after [`Self::frame`], with shares
    /// up to `max` of the previous result.
    fn filtered_by_the_formulas(&self, max: f32) -> Bases {
        let last = self.luma(&self.by_the_formulas(&self.frame()));
        let mut planes = self.by_the_formulas(&self.next_frame());
        let pairs = last.into_iter().zip(self.luma(&planes));
        let mix = pairs
            .zip(self.shares(max))
            .map(|((last, new), share)| share * (last - new));
        let mix: Vec<f32> = mix.collect();
        for (component, plane) in &mut planes {
            if matches!(component, Y | R | G | B) {
                plane.iter_mut().zip(&mix).for_each(|(v, mix)| *v += mix);
            }
        }
        planes
    }

    /// Returns the result of [`Self::next_frame`] after [`Self::frame`], with shares up to `share`
    /// of the previous result.
    fn run_filtered(&self, threads: usize, precision: Precision, share: f32) -> Memory {
        let (src, dst) = (self.src, self.dst());
        let mut runner = Runner::new(&self.model(), src, dst, precision).unwrap();
        runner.set_share(share);
        let mut run = |frame: &Memory| {
            let mut out = Memory::new(dst, self.padding[1]);
            let ran = runner.run(&frame.as_ref(src), &mut out.as_mut(dst), self.strength);
            ran.unwrap();
            out
        };
        on_threads(threads, || {
            run(&self.frame());
            run(&self.next_frame())
        })
    }
}

#[test]
fn planes_are_mixed_with_those_of_the_previous_frame() {
    for format in [PixelFormat::Y444, PixelFormat::Rgb, PixelFormat::I420] {
        let case = Case {
            src: FrameInfo::new(format, 30, 17),
            size: (60, 34),
            student: StudentConfig::chroma(),
            padding: [0, 5],
            strength: 0.4,
            threads: 3,
            seed: 5,
        };
        let run = |threads, share| case.run_filtered(threads, Precision::F32, share);
        let (alone, filtered) = (run(1, 0.0), run(1, 0.6));
        assert_eq!(filtered, run(case.threads, 0.6));
        for component in [U, V]
            .into_iter()
            .filter(|c| format.component(*c).is_some())
        {
            let chroma = |out: &Memory| out.read(case.dst(), component);
            assert_eq!(chroma(&filtered), chroma(&alone));
        }
        let luma = |out: &Memory| {
            let components = format.components().iter().map(|c| c.component);
            case.luma(&components.map(|c| (c, out.read(case.dst(), c))).collect())
        };
        let last = luma(&case.run(1, Precision::F32));
        let (alone, filtered, shares) = (luma(&alone), luma(&filtered), case.shares(0.6));
        assert!(shares.iter().any(|s| *s > 0.3) && shares.contains(&0.0));
        for (i, share) in shares.iter().enumerate() {
            let want = alone[i] + share * (last[i] - alone[i]);
            let error = 255.0 * (filtered[i] - want).abs();
            assert!(error < 1.6, "{format:?} at {i}: {error}");
        }
    }
}

#[test]
fn without_calibration_integers_are_refused_and_auto_uses_floats() {
    let mut model = model(StudentConfig::tiny(2), 1);
    let integers = [Precision::Int16, Precision::Int8];
    assert!(!integers.contains(&Precision::Auto.resolve(&model).unwrap()));
    for precision in integers {
        let reason = precision.resolve(&model).unwrap_err().to_string();
        let named = reason.contains(&format!("not calibrated for {precision}"));
        assert!(named && reason.contains("tadsr-train quantize"), "{reason}");
    }
    let ranges = std::iter::repeat_n(vec![[-1.0, 1.0, 0.0]; 16], model.layers.len());
    model.calibration = Some(Calibration {
        ranges: ranges.collect(),
    });
    for precision in integers {
        assert_eq!(precision.resolve(&model).unwrap(), precision);
    }
    assert_ne!(Precision::Auto.resolve(&model).unwrap(), Precision::Auto);
}

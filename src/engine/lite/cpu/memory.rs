//! Memory of a network with memory: its previous result and state, moved along with the picture.
//!
//! Before the network runs, the motion of the whole frame is searched on the luma of the input, one
//! sample a cell. The inputs of the network are then made row by row. [`crate::nn::lite::memory`]
//! has the formulas.

use std::{marker::PhantomData, ops::Range};

use super::history::read_luma;
use crate::{
    Result,
    frame::{FrameInfo, FrameRef, resample::Resampler, zeros},
    kernels::{motion::BLOCK, shuffle::unshuffle, simd::Isa},
    model::LiteModel,
    nn::lite::{
        latent::grid_resampler,
        memory::{Tracker, gate},
    },
};

/// The previous frame.
pub(super) struct Memory {
    from: (usize, usize),
    to: (usize, usize),
    /// Side of a grid cell.
    r: usize,
    /// Columns and rows of the grid.
    grid: (usize, usize),
    /// Channels of the state.
    channels: usize,
    /// Reciprocal of the deviation of the residual.
    scale: Vec<f32>,
    /// Zeros, for [`unshuffle`].
    mean: Vec<f32>,
    /// From the input to the grid; `None` if a cell is a pixel of the input.
    resampler: Option<Resampler>,
    planes: Option<Planes>,
    /// The planes hold the previous frame.
    known: bool,
}

/// Planes for frames of one size.
struct Planes {
    /// Luma of the input.
    input: Vec<f32>,
    /// Luma of the grid, if its cells are not the pixels of the input.
    cells: Vec<f32>,
    tracker: Tracker,
    /// Luma of this and of the previous result before it was rounded, at full strength.
    results: [Vec<f32>; 2],
    /// State of this and of the previous frame.
    states: [Vec<f32>; 2],
    /// Difference that the network sees, for each cell.
    changes: Vec<f32>,
}

impl Memory {
    /// Creates the memory of `model` for frames `src` that become frames `dst`.
    pub fn new(model: &LiteModel, src: &FrameInfo, dst: &FrameInfo) -> Self {
        let student = &model.metadata.student;
        let (from, to, r) = ((src.width, src.height), (dst.width, dst.height), student.r);
        let std = &model.stats.residual_std;
        Self {
            from,
            to,
            r,
            grid: (to.0.div_ceil(r), to.1.div_ceil(r)),
            channels: student.memory,
            scale: std.iter().map(|std| 1.0 / std).collect(),
            mean: vec![0.0; std.len()],
            resampler: grid_resampler(from, to, r),
            planes: None,
            known: false,
        }
    }

    /// Forgets the previous frame.
    pub fn forget(&mut self) {
        self.known = false;
    }

    /// Takes `frame` as the next one. Returns what the network recalls for it. The memory counts as
    /// unknown until [`Self::complete`]. Runs on the current rayon pool.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if there is not enough memory, [`crate::Error::Frame`] if the frame
    /// is not valid.
    pub fn next(&mut self, frame: &FrameRef, strength: f32) -> Result<Recall<'_>> {
        let known = std::mem::take(&mut self.known);
        let planes = match &mut self.planes {
            Some(planes) => planes,
            none => {
                let cells = self.grid.0 * self.grid.1;
                let (result, state) = (self.to.0 * self.to.1, cells * self.channels);
                none.insert(Planes {
                    input: zeros(self.from.0 * self.from.1)?,
                    cells: zeros(if self.resampler.is_some() { cells } else { 0 })?,
                    tracker: Tracker::new(self.grid.0, self.grid.1),
                    results: [zeros(result)?, zeros(result)?],
                    states: [zeros(state)?, zeros(state)?],
                    changes: zeros(cells * self.scale.len())?,
                })
            }
        };
        let Planes {
            input,
            cells,
            tracker,
            results,
            states,
            changes,
        } = planes;
        if !known {
            tracker.forget();
        }
        read_luma(frame, input)?;
        let luma = match &self.resampler {
            Some(resampler) => {
                resampler.run(input, cells);
                cells
            }
            None => input,
        };
        let recalls = tracker.next(luma);
        results.swap(0, 1);
        states.swap(0, 1);
        let [result, last_result] = results;
        let [state, last_state] = states;
        Ok(Recall {
            r: self.r,
            grid: self.grid,
            size: self.to,
            z: self.scale.len(),
            channels: self.channels,
            whiten: (&self.mean, &self.scale),
            strength,
            tracker: recalls.then_some(tracker),
            last_result,
            last_state,
            result: Shared::new(result),
            state: Shared::new(state),
            changes: Shared::new(changes),
        })
    }

    /// Ends a frame whose result and state are stored.
    pub fn complete(&mut self) {
        self.known = true;
    }
}

/// Values that threads write in ranges that do not overlap.
struct Shared<'a> {
    values: *mut f32,
    len: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: `slice` requires that its callers do not overlap.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    fn new(values: &'a mut [f32]) -> Self {
        Self {
            values: values.as_mut_ptr(),
            len: values.len(),
            borrowed: PhantomData,
        }
    }

    /// Returns a range of the values.
    ///
    /// # Safety
    /// No other thread uses the range while the slice lives.
    ///
    /// # Panics
    /// If the range is outside.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, range: Range<usize>) -> &mut [f32] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?}"
        );
        // SAFETY: the range is inside, as just checked, and only this caller uses it.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(range.start), range.len()) }
    }
}

/// Previous result and state that a network recalls for a frame, and the planes for the new ones.
pub(super) struct Recall<'a> {
    r: usize,
    grid: (usize, usize),
    size: (usize, usize),
    /// Channels of the latent.
    z: usize,
    /// Channels of the state.
    channels: usize,
    whiten: (&'a [f32], &'a [f32]),
    /// Share of the residual in the luma that is stored.
    strength: f32,
    /// `None` without a past.
    tracker: Option<&'a Tracker>,
    last_result: &'a [f32],
    last_state: &'a [f32],
    result: Shared<'a>,
    state: Shared<'a>,
    changes: Shared<'a>,
}

/// Working memory of a block of columns.
#[derive(Default)]
pub(super) struct Scratch {
    moved: Vec<f32>,
    state: Vec<f32>,
    /// A row of the residual after the gates.
    residual: Vec<f32>,
}

impl Recall<'_> {
    /// Writes the inputs besides the latent, for the cells `x` of row `y`, to `out` from the
    /// channel behind the latent on, one cell every `step` floats. `base` are the `r` rows of luma
    /// of the cells. Cells outside of the frame repeat the border.
    ///
    /// # Safety
    /// No other thread does so for the same cells at the same time.
    pub unsafe fn inputs(
        &self,
        y: isize,
        x: Range<isize>,
        base: &[f32],
        out: &mut [f32],
        step: usize,
        scratch: &mut Scratch,
    ) {
        let (r, z, m) = (self.r, self.z, self.channels);
        let inputs = z + m + 1;
        let row = y.clamp(0, self.grid.1 as isize - 1) as usize;
        let inside = x.start.max(0) as usize..(x.end.min(self.grid.0 as isize)).max(0) as usize;
        if inside.is_empty() {
            return;
        }
        let skipped = (inside.start as isize - x.start) as usize;
        let (count, width) = (inside.len(), x.len() * r);
        let Some(tracker) = self.tracker else {
            for cell in out.chunks_mut(step) {
                cell[z..z + inputs].fill(0.0);
            }
            // SAFETY: as the caller promises.
            let changes = unsafe { self.changes(row, &inside) };
            changes.fill(0.0);
            return;
        };
        let field = tracker.field();
        // Differences of the moved result to the base. Samples beyond the frame do not matter.
        let samples = inside.start * r..(inside.end * r).min(self.size.0);
        scratch.moved.clear();
        scratch.moved.resize(count * r * r, 0.0);
        for (dy, line) in scratch.moved.chunks_exact_mut(count * r).enumerate() {
            let sample = (y * r as isize + dy as isize).clamp(0, self.size.1 as isize - 1);
            let at = (samples.start, sample as usize);
            let (line, rest) = line.split_at_mut(samples.len());
            field.warp_row(self.last_result, self.size.0, 1, BLOCK * r, at, line);
            rest.fill(line[line.len() - 1]);
            let base = &base[dy * width + skipped * r..];
            let all = line.iter_mut().chain(rest);
            all.zip(base).for_each(|(v, b)| *v -= b);
        }
        let cells = &mut out[skipped * step..];
        unshuffle(
            Isa::best(),
            r,
            &scratch.moved,
            count * r,
            self.whiten,
            &mut cells[z..],
            step,
        );
        scratch.state.resize(count * m, 0.0);
        let at = (inside.start, row);
        field.warp_row(
            self.last_state,
            self.grid.0,
            m,
            BLOCK,
            at,
            &mut scratch.state,
        );
        // SAFETY: as the caller promises.
        let changes = unsafe { self.changes(row, &inside) };
        let confidence = &tracker.confidence()[row * self.grid.0..][inside.clone()];
        let states = scratch.state.chunks_exact(m);
        let rows = changes.chunks_exact_mut(z).zip(states).zip(confidence);
        for (cell, ((changes, state), &confidence)) in cells.chunks_mut(step).zip(rows) {
            let cell = &mut cell[z..z + inputs];
            cell[..z].iter_mut().for_each(|v| *v *= confidence);
            changes.copy_from_slice(&cell[..z]);
            for (to, v) in cell[z..].iter_mut().zip(state) {
                *to = v * confidence;
            }
            cell[z + m] = confidence;
        }
        let mut repeat = |from: usize, to: Range<usize>| {
            for cell in to {
                out.copy_within(from * step + z..from * step + z + inputs, cell * step + z);
            }
        };
        repeat(skipped, 0..skipped);
        repeat(skipped + count - 1, skipped + count..x.len());
    }

    /// Takes the outputs of the network for the cells `x` of row `y`. Returns the residual, after
    /// the gates.
    ///
    /// # Safety
    /// As [`Self::inputs`].
    pub unsafe fn outputs<'s>(
        &self,
        y: usize,
        x: &Range<usize>,
        outputs: &[f32],
        scratch: &'s mut Scratch,
    ) -> &'s [f32] {
        let (z, m) = (self.z, self.channels);
        scratch.residual.resize(x.len() * z, 0.0);
        // SAFETY: as the caller promises.
        let (changes, state) = unsafe {
            let state = (y * self.grid.0 + x.start) * m..(y * self.grid.0 + x.end) * m;
            (self.changes(y, x), self.state.slice(state))
        };
        let row = y * self.grid.0;
        let confidence = self.tracker.map(|t| &t.confidence()[row..][x.clone()]);
        let cells = outputs.chunks_exact(2 * z + m);
        let to = scratch.residual.chunks_exact_mut(z);
        let to = to
            .zip(state.chunks_exact_mut(m))
            .zip(changes.chunks_exact(z));
        for (i, (cell, ((residual, state), changes))) in cells.zip(to).enumerate() {
            let (r, rest) = cell.split_at(z);
            let (gates, new) = rest.split_at(z);
            match confidence {
                Some(confidence) => {
                    let c = confidence[i];
                    for (((out, r), g), d) in residual.iter_mut().zip(r).zip(gates).zip(changes) {
                        *out = r + gate(*g) * (d - c * r);
                    }
                }
                None => residual.copy_from_slice(r),
            }
            for (to, v) in state.iter_mut().zip(new) {
                *to = v.clamp(-1.0, 1.0);
            }
        }
        &scratch.residual
    }

    /// Stores the result's `luma` in row `y` from column `x` on, whose residual is `residual`.
    ///
    /// # Safety
    /// No other thread does so for the same samples at the same time.
    pub unsafe fn store(&self, y: usize, x: usize, luma: &[f32], base: impl Iterator<Item = f32>) {
        let start = y * self.size.0 + x;
        // SAFETY: as the caller promises.
        let result = unsafe { self.result.slice(start..start + luma.len()) };
        let full = 1.0 / self.strength;
        for ((to, v), base) in result.iter_mut().zip(luma).zip(base) {
            *to = base + full * (v - base);
        }
    }

    /// Returns the differences that the network sees in the cells `x` of row `y`.
    ///
    /// # Safety
    /// As [`Self::inputs`].
    #[allow(clippy::mut_from_ref)]
    unsafe fn changes(&self, y: usize, x: &Range<usize>) -> &mut [f32] {
        let row = y * self.grid.0;
        // SAFETY: as the caller promises.
        unsafe {
            self.changes
                .slice((row + x.start) * self.z..(row + x.end) * self.z)
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::{
        super::{
            Runner, scale,
            tests::{model, on_threads},
        },
        *,
    };
    use crate::{
        Precision,
        frame::{
            Component, Frame, PixelFormat,
            resample::{Kernel, Resampler},
        },
        nn::lite::{
            Condition, StudentConfig,
            latent::{Grid, luma_slot, unshuffle},
            memory::ClipMotion,
        },
    };

    const FRAMES: usize = 4;

    fn student(r: usize) -> StudentConfig {
        StudentConfig {
            channels: 6,
            depth: 1,
            memory: 3,
            ..StudentConfig::tiny(r)
        }
    }

    /// Returns frame `t` of texture that moves by one and a half pixels to the right a frame, and a
    /// square that moves down over it.
    fn frame(info: FrameInfo, t: usize) -> Frame {
        let texture =
            |x: f32, y: f32| 0.5 + 0.2 * (x * 0.9).sin() + 0.2 * (y * 0.7 + x * 0.3).cos();
        let mut frame = Frame::new(info).unwrap();
        let plane = frame.plane_mut(0);
        for (i, v) in plane.iter_mut().enumerate() {
            let (x, y) = ((i % info.width) as f32, (i / info.width) as f32);
            let over = (10.0..20.0).contains(&x) && (8.0..18.0).contains(&(y - 2.0 * t as f32));
            let luma = if over {
                texture(3.0 * x, y - 2.0 * t as f32)
            } else {
                texture(x - 1.5 * t as f32, y)
            };
            *v = (luma * 255.0) as u8;
        }
        frame
    }

    /// Returns the luma of the results before they are rounded.
    fn run(
        model: &LiteModel,
        (src, dst): (FrameInfo, FrameInfo),
        strength: f32,
        threads: usize,
    ) -> Vec<Vec<f32>> {
        run_with(model, (src, dst), strength, threads, |_| {})
    }

    /// As [`run`]. Calls `before` before each frame.
    fn run_with(
        model: &LiteModel,
        (src, dst): (FrameInfo, FrameInfo),
        strength: f32,
        threads: usize,
        before: impl Fn(&mut Runner) + Send + Sync,
    ) -> Vec<Vec<f32>> {
        let mut runner = Runner::new(model, src, dst, Precision::F32).unwrap();
        on_threads(threads, || {
            let frames = (0..FRAMES).map(|t| {
                let mut out = Frame::new(dst).unwrap();
                before(&mut runner);
                runner
                    .run(&frame(src, t).as_ref(), &mut out.as_mut(), strength)
                    .unwrap();
                let planes = runner.memory.as_ref().and_then(|m| m.planes.as_ref());
                planes.unwrap().results[0].clone()
            });
            frames.collect()
        })
    }

    /// Returns the luma of the results as the network for training computes them.
    fn by_the_student(model: &LiteModel, src: FrameInfo, dst: FrameInfo) -> Vec<Vec<f32>> {
        let (student, stats) = (model.metadata.student, &model.stats);
        let (r, size) = (student.r, (dst.width, dst.height));
        let grid = Grid::new(student.latent, r, size.0, size.1);
        let resampler = |component| {
            let bicubic = Kernel::Bicubic;
            Resampler::for_component(&src, component, size.0, size.1, bicubic, false).unwrap()
        };
        let to_grid = grid_resampler((src.width, src.height), size, r);
        let (mut bases, mut z, mut lumas) = (Vec::new(), Vec::new(), Vec::new());
        for t in 0..FRAMES {
            let mut luma = vec![0.0; src.width * src.height];
            frame(src, t)
                .as_ref()
                .read(Component::Y, &mut luma)
                .unwrap();
            let mut base = vec![0.0; size.0 * size.1];
            resampler(Component::Y).run(&luma, &mut base);
            let mut latent = vec![0.0; grid.len()];
            let (mean, std) = (&stats.input_mean, &stats.input_std);
            unshuffle(&base, size.0, luma_slot(r), grid, mean, std, &mut latent);
            z.extend(latent);
            bases.push(base);
            lumas.push(match &to_grid {
                Some(to_grid) => {
                    let mut cells = vec![0.0; grid.width * grid.height];
                    to_grid.run(&luma, &mut cells);
                    cells
                }
                None => luma,
            });
        }
        let motion = ClipMotion::find((1, FRAMES), (grid.width, grid.height, r), |_, t| {
            lumas[t].clone()
        });
        let clips = motion.tensors(stats, &Device::Cpu).unwrap();
        let shape = (FRAMES, grid.height, grid.width, grid.channels);
        let z = Tensor::from_vec(z, shape, &Device::Cpu).unwrap();
        let at = Condition::at(scale(&src, &dst));
        let network = model.student().unwrap();
        let residual = network.forward_clips(&z, &at, &clips).unwrap();
        let result = |(t, mut base): (usize, Vec<f32>)| {
            let residual = residual.get(t).unwrap().flatten_all().unwrap();
            let residual = residual.to_vec1::<f32>().unwrap();
            let (slot, gain) = (luma_slot(r), &stats.residual_std);
            crate::nn::lite::latent::shuffle_add(&residual, slot, grid, gain, &mut base, size.0);
            base
        };
        bases.into_iter().enumerate().map(result).collect()
    }

    fn info(width: usize, height: usize) -> FrameInfo {
        FrameInfo::new(PixelFormat::Gray8, width, height)
    }

    /// The network for training pads with zeros, so the border is left out.
    #[test]
    fn results_are_those_of_the_network_for_training() {
        let cases = [
            (2, (60, 52), (120, 104)),
            (2, (72, 64), (108, 96)),
            (4, (60, 52), (240, 208)),
        ];
        for (r, from, to) in cases {
            let model = model(student(r), 7);
            let (src, dst) = (info(from.0, from.1), info(to.0, to.1));
            let want = by_the_student(&model, src, dst);
            let got = run(&model, (src, dst), 1.0, 2);
            let border = 18 * r;
            for (t, (got, want)) in got.iter().zip(&want).enumerate() {
                let mut differences = 0.0f32;
                for y in border..to.1 - border {
                    for x in border..to.0 - border {
                        let i = y * to.0 + x;
                        differences = differences.max((got[i] - want[i]).abs());
                    }
                }
                assert!(differences < 2e-4, "r {r} {to:?} frame {t}: {differences}");
            }
            let alone = run_with(&model, (src, dst), 1.0, 2, Runner::forget);
            assert_eq!(alone[0], got[0]);
            let change = got[3].iter().zip(&alone[3]).map(|(a, b)| (a - b).abs());
            assert!(change.fold(0.0, f32::max) > 1e-3, "without memory, r {r}");
        }
    }

    /// The luma of the result of a network without memory is that of the first frame of one with.
    #[test]
    fn a_frame_without_a_past_is_that_of_the_network_without_memory() {
        let model = model(student(2), 5);
        let (src, dst) = (info(40, 30), info(80, 60));
        let out = |model: &LiteModel| {
            let mut runner = Runner::new(model, src, dst, Precision::F32).unwrap();
            let mut out = Frame::new(dst).unwrap();
            for t in 0..2 {
                runner.forget();
                let (from, to) = (frame(src, t), &mut out);
                runner.run(&from.as_ref(), &mut to.as_mut(), 1.0).unwrap();
            }
            out.plane(0).to_vec()
        };
        let (with, without) = (out(&model), out(&model.without_memory()));
        let worst = with.iter().zip(&without).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(worst <= Some(1), "{worst:?}");
    }

    /// Another scene has no past.
    #[test]
    fn a_cut_is_a_new_beginning() {
        let model = model(student(2), 9);
        let (src, dst) = (info(64, 48), info(128, 96));
        let dark = Frame::new(src).unwrap();
        let run = |frames: &[&Frame]| {
            let mut runner = Runner::new(&model, src, dst, Precision::F32).unwrap();
            let mut out = Frame::new(dst).unwrap();
            for frame in frames {
                runner.run(&frame.as_ref(), &mut out.as_mut(), 1.0).unwrap();
            }
            out.plane(0).to_vec()
        };
        let first = frame(src, 0);
        assert_eq!(run(&[&dark, &dark, &first]), run(&[&first]));
        assert_ne!(run(&[&frame(src, 1), &first]), run(&[&first]));
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads_and_little_on_strength() {
        for (r, to) in [(2, (122, 94)), (2, (91, 71)), (4, (183, 141))] {
            let model = model(student(r), 3);
            let sizes = (info(61, 47), info(to.0, to.1));
            let one = run(&model, sizes, 1.0, 1);
            assert_eq!(one, run(&model, sizes, 1.0, 3), "{to:?}");
            let weak = run(&model, sizes, 0.25, 1);
            for (a, b) in one.iter().flatten().zip(weak.iter().flatten()) {
                assert!((a - b).abs() < 1e-4, "{to:?}: {a}, not {b}");
            }
        }
    }
}

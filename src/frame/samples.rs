//! Reading and writing a frame's components as normalised f32 samples.
//!
//! Formulas (BT.601-7 section 2.5.3, BT.709-6 section 4, BT.2100 table 9 for full range), with b
//! bits and u = 2^(b-8):
//!
//! - limited range: luma, R, G, B are (code - 16u) / 219u, chroma is (code - 128u) / 224u
//! - full range: luma, R, G, B are code / (2^b - 1), chroma is (code - 2^(b-1)) / (2^b - 1)
//!
//! Alpha always has full range.

use std::{marker::PhantomData, ops::Range as Span};

use rayon::prelude::*;

use super::{
    Component, ComponentLayout, FrameInfo, FrameMut, FrameRef, PixelFormat, PlaneMut, Range,
};
use crate::{
    Error, Result,
    kernels::simd::{Isa, dispatch},
};

/// Minimum number of samples of a task for another thread.
const SAMPLES_PER_TASK: usize = 1 << 16;

impl FrameRef<'_> {
    /// Reads all samples of `component` into `dst`, rows without padding of the size
    /// [`PixelFormat::component_size`]. Runs on the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Frame`] if the format lacks the component or `dst` has the wrong length.
    pub fn read(&self, component: Component, dst: &mut [f32]) -> Result<()> {
        let access = Access::new(&self.info, component)?;
        access.check(dst.len())?;
        let plane = &self.planes[access.plane];
        let isa = Isa::best();
        let read_row = |y: usize, dst: &mut [f32]| {
            let row = &plane.data[y * plane.stride..][..access.row_bytes()];
            get(isa, dst, row, access.field, access.quant);
        };
        let rows = access.rows_per_task();
        let read_band = |(i, band): (usize, &mut [f32])| {
            for (y, dst) in band.chunks_exact_mut(access.width).enumerate() {
                read_row(i * rows + y, dst);
            }
        };
        if rows >= access.height {
            read_band((0, dst));
        } else {
            dst.par_chunks_mut(rows * access.width)
                .enumerate()
                .for_each(read_band);
        }
        Ok(())
    }
}

impl<'a> FrameMut<'a> {
    /// Writes all samples of `component` from `src`, rows without padding of the size
    /// [`PixelFormat::component_size`]. Values are rounded to the nearest code and clamped to the
    /// range of codes (0 to 255 at 8 bits), so values beyond the nominal limited range survive. NaN
    /// becomes code 0. Other components and the padding do not change, except that the x of RGBx
    /// and the like becomes 255. Runs on the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Frame`] if the format lacks the component or `src` has the wrong length.
    pub fn write(&mut self, component: Component, src: &[f32]) -> Result<()> {
        let access = Access::new(&self.info, component)?;
        access.check(src.len())?;
        let PlaneMut { data, stride } = &mut self.planes[access.plane];
        let stride = *stride;
        let end = access.height.saturating_mul(stride).min(data.len());
        let data = &mut data[..end];
        let isa = Isa::best();
        let write_band = |(bytes, src): (&mut [u8], &[f32])| {
            let rows = bytes.chunks_mut(stride);
            for (row, src) in rows.zip(src.chunks_exact(access.width)) {
                access.put(isa, &mut row[..access.row_bytes()], 0, src);
            }
        };
        let rows = access.rows_per_task();
        if rows >= access.height {
            write_band((data, src));
        } else {
            data.par_chunks_mut(stride.saturating_mul(rows))
                .zip(src.par_chunks(rows * access.width))
                .for_each(write_band);
        }
        Ok(())
    }

    /// Writes row `y` of `component`, as [`Self::write`] does, on this thread.
    ///
    /// # Errors
    /// [`Error::Frame`] if the format lacks the component.
    ///
    /// # Panics
    /// If there is no such row, or `src` has another length.
    pub(crate) fn write_row(&mut self, component: Component, y: usize, src: &[f32]) -> Result<()> {
        let access = Access::new(&self.info, component)?;
        assert!(y < access.height && src.len() == access.width, "row {y}");
        let PlaneMut { data, stride } = &mut self.planes[access.plane];
        let row = &mut data[y * *stride..][..access.row_bytes()];
        access.put(Isa::best(), row, 0, src);
        Ok(())
    }
}

/// One component of a frame, read row by row.
pub(crate) struct Source<'a> {
    data: &'a [u8],
    stride: usize,
    access: Access,
    isa: Isa,
}

impl<'a> Source<'a> {
    /// # Errors
    /// [`Error::Frame`] if the format lacks the component.
    pub(crate) fn new(frame: &FrameRef<'a>, component: Component) -> Result<Self> {
        let access = Access::new(&frame.info, component)?;
        let plane = frame.planes[access.plane];
        Ok(Self {
            data: plane.data,
            stride: plane.stride,
            access,
            isa: Isa::best(),
        })
    }

    /// Reads the samples `x` of row `y`.
    ///
    /// # Panics
    /// If the samples are outside of the component, or `dst` has the wrong length.
    pub(crate) fn read(&self, y: usize, x: Span<usize>, dst: &mut [f32]) {
        let step = self.access.field.step;
        assert!(
            x.end <= self.access.width && x.len() == dst.len(),
            "samples {x:?}"
        );
        let row = &self.data[y * self.stride..][x.start * step..x.end * step];
        get(self.isa, dst, row, self.access.field, self.access.quant);
    }
}

/// One component of a frame that several threads write, each in its own samples.
pub(crate) struct Sink<'a> {
    data: *mut u8,
    len: usize,
    stride: usize,
    access: Access,
    isa: Isa,
    frame: PhantomData<&'a mut [u8]>,
}

// SAFETY: `write` requires that its callers do not overlap.
unsafe impl Sync for Sink<'_> {}

impl<'a> Sink<'a> {
    /// Returns the sinks of the components of `frame`, in the order of its format.
    pub(crate) fn all(frame: &'a mut FrameMut) -> [Option<Self>; 4] {
        let mut sinks = [const { None }; 4];
        let components = frame.info.format.components();
        for (sink, layout) in sinks.iter_mut().zip(components) {
            let plane = &mut frame.planes[layout.plane];
            *sink = Access::new(&frame.info, layout.component)
                .ok()
                .map(|access| Self {
                    data: plane.data.as_mut_ptr(),
                    len: plane.data.len(),
                    stride: plane.stride,
                    access,
                    isa: Isa::best(),
                    frame: PhantomData,
                });
        }
        sinks
    }

    /// Writes the samples of row `y` from column `x` on, as [`FrameMut::write`] does.
    ///
    /// # Safety
    /// No other thread writes the same columns of this row at the same time, including other
    /// components of the same plane.
    ///
    /// # Panics
    /// If the samples are outside of the component.
    pub(crate) unsafe fn write(&self, y: usize, x: usize, src: &[f32]) {
        let (step, width) = (self.access.field.step, self.access.width);
        assert!(
            x <= width && src.len() <= width - x && y < self.access.height,
            "row {y} from {x}"
        );
        let (start, len) = (y * self.stride + x * step, self.access.bytes(x, src.len()));
        assert!(start + len <= self.len, "row {y} from {x}");
        // SAFETY: the bytes lie in the plane, as checked above, and only this caller writes them.
        let row = unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) };
        self.access.put(self.isa, row, x, src);
    }
}

/// Position and quantisation of one component's samples in a frame.
#[derive(Clone, Copy)]
struct Access {
    format: PixelFormat,
    component: Component,
    plane: usize,
    width: usize,
    height: usize,
    /// The sample after the last of a row repeats that: luma of YUY2 in rows of odd width, which
    /// end with half a group.
    repeats: bool,
    field: Field,
    quant: Quant,
}

impl Access {
    fn new(info: &FrameInfo, component: Component) -> Result<Self> {
        let format = info.format;
        let layout = format.component(component).ok_or_else(|| {
            Error::Frame(format!("{} has no component {component:?}", format.name()))
        })?;
        let (width, height) = format.component_size(component, info.width, info.height);
        let (row, _) = format.plane_size(layout.plane, info.width, info.height);
        Ok(Self {
            format,
            component,
            plane: layout.plane,
            width,
            height,
            repeats: row > width * layout.step,
            field: Field::new(format, layout),
            quant: Quant::new(info, component),
        })
    }

    fn check(&self, len: usize) -> Result<()> {
        if len != self.height * self.width {
            return Err(Error::Frame(format!(
                "{len} samples for {} rows of {} samples ({:?} of {})",
                self.height,
                self.width,
                self.component,
                self.format.name()
            )));
        }
        Ok(())
    }

    fn row_bytes(&self) -> usize {
        self.bytes(0, self.width)
    }

    /// Returns the number of bytes that [`Self::put`] writes for `len` samples from column `x` on.
    fn bytes(&self, x: usize, len: usize) -> usize {
        let repeated = self.repeats && len > 0 && x + len == self.width;
        (len + usize::from(repeated)) * self.field.step
    }

    /// Writes samples of a row from column `x` on, which is at the first byte of `row`.
    fn put(&self, isa: Isa, row: &mut [u8], x: usize, src: &[f32]) {
        put(isa, row, src, self.field, self.quant);
        if self.repeats && x + src.len() == self.width && !src.is_empty() {
            let Field { step, byte, .. } = self.field;
            let last = (src.len() - 1) * step + byte;
            row.copy_within(last..last + self.format.sample_bytes(), last + step);
        }
    }

    fn rows_per_task(&self) -> usize {
        if rayon::current_num_threads() == 1 {
            self.height
        } else {
            SAMPLES_PER_TASK.div_ceil(self.width)
        }
    }
}

/// Bits of a sample in its little-endian word of `step` bytes.
#[derive(Clone, Copy)]
struct Field {
    step: usize,
    /// Byte of the sample in a word of 3 bytes.
    byte: usize,
    /// Bits below the code.
    shift: u32,
    /// Bits of the code before the shift.
    mask: u32,
    /// Bits of the other components.
    others: u64,
    /// Bits of the word that are always set, the x of RGBx.
    set: u32,
}

impl Field {
    fn new(format: PixelFormat, at: ComponentLayout) -> Self {
        let stored = (1_u64 << (8 * format.sample_bytes())) - 1;
        Self {
            step: at.step,
            byte: at.offset,
            shift: 8 * at.offset as u32 + format.shift(),
            mask: (1 << format.depth()) - 1,
            others: !(stored << (8 * at.offset)),
            // Only words of 4 bytes have such bits.
            set: format.filler(at.plane) as u32,
        }
    }
}

/// The affine map between codes and values: code = value * scale + offset.
#[derive(Clone, Copy)]
pub(crate) struct Quant {
    pub scale: f32,
    pub offset: f32,
    pub max: f32,
}

impl Quant {
    pub fn new(info: &FrameInfo, component: Component) -> Self {
        let depth = info.format.depth();
        let unit = (1 << (depth - 8)) as f32;
        let max = ((1 << depth) - 1) as f32;
        let chroma = matches!(component, Component::U | Component::V);
        let limited = info.colorimetry.range == Range::Limited && component != Component::A;
        let (scale, offset) = match (limited, chroma) {
            (true, false) => (219.0 * unit, 16.0 * unit),
            (true, true) => (224.0 * unit, 128.0 * unit),
            (false, false) => (max, 0.0),
            (false, true) => (max, 128.0 * unit),
        };
        Self { scale, offset, max }
    }

    #[inline(always)]
    fn value(self, code: f32) -> f32 {
        // A division, unlike a product with the inverse, makes white exactly 1.
        (code - self.offset) / self.scale
    }

    #[inline(always)]
    fn code(self, value: f32) -> u32 {
        // Adding 2^23 moves the nearest integer to the low bits of the mantissa.
        let clamped = (value * self.scale + self.offset).max(0.0).min(self.max);
        (clamped + 8_388_608.0).to_bits() & 0xffff
    }
}

/// Reads one row; `src` holds `dst.len()` words.
fn get(isa: Isa, dst: &mut [f32], src: &[u8], field: Field, quant: Quant) {
    match field.step {
        1 => get1(isa, dst, src, quant),
        2 => get2(isa, dst, src, field, quant),
        3 => get3(isa, dst, src, field, quant),
        4 => get4(isa, dst, src, field, quant),
        _ => get8(isa, dst, src, field, quant),
    }
}

/// Writes one row; `dst` holds `src.len()` words.
fn put(isa: Isa, dst: &mut [u8], src: &[f32], field: Field, quant: Quant) {
    match field.step {
        1 => put1(isa, dst, src, quant),
        2 => put2(isa, dst, src, field, quant),
        3 => put3(isa, dst, src, field, quant),
        4 => put4(isa, dst, src, field, quant),
        _ => put8(isa, dst, src, field, quant),
    }
}

#[inline(always)]
fn get_byte<const BYTE: usize>(dst: &mut [f32], src: &[[u8; 3]], quant: Quant) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d = quant.value(f32::from(s[BYTE]));
    }
}

#[inline(always)]
fn put_byte<const BYTE: usize>(dst: &mut [[u8; 3]], src: &[f32], quant: Quant) {
    for (d, &s) in dst.iter_mut().zip(src) {
        d[BYTE] = quant.code(s) as u8;
    }
}

dispatch! {
    fn get1(dst: &mut [f32], src: &[u8], quant: Quant) {
        for (d, &s) in dst.iter_mut().zip(src) {
            *d = quant.value(f32::from(s));
        }
    }

    fn get2(dst: &mut [f32], src: &[u8], field: Field, quant: Quant) {
        let (shift, mask) = (field.shift, field.mask as u16);
        for (d, &s) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
            *d = quant.value(f32::from((u16::from_le_bytes(s) >> shift) & mask));
        }
    }

    fn get3(dst: &mut [f32], src: &[u8], field: Field, quant: Quant) {
        let src = src.as_chunks::<3>().0;
        match field.byte {
            0 => get_byte::<0>(dst, src, quant),
            1 => get_byte::<1>(dst, src, quant),
            _ => get_byte::<2>(dst, src, quant),
        }
    }

    fn get4(dst: &mut [f32], src: &[u8], field: Field, quant: Quant) {
        for (d, &s) in dst.iter_mut().zip(src.as_chunks::<4>().0) {
            let code = (u32::from_le_bytes(s) >> field.shift) & field.mask;
            // Processors convert signed integers faster.
            *d = quant.value(code as i32 as f32);
        }
    }

    fn get8(dst: &mut [f32], src: &[u8], field: Field, quant: Quant) {
        for (d, &s) in dst.iter_mut().zip(src.as_chunks::<8>().0) {
            let code = (u64::from_le_bytes(s) >> field.shift) as u32 & field.mask;
            *d = quant.value(code as i32 as f32);
        }
    }

    fn put1(dst: &mut [u8], src: &[f32], quant: Quant) {
        for (d, &s) in dst.iter_mut().zip(src) {
            *d = quant.code(s) as u8;
        }
    }

    fn put2(dst: &mut [u8], src: &[f32], field: Field, quant: Quant) {
        let (shift, others) = (field.shift, field.others as u16);
        for (d, &s) in dst.as_chunks_mut::<2>().0.iter_mut().zip(src) {
            let code = (quant.code(s) as u16) << shift;
            *d = ((u16::from_le_bytes(*d) & others) | code).to_le_bytes();
        }
    }

    fn put3(dst: &mut [u8], src: &[f32], field: Field, quant: Quant) {
        let dst = dst.as_chunks_mut::<3>().0;
        match field.byte {
            0 => put_byte::<0>(dst, src, quant),
            1 => put_byte::<1>(dst, src, quant),
            _ => put_byte::<2>(dst, src, quant),
        }
    }

    fn put4(dst: &mut [u8], src: &[f32], field: Field, quant: Quant) {
        for (d, &s) in dst.as_chunks_mut::<4>().0.iter_mut().zip(src) {
            let code = quant.code(s) << field.shift;
            let others = u32::from_le_bytes(*d) & field.others as u32;
            *d = (others | code | field.set).to_le_bytes();
        }
    }

    fn put8(dst: &mut [u8], src: &[f32], field: Field, quant: Quant) {
        for (d, &s) in dst.as_chunks_mut::<8>().0.iter_mut().zip(src) {
            let code = u64::from(quant.code(s)) << field.shift;
            *d = ((u64::from_le_bytes(*d) & field.others) | code).to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::Cpu;

    fn info(format: PixelFormat, range: Range) -> FrameInfo {
        let mut info = FrameInfo::new(format, 4, 2);
        info.colorimetry.range = range;
        info
    }

    #[test]
    fn nominal_ends_of_each_range_are_exact() {
        use Component::*;
        use PixelFormat::*;
        let cases = [
            (I420, Range::Limited, Y, 16, 235, 0.0, 1.0),
            (I420, Range::Limited, U, 16, 240, -0.5, 0.5),
            (I420, Range::Full, Y, 0, 255, 0.0, 1.0),
            (I420, Range::Full, V, 128, 255, 0.0, 127.0 / 255.0),
            (P010Le, Range::Limited, Y, 64, 940, 0.0, 1.0),
            (P010Le, Range::Limited, V, 64, 960, -0.5, 0.5),
            (P010Le, Range::Full, Y, 0, 1023, 0.0, 1.0),
            (P010Le, Range::Full, U, 512, 1023, 0.0, 511.0 / 1023.0),
            (Rgb, Range::Limited, G, 16, 235, 0.0, 1.0),
            (Rgba, Range::Limited, A, 0, 255, 0.0, 1.0),
            (P016Le, Range::Limited, Y, 4096, 60160, 0.0, 1.0),
            (P016Le, Range::Limited, U, 4096, 61440, -0.5, 0.5),
            (Gray16Le, Range::Full, Y, 0, 65535, 0.0, 1.0),
        ];
        for (format, range, component, low, high, at_low, at_high) in cases {
            let quant = Quant::new(&info(format, range), component);
            let name = format!("{format:?} {range:?} {component:?}");
            assert_eq!(quant.value(low as f32), at_low, "{name}");
            assert_eq!(quant.value(high as f32), at_high, "{name}");
            assert_eq!(quant.code(at_low), low, "{name}");
            assert_eq!(quant.code(at_high), high, "{name}");
        }
    }

    #[test]
    fn codes_round_to_nearest_and_stay_in_range() {
        let quant = Quant::new(&info(PixelFormat::Gray8, Range::Full), Component::Y);
        let code = |c: f32| quant.code(c / 255.0);
        assert_eq!([code(99.51), code(100.49), code(0.49)], [100, 100, 0]);
        assert_eq!([code(-3.0), code(255.4), code(1e9)], [0, 255, 255]);
        assert_eq!([quant.code(f32::NAN), quant.code(f32::INFINITY)], [0, 255]);
    }

    #[test]
    fn every_instruction_set_reads_and_writes_the_same_bits() {
        let bytes: Vec<u8> = (0..8 * 67).map(|i| (i * 37 + i / 7) as u8).collect();
        let values: Vec<f32> = (0..67).map(|i| i as f32 / 50.0 - 0.2).collect();
        for format in PixelFormat::ALL {
            for at in format.components() {
                let info = info(format, Range::Limited);
                let access = Access::new(&info, at.component).unwrap();
                let (field, quant) = (access.field, access.quant);
                for n in [1, 2, 15, 16, 31, 67] {
                    let run = |isa| {
                        let (mut read, mut written) = (vec![0.0; n], bytes[..n * at.step].to_vec());
                        get(isa, &mut read, &bytes[..n * at.step], field, quant);
                        put(isa, &mut written, &values[..n], field, quant);
                        (read, written)
                    };
                    let reference = run(Isa::Portable);
                    for isa in Isa::all(&Cpu::detected()) {
                        assert_eq!(run(isa), reference, "{isa:?} {format:?} {at:?} {n}");
                    }
                }
            }
        }
    }
}

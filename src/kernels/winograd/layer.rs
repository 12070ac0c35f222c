//! A layer: transformed weights, and bands of rows through them.

#[cfg(target_arch = "aarch64")]
use super::neon;
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{
    loops::{Floats, Format, Rounded, run},
    pack::Packed,
    sizes::{MAX_TILES, SIDE, TILE},
    tiles::{Input, Output},
    variant::Variant,
};
use crate::kernels::{
    conv::{Source, product},
    memory::aligned,
    simd::{Array, Isa},
};

/// A convolution ready for bands: transformed weights, bias and leaky ReLU.
#[derive(Clone, Debug)]
pub struct Winograd {
    variant: Variant,
    packed: Packed,
}

/// Rows of a band: slices that begin at its first tile.
pub struct Band<'a> {
    /// Input rows from one above the band to one below, from one column left of it:
    /// `TILE * tiles + 2` pixels of [`Winograd::input_step`] floats.
    pub input: [&'a [f32]; SIDE],
    /// Rows that are added to the output after the activation: `TILE * tiles` pixels of
    /// [`Winograd::output_step`] floats.
    pub skip: Option<[&'a [f32]; TILE]>,
    /// `TILE * tiles` pixels.
    pub output: [&'a mut [f32]; TILE],
    /// Floats from one output pixel to the next: [`Winograd::output_step`], whose padding is then
    /// written too, or the number of output channels.
    pub out_step: usize,
    /// Tiles in the band.
    pub tiles: usize,
}

impl Winograd {
    /// Creates a layer of `weights` `[co, ci, 3, 3]`, `bias` `[co]` and the leaky ReLU
    /// `max(x, slope * x)`; a slope of 1 is no activation.
    ///
    /// # Panics
    /// If the length of a slice does not fit the channels.
    pub fn new(
        [co, ci]: [usize; 2],
        weights: &[f32],
        bias: &[f32],
        slope: f32,
        variant: Variant,
    ) -> Self {
        assert_eq!(
            weights.len(),
            product([co, ci, 3, 3]),
            "weights {ci} to {co}"
        );
        let from = Source {
            weights,
            output: ci * 9,
            input: 9,
            flip: false,
        };
        Self::pack([co, ci], &from, bias, slope, variant)
    }

    /// As [`Self::new`], with weights in any order.
    pub(super) fn pack(
        channels: [usize; 2],
        from: &Source,
        bias: &[f32],
        slope: f32,
        variant: Variant,
    ) -> Self {
        Self {
            variant,
            packed: Packed::new(channels, from, bias, slope, variant),
        }
    }

    pub(super) fn isa(&self) -> Isa {
        self.variant.isa()
    }

    /// Output and input channels.
    pub(super) fn channels(&self) -> [usize; 2] {
        [self.packed.co, self.packed.ci]
    }

    /// Floats from one input pixel to the next.
    pub fn input_step(&self) -> usize {
        self.packed.input_step()
    }

    /// Floats of an output pixel with its padding.
    pub fn output_step(&self) -> usize {
        self.packed.output_step()
    }

    /// Convolves a band. `scratch` is reused from call to call.
    ///
    /// # Panics
    /// If a row is too short or the step of the output is neither of the two.
    pub fn run(&self, band: Band, scratch: &mut Vec<f32>) {
        assert!(band.tiles <= MAX_TILES, "{} tiles", band.tiles);
        let columns = TILE * band.tiles;
        let (step, out_step) = (self.input_step(), band.out_step);
        assert!(
            out_step == self.output_step() || out_step == self.packed.co,
            "{out_step} floats a pixel"
        );
        let long = |rows: &[&[f32]], len: usize| rows.iter().all(|r| r.len() >= len);
        assert!(long(&band.input, (columns + 2) * step), "input rows");
        if let Some(skip) = &band.skip {
            assert!(long(skip, columns * self.output_step()), "rows to add");
        }
        let row = columns * out_step;
        assert!(band.output.iter().all(|r| r.len() >= row), "output rows");
        let input = Input {
            rows: band.input.map(<[f32]>::as_ptr),
            step,
            tiles: band.tiles,
        };
        let output = Output {
            skip: band.skip.map(|rows| rows.map(<[f32]>::as_ptr)),
            rows: band.output.map(<[f32]>::as_mut_ptr),
            step: out_step,
            tiles: band.tiles,
        };
        // SAFETY: the rows are as long as the tiles need, as just checked.
        unsafe { self.run_all(&[input], &[output], scratch) }
    }

    /// Convolves tiles. There are as many of inputs as of outputs, not necessarily cut in the same
    /// places.
    ///
    /// # Safety
    /// The rows are as long as the tiles need: `TILE * tiles + 2` pixels of inputs, in which whole
    /// vectors of channels are read, and `TILE * tiles` pixels of outputs.
    pub(super) unsafe fn run_all(
        &self,
        inputs: &[Input<SIDE>],
        outputs: &[Output],
        scratch: &mut Vec<f32>,
    ) {
        let w = &self.packed;
        let scratch = aligned(scratch, w.scratch());
        // SAFETY: by the caller's promise; the scratch holds both transforms; the variant proves
        // the instruction set.
        unsafe {
            match self.variant {
                Variant::F32(isa) => run_isa::<Floats>(isa, w, inputs, outputs, scratch),
                Variant::Rounded(isa) => run_isa::<Rounded>(isa, w, inputs, outputs, scratch),
                #[cfg(target_arch = "x86_64")]
                Variant::Pairs(..) => x86::run_avx512_bf16(w, inputs, outputs, scratch),
                #[cfg(target_arch = "aarch64")]
                Variant::NeonPairs(..) => neon::run_bf16(w, inputs, outputs, scratch),
                _ => unreachable!("a variant of another architecture"),
            }
        }
    }
}

/// Runs the loops that are compiled for `isa`.
///
/// # Safety
/// As [`run`].
unsafe fn run_isa<K: Format>(
    isa: Isa,
    w: &Packed,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise; `isa` proves the instruction set.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => x86::run_avx512::<K>(w, inputs, outputs, scratch),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => x86::run_avx2::<K>(w, inputs, outputs, scratch),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) => neon::run_neon::<K>(w, inputs, outputs, scratch),
            _ => run::<K, Array<8>, Array<4>, 6, 3, 2, 1>(w, inputs, outputs, scratch),
        }
    }
}

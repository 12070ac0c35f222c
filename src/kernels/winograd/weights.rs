//! The gradient with respect to the weights, of some tiles.

#[cfg(target_arch = "aarch64")]
use super::neon;
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{
    gradient_loops::{AT_ONCE, Images, POINTS, Sums, gradients},
    sizes::{lanes, max_vectors},
};
use crate::kernels::{
    conv::blocks,
    memory::aligned,
    simd::{Array, Isa},
};

/// Returns the gradients of the kernels. `scratch` is reused from call to call.
///
/// # Safety
/// There are as many tiles of inputs as of outputs; their rows are as long as the tiles need, in
/// vectors of the channels.
pub(super) unsafe fn sums(images: &Images, isa: Isa, scratch: &mut Vec<f32>) -> Sums {
    let [ci, co] = images.channels;
    // The channels that fill vectors better are those in vectors.
    let fill = |c: usize| c as f64 / c.next_multiple_of(lanes(isa)) as f64;
    let swapped = fill(ci) > fill(co);
    let (rows, cols) = if swapped { (co, ci) } else { (ci, co) };
    let padded = cols.next_multiple_of(lanes(isa));
    let mut sums = Sums {
        swapped,
        rows,
        cols,
        padded,
        values: vec![0.0; 9 * rows * padded],
    };
    let steps = images.channels.map(|c| c.next_multiple_of(lanes(isa)));
    let len = POINTS * (rows * padded + AT_ONCE * (steps[0] + steps[1]));
    let scratch = aligned(scratch, len);
    let vectors = blocks(padded / lanes(isa), max_vectors(isa));
    // SAFETY: by the caller's promise; the scratch holds the sums and both transforms; `isa` proves
    // the instruction set.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => x86::gradients_avx512(images, &mut sums, &vectors, scratch),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => x86::gradients_avx2(images, &mut sums, &vectors, scratch),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) => neon::gradients_neon(images, &mut sums, &vectors, scratch),
            _ => gradients::<Array<8>, 6, 3, 1, 1>(images, &mut sums, &vectors, scratch),
        }
    }
    sums
}

//! The loops over tiles, generic over vectors and number formats: transforms of inputs and
//! products, and the products between them.
//!
//! The transforms are in this file because the compiler then allocates registers better: in a file
//! of their own, layers of 16 channels take 8 % longer.

use std::ops::Range;

use super::{
    pack::Packed,
    sizes::{FEW, PAIRS, POINTS, SIDE, TILE},
    tiles::{Input, Output, Walk},
};
use crate::kernels::simd::Lanes;

/// Number format in which transformed inputs are stored and multiplied.
///
/// # Safety
/// As [`Lanes`].
pub(super) trait Format {
    /// Input channels in a float's bits.
    const CHANNELS: usize;
    /// Stores the channels `channel` to `channel + L::N` of the point at `p`.
    unsafe fn store<L: Lanes>(v: L, p: *mut f32, channel: usize);
    /// Returns `sum + x * w`.
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L;
}

/// f32.
pub(super) struct Floats;

impl Format for Floats {
    const CHANNELS: usize = 1;

    #[inline(always)]
    unsafe fn store<L: Lanes>(v: L, p: *mut f32, channel: usize) {
        // SAFETY: by the caller's promise.
        unsafe { v.store(p.add(channel)) }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L {
        // SAFETY: by the caller's promise.
        unsafe { x.mul_add(w, sum) }
    }
}

/// f32, rounded to bfloat16.
pub(super) struct Rounded;

impl Format for Rounded {
    const CHANNELS: usize = 1;

    #[inline(always)]
    unsafe fn store<L: Lanes>(v: L, p: *mut f32, channel: usize) {
        // SAFETY: by the caller's promise.
        unsafe { Floats::store(v.round_bf16(), p, channel) }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L {
        // SAFETY: by the caller's promise.
        unsafe { Floats::dot(sum, x, w) }
    }
}

/// bfloat16 in the lower half of the memory that floats would take, multiplied in pairs.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) struct Pairs;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
impl Format for Pairs {
    const CHANNELS: usize = 2;

    #[inline(always)]
    unsafe fn store<L: Lanes>(v: L, p: *mut f32, channel: usize) {
        // SAFETY: by the caller's promise.
        unsafe { v.store_bf16(p.cast::<u16>().add(channel)) }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L {
        // SAFETY: by the caller's promise.
        unsafe { sum.dot_bf16(x, w) }
    }
}

/// Returns `B^T d` in one direction.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
unsafe fn transform_inputs<L: Lanes>(d: [L; SIDE]) -> [L; SIDE] {
    // SAFETY: by the caller's promise.
    unsafe {
        let (two, four) = (L::splat(2.0), L::splat(4.0));
        let (even, odd) = (d[2].neg_mul_add(four, d[4]), d[1].neg_mul_add(four, d[3]));
        let (even2, odd2) = (d[4].sub(d[2]), d[3].sub(d[1]));
        [
            first_input(d[0], d[2], d[4]),
            even.add(odd),
            even.sub(odd),
            odd2.mul_add(two, even2),
            odd2.neg_mul_add(two, even2),
            first_input(d[1], d[3], d[5]),
        ]
    }
}

/// Returns `4 a - 5 b + c`: the first row of the transform from inputs 0, 2, 4, the last from 1, 3,
/// 5.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
unsafe fn first_input<L: Lanes>(a: L, b: L, c: L) -> L {
    // SAFETY: by the caller's promise.
    unsafe { a.mul_add(L::splat(4.0), b.neg_mul_add(L::splat(5.0), c)) }
}

/// Returns `A^T m` in one direction.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
unsafe fn transform_products<L: Lanes>(m: [L; SIDE]) -> [L; TILE] {
    // SAFETY: by the caller's promise.
    unsafe {
        let (sum, difference) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (sum2, difference2) = (m[3].add(m[4]), m[3].sub(m[4]));
        [
            m[0].add(sum).add(sum2),
            difference2.mul_add(L::splat(2.0), difference),
            sum2.mul_add(L::splat(4.0), sum),
            difference2.mul_add(L::splat(8.0), difference).add(m[5]),
        ]
    }
}

/// Writes two rows of `B^T d B` of tiles `tiles` for a vector of channels: the first to `out[0]`,
/// the second to `out[1]`, with `tile_step` floats from one tile to the next and `point_step` from
/// one point to the next. A tile takes over the two columns that it shares with the one before.
///
/// # Safety
/// The tiles lie in the input, `out` holds the points of each, the instruction set of `L` is
/// enabled.
#[inline(always)]
pub(super) unsafe fn input_transform<K: Format, L: Lanes>(
    input: &Input<SIDE>,
    tiles: Range<usize>,
    pair: usize,
    channel: usize,
    out: [*mut f32; 2],
    [tile_step, point_step]: [usize; 2],
) {
    let step = input.step;
    // SAFETY: by the caller's promise.
    unsafe {
        let mut at = tiles.start * TILE * step + channel;
        let zero = L::splat(0.0);
        let (mut a, mut b) = ([zero; SIDE], [zero; SIDE]);
        for x in TILE..SIDE {
            (a[x], b[x]) = vertical(&input.rows, pair, at + (x - TILE) * step);
        }
        let [mut to_a, mut to_b] = out;
        for _ in tiles {
            (a[0], a[1], b[0], b[1]) = (a[4], a[5], b[4], b[5]);
            for x in 2..SIDE {
                (a[x], b[x]) = vertical(&input.rows, pair, at + x * step);
            }
            let (ta, tb) = (transform_inputs(a), transform_inputs(b));
            for x in 0..SIDE {
                K::store(ta[x], to_a.add(x * point_step), channel);
                K::store(tb[x], to_b.add(x * point_step), channel);
            }
            (to_a, to_b) = (to_a.add(tile_step), to_b.add(tile_step));
            at += TILE * step;
        }
    }
}

/// Returns two rows of `B^T d` in the column that begins at float `at` of each row: the first and
/// the last for `pair` 0, the second and the third for 1, the others for 2.
///
/// # Safety
/// The column lies in the rows; the instruction set of `L` is enabled.
#[inline(always)]
unsafe fn vertical<L: Lanes>(rows: &[*const f32; SIDE], pair: usize, at: usize) -> (L, L) {
    // SAFETY: by the caller's promise.
    unsafe {
        let d1 = L::load(rows[1].add(at));
        let d2 = L::load(rows[2].add(at));
        let d3 = L::load(rows[3].add(at));
        let d4 = L::load(rows[4].add(at));
        let (two, four) = (L::splat(2.0), L::splat(4.0));
        match pair {
            0 => (
                first_input(L::load(rows[0].add(at)), d2, d4),
                first_input(d1, d3, L::load(rows[5].add(at))),
            ),
            1 => {
                let (even, odd) = (d2.neg_mul_add(four, d4), d1.neg_mul_add(four, d3));
                (even.add(odd), even.sub(odd))
            }
            _ => {
                let (even, odd) = (d4.sub(d2), d3.sub(d1));
                (odd.mul_add(two, even), odd.neg_mul_add(two, even))
            }
        }
    }
}

/// Convolves all tiles, with products of `T1` to `T4` tiles by 1 to 4 vectors of output channels.
/// `S` are vectors of `FEW` lanes, for layers of as few channels.
///
/// # Safety
/// The rows are as long as the tiles need, `scratch` holds [`Packed::scratch`] floats; the
/// instruction set of `K`, `L` and `S` is enabled.
#[inline(always)]
pub(super) unsafe fn run<
    K: Format,
    L: Lanes,
    S: Lanes,
    const T1: usize,
    const T2: usize,
    const T3: usize,
    const T4: usize,
>(
    w: &Packed,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    let (step, max) = (w.input_step(), w.tiles_at_once());
    let transformed = scratch.as_mut_ptr();
    let (mut inputs, mut outputs) = (Walk::new(inputs), Walk::new(outputs));
    // SAFETY: by the caller's promise; a tile begins `TILE` pixels after its neighbour.
    unsafe {
        let (products, out_step) = match w.in_place() {
            true => (transformed, step),
            false => (transformed.add(max * POINTS * step), w.product_step()),
        };
        loop {
            let mut tiles = 0;
            while let Some((input, range)) = inputs.next(max - tiles) {
                let to = transformed.add(tiles * POINTS * step);
                tiles += range.len();
                match w.ci <= FEW {
                    true => input_transforms::<K, S>(w, input, range, to),
                    false => input_transforms::<K, L>(w, input, range, to),
                }
            }
            if tiles == 0 {
                return;
            }
            let from = (transformed.cast_const(), step, w.ci.div_ceil(K::CHANNELS));
            let (mut weights, mut channel) = (w.weights.as_ptr(), 0);
            for &vectors in &w.blocks {
                let to = (products.add(channel), out_step);
                match vectors {
                    1 => products_of::<K, L, T1, 1>(tiles, from, weights, to),
                    2 => products_of::<K, L, T2, 2>(tiles, from, weights, to),
                    3 => products_of::<K, L, T3, 3>(tiles, from, weights, to),
                    _ => products_of::<K, L, T4, 4>(tiles, from, weights, to),
                }
                weights = weights.add(POINTS * from.2 * vectors * L::N);
                channel += vectors * L::N;
            }
            let mut done = 0;
            while let Some((output, range)) = outputs.next(tiles - done) {
                for tile in range {
                    let products = products.add(done * POINTS * out_step).cast_const();
                    done += 1;
                    match w.co <= FEW {
                        true => output_transform::<S>(w, output, tile, (products, out_step)),
                        false => output_transform::<L>(w, output, tile, (products, out_step)),
                    }
                }
            }
        }
    }
}

/// Writes `B^T d B` of tiles `tiles`: the input channels of each tile and point.
///
/// # Safety
/// The tiles lie in the input, `out` holds `POINTS * step` floats for each, the instruction set of
/// `L` is enabled.
#[inline(always)]
unsafe fn input_transforms<K: Format, L: Lanes>(
    w: &Packed,
    input: &Input<SIDE>,
    tiles: Range<usize>,
    out: *mut f32,
) {
    let step = w.input_step();
    // SAFETY: by the caller's promise.
    unsafe {
        for channel in (0..step).step_by(L::N) {
            for (pair, rows) in PAIRS.iter().enumerate() {
                let out = rows.map(|row| out.add(row * SIDE * step));
                let steps = [POINTS * step, step];
                input_transform::<K, L>(input, tiles.clone(), pair, channel, out, steps);
            }
        }
    }
}

/// Multiplies the transformed inputs of `tiles` tiles, `T` at a time, with the weights of a block.
///
/// # Safety
/// There are `tiles` times `POINTS` inputs (pointer, floats of a point, input channels or pairs of
/// them) and results (pointer to the channels of the block, floats of a point), and `POINTS`
/// matrices of weights; the instruction set of `L` is enabled.
#[inline(always)]
unsafe fn products_of<K: Format, L: Lanes, const T: usize, const V: usize>(
    tiles: usize,
    (inputs, in_step, ci): (*const f32, usize, usize),
    weights: *const f32,
    (out, out_step): (*mut f32, usize),
) {
    // SAFETY: by the caller's promise.
    unsafe {
        for point in 0..POINTS {
            let weights = weights.add(point * ci * V * L::N);
            let (inputs, out) = (inputs.add(point * in_step), out.add(point * out_step));
            let (in_tile, out_tile) = (POINTS * in_step, POINTS * out_step);
            let mut tile = 0;
            macro_rules! by {
                ($t:expr) => {
                    while tiles - tile >= $t {
                        let from = (inputs.add(tile * in_tile), in_tile, ci);
                        product::<K, L, { $t }, V>(
                            from,
                            weights,
                            (out.add(tile * out_tile), out_tile),
                        );
                        tile += $t;
                    }
                };
            }
            by!(T);
            by!(4);
            by!(2);
            by!(1);
        }
    }
}

/// Multiplies `T` tiles by `V` vectors of output channels at one point.
///
/// # Safety
/// As [`products_of`], with the distances from tile to tile instead of from point to point.
#[inline(always)]
unsafe fn product<K: Format, L: Lanes, const T: usize, const V: usize>(
    (inputs, in_tile, ci): (*const f32, usize, usize),
    weights: *const f32,
    (out, out_tile): (*mut f32, usize),
) {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut sums = [[L::splat(0.0); V]; T];
        for i in 0..ci {
            let mut w = [L::splat(0.0); V];
            for (v, w) in w.iter_mut().enumerate() {
                *w = L::load(weights.add((i * V + v) * L::N));
            }
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(*inputs.add(t * in_tile + i));
                for v in 0..V {
                    sums[v] = K::dot(sums[v], x, w[v]);
                }
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                sum.store(out.add(t * out_tile + v * L::N));
            }
        }
    }
}

/// Writes the outputs of tile `tile`: `A^T m A`, bias, activation, added rows.
///
/// # Safety
/// The tile lies in the output, there are `POINTS` `products` (pointer, floats from one to the
/// next), the instruction set of `L` is enabled.
#[inline(always)]
unsafe fn output_transform<L: Lanes>(
    w: &Packed,
    output: &Output,
    tile: usize,
    (products, product_step): (*const f32, usize),
) {
    let (step, out_step) = (w.output_step(), output.step);
    // SAFETY: by the caller's promise.
    unsafe {
        let slope = L::splat(w.slope);
        for channel in (0..step).step_by(L::N) {
            let bias = L::load(w.bias.as_ptr().add(channel));
            let mut half = [[bias; TILE]; SIDE];
            for (y, half) in half.iter_mut().enumerate() {
                let mut m = [bias; SIDE];
                for (x, m) in m.iter_mut().enumerate() {
                    *m = L::load(products.add((y * SIDE + x) * product_step + channel));
                }
                *half = transform_products(m);
            }
            let stored = L::N.min(out_step - channel);
            for x in 0..TILE {
                let mut m = [bias; SIDE];
                for (m, half) in m.iter_mut().zip(&half) {
                    *m = half[x];
                }
                let column = tile * TILE + x;
                for (y, sum) in transform_products(m).into_iter().enumerate() {
                    let sum = sum.add(bias);
                    let mut value = sum.max(sum.mul(slope));
                    if let Some(skip) = &output.skip {
                        value = value.add(L::load(skip[y].add(column * step + channel)));
                    }
                    let out = output.rows[y].add(column * out_step + channel);
                    if stored == L::N {
                        value.store(out);
                    } else {
                        value.store_first(out, stored);
                    }
                }
            }
        }
    }
}

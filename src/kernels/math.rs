//! Functions of one f32 that the compiler vectorises. With `FMA` they fuse multiplications and
//! additions.

/// Series of the exponential, 1/7! to 1/0!.
pub(in crate::kernels) const TAYLOR: [f32; 8] = [
    1.0 / 5040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// Returns `a b + c`, rounded once with `FMA`.
#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Returns `exp(x)` for |x| up to 87, clamped beyond; relative error below 2e-7. `2^n 2^f` with
/// |f| <= 0.5, by the Taylor polynomial of degree 7 of `exp(f ln 2)`.
#[inline(always)]
pub(in crate::kernels) fn exp<const FMA: bool>(x: f32) -> f32 {
    let t = (x * std::f32::consts::LOG2_E).clamp(-126.0, 126.0);
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer and leaves it in the low
    // bits.
    const ROUND: f32 = 12_582_912.0;
    let rounded = t + ROUND;
    let f = (t - (rounded - ROUND)) * std::f32::consts::LN_2;
    let mut e = TAYLOR[0];
    for c in &TAYLOR[1..] {
        e = fma::<FMA>(e, f, *c);
    }
    let power = (rounded.to_bits() << 23).wrapping_add(127 << 23);
    e * f32::from_bits(power)
}

/// Returns `x / (1 + exp(-x))`.
#[inline(always)]
pub(in crate::kernels) fn silu<const FMA: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FMA>(-x))
}

/// Returns the derivative of [`silu`] at `x`: `s (1 + x (1 - s))` with `s = 1 / (1 + exp(-x))`.
#[inline(always)]
pub(in crate::kernels) fn silu_slope<const FMA: bool>(x: f32) -> f32 {
    let s = 1.0 / (1.0 + exp::<FMA>(-x));
    // Beyond 126 ln 2 the product x (1 - s) is 0 or x e^x, which vanish: x must not overflow it.
    s * (1.0 + x.max(-126.0) * (1.0 - s))
}

/// Returns the tail `1 - Phi(a)` of the normal distribution for `a >= 0`, as `t P(t) exp(-a^2 / 2)`
/// with `t = 1 / (1 + q a)`, and the exponential itself. The coefficients of P are fitted to f64
/// values for the least relative error: 6e-8 of the polynomial, 4e-7 with f32 rounding, and the
/// `a^2 / 2` of the exponential times the machine epsilon.
#[inline(always)]
pub(in crate::kernels) fn normal_tail<const FMA: bool>(a: f32) -> (f32, f32) {
    const Q: f32 = 0.282_842_7;
    const P: [f32; 9] = [
        0.020_133_741,
        -0.067_735_51,
        0.036_921,
        0.049_864_873,
        0.035_754_1,
        0.098_481_536,
        0.100_479_29,
        0.113_287_86,
        0.112_813_15,
    ];
    let t = 1.0 / (1.0 + Q * a);
    let mut p = P[0];
    for c in &P[1..] {
        p = fma::<FMA>(p, t, *c);
    }
    let e = exp::<FMA>(-0.5 * a * a);
    (t * p * e, e)
}

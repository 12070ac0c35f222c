//! Convolutions of a band of rows.

use super::{CONV, SLOPE, Work, conv_bias, conv_weights, values};
use crate::kernels::{
    conv::{self, Activation, ConvShape},
    int8::{self, Coding, Ends, Int8, IntBand, IntOutput},
    int16::{self, Int16},
    winograd::{self, Band, TILE, Winograd},
};

/// Shape of a band: an image of six rows without padding.
const BAND: ConvShape = ConvShape {
    n: 1,
    h: TILE + 2,
    w: TILE * TILES + 2,
    pad: 0,
    ..CONV
};

const TILES: usize = 23;

fn input() -> Vec<f32> {
    values(BAND.h * BAND.w * BAND.ci, 5)
}

pub fn reference() -> Vec<f32> {
    let (x, w, bias) = (input(), conv_weights(), conv_bias());
    conv::reference(&BAND, &x, &w, Some(&bias), Activation::LeakyRelu(SLOPE))
}

/// Returns rows of pixels of `channels` as rows of pixels of `step` values.
fn pad<T: Copy + Default>(rows: &[T], channels: usize, step: usize) -> Vec<T> {
    let mut padded = Vec::with_capacity(rows.len() / channels * step);
    for pixel in rows.chunks_exact(channels) {
        padded.extend_from_slice(pixel);
        padded.resize(padded.len() + step - channels, T::default());
    }
    padded
}

pub fn winograd(variant: winograd::Variant) -> Work {
    let channels = [CONV.co, CONV.ci];
    let layer = Winograd::new(channels, &conv_weights(), &conv_bias(), SLOPE, variant);
    let step = layer.input_step();
    let x = pad(&input(), CONV.ci, step);
    let row = TILE * TILES * CONV.co;
    let mut scratch = Vec::new();
    Box::new(move || {
        let mut y = vec![f32::NAN; TILE * row];
        let mut rows = y.chunks_exact_mut(row);
        let band = Band {
            input: std::array::from_fn(|y| &x[y * BAND.w * step..][..BAND.w * step]),
            skip: None,
            output: std::array::from_fn(|_| rows.next().unwrap_or_default()),
            out_step: CONV.co,
            tiles: TILES,
        };
        layer.run(band, &mut scratch);
        y
    })
}

fn codings() -> [Coding; 2] {
    [
        Coding::new(&[[-1.0, 1.0, 0.0]; CONV.ci]),
        Coding::new(&[[-12.0, 14.0, 0.5]; CONV.co]),
    ]
}

fn codes() -> Vec<u8> {
    let code = |v: f32| (128.0 + 127.0 * v) as u8;
    input().into_iter().map(code).collect()
}

fn int8_layer(codings: &[Coding; 2], variant: int8::Variant) -> Int8 {
    let [input, output] = codings;
    let ends = Ends {
        input,
        output: Some(output),
        skip: None,
        first: false,
    };
    let (weights, bias) = (conv_weights(), conv_bias());
    Int8::new([CONV.co, CONV.ci], &weights, &bias, SLOPE, ends, variant)
}

pub fn int8_reference() -> Vec<f32> {
    let layer = int8_layer(&codings(), int8::Variant::Portable);
    let codes = layer.reference(&conv_weights(), &codings()[0], &codes(), BAND.w, None);
    let round = |v: f32| v.round_ties_even().clamp(0.0, 255.0);
    codes.into_iter().map(round).collect()
}

pub fn int8(variant: int8::Variant) -> Work {
    let layer = int8_layer(&codings(), variant);
    let step = layer.input_step();
    let x = pad(&codes(), CONV.ci, step);
    let row = TILE * TILES * layer.output_step();
    Box::new(move || {
        let mut y = vec![0; TILE * row];
        let mut rows = y.chunks_exact_mut(row);
        layer.run(IntBand {
            input: std::array::from_fn(|y| &x[y * BAND.w * step..][..BAND.w * step]),
            skip: None,
            output: IntOutput::Codes(std::array::from_fn(|_| rows.next().unwrap_or_default())),
            tiles: TILES,
        });
        let pixels = y.chunks_exact(layer.output_step());
        pixels
            .flat_map(|p| &p[..CONV.co])
            .map(|&code| f32::from(code))
            .collect()
    })
}

/// Returns the codes of the input for int16: its values are those of [`input`], rounded.
fn words() -> Vec<i16> {
    input().into_iter().map(|v| (255.0 * v) as i16).collect()
}

pub fn int16_reference() -> Vec<f32> {
    let x: Vec<_> = words().into_iter().map(|c| f32::from(c) / 255.0).collect();
    let (w, bias) = (conv_weights(), conv_bias());
    conv::reference(&BAND, &x, &w, Some(&bias), Activation::LeakyRelu(SLOPE))
}

pub fn int16(variant: int16::Variant) -> Work {
    let input = int16::Coding::new(&[[-1.0, 1.0, 0.0]; CONV.ci]);
    let ends = int16::Ends {
        input: &input,
        output: None,
        skip: None,
    };
    let (weights, bias) = (conv_weights(), conv_bias());
    let layer = Int16::new([CONV.co, CONV.ci], &weights, &bias, SLOPE, ends, variant);
    let step = layer.input_step();
    let x = pad(&words(), CONV.ci, step);
    let row = TILE * TILES * CONV.co;
    let mut scratch = Vec::new();
    Box::new(move || {
        let mut y = vec![f32::NAN; TILE * row];
        let mut rows = y.chunks_exact_mut(row);
        let band = IntBand {
            input: std::array::from_fn(|y| &x[y * BAND.w * step..][..BAND.w * step]),
            output: IntOutput::Values(std::array::from_fn(|_| rows.next().unwrap_or_default())),
            skip: None,
            tiles: TILES,
        };
        layer.run(band, &mut scratch);
        y
    })
}

//! LPIPS and NIQE through the public API, compared with published values and with a plain second
//! implementation with arbitrary weights.
#![cfg(feature = "train")]

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor};
use tadsr::{
    Error,
    metrics::{Gray, Lpips, Niqe, Picture},
};

/// Pseudo-random numbers, uniform in -0.5..0.5.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }
}

fn picture(width: usize, height: usize, seed: u64) -> Picture {
    let mut noise = Noise(seed);
    let rgb = (0..3 * width * height)
        .map(|_| ((noise.next() + 0.5) * 255.0) as u8)
        .collect();
    Picture::new(width, height, rgb).unwrap()
}

const FIRES: [(usize, usize, usize, usize); 8] = [
    (3, 64, 16, 64),
    (4, 128, 16, 64),
    (6, 128, 32, 128),
    (7, 256, 32, 128),
    (9, 256, 48, 192),
    (10, 384, 48, 192),
    (11, 384, 64, 256),
    (12, 512, 64, 256),
];
const HEADS: [usize; 7] = [64, 128, 256, 384, 384, 512, 512];

/// Returns random weights of the right shapes, as shape and values by name.
fn weights() -> HashMap<String, (Vec<usize>, Vec<f32>)> {
    let mut noise = Noise(42);
    let mut all = HashMap::new();
    let mut add = |name: String, shape: &[usize], gain: f32, lift: f32| {
        let count = shape.iter().product();
        let values = (0..count).map(|_| gain * noise.next() + lift).collect();
        all.insert(name, (shape.to_vec(), values));
    };
    let mut conv = |name: String, cout: usize, cin: usize, k: usize| {
        let gain = 3.0 / ((cin * k * k) as f32).sqrt();
        add(format!("{name}.weight"), &[cout, cin, k, k], gain, 0.0);
        add(format!("{name}.bias"), &[cout], 0.2, 0.0);
    };
    conv("features.0".into(), 64, 3, 3);
    for (index, cin, squeeze, expand) in FIRES {
        conv(format!("features.{index}.squeeze"), squeeze, cin, 1);
        conv(format!("features.{index}.expand1x1"), expand, squeeze, 1);
        conv(format!("features.{index}.expand3x3"), expand, squeeze, 3);
    }
    for (k, channels) in HEADS.into_iter().enumerate() {
        add(
            format!("lin{k}.model.1.weight"),
            &[1, channels, 1, 1],
            1.0,
            0.5,
        );
    }
    all
}

fn save(weights: &HashMap<String, (Vec<usize>, Vec<f32>)>, path: &Path) {
    let tensors: HashMap<_, _> = weights
        .iter()
        .map(|(name, (shape, values))| {
            let tensor = Tensor::from_slice(values, shape.as_slice(), &Device::Cpu).unwrap();
            (name.clone(), tensor)
        })
        .collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// Channels of rows of samples.
#[derive(Clone)]
struct Map {
    channels: usize,
    height: usize,
    width: usize,
    data: Vec<f64>,
}

impl Map {
    fn at(&self, c: usize, y: isize, x: isize) -> f64 {
        let inside =
            (0..self.height as isize).contains(&y) && (0..self.width as isize).contains(&x);
        if !inside {
            return 0.0;
        }
        self.data[(c * self.height + y as usize) * self.width + x as usize]
    }

    fn build(
        channels: usize,
        height: usize,
        width: usize,
        f: impl Fn(usize, isize, isize) -> f64,
    ) -> Self {
        let mut data = Vec::with_capacity(channels * height * width);
        for c in 0..channels {
            for y in 0..height as isize {
                data.extend((0..width as isize).map(|x| f(c, y, x)));
            }
        }
        Self {
            channels,
            height,
            width,
            data,
        }
    }

    fn conv(
        &self,
        net: &HashMap<String, (Vec<usize>, Vec<f32>)>,
        name: &str,
        stride: usize,
        pad: usize,
    ) -> Self {
        let (shape, weight) = &net[&format!("{name}.weight")];
        let bias = &net[&format!("{name}.bias")].1;
        let k = shape[2];
        let size = |len: usize| (len + 2 * pad - k) / stride + 1;
        Self::build(shape[0], size(self.height), size(self.width), |o, y, x| {
            let mut sum = f64::from(bias[o]);
            for c in 0..self.channels {
                for j in 0..k {
                    for i in 0..k {
                        let w = weight[((o * self.channels + c) * k + j) * k + i];
                        let (y, x) = (
                            y * stride as isize + j as isize,
                            x * stride as isize + i as isize,
                        );
                        sum += f64::from(w) * self.at(c, y - pad as isize, x - pad as isize);
                    }
                }
            }
            sum.max(0.0)
        })
    }

    /// Pools by 3x3 with stride 2, rounding the size up. Windows are clipped at the edge.
    fn pool(&self) -> Self {
        let size = |len: usize| (len - 3).div_ceil(2) + 1;
        Self::build(
            self.channels,
            size(self.height),
            size(self.width),
            |c, y, x| {
                let window = (0..9).map(|i| self.at(c, 2 * y + i / 3, 2 * x + i % 3));
                window.fold(0.0, f64::max)
            },
        )
    }

    fn fire(&self, net: &HashMap<String, (Vec<usize>, Vec<f32>)>, index: usize) -> Self {
        let name = |part| format!("features.{index}.{part}");
        let squeezed = self.conv(net, &name("squeeze"), 1, 0);
        let mut left = squeezed.conv(net, &name("expand1x1"), 1, 0);
        let right = squeezed.conv(net, &name("expand3x3"), 1, 1);
        left.channels += right.channels;
        left.data.extend(right.data);
        left
    }
}

fn reference(a: &Picture, b: &Picture) -> f64 {
    let net = weights();
    let (a, b) = (reference_taps(a, &net), reference_taps(b, &net));
    let mut sum = 0.0;
    for (k, (a, b)) in a.iter().zip(&b).enumerate() {
        let head = &net[&format!("lin{k}.model.1.weight")].1;
        let area = a.height * a.width;
        let length = |m: &Map, i: usize| {
            let squares = (0..m.channels).map(|c| m.data[c * area + i].powi(2));
            squares.sum::<f64>().sqrt() + 1e-10
        };
        for i in 0..area {
            let (la, lb) = (length(a, i), length(b, i));
            for (c, w) in head.iter().enumerate() {
                let difference = a.data[c * area + i] / la - b.data[c * area + i] / lb;
                sum += f64::from(*w) * difference.powi(2) / area as f64;
            }
        }
    }
    sum
}

fn reference_taps(p: &Picture, net: &HashMap<String, (Vec<usize>, Vec<f32>)>) -> Vec<Map> {
    let (shift, scale) = ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]);
    let input = Map::build(3, p.height(), p.width(), |c, y, x| {
        let v = p.rgb()[3 * (y as usize * p.width() + x as usize) + c];
        (f64::from(v) / 127.5 - 1.0 - shift[c]) / scale[c]
    });
    let t0 = input.conv(net, "features.0", 2, 0);
    let t1 = t0.pool().fire(net, 3).fire(net, 4);
    let t2 = t1.pool().fire(net, 6).fire(net, 7);
    let t3 = t2.pool().fire(net, 9);
    let t4 = t3.fire(net, 10);
    let t5 = t4.fire(net, 11);
    let t6 = t5.fire(net, 12);
    vec![t0, t1, t2, t3, t4, t5, t6]
}

fn distance(lpips: &Lpips, a: &Picture, b: &Picture) -> f64 {
    let (a, b) = (lpips.features(a).unwrap(), lpips.features(b).unwrap());
    lpips.distance(&a, &b).unwrap()
}

#[test]
fn lpips_agrees_with_a_plain_implementation_on_even_and_odd_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lpips.safetensors");
    save(&weights(), &path);
    let lpips = Lpips::load(&path).unwrap();
    // Sizes at which poolings have all combinations of even and odd sides.
    for (w, h) in [(32, 37), (43, 34)] {
        let (a, b) = (picture(w, h, 1), picture(w, h, 2));
        let (got, want) = (distance(&lpips, &a, &b), reference(&a, &b));
        assert!(
            (got / want - 1.0).abs() < 1e-4,
            "{w}x{h}: {got} is not {want}"
        );
        assert_eq!(distance(&lpips, &a, &a), 0.0);
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn lpips_gives_the_published_values() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/metrics");
    let weights = shared.join("lpips_squeeze_v0.1.safetensors");
    let lpips = Lpips::load(&weights).unwrap();
    let open = |name: &str| {
        let image = image::open(shared.join(name)).unwrap().into_rgb8();
        let (w, h) = image.dimensions();
        Picture::new(w as usize, h as usize, image.into_raw()).unwrap()
    };
    let reference = open("ex_ref.png");
    for (name, want) in [("ex_p0.png", 0.71105), ("ex_p1.png", 0.14790)] {
        let got = distance(&lpips, &reference, &open(name));
        assert!((got - want).abs() < 2e-5, "{name}: {got} is not {want}");
    }
}

#[test]
fn unusable_weights_and_pictures_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lpips.safetensors");
    let message = |path: &Path| match Lpips::load(path) {
        Err(e @ Error::Model { .. }) => e.to_string(),
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("was loaded"),
    };
    assert!(message(&path).contains("lpips.safetensors"));
    std::fs::write(&path, b"no safetensors, only text").unwrap();
    assert!(message(&path).contains("lpips.safetensors"));

    let mut broken = weights();
    broken.remove("features.6.squeeze.bias");
    save(&broken, &path);
    assert!(message(&path).contains("features.6.squeeze.bias"));
    broken = weights();
    broken.insert(
        "lin3.model.1.weight".into(),
        (vec![1, 2, 1, 1], vec![0.0; 2]),
    );
    save(&broken, &path);
    assert!(message(&path).contains("[1, 2, 1, 1]"));

    save(&weights(), &path);
    let lpips = Lpips::load(&path).unwrap();
    assert!(matches!(
        lpips.features(&picture(31, 64, 1)),
        Err(Error::Frame(_))
    ));
    let features = |w, h| lpips.features(&picture(w, h, 1)).unwrap();
    let sizes_differ = lpips.distance(&features(32, 40), &features(40, 32));
    assert!(matches!(sizes_differ, Err(Error::Frame(_))));
}

/// Picture with smooth areas, edges and a little noise.
fn scene(width: usize, height: usize) -> Gray {
    let mut noise = Noise(7);
    let mut data = Vec::with_capacity(width * height);
    for y in 0..height {
        for x in 0..width {
            let (u, v) = (x as f32 / 31.0, y as f32 / 23.0);
            let edge = if (u.sin() + v.cos()) > 0.3 { 50.0 } else { 0.0 };
            data.push(110.0 + 40.0 * (1.7 * u + v).sin() + edge + 12.0 * noise.next());
        }
    }
    Gray {
        width,
        height,
        data,
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn niqe_is_that_of_the_published_model() {
    let weights =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/metrics/niqe_pris_params.npz");
    let niqe = Niqe::load(&weights).unwrap();
    // 33.651 by a plain NumPy and SciPy implementation, which mirrors the border in halving. Here
    // it is repeated.
    let got = niqe.score(&scene(300, 200)).unwrap().unwrap();
    assert!((got - 33.651).abs() < 0.1, "{got}");
    // A covariance requires more than one block.
    assert_eq!(niqe.score(&scene(191, 191)).unwrap(), None);
}

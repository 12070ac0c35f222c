//! Renders a test scene: brick wall, lettering, blinds, bicycle, record, cat and leaves, with a
//! slow camera.
//!
//! The scene is a formula, so it has any size and no third party has rights in it. It contains
//! content that is difficult to upscale: thin lines at all angles, gratings up to the limit of the
//! pixel grid, small letters, dense texture and smooth gradients.
//!
//! ```text
//! render_scene WIDTH HEIGHT [FRAMES [FIRST]] > scene.rgb
//! ```
//!
//! Writes frames of R, G, B bytes without padding to standard output, at 24 frames per second.

use std::{
    env,
    f32::consts::{PI, TAU},
    io::{self, Write},
    process::ExitCode,
};

/// Samples per pixel in each direction.
const SAMPLES: usize = 3;

type Color = [f32; 3];

/// A point of the scene, to the right and down in units of the image's height. The centre is at
/// (0.89, 0.5).
#[derive(Clone, Copy)]
struct Point {
    x: f32,
    y: f32,
}

fn main() -> ExitCode {
    let numbers: Option<Vec<usize>> = env::args().skip(1).map(|a| a.parse().ok()).collect();
    let (width, height, frames, first) = match numbers.as_deref() {
        Some([w, h]) => (*w, *h, 1, 0),
        Some([w, h, n]) => (*w, *h, *n, 0),
        Some([w, h, n, first]) => (*w, *h, *n, *first),
        _ => (0, 0, 0, 0),
    };
    if !(1..=8192).contains(&width) || !(1..=8192).contains(&height) {
        eprintln!("usage: render_scene WIDTH HEIGHT [FRAMES [FIRST]] > scene.rgb");
        return ExitCode::FAILURE;
    }
    let mut out = io::stdout().lock();
    for frame in first..first + frames {
        if let Err(err) = out.write_all(&render(width, height, frame)) {
            eprintln!("render_scene: {err}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Returns a frame as rows of R, G, B bytes.
fn render(width: usize, height: usize, frame: usize) -> Vec<u8> {
    let mut rgb = vec![0; 3 * width * height];
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let rows = height.div_ceil(workers);
    std::thread::scope(|scope| {
        for (i, band) in rgb.chunks_mut(3 * width * rows).enumerate() {
            scope.spawn(move || {
                for (y, row) in band.chunks_exact_mut(3 * width).enumerate() {
                    for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
                        pixel.copy_from_slice(&shade(x, i * rows + y, width, height, frame));
                    }
                }
            });
        }
    });
    rgb
}

/// Returns the mean of a pixel's samples in linear light (with a gamma of 2).
fn shade(x: usize, y: usize, width: usize, height: usize, frame: usize) -> [u8; 3] {
    let mut sum = [0.0; 3];
    for i in 0..SAMPLES * SAMPLES {
        let sub = |n: usize| (n as f32 + 0.5) / SAMPLES as f32;
        let (px, py) = (x as f32 + sub(i % SAMPLES), y as f32 + sub(i / SAMPLES));
        let at = camera(px, py, width as f32, height as f32, frame as f32 / 24.0);
        let color = scene(at, frame as f32 / 24.0);
        for (s, c) in sum.iter_mut().zip(color) {
            *s += c * c;
        }
    }
    sum.map(|s| ((s / (SAMPLES * SAMPLES) as f32).sqrt() * 255.0 + 0.5).clamp(0.0, 255.0) as u8)
}

/// Returns the point of the scene at pixel (px, py) and `time` seconds. The camera moves in a small
/// circle and zooms slightly.
fn camera(px: f32, py: f32, width: f32, height: f32, time: f32) -> Point {
    let zoom = 0.96 - 0.03 * (TAU * time / 10.0).cos();
    let (dx, dy) = (TAU * time / 10.0).sin_cos();
    Point {
        x: 0.89 + zoom * (px - 0.5 * width) / height + 0.02 * dx,
        y: 0.5 + zoom * (py - 0.5 * height) / height + 0.008 * dy,
    }
}

/// Returns the colour of the frontmost object.
fn scene(at: Point, time: f32) -> Color {
    leaves(at, time)
        .or_else(|| bicycle(at))
        .or_else(|| cat(at, time))
        .or_else(|| record(at))
        .or_else(|| board(at))
        .or_else(|| window(at))
        .unwrap_or_else(|| wall(at))
}

// Helpers

fn mix(a: Color, b: Color, t: f32) -> Color {
    let t = t.clamp(0.0, 1.0);
    [0, 1, 2].map(|i| a[i] + (b[i] - a[i]) * t)
}

fn scaled(a: Color, by: f32) -> Color {
    a.map(|v| (v * by).clamp(0.0, 1.0))
}

/// Returns a pseudorandom number from 0 to 1 for a cell of a grid.
fn hash(x: i32, y: i32, salt: u32) -> f32 {
    let mut h = (x as u32).wrapping_mul(0x9E37_79B1)
        ^ (y as u32).wrapping_mul(0x85EB_CA77)
        ^ salt.wrapping_mul(0xC2B2_AE3D);
    for _ in 0..2 {
        h = (h ^ (h >> 15)).wrapping_mul(0x2C1B_3C6D);
    }
    (h ^ (h >> 16)) as f32 / u32::MAX as f32
}

/// Returns smooth noise from 0 to 1 with features of size 1.
fn noise(x: f32, y: f32, salt: u32) -> f32 {
    let (ix, iy) = (x.floor(), y.floor());
    let smooth = |t: f32| t * t * (3.0 - 2.0 * t);
    let (tx, ty) = (smooth(x - ix), smooth(y - iy));
    let corner = |dx, dy| hash(ix as i32 + dx, iy as i32 + dy, salt);
    let top = corner(0, 0) + (corner(1, 0) - corner(0, 0)) * tx;
    let bottom = corner(0, 1) + (corner(1, 1) - corner(0, 1)) * tx;
    top + (bottom - top) * ty
}

/// Returns noise of three octaves.
fn fractal(x: f32, y: f32, salt: u32) -> f32 {
    let octave = |sum: f32, i: u32| {
        let f = (1 << i) as f32;
        sum + noise(x * f, y * f, salt + i) / f
    };
    (0..3).fold(0.0, octave) / 1.75
}

impl Point {
    /// Returns the point relative to (x, y).
    fn relative_to(self, x: f32, y: f32) -> Self {
        Self {
            x: self.x - x,
            y: self.y - y,
        }
    }

    fn turned(self, angle: f32) -> Self {
        let (sin, cos) = angle.sin_cos();
        Self {
            x: self.x * cos + self.y * sin,
            y: self.y * cos - self.x * sin,
        }
    }

    fn radius(self) -> f32 {
        (self.x * self.x + self.y * self.y).sqrt()
    }

    /// Returns the distance to the line from `a` to `b`.
    fn to_line(self, a: (f32, f32), b: (f32, f32)) -> f32 {
        let (p, d) = (self.relative_to(a.0, a.1), (b.0 - a.0, b.1 - a.1));
        let t = ((p.x * d.0 + p.y * d.1) / (d.0 * d.0 + d.1 * d.1)).clamp(0.0, 1.0);
        p.relative_to(d.0 * t, d.1 * t).radius()
    }

    /// Returns the distance to the border of a rectangle around the origin, negative outside of it.
    fn inside(self, half_width: f32, half_height: f32) -> f32 {
        (half_width - self.x.abs()).min(half_height - self.y.abs())
    }
}

// Objects of the scene

/// Bricks with mortar and grain.
fn wall(at: Point) -> Color {
    let row = (at.y / 0.052).floor();
    let x = at.x + if row as i32 % 2 == 0 { 0.0 } else { 0.0625 };
    let column = (x / 0.125).floor();
    let (u, v) = (x - column * 0.125, at.y - row * 0.052);
    let grain = fractal(at.x * 40.0, at.y * 40.0, 1);
    let rough = 0.002 * noise(at.x * 150.0, at.y * 150.0, 2);
    let edge = u.min(0.125 - u).min(v).min(0.052 - v) - rough;
    if edge < 0.0022 {
        return scaled([0.72, 0.69, 0.64], 0.7 + 0.4 * grain);
    }
    let tone = hash(row as i32, column as i32, 3);
    let brick = mix([0.58, 0.28, 0.2], [0.7, 0.42, 0.3], tone);
    // Light from above left.
    let bevel = if u.min(v) < 0.005 { 1.12 } else { 1.0 };
    scaled(brick, (0.65 + 0.6 * grain) * bevel)
}

/// A blackboard with lettering of all sizes.
fn board(at: Point) -> Option<Color> {
    let p = at.relative_to(0.44, 0.235);
    let inside = p.inside(0.33, 0.19);
    if inside < 0.0 {
        return None;
    }
    if inside < 0.016 {
        let along = if 0.33 - p.x.abs() < 0.19 - p.y.abs() {
            Point { x: p.y, y: p.x }
        } else {
            p
        };
        let rings = (along.y * 900.0 + 5.0 * noise(along.x * 9.0, along.y * 90.0, 4)).sin();
        return Some(scaled([0.66, 0.46, 0.26], 0.85 + 0.15 * rings));
    }
    const LINES: [(&str, f32, f32); 6] = [
        ("TADSR", 0.10, -0.15),
        ("FROM FEW PIXELS TO MANY", 0.03, -0.018),
        ("COFFEE 2.40  TEA 1.90  CAKE 3.75", 0.0215, 0.031),
        ("THE QUICK BROWN FOX JUMPS OVER A LAZY DOG", 0.0165, 0.07),
        (
            "PACK MY BOX WITH FIVE DOZEN LIQUOR JUGS 0123456789",
            0.0135,
            0.104,
        ),
        (
            "SPHINX OF BLACK QUARTZ, JUDGE MY VOW: 3.14159265358979",
            0.0115,
            0.134,
        ),
    ];
    let slate = scaled(
        [0.13, 0.2, 0.18],
        0.85 + 0.35 * fractal(p.x * 7.0, p.y * 14.0, 5),
    );
    let chalk = [0.93, 0.93, 0.86];
    let written = LINES.iter().any(|(text, size, top)| {
        let width = 0.72 * size * text.chars().count() as f32;
        lettering(p.relative_to(-0.5 * width, *top), text, *size)
    });
    Some(if written { chalk } else { slate })
}

/// Returns true if the point is on a stroke of `text`, whose letters of height `size` start at the
/// origin.
fn lettering(p: Point, text: &str, size: f32) -> bool {
    if !(-0.1 * size..1.1 * size).contains(&p.y) || p.x < 0.0 {
        return false;
    }
    let index = (p.x / (0.72 * size)) as usize;
    let Some(letter) = text.chars().nth(index) else {
        return false;
    };
    // Letters have a grid of 4 x 6 squares.
    let unit = size / 6.0;
    let q = p.relative_to(0.72 * size * index as f32 + 0.1 * size, 0.0);
    let point = |d: &[u8]| (f32::from(d[0] - b'0') * unit, f32::from(d[1] - b'0') * unit);
    strokes(letter).split(' ').any(|stroke| {
        let points = stroke.as_bytes();
        points
            .windows(4)
            .step_by(2)
            .any(|d| q.to_line(point(d), point(&d[2..])) < 0.075 * size)
    })
}

/// Returns the polylines of a letter. Two digits are a point: column 0 (left) to 3, row 0 (top) to
/// 6.
fn strokes(letter: char) -> &'static str {
    match letter {
        'A' => "06022031 3136 0434",
        'B' => "0006263534232021 0020 0323",
        'C' => "31201001051626 2635",
        'D' => "0006163430 3010 1000",
        'E' => "30000636 0323",
        'F' => "300006 0323",
        'G' => "3120100105162635 353323",
        'H' => "0006 3036 0333",
        'I' => "1016 0020 0626",
        'J' => "3035261605",
        'K' => "0006 3003 0336",
        'L' => "000636",
        'M' => "0600133036",
        'N' => "06003630",
        'O' => "10010516263531 312010",
        'P' => "06002031 313223 2303",
        'Q' => "10010516263531 312010 2436",
        'R' => "06002031 313223 2303 1336",
        'S' => "312010010213243526160605",
        'T' => "0030 1516 1015",
        'U' => "000516263530",
        'V' => "001630",
        'W' => "0006133630",
        'X' => "0036 3006",
        'Y' => "001330 1316",
        'Z' => "00300636",
        '0' => "10010516263531 312010 0530",
        '1' => "011016 0626",
        '2' => "0110203132 3206 0636",
        '3' => "0030132335 3526 260605",
        '4' => "26200434",
        '5' => "30000323 23343526 2606",
        '6' => "2010010516 16263534 342303",
        '7' => "003016",
        '8' => "1020312313020110 132334352616050413",
        '9' => "0516263531 31201001 01021333",
        '.' => "1616 1516",
        ',' => "1506",
        ':' => "1112 1415",
        _ => "",
    }
}

/// A window: blinds with ever finer slats in the upper part, sky and roofs in the lower part.
fn window(at: Point) -> Option<Color> {
    let p = at.relative_to(1.06, 0.275);
    let inside = p.inside(0.185, 0.235);
    if inside < 0.0 {
        // The sill.
        let on_sill = p.relative_to(0.0, 0.25).inside(0.22, 0.015) > 0.0;
        return on_sill.then(|| scaled([0.8, 0.78, 0.74], 1.0 - 12.0 * (p.y - 0.235)));
    }
    if inside < 0.018 || p.x.abs() < 0.006 {
        return Some(scaled([0.9, 0.89, 0.86], 0.9 + 4.0 * inside.min(0.018)));
    }
    if p.y < 0.0 {
        // The period of the grating falls from 13 to 5 thousandths of the height.
        let depth = (p.y + 0.217) / 0.217;
        let phase = TAU * (17.0 * depth + 12.0 * depth * depth);
        let slat = if phase.sin() > 0.0 { 1.0 } else { 0.42 };
        return Some(scaled([0.95, 0.9, 0.78], slat));
    }
    let mut sky = mix([0.5, 0.7, 0.95], [0.98, 0.86, 0.7], p.y / 0.15);
    sky = mix(
        sky,
        [1.0; 3],
        2.0 * fractal(p.x * 12.0, p.y * 30.0, 6) - 1.0,
    );
    let ridge = 0.1 + 0.25 * ((p.x + 0.4) % 0.11 - 0.055).abs();
    if p.y < ridge {
        return Some(sky);
    }
    let tiles = ((p.x * 420.0).sin() * ((p.y - ridge) * 300.0).sin()) > 0.0;
    Some(scaled([0.42, 0.27, 0.26], if tiles { 1.0 } else { 0.75 }))
}

/// A record on the wall: a zone plate, whose rings get finer outwards, with a sheen.
fn record(at: Point) -> Option<Color> {
    let p = at.relative_to(1.515, 0.25);
    let r = p.radius();
    if r > 0.2 {
        return None;
    }
    if r < 0.008 {
        return Some([0.05; 3]);
    }
    if r < 0.06 {
        let ring = (r * 700.0).sin() > 0.6;
        return Some(if ring {
            [0.95, 0.85, 0.4]
        } else {
            [0.8, 0.25, 0.15]
        });
    }
    let groove = 0.5 + 0.5 * (2200.0 * r * r).cos();
    let sheen = (2.0 * (p.y.atan2(p.x) + 0.7)).cos().powi(8);
    Some(scaled(
        [0.9, 0.92, 1.0],
        0.06 + groove * (0.16 + 0.5 * sheen),
    ))
}

/// A tabby cat on the sill: soft shading, stripes, whiskers.
fn cat(at: Point, time: f32) -> Option<Color> {
    let p = at.relative_to(0.985, 0.432);
    if p.radius() > 0.2 {
        return None;
    }
    let head = p.turned(0.08 * (TAU * time / 5.0).sin());
    if let Some(color) = cat_face(head) {
        return Some(color);
    }
    // The body sits behind the head, the tail hangs down.
    let body = Point {
        x: (p.x - 0.035) / 0.075,
        y: (p.y - 0.045) / 0.062,
    };
    let tail = p
        .to_line((0.085, 0.085), (0.105, 0.15))
        .min(p.to_line((0.105, 0.15), (0.09, 0.185)));
    let in_body = body.radius() < 1.0 && p.y < 0.094;
    (in_body || tail < 0.011).then(|| {
        let light = 1.0 - 0.35 * body.radius().min(1.0);
        fur(p, 16.0 * p.x + 6.0 * p.y, light)
    })
}

/// Fur with hairs and stripes across `phase`.
fn fur(p: Point, phase: f32, light: f32) -> Color {
    let hairs = noise(p.x * 260.0 + p.y * 90.0, p.y * 60.0, 7);
    let stripe = (TAU * (phase + 0.25 * noise(p.x * 30.0, p.y * 30.0, 8))).sin();
    let base = mix([0.85, 0.56, 0.28], [0.5, 0.28, 0.12], 1.2 * stripe);
    scaled(base, light * (0.75 + 0.5 * hairs))
}

fn cat_face(p: Point) -> Option<Color> {
    let m = Point {
        x: p.x.abs(),
        y: p.y,
    };
    let whisker = |y0: f32, y1: f32| m.to_line((0.02, y0), (0.095, y1)) < 0.0011;
    if whisker(0.014, 0.0) || whisker(0.018, 0.016) || whisker(0.022, 0.032) {
        return Some([0.97; 3]);
    }
    let eye = Point {
        x: (m.x - 0.024) / 0.012,
        y: (p.y + 0.008) / 0.0095,
    };
    if eye.radius() < 1.0 {
        let glint = eye.relative_to(-0.25, -0.4).radius() < 0.22;
        let slit = (eye.x / 0.3).hypot(eye.y / 0.85) < 1.0;
        let iris = mix([0.75, 0.85, 0.2], [0.25, 0.5, 0.15], eye.radius());
        return Some(if glint {
            [1.0; 3]
        } else if slit {
            [0.03; 3]
        } else {
            iris
        });
    }
    if p.y > 0.006 && m.x < 0.009 * (1.0 - (p.y - 0.006) / 0.01) {
        return Some([0.8, 0.45, 0.45]);
    }
    let mouth = m
        .to_line((0.0, 0.016), (0.0, 0.022))
        .min(m.to_line((0.0, 0.022), (0.014, 0.028)));
    if mouth < 0.0014 {
        return Some([0.25, 0.12, 0.1]);
    }
    let head = Point {
        x: p.x / 0.06,
        y: p.y / 0.05,
    };
    let ear = m.x > 0.018
        && m.x < 0.056
        && p.y > -0.085
        && p.y < -0.02
        && (m.x - 0.018) > 0.30 * (-0.02 - p.y).max(0.0)
        && (0.058 - m.x) > 0.14 * (-0.02 - p.y);
    if head.radius() > 1.0 {
        return ear.then(|| fur(p, 0.0, 0.8));
    }
    let muzzle = Point {
        x: m.x - 0.012,
        y: p.y - 0.02,
    }
    .radius();
    let light = 1.05 - 0.4 * head.relative_to(-0.3, -0.4).radius().powi(2);
    let coat = fur(
        p,
        14.0 * m.x + if p.y < -0.015 { 0.0 } else { 9.0 * p.y },
        light,
    );
    Some(mix([0.97, 0.93, 0.87], coat, (muzzle - 0.012) / 0.008))
}

/// A bicycle: thin straight and round lines at all angles.
fn bicycle(at: Point) -> Option<Color> {
    let p = at.relative_to(0.46, 0.70);
    if p.inside(0.42, 0.25) < 0.0 {
        return None;
    }
    const REAR: (f32, f32) = (-0.21, 0.06);
    const FRONT: (f32, f32) = (0.21, 0.06);
    const PEDALS: (f32, f32) = (-0.03, 0.075);
    const SEAT: (f32, f32) = (-0.09, -0.1);
    const HEAD: (f32, f32) = (0.145, -0.105);
    let tubes = [
        (PEDALS, SEAT),
        (SEAT, HEAD),
        (PEDALS, HEAD),
        (REAR, SEAT),
        (REAR, PEDALS),
    ];
    if tubes.iter().any(|(a, b)| p.to_line(*a, *b) < 0.0065) {
        return Some([0.1, 0.42, 0.62]);
    }
    let steel = [
        (HEAD, FRONT),
        (HEAD, (0.13, -0.15)),
        ((0.13, -0.15), (0.18, -0.16)),
        (SEAT, (-0.1, -0.13)),
    ];
    if steel.iter().any(|(a, b)| p.to_line(*a, *b) < 0.0045) {
        return Some([0.8, 0.82, 0.84]);
    }
    if p.to_line((-0.14, -0.135), (-0.065, -0.132)) < 0.009 {
        return Some([0.2, 0.12, 0.08]);
    }
    let crank = p.relative_to(PEDALS.0, PEDALS.1);
    if (0.02..0.031).contains(&crank.radius()) && (crank.y.atan2(crank.x) * 20.0).sin() > -0.3 {
        return Some([0.3; 3]);
    }
    let chain = p.to_line((REAR.0, REAR.1 - 0.012), (PEDALS.0, PEDALS.1 - 0.028));
    if chain.min(p.to_line((REAR.0, REAR.1 + 0.012), (PEDALS.0, PEDALS.1 + 0.028))) < 0.0017 {
        return Some([0.12; 3]);
    }
    wheel(p.relative_to(REAR.0, REAR.1)).or_else(|| wheel(p.relative_to(FRONT.0, FRONT.1)))
}

fn wheel(p: Point) -> Option<Color> {
    let r = p.radius();
    if r > 0.15 {
        return None;
    }
    if r > 0.138 {
        return Some([0.07; 3]);
    }
    if r > 0.132 {
        return Some([0.85, 0.86, 0.88]);
    }
    if r < 0.01 {
        return Some([0.6; 3]);
    }
    // Distance to the nearest of 28 spokes.
    let angle = p.y.atan2(p.x).rem_euclid(TAU / 28.0) - PI / 28.0;
    (r * angle.abs() < 0.0011).then_some([0.9, 0.91, 0.93])
}

/// A hedge of overlapping leaves, dense at the bottom right.
fn leaves(at: Point, time: f32) -> Option<Color> {
    const CELL: f32 = 0.03;
    const LONGEST: f32 = 0.06;
    let edge = hedge(at.x);
    if at.y < edge - 0.1 {
        return None;
    }
    let (cx, cy) = ((at.x / CELL).floor() as i32, (at.y / CELL).floor() as i32);
    let mut front = None;
    let mut nearest = -1.0;
    for (i, j) in (-2..=2).flat_map(|j| (-2..=2).map(move |i| (cx + i, cy + j))) {
        let random = |salt| hash(i, j, salt);
        let (x, y) = (
            (i as f32 + random(11)) * CELL,
            (j as f32 + random(12)) * CELL,
        );
        if at.relative_to(x, y).radius() > 0.5 * LONGEST || random(14) <= nearest {
            continue;
        }
        if y < hedge(x) + 0.05 * noise(x * 14.0, 0.0, 13) {
            continue;
        }
        let sway = 0.12 * (TAU * time / 2.5 + 9.0 * x).sin();
        let p = at.relative_to(x, y).turned(TAU * random(15) + sway);
        if let Some(color) = leaf(
            p,
            LONGEST * (0.6 + 0.4 * random(16)),
            random(17),
            random(14),
        ) {
            nearest = random(14);
            front = Some(color);
        }
    }
    // The space behind the leaves is dark.
    front.or_else(|| (at.y > edge + 0.07).then_some([0.05, 0.09, 0.04]))
}

/// Returns the upper edge of the hedge.
fn hedge(x: f32) -> f32 {
    0.93 - 0.33 * ((x - 0.95) / 0.25).clamp(0.0, 1.0)
}

/// A leaf with veins along the x axis. `tone` and `light` are 0 to 1.
fn leaf(p: Point, length: f32, tone: f32, light: f32) -> Option<Color> {
    let t = p.x / length + 0.5;
    if !(0.0..=1.0).contains(&t) {
        return None;
    }
    let half = 0.45 * length * (PI * t.powf(0.8)).sin() * 0.62;
    if p.y.abs() > half {
        return None;
    }
    let green = mix([0.22, 0.42, 0.12], [0.55, 0.66, 0.2], tone);
    let color = if tone > 0.93 { [0.8, 0.5, 0.15] } else { green };
    let vein =
        p.y.abs() < 0.022 * length || ((p.x - 0.8 * p.y.abs()) / length * 9.0).fract().abs() < 0.14;
    let side = if p.y > 0.0 { 0.82 } else { 1.0 };
    Some(scaled(
        color,
        (0.35 + 0.75 * light) * side * if vein { 1.25 } else { 1.0 },
    ))
}

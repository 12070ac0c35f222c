//! Pixel formats. Each is one row of a table, from which all its properties follow.

/// A component of a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Component {
    /// Luma.
    Y,
    /// Blue-difference chroma (Cb).
    U,
    /// Red-difference chroma (Cr).
    V,
    R,
    G,
    B,
    /// Alpha.
    A,
}

/// Position of one component's samples in its plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComponentLayout {
    pub component: Component,
    /// Index of the plane.
    pub plane: usize,
    /// Byte offset of the first sample in a row.
    pub offset: usize,
    /// Bytes from one sample to the next in a row.
    pub step: usize,
}

/// A row of the table of formats.
struct Format {
    name: &'static str,
    /// Significant bits of a sample.
    depth: u32,
    /// Unused low bits of a sample.
    shift: u32,
    /// log2 of the horizontal and vertical chroma subsampling.
    chroma_shift: (u32, u32),
    components: &'static [ComponentLayout],
}

/// Makes the enum and the table of formats from rows.
macro_rules! formats {
    ($(
        $format:ident: $name:literal, $depth:literal, $shift:literal, $chroma:expr, $components:expr;
    )*) => {
        /// A raw video format. Names and memory layouts are those of GStreamer.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum PixelFormat {
            $($format,)*
        }

        const COUNT: usize = [$($name),*].len();

        const FORMATS: [Format; COUNT] = [$(Format {
            name: $name,
            depth: $depth,
            shift: $shift,
            chroma_shift: $chroma,
            components: &$components,
        },)*];

        impl PixelFormat {
            pub const ALL: [Self; COUNT] = [$(Self::$format,)*];
        }
    };
}

use Component::{A, B, G, R, U, V, Y};

// Subsampling of 4:4:4 and of formats without chroma planes, 4:2:2 and 4:2:0.
const FULL: (u32, u32) = (0, 0);
const HALF_WIDTH: (u32, u32) = (1, 0);
const HALF_BOTH: (u32, u32) = (1, 1);

formats! {
    // Name in GStreamer, depth, shift, subsampling, layout of the components.
    Nv12: "NV12", 8, 0, HALF_BOTH, [at(Y, 0, 0, 1), at(U, 1, 0, 2), at(V, 1, 1, 2)];
    I420: "I420", 8, 0, HALF_BOTH, planar([0, 1, 2], 1);
    Nv21: "NV21", 8, 0, HALF_BOTH, [at(Y, 0, 0, 1), at(U, 1, 1, 2), at(V, 1, 0, 2)];
    Nv16: "NV16", 8, 0, HALF_WIDTH, [at(Y, 0, 0, 1), at(U, 1, 0, 2), at(V, 1, 1, 2)];
    Yv12: "YV12", 8, 0, HALF_BOTH, planar([0, 2, 1], 1);
    Y42b: "Y42B", 8, 0, HALF_WIDTH, planar([0, 1, 2], 1);
    Y444: "Y444", 8, 0, FULL, planar([0, 1, 2], 1);
    P010Le: "P010_10LE", 10, 6, HALF_BOTH, [at(Y, 0, 0, 2), at(U, 1, 0, 4), at(V, 1, 2, 4)];
    I420_10Le: "I420_10LE", 10, 0, HALF_BOTH, planar([0, 1, 2], 2);
    I422_10Le: "I422_10LE", 10, 0, HALF_WIDTH, planar([0, 1, 2], 2);
    Y444_10Le: "Y444_10LE", 10, 0, FULL, planar([0, 1, 2], 2);
    I420_12Le: "I420_12LE", 12, 0, HALF_BOTH, planar([0, 1, 2], 2);
    I422_12Le: "I422_12LE", 12, 0, HALF_WIDTH, planar([0, 1, 2], 2);
    Y444_12Le: "Y444_12LE", 12, 0, FULL, planar([0, 1, 2], 2);
    Rgb: "RGB", 8, 0, FULL, packed([0, 1, 2], 3);
    Bgr: "BGR", 8, 0, FULL, packed([2, 1, 0], 3);
    Rgba: "RGBA", 8, 0, FULL, packed([0, 1, 2, 3], 4);
    Bgra: "BGRA", 8, 0, FULL, packed([2, 1, 0, 3], 4);
    Rgbx: "RGBx", 8, 0, FULL, packed([0, 1, 2], 4);
    Bgrx: "BGRx", 8, 0, FULL, packed([2, 1, 0], 4);
    Gray8: "GRAY8", 8, 0, FULL, [at(Y, 0, 0, 1)];
    Argb: "ARGB", 8, 0, FULL, packed([1, 2, 3, 0], 4);
    Abgr: "ABGR", 8, 0, FULL, packed([3, 2, 1, 0], 4);
    Xrgb: "xRGB", 8, 0, FULL, packed([1, 2, 3], 4);
    Xbgr: "xBGR", 8, 0, FULL, packed([3, 2, 1], 4);
    Gbr: "GBR", 8, 0, FULL, planar_rgb(1);
    Gbr10Le: "GBR_10LE", 10, 0, FULL, planar_rgb(2);
    P012Le: "P012_LE", 12, 4, HALF_BOTH, [at(Y, 0, 0, 2), at(U, 1, 0, 4), at(V, 1, 2, 4)];
    P016Le: "P016_LE", 16, 0, HALF_BOTH, [at(Y, 0, 0, 2), at(U, 1, 0, 4), at(V, 1, 2, 4)];
    Gray16Le: "GRAY16_LE", 16, 0, FULL, [at(Y, 0, 0, 2)];
    Gbr12Le: "GBR_12LE", 12, 0, FULL, planar_rgb(2);
    Y444_16Le: "Y444_16LE", 16, 0, FULL, planar([0, 1, 2], 2);
    A420: "A420", 8, 0, HALF_BOTH, with_alpha(planar([0, 1, 2], 1));
    A420_10Le: "A420_10LE", 10, 0, HALF_BOTH, with_alpha(planar([0, 1, 2], 2));
    A422_10Le: "A422_10LE", 10, 0, HALF_WIDTH, with_alpha(planar([0, 1, 2], 2));
    A444_10Le: "A444_10LE", 10, 0, FULL, with_alpha(planar([0, 1, 2], 2));
    Gbra: "GBRA", 8, 0, FULL, with_alpha(planar_rgb(1));
    Gbra10Le: "GBRA_10LE", 10, 0, FULL, with_alpha(planar_rgb(2));
    Gbra12Le: "GBRA_12LE", 12, 0, FULL, with_alpha(planar_rgb(2));
    Ayuv: "AYUV", 8, 0, FULL, [at(Y, 0, 1, 4), at(U, 0, 2, 4), at(V, 0, 3, 4), at(A, 0, 0, 4)];
    Vuya: "VUYA", 8, 0, FULL, [at(Y, 0, 2, 4), at(U, 0, 1, 4), at(V, 0, 0, 4), at(A, 0, 3, 4)];
    Rgba64Le: "RGBA64_LE", 16, 0, FULL, packed([0, 2, 4, 6], 8);
    Argb64Le: "ARGB64_LE", 16, 0, FULL, packed([2, 4, 6, 0], 8);
    Yuy2: "YUY2", 8, 0, HALF_WIDTH, packed_422([0, 1, 3]);
    Uyvy: "UYVY", 8, 0, HALF_WIDTH, packed_422([1, 0, 2]);
    Yvyu: "YVYU", 8, 0, HALF_WIDTH, packed_422([0, 3, 1]);
    Vyuy: "VYUY", 8, 0, HALF_WIDTH, packed_422([1, 2, 0]);
}

const fn at(component: Component, plane: usize, offset: usize, step: usize) -> ComponentLayout {
    ComponentLayout {
        component,
        plane,
        offset,
        step,
    }
}

/// Returns the layout of Y, U and V in these planes, in samples of `step` bytes.
const fn planar(planes: [usize; 3], step: usize) -> [ComponentLayout; 3] {
    let [y, u, v] = planes;
    [at(Y, y, 0, step), at(U, u, 0, step), at(V, v, 0, step)]
}

/// Adds A in a fourth plane to three components in a plane each.
const fn with_alpha([a, b, c]: [ComponentLayout; 3]) -> [ComponentLayout; 4] {
    [a, b, c, at(A, 3, 0, a.step)]
}

/// Returns the layout of Y, U and V at these bytes of groups of two pixels.
const fn packed_422([y, u, v]: [usize; 3]) -> [ComponentLayout; 3] {
    [at(Y, 0, y, 2), at(U, 0, u, 4), at(V, 0, v, 4)]
}

/// Returns the layout of R, G and B in the planes G, B, R, in samples of `step` bytes.
const fn planar_rgb(step: usize) -> [ComponentLayout; 3] {
    [at(R, 2, 0, step), at(G, 0, 0, step), at(B, 1, 0, step)]
}

/// Returns the layout of R, G, B and perhaps A at these bytes of pixels of `step` bytes.
const fn packed<const N: usize>(offsets: [usize; N], step: usize) -> [ComponentLayout; N] {
    let mut layout = [at(R, 0, 0, step); N];
    let mut i = 0;
    while i < N {
        layout[i] = at([R, G, B, A][i], 0, offsets[i], step);
        i += 1;
    }
    layout
}

impl PixelFormat {
    const fn format(self) -> &'static Format {
        const TABLE: &[Format; COUNT] = &FORMATS;
        &TABLE[self as usize]
    }

    /// Returns GStreamer's name of the format, as in `video/x-raw,format=...`.
    pub fn name(self) -> &'static str {
        self.format().name
    }

    /// Returns the format of GStreamer's name `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Returns the number of significant bits of a sample, 8 to 16.
    pub fn depth(self) -> u32 {
        self.format().depth
    }

    /// Returns the number of unused low bits of a sample: 6 for P010, 4 for P012.
    pub fn shift(self) -> u32 {
        self.format().shift
    }

    /// Returns the bytes of a sample, 1 or 2.
    pub(crate) fn sample_bytes(self) -> usize {
        if self.depth() > 8 { 2 } else { 1 }
    }

    pub fn is_rgb(self) -> bool {
        self.component(Component::R).is_some()
    }

    /// Returns `true` for formats of luma alone.
    pub fn is_gray(self) -> bool {
        self.components().len() == 1
    }

    /// Returns `true` if luma and subsampled chroma share a plane, as in YUY2.
    pub(crate) fn is_packed_subsampled(self) -> bool {
        let steps = |c| self.component(c).map(|at| (at.plane, at.step));
        match (steps(Component::Y), steps(Component::U)) {
            (Some(y), Some(u)) => y.0 == u.0 && y.1 != u.1,
            _ => false,
        }
    }

    pub fn has_alpha(self) -> bool {
        self.component(Component::A).is_some()
    }

    /// Returns log2 of the horizontal and vertical chroma subsampling, (0, 0) without chroma
    /// planes.
    pub fn chroma_shift(self) -> (u32, u32) {
        self.format().chroma_shift
    }

    /// Returns the components in the order Y, U, V or R, G, B, A, and their positions.
    pub fn components(self) -> &'static [ComponentLayout] {
        self.format().components
    }

    /// Returns the bits of a pixel of a plane that belong to no component, as a little-endian
    /// number: the x of RGBx, BGRx, xRGB and xBGR.
    pub fn filler(self, plane: usize) -> u64 {
        let sample = (1_u64 << (8 * self.sample_bytes())) - 1;
        let of_plane = || self.components().iter().filter(|c| c.plane == plane);
        let bytes = of_plane().map(|c| c.step).max().unwrap_or(0);
        let used = of_plane()
            .flat_map(|c| (c.offset..bytes).step_by(c.step))
            .fold(0, |used, byte| used | sample << (8 * byte));
        (0..bytes).fold(0, |all, byte| all | 0xff << (8 * byte)) & !used
    }

    /// Returns the number of planes, 1 to 4.
    pub fn planes(self) -> usize {
        self.components().iter().map(|c| c.plane).max().unwrap_or(0) + 1
    }

    /// Returns the layout of `component`, if the format has it.
    pub fn component(self, component: Component) -> Option<ComponentLayout> {
        self.components()
            .iter()
            .copied()
            .find(|c| c.component == component)
    }

    /// Returns the size in samples of `component` in a frame of `width` x `height`. Chroma sizes
    /// round up.
    pub fn component_size(
        self,
        component: Component,
        width: usize,
        height: usize,
    ) -> (usize, usize) {
        let (sx, sy) = match component {
            Component::U | Component::V => self.chroma_shift(),
            _ => (0, 0),
        };
        (width.div_ceil(1 << sx), height.div_ceil(1 << sy))
    }

    /// Returns the bytes of a row and the rows of plane `plane` in a frame of `width` x `height`,
    /// without padding. In YUY2 and the like, a row has whole groups of two pixels. In rows of odd
    /// width, the last luma sample is not shown; it repeats the one before.
    pub fn plane_size(self, plane: usize, width: usize, height: usize) -> (usize, usize) {
        let sizes = self.components().iter().filter(|c| c.plane == plane);
        sizes
            .map(|c| {
                let (w, h) = self.component_size(c.component, width, height);
                (w * c.step, h)
            })
            .max()
            .unwrap_or((0, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_consistent_planes_and_samples() {
        for format in PixelFormat::ALL {
            assert_eq!(PixelFormat::from_name(format.name()), Some(format));
            assert!((8..=16).contains(&format.depth()), "{format:?}");
            let wide = format.depth() > 8;
            assert!(wide || format.shift() == 0, "{format:?}");
            assert!(format.depth() + format.shift() <= 16, "{format:?}");
            let bytes = 1 + usize::from(wide);
            assert!((1..=4).contains(&format.planes()), "{format:?}");
            for plane in 0..format.planes() {
                let of_plane = || format.components().iter().filter(|c| c.plane == plane);
                let group = of_plane().map(|c| c.step).max().unwrap();
                // Samples and filler cover each byte of a group of pixels once.
                let mut covers: Vec<_> = (0..group)
                    .map(|byte| format.filler(plane) >> (8 * byte) & 0xff == 0xff)
                    .map(u32::from)
                    .collect();
                for c in of_plane() {
                    assert!(group.is_multiple_of(c.step), "{format:?}");
                    assert!(c.offset + bytes <= c.step.max(group), "{format:?}");
                    assert!(c.offset.is_multiple_of(bytes), "{format:?}");
                    for first in (c.offset..group).step_by(c.step) {
                        covers[first..first + bytes]
                            .iter_mut()
                            .for_each(|n| *n += 1);
                    }
                }
                assert!(covers.iter().all(|&n| n == 1), "{format:?}: {covers:?}");
                let (row, rows) = format.plane_size(plane, 5, 3);
                assert!(row.is_multiple_of(group) && rows > 0, "{format:?}");
            }
            let names = format.components().iter().map(|c| c.component);
            let names: Vec<_> = names.collect();
            let known = [
                &[Y][..],
                &[Y, U, V],
                &[Y, U, V, A],
                &[R, G, B],
                &[R, G, B, A],
            ];
            assert!(known.contains(&&names[..]), "{format:?}: {names:?}");
        }
    }

    #[test]
    fn only_pixels_with_an_unused_byte_have_a_filler() {
        for format in PixelFormat::ALL {
            let want = match format {
                PixelFormat::Rgbx | PixelFormat::Bgrx => 0xff00_0000,
                PixelFormat::Xrgb | PixelFormat::Xbgr => 0xff,
                _ => 0,
            };
            for plane in 0..format.planes() {
                assert_eq!(format.filler(plane), want, "{format:?}");
            }
        }
    }
}

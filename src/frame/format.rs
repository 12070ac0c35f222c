//! Pixel formats, described as data: planes, subsampling, where each component lies and at what
//! depth.

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

/// A raw video format; names and memory layouts are GStreamer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PixelFormat {
    Nv12,
    I420,
    Yv12,
    Y42b,
    Y444,
    P010Le,
    I420_10Le,
    Rgb,
    Bgr,
    Rgba,
    Bgra,
    Rgbx,
    Bgrx,
    Gray8,
}

/// Where one component's samples lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComponentLayout {
    pub component: Component,
    /// Index of the plane that holds it.
    pub plane: usize,
    /// Byte offset of the first sample in a row.
    pub offset: usize,
    /// Bytes from one sample to the next in a row.
    pub step: usize,
}

impl PixelFormat {
    pub const ALL: [PixelFormat; 14] = [
        Self::Nv12,
        Self::I420,
        Self::Yv12,
        Self::Y42b,
        Self::Y444,
        Self::P010Le,
        Self::I420_10Le,
        Self::Rgb,
        Self::Bgr,
        Self::Rgba,
        Self::Bgra,
        Self::Rgbx,
        Self::Bgrx,
        Self::Gray8,
    ];

    /// GStreamer's name of the format, as in `video/x-raw,format=...`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nv12 => "NV12",
            Self::I420 => "I420",
            Self::Yv12 => "YV12",
            Self::Y42b => "Y42B",
            Self::Y444 => "Y444",
            Self::P010Le => "P010_10LE",
            Self::I420_10Le => "I420_10LE",
            Self::Rgb => "RGB",
            Self::Bgr => "BGR",
            Self::Rgba => "RGBA",
            Self::Bgra => "BGRA",
            Self::Rgbx => "RGBx",
            Self::Bgrx => "BGRx",
            Self::Gray8 => "GRAY8",
        }
    }

    /// The format with GStreamer's name `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Significant bits of a sample: 8 or 10.
    pub fn depth(self) -> u32 {
        match self {
            Self::P010Le | Self::I420_10Le => 10,
            _ => 8,
        }
    }

    /// Bits by which a stored sample is shifted left (6 for P010, whose samples fill the high
    /// bits).
    pub fn shift(self) -> u32 {
        if self == Self::P010Le { 6 } else { 0 }
    }

    pub fn is_rgb(self) -> bool {
        matches!(
            self,
            Self::Rgb | Self::Bgr | Self::Rgba | Self::Bgra | Self::Rgbx | Self::Bgrx
        )
    }

    pub fn has_alpha(self) -> bool {
        matches!(self, Self::Rgba | Self::Bgra)
    }

    /// log2 of the (horizontal, vertical) chroma subsampling; (0, 0) without chroma planes.
    pub fn chroma_shift(self) -> (u32, u32) {
        match self {
            Self::Nv12 | Self::I420 | Self::Yv12 | Self::P010Le | Self::I420_10Le => (1, 1),
            Self::Y42b => (1, 0),
            _ => (0, 0),
        }
    }

    /// The components and where each lies.
    pub fn components(self) -> &'static [ComponentLayout] {
        use Component::*;
        const fn at(
            component: Component,
            plane: usize,
            offset: usize,
            step: usize,
        ) -> ComponentLayout {
            ComponentLayout {
                component,
                plane,
                offset,
                step,
            }
        }
        const NV12: &[ComponentLayout] = &[at(Y, 0, 0, 1), at(U, 1, 0, 2), at(V, 1, 1, 2)];
        const P010: &[ComponentLayout] = &[at(Y, 0, 0, 2), at(U, 1, 0, 4), at(V, 1, 2, 4)];
        const PLANAR: &[ComponentLayout] = &[at(Y, 0, 0, 1), at(U, 1, 0, 1), at(V, 2, 0, 1)];
        const PLANAR10: &[ComponentLayout] = &[at(Y, 0, 0, 2), at(U, 1, 0, 2), at(V, 2, 0, 2)];
        const YV12: &[ComponentLayout] = &[at(Y, 0, 0, 1), at(U, 2, 0, 1), at(V, 1, 0, 1)];
        const RGB: &[ComponentLayout] = &[at(R, 0, 0, 3), at(G, 0, 1, 3), at(B, 0, 2, 3)];
        const BGR: &[ComponentLayout] = &[at(R, 0, 2, 3), at(G, 0, 1, 3), at(B, 0, 0, 3)];
        const RGBX: &[ComponentLayout] = &[at(R, 0, 0, 4), at(G, 0, 1, 4), at(B, 0, 2, 4)];
        const BGRX: &[ComponentLayout] = &[at(R, 0, 2, 4), at(G, 0, 1, 4), at(B, 0, 0, 4)];
        const RGBA: &[ComponentLayout] = &[
            at(R, 0, 0, 4),
            at(G, 0, 1, 4),
            at(B, 0, 2, 4),
            at(A, 0, 3, 4),
        ];
        const BGRA: &[ComponentLayout] = &[
            at(R, 0, 2, 4),
            at(G, 0, 1, 4),
            at(B, 0, 0, 4),
            at(A, 0, 3, 4),
        ];
        const GRAY: &[ComponentLayout] = &[at(Y, 0, 0, 1)];
        match self {
            Self::Nv12 => NV12,
            Self::P010Le => P010,
            Self::I420 | Self::Y42b | Self::Y444 => PLANAR,
            Self::I420_10Le => PLANAR10,
            Self::Yv12 => YV12,
            Self::Rgb => RGB,
            Self::Bgr => BGR,
            Self::Rgbx => RGBX,
            Self::Bgrx => BGRX,
            Self::Rgba => RGBA,
            Self::Bgra => BGRA,
            Self::Gray8 => GRAY,
        }
    }

    /// Number of planes, 1 to 3.
    pub fn planes(self) -> usize {
        self.components().iter().map(|c| c.plane).max().unwrap_or(0) + 1
    }

    /// The layout of `component`, if the format has it.
    pub fn component(self, component: Component) -> Option<ComponentLayout> {
        self.components()
            .iter()
            .copied()
            .find(|c| c.component == component)
    }

    /// Size in samples of `component` for a frame of `width` x `height`: chroma sizes round up.
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

    /// (bytes in a row, rows) of plane `plane` for a frame of `width` x `height`, without padding.
    pub fn plane_size(self, plane: usize, width: usize, height: usize) -> (usize, usize) {
        let first = self
            .components()
            .iter()
            .filter(|c| c.plane == plane)
            .min_by_key(|c| c.offset);
        match first {
            Some(c) => {
                let (w, h) = self.component_size(c.component, width, height);
                (w * c.step, h)
            }
            None => (0, 0),
        }
    }
}

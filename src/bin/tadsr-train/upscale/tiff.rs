//! Directories of TIFF files: number of pictures, previews and density.

use anyhow::{Result, ensure};
use tadsr::frame::aspect::reduced;

/// Refuses a TIFF file of several pictures, of which only the first would be kept, and one that
/// begins with a preview.
pub fn check(bytes: &[u8]) -> Result<()> {
    let previews = Tiff::of(bytes).previews();
    let pictures = previews.iter().filter(|is_preview| !**is_preview).count();
    ensure!(
        previews.first() != Some(&true),
        "the first picture of the file is a preview, as in raw photos: convert it to a PNG first"
    );
    ensure!(
        pictures < 2,
        "a file of {pictures} pictures: split it first, for example with \
         'magick in.tif out-%04d.png'"
    );
    Ok(())
}

/// Returns the density of the first picture of a TIFF file.
pub fn density(bytes: &[u8]) -> Option<png::PixelDimensions> {
    Tiff::of(bytes).density()
}

/// Directories of a TIFF file, one per picture.
struct Tiff<'a> {
    bytes: &'a [u8],
    is_big_endian: bool,
    /// True in BigTIFF, whose offsets have 8 bytes.
    is_big: bool,
}

/// Tags of TIFF.
const NEW_SUBFILE_TYPE: usize = 254;
const X_RESOLUTION: usize = 282;
const Y_RESOLUTION: usize = 283;
const RESOLUTION_UNIT: usize = 296;

impl<'a> Tiff<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        let mut tiff = Self {
            bytes,
            is_big_endian: bytes.starts_with(b"MM"),
            is_big: false,
        };
        tiff.is_big = tiff.number(2, 2) == Some(43);
        tiff
    }

    fn number(&self, at: usize, size: usize) -> Option<usize> {
        let field = self.bytes.get(at..at.checked_add(size)?)?;
        let join = |sum, byte: &u8| sum << 8 | usize::from(*byte);
        Some(if self.is_big_endian {
            field.iter().fold(0, join)
        } else {
            field.iter().rev().fold(0, join)
        })
    }

    /// Returns the bytes of an offset, of the number of entries, and of an entry, which ends with
    /// its value.
    fn sizes(&self) -> (usize, usize, usize) {
        if self.is_big { (8, 8, 20) } else { (4, 2, 12) }
    }

    fn entry(&self, directory: usize, index: usize) -> usize {
        let (_, count, size) = self.sizes();
        let start = directory.saturating_add(count);
        start.saturating_add(index.saturating_mul(size))
    }

    fn entries(&self, directory: usize) -> Option<usize> {
        let (_, count, size) = self.sizes();
        let entries = self.number(directory, count)?;
        Some(entries.min(self.bytes.len() / size))
    }

    /// Returns the place of the value of `tag`, or of its offset if it is longer than an offset.
    fn value(&self, directory: usize, tag: usize) -> Option<usize> {
        let (offset, _, size) = self.sizes();
        let mut places = (0..self.entries(directory)?).map(|i| self.entry(directory, i));
        let place = places.find(|at| self.number(*at, 2) == Some(tag))?;
        Some(place + size - offset)
    }

    fn first(&self) -> Option<usize> {
        let (offset, ..) = self.sizes();
        self.number(if self.is_big { 8 } else { 4 }, offset)
    }

    /// Returns for each picture whether it is a preview of another.
    fn previews(&self) -> Vec<bool> {
        const MAX_PICTURES: usize = 10_000;
        let (offset, ..) = self.sizes();
        let mut previews = Vec::new();
        let mut at = self.first().unwrap_or(0);
        while let (1.., Some(entries)) = (at, self.entries(at)) {
            let kind = self.value(at, NEW_SUBFILE_TYPE);
            let kind = kind.and_then(|place| self.number(place, 4));
            previews.push(kind.unwrap_or(0) & 1 == 1);
            at = self.number(self.entry(at, entries), offset).unwrap_or(0);
            if previews.len() == MAX_PICTURES {
                // The list may be a circle.
                break;
            }
        }
        previews
    }

    /// Returns the density of the first picture.
    fn density(&self) -> Option<png::PixelDimensions> {
        let directory = self.first()?;
        let (offset, ..) = self.sizes();
        // A fraction of two numbers of 4 bytes.
        let fraction = |tag| {
            let mut at = self.value(directory, tag)?;
            if !self.is_big {
                at = self.number(at, offset)?;
            }
            let parts = (self.number(at, 4)?, self.number(at.checked_add(4)?, 4)?);
            (parts.0 > 0 && parts.1 > 0).then_some((parts.0 as u64, parts.1 as u64))
        };
        let (x, y) = (fraction(X_RESOLUTION)?, fraction(Y_RESOLUTION)?);
        let unit = self.value(directory, RESOLUTION_UNIT);
        // Inches, if no unit is stated.
        let unit = unit.map_or(Some(2), |place| self.number(place, 2))?;
        if unit == 1 {
            let (x, y) = reduced(x.0 * y.1, y.0 * x.1);
            return Some(png::PixelDimensions {
                xppu: u32::try_from(x).ok()?,
                yppu: u32::try_from(y).ok()?,
                unit: png::Unit::Unspecified,
            });
        }
        let per_metre = if unit == 3 { 100.0 } else { 1.0 / 0.0254 };
        let ppu = |(n, d): (u64, u64)| (n as f64 / d as f64 * per_metre).round() as u32;
        Some(png::PixelDimensions {
            xppu: ppu(x),
            yppu: ppu(y),
            unit: png::Unit::Meter,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with one directory of the given tags and 4-byte values, and fractions behind it.
    fn file(is_big_endian: bool, fields: &[(u16, u32)], tail: &[u32]) -> Vec<u8> {
        let short = |v: u16| {
            if is_big_endian {
                v.to_be_bytes()
            } else {
                v.to_le_bytes()
            }
        };
        let long = |v: u32| {
            if is_big_endian {
                v.to_be_bytes()
            } else {
                v.to_le_bytes()
            }
        };
        let mut bytes = if is_big_endian {
            b"MM".to_vec()
        } else {
            b"II".to_vec()
        };
        bytes.extend(short(42));
        bytes.extend(long(8));
        bytes.extend(short(fields.len() as u16));
        for (tag, value) in fields {
            bytes.extend([short(*tag), short(3)].concat());
            bytes.extend(long(1));
            if *tag == RESOLUTION_UNIT as u16 {
                bytes.extend([short(*value as u16), [0; 2]].concat());
            } else {
                bytes.extend(long(*value));
            }
        }
        bytes.extend(long(0));
        bytes.extend(tail.iter().flat_map(|v| long(*v)));
        bytes
    }

    #[test]
    fn the_density_is_read_in_its_unit_and_byte_order() {
        let of = |bytes: &[u8]| density(bytes).map(|d| (d.xppu, d.yppu, d.unit));
        for is_big_endian in [false, true] {
            let file = |unit: Option<u32>, tail: &[u32]| {
                let fields = 2 + unit.iter().len() as u32;
                let end = 8 + 2 + 12 * fields + 4;
                let mut list = vec![(282, end), (283, end + 8)];
                list.extend(unit.map(|unit| (296, unit)));
                file(is_big_endian, &list, tail)
            };
            let metre = png::Unit::Meter;
            assert_eq!(
                of(&file(Some(2), &[300, 1, 600, 2])),
                Some((11_811, 11_811, metre))
            );
            assert_eq!(
                of(&file(None, &[300, 1, 150, 1])),
                Some((11_811, 5906, metre))
            );
            assert_eq!(
                of(&file(Some(3), &[118, 1, 59, 1])),
                Some((11_800, 5900, metre))
            );
            let shape = Some((4, 3, png::Unit::Unspecified));
            assert_eq!(of(&file(Some(1), &[4, 3, 1, 1])), shape);
            // No number, and a value outside of the file.
            assert_eq!(of(&file(Some(2), &[300, 0, 300, 1])), None);
            assert_eq!(of(&file(Some(2), &[300, 1, 300])), None);
            assert_eq!(of(&file(Some(2), &[0, 1, 300, 1])), None);
        }
        assert_eq!(of(b"II"), None);
    }
}

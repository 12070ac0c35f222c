// SPDX-License-Identifier: MPL-2.0

//! Frame sizes in caps: exact scaling of integers, ranges and lists, and the choice of an output
//! size that downstream leaves open.

use gst::{glib, prelude::*};
use tadsr::frame::MAX_SIDE;

/// Largest value of the property `scale`. A model may support less.
pub(super) const MAX_SCALE: f64 = 4.0;

/// Scale for an open output size, if the model has no native scale.
const PREFERRED_SCALE: f64 = 2.0;

/// Returns an error text if a model with the maximum scale `max` does not support `scale`.
///
/// Tolerates a millionth, by which a scale may grow when it is made a fraction.
pub(super) fn overscale(scale: f64, max: f64) -> Option<String> {
    (scale > max + 1e-6)
        .then(|| format!("the model does not support a scale of {scale}: use at most {max}"))
}

/// Error text for a value of the property `scale` that [`Scale::new`] rejects.
pub(super) fn invalid_scale(value: f64) -> String {
    format!("scale={value} is invalid: use 0 or 1 to {MAX_SCALE}")
}

/// Relation between input and output size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scale {
    /// Both sides times `num / den`, in lowest terms. A side that `den` does not divide cannot be
    /// scaled.
    ///
    /// The factor may exceed the maximum of the model: it is refused later, with a reason.
    Fixed { num: i64, den: i64 },
    /// Each side times a factor from 1 to `max`; `preferred` for an open size.
    Free { max: f64, preferred: f64 },
}

impl Scale {
    /// Returns the scale for the property value `value`: free up to `max` for 0, fixed for 1 to
    /// [`MAX_SCALE`] (independent of `max`), otherwise `None`. `native` is the scale of a model
    /// that has only one.
    pub fn new(value: f64, max: f64, native: Option<f64>) -> Option<Self> {
        if value == 0.0 {
            let preferred = native.unwrap_or(PREFERRED_SCALE);
            return Some(Self::Free { max, preferred });
        }
        if !(1.0..=MAX_SCALE).contains(&value) {
            return None;
        }
        let (num, den) = fraction(value);
        Some(Self::Fixed { num, den })
    }

    /// Returns true if the size does not change.
    pub fn is_identity(self) -> bool {
        self == Self::Fixed { num: 1, den: 1 }
    }

    /// Returns the caps structure of the other pad for `structure` at the pad with direction
    /// `from`; `None` if no size is possible.
    pub fn transform(
        self,
        from: gst::PadDirection,
        structure: &gst::StructureRef,
    ) -> Option<gst::Structure> {
        let mut result = structure.to_owned();
        for side in ["width", "height"] {
            let spans = match structure.value(side) {
                Ok(value) => Span::read(value)?,
                Err(_) => vec![Span::ANY],
            };
            let spans: Vec<_> = spans
                .into_iter()
                .filter_map(|s| self.span(from, s))
                .collect();
            result.set_value(side, Span::write(&spans)?);
        }
        // Different factors for width and height change the pixel aspect ratio, so it is fixated
        // with the size.
        if matches!(self, Self::Free { .. }) {
            result.remove_field("pixel-aspect-ratio");
        }
        Some(result)
    }

    fn span(self, from: gst::PadDirection, span: Span) -> Option<Span> {
        match (self, from) {
            (Self::Fixed { num, den }, gst::PadDirection::Src) => span.times(den, num),
            (Self::Fixed { num, den }, _) => span.times(num, den),
            (Self::Free { max, .. }, gst::PadDirection::Src) => {
                Span::new((span.min as f64 / max - 1e-9).ceil() as i64, span.max, 1)
            }
            (Self::Free { max, .. }, _) => {
                Span::new(span.min, (span.max as f64 * max + 1e-9) as i64, 1)
            }
        }
    }

    /// Chooses the size and pixel aspect ratio that `output` leaves open, for the fixed caps
    /// structure `input`.
    ///
    /// Like `videoscale`, keeps the display aspect ratio: by the size if it is open, otherwise by
    /// the pixel aspect ratio.
    pub fn fixate(self, input: &gst::StructureRef, output: &mut gst::StructureRef) {
        let Self::Free { preferred, .. } = self else {
            return;
        };
        let (Some(width), Some(height)) = (side(input, "width"), side(input, "height")) else {
            return;
        };
        let in_par = pixel_aspect_ratio(input).unwrap_or(gst::Fraction::new(1, 1));
        let out_par = pixel_aspect_ratio(output).unwrap_or(in_par);
        // Width over height of an undistorted output, in its pixels.
        let aspect = (width as f64 * as_f64(in_par)) / (height as f64 * as_f64(out_par));

        let requested = (side(output, "width"), side(output, "height"));
        let Some((w, h)) = nearest_size(output, aspect, preferred * height as f64) else {
            return;
        };
        output.set("width", w as i32);
        output.set("height", h as i32);

        // A side that is only rounded to a whole pixel does not change the pixel aspect ratio.
        let rounded = requested != (Some(w), Some(h))
            && ((h as f64 * aspect).round() as i64 == w || (w as f64 / aspect).round() as i64 == h);
        let par = if rounded {
            out_par
        } else {
            let (num, den) = (i128::from(in_par.numer()), i128::from(in_par.denom()));
            reduced(num * i128::from(width * h), den * i128::from(height * w))
        };
        if output.has_field("pixel-aspect-ratio") {
            output.fixate_field_nearest_fraction("pixel-aspect-ratio", par);
        } else if input.has_field("pixel-aspect-ratio") || par != in_par {
            output.set("pixel-aspect-ratio", par);
        }
    }
}

/// Returns the width and height that `output` allows and that come nearest to `aspect`, the
/// quotient of both. Sides that `output` fixes stay. `height` is the wish if both are open.
fn nearest_size(output: &gst::StructureRef, aspect: f64, height: f64) -> Option<(i64, i64)> {
    let nearest = |side: &str, target: f64| {
        let spans = output.value(side).ok().and_then(Span::read);
        Span::nearest(&spans.unwrap_or_default(), target.round() as i64)
    };
    match (side(output, "width"), side(output, "height")) {
        (Some(w), Some(h)) => Some((w, h)),
        (Some(w), None) => Some((w, nearest("height", w as f64 / aspect)?)),
        (None, Some(h)) => Some((nearest("width", h as f64 * aspect)?, h)),
        (None, None) => {
            let h = nearest("height", height)?;
            let w = nearest("width", h as f64 * aspect)?;
            Some((w, nearest("height", w as f64 / aspect)?))
        }
    }
}

/// Returns the field `name`, "width" or "height", if it is fixed.
fn side(structure: &gst::StructureRef, name: &str) -> Option<i64> {
    structure.get::<i32>(name).ok().map(i64::from)
}

fn pixel_aspect_ratio(structure: &gst::StructureRef) -> Option<gst::Fraction> {
    structure.get("pixel-aspect-ratio").ok()
}

/// The multiples of `step` from `min` to `max`, both included, as in a caps field.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Span {
    min: i64,
    max: i64,
    step: i64,
}

impl Span {
    /// All possible lengths of a side.
    const ANY: Self = Self {
        min: 1,
        max: MAX_SIDE as i64,
        step: 1,
    };

    /// Returns the multiples of `step` from `min` to `max` that are possible lengths of a side;
    /// `None` if there are none.
    fn new(min: i64, max: i64, step: i64) -> Option<Self> {
        let min = (min.max(1) + step - 1) / step * step;
        let max = max.min(MAX_SIDE as i64) / step * step;
        (min <= max).then_some(Self { min, max, step })
    }

    /// Returns the members that `den` divides, times `num / den`.
    fn times(self, num: i64, den: i64) -> Option<Self> {
        let step = self.step / gcd(self.step, den) * den;
        let divisible = Self::new(self.min, self.max, step)?;
        let scaled = |v: i64| v / den * num;
        // The scaled maximum may exceed the longest side, so `new` clips it to a multiple of the
        // step.
        Self::new(scaled(divisible.min), scaled(divisible.max), scaled(step))
    }

    /// Reads an integer, range or list; `None` for a value of another type.
    fn read(value: &glib::SendValue) -> Option<Vec<Self>> {
        if let Ok(v) = value.get::<i32>() {
            Some(Self::new(v.into(), v.into(), 1).into_iter().collect())
        } else if let Ok(range) = value.get::<gst::IntRange<i32>>() {
            let (min, max, step) = (range.min(), range.max(), range.step());
            Some(
                Self::new(min.into(), max.into(), step.into())
                    .into_iter()
                    .collect(),
            )
        } else if let Ok(list) = value.get::<gst::ListRef>() {
            let spans: Vec<_> = list.iter().filter_map(Self::read).flatten().collect();
            Some(spans)
        } else {
            None
        }
    }

    /// Returns a caps field with the values of `spans`; `None` if there are none.
    fn write(spans: &[Self]) -> Option<glib::SendValue> {
        let value = |s: &Self| {
            // Possible lengths of a side fit in 32 bits.
            let (min, max, step) = (s.min as i32, s.max as i32, s.step as i32);
            if min == max {
                min.to_send_value()
            } else {
                gst::IntRange::with_step(min, max, step).to_send_value()
            }
        };
        match spans {
            [] => None,
            [one] => Some(value(one)),
            many => Some(gst::List::new(many.iter().map(value)).to_send_value()),
        }
    }

    /// Returns the value nearest to `target`.
    fn nearest(spans: &[Self], target: i64) -> Option<i64> {
        let candidates = spans.iter().flat_map(|s| {
            let below = target.clamp(s.min, s.max) / s.step * s.step;
            [below, (below + s.step).min(s.max)]
        });
        candidates.min_by_key(|v| (v - target).abs())
    }
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Returns the fraction with the smallest denominator within a millionth of `value`.
fn fraction(value: f64) -> (i64, i64) {
    let near =
        |den: i64| (value * den as f64 - (value * den as f64).round()).abs() <= 1e-6 * den as f64;
    let den = (1..1_000_000).find(|&den| near(den)).unwrap_or(1);
    ((value * den as f64).round() as i64, den)
}

fn as_f64(fraction: gst::Fraction) -> f64 {
    f64::from(fraction.numer()) / f64::from(fraction.denom())
}

/// Returns `num / den` in lowest terms, approximated if they exceed 32 bits.
fn reduced(num: i128, den: i128) -> gst::Fraction {
    let (mut a, mut b) = (num, den);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    match (i32::try_from(num / a), i32::try_from(den / a)) {
        (Ok(num), Ok(den)) => gst::Fraction::new(num, den),
        _ => gst::Fraction::approximate_f64(num as f64 / den as f64)
            .unwrap_or(gst::Fraction::new(1, 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gst::PadDirection::{Sink, Src};

    fn transform(scale: f64, from: gst::PadDirection, caps: &str) -> Option<String> {
        gst::init().unwrap();
        let structure: gst::Structure = caps.parse().unwrap();
        let result = Scale::new(scale, MAX_SCALE, None)
            .unwrap()
            .transform(from, &structure)?;
        Some(format!(
            "{} {}",
            result.value("width").unwrap().serialize().unwrap(),
            result.value("height").unwrap().serialize().unwrap()
        ))
    }

    fn fixate(input: &str, output: &str) -> String {
        fixate_for(None, input, output)
    }

    fn fixate_for(native: Option<f64>, input: &str, output: &str) -> String {
        gst::init().unwrap();
        let input: gst::Structure = input.parse().unwrap();
        let mut output: gst::Structure = output.parse().unwrap();
        let scale = Scale::new(0.0, 4.0, native).unwrap();
        scale.fixate(&input, &mut output);
        let par = output.get::<gst::Fraction>("pixel-aspect-ratio");
        format!(
            "{}x{} {}",
            output.get::<i32>("width").unwrap(),
            output.get::<i32>("height").unwrap(),
            par.map_or("-".into(), |p| format!("{}/{}", p.numer(), p.denom()))
        )
    }

    #[test]
    fn integers_are_multiplied_and_divided_exactly_or_refused() {
        let t = transform;
        let big = "v,width=640,height=480";
        assert_eq!(t(4.0, Sink, big).unwrap(), "2560 1920");
        assert_eq!(t(4.0, Src, big).unwrap(), "160 120");
        assert_eq!(t(1.5, Sink, big).unwrap(), "960 720");
        assert_eq!(t(4.0, Src, "v,width=641,height=480"), None);
        assert_eq!(t(1.5, Sink, "v,width=640,height=481"), None);
        assert_eq!(
            t(1.333_333_3, Sink, "v,width=480,height=360").unwrap(),
            "640 480"
        );
        assert_eq!(t(4.0, Sink, "v,width=32768,height=480"), None);
    }

    #[test]
    fn ranges_keep_only_sizes_that_the_scale_divides() {
        let ranges = "v,width=[1,1001],height=[10,20]";
        assert_eq!(
            transform(2.0, Sink, ranges).unwrap(),
            "[ 2, 2002, 2 ] [ 20, 40, 2 ]"
        );
        assert_eq!(transform(2.0, Src, ranges).unwrap(), "[ 1, 500 ] [ 5, 10 ]");
        assert_eq!(
            transform(1.5, Sink, ranges).unwrap(),
            "[ 3, 1500, 3 ] [ 15, 30, 3 ]"
        );
        assert_eq!(
            transform(1.5, Src, ranges).unwrap(),
            "[ 2, 666, 2 ] [ 8, 12, 2 ]"
        );
        assert_eq!(
            transform(3.0, Src, "v,width=[2,4],height=[3,5]").unwrap(),
            "1 1"
        );
        assert_eq!(transform(4.0, Src, "v,width=[1,3],height=8"), None);
        let stepped = "v,width=[16,64,16],height=16";
        assert_eq!(transform(2.0, Src, stepped).unwrap(), "[ 8, 32, 8 ] 8");
        assert_eq!(
            transform(4.0, Sink, "v").unwrap(),
            "[ 4, 32768, 4 ] [ 4, 32768, 4 ]"
        );
    }

    #[test]
    fn lists_keep_their_divisible_members() {
        let list = "v,width={640,641,[8,16]},height={480}";
        assert_eq!(
            transform(4.0, Src, list).unwrap(),
            "{ (int)160, (GstIntRange)[ 2, 4 ] } 120"
        );
        assert_eq!(transform(2.0, Src, "v,width={1,3},height=2"), None);
    }

    #[test]
    fn scale_0_allows_every_size_from_the_input_to_four_times_it() {
        let fixed = "v,width=320,height=241,pixel-aspect-ratio=(fraction)1/1";
        assert_eq!(
            transform(0.0, Sink, fixed).unwrap(),
            "[ 320, 1280 ] [ 241, 964 ]"
        );
        assert_eq!(
            transform(0.0, Src, fixed).unwrap(),
            "[ 80, 320 ] [ 61, 241 ]"
        );
    }

    #[test]
    fn a_structure_with_an_invalid_size_has_no_scaled_size() {
        assert_eq!(transform(2.0, Sink, "v,width=wide,height=1"), None);
        assert_eq!(transform(2.0, Sink, "v,width=-4,height=1"), None);
        assert_eq!(transform(2.0, Sink, "v,width=0,height=1"), None);
    }

    #[test]
    fn invalid_scales_are_refused() {
        for bad in [0.5, -1.0, 0.999, 4.1, f64::NAN, f64::INFINITY] {
            assert_eq!(Scale::new(bad, 4.0, None), None, "{bad}");
        }
        assert!(Scale::new(1.0, 4.0, None).unwrap().is_identity());
        assert_eq!(
            Scale::new(2.25, 4.0, None),
            Some(Scale::Fixed { num: 9, den: 4 })
        );
        assert_eq!(
            Scale::new(1.333, 4.0, None),
            Some(Scale::Fixed {
                num: 1333,
                den: 1000
            })
        );
    }

    #[test]
    fn an_open_size_becomes_twice_the_input() {
        let open = "v,width=[320,1280],height=[240,960]";
        assert_eq!(fixate("v,width=320,height=240", open), "640x480 -");
        let par = "v,width=320,height=240,pixel-aspect-ratio=(fraction)4/3";
        assert_eq!(fixate(par, open), "640x480 4/3");
    }

    #[test]
    fn an_open_size_follows_the_native_scale() {
        let input = "v,width=320,height=240";
        let open = "v,width=[320,1280],height=[240,960]";
        assert_eq!(fixate_for(Some(4.0), input, open), "1280x960 -");
        assert_eq!(fixate_for(Some(1.0), input, open), "320x240 -");
    }

    #[test]
    fn an_open_side_follows_the_fixed_one() {
        let input = "v,width=321,height=241,pixel-aspect-ratio=(fraction)1/1";
        assert_eq!(fixate(input, "v,width=642,height=[241,964]"), "642x482 1/1");
        assert_eq!(fixate(input, "v,width=640,height=[241,964]"), "640x480 1/1");
        assert_eq!(
            fixate(input, "v,width=[321,1284],height=480"),
            "639x480 1/1"
        );
    }

    #[test]
    fn the_pixel_aspect_ratio_changes_if_the_size_does_not_fit() {
        let input = "v,width=320,height=240,pixel-aspect-ratio=(fraction)1/1";
        assert_eq!(fixate(input, "v,width=640,height=360"), "640x360 3/4");
        // The height cannot reach 480, so the pixel aspect ratio changes.
        assert_eq!(fixate(input, "v,width=640,height=[240,360]"), "640x360 3/4");
        // Downstream requires square pixels, so the size changes.
        let pal = "v,width=720,height=576,pixel-aspect-ratio=(fraction)16/15";
        let square = "v,width=[720,2880],height=[576,2304],pixel-aspect-ratio=(fraction)1/1";
        assert_eq!(fixate(pal, square), "1536x1152 1/1");
        // Size and pixel aspect ratio are fixed, so nothing changes.
        let fixed = "v,width=640,height=360,pixel-aspect-ratio=(fraction)1/1";
        assert_eq!(fixate(input, fixed), "640x360 1/1");
    }
}

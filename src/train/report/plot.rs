//! SVG plots that take their colours from the page.

use std::fmt::Write;

use super::html::{COLOURS, escape};

/// Size of a plot and of the frame within it.
const SIZE: (f64, f64) = (520.0, 250.0);
const LEFT: f64 = 58.0;
const RIGHT: f64 = 508.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 224.0;
/// Maximum number of points of a line.
const POINTS: usize = 240;
/// Range of values from which the scale is logarithmic, as a factor.
const DECADE: f64 = 10.0;

/// Plots `values` over `steps`: mean and extremes of neighbouring steps.
pub(super) fn curve(name: &str, steps: &[u64], values: &[f64]) -> String {
    let points: Vec<Bucket> = buckets(steps, values);
    let low = points.iter().map(|p| p.mean).fold(f64::INFINITY, f64::min);
    let high = points
        .iter()
        .map(|p| p.mean)
        .fold(f64::NEG_INFINITY, f64::max);
    let mut svg = Svg::new(name);
    if points.is_empty() {
        svg.text(LEFT, 0.5 * (TOP + BOTTOM), "start", "no finite values");
        return svg.finish();
    }
    let y = Scale::new(low, high);
    let x = Scale::linear(points[0].step, points[points.len() - 1].step);
    svg.frame(&x, &y);
    let at = |step: f64, v: f64| (x.position(step, LEFT, RIGHT), y.position(v, BOTTOM, TOP));
    let there = points.iter().map(|p| at(p.step, p.high));
    let back = points.iter().rev().map(|p| at(p.step, p.low));
    svg.shape("band f0", there.chain(back), true);
    svg.shape("line s0", points.iter().map(|p| at(p.step, p.mean)), false);
    let last = points[points.len() - 1].mean;
    svg.text(RIGHT, 16.0, "end", &format!("last {}", number(last)));
    svg.finish()
}

/// Plots the share of each of `parts` in their sum over `steps`, stacked.
pub(super) fn shares(steps: &[u64], parts: &[(&str, &[f64])]) -> String {
    let mut svg = Svg::new("");
    let series: Vec<Vec<Bucket>> = parts.iter().map(|(_, v)| sized(steps, v)).collect();
    let count = series.iter().map(Vec::len).min().unwrap_or(0);
    if count < 2 {
        return svg.finish();
    }
    let first = &series[0];
    let x = Scale::linear(first[0].step, first[count - 1].step);
    let y = Scale::linear(0.0, 1.0);
    svg.frame(&x, &y);
    let mut floor = vec![0.0; count];
    let total = |i: usize| series.iter().map(|s| s[i].mean).sum::<f64>();
    let position = |i: usize, v: f64| {
        (
            x.position(first[i].step, LEFT, RIGHT),
            y.position(v, BOTTOM, TOP),
        )
    };
    let mut left = LEFT;
    for (k, (series, (name, _))) in series.iter().zip(parts).enumerate() {
        let share = |i: usize| match total(i) {
            all if all > 0.0 => series[i].mean / all,
            _ => 0.0,
        };
        let ceiling: Vec<f64> = (0..count).map(|i| floor[i] + share(i)).collect();
        let up = ceiling.iter().enumerate().map(|(i, v)| position(i, *v));
        let down = floor.iter().enumerate().rev().map(|(i, v)| position(i, *v));
        svg.shape(&format!("f{}", k % COLOURS), up.chain(down), true);
        let text = format!("{name} {:.0} %", 100.0 * share(count - 1));
        svg.swatch(left, k % COLOURS);
        svg.text(left + 14.0, 16.0, "start", &text);
        left += 26.0 + 6.6 * text.chars().count() as f64;
        floor = ceiling;
    }
    svg.finish()
}

/// Plots differences with their margins, a row for each, beside a line at 0.
pub(super) fn intervals(title: &str, rows: &[(String, f64, f64)]) -> String {
    const ROW: f64 = 18.0;
    let middle = 250.0;
    let height = TOP + ROW * rows.len() as f64 + 30.0;
    let mut svg = Svg::sized(title, height);
    let ends = rows.iter().flat_map(|(_, d, m)| [d - m, d + m, 0.0]);
    let ends: Vec<f64> = ends.filter(|v| v.is_finite()).collect();
    let low = ends.iter().copied().fold(0.0, f64::min);
    let high = ends.iter().copied().fold(0.0, f64::max);
    let room = 0.05 * (high - low).max(1e-9);
    let x = Scale::linear(low - room, high + room);
    let bottom = height - 26.0;
    for v in x.ticks() {
        let at = x.position(v, middle, RIGHT);
        let class = if v == 0.0 { "line zero" } else { "axis" };
        svg.add(format_args!(
            "<path class=\"{class}\" d=\"M{at:.1} {TOP}V{bottom:.1}\"/>"
        ));
        svg.text(at, bottom + 16.0, "middle", &number(v));
    }
    for (i, (name, difference, margin)) in rows.iter().enumerate() {
        let y = TOP + ROW * (i as f64 + 0.6);
        svg.text(middle - 10.0, y + 4.0, "end", name);
        let [low, at, high] = [difference - margin, *difference, difference + margin]
            .map(|v| x.position(v, middle, RIGHT));
        svg.add(format_args!(
            "<path class=\"line s0\" d=\"M{low:.1} {y:.1}H{high:.1}\"/>\
             <circle class=\"f0\" cx=\"{at:.1}\" cy=\"{y:.1}\" r=\"4\"/>"
        ));
    }
    svg.finish()
}

/// Steps that are one point of a line.
struct Bucket {
    /// The last of the steps.
    step: f64,
    mean: f64,
    low: f64,
    high: f64,
}

/// Returns the points of `values` that are finite.
fn buckets(steps: &[u64], values: &[f64]) -> Vec<Bucket> {
    let finite: Vec<(u64, f64)> = steps
        .iter()
        .copied()
        .zip(values.iter().copied())
        .filter(|(_, v)| v.is_finite())
        .collect();
    let bucket = |part: &[(u64, f64)]| {
        let values = || part.iter().map(|p| p.1);
        Bucket {
            step: part[part.len() - 1].0 as f64,
            mean: values().sum::<f64>() / part.len() as f64,
            low: values().fold(f64::INFINITY, f64::min),
            high: values().fold(f64::NEG_INFINITY, f64::max),
        }
    };
    let size = finite.len().div_ceil(POINTS).max(1);
    finite.chunks(size).map(bucket).collect()
}

/// Returns points at the same steps for every series. Values that are not finite or below 0 count
/// as 0.
fn sized(steps: &[u64], values: &[f64]) -> Vec<Bucket> {
    let clean: Vec<f64> = values
        .iter()
        .map(|v| if v.is_finite() { v.max(0.0) } else { 0.0 })
        .collect();
    buckets(steps, &clean)
}

/// Map from values to positions on an axis.
struct Scale {
    low: f64,
    high: f64,
    log: bool,
}

impl Scale {
    fn linear(low: f64, high: f64) -> Self {
        let high = if high > low { high } else { low + 1.0 };
        Self {
            low,
            high,
            log: false,
        }
    }

    /// Creates an axis for values from `low` to `high`, logarithmic if they are far apart.
    fn new(low: f64, high: f64) -> Self {
        if low > 0.0 && high > DECADE * low {
            return Self {
                low: low.log10() - 0.05,
                high: high.log10() + 0.05,
                log: true,
            };
        }
        let room = 0.05 * (high - low).max(1e-3 * high.abs()).max(1e-12);
        Self::linear(low - room, high + room)
    }

    /// Returns the position of a value between `from` and `to`, or the nearest end.
    fn position(&self, v: f64, from: f64, to: f64) -> f64 {
        let v = if self.log { v.max(1e-300).log10() } else { v };
        let part = (v - self.low) / (self.high - self.low);
        from + (to - from) * part.clamp(0.0, 1.0)
    }

    /// Returns round values along the axis.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let (first, last) = (self.low.ceil() as i32, self.high.floor() as i32);
            let every = ((last - first) / 5).max(0) as usize + 1;
            let decades = (first..=last).step_by(every).map(|e| 10f64.powi(e));
            let decades: Vec<f64> = decades.collect();
            if decades.len() > 1 {
                return decades;
            }
            let ends = [self.low + 0.05, self.high - 0.05];
            return ends.map(|e| 10f64.powf(e)).to_vec();
        }
        let rough = (self.high - self.low) / 4.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|k| k * power);
        let step = step.into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).take(12).map(|i| i as f64 * step).collect()
    }
}

/// Formats a number in few characters.
fn number(v: f64) -> String {
    match v.abs() {
        0.0 => "0".into(),
        a if (1e-3..1e6).contains(&a) => {
            let decimals = (3 - a.log10().floor() as i32).clamp(0, 6) as usize;
            let text = format!("{v:.decimals$}");
            if text.contains('.') {
                text.trim_end_matches('0').trim_end_matches('.').into()
            } else {
                text
            }
        }
        _ => format!("{v:.1e}"),
    }
}

struct Svg(String);

impl Svg {
    fn new(title: &str) -> Self {
        Self::sized(title, SIZE.1)
    }

    fn sized(title: &str, height: f64) -> Self {
        let width = SIZE.0;
        let mut svg = Self(format!(
            "<svg viewBox=\"0 0 {width} {height:.0}\" role=\"img\">"
        ));
        if !title.is_empty() {
            svg.add(format_args!("<title>{}</title>", escape(title)));
            svg.text(LEFT, 16.0, "start", title);
        }
        svg
    }

    fn frame(&mut self, x: &Scale, y: &Scale) {
        for v in y.ticks() {
            let at = y.position(v, BOTTOM, TOP);
            self.add(format_args!(
                "<path class=\"axis\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/>"
            ));
            self.text(LEFT - 6.0, at + 4.0, "end", &number(v));
        }
        for v in x.ticks() {
            let at = x.position(v, LEFT, RIGHT);
            self.text(at, BOTTOM + 17.0, "middle", &number(v));
        }
        self.add(format_args!(
            "<path class=\"axis\" d=\"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}\"/>"
        ));
    }

    /// Draws a line through `points`, or the area that they surround.
    fn shape(&mut self, class: &str, points: impl Iterator<Item = (f64, f64)>, area: bool) {
        self.add(format_args!("<path class=\"{class}\" d=\""));
        for (i, (x, y)) in points.enumerate() {
            let letter = if i == 0 { 'M' } else { 'L' };
            self.add(format_args!("{letter}{x:.1} {y:.1}"));
        }
        self.0 += if area { "Z\"/>" } else { "\"/>" };
    }

    fn swatch(&mut self, x: f64, colour: usize) {
        self.add(format_args!(
            "<rect class=\"f{colour}\" x=\"{x:.1}\" y=\"6\" width=\"10\" height=\"10\"/>"
        ));
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = escape(text);
        self.add(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    fn add(&mut self, text: std::fmt::Arguments) {
        // Writing to a string cannot fail.
        let _ = self.0.write_fmt(text);
    }

    fn finish(mut self) -> String {
        self.0 += "</svg>";
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_lie_on_the_axis() {
        assert_eq!(Scale::linear(0.0, 100.0).ticks(), [0.0, 50.0, 100.0]);
        let ticks = Scale::new(0.011, 9.0).ticks();
        assert!(
            ticks.len() >= 2 && ticks.iter().all(|t| (0.009..=10.1).contains(t)),
            "{ticks:?}"
        );
        for (low, high) in [
            (0.0, 0.0),
            (-3.0, 2.0),
            (1e-9, 2e-9),
            (5.0, 5.0),
            (1e-8, 1e8),
        ] {
            let scale = Scale::new(low, high);
            let ticks = scale.ticks();
            assert!(
                !ticks.is_empty() && ticks.len() < 13,
                "{low} {high}: {ticks:?}"
            );
            assert!(scale.position(low, 0.0, 1.0) < scale.position(high, 0.0, 1.0) || low == high);
        }
    }

    #[test]
    fn long_curves_become_few_points_that_keep_the_extremes() {
        let steps: Vec<u64> = (0..10_000).collect();
        let mut values = vec![1.0; 10_000];
        values[5000] = 9.0;
        values[6000] = f64::NAN;
        let points = buckets(&steps, &values);
        assert!(points.len() <= POINTS);
        assert_eq!(points.iter().map(|p| p.high).fold(0.0, f64::max), 9.0);
        assert!(points.iter().all(|p| p.mean >= 1.0 && p.mean < 1.3));
    }

    #[test]
    fn numbers_are_short() {
        for (v, want) in [
            (0.0, "0"),
            (1.0, "1"),
            (0.25, "0.25"),
            (1234.5678, "1235"),
            (-0.012345, "-0.01235"),
            (3.2e-7, "3.2e-7"),
            (200.0, "200"),
        ] {
            assert_eq!(number(v), want);
        }
    }
}

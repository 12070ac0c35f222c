//! Results of an evaluation: means, differences with confidence intervals, and gates.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
};

use serde::{Deserialize, Deserializer, Serialize};

use super::Table;

/// Values of one method for one picture or one part of a clip.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub method: String,
    /// Degradation of the input, such as `clean` or `jpeg60`.
    pub condition: String,
    pub scale: f64,
    /// Name of the picture or clip.
    pub image: String,
    /// Index of the part of the clip.
    pub part: usize,
    /// Frames in the part, over which the values are averaged. 1 for a picture.
    pub frames: usize,
    /// Frames of these that are equal to the original. Their PSNR is infinite and left out of the
    /// mean, unless all are equal.
    #[serde(default)]
    pub exact: usize,
    /// In dB, higher is better. Infinite (`null` in JSON) for equal pictures.
    #[serde(deserialize_with = "infinite")]
    pub psnr_y: f64,
    /// 0 to 1, higher is better. `None` for pictures smaller than its window.
    pub ssim: Option<f64>,
    /// 0 to 1, higher is better. `None` for pictures smaller than its window.
    pub ms_ssim: Option<f64>,
    /// 0 or more, lower is better. `None` if not measured.
    pub lpips: Option<f64>,
    /// 0 or more, lower is more natural. `None` if not measured and for pictures smaller than its
    /// blocks.
    pub niqe: Option<f64>,
    /// See [`super::TemporalScores::warping_error`]. `None` for pictures.
    pub warping_error: Option<f64>,
    /// See [`super::TemporalScores::tof`]. `None` for pictures.
    pub tof: Option<f64>,
    /// See [`super::TemporalScores::flicker`]. `None` for pictures and without still areas.
    pub flicker: Option<f64>,
}

/// Reads a number. `null` is infinity, which JSON does not have.
fn infinite<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::INFINITY))
}

impl Default for Row {
    fn default() -> Self {
        Self {
            method: String::new(),
            condition: String::new(),
            scale: 1.0,
            image: String::new(),
            part: 0,
            frames: 1,
            exact: 0,
            psnr_y: 0.0,
            ssim: None,
            ms_ssim: None,
            lpips: None,
            niqe: None,
            warping_error: None,
            tof: None,
            flicker: None,
        }
    }
}

/// Means of one method, condition and scale over the pictures and clips that have the metric. A
/// clip of any length counts as much as a picture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Mean {
    pub method: String,
    pub condition: String,
    pub scale: f64,
    /// Number of pictures and clips.
    pub images: usize,
    /// Number of pictures and frames.
    pub frames: usize,
    /// Number of those that are equal to the original and left out of the PSNR.
    pub exact: usize,
    pub psnr_y: f64,
    pub ssim: Option<f64>,
    pub ms_ssim: Option<f64>,
    pub lpips: Option<f64>,
    pub niqe: Option<f64>,
    pub warping_error: Option<f64>,
    pub tof: Option<f64>,
    pub flicker: Option<f64>,
}

/// Difference of two methods on the same pictures and clips.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    pub method: String,
    pub condition: String,
    pub scale: f64,
    /// Heading of the metric.
    pub metric: &'static str,
    /// Number of pictures and clips that were measured with both.
    pub images: usize,
    /// Mean of the differences of each picture and clip: the value of the method minus that of the
    /// other.
    pub difference: f64,
    /// Half the width of the 95 % confidence interval of the mean (Student's t) over pictures and
    /// clips. If it is smaller than the difference, the sign is significant for similar material.
    /// `None` for a single picture or clip.
    pub margin: Option<f64>,
    /// The same with the parts of each clip as independent measurements. It is valid for these
    /// clips only. `None` if a clip has a single part.
    pub margin_within: Option<f64>,
}

/// A value with an upper limit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limit {
    pub value: f64,
    /// Value of the reference plus a tenth of its magnitude.
    pub limit: f64,
    /// `true` if the value is within the limit.
    pub met: bool,
}

/// Requirements for a ResShift model in comparison with interpolation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gate {
    pub method: String,
    pub condition: String,
    pub scale: f64,
    /// Relative decrease of LPIPS. Negative if it is higher than that of the reference.
    pub lpips_gain: Option<f64>,
    /// PSNR-Y minus that of the reference, in dB.
    pub psnr_gain: f64,
    pub flicker: Option<Limit>,
    pub warping_error: Option<Limit>,
}

/// All rows of an evaluation. [`fmt::Display`] writes the tables of means.
#[derive(Clone, Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
}

impl Report {
    pub fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Returns the means of each method, condition and scale, in order of their first rows.
    pub fn means(&self) -> Vec<Mean> {
        let keys = self.rows.iter();
        let keys = distinct(keys.map(|r| (r.method.as_str(), r.condition.as_str(), r.scale)));
        keys.into_iter().map(|key| self.mean_of(key)).collect()
    }

    fn mean_of(&self, key: (&str, &str, f64)) -> Mean {
        let rows: Vec<_> = self.rows.iter().filter(|r| r.is_of(key)).collect();
        let mean = |of: fn(&Row) -> Option<f64>| {
            let images = by_image(rows.iter().filter_map(|r| Some((*r, of(r)?))));
            mean(images.iter().map(|(_, parts)| weighted(parts)))
        };
        Mean {
            method: key.0.into(),
            condition: key.1.into(),
            scale: key.2,
            images: distinct(rows.iter().map(|r| &r.image)).len(),
            frames: rows.iter().map(|r| r.frames).sum(),
            exact: rows.iter().map(|r| r.exact).sum(),
            psnr_y: mean(|r| Some(r.psnr_y).filter(|v| v.is_finite())).unwrap_or(f64::INFINITY),
            ssim: mean(|r| r.ssim),
            ms_ssim: mean(|r| r.ms_ssim),
            lpips: mean(|r| r.lpips),
            niqe: mean(|r| r.niqe),
            warping_error: mean(|r| r.warping_error),
            tof: mean(|r| r.tof),
            flicker: mean(|r| r.flicker),
        }
    }

    /// Compares every other method with `reference` for each common condition, scale and metric, if
    /// there are enough pictures, clips or parts for a confidence interval.
    pub fn against(&self, reference: &str) -> Vec<Comparison> {
        let means = self.means();
        let others = means.iter().filter(|m| m.method != reference);
        let each = others.flat_map(|m| METRICS.iter().map(move |metric| (m, metric)));
        each.filter_map(|(m, metric)| self.compare(m, reference, metric))
            .collect()
    }

    fn compare(&self, of: &Mean, reference: &str, metric: &Metric) -> Option<Comparison> {
        let rows = |method| {
            let key = (method, of.condition.as_str(), of.scale);
            let rows = self.rows.iter().filter(move |r| r.is_of(key));
            rows.filter_map(|r| Some((r, (metric.of_row)(r).filter(|v| v.is_finite())?)))
        };
        let theirs: HashMap<_, _> = rows(reference)
            .map(|(r, v)| ((r.image.as_str(), r.part), v))
            .collect();
        let differences = rows(&of.method)
            .filter_map(|(r, v)| Some((r, v - theirs.get(&(r.image.as_str(), r.part))?)));
        let images = by_image(differences);
        let of_images: Vec<f64> = images.iter().map(|(_, parts)| weighted(parts)).collect();
        let margin = margin(&of_images);
        let margin_within = margin_within(&images);
        if margin.is_none() && margin_within.is_none() {
            return None;
        }
        Some(Comparison {
            method: of.method.clone(),
            condition: of.condition.clone(),
            scale: of.scale,
            metric: metric.heading,
            images: images.len(),
            difference: mean(of_images.into_iter())?,
            margin,
            margin_within,
        })
    }

    /// Returns the differences to `reference`, a table for each scale and condition. The margin
    /// over pictures and clips follows `±`, that within the clips is in brackets.
    pub fn differences(&self, reference: &str) -> Vec<Table> {
        let all = self.against(reference);
        let cell = |method: &str, group: (f64, &str), metric: &Metric| {
            let found = all.iter().find(|c| {
                c.method == method
                    && (c.scale, c.condition.as_str()) == group
                    && c.metric == metric.heading
            });
            found.map(|c| c.text(metric.decimals))
        };
        let groups = distinct(all.iter().map(|c| (c.scale, c.condition.as_str())));
        let methods = distinct(all.iter().map(|c| c.method.as_str()));
        groups
            .into_iter()
            .map(|group| table(group, &methods, |m, metric| cell(m, group, metric)))
            .collect()
    }

    /// Returns the means, a table for each scale and condition.
    pub fn tables(&self) -> Vec<Table> {
        let means = self.means();
        let cell = |method: &str, group: (f64, &str), metric: &Metric| {
            let of_cell =
                |m: &&Mean| m.method == method && (m.scale, m.condition.as_str()) == group;
            let value = (metric.of_mean)(means.iter().find(of_cell)?)?;
            Some(format!("{value:.0$}", metric.decimals))
        };
        let groups = distinct(means.iter().map(|m| (m.scale, m.condition.as_str())));
        let of_group = |group: (f64, &str)| {
            let rows = means
                .iter()
                .filter(|m| (m.scale, m.condition.as_str()) == group);
            let methods = distinct(rows.map(|m| m.method.as_str()));
            table(group, &methods, |m, metric| cell(m, group, metric))
        };
        groups.into_iter().map(of_group).collect()
    }

    /// Returns the gates of every method but `reference`, from the means.
    pub fn gates(&self, reference: &str) -> Vec<Gate> {
        let means = self.means();
        let gate = |m: &Mean| {
            let same = |r: &&Mean| {
                r.method == reference && (&r.condition, r.scale) == (&m.condition, m.scale)
            };
            let r = means.iter().find(same)?;
            Some(Gate {
                method: m.method.clone(),
                condition: m.condition.clone(),
                scale: m.scale,
                lpips_gain: m.lpips.zip(r.lpips).map(|(m, r)| 1.0 - m / r),
                psnr_gain: if m.psnr_y == r.psnr_y {
                    0.0
                } else {
                    m.psnr_y - r.psnr_y
                },
                flicker: m.flicker.zip(r.flicker).map(Limit::of),
                warping_error: m.warping_error.zip(r.warping_error).map(Limit::of),
            })
        };
        let others = means.iter().filter(|m| m.method != reference);
        others.filter_map(gate).collect()
    }

    /// Returns [`Self::gates`] as a table.
    pub fn gates_table(&self, reference: &str) -> Table {
        let none = || "-".to_string();
        let limit = |l: Option<Limit>, decimals: usize| {
            l.map_or_else(none, |l| {
                let verdict = if l.met { "within" } else { "above" };
                format!(
                    "{verdict} ({:.decimals$} / {:.decimals$})",
                    l.value, l.limit
                )
            })
        };
        let row = |g: Gate| {
            vec![
                format!("{} x{} {}", g.method, g.scale, g.condition),
                g.lpips_gain
                    .map_or_else(none, |gain| format!("{:+.1} %", 100.0 * gain)),
                format!("{:+.2} dB", g.psnr_gain),
                limit(g.flicker, 3),
                limit(g.warping_error, 2),
            ]
        };
        let head = [
            "",
            "LPIPS gain",
            "PSNR-Y",
            "flicker / limit",
            "warping / limit",
        ];
        Table {
            title: format!("against {reference}; limits: {reference}'s + 10 %"),
            head: head.map(str::to_string).to_vec(),
            rows: self.gates(reference).into_iter().map(row).collect(),
        }
    }

    /// Returns [`Self::tables`], [`Self::differences`] and [`Self::gates_table`] without empty
    /// tables.
    pub fn all_tables(&self, reference: &str) -> Vec<Table> {
        let mut all = self.tables();
        all.extend(self.differences(reference).into_iter().map(|table| Table {
            title: format!("{}, against {reference}, with 95 % confidence", table.title),
            ..table
        }));
        let gates = self.gates_table(reference);
        if !gates.rows.is_empty() {
            all.push(gates);
        }
        all
    }

    /// Parses the text of [`Self::to_json`].
    ///
    /// # Errors
    /// The error of the JSON parser.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Saved {
            images: Vec<Row>,
        }
        let Saved { images: rows } = serde_json::from_str(text)?;
        Ok(Self { rows })
    }

    /// Returns `{"means": [...], "against_bicubic": [...], "gates": [...], "images": [...]}` with
    /// the fields of [`Mean`], [`Comparison`], [`Gate`] and [`Row`].
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "means": self.means(),
            "against_bicubic": self.against("bicubic"),
            "gates": self.gates("bicubic"),
            "images": self.rows,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.tables().iter().try_for_each(|table| table.fmt(f))?;
        let exact = |mean: &Mean| mean.exact > 0;
        self.means().into_iter().filter(exact).try_for_each(|mean| {
            writeln!(
                f,
                "x{} {}, {}: {} of {} frames equal the original and are left out of PSNR-Y",
                mean.scale, mean.condition, mean.method, mean.exact, mean.frames
            )
        })
    }
}

impl Row {
    fn is_of(&self, (method, condition, scale): (&str, &str, f64)) -> bool {
        self.method == method && self.condition == condition && self.scale == scale
    }
}

impl Limit {
    fn of((value, reference): (f64, f64)) -> Self {
        let limit = reference + 0.1 * reference.abs();
        Self {
            value,
            limit,
            met: value <= limit,
        }
    }
}

impl Comparison {
    fn text(&self, decimals: usize) -> String {
        let mut text = format!("{:+.decimals$}", self.difference);
        // Writing to a string cannot fail.
        if let Some(margin) = self.margin {
            let _ = write!(text, " ±{margin:.decimals$}");
        }
        if let Some(margin) = self.margin_within {
            let _ = write!(text, " [{margin:.decimals$}]");
        }
        text
    }
}

/// Makes a table of `methods` and of the metrics that have a `cell` for any of them.
fn table(
    (scale, condition): (f64, &str),
    methods: &[&str],
    cell: impl Fn(&str, &Metric) -> Option<String>,
) -> Table {
    let measured = |metric: &&Metric| methods.iter().any(|m| cell(m, metric).is_some());
    let metrics: Vec<_> = METRICS.iter().filter(measured).collect();
    let row = |method: &&str| {
        let cells = metrics
            .iter()
            .map(|metric| cell(method, metric).unwrap_or_else(|| "-".into()));
        std::iter::once((*method).to_string())
            .chain(cells)
            .collect()
    };
    Table {
        title: format!("x{scale} {condition}"),
        head: std::iter::once("")
            .chain(metrics.iter().map(|m| m.heading))
            .map(str::to_string)
            .collect(),
        rows: methods.iter().map(row).collect(),
    }
}

/// Frames and value of a part of a clip.
type Part = (usize, f64);

/// Groups the values of `rows` by picture or clip, in order of their first rows.
fn by_image<'a>(rows: impl Iterator<Item = (&'a Row, f64)>) -> Vec<(&'a str, Vec<Part>)> {
    let mut images: Vec<(&str, Vec<Part>)> = Vec::new();
    for (row, value) in rows {
        let part = (row.frames, value);
        match images.iter_mut().find(|(image, _)| *image == row.image) {
            Some((_, parts)) => parts.push(part),
            None => images.push((&row.image, vec![part])),
        }
    }
    images
}

/// Returns the mean over all frames.
fn weighted(parts: &[Part]) -> f64 {
    let frames: usize = parts.iter().map(|p| p.0).sum();
    let sum: f64 = parts.iter().map(|(n, v)| *n as f64 * v).sum();
    sum / frames as f64
}

/// Returns half the width of the 95 % confidence interval of the mean of independent `values`.
fn margin(values: &[f64]) -> Option<f64> {
    let (n, deviation) = (values.len(), deviation(values)?);
    Some(t_975(n - 1) * deviation / (n as f64).sqrt())
}

/// Returns the same for the mean over clips, each with the variance of its parts.
fn margin_within(images: &[(&str, Vec<Part>)]) -> Option<f64> {
    let (mut variance, mut freedom) = (0.0, 0);
    for (_, parts) in images {
        let values: Vec<f64> = parts.iter().map(|p| p.1).collect();
        variance += deviation(&values)?.powi(2) / values.len() as f64;
        freedom += values.len() - 1;
    }
    Some(t_975(freedom) * variance.sqrt() / images.len() as f64)
}

/// Returns the standard deviation of the population of the sample `values`.
fn deviation(values: &[f64]) -> Option<f64> {
    let n = values.len();
    if n < 2 {
        return None;
    }
    let mean = values.iter().sum::<f64>() / n as f64;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    Some((squares / (n - 1) as f64).sqrt())
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for v in values {
        sum += v;
        count += 1;
    }
    (count > 0).then(|| sum / f64::from(count))
}

/// Removes repeated `values`, in order of first appearance.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for v in values {
        if !found.contains(&v) {
            found.push(v);
        }
    }
    found
}

struct Metric {
    heading: &'static str,
    of_row: fn(&Row) -> Option<f64>,
    of_mean: fn(&Mean) -> Option<f64>,
    decimals: usize,
}

macro_rules! metric {
    ($heading:literal, $decimals:literal, |$r:ident| $value:expr) => {
        Metric {
            heading: $heading,
            of_row: |$r| $value,
            of_mean: |$r| $value,
            decimals: $decimals,
        }
    };
}

const METRICS: [Metric; 8] = [
    metric!("PSNR-Y", 2, |r| Some(r.psnr_y)),
    metric!("SSIM", 4, |r| r.ssim),
    metric!("MS-SSIM", 4, |r| r.ms_ssim),
    metric!("LPIPS", 4, |r| r.lpips),
    metric!("NIQE", 2, |r| r.niqe),
    metric!("warping", 2, |r| r.warping_error),
    metric!("tOF", 3, |r| r.tof),
    metric!("flicker", 3, |r| r.flicker),
];

/// Returns the 97.5th percentile of Student's t distribution.
fn t_975(freedom: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
        2.052, 2.048, 2.045, 2.042,
    ];
    match TABLE.get(freedom.wrapping_sub(1)) {
        Some(t) => *t,
        // The first terms of the Cornish-Fisher expansion, here exact to 0.001.
        None => 1.96 + 2.372 / freedom as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: &str, condition: &str, scale: f64, psnr_y: f64, lpips: Option<f64>) -> Row {
        Row {
            method: method.into(),
            condition: condition.into(),
            scale,
            image: "a.png".into(),
            psnr_y,
            ssim: Some(0.9),
            lpips,
            ..Row::default()
        }
    }

    fn report() -> Report {
        let mut report = Report::default();
        report.push(row("bicubic", "clean", 2.0, 30.0, Some(0.2)));
        report.push(row("tiny", "clean", 2.0, 31.0, Some(0.1)));
        report.push(row("bicubic", "clean", 2.0, 32.0, None));
        report.push(row("bicubic", "jpeg60", 2.0, 28.0, None));
        report
    }

    #[test]
    fn means_are_taken_for_each_method_condition_and_scale() {
        let mut report = report();
        report.push(Row {
            image: "b.png".into(),
            ..row("bicubic", "clean", 2.0, 33.0, None)
        });
        let means = report.means();
        assert_eq!(means.len(), 3);
        let first = &means[0];
        assert_eq!((first.method.as_str(), first.images), ("bicubic", 2));
        assert_eq!((first.psnr_y, first.lpips), (32.0, Some(0.2)));
        assert_eq!(means[2].condition, "jpeg60");
    }

    #[test]
    fn a_clip_counts_as_much_as_another_and_its_parts_by_their_frames() {
        let mut report = Report::default();
        for (image, part, frames, psnr_y) in
            [("a", 0, 10, 30.0), ("a", 1, 30, 34.0), ("b", 0, 1, 23.0)]
        {
            report.push(Row {
                image: image.into(),
                part,
                frames,
                ..row("bicubic", "clean", 2.0, psnr_y, None)
            });
        }
        let mean = &report.means()[0];
        assert_eq!((mean.images, mean.frames, mean.psnr_y), (2, 41, 28.0));
    }

    #[test]
    fn frames_equal_to_the_original_are_left_out_of_the_mean_and_counted() {
        let mut report = Report::default();
        for (part, frames, exact, psnr_y) in [(0, 10, 10, f64::INFINITY), (1, 10, 2, 30.0)] {
            for method in ["bicubic", "tiny"] {
                report.push(Row {
                    part,
                    frames,
                    exact,
                    ..row(method, "clean", 2.0, psnr_y, None)
                });
            }
        }
        let mean = &report.means()[1];
        assert_eq!((mean.psnr_y, mean.frames, mean.exact), (30.0, 20, 12));
        let text = report.to_string();
        assert!(
            text.contains("tiny: 12 of 20 frames equal the original"),
            "{text}"
        );
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn a_table_has_a_row_for_each_method_and_dashes_for_missing_values() {
        let mut report = report();
        report.push(row("tiny", "jpeg60", 2.0, 29.0, Some(0.3)));
        let tables = report.tables();
        assert_eq!(tables.len(), 2);
        assert_eq!(tables[0].title, "x2 clean");
        assert_eq!(tables[0].head, ["", "PSNR-Y", "SSIM", "LPIPS"]);
        assert_eq!(tables[0].rows[0], ["bicubic", "31.00", "0.9000", "0.2000"]);
        assert_eq!(tables[1].rows[0], ["bicubic", "28.00", "0.9000", "-"]);
        assert!(report.to_string().contains("x2 jpeg60\n"));
    }

    /// Returns a report of three pictures or clips of one part.
    fn paired() -> Report {
        let mut report = Report::default();
        for (image, bicubic, tiny) in [("a", 20.0, 21.0), ("b", 30.0, 32.0), ("c", 40.0, 43.0)] {
            for (method, psnr) in [("bicubic", bicubic), ("tiny", tiny)] {
                let image = image.into();
                report.push(Row {
                    image,
                    ..row(method, "clean", 2.0, psnr, None)
                });
            }
        }
        report
    }

    #[test]
    fn differences_are_taken_picture_by_picture() {
        let mut report = paired();
        report.push(Row {
            image: "alone".into(),
            ..row("tiny", "clean", 2.0, 99.0, None)
        });
        let all = report.against("bicubic");
        let psnr = all.iter().find(|c| c.metric == "PSNR-Y").unwrap();
        assert_eq!((psnr.images, psnr.difference), (3, 2.0));
        // A standard deviation of 1 over three pictures: 4.303 / sqrt 3.
        assert!((psnr.margin.unwrap() - 2.4844).abs() < 1e-3, "{psnr:?}");
        assert_eq!(psnr.margin_within, None);
        assert!(
            all.iter()
                .all(|c| c.metric != "LPIPS" && c.method == "tiny")
        );
        let table = &report.differences("bicubic")[0];
        assert_eq!(table.rows[0][..2], ["tiny", "+2.00 ±2.48"]);
        assert!(self::report().against("bicubic").is_empty());
    }

    #[test]
    fn parts_of_a_clip_give_its_own_confidence_interval() {
        let mut report = Report::default();
        for part in 0..4 {
            for (method, psnr) in [("bicubic", 20.0), ("tiny", [21.0, 22.0][part % 2])] {
                report.push(Row {
                    part,
                    frames: 8,
                    ..row(method, "clean", 2.0, psnr + part as f64, None)
                });
            }
        }
        let psnr = &report.against("bicubic")[0];
        assert_eq!((psnr.images, psnr.difference, psnr.margin), (1, 1.5, None));
        // A variance of 1/3 over four parts, t of 3 degrees of freedom.
        let want = 3.182 * (1.0f64 / 12.0).sqrt();
        assert!((psnr.margin_within.unwrap() - want).abs() < 1e-9);
        assert_eq!(report.differences("bicubic")[0].rows[0][1], "+1.50 [0.92]");
    }

    #[test]
    fn gates_allow_a_tenth_more_than_the_reference_whatever_its_sign() {
        let mut report = Report::default();
        for (method, lpips, flicker, warping) in [
            ("bicubic", 0.4, 1.0, -2.0),
            ("a", 0.3, 1.09, -1.9),
            ("b", 0.5, 1.11, -1.7),
        ] {
            report.push(Row {
                flicker: Some(flicker),
                warping_error: Some(warping),
                ..row(method, "clean", 4.0, 30.0, Some(lpips))
            });
        }
        let gates = report.gates("bicubic");
        let met = |g: &Gate| (g.flicker.unwrap().met, g.warping_error.unwrap().met);
        assert_eq!(
            (met(&gates[0]), met(&gates[1])),
            ((true, true), (false, false))
        );
        assert!((gates[0].lpips_gain.unwrap() - 0.25).abs() < 1e-9);
        assert!((gates[1].lpips_gain.unwrap() + 0.25).abs() < 1e-9);
        let table = report.gates_table("bicubic").to_string();
        assert!(
            table.contains("+25.0 %") && table.contains("above (1.110 / 1.100)"),
            "{table}"
        );
    }

    #[test]
    fn the_percentiles_are_continuous() {
        assert!((t_975(30) - t_975(31)).abs() < 0.01);
        assert!((t_975(120) - 1.980).abs() < 0.001);
    }

    #[test]
    fn json_holds_means_and_pictures() {
        let json = report().to_json();
        assert_eq!(json["images"].as_array().unwrap().len(), 4);
        assert_eq!(json["means"][1]["method"], "tiny");
        assert_eq!(json["means"][0]["psnr_y"], 31.0);
        assert!(json["images"][2]["lpips"].is_null());
        let mut report = report();
        report.push(row("bicubic", "clean", 2.0, f64::INFINITY, None));
        let text = report.to_json().to_string();
        assert_eq!(Report::from_json(&text).unwrap().rows(), report.rows());
        assert!(Report::from_json("{}").is_err());
    }
}

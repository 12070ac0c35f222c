//! Tables of metrics: a row a method; a column for each condition, scale and metric.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
};

use serde::Serialize;

/// What one method reached on one picture.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    pub method: String,
    /// What was done to the input, such as `clean` or `jpeg60`.
    pub condition: String,
    pub scale: f64,
    /// Name of the picture.
    pub image: String,
    /// dB, higher is better; infinite (`null` in JSON) for equal pictures.
    pub psnr_y: f64,
    /// 0 to 1, higher is better; `None` for pictures below its window.
    pub ssim: Option<f64>,
    /// 0 to 1, higher is better; `None` for pictures below its window.
    pub ms_ssim: Option<f64>,
    /// 0 and up, lower is better; `None` where it was not measured.
    pub lpips: Option<f64>,
    /// 0 and up, lower is more natural; `None` where it was not measured and for pictures below its blocks.
    pub niqe: Option<f64>,
}

/// The means over the pictures of one method, condition and scale; a metric's mean is over those that have it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Mean {
    pub method: String,
    pub condition: String,
    pub scale: f64,
    /// Number of pictures.
    pub images: usize,
    pub psnr_y: f64,
    pub ssim: Option<f64>,
    pub ms_ssim: Option<f64>,
    pub lpips: Option<f64>,
    pub niqe: Option<f64>,
}

/// How much a method differs from another on the same pictures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    pub method: String,
    pub condition: String,
    pub scale: f64,
    /// Heading of the metric.
    pub metric: &'static str,
    /// Pictures that both were measured on, at least 2.
    pub images: usize,
    /// Mean of the differences, picture by picture: the method's value minus the other's.
    pub difference: f64,
    /// Half the width of the 95 % confidence interval of that mean (Student's t): where it is smaller than the
    /// difference, the sign can be believed.
    pub margin: f64,
}

/// All rows of an evaluation. [`fmt::Display`] writes the table of means.
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

    /// One for each method, condition and scale, in the order of their first rows.
    pub fn means(&self) -> Vec<Mean> {
        let mut keys: Vec<(&str, &str, f64)> = Vec::new();
        for r in &self.rows {
            let key = (r.method.as_str(), r.condition.as_str(), r.scale);
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        keys.into_iter().map(|key| self.mean_of(key)).collect()
    }

    fn mean_of(&self, (method, condition, scale): (&str, &str, f64)) -> Mean {
        let rows: Vec<_> = self
            .rows
            .iter()
            .filter(|r| {
                (r.method.as_str(), r.condition.as_str(), r.scale) == (method, condition, scale)
            })
            .collect();
        Mean {
            method: method.into(),
            condition: condition.into(),
            scale,
            images: rows.len(),
            psnr_y: mean(rows.iter().map(|r| r.psnr_y)).unwrap_or(f64::NAN),
            ssim: mean(rows.iter().filter_map(|r| r.ssim)),
            ms_ssim: mean(rows.iter().filter_map(|r| r.ms_ssim)),
            lpips: mean(rows.iter().filter_map(|r| r.lpips)),
            niqe: mean(rows.iter().filter_map(|r| r.niqe)),
        }
    }

    /// Every other method against `reference`, for each condition, scale and metric that both were measured in, on two
    /// pictures or more.
    pub fn against(&self, reference: &str) -> Vec<Comparison> {
        let means = self.means();
        let others = means.iter().filter(|m| m.method != reference);
        let each = others.flat_map(|m| METRICS.iter().map(move |metric| (m, metric)));
        each.filter_map(|(m, metric)| self.compare(m, reference, metric))
            .collect()
    }

    fn compare(&self, of: &Mean, reference: &str, metric: &Metric) -> Option<Comparison> {
        let group = |r: &&Row| (r.condition.as_str(), r.scale) == (of.condition.as_str(), of.scale);
        let rows = |method: &str| {
            let value = |r: &Row| (metric.of_row)(r).filter(|v| v.is_finite());
            let rows = self
                .rows
                .iter()
                .filter(group)
                .filter(|r| r.method == method);
            rows.filter_map(|r| Some((r.image.as_str(), value(r)?)))
                .collect::<HashMap<_, _>>()
        };
        let theirs = rows(reference);
        let differences: Vec<f64> = rows(&of.method)
            .iter()
            .filter_map(|(image, v)| Some(v - theirs.get(image)?))
            .collect();
        let n = differences.len();
        if n < 2 {
            return None;
        }
        let difference = differences.iter().sum::<f64>() / n as f64;
        let squares: f64 = differences.iter().map(|d| (d - difference).powi(2)).sum();
        let deviation = (squares / (n - 1) as f64).sqrt();
        Some(Comparison {
            method: of.method.clone(),
            condition: of.condition.clone(),
            scale: of.scale,
            metric: metric.heading,
            images: n,
            difference,
            margin: t_975(n - 1) * deviation / (n as f64).sqrt(),
        })
    }

    /// The differences to `reference` as lines of text.
    pub fn against_as_text(&self, reference: &str) -> String {
        let all = self.against(reference);
        let width = all
            .iter()
            .map(|c| c.method.chars().count())
            .max()
            .unwrap_or(0);
        let mut text = String::new();
        let groups = distinct(
            all.iter()
                .map(|c| (c.scale, c.condition.as_str(), c.method.as_str())),
        );
        for (scale, condition, method) in groups {
            let _ = write!(text, "{method:width$}  x{scale} {condition}:");
            let of = |c: &&Comparison| {
                (c.scale, c.condition.as_str(), c.method.as_str()) == (scale, condition, method)
            };
            for c in all.iter().filter(of) {
                let decimals = METRICS
                    .iter()
                    .find(|m| m.heading == c.metric)
                    .map_or(4, |m| m.decimals);
                let (d, m) = (c.difference, c.margin);
                let _ = write!(text, "  {} {d:+.decimals$} ±{m:.decimals$}", c.metric);
            }
            text.push('\n');
        }
        text
    }

    /// `{"means": [...], "against_bicubic": [...], "images": [...]}` with the fields of [`Mean`], [`Comparison`] and
    /// [`Row`].
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "means": self.means(),
            "against_bicubic": self.against("bicubic"),
            "images": self.rows,
        })
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for v in values {
        sum += v;
        count += 1;
    }
    (count > 0).then(|| sum / f64::from(count))
}

/// The entries of `values` without repetitions, in the order of first appearance.
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

const METRICS: [Metric; 5] = [
    metric!("PSNR-Y", 2, |r| Some(r.psnr_y)),
    metric!("SSIM", 4, |r| r.ssim),
    metric!("MS-SSIM", 4, |r| r.ms_ssim),
    metric!("LPIPS", 4, |r| r.lpips),
    metric!("NIQE", 2, |r| r.niqe),
];

/// The 97.5th percentile of Student's t distribution.
fn t_975(freedom: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
        2.052, 2.048, 2.045, 2.042,
    ];
    match TABLE.get(freedom.wrapping_sub(1)) {
        Some(t) => *t,
        // The first terms of the Cornish-Fisher expansion, exact to 0.001 here.
        None => 1.96 + 2.372 / freedom as f64,
    }
}

const CELL: usize = 8;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let means = self.means();
        let methods = distinct(means.iter().map(|m| m.method.as_str()));
        let groups = distinct(means.iter().map(|m| (m.scale, m.condition.as_str())));
        let measured = |metric: &&Metric| means.iter().any(|m| (metric.of_mean)(m).is_some());
        let metrics: Vec<_> = METRICS.iter().filter(measured).collect();
        let name_width = methods.iter().map(|m| m.chars().count()).max();
        let name_width = name_width.unwrap_or(0);

        write!(f, "{:name_width$}", "")?;
        for (scale, condition) in &groups {
            let title = format!("x{scale} {condition}");
            write!(f, " |{title:^0$}", CELL * metrics.len())?;
        }
        write!(f, "\n{:name_width$}", "")?;
        for _ in &groups {
            f.write_str(" |")?;
            for metric in &metrics {
                write!(f, "{:>CELL$}", metric.heading)?;
            }
        }
        for method in methods {
            write!(f, "\n{method:name_width$}")?;
            for group in &groups {
                let of_cell =
                    |m: &&Mean| m.method == method && (m.scale, m.condition.as_str()) == *group;
                f.write_str(" |")?;
                write_cells(f, means.iter().find(of_cell), &metrics)?;
            }
        }
        writeln!(f)
    }
}

fn write_cells(
    f: &mut fmt::Formatter<'_>,
    mean: Option<&Mean>,
    metrics: &[&Metric],
) -> fmt::Result {
    for metric in metrics {
        let decimals = metric.decimals;
        match mean.and_then(metric.of_mean) {
            Some(v) => write!(f, "{v:>CELL$.decimals$}")?,
            None => write!(f, "{:>CELL$}", "-")?,
        }
    }
    Ok(())
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
            ms_ssim: None,
            lpips,
            niqe: None,
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
        let means = report().means();
        assert_eq!(means.len(), 3);
        let first = &means[0];
        assert_eq!((first.method.as_str(), first.images), ("bicubic", 2));
        assert_eq!((first.psnr_y, first.lpips), (31.0, Some(0.2)));
        assert_eq!(means[2].condition, "jpeg60");
    }

    #[test]
    fn the_table_has_a_row_for_each_method_and_dashes_where_nothing_was_measured() {
        let text = report().to_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].contains("x2 clean") && lines[0].contains("x2 jpeg60"));
        assert_eq!(lines[1].matches("PSNR-Y").count(), 2);
        let cells: Vec<_> = lines[2].split_whitespace().collect();
        assert_eq!(
            cells,
            [
                "bicubic", "|", "31.00", "0.9000", "0.2000", "|", "28.00", "0.9000", "-"
            ]
        );
        assert!(lines[3].starts_with("tiny") && lines[3].contains("31.00"));
        let widths = lines.iter().map(|l| l.chars().count());
        assert_eq!(distinct(widths).len(), 1, "{text}");
    }

    #[test]
    fn differences_are_taken_picture_by_picture() {
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
        report.push(row("tiny", "clean", 2.0, 99.0, None));
        let all = report.against("bicubic");
        let psnr = all.iter().find(|c| c.metric == "PSNR-Y").unwrap();
        assert_eq!((psnr.images, psnr.difference), (3, 2.0));
        // A standard deviation of 1 over three pictures: 4.303 / sqrt 3.
        assert!((psnr.margin - 2.4844).abs() < 1e-3, "{}", psnr.margin);
        assert!(
            all.iter()
                .all(|c| c.metric != "LPIPS" && c.method == "tiny")
        );
        assert!(
            report
                .against_as_text("bicubic")
                .contains("PSNR-Y +2.00 ±2.48")
        );
        assert!(self::report().against("bicubic").is_empty());
    }

    #[test]
    fn the_percentiles_join() {
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
    }
}

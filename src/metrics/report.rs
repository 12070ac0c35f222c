//! Tables of metrics: a row a method; a column for each condition, scale and metric.

use std::fmt;

use serde::Serialize;

/// What one method reached on one picture.
#[derive(Clone, Debug, PartialEq, Serialize)]
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
    /// 0 and up, lower is better; `None` where it was not measured.
    pub lpips: Option<f64>,
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
    pub lpips: Option<f64>,
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
            lpips: mean(rows.iter().filter_map(|r| r.lpips)),
        }
    }

    /// `{"means": [...], "images": [...]}` with the fields of [`Mean`] and [`Row`].
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "means": self.means(), "images": self.rows })
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

type Metric = (&'static str, fn(&Mean) -> Option<f64>, usize);

/// Heading, value, decimals.
const METRICS: [Metric; 3] = [
    ("PSNR-Y", |m| Some(m.psnr_y), 2),
    ("SSIM", |m| m.ssim, 4),
    ("LPIPS", |m| m.lpips, 4),
];

const CELL: usize = 8;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let means = self.means();
        let methods = distinct(means.iter().map(|m| m.method.as_str()));
        let groups = distinct(means.iter().map(|m| (m.scale, m.condition.as_str())));
        let measured = |(_, value, _): &&Metric| means.iter().any(|m| value(m).is_some());
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
            for (heading, ..) in &metrics {
                write!(f, "{heading:>CELL$}")?;
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
    for (_, value, decimals) in metrics {
        match mean.and_then(value) {
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
            lpips,
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
    fn json_holds_means_and_pictures() {
        let json = report().to_json();
        assert_eq!(json["images"].as_array().unwrap().len(), 4);
        assert_eq!(json["means"][1]["method"], "tiny");
        assert_eq!(json["means"][0]["psnr_y"], 31.0);
        assert!(json["images"][2]["lpips"].is_null());
    }
}

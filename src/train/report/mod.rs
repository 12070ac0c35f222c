//! Self-contained HTML report of a training run: one file without scripts and external resources,
//! for light and dark settings.
//!
//! Plots are SVG without a plotting library. They take their colours from the style sheet of the
//! page, so they follow the light or dark setting, and need no fonts.

mod curves;
mod folder;
mod html;
mod plot;
mod tensorboard;

pub use curves::Curves;
pub use folder::{REPORT_FILE, load_samples, save_samples};
pub use html::Page;
pub use tensorboard::EventWriter;

use std::path::Path;

use image::RgbImage;

use super::{checkpoint::write_atomically, eval::REFERENCE};
use crate::{
    Result,
    metrics::{self, Table},
};

/// Prefix of columns in the log of losses that hold norms of the gradients of weighted terms.
pub const GRADIENT: &str = "grad_";

/// Images side by side, such as bicubic, student, teacher and ground truth.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampleRow {
    pub label: String,
    pub images: Vec<(String, RgbImage)>,
}

/// Contents of a report. Empty parts are left out.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub title: String,
    /// Paragraphs at the top of the page.
    pub summary: Vec<String>,
    /// Settings of the run, as text.
    pub config: String,
    /// Losses, and gradient norms under names that begin with [`GRADIENT`].
    pub curves: Curves,
    pub samples: Vec<SampleRow>,
    /// Evaluation: tables, and plots of the differences to [`Self::reference`].
    pub evaluation: Option<metrics::Report>,
    /// Reference of the differences; empty for bicubic interpolation.
    pub reference: String,
    /// Other tables.
    pub tables: Vec<Table>,
    /// Names and versions of software and machine.
    pub versions: Vec<(String, String)>,
}

impl Report {
    /// Returns the page.
    pub fn to_html(&self) -> String {
        let mut page = Page::new(&self.title);
        self.summary.iter().for_each(|line| page.text(line));
        self.plots(&mut page);
        if !self.samples.is_empty() {
            page.heading("Samples");
            self.samples.iter().for_each(|row| page.samples(row));
        }
        if let Some(evaluation) = &self.evaluation {
            page.heading("Evaluation");
            evaluation
                .all_tables(self.reference())
                .iter()
                .for_each(|table| page.table(table));
            differences(evaluation, self.reference(), &mut page);
        }
        self.tables.iter().for_each(|table| page.table(table));
        if !self.config.is_empty() {
            page.heading("Settings");
            page.preformatted(&self.config);
        }
        if !self.versions.is_empty() {
            page.heading("Versions");
            page.pairs(&self.versions);
        }
        page.finish()
    }

    fn plots(&self, page: &mut Page) {
        let (norms, losses): (Vec<_>, Vec<_>) = self
            .curves
            .columns
            .iter()
            .partition(|(name, _)| name.starts_with(GRADIENT));
        if self.curves.steps.len() < 2 {
            return;
        }
        if !losses.is_empty() {
            page.heading("Losses");
            let plots = losses
                .iter()
                .map(|(name, values)| plot::curve(name, &self.curves.steps, values));
            page.plots(plots);
        }
        if norms.len() > 1 {
            page.heading("Shares of the gradient's norm");
            let parts: Vec<_> = norms
                .iter()
                .map(|(name, values)| (&name[GRADIENT.len()..], values.as_slice()))
                .collect();
            page.plots([plot::shares(&self.curves.steps, &parts)]);
        }
        if !norms.is_empty() {
            page.heading("Gradient norms");
            let plots = norms.iter().map(|(name, values)| {
                plot::curve(&name[GRADIENT.len()..], &self.curves.steps, values)
            });
            page.plots(plots);
        }
    }

    fn reference(&self) -> &str {
        match self.reference.as_str() {
            "" => REFERENCE,
            name => name,
        }
    }

    /// Writes the page to `path`, atomically.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomically(path, self.to_html().as_bytes())
    }
}

/// Plots the differences to the reference for each metric, with confidence intervals.
fn differences(evaluation: &metrics::Report, reference: &str, page: &mut Page) {
    let all = evaluation.against(reference);
    let mut metrics: Vec<&str> = all.iter().map(|c| c.metric).collect();
    metrics.dedup();
    metrics.sort_unstable();
    metrics.dedup();
    let plot = |metric: &str| {
        let rows = all.iter().filter(|c| c.metric == metric);
        let rows: Vec<_> = rows
            .map(|c| {
                let name = format!("{} x{} {}", c.method, c.scale, c.condition);
                let margin = c.margin.or(c.margin_within).unwrap_or_default();
                (name, c.difference, margin)
            })
            .collect();
        plot::intervals(&format!("{metric} minus {reference}'s"), &rows)
    };
    if !metrics.is_empty() {
        page.plots(metrics.into_iter().map(plot));
    }
}

/// Returns version and machine, for [`Report::versions`].
pub fn versions() -> Vec<(String, String)> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let system = format!(
        "{} on {}, {threads} hardware threads",
        std::env::consts::OS,
        std::env::consts::ARCH
    );
    vec![
        ("tadsr-train".into(), env!("CARGO_PKG_VERSION").into()),
        ("system".into(), system),
        #[cfg(feature = "video")]
        ("GStreamer".into(), gst::version_string().into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let steps: Vec<u64> = (1..=500).collect();
        let falling = |k: f64| steps.iter().map(|s| k / *s as f64).collect::<Vec<_>>();
        let picture = RgbImage::from_fn(6, 4, |x, y| image::Rgb([x as u8 * 40, y as u8 * 60, 9]));
        Report {
            title: "run <b>one</b>".into(),
            summary: vec!["500 of 500 steps".into()],
            config: "name = \"</pre><script>alert(1)</script>\"\nquote = '&'".into(),
            curves: Curves {
                columns: vec![
                    ("regression".into(), falling(2.0)),
                    ("grad_regression".into(), falling(1.0)),
                    ("grad_score".into(), falling(3.0)),
                ],
                steps,
            },
            samples: vec![SampleRow {
                label: "a \"quoted\" <label>".into(),
                images: vec![
                    ("bicubic".into(), picture.clone()),
                    ("<truth>".into(), picture),
                ],
            }],
            evaluation: Some(evaluation()),
            reference: String::new(),
            tables: vec![Table {
                title: "x2 clean".into(),
                head: vec![String::new(), "PSNR-Y".into()],
                rows: vec![vec!["tiny & <co>".into(), "30.12".into()]],
            }],
            versions: versions(),
        }
    }

    fn evaluation() -> metrics::Report {
        let mut report = metrics::Report::default();
        for (image, psnr_y) in [("a", 20.0), ("b", 25.0), ("c", 27.5)] {
            for method in ["bicubic", "<i>model</i>"] {
                report.push(metrics::Row {
                    method: method.into(),
                    image: image.into(),
                    condition: "clean".into(),
                    psnr_y: psnr_y + (psnr_y / 100.0) * method.len() as f64,
                    ..metrics::Row::default()
                });
            }
        }
        report
    }

    #[test]
    fn everything_is_in_the_page_and_hostile_text_is_only_text() {
        let html = report().to_html();
        for part in [
            "500 of 500 steps",
            "regression",
            "30.12",
            "data:image/png;base64,",
            "run &lt;b&gt;one&lt;/b&gt;",
            "tiny &amp; &lt;co&gt;",
            "PSNR-Y minus bicubic",
            "&lt;i&gt;model",
            "quote = &#39;&amp;&#39;",
            env!("CARGO_PKG_VERSION"),
        ] {
            assert!(html.contains(part), "{part}");
        }
        for part in [
            "<script",
            "<b>",
            "<label>",
            "<truth>",
            "<i>",
            "NaN",
            "javascript",
        ] {
            assert!(!html.contains(part), "{part}");
        }
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let html = report().to_html();
        assert!(html.contains("default-src 'none'"));
        for part in [
            "http://", "https://", "src=\"//", "url(", "@import", "<link",
        ] {
            assert!(!html.contains(part), "{part}");
        }
    }

    /// Checks that every element is closed, in order.
    #[test]
    fn the_page_is_well_formed() {
        let html = report().to_html();
        let mut open: Vec<&str> = Vec::new();
        let mut rest = html.split_once("<html").unwrap().1;
        while let Some((_, tag)) = rest.split_once('<') {
            let (tag, after) = tag.split_once('>').unwrap();
            rest = after;
            let name = tag.split([' ', '/']).find(|s| !s.is_empty()).unwrap();
            if tag.starts_with('/') {
                if name != "html" {
                    assert_eq!(open.pop(), Some(name), "{tag}");
                }
            } else if !tag.ends_with('/') && !["meta", "img"].contains(&name) {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn an_empty_run_has_a_report() {
        let html = Report::default().to_html();
        assert!(html.contains("</html>") && !html.contains("<svg"));
        let odd = Report {
            curves: Curves {
                steps: vec![1, 2, 3],
                columns: vec![
                    ("flat".into(), vec![0.0; 3]),
                    ("broken".into(), vec![f64::NAN, f64::INFINITY, -1.0]),
                    ("grad_a".into(), vec![0.0; 3]),
                    ("grad_b".into(), vec![0.0, f64::NAN, 0.0]),
                ],
            },
            ..Report::default()
        };
        let html = odd.to_html();
        assert!(html.contains("<svg") && !html.contains("NaN") && !html.contains("inf"));
    }
}

//! HTML pages.

use std::{fmt::Write, io::Cursor};

use image::{ImageFormat, RgbImage};

use super::SampleRow;
use crate::metrics::Table;

/// Colours by role, for light and dark settings.
const STYLE: &str = "
:root{color-scheme:light dark;--back:#fff;--text:#1d2126;--soft:#667;--line:#d5d9de;
--c0:#1668b8;--c1:#c4560c;--c2:#2c8a3d;--c3:#8d3cae;--c4:#a8324a;--c5:#6b6f12}
@media(prefers-color-scheme:dark){:root{--back:#15181c;--text:#e4e7ea;--soft:#9aa3ad;--line:#343a41;
--c0:#62aef0;--c1:#f29a56;--c2:#6fce80;--c3:#c88ae6;--c4:#f0808f;--c5:#c9cd5c}}
body{background:var(--back);color:var(--text);font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid var(--line)}
.wide{overflow-x:auto}.row{display:flex;flex-wrap:wrap;gap:.8rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6rem 0 1.2rem}
caption{text-align:left;color:var(--soft)}
th,td{padding:.15rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
pre{overflow-x:auto;border:1px solid var(--line);padding:.7rem;border-radius:4px}
figure{margin:0 0 .6rem}figcaption{color:var(--soft);font-size:.85rem}
.row figure{flex:1 1 12rem;max-width:22rem}
.row figure.plot{flex:1 1 24rem;max-width:36rem}
img{width:100%;image-rendering:pixelated;display:block}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:12px;font-family:inherit}
.zero{stroke:var(--soft)}
.axis{stroke:var(--line);fill:none}
.line{fill:none;stroke-width:1.6}.band{opacity:.22}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}.s5{stroke:var(--c5)}
.f0{fill:var(--c0)}.f1{fill:var(--c1)}.f2{fill:var(--c2)}.f3{fill:var(--c3)}.f4{fill:var(--c4)}.f5{fill:var(--c5)}
";

/// Number of series with a colour of their own.
pub(super) const COLOURS: usize = 6;

/// A page that is being written. It loads nothing and runs no scripts. All text is escaped.
pub struct Page {
    html: String,
}

impl Page {
    pub fn new(title: &str) -> Self {
        let title = escape(title);
        // The policy prevents loading and running, should an escape be missing.
        let html = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; \
             style-src 'unsafe-inline'\">\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
             <title>{title}</title><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        );
        Self { html }
    }

    /// Returns the page as HTML.
    pub fn finish(mut self) -> String {
        self.html += "</body></html>\n";
        self.html
    }

    pub fn heading(&mut self, text: &str) {
        self.add(format_args!("<h2>{}</h2>\n", escape(text)));
    }

    pub fn text(&mut self, text: &str) {
        self.add(format_args!("<p>{}</p>\n", escape(text)));
    }

    pub fn preformatted(&mut self, text: &str) {
        self.add(format_args!("<pre>{}</pre>\n", escape(text)));
    }

    /// Adds a list of names and values.
    pub fn pairs(&mut self, pairs: &[(String, String)]) {
        self.html += "<table>";
        for (name, value) in pairs {
            let (name, value) = (escape(name), escape(value));
            self.add(format_args!("<tr><td>{name}</td><td>{value}</td></tr>"));
        }
        self.html += "</table>\n";
    }

    pub fn table(&mut self, table: &Table) {
        let line = |tag: &str, cells: &[String]| {
            let cell = |c: &String| format!("<{tag}>{}</{tag}>", escape(c));
            format!("<tr>{}</tr>", cells.iter().map(cell).collect::<String>())
        };
        self.add(format_args!(
            "<div class=\"wide\"><table><caption>{}</caption>{}",
            escape(&table.title),
            line("th", &table.head)
        ));
        for row in &table.rows {
            self.html += &line("td", row);
        }
        self.html += "</table></div>\n";
    }

    /// Adds a row of images with its label above.
    pub fn samples(&mut self, row: &SampleRow) {
        self.text(&row.label);
        self.html += "<div class=\"row\">";
        for (label, image) in &row.images {
            let (label, data) = (escape(label), data_uri(image));
            self.add(format_args!(
                "<figure><img alt=\"{label}\" src=\"{data}\"><figcaption>{label}</figcaption></figure>"
            ));
        }
        self.html += "</div>\n";
    }

    /// Adds a row of drawings.
    pub(super) fn plots(&mut self, plots: impl IntoIterator<Item = String>) {
        self.html += "<div class=\"row\">";
        for svg in plots {
            self.add(format_args!("<figure class=\"plot\">{svg}</figure>"));
        }
        self.html += "</div>\n";
    }

    fn add(&mut self, text: std::fmt::Arguments) {
        // Writing to a string cannot fail.
        let _ = self.html.write_fmt(text);
    }
}

/// Escapes `text` for an element or a quoted attribute.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            // Control characters are not allowed in HTML.
            c if c.is_control() && !c.is_whitespace() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Encodes `image` as a PNG in a data URL; `None` for an image without pixels.
fn data_uri(image: &RgbImage) -> String {
    let mut png = Cursor::new(Vec::new());
    match image.write_to(&mut png, ImageFormat::Png) {
        Ok(()) => format!("data:image/png;base64,{}", base64(png.get_ref())),
        Err(_) => "data:,".into(),
    }
}

/// Base64 (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |i: usize| group.get(i).copied().map_or(0, usize::from);
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            out.push(if i <= group.len() {
                char::from(DIGITS[bits >> (18 - 6 * i) & 63])
            } else {
                '='
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        for (text, want) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(text.as_bytes()), want);
        }
    }

    #[test]
    fn all_text_is_escaped() {
        assert_eq!(
            escape("<a href=\"x\" b='y'>&\u{0}\u{1b}\n"),
            "&lt;a href=&quot;x&quot; b=&#39;y&#39;&gt;&amp;\u{fffd}\u{fffd}\n"
        );
    }
}

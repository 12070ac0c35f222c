//! Tables of text.

use std::fmt;

/// A table with a title, a heading for each column, and rows of cells. The first column has names,
/// the others have numbers. [`fmt::Display`] writes it for a terminal.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    pub title: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = || std::iter::once(&self.head).chain(&self.rows);
        let columns = lines().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = lines().filter_map(|line| line.get(column));
            cells.map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        writeln!(f, "{}", self.title)?;
        for line in lines() {
            let mut text = String::new();
            for (i, (cell, width)) in line.iter().zip(&widths).enumerate() {
                text += &match i {
                    0 => format!("  {cell:width$}"),
                    _ => format!("  {cell:>width$}"),
                };
            }
            writeln!(f, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let line = |cells: [&str; 3]| cells.map(str::to_string).to_vec();
        let table = Table {
            title: "x2".into(),
            head: line(["", "PSNR-Y", "n"]),
            rows: vec![line(["bicubic", "30.1", "±1"]), line(["a", "-", "100"])],
        };
        let want = "x2\n           PSNR-Y    n\n  bicubic    30.1   ±1\n  a             -  100\n";
        assert_eq!(table.to_string(), want);
    }
}

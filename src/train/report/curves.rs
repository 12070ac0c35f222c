//! Values of every step, from the log of a run.

use std::{fs, path::Path};

use crate::{Error, Result};

/// Named columns of numbers, one for each step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curves {
    pub steps: Vec<u64>,
    /// Names and values, one value for each step.
    pub columns: Vec<(String, Vec<f64>)>,
}

impl Curves {
    /// Reads a `losses.csv`: a line of names, of which the first is `step`, then a line for each
    /// step.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self::parse(
            &fs::read_to_string(path).map_err(Error::io(path))?,
        ))
    }

    /// Skips lines that are cut off or damaged.
    pub fn parse(text: &str) -> Self {
        let mut lines = text.lines();
        let names = lines.next().unwrap_or_default().split(',').skip(1);
        let mut columns: Vec<(String, Vec<f64>)> =
            names.map(|name| (name.to_string(), Vec::new())).collect();
        let mut steps = Vec::new();
        for line in lines {
            let mut cells = line.split(',');
            let step = cells.next().and_then(|s| s.parse().ok());
            let values: Option<Vec<f64>> = cells.map(|s| s.parse().ok()).collect();
            let (Some(step), Some(values)) = (step, values) else {
                continue;
            };
            if values.len() == columns.len() {
                steps.push(step);
                let pairs = columns.iter_mut().zip(values);
                pairs.for_each(|((_, column), value)| column.push(value));
            }
        }
        Self { steps, columns }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_lines_are_read_and_damaged_ones_skipped() {
        let text = "step,a,grad_b\n1,1e0,5e-1\n2,nan,2\nx,1,1\n3,1\n4,7,8\n5,9";
        let curves = Curves::parse(text);
        assert_eq!(curves.steps, [1, 2, 4]);
        assert_eq!(curves.columns[1], ("grad_b".into(), vec![0.5, 2.0, 8.0]));
        assert!(curves.columns[0].1[1].is_nan());
        assert_eq!(Curves::parse(""), Curves::default());
    }
}

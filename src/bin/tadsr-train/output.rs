//! Lines on the standard output.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write},
    sync::Mutex,
};

use anyhow::{Result, anyhow};

/// The first error.
static FAILED: Mutex<Option<io::Error>> = Mutex::new(None);

/// Prints `text`. The work goes on after an error, and [`check`] returns it. A reader that has
/// closed a pipe, such as `head`, wants no more: this is no error.
pub fn print(text: Arguments) {
    note(io::stdout().lock().write_fmt(text));
}

fn note(result: io::Result<()>) {
    if let (Err(error), Ok(mut failed)) = (result, FAILED.lock())
        && error.kind() != ErrorKind::BrokenPipe
    {
        failed.get_or_insert(error);
    }
}

/// Checks that all lines were written.
///
/// # Errors
/// The first error of [`print`].
pub fn check() -> Result<()> {
    // Lines are in a buffer until here if the output is a file.
    note(io::stdout().lock().flush());
    let failed = FAILED.lock().ok().and_then(|mut failed| failed.take());
    failed.map_or(Ok(()), |error| {
        Err(anyhow!(
            "cannot write to the standard output: {error}; all else is done"
        ))
    })
}
